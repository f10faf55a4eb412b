"""The loop of rounds: its arrows, what it records, that an interruption changes nothing, and mixing."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest

from prefalign import bundled, config, store
from prefalign.config import ConfigError
from prefalign.engines import Completion
from prefalign.engines.transformers import TransformersEngine
from prefalign.manifest import read_manifest
from prefalign.models import ModelConfig
from prefalign.online import annotating, round_training, rounds
from prefalign.online.checking import EngineGap
from prefalign.online.mixing import offline_prompts
from prefalign.online.sampling import Draw
from prefalign.records import Candidates, Pair, Prompt
from prefalign.store import read_records
from prefalign.training.reference import StaleReference
from prefalign.training.runs import RunError
from tests.launching import ENVIRONMENT, ROOT
from tests.online_runs import online_config, policy_weights, run, write_offline, write_prompts
from tests.training_runs import largest_difference

CHECKED = {"check": {"prompts": 2}}
ARROWS = ("prompts", "candidates", "pairs", "mixed")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("online") / "prompts")


@pytest.fixture(scope="module")
def straight(prompts, tmp_path_factory):
    """Two rounds without interruption: the folder and what `main` returned."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, run(prompts, folder, **CHECKED)


def first_step(policy):
    return json.loads((policy / "trainer_state.json").read_text())["log_history"][0]


def test_every_arrow_counts_its_rows(straight):
    folder, _ = straight
    for number in (1, 2):
        for arrow in ARROWS:
            manifest = read_manifest(folder / f"round-{number}" / arrow)
            assert manifest.complete
            assert manifest.rows_in == manifest.rows_used + sum(manifest.dropped.values())
        kept = read_manifest(folder / f"round-{number}" / "pairs").rows_out
        assert kept == read_manifest(folder / f"round-{number}" / "mixed").rows_out >= 1
    taken = [[p.id for p in read_records(folder / f"round-{n}" / "candidates", Candidates)] for n in (1, 2)]
    assert not set(taken[0]) & set(taken[1])


def test_pairs_record_how_they_came_about(straight):
    folder, _ = straight
    pair = next(read_records(folder / "round-2" / "mixed", Pair))
    assert pair.method == "online_dpo"
    assert {name: pair.meta[name] for name in ("source", "round", "votes")} == {
        "source": "online",
        "round": 2,
        "votes": [],
    }
    assert pair.meta["sampling"]["temperature"] == 1.2
    assert '"objects"' in pair.meta["annotator"]
    scores = pair.meta["scores"]
    assert pair.margin == pytest.approx(scores["chosen"]["total"] - scores["rejected"]["total"])
    assert pair.margin == pair.meta["gap"] > 0
    assert all(-200 < value < 0 for value in pair.meta["logps_at_sampling"].values())
    assert pair.meta["generator"] != next(read_records(folder / "round-1" / "mixed", Pair)).meta["generator"]


def test_the_first_round_starts_at_ln_2_and_the_second_against_the_first_model(straight):
    folder, _ = straight
    first, second = first_step(folder / "round-1" / "policy"), first_step(folder / "policy")
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["rewards/chosen"] == 0.0
    assert second["rewards/chosen"] != 0.0


def test_metrics_of_a_round(straight):
    folder, results = straight
    assert results == json.loads((folder / "results.json").read_text())
    for number, measured in enumerate(results["rounds"], 1):
        assert measured["round"] == number
        assert measured["share_online"] == 1.0
        assert measured["order_consistency"] is None  # scores have no order
        assert 0 <= measured["tie_rate"] <= 1
        assert measured["check"]["largest"] < 1e-4
        assert measured["kl"] > 0
        assert 0 <= measured["rewards"]["online"]["accuracies"] <= 1
        pairs = list(read_records(folder / f"round-{number}" / "mixed", Pair))
        gaps = [len(p.chosen[0]["content"][0]["text"]) - len(p.rejected[0]["content"][0]["text"]) for p in pairs]
        assert measured["length_gap"]["online"] == pytest.approx(sum(gaps) / len(gaps))


def test_a_finished_run_is_left_alone_and_another_config_refused(straight, prompts, capsys):
    folder, results = straight
    written = (folder / "policy" / "model.safetensors").stat().st_mtime_ns
    assert run(prompts, folder, **CHECKED) == results
    assert (folder / "policy" / "model.safetensors").stat().st_mtime_ns == written
    assert "acc. online" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"another config \(margin: 0.0 -> 0.5\).*give another `output`"):
        run(prompts, folder, margin=0.5, **CHECKED)


def test_resume_says_whether_a_run_has_begun(straight, prompts, tmp_path):
    folder, results = straight
    assert run(prompts, folder, resume=True, **CHECKED) == results
    with pytest.raises(RunError, match=r"resume is false and .* holds a run"):
        run(prompts, folder, resume=False, **CHECKED)
    with pytest.raises(RunError, match=r"resume is true and .* holds no run"):
        run(prompts, tmp_path / "new", resume=True)


def test_other_offline_pairs_are_another_run(prompts, tmp_path):
    offline = write_offline(tmp_path / "offline", prompts)
    one_round = {"rounds": {"count": 1, "prompts": 2}, "offline": offline, "p_offline": 1.0}
    run(None, tmp_path / "run", **one_round)
    shutil.rmtree(offline)
    write_offline(offline, prompts, 3)
    with pytest.raises(RunError, match=r"offline: their manifest is another one now"):
        run(None, tmp_path / "run", **one_round)


def test_a_round_without_a_usable_online_pair_trains_on_the_offline_ones(prompts, tmp_path, capsys):
    offline = write_offline(tmp_path / "offline", prompts, 3)
    settings = {"margin": 1000.0, "rounds": {"count": 1, "prompts": 0}}
    results = run(prompts, tmp_path / "mixed", offline=offline, p_offline=1.0, **settings)
    (measured,) = results["rounds"]
    assert measured["pairs"] == {"offline": 3}
    assert measured["dropped"] == {"no_usable_pair": 3}
    assert "trains on its 3 offline pairs alone: annotate_online made no row out of 6" in capsys.readouterr().out
    with pytest.raises(
        RunError, match=r"round 1 of 1 has nothing to train on: none of its 6 prompts.*smaller `margin`"
    ):
        run(prompts, tmp_path / "online", **settings)


@pytest.mark.parametrize(
    ("bad", "mended", "words"),
    [
        ({"rewards": [{"name": "object"}]}, {}, "object"),
        ({"trainer": {"learning_rat": 1.0}}, {}, "learning_rat: unknown key"),
        ({"losses": [{"name": "text"}, {"name": "visual"}]}, {}, "look at `rejected_images`"),
        (
            {"check": {"prompts": 2, "bound": 1e-12}},
            {"check": {"prompts": 2, "bound": 1.0}, "batch_size": 4},
            "check.bound",
        ),
    ],
)
def test_a_mended_config_goes_on_in_the_same_folder(bad, mended, words, prompts, tmp_path, monkeypatch):
    with pytest.raises((ConfigError, EngineGap), match=words):
        run(prompts, tmp_path / "run", **bad)
    monkeypatch.setattr(rounds, "mix", interrupted)
    with pytest.raises(Interruption):
        run(prompts, tmp_path / "run", **mended)


def test_another_evaluation_is_another_run_once_one_was_made(prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "mix", interrupted)
    for evaluation in ({"draws": 1}, {"draws": 2}):
        with pytest.raises(Interruption):
            run(prompts, tmp_path / "run", evaluation=evaluation)
    done = tmp_path / "run" / "round-1" / "evaluation"
    done.mkdir()
    (done / "results.json").write_text("{}")
    with pytest.raises(RunError, match=r"another config \(evaluation"):
        run(prompts, tmp_path / "run", evaluation={"draws": 3})


def test_an_evaluation_that_fails_costs_no_round_and_is_made_up_for(prompts, tmp_path, monkeypatch, capsys):
    """A folder stands where the first round's evaluation writes its log."""
    small = {"scenes": {"pictures": 4, "evals": ["chair"]}, "reliance": {"conditions": []}, "draws": 50}
    settings = {"evaluation": small}
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "mix", interrupted)
        with pytest.raises(Interruption):
            run(prompts, tmp_path / "run", **settings)
    in_the_way = tmp_path / "run" / "round-1" / "evaluation.txt"
    in_the_way.mkdir()
    results = run(prompts, tmp_path / "run", **settings)
    first, second = results["rounds"]
    assert first["evaluation"] == {}
    assert 0 <= second["evaluation"]["chair_i"] <= 1
    assert results["before"]["chair_i"] is not None
    [warning] = [line for line in results["warnings"] if "no evaluation" in line]
    assert "no evaluation after round 1: IsADirectoryError" in warning
    assert "start the same command again" in warning
    assert "chair_i" in capsys.readouterr().out
    weights = policy_weights(tmp_path / "run" / "policy")
    in_the_way.rmdir()
    again = run(prompts, tmp_path / "run", **settings)
    assert 0 <= again["rounds"][0]["evaluation"]["chair_i"] <= 1
    assert again["rounds"][1] == second
    assert again["rounds"][0]["rewards"] == first["rewards"]
    assert not [line for line in again["warnings"] if "no evaluation" in line]
    assert largest_difference(weights, policy_weights(tmp_path / "run" / "policy")) == 0
    with pytest.raises(ConfigError, match="drawz"):
        run(prompts, tmp_path / "bad", evaluation={"drawz": 1})
    assert not (tmp_path / "bad").exists()


def test_a_policy_that_answers_nothing_stops_a_mixed_run(prompts, tmp_path, monkeypatch):
    offline = write_offline(tmp_path / "offline", prompts, 3)
    failing = [Completion("x", "", finish_reason="error", error="no memory")] * 6
    monkeypatch.setattr(TransformersEngine, "generate", lambda self, requests, sampling: failing[: len(requests)])
    with pytest.raises(
        RunError, match=r"round 1 of 1 has no answers: sample_policy made no row out of 6.*none of the 3"
    ):
        run(prompts, tmp_path / "run", offline=offline, p_offline=1.0, rounds={"count": 1, "prompts": 0})


def interrupted(*args, **kwargs):
    raise Interruption


def test_several_processes_are_refused(prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes were started.*Start one process"):
        run(prompts, tmp_path / "run")


@pytest.mark.parametrize("algorithm", ["online_dpo", "online_dpo_step"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": {"beta": math.nan}}, "trainer.beta is nan, no scale of a reward"),
        ({"trainer": {"loss_type": ["foo"]}}, "trainer.loss_type: TRL has no loss 'foo'"),
        ({"trainer": {"label_smoothing": 2.0}}, "trainer.label_smoothing is 2.0; it is the share of wrong labels"),
        ({"trainer": {"learning_rate": -1.0}}, "trainer.learning_rate is -1.0, with which no step can be taken"),
        ({"trainer": {"per_device_train_batch_size": 0}}, "trainer.per_device_train_batch_size is 0.*Give 1 or more"),
        ({"trainer": {"eval_strategy": "steps"}}, "trainer.eval_strategy is 'steps', and .* no held-out pairs.*Leave it out"),
        ({"trainer": {"eval_on_start": True}}, "trainer.eval_on_start is True, and .* no held-out pairs"),
        ({"trainer": {"save_strategy": "best"}}, "trainer.save_strategy is 'best', and .* no held-out pairs"),
        ({"freeze": ["foo"]}, "no tower called 'foo' to freeze"),
        ({"rewards": [{"name": "objects", "weight": {"inventd": 1}}]}, "gives no term 'inventd', .*did you mean 'invented'"),
    ],
)  # fmt: skip
def test_settings_that_the_trainer_refuses_leave_no_folder(changes, words, algorithm, prompts, tmp_path):
    changes = config.merge({"trainer": {"algorithm": algorithm}}, changes)
    with pytest.raises(ValueError, match=words):
        run(prompts, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


class Interruption(RuntimeError):
    pass


def interrupt(monkeypatch, owner, name, call):
    """Let the call of this number of a function raise instead."""
    original, calls = getattr(owner, name), [0]

    def stopping(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Interruption(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, stopping)


def kill(config_file, out, file):
    """Start a run as a user does, and end it with kill -9 as soon as a file is there."""
    command = [sys.executable, "-m", "prefalign.cli", "run", "train_online", "--config", config_file, "--output", out]
    process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while not file.is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_kill_and_interruptions_between_and_inside_arrows_change_nothing(straight, prompts, tmp_path, monkeypatch):
    folder, expected = straight
    out = tmp_path / "run"
    kill(folder / "prefalign_config.yaml", out, out / "round-1" / "candidates" / "progress" / "00000.json")
    assert not (out / "results.json").exists()
    places = [
        (annotating.ByScore, "prefer", 2),  # inside the pairs
        (round_training, "cache_reference", 1),  # between pairs and training
        (round_training.SourcesTrainer, "training_step", 2),  # inside training, after a checkpoint
        (store.blocks, "commit", 3),  # in the second round, after its slice and one block of candidates
        (round_training, "train_and_save", 1),
    ]
    for owner, name, call in places:
        with monkeypatch.context() as patch:
            interrupt(patch, owner, name, call)
            with pytest.raises(Interruption):
                run(prompts, out, **CHECKED)
    results = run(prompts, out, **CHECKED)
    assert largest_difference(policy_weights(out / "policy"), policy_weights(folder / "policy")) == 0.0
    assert results == expected


def test_all_offline_is_offline_dpo(prompts, tmp_path):
    """p 1: the rows, batches and weights of `train_preference` on the offline pairs; nothing is sampled."""
    offline = write_offline(tmp_path / "offline", prompts)
    run(None, tmp_path / "run", offline=offline, p_offline=1.0, rounds={"count": 1, "prompts": 0})
    assert not (tmp_path / "run" / "round-1" / "candidates").exists()
    stage = bundled.load_stage("train_preference")
    same = {"model": {"model_name_or_path": "scenes", "device": "cpu"}, "pairs": offline, "output": tmp_path / "offline_run",
            "trainer": online_config(None, tmp_path, offline=offline).trl, "freeze": []}  # fmt: skip
    stage.main(config.build(stage.Config, same))
    histories = [
        [
            {name: entry[name] for name in ("loss", "logps/chosen", "logps/rejected", "num_tokens") if name in entry}
            for entry in json.loads((policy / "trainer_state.json").read_text())["log_history"]
        ]
        for policy in (tmp_path / "run" / "policy", tmp_path / "offline_run")
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 7
    one, two = policy_weights(tmp_path / "run" / "policy"), policy_weights(tmp_path / "offline_run")
    assert largest_difference(one, two) == 0.0


def test_mixing_takes_each_prompt_once(prompts, tmp_path):
    offline = write_offline(tmp_path / "offline", prompts, count=4)
    one_round = {"count": 1, "prompts": 0, "block_size": 6}
    results = run(prompts, tmp_path / "run", offline=offline, seed=3, rounds=one_round)
    ids = [prompt.id for prompt in read_records(tmp_path / "run" / "prompts", Prompt)]
    draw = Draw(frozenset(ids[:4]), 0.5, 3, 1)
    expected = {identity for identity in ids if draw.takes_offline(identity)}
    assert 0 < len(expected) < 4
    pairs = list(read_records(tmp_path / "run" / "round-1" / "mixed", Pair))
    by_source = {
        source: {p.meta["parent"] for p in pairs if p.meta["source"] == source} for source in ("offline", "online")
    }
    assert by_source["offline"] == expected
    assert by_source["online"]
    assert not by_source["online"] & expected
    dropped = read_manifest(tmp_path / "run" / "round-1" / "candidates").dropped
    assert dropped == {"drawn_offline": len(expected)}
    assert results["rounds"][0]["pairs"]["offline"] == len(expected)
    assert set(results["rounds"][0]["rewards"]) == {"offline", "online"}


def test_no_offline_pair_is_taken_at_p_0(prompts, tmp_path):
    offline = write_offline(tmp_path / "offline", prompts)
    results = run(prompts, tmp_path / "run", offline=offline, p_offline=0.0, rounds={"count": 1})
    assert set(results["rounds"][0]["pairs"]) == {"online"}
    assert results["rounds"][0]["kl"] is None


def test_the_draw_depends_on_seed_visit_and_id_alone():
    ids = [str(number) for number in range(2000)]
    draw = Draw(frozenset(ids), 0.5, 0, 1)
    taken = {identity for identity in ids if draw.takes_offline(identity)}
    assert 900 < len(taken) < 1100
    fewer = Draw(frozenset(ids[::2]), 0.5, 0, 1)
    assert {identity for identity in reversed(ids) if fewer.takes_offline(identity)} == taken & set(ids[::2])
    for other in (Draw(frozenset(ids), 0.5, 1, 1), Draw(frozenset(ids), 0.5, 0, 2)):
        assert 300 < len(taken & {identity for identity in ids if other.takes_offline(identity)}) < 700


def test_offline_pairs_of_other_prompts_are_refused(prompts, tmp_path):
    pairs = write_offline(tmp_path / "offline", prompts, 3)
    ids = [prompt.id for prompt in read_records(prompts, Prompt)]
    assert offline_prompts(pairs, set(ids)) == set(ids[:3])
    with pytest.raises(ValueError, match=r"no pair of .* belongs to any of the 2 prompts.*leave `data` out"):
        offline_prompts(pairs, {"a", "b"})


@pytest.mark.parametrize("reference", ["first", "previous"])
def test_adapters_go_on_and_the_reference_is_the_one_asked_for(reference, prompts, tmp_path):
    offline = write_offline(tmp_path / "offline", prompts)
    run(None, tmp_path / "run", offline=offline, p_offline=1.0, lora={"r": 4, "alpha": 8}, freeze=["vision"],
        rounds={"count": 2, "prompts": 3, "reference": reference})  # fmt: skip
    one, two = policy_weights(tmp_path / "run" / "round-1" / "policy"), policy_weights(tmp_path / "run" / "policy")
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) > 1e-5
    adapter = json.loads((tmp_path / "run" / "policy" / "adapter_config.json").read_text())
    assert "round-1" not in adapter["base_model_name_or_path"]
    step = first_step(tmp_path / "run" / "policy")
    if reference == "previous":
        assert step["loss"] == pytest.approx(0.6931472, abs=1e-6)
        assert step["rewards/chosen"] == 0.0
    else:
        assert abs(step["rewards/chosen"]) > 1e-6


def test_online_bdhs_in_rounds(prompts, tmp_path):
    bdhs = {"rho_th": 0.9, "iterations": 2}
    run(prompts, tmp_path / "run", rewards=[], bdhs=bdhs, rounds={"count": 2, "prompts": 2})
    generators = set()
    for number in (1, 2):
        for pair in read_records(tmp_path / "run" / f"round-{number}" / "mixed", Pair):
            assert (pair.meta["source"], pair.meta["round"], pair.meta["online"]) == ("online", number, True)
            assert pair.chosen[0]["content"][0]["text"] == pair.answer
            generators.add(pair.meta["generator"])
    assert len(generators) == 2


def test_a_reference_of_other_rows_is_refused(prompts, tmp_path):
    settings = round_training.TrainingSettings(
        trainer={"gradient_checkpointing": False, "disable_tqdm": True}, freeze=[]
    )
    few, all_of_them = (write_offline(tmp_path / f"pairs{n}", prompts, n) for n in (2, 3))
    model, cache = ModelConfig("scenes", device="cpu"), tmp_path / "reference"
    known = round_training.fill_reference(settings, model, few, cache, continues=False, seed=0, output=tmp_path / "x")
    again = {"reference_folder": cache, "continues": False, "seed": 0}
    with pytest.raises(StaleReference, match=r"1 rows of the run are not in it.*Delete the folder"):
        round_training.train_round(settings, model, all_of_them, tmp_path / "a", reference=known, **again)
    with pytest.raises(StaleReference, match=r"reference: .* -> another"):
        round_training.train_round(settings, model, few, tmp_path / "b", reference="another", **again)


def test_after_the_last_prompt_the_first_comes_again(prompts, tmp_path):
    config = online_config(prompts, tmp_path / "run", rounds={"prompts": 4})
    rounds.gather_prompts(config)
    ids = [prompt.id for prompt in read_records(prompts, Prompt)]
    slices = [[p.id for p in read_records(rounds._slice(config, n, len(ids)), Prompt)] for n in (1, 2, 3)]
    assert slices == [ids[:4], [*ids[4:], *ids[:2]], ids[2:]]

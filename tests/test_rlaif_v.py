"""RLAIF-V on the embedded world: verdicts kept, pairs drawn and balanced, pictures that matter, runs that were killed."""

import dataclasses
import json
import os
import re
import subprocess

import pytest
from PIL import Image
from test_claims import Labeller
from test_online_recipes import carry_out

from prefalign import bundled, config
from prefalign.claims import ClaimJudge
from prefalign.config import ConfigError
from prefalign.dividing import DivideConfig
from prefalign.engines import Completion, FirstToken
from prefalign.engines.config import EngineConfig
from prefalign.execution import WHOLE, Ended, StageWorker
from prefalign.images import encode_png
from prefalign.length_balance import Cut
from prefalign.records import Candidates, Pair, Prompt, message_text, user_message
from prefalign.scenes.export import export
from prefalign.store import Dropped, Failed, OutputConfig, StoreError, read_records, run_job, write_records
from tests.launching import ROOT
from tests.tiny_vlms import picture

ROWS = 6
SCENES = config.read_yaml(bundled.find("datagen/rlaif_v_scenes"))
SMALL = {"output": {"block_size": 2}, "batch_size": 16, "num_generations": 4, "pairs": {"length_balance": "off"},
         "sampling": {"max_new_tokens": 64, "temperature": 1.0}}  # fmt: skip


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("rlaif_v")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlaif") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=ROWS)
    return folder


def settings(stage, rows, folder, **changes):
    known = config.merge(SMALL, {"data": {"path": rows}, "output": {"path": folder}})
    return config.build(stage.Config, config.merge(config.merge(SCENES, known), changes))


def survey_of(folder):
    files = sorted(folder.glob("survey/claims-*.json"))
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


@pytest.fixture(scope="module")
def finished(stage, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlaif") / "out"
    manifest = stage.main(settings(stage, rows, folder))
    return folder, manifest, list(read_records(folder, Pair))


def test_every_verdict_of_a_pair_is_kept(finished):
    _, manifest, pairs = finished
    assert manifest.rows_in == ROWS == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out == len(pairs) >= 4
    assert set(manifest.models) == {"generator", "labeller"}
    by_parent = {}
    for pair in pairs:
        meta = pair.meta
        by_parent.setdefault(meta["parent"], []).append((meta["chosen_index"], meta["rejected_index"]))
        assert pair.margin >= 1
        assert pair.margin == meta["scores"][meta["chosen_index"]] - meta["scores"][meta["rejected_index"]]
        assert meta["sampling"]["temperature"] == 1.0
        for side, text in (("chosen", message_text(pair.chosen)), ("rejected", message_text(pair.rejected))):
            judged = meta["claims"][side]
            assert len(judged["claims"]) == len(judged["questions"]) == len(judged["p_yes"]) == len(judged["p_no"])
            assert judged["score"] == -sum(yes <= no for yes, no in zip(judged["p_yes"], judged["p_no"], strict=True))
            assert meta["words"][side] == len(text.split())
            assert all(yes + no > 0.9 for yes, no in zip(judged["p_yes"], judged["p_no"], strict=True))
    for drawn in by_parent.values():
        assert len(set(drawn)) == len(drawn) <= 2
    assert any(len(drawn) == 2 for drawn in by_parent.values())
    assert len({pair.id for pair in pairs}) == len(pairs)


def test_the_figures_add_up(finished):
    folder, _, pairs = finished
    found = json.loads((folder / "claims.json").read_text())
    assert sum(found["answers"].values()) == ROWS * 4
    assert found["pairs_drawn"] == len(pairs) == found["length_balance"]["after"]["pairs"]
    survey = survey_of(folder)
    assert sum(found["claims"].values()) == sum(len(judged["verdicts"]) for row in survey for judged in row["judged"])
    words = [pair.meta["words"]["rejected"] for pair in pairs]
    assert found["length_balance"]["before"]["rejected_words"] == pytest.approx(sum(words) / len(words), abs=1e-3)


def test_answers_are_those_of_sample_responses_and_stored_ones_are_judged_alike(stage, finished, rows, tmp_path):
    sampler = bundled.load_stage("sample_responses")
    known = {"model": SCENES["model"], "data": {"path": rows}, "output": {"path": tmp_path / "sampled"}, "num_generations": 4,
             "sampling": SMALL["sampling"]}  # fmt: skip
    sampler.main(config.build(sampler.Config, known))
    stored = settings(stage, tmp_path / "sampled", tmp_path / "out", model=None, labeller=SCENES["model"])
    manifest = stage.main(stored)
    assert set(manifest.models) == {"labeller"}
    one, other = survey_of(finished[0]), survey_of(tmp_path / "out")
    assert [[said["text"] for said in row["responses"]] for row in one] == [
        [said["text"] for said in row["responses"]] for row in other]  # fmt: skip
    for mine, theirs in zip(one, other, strict=True):
        for first, second in zip(mine["judged"], theirs["judged"], strict=True):
            assert first["verdicts"] == second["verdicts"]
            assert first["p_yes"] == pytest.approx(second["p_yes"], abs=1e-5)
    made = next(read_records(tmp_path / "out", Pair))
    candidates = {row.id: row for row in read_records(tmp_path / "sampled", Candidates)}
    assert made.meta["generator"] == candidates[made.meta["parent"]].responses[0]["generator"] != ""


def test_another_picture_changes_the_verdicts(stage, finished, rows, tmp_path):
    one, other = list(read_records(rows, Prompt))[:2]
    known = settings(stage, rows, tmp_path, model=None, labeller=SCENES["model"])
    models = stage.load(known)
    said = survey_of(finished[0])[0]["responses"]
    right = Candidates("a", one.images, one.messages, said)
    swapped, blank = (dataclasses.replace(right, images=images) for images in
                      (other.images, [encode_png(Image.new("RGB", (60, 60), "white"), "b.png")]))  # fmt: skip
    seen, wrong, empty = (stage.measure([row], models, known)[0]["judged"] for row in (right, swapped, blank))
    assert [judged["verdicts"] for judged in seen] != [judged["verdicts"] for judged in wrong]
    assert sum(judged.get("score") or 0 for judged in empty) < sum(judged.get("score") or 0 for judged in seen)


@pytest.mark.parametrize("where", ["measure", "outcome"])
def test_a_killed_run_ends_with_the_rows_of_one_that_was_not(stage, finished, rows, tmp_path, monkeypatch, where):
    """Killed in the second block of the pass, or after the first shard was written: nothing is lost, nothing comes twice."""
    calls = []
    work = getattr(stage, where)

    def killed(*given):
        calls.append(given)
        if len(calls) == (2 if where == "measure" else 3):
            raise KeyboardInterrupt
        return work(*given)

    folder = tmp_path / "killed"
    monkeypatch.setattr(stage, where, killed)
    with pytest.raises(KeyboardInterrupt):
        stage.main(settings(stage, rows, folder))
    assert len(list(folder.glob("survey/*.json"))) == (1 if where == "measure" else 3)
    manifest = stage.main(settings(stage, rows, folder))
    expected, made = finished[1], list(read_records(folder, Pair))
    assert made == finished[2]
    assert (manifest.rows_used, manifest.rows_out, manifest.dropped) == (
        expected.rows_used, expected.rows_out, expected.dropped)  # fmt: skip
    assert (folder / "claims.json").read_text() == (finished[0] / "claims.json").read_text()
    assert len(calls) == (4 if where == "measure" else 3 + 4)  # what was done is not done again


def test_a_shorter_list_of_prompts_draws_the_same_pairs_and_other_settings_refuse(stage, finished, rows, tmp_path):
    """Every draw belongs to its row: two prompts alone give the pairs that they give among six."""
    stage.main(settings(stage, rows, tmp_path / "two", data={"limit": 2}))
    texts = [(message_text(pair.chosen), message_text(pair.rejected)) for pair in read_records(tmp_path / "two", Pair)]
    assert texts == [(message_text(p.chosen), message_text(p.rejected)) for p in finished[2]][: len(texts)]
    with pytest.raises(StoreError, match="another config"):
        stage.main(settings(stage, rows, finished[0], per_claim=True, pairs={"min_gap": 0.5}))
    with pytest.raises(StoreError, match="another config"):
        stage.main(settings(stage, rows, finished[0], conquer={"no": ["Nothing", "No"]}))


@pytest.mark.parametrize("order", [[0, 2, 1], [2, 1, 0]])
def test_blocks_are_served_in_any_order(stage, finished, rows, tmp_path, order):
    """As actors are sent them: where one has died, an earlier block goes to one that has done later ones."""
    worker = StageWorker(stage.main, settings(stage, rows, tmp_path / "out"), WHOLE)
    job = worker.next_step()
    assert not isinstance(job, Ended), job.error

    def spread(blocks):
        known = list(blocks)
        for number in order:
            made = worker.work(known[number].given)
            assert not isinstance(made, Ended), made.trace
            yield known[number], made

    worker.finish(run_job(job, spread, WHOLE))
    end = worker.next_step()
    assert end.error is None
    assert end.result.rows_out == finished[1].rows_out
    assert list(read_records(tmp_path / "out", Pair)) == finished[2]


def test_what_was_found_is_told_at_the_end(stage, finished, rows, capsys):
    stage.main(settings(stage, rows, finished[0]))
    (told,) = re.findall("^rlaif_v: .*", capsys.readouterr().err, re.MULTILINE)
    words = json.loads((finished[0] / "claims.json").read_text())["length_balance"]["after"]["chosen_words"]
    assert f"pairs_drawn {len(finished[2])}, " in told
    assert f"'chosen_words': {words}, " in told


DRAGON = "A dragon sleeps. "
CAT = "A cat sits. "


def candidates(texts, name="row", images=None, generators=("g",)):
    said = [
        {"text": text.strip(), "finish_reason": "stop", "tokens": 3, "settings": {"temperature": 0.7},
         "generator": generators[number % len(generators)]}
        for number, text in enumerate(texts)
    ]  # fmt: skip
    images = [encode_png(picture(1), "a.png")] if images is None else images
    return Candidates(name, images, [user_message("What is it?", len(images))], said)


@pytest.fixture
def by_hand(stage, tmp_path):
    """Judges stored answers by sentences; the labeller refutes dragons, and cannot be sure of fog."""
    labeller = Labeller({"dragon": {"No": 0.9}, "fog": {"all": 0.1}})
    models = stage.Models(None, ClaimJudge(labeller, None, DivideConfig(by="rules")))

    def judged(*rows, **pairs):
        known = stage.Config(
            data=None, output=OutputConfig(tmp_path), labeller=EngineConfig("scenes"), pairs=stage.PairsConfig(**pairs)
        )
        found = stage.measure(rows, models, known)
        return found, [stage.outcome(row, one, Cut(), {}, known) for row, one in zip(rows, found, strict=True)]

    return judged


def distinct(number, text):
    """The same claims, in another answer."""
    return text + "Cat number " + "abcdefgh"[number] + ". "


def test_worked_scores_and_pairs(by_hand):
    """Scores -1, -3, -1, 0: pairs 3-0, 3-1, 3-2, 0-1, 2-1 differ by a claim at least, 0-2 is a tie."""
    texts = [distinct(0, DRAGON + CAT), distinct(1, DRAGON + "Two dragons fly. One dragon reads. "),
             distinct(2, "A dragon flies. "), distinct(3, CAT)]  # fmt: skip
    (found,), (pairs,) = by_hand(candidates(texts), per_prompt=10)
    assert [judged["score"] for judged in found["judged"]] == [-1, -3, -1, 0]
    drawn = {(pair.meta["chosen_index"], pair.meta["rejected_index"]): pair.margin for pair in pairs}
    assert drawn == {(3, 0): 1, (3, 1): 3, (3, 2): 1, (0, 1): 2, (2, 1): 2}
    (_,), (two,) = by_hand(candidates(texts))
    assert len(two) == 2
    assert {(pair.meta["chosen_index"], pair.meta["rejected_index"]) for pair in two} < set(drawn)
    (_,), (wide,) = by_hand(candidates(texts), min_gap=3.0, per_prompt=10)
    assert [pair.margin for pair in wide] == [3]
    other = {tuple(pair.margin for pair in by_hand(candidates(texts, name))[1][0]) for name in "abcdefgh"}
    assert len(other) > 1  # which are drawn depends on the row


def test_what_gives_no_pair_says_why(by_hand):
    wordless, foggy = "no stop here", "There is fog. "
    rows = [
        candidates([DRAGON, "Two dragons. "], "tie"),
        candidates([DRAGON, wordless, foggy, ""], "few"),
        candidates([DRAGON, CAT], "two", generators=("g", "h")),
        candidates([DRAGON, CAT], "blind", images=[]),
        candidates([DRAGON, CAT], "broken", images=[{"bytes": b"no picture", "path": "a.png"}]),
        candidates([DRAGON, DRAGON.upper(), CAT], "good"),
    ]
    found, outcomes = by_hand(*rows)
    reasons = [one.reason for one in outcomes[:4]]
    assert reasons == ["small_gap", "few_judged", "several_generators", "no_picture"]
    assert all(isinstance(one, Dropped) for one in outcomes[:4])
    assert isinstance(outcomes[4], Failed)
    assert [judged["reason"] for judged in found[1]["judged"]] == [None, "no_claims", "undecided", "empty"]
    assert [judged["reason"] for judged in found[5]["judged"]] == [None, "duplicate", None]
    (pair,) = outcomes[5]
    assert (message_text(pair.chosen), message_text(pair.rejected)) == (CAT.strip(), DRAGON.strip())


def test_answers_at_the_length_limit_are_used_as_published_or_left_out(by_hand):
    row = candidates([DRAGON, CAT])
    row.responses[0]["finish_reason"] = "length"
    assert len(by_hand(row)[1][0]) == 1
    found, (dropped,) = by_hand(row, unfinished=False)
    assert dropped.reason == "few_judged"
    assert found[0]["judged"][0]["reason"] == "unfinished"


def test_the_length_balance_is_of_the_whole_set(stage, tmp_path, monkeypatch):
    """Chosen answers of 2, 8, 10 and 12 words against 10 each: the shortest goes, wherever its block is."""
    labeller = Labeller({"dragon": {"No": 0.9}})
    words = "a b c d e f g h i j k l"
    rows = []
    for number, length in enumerate((2, 8, 10, 12)):
        good = " ".join(f"{word}{number}" for word in words.split()[:length]) + "."
        rows.append(candidates([f"A dragon is here in the room of the {number}.", good], f"row{number}"))
    write_records("t", rows, output=OutputConfig(tmp_path / "in"), record=Candidates, settings={}, seed=0)
    models = stage.Models(None, ClaimJudge(labeller, None, DivideConfig(by="rules")))
    monkeypatch.setattr(stage, "load", lambda config: models)
    known = {
        "model": None,
        "labeller": SCENES["model"],
        "pairs": {"length_balance": "both"},
        "output": {"block_size": 1},
    }
    manifest = stage.main(settings(stage, tmp_path / "in", tmp_path / "out", **known))
    kept = [pair.meta["words"] for pair in read_records(tmp_path / "out", Pair)]
    assert kept == [{"chosen": length, "rejected": 10} for length in (8, 10, 12)]
    assert manifest.dropped == {"length_balance": 1}
    balance = json.loads((tmp_path / "out" / "claims.json").read_text())["length_balance"]
    assert balance["before"] == {"pairs": 4, "chosen_words": 8.0, "rejected_words": 10.0}
    assert balance["after"] == {"pairs": 3, "chosen_words": 10.0, "rejected_words": 10.0}


class Server(Labeller):
    """A labeller that is a splitter too; down, it answers nothing, about a picture (`labels`) or at all."""

    capabilities = frozenset({"first_token", "sample"})
    down = ""

    def first_token(self, requests, words):
        replies = super().first_token(requests, words)
        return [FirstToken({}, "HTTP 503") if self.down else one for one in replies]

    def generate(self, requests, sampling):
        if self.down == "all":
            return [Completion(request.id, "", finish_reason="error", error="HTTP 503") for request in requests]
        texts = [message_text(request.messages) for request in requests]
        claims = ["- A dragon sleeps." if "dragon" in text.lower() else "- A cat sits." for text in texts]
        return [Completion(request.id, text) for request, text in zip(requests, claims, strict=True)]


@pytest.mark.parametrize("down", ["labels", "all"])
def test_rows_that_a_server_failed_are_quarantined_and_asked_about_again(stage, tmp_path, monkeypatch, down):
    """Down for the second of three blocks: its row fails by name; a limit of 0 stops the run, the next asks only for it."""
    server = Server({"dragon": {"No": 0.9}})
    rows = [candidates([f"A dragon sleeps {number}.", f"A cat sits {number}."], f"row{number}") for number in range(3)]
    write_records("t", rows, output=OutputConfig(tmp_path / "in"), record=Candidates, settings={}, seed=0)
    monkeypatch.setattr(stage, "load", lambda config: stage.Models(None, ClaimJudge(server, server)))
    known = {"model": None, "labeller": SCENES["model"], "divide": {"by": "model"}}
    measure, asked = stage.measure, []

    def measured(block, models, config):
        asked.extend(row.id for row in block)
        server.down = down if len(asked) == 2 else ""
        return measure(block, models, config)

    monkeypatch.setattr(stage, "measure", measured)
    kept = settings(stage, tmp_path / "in", tmp_path / "kept", **known, output={"block_size": 1})
    manifest = stage.main(kept)
    assert manifest.dropped == {"generation_failed": 1}
    (failure,) = (json.loads(line) for file in (tmp_path / "kept").glob("quarantine/*") for line in file.open())
    assert failure["reason"] == "generation_failed"
    assert "HTTP 503" in failure["message"]
    assert "labeller failed at" in failure["message"] if down == "labels" else "list of claims" in failure["message"]
    assert [row["judged"] == [] for row in survey_of(tmp_path / "kept")] == [False, True, False]

    asked.clear()
    strict = settings(stage, tmp_path / "in", tmp_path / "out", **known, output={"block_size": 1, "max_quarantine": 0})
    with pytest.raises(
        StoreError, match="1 rows failed before a pair was written, above .* 0 .last: generation_failed: .*503"
    ):
        stage.main(strict)
    assert asked == ["row0", "row1"]
    asked[:] = ["not", "the second"]
    assert stage.main(strict).rows_used == 3
    assert asked[2:] == ["row1", "row2"]
    assert [pair.meta["parent"] for pair in read_records(tmp_path / "out", Pair)] == ["row0", "row1", "row2"]


def test_rows_in_quarantine_for_good_are_not_asked_about_again(stage, tmp_path, monkeypatch):
    """A run that was killed after the block of the failed row was written goes on with the others."""
    server = Server({"dragon": {"No": 0.9}})
    server.down = "all"
    rows = [candidates(["A dragon sleeps.", "A cat sits."], f"row{number}") for number in range(2)]
    write_records("t", rows, output=OutputConfig(tmp_path / "in"), record=Candidates, settings={}, seed=0)
    monkeypatch.setattr(stage, "load", lambda config: stage.Models(None, ClaimJudge(server, server)))
    asked, killed = [], []
    measure, outcome = stage.measure, stage.outcome

    def measured(block, models, config):
        asked.extend(row.id for row in block)
        return measure(block, models, config)

    def kill(row, *given):
        if row.id == "row1" and not killed:
            killed.append(row.id)
            raise KeyboardInterrupt
        return outcome(row, *given)

    monkeypatch.setattr(stage, "measure", measured)
    monkeypatch.setattr(stage, "outcome", kill)
    known = settings(stage, tmp_path / "in", tmp_path / "out", model=None, labeller=SCENES["model"], divide={"by": "model"},
                     output={"block_size": 1})  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        stage.main(known)
    server.down = ""
    assert stage.main(known).dropped == {"generation_failed": 1}
    assert asked == ["row0", "row1", "row1"]


def test_roles_with_equal_settings_share_one_model(stage, rows, tmp_path):
    models = stage.load(settings(stage, rows, tmp_path, divide={"by": "model"}))
    assert models.generator is models.judge.labeller is models.judge.splitter
    assert set(models.fingerprints()) == {"generator", "labeller", "splitter"}
    own = stage.load(settings(stage, rows, tmp_path, labeller={**SCENES["model"], "dtype": "float32"}))
    assert own.generator is not own.judge.labeller
    assert own.judge.splitter is None


def test_answers_that_cannot_be_drawn_are_named(stage, rows, tmp_path):
    known = settings(stage, rows, tmp_path)
    prompt = next(read_records(rows, Prompt))
    bad = dataclasses.replace(prompt, id="bad", messages=[user_message("An <image> mark.", 1)])
    found = stage.measure([bad, prompt], stage.load(known), known)
    outcome = stage.outcome(bad, found[0], Cut(), {}, known)
    assert isinstance(outcome, Failed)
    assert outcome.reason == "generation_failed"
    assert "reads as a place for a picture" in outcome.message
    assert len(found[1]["judged"]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "neither `model` nor `labeller` is given.*Name a labeller"),
        ({"num_generations": 1}, "num_generations is 1, and a pair needs two answers"),
        ({"num_generations": 0}, "num_generations is 0; give 1 or more"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature is 0.* the same greedy one. Raise"),
        ({"pairs": {"least_kept": 10}}, "pairs.least_kept is 10; it is a share"),
        ({"pairs": {"min_gap": 0}}, "min_gap is 0.*equal quality"),
        ({"pairs": {"per_prompt": 0}}, "per_prompt is 0"),
        ({"conquer": {"yes": []}}, "each needs a word"),
        ({"labels": {}}, "unknown key"),
    ],
)
def test_settings_that_cannot_be_are_refused(stage, rows, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(stage, rows, tmp_path, **changes)


def test_rounds_end_to_end(tmp_path):
    """Two rounds, each with an adapter: the second answers with the first one's merged policy and is trained from it."""
    settings = {
        "ROUNDS": "2",
        "PROMPTS": "8",
        "PAIR_SETTINGS": "--num_generations 4 --sampling.temperature 1.2 --sampling.max_new_tokens 64 --pairs.length_balance off",
        "TRAINING_SETTINGS": "--trainer.max_steps 1 --trainer.per_device_train_batch_size 4 --trainer.save_steps 1 "
        "--lora.r 2 --lora.alpha 4",
        "EVALUATION_SETTINGS": "--scenes.pictures 8 --scenes.evals [chair] --reliance.conditions [] --draws 100",
    }
    (tmp_path / "commands").mkdir()
    arguments = [
        "configs/datagen/rlaif_v_scenes.yaml",
        "configs/recipes/train_preference_scenes.yaml",
        str(tmp_path / "out"),
    ]
    given = carry_out("recipes/rlaif_v.sh", arguments, tmp_path / "commands", **settings)
    verbs = [words[1] for words in given if words[0] == "run"]
    assert verbs == ["rlaif_v", "train_preference", "merge_adapter"] * 2 + ["evaluate_model"] * 2
    rounds = [tmp_path / "out" / f"round-{number}" for number in (1, 2)]
    for words in given[-5:-3]:
        assert words[words.index("--model.model_name_or_path") + 1] == str(rounds[0] / "merged")
    first, second = (next(read_records(folder / "pairs", Pair)) for folder in rounds)
    assert first.meta["generator"] != second.meta["generator"]
    assert first.meta["seed"] == 1 != second.meta["seed"]
    results = json.loads((tmp_path / "out" / "evaluation" / "policy" / "results.json").read_text())["metrics"]
    assert {"chair_i", "recall", "difference.chair_i"} <= set(results)
    weights = rounds[1] / "policy" / "adapter_model.safetensors"
    before = weights.read_bytes()
    again = carry_out("recipes/rlaif_v.sh", arguments, tmp_path / "commands", **settings)
    assert [words[1] for words in again if words[0] == "run"] == [verb for verb in verbs if verb != "merge_adapter"]
    assert weights.read_bytes() == before


LLAVA = "configs/datagen/rlaif_v.yaml"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([LLAVA], {}, "DATA is not set, so there are no prompts for llava-hf/llava-1.5-7b-hf"),
        (
            [LLAVA],
            {"DATA": "p.json"},
            "EVALUATION is not set, and the pictures of the embedded world say little of llava-hf",
        ),
        (
            [LLAVA, "t.yaml", "out", "--batch_size", "2"],
            {},
            "--batch_size 2 is for no step. Give settings as PAIR_SETTINGS",
        ),
    ],
)
def test_rounds_that_could_not_end_are_refused_before_anything_runs(tmp_path, arguments, environment, message):
    (tmp_path / "prefalign").write_text('#!/bin/sh\necho "$2"; echo "$@" >> "$COMMANDS"\n')
    (tmp_path / "prefalign").chmod(0o755)
    known = {
        **os.environ,
        "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]),
        "COMMANDS": str(tmp_path / "given"),
    }
    done = subprocess.run(["sh", "recipes/rlaif_v.sh", *arguments], cwd=ROOT, env=known | environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert (tmp_path / "given").read_text() == f"path {LLAVA}\n"


def test_a_real_base_is_trained_by_the_published_settings_and_measured_by_its_own_config(tmp_path):
    """The commands of one round, none carried out."""
    (tmp_path / "prefalign").write_text('#!/bin/sh\necho "$2"; echo "$@" >> "$COMMANDS"\n')
    (tmp_path / "prefalign").chmod(0o755)
    known = {"PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]]), "COMMANDS": str(tmp_path / "given"), "ROUNDS": "1",
             "DATA": "prompts-ROUND.json", "EVALUATION": "mine.yaml"}  # fmt: skip
    subprocess.run(
        ["sh", "recipes/rlaif_v.sh", LLAVA], cwd=ROOT, env=os.environ | known, capture_output=True, check=True
    )
    given = [line.split() for line in (tmp_path / "given").read_text().splitlines()]
    assert [words[:4] for words in given if words[0] == "run"] == [
        ["run", "rlaif_v", "--config", LLAVA],
        ["run", "train_preference", "--config", "configs/recipes/train_preference_rlaif_v.yaml"],
        *[["run", "evaluate_model", "--config", "mine.yaml"]] * 2,
    ]
    assert given[2][4:8] == ["--model.model_name_or_path", "llava-hf/llava-1.5-7b-hf", "--data.path", "prompts-1.json"]


def test_the_published_settings_of_training():
    """Section 3 of the release's scripts: eight processes of one row, sums over tokens."""
    values = config.read_yaml(bundled.find("recipes/train_preference_rlaif_v"))
    trainer = values["trainer"]
    published = {"learning_rate": 5e-7, "beta": 0.1, "num_train_epochs": 4, "per_device_train_batch_size": 1,
                 "gradient_accumulation_steps": 1, "warmup_steps": 0.05, "weight_decay": 0.01}  # fmt: skip
    assert {name: trainer[name] for name in published} == published
    assert "lora" not in values


@pytest.mark.parametrize("name", ["rlaif_v", "rlaif_v_scenes"])
def test_the_bundled_configs_run_on_the_tiny_model(stage, rows, tmp_path, name):
    """The tiny model takes every place in their own settings; it can list no claims, so only rules give pairs."""
    values = config.read_yaml(bundled.find(f"datagen/{name}"))
    changes = {"model": SCENES["model"], "labeller": None, "splitter": None, "num_generations": 4, "batch_size": 16,
               "data": {"path": rows, "images": None, "limit": 3}, "output": {"path": tmp_path / "out"},
               "sampling": {"max_new_tokens": 48}, "divide": {"sampling": {"max_new_tokens": 16}}}  # fmt: skip
    if name == "rlaif_v_scenes":
        manifest = stage.main(config.build(stage.Config, config.merge(values, changes)))
        assert manifest.rows_in == 3 == manifest.rows_used + sum(manifest.dropped.values())
        return
    changes["conquer"] = {"yes": ["Yes"], "no": ["No"]}  # its "yes" and "no" begin with one token
    with pytest.raises(StoreError, match="made no row out of 3: 3 few_judged"):
        stage.main(config.build(stage.Config, config.merge(values, changes)))
    answers = json.loads((tmp_path / "out" / "claims.json").read_text())["answers"]
    assert answers.pop("unreadable_list") >= 9
    assert set(answers) <= {"duplicate"}

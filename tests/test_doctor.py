"""`prefalign doctor`: a healthy run passes, what surrounds a run is checked, and the command says so."""

import json
from pathlib import Path

import pytest
import torch

from prefalign import cli, config, doctor, families
from prefalign.doctor import model, world
from prefalign.doctor.checks import CHECKS, run_checks
from prefalign.models import ModelConfig, load_processor
from prefalign.training.distributed import Processes, claim_processes
from prefalign.training.runs import claim_run
from tests.doctor_runs import (
    LORA,
    STAGE,
    by_name,
    changed_weights,
    edited,
    only,
    pair,
    prepare,
    settings,
    write,
)


@pytest.fixture(scope="module")
def checkpoints(tiny_llava, tiny_idefics3, tmp_path_factory) -> dict[str, Path]:
    """The tiny models; Idefics3 with a generation config that stops at its end of turn, as the real one's does."""
    ends = families.end_token_ids(load_processor(ModelConfig(str(tiny_idefics3), device="cpu")))
    stops = {"generation_config": {"eos_token_id": ends}}
    return {
        "llava": tiny_llava,
        "idefics3": edited(tiny_idefics3, tmp_path_factory.mktemp("tiny") / "idefics3", **stops),
    }


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_a_healthy_run_passes_everything(family, changes, checkpoints, healthy_pairs, tmp_path):
    chosen = settings(
        checkpoints[family], healthy_pairs, tmp_path / "run", **changes, losses=[{"name": "text"}, {"name": "visual"}]
    )
    findings = doctor.examine(STAGE, chosen)
    assert [finding for finding in findings if finding.verdict in ("warn", "fail")] == []
    skipped = {finding.check for finding in findings if finding.verdict == "skip"}
    assert skipped == {"reference cache"} | ({"lora targets"} if not changes else set())
    assert not chosen.output.exists()
    found = {finding.check: finding.seen for finding in findings}
    assert "8 of a sample of 8 read" in found["rows"]
    assert found["first loss"] == "1.38629; with all margins at zero 1.38629, by hand 1.38629"
    if family == "llava":
        assert found["visual tokens"].startswith("4 a picture, 4 a row")


def test_the_other_way_to_run_a_reference(doctor_case):
    seen = [only(model.check_reference(doctor_case(reference=kind, **more))).seen.split(";")[0]
            for kind, more in (("online", {}), ("cached", {}), ("online", LORA))]  # fmt: skip
    assert seen == ["a copy", "the policy as it starts", "adapter off"]


def test_the_loss_is_that_of_the_run(tiny_llava, healthy_pairs, tmp_path):
    """What is examined is what is run: the loss of all rows, which no reference makes a constant of."""
    trainer = {"loss_type": ["sft"], "per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1}
    examined = prepare(tiny_llava, healthy_pairs, tmp_path, trainer=trainer).step.loss
    STAGE.main(settings(tiny_llava, healthy_pairs, tmp_path / "run", trainer=trainer))
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert examined == pytest.approx(history[0]["loss"], abs=1e-4)


def test_a_batch_is_what_one_pass_holds(doctor_case):
    whole = doctor_case(trainer={"per_device_train_batch_size": 8})
    part = doctor_case(trainer={"per_device_train_batch_size": 8}, tokens_per_pass=whole.step.tokens // 2)
    assert len(whole.rows) == 8
    assert 2 <= len(part.rows) < 8
    assert part.step.tokens <= whole.step.tokens // 2
    assert [found for found in run_checks(part) if found.verdict in ("warn", "fail")] == []


def test_nothing_changes(doctor_case):
    made = doctor_case()
    before = {name: tensor.clone() for name, tensor in made.trainer.model.state_dict().items()}
    run_checks(made)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.trainer.model.state_dict().items())


def test_weights_in_float16(doctor_case):
    found = only(world.check_device(doctor_case(model={"dtype": "float16"})))
    assert (found.verdict, found.seen) == ("warn", "cpu, weights float16, no autocast, 1 process")


def test_weights_in_float16_under_bfloat16(tiny_llava, healthy_pairs, tmp_path, capsys):
    """One sentence, the recipe's own, instead of a table of checks that all break."""
    given = arguments(tiny_llava, healthy_pairs, tmp_path / "run", "--model.dtype", "float16", "--trainer.bf16", "true")
    for verb in ("doctor", "run"):
        assert cli.main([verb, *given[1:]]) == 1
        shown = capsys.readouterr()
        assert shown.err.count("Set model.dtype to bfloat16, or trainer.bf16 to false.") == 1
        assert "device" not in shown.out


def test_the_folder_of_a_run_in_two_processes(doctor_case, tmp_path):
    made = doctor_case()
    saved = tmp_path / "run" / "checkpoint-2"
    saved.mkdir(parents=True)
    claim_run(tmp_path / "run", made.files)
    claim_processes(tmp_path / "run", Processes("MULTI_CPU", 2), main_process=True)
    (saved / "trainer_state.json").write_text("{}")
    for rank in range(2):
        (saved / f"rng_state_{rank}.pth").touch()
    found = only(world.check_output(made))
    assert found.verdict == "pass"
    assert "goes on from checkpoint-2 of a run on 2 processes, DDP (MULTI_CPU)" in found.seen


def test_sharding_is_left_out(doctor_case):
    found = only(world.check_device(doctor_case(trainer={"deepspeed": "configs/deepspeed/zero3.json"})))
    assert found.seen == "cpu, weights float32, no autocast, 1 process; examined without trainer.deepspeed"


def test_a_disk_that_is_too_small(doctor_case):
    found = only(world.check_disk(doctor_case(trainer={"max_steps": 10**12, "save_steps": 1})))
    assert found.verdict == "fail"
    assert "keep fewer: trainer.save_total_limit: 1" in found.advice
    few = only(world.check_disk(doctor_case(trainer={"max_steps": 10**12, "save_steps": 1, "save_total_limit": 1})))
    assert few.verdict == "pass"
    assert "for 2 checkpoints and the model in 1000000000000 steps" in few.seen


def test_an_output_folder_of_somebody_else(doctor_case, tmp_path):
    made = doctor_case()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    found = only(world.check_output(made))
    assert found.verdict == "fail"
    assert "is not empty and holds no run of prefalign" in found.advice


def test_a_run_that_is_finished(tiny_llava, healthy_pairs, tmp_path):
    chosen = settings(tiny_llava, healthy_pairs, tmp_path / "run", trainer={"max_steps": 1})
    STAGE.main(chosen)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}
    findings = by_name(doctor.examine(STAGE, chosen))
    assert findings["output"].verdict == "warn"
    assert "The run would do nothing. Give another output to train again." in findings["output"].advice
    assert findings["reference cache"].verdict == "pass"
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*")}


def arguments(checkpoint: Path, pairs: Path, output: Path, *more: str) -> list[str]:
    return ["doctor", "train_preference", "--model.model_name_or_path", str(checkpoint), "--model.device", "cpu",
            "--pairs", str(pairs), "--output", str(output), "--trainer.learning_rate", "1e-4",
            "--trainer.per_device_train_batch_size", "4", "--trainer.max_steps", "4", *more]  # fmt: skip


def test_the_command_passes(tiny_llava, healthy_pairs, tmp_path, capsys):
    target = tmp_path / "found.json"
    assert cli.main(arguments(tiny_llava, healthy_pairs, tmp_path / "run", "--rows", "6", "--json", str(target))) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "pass  6 of a sample of 6 read (8 in the folder)" in shown
    assert shown.endswith(" passed, 3 not for this run\n")
    written = json.loads(target.read_text())
    assert len(written) >= len(CHECKS)
    assert {entry["verdict"] for entry in written} == {"pass", "skip"}
    assert sorted(tmp_path.iterdir()) == [target]


def test_the_command_fails_and_says_what_to_do(tiny_llava, healthy_pairs, tmp_path, capsys):
    blind = changed_weights(tiny_llava, tmp_path / "blind", "multi_modal_projector", 0.0)
    assert cli.main(arguments(blind, healthy_pairs, tmp_path / "run")) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "picture counts fail an answer's token moves by 0 nats" in shown
    assert "-> The answers do not depend on the pictures at all." in shown
    assert "1 failed" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--pairs", "nowhere"], "nowhere holds no finished pairs (no manifest.json)"),
        (["--losses", "[{name: texd}]"], "no preference term called 'texd'; did you mean 'text'"),
        (["--trainer.lerning_rate", "1"], "trainer.lerning_rate: unknown key (value 1); did you mean 'learning_rate'?"),
        (["--rows", "none"], "--rows none: give the number of rows to read, as in `--rows 64`."),
        (["--json"], "--json needs a value."),
    ],
)
def test_errors_read_like_the_recipes(changes, message, tiny_llava, healthy_pairs, tmp_path, capsys):
    given = arguments(tiny_llava, healthy_pairs, tmp_path / "run")
    if changes[0] == "--pairs":
        at = given.index("--pairs")
        given, changes = given[:at] + given[at + 2 :], changes
    assert cli.main([*given, *changes]) == 1
    assert message in capsys.readouterr().err


def test_one_text_as_both_answers_everywhere(tiny_llava, tmp_path, capsys):
    same = write(tmp_path / "pairs", [pair(n, rejected=pair(n).chosen) for n in range(3)])
    assert cli.main(arguments(tiny_llava, same, tmp_path / "run")) == 1
    assert "chosen and rejected are the same text in all 3 pairs" in capsys.readouterr().err


def test_what_doctor_does_not_examine(capsys):
    assert cli.main(["doctor", "bdhs", "--config", "datagen/bdhs"]) == 1
    assert (
        "doctor examines train_preference, train_reward_model, train_ppo, train_online, and was given 'bdhs'."
        in capsys.readouterr().err
    )
    assert cli.main(["doctor", "--config", "x.yaml"]) == 1
    assert "doctor needs a recipe before --config" in capsys.readouterr().err
    assert cli.main(["doctor", "--help"]) == 0
    assert "The exit status is 0 if nothing failed, else 1." in capsys.readouterr().out


def test_what_the_recipe_refuses_is_refused(doctor_case):
    with pytest.raises(
        config.ConfigError, match="weights of 4 bits cannot be trained, and without `lora` all weights would be"
    ):
        doctor_case(model={"load_in_4bit": True})


def test_several_processes_are_refused(tiny_llava, healthy_pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        config.ConfigError, match="doctor was started in 2 processes.* Start it without torchrun or accelerate"
    ):
        doctor.examine(STAGE, settings(tiny_llava, healthy_pairs, tmp_path / "run"))

"""A run that was stopped and resumed equals one that was not: losses, logs and weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from prefalign import bundled
from prefalign.config import build
from prefalign.manifest import temporary
from prefalign.models import ModelConfig, load_model
from prefalign.records import Pair
from prefalign.store import OutputConfig, write_records
from prefalign.training.checkpoints import last_checkpoint, restore_weights
from prefalign.training.runs import (
    RunError,
    base_file,
    claim_run,
    finish_run,
    full_disk_explained,
    is_finished,
    open_run,
    run_files,
)
from tests.tiny_vlms import PLAIN, save_tiny
from tests.training_runs import largest_difference, make_pair, make_trainer, weights, write_pairs

RECIPE = bundled.load_stage("train_preference")
CLOCK = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 8)


def without_clock(log_history: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in CLOCK} for entry in log_history]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["tiny_llava", "tiny_idefics3"])
def test_resume_equals_the_uninterrupted_run(family, lora, request, pairs, tmp_path):
    """Dropout, a warm-up and logs that do not meet the checkpoints: every state has to come back, not only the weights."""
    checkpoint = request.getfixturevalue(family)
    settings = {"warmup_steps": 3, "logging_steps": 3, "disable_dropout": False, "lora": lora}
    straight = make_trainer(checkpoint, pairs, tmp_path / "straight", **settings)
    start = weights(straight.model)
    straight.train()
    resumed = make_trainer(checkpoint, pairs, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert without_clock(resumed.state.log_history) == without_clock(straight.state.log_history)
    assert largest_difference(weights(straight.model), weights(resumed.model)) == 0.0
    assert largest_difference(weights(straight.model), start) > 1e-4
    assert all((tmp_path / "straight" / f"checkpoint-{step}" / "processor_config.json").is_file() for step in (2, 4))


def test_a_reference_that_moves_comes_back(tiny_llava, pairs, tmp_path):
    """Mixed with the policy after each step: the one that the run started with would be another loss."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6}
    straight = make_trainer(tiny_llava, pairs, tmp_path / "straight", **settings)
    straight.train()
    resumed = make_trainer(tiny_llava, pairs, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert without_clock(resumed.state.log_history) == without_clock(straight.state.log_history)
    for one, two in ((straight.model, resumed.model), (straight.ref_model, resumed.ref_model)):
        assert largest_difference(weights(one), weights(two)) == 0.0
    straight.save_model()
    assert not (tmp_path / "straight" / "reference_model").exists()
    shutil.rmtree(tmp_path / "straight" / "checkpoint-2" / "reference_model")
    with pytest.raises(ValueError, match="holds no reference_model, the reference that trainer.sync_ref_model moved"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))


def test_a_loss_without_its_state_does_not_go_on(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path, losses=("bco",), max_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-2" / "terms.json").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-2 holds no state of the loss bco \(terms.json\), which would start at"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_every_weight_of_a_checkpoint_comes_back(tiny_llava, pairs, tmp_path):
    """What `Trainer` does instead restores none of LLaVA's weights and says nothing (transformers #43701)."""
    trainer = make_trainer(tiny_llava, pairs, tmp_path)
    trainer.train()
    fresh = load_model(ModelConfig(str(tiny_llava), device="cpu"))
    assert largest_difference(weights(fresh), weights(trainer.model)) > 1e-4
    restore_weights(fresh, tmp_path / "checkpoint-4")
    assert largest_difference(weights(fresh), weights(trainer.model)) == 0.0


@pytest.mark.parametrize("family", PLAIN)
def test_every_family_gets_all_its_weights_back(family, tmp_path):
    """Saved under the Hub's names, restored under the modules' names."""
    start = load_model(ModelConfig(str(save_tiny(family, tmp_path / "start")), device="cpu"))
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(torch.randn_like(parameter))
    start.save_pretrained(tmp_path / "checkpoint-1")
    fresh = load_model(ModelConfig(str(tmp_path / "start"), device="cpu"))
    restore_weights(fresh, tmp_path / "checkpoint-1")
    assert largest_difference(weights(start), weights(fresh)) == 0.0


def test_best_model_is_the_best_one(tiny_llava, pairs, tmp_path):
    """The loss falls, and the highest is asked for: the weights at the end are those of the first checkpoint."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3, "evaluates": True}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer(tiny_llava, pairs, tmp_path, **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    saved = AutoModelForImageTextToText.from_pretrained(best).state_dict()
    last = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    assert largest_difference(weights(trainer.model), saved) == 0.0
    assert largest_difference(weights(trainer.model), last) > 1e-3


def test_a_checkpoint_of_other_weights_is_refused(tiny_llava, pairs, tmp_path):
    make_trainer(tiny_llava, pairs, tmp_path, max_steps=2).train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in sorted(tensors) if "q_proj" in name)]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="checkpoint-2 does not hold the weights of this LlavaFor.*: 1 tensors are missing"
    ):
        restore_weights(load_model(ModelConfig(str(tiny_llava), device="cpu")), tmp_path / "checkpoint-2")


def whole(folder: Path, *, processes: int = 1) -> None:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    for name in [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]:
        (folder / name).touch()


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    whole(tmp_path / "checkpoint-90")
    whole(tmp_path / "checkpoint-100")
    assert last_checkpoint(tmp_path).name == "checkpoint-100"
    (tmp_path / "checkpoint-110").mkdir()
    (tmp_path / "checkpoint-110" / "trainer_state.json").write_text('{"global_step": 1')
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-100"
    assert last_checkpoint(tmp_path, processes=2) is None
    whole(tmp_path / "checkpoint-120", processes=2)
    assert last_checkpoint(tmp_path, processes=2).name == "checkpoint-120" == last_checkpoint(tmp_path).name
    assert last_checkpoint(tmp_path, processes=1).name == "checkpoint-100"


def test_a_folder_belongs_to_one_run(tmp_path):
    config = {"output": "a", "resume": "auto", "trainer": {"beta": 0.1}, "model": {"device": "cpu"}}
    run = tmp_path / "run"
    with pytest.raises(RunError, match="resume is true and .* holds no whole checkpoint"):
        open_run(run, run_files(config, "{}"), resume=True)
    files = run_files(config, "{}", "{}") | base_file(str(tmp_path), "aaaa", "0a")
    assert open_run(run, files) is None
    assert not run.exists()  # looking claims nothing
    claim_run(run, files)
    assert json.loads((run / "base.json").read_text())["local"] == str(tmp_path)
    assert (
        open_run(run, run_files({**config, "output": "b", "resume": True, "model": {"device": "cuda"}}, "{}")) is None
    )
    with pytest.raises(RunError, match=r"another config \(trainer.beta: 0.1 -> 0.2\)"):
        open_run(run, run_files({**config, "trainer": {"beta": 0.2}}, "{}"))
    with pytest.raises(RunError, match=r"another config \(pairs: their manifest is another one now"):
        open_run(run, run_files(config, '{"rows_out": 3}'))
    with pytest.raises(RunError, match=r"another config \(eval_pairs: their manifest is another one now"):
        open_run(run, run_files(config, "{}", '{"rows_out": 3}'))
    with pytest.raises(RunError, match="model: its weights are others now, fingerprint aaaa -> bbbb"):
        open_run(run, run_files(config, "{}") | base_file("x", "bbbb", "0a"))
    with pytest.raises(
        RunError,
        match=r"\(model: its chat template, tokenizer or image processor is another now, fingerprint of .* 0a -> 0b\)",
    ):
        open_run(run, run_files(config, "{}") | base_file("x", "aaaa", "0b"))
    whole(run / "checkpoint-5")
    assert open_run(run, run_files(config, "{}")) == run / "checkpoint-5"
    with pytest.raises(RunError, match="resume is false and .* holds checkpoint-5"):
        open_run(run, run_files(config, "{}"), resume=False)
    with pytest.raises(
        RunError, match="holds checkpoint-5 of a run on 1 process, and this is 2 processes: .* overwrite it"
    ):
        open_run(run, run_files(config, "{}"), processes=2)
    (run / "checkpoint-5" / "rng_state.pth").rename(run / "checkpoint-5" / "rng_state_0.pth")
    assert open_run(run, run_files(config, "{}"), processes=2) is None  # the other process was killed before it wrote
    (run / "checkpoint-5" / "rng_state_1.pth").touch()
    with pytest.raises(RunError, match="holds checkpoint-5 of a run on 2 processes, and this is 4 processes: "):
        open_run(run, run_files(config, "{}"), processes=4)
    assert not is_finished(run)
    finish_run(run, {"train_loss": 0.5})
    assert is_finished(run)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no run of prefalign"):
        open_run(tmp_path / "letters", run_files(config, "{}"))


def test_a_kill_while_a_folder_is_claimed_leaves_no_check_out(tmp_path):
    files = run_files({"seed": 0}, "{}") | base_file("x", "aaaa", "0a")
    claim_run(tmp_path, {name: files[name] for name in list(files)[:1]})
    claim_run(tmp_path, files)
    with pytest.raises(RunError, match="pairs: their manifest is another one now.*; model: its weights are others now"):
        open_run(tmp_path, run_files({"seed": 0}, '{"rows_out": 3}') | base_file("x", "bbbb", "0a"))
    claim_run(tmp_path, run_files({"seed": 0}, '{"rows_out": 3}'))
    assert (tmp_path / "pairs_manifest.json").read_text() == "{}"


def test_recipe_resumes_by_itself(tiny_llava, pairs, tmp_path, capsys):
    """A kill while checkpoint-4 was written leaves checkpoint-2; the same command ends with the same files."""
    values = {
        "model": {"model_name_or_path": str(tiny_llava), "device": "cpu"},
        "pairs": str(pairs),
        "trainer": {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4},
    }
    RECIPE.main(build(RECIPE.Config, {**values, "output": str(tmp_path / "straight")}))
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("prefalign_config.yaml", "pairs_manifest.json"):
        shutil.copy(tmp_path / "straight" / name, killed / name)
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", killed / "checkpoint-2")
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", killed / "checkpoint-4")
    (killed / "checkpoint-4" / "trainer_state.json").write_text('{"epoch"')
    capsys.readouterr()
    RECIPE.main(build(RECIPE.Config, {**values, "output": str(killed)}))
    assert "going on from checkpoint-2" in capsys.readouterr().out
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path / "straight", killed))
    assert largest_difference(one, two) == 0.0
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (tmp_path / "straight", killed)]
    assert without_clock(results)[0] == without_clock(results)[1]


def recipe_values(model: Path, pairs: Path, output: Path) -> dict:
    return {
        "model": {"model_name_or_path": str(model), "device": "cpu"},
        "pairs": str(pairs),
        "output": str(output),
        "trainer": {"max_steps": 1, "per_device_train_batch_size": 4},
    }


def test_a_refused_command_leaves_no_claim_behind(tiny_llava, tmp_path):
    """What a typo, a missing model or unfit pairs refuse, the corrected command starts in the same folder."""
    pairs = write_pairs(tmp_path / "pairs", 4)
    values, run = recipe_values(tiny_llava, pairs, tmp_path / "run"), tmp_path / "run"
    for wrong, message in (
        ({"model": {"model_name_or_path": str(tmp_path / "typo"), "device": "cpu"}}, "there is no folder"),
        ({"losses": [{"name": "visuel"}]}, "no preference term called 'visuel'"),
        ({"freeze": ["tower"]}, "no tower called 'tower' to freeze"),
        ({"trainer": {"max_steps": 1, "max_length": 2}}, "no row fits max_length 2"),
    ):
        with pytest.raises(ValueError, match=message):
            RECIPE.main(build(RECIPE.Config, {**values, **wrong}))
        assert not run.exists() or not list(run.iterdir()), wrong
    RECIPE.main(build(RECIPE.Config, values))
    assert is_finished(run)


def test_a_term_is_refused_on_pairs_without_its_pictures(pairs, tmp_path):
    """Before the model is looked for: the one named here does not exist."""
    rows, with_none = [replace(make_pair(number), rejected_images=[]) for number in range(3)], tmp_path / "pairs"
    write_records("test", rows, output=OutputConfig(with_none), record=Pair, settings={}, seed=0)
    values = {**recipe_values(tmp_path / "nothing", with_none, tmp_path / "run"), "losses": [{"name": "visual"}]}
    message = (
        r"the losses look at `rejected_images` \(views chosen_on_rejected_image\), which is empty in 3 of the 3 pairs of "
        r".* stage povid .* losses \[{name: text}\] need none"
    )
    with pytest.raises(ValueError, match=message):
        RECIPE.main(build(RECIPE.Config, values))
    with pytest.raises(ValueError, match=message):
        RECIPE.main(build(RECIPE.Config, {**values, "pairs": str(pairs), "eval_pairs": str(with_none)}))
    with pytest.raises(ValueError, match="there is no folder .*nothing"):  # past the check
        RECIPE.main(build(RECIPE.Config, {**values, "pairs": str(pairs)}))


def test_a_base_that_was_trained_again_is_another_run(tiny_llava, pairs, tmp_path):
    """The folder keeps its name and its config; only its weights are others."""
    base = Path(shutil.copytree(tiny_llava, tmp_path / "base"))
    values = recipe_values(base, pairs, tmp_path / "run")
    RECIPE.main(build(RECIPE.Config, values))
    processor = base / "processor_config.json"
    settings = processor.read_text()
    processor.write_text(settings.replace('"patch_size": 14', '"patch_size": 7'))
    with pytest.raises(RunError, match="model: its chat template, tokenizer or image processor is another now"):
        RECIPE.main(build(RECIPE.Config, values))
    processor.write_text(settings)
    tensors = load_file(base / "model.safetensors")
    tensors["language_model.lm_head.weight" if "language_model.lm_head.weight" in tensors else "lm_head.weight"] += 0.5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RunError, match=r"another config \(model: its weights are others now, fingerprint \w{16} -> \w{16}"
    ):
        RECIPE.main(build(RECIPE.Config, values))
    assert yaml.safe_load((tmp_path / "run" / "prefalign_config.yaml").read_text())["model"][
        "model_name_or_path"
    ] == str(base)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("file", ["optimizer.pt", "prefalign_config.yaml"])
def test_a_full_disk_says_how_to_go_on(file, tiny_llava, pairs, tmp_path):
    """checkpoint-2 is whole; a file of checkpoint-4 lies on a device without space."""
    trainer = make_trainer(tiny_llava, pairs, tmp_path)
    trainer.files = {"prefalign_config.yaml": "x"}
    (tmp_path / "checkpoint-4").mkdir()
    written = tmp_path / "checkpoint-4" / file
    (temporary(written) if file.endswith("yaml") else written).symlink_to("/dev/full")
    message = r"the disk that holds .* is full.* it goes on from checkpoint-2\."
    with pytest.raises(RunError, match=message), full_disk_explained(tmp_path):
        trainer.train()


def test_a_full_disk_as_safetensors_tells_it_and_other_errors(tmp_path):
    full = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(RunError, match="is full.* it goes on from the beginning"), full_disk_explained(tmp_path):
        raise SafetensorError(full)
    with pytest.raises(RunError, match="is full"), full_disk_explained(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/1")
    with pytest.raises(ValueError, match="another thing"), full_disk_explained(tmp_path):
        raise ValueError("another thing")


def test_tied_weights_come_back(tiny_llava, pairs, tmp_path):
    """A head that shares its matrix with the embeddings is saved once."""
    model = load_model(ModelConfig(str(tiny_llava), device="cpu"))
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    model.save_pretrained(tmp_path / "tied")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "tied")
    with torch.no_grad():
        again.get_input_embeddings().weight.zero_()
    restore_weights(again, tmp_path / "tied")
    assert largest_difference(weights(model), weights(again)) == 0.0

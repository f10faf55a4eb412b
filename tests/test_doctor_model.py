"""`prefalign doctor` on model and losses: each check tells of the broken set-up that it is there for."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from prefalign.doctor import model
from prefalign.doctor.checks import run_checks
from prefalign.training.lora import LANGUAGE_LINEAR
from prefalign.training.reference import SETTINGS_FILE, ReferenceCache
from tests.doctor_runs import (
    LORA,
    STAGE,
    by_name,
    changed_weights,
    edited,
    only,
    settings,
)


def test_nothing_that_trains(doctor_case):
    findings = by_name(run_checks(doctor_case(freeze=["vision", "projector", "language_model"])))
    assert findings["what trains"].verdict == "fail"
    assert "leaves nothing to train. Take one off the list." in findings["what trains"].advice
    assert (findings["gradients"].verdict, findings["gradients"].seen) == ("skip", "nothing trains")


def test_an_adapter_in_a_frozen_tower(doctor_case):
    found = only(model.check_what_trains(doctor_case(lora={"r": 2, "target_modules": r".*\.q_proj"})))
    assert found.verdict == "fail"
    assert "`freeze` names the vision tower" in found.advice


def test_an_adapter_that_leaves_blocks_out(doctor_case):
    narrow = LANGUAGE_LINEAR.replace(r".*\.(", r".*\.layers\.0\..*\.(")
    found = only(model.check_lora(doctor_case(lora={"r": 2, "target_modules": narrow})))
    assert found.verdict == "warn"
    assert found.seen.startswith("7 linear layers of the language_model (down_proj, gate_proj,")
    assert found.seen.endswith("1 of 2 blocks")


def test_dropout_parts_policy_and_reference(doctor_case):
    made = doctor_case(trainer={"disable_dropout": False}, lora={"r": 4, "alpha": 8, "dropout": 0.5})
    with torch.no_grad():  # at zero an adapter hides its dropout
        for name, parameter in made.trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    findings = by_name(run_checks(made))
    assert findings["policy = reference"].verdict == "fail"
    assert "trainer.disable_dropout to true; an adapter has to start at zero" in findings["policy = reference"].advice
    assert findings["first loss"].verdict == "fail"
    assert "The run does not start where its losses say it does" in findings["first loss"].advice
    assert findings["shared = plain"].verdict == "skip"


def test_a_reference_cache_that_is_not_this_runs(doctor_case, tiny_llava, healthy_pairs, tmp_path):
    kept = tmp_path / "reference"
    STAGE.main(
        settings(tiny_llava, healthy_pairs, tmp_path / "first", reference_folder=str(kept), trainer={"max_steps": 1})
    )
    found = only(model.check_reference_cache(doctor_case(reference_folder=str(kept))))
    assert found.verdict == "pass"
    assert found.seen.startswith("8 of 8 sampled rows are there; a token of the batch differs by ")

    part = next(kept.glob("part-*.arrow"))
    cache = ReferenceCache(kept, ("chosen", "rejected"))
    moved = [(key, {view: values + 0.5 for view, values in cache[key].items()}) for key in list(cache._places)]
    part.unlink()
    cache.write(moved)
    found = only(model.check_reference_cache(doctor_case(reference_folder=str(kept))))
    assert (found.verdict, found.seen[-22:]) == ("fail", "differs by 0.5 at most")
    assert "These are not this reference's numbers. Delete " in found.advice

    written = json.loads((kept / SETTINGS_FILE).read_text())
    (kept / SETTINGS_FILE).write_text(json.dumps({**written, "reference": "0123456789abcdef"}))
    found = only(model.check_reference_cache(doctor_case(reference_folder=str(kept))))
    assert found.verdict == "fail"
    assert "was made otherwise: reference: 0123456789abcdef -> " in found.seen


def test_a_tower_that_gets_no_gradient(doctor_case, tiny_llava, tmp_path):
    """Adapters in the tower's blocks, of a model that reads the tower before its first block."""
    early = edited(tiny_llava, tmp_path / "early", config={"vision_feature_layer": -3})
    found = only(model.check_gradients(doctor_case(early, freeze=[], lora={"r": 2, "target_modules": r".*\.q_proj"})))
    assert found.verdict == "fail"
    assert found.advice.startswith("none of the 4 trainable tensors of the vision tower got a gradient")


def test_tensors_without_a_gradient_are_named(doctor_case):
    """What LLaVA leaves out, which reads the second-last layer of its tower, is counted; what it reads is named."""
    case = doctor_case(freeze=[])
    last = [name for name, _ in case.trainer.model.named_parameters() if "vision_tower.encoder.layers.1." in name]
    found = only(model.check_gradients(case))
    assert found.verdict == "pass"
    assert f", {len(last) + 2} the model's own forward pass does not read" in found.seen  # and the last norm's two
    read = "model.vision_tower.encoder.layers.0.layer_norm1.bias"
    case.step.gradients[read].zero_()
    found = only(model.check_gradients(case))
    assert (found.verdict, found.advice) == ("warn", f"These get none and will not change: {read}.")


def test_gradients_that_are_not_finite(doctor_case, tiny_llava, tmp_path):
    broken = changed_weights(tiny_llava, tmp_path / "nan", "layers.1.mlp.up_proj", float("nan"))
    found = only(model.check_gradients(doctor_case(broken)))
    assert found.verdict == "fail"
    assert found.advice.startswith("Not finite: ")


def test_steps_that_sixteen_bits_lose(doctor_case):
    lost = only(model.check_weights_move(doctor_case(model={"dtype": "bfloat16"}, trainer={"learning_rate": 1e-6})))
    assert lost.verdict == "fail"
    assert "bfloat16 weights with a gradient, by a step of 1e-06" in lost.seen
    assert "smaller than bfloat16 resolves, and are lost. Train all weights in float32" in lost.advice
    kept = only(model.check_weights_move(doctor_case(trainer={"learning_rate": 1e-6})))
    assert kept.verdict == "pass"
    assert float(kept.seen.split("%")[0]) > 99 > 10 > float(lost.seen.split("%")[0])
    adapter = only(
        model.check_weights_move(doctor_case(model={"dtype": "bfloat16"}, trainer={"learning_rate": 1e-6}, **LORA))
    )
    assert (adapter.verdict, "float32 weights" in adapter.seen) == ("pass", True)


def test_a_projector_without_weights(doctor_case, tiny_llava, tmp_path):
    blind = changed_weights(tiny_llava, tmp_path / "blind", "multi_modal_projector", 0.0)
    found = only(model.check_picture(doctor_case(blind)))
    assert (found.verdict, found.seen) == (
        "fail", "an answer's token moves by 0 nats with blank picture, 0 nats with another row's picture"
    )  # fmt: skip
    assert "The answers do not depend on the pictures at all." in found.advice


def test_a_projector_that_whispers(doctor_case, tiny_llava, tmp_path):
    made = shutil.copytree(tiny_llava, tmp_path / "quiet")
    tensors = load_file(made / "model.safetensors")
    for name, tensor in tensors.items():
        if "multi_modal_projector.linear_2.weight" in name:
            tensor.mul_(1e-2)
        if "multi_modal_projector.linear_2.bias" in name:
            tensor.fill_(1.0)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    found = only(model.check_picture(doctor_case(made)))
    assert found.verdict == "warn"
    assert "The pictures hardly count: these pairs are decided by their text." in found.advice


def test_a_shared_path_whose_attention_was_taken_away(doctor_case):
    made = doctor_case()
    passed = only(model.check_paths(made))
    assert passed.verdict == "pass"
    assert passed.seen.startswith("route split: log-probs differ by ")
    del made.step
    made.model_config.get_text_config()._attn_implementation = "sdpa"
    found = only(model.check_paths(made))
    assert found.verdict == "fail"
    assert "set fast_path to 'off', and report this table" in found.advice


def test_a_run_without_the_shared_path(doctor_case):
    findings = by_name(run_checks(doctor_case(fast_path="off")))
    assert findings["shared = plain"].verdict == "skip"
    assert findings["shared = plain"].seen == "prompts are not shared: fast_path is off"
    assert findings["picture counts"].verdict == "pass"

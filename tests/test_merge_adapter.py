"""Merging adapters: the full model is the PeftModel, the folder is complete, wrong input is refused by message."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel

from prefalign import bundled, config, families
from prefalign.adapters import merge_adapters, scaled_lora
from prefalign.checkpoints import SCENES_BASE, ModelError
from prefalign.models import ModelConfig, fingerprint, load_model, load_processor
from prefalign.training.runs import base_file
from tests.merging_cases import VISION_TOO, answer, logits, perturbed, question, save_adapter, save_text_llm, stored
from tests.stand_in_hub import Repository, StandInHub

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("merge_adapter")


@pytest.fixture(scope="module")
def adapter(tiny_llava, folder):
    return save_adapter(tiny_llava, folder / "adapter")


@pytest.fixture(scope="module")
def second(tiny_llava, folder):
    return save_adapter(tiny_llava, folder / "second", seed=2)


def load(name, **more):
    return load_model(ModelConfig(str(name), **CPU, **more))


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3"])
def test_the_merged_model_is_the_adapted_model(family, tiny_checkpoints, tmp_path):
    base = tiny_checkpoints[family]
    made = save_adapter(base, tmp_path / "adapter", targets=VISION_TOO)
    out = merge_adapters([str(made)], tmp_path / "out")
    adapted, merged = load(made), load(out)
    assert isinstance(adapted, PeftModel)
    assert not isinstance(merged, PeftModel)
    batch = question(out)
    torch.testing.assert_close(logits(merged, batch), logits(adapted, batch), atol=2e-3, rtol=1e-4)
    assert not torch.allclose(logits(merged, batch), logits(load(base), batch), atol=0.1)
    assert answer(merged, batch) == answer(adapted, batch)
    assert not torch.allclose(logits(merged, batch)[:, -1], logits(merged, question(out, 1))[:, -1], atol=1e-3)
    assert stored(out).keys() == stored(base).keys()  # the names of the base's files, as vLLM knows them
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert merged.generation_config.eos_token_id == load(base).generation_config.eos_token_id
    note = json.loads((out / "merge.json").read_text())
    assert note["base"]["name"] == str(base)
    assert [entry["name"] for entry in note["adapters"]] == [str(made)]
    assert note["fingerprint"] == fingerprint(merged)
    assert note["base_fingerprint"] == fingerprint(load(base))


def test_scale_moves_the_language_model_only(tiny_llava, tmp_path):
    made = save_adapter(tiny_llava, tmp_path / "adapter", targets=VISION_TOO)
    start = stored(tiny_llava)
    full, half, none = (
        stored(merge_adapters([str(made)], tmp_path / f"out{scale}", scale=scale)) for scale in (1.0, 0.5, 0.0)
    )
    moved = [name for name in start if not torch.equal(start[name], full[name])]
    assert {families.tower(name) for name in moved} == {"vision", "language_model"}
    for name in moved:
        if families.tower(name) == "vision":
            assert torch.equal(half[name], full[name])
            assert torch.equal(none[name], full[name])
        else:
            torch.testing.assert_close(half[name], (start[name] + full[name]) / 2, atol=1e-6, rtol=1e-5)
            assert torch.equal(none[name], start[name])


def test_scaling_is_undone(adapter, tiny_llava):
    model, batch = load(adapter), question(tiny_llava)
    before = logits(model, batch)
    for scale in (0.3, 0.0):
        with scaled_lora(model, scale):
            scaled = logits(model, batch)
        assert not torch.allclose(scaled, before, atol=1e-2)
        assert torch.equal(logits(model, batch), before)
    torch.testing.assert_close(scaled, logits(load(tiny_llava), batch))  # the last was 0


def test_several_adapters(adapter, second, tiny_llava, tmp_path):
    """`cat` and `svd` of full rank are the weighted sum of the changes; `linear` is not."""
    start = stored(tiny_llava)
    changes = [
        {
            name: tensor - start[name]
            for name, tensor in stored(merge_adapters([str(made)], tmp_path / made.name)).items()
        }
        for made in (adapter, second)
    ]
    both, weights = [str(adapter), str(second)], [0.7, -0.2]
    for kind, exact in (("cat", True), ("linear", False)):
        after = stored(merge_adapters(both, tmp_path / kind, weights=weights, combination_type=kind))
        wanted = {name: start[name] + 0.7 * changes[0][name] - 0.2 * changes[1][name] for name in start}
        assert all(torch.allclose(after[name], wanted[name], atol=1e-5) for name in start) == exact
    mean = stored(merge_adapters(both, tmp_path / "mean"))
    half = stored(merge_adapters(both, tmp_path / "half", scale=0.5))
    for name in start:
        wanted = (changes[0][name] + changes[1][name]) / 2
        torch.testing.assert_close(mean[name], start[name] + wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(half[name], start[name] + wanted / 2, atol=1e-5, rtol=1e-4)
    thinned = [
        stored(merge_adapters(both, tmp_path / f"{kind}{seed}", combination_type=kind, density=density, seed=seed))
        for kind, density, seed in (
            ("ties", 0.5, 0), ("ties", 0.5, 1), ("dare_ties", 0.5, 0), ("dare_ties", 0.5, 1), ("svd", None, 0),
            ("magnitude_prune", 0.5, 0), ("dare_linear", 0.5, 0),
        )
    ]  # fmt: skip
    moved = next(name for name in start if changes[0][name].any())
    assert torch.equal(thinned[0][moved], thinned[1][moved])
    assert not torch.equal(thinned[2][moved], thinned[3][moved])
    assert all(not torch.equal(each[moved], start[moved]) for each in thinned)
    torch.manual_seed(99)
    again = stored(merge_adapters(both, tmp_path / "again", combination_type="dare_ties", density=0.5, seed=0))
    assert torch.equal(again[moved], thinned[2][moved])
    note = json.loads((tmp_path / "cat" / "merge.json").read_text())
    assert (note["weights"], note["combination_type"]) == (weights, "cat")


def test_settings_that_do_not_fit(adapter, second, tmp_path):
    both, out = [str(adapter), str(second)], tmp_path / "out"
    for message, adapters, more in (
        ("no adapter is named", [], {}),
        ("an adapter is named twice", [str(adapter)] * 2, {}),
        ("combination_type 'slerp' is not known; PEFT's are linear, cat, svd", both, {"combination_type": "slerp"}),
        ("`weights` and `density` combine several adapters, and there is one", both[:1], {"weights": [1.0]}),
        ("'ties' needs `density`", both, {"combination_type": "ties"}),
        ("'cat' does not use `density`", both, {"density": 0.5}),
        ("density 2.0 is not a share", both, {"combination_type": "ties", "density": 2.0}),
        ("1 weights for 2 adapters", both, {"weights": [1.0]}),
        ("scale nan is not a number to multiply with. Give 1", both[:1], {"scale": float("nan")}),
        (r"weights \[inf, 1.0\] are not all numbers", both, {"weights": [float("inf"), 1.0]}),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapters(adapters, out, **more)
    wide = save_adapter(Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]),
                        tmp_path / "wide", r=8)  # fmt: skip
    with pytest.raises(
        ModelError, match="PEFT cannot combine these adapters by 'linear': All adapters must have the same r"
    ):
        merge_adapters([str(adapter), str(wide)], out, combination_type="linear")
    assert not out.exists()


def test_the_wrong_base_is_refused(adapter, tiny_llava, tiny_idefics3, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        ModelError, match=r"does not fit .*idefics3': .*Name the model that it was trained on as `base`"
    ):
        merge_adapters([str(adapter)], out, base=str(tiny_idefics3))
    with pytest.raises(ModelError, match=r"does not read|is of model_type 'llama'"):
        merge_adapters([str(adapter)], out, base=str(save_text_llm(tiny_llava, tmp_path / "text", noise=0.0)))

    lost = shutil.copytree(adapter, tmp_path / "lost")
    settings = json.loads((lost / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(
        ModelError, match=r"there is no folder .*gone'.*It is what adapter .*lost' names; `base` names another"
    ):
        merge_adapters([str(lost)], out)
    with pytest.raises(ModelError, match="the adapters name different bases .*gone"):
        merge_adapters([str(adapter), str(lost)], out)
    assert merge_adapters([str(lost)], tmp_path / "found", base=str(tiny_llava)).is_dir()
    both = merge_adapters([str(adapter), str(lost)], tmp_path / "both", base=str(tiny_llava))
    torch.testing.assert_close(stored(both), stored(tmp_path / "found"))  # the mean of an adapter and its copy

    (lost / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    with pytest.raises(ModelError, match=r"lost' is of type IA3, and this merges LoRA adapters"):
        merge_adapters([str(lost)], out)
    assert not out.exists()


def test_a_base_trained_on_since_is_noticed(adapter, tiny_llava, tmp_path):
    """A run notes the fingerprint of what it started from; a folder of the same name may hold other weights now."""
    run = shutil.copytree(adapter, tmp_path / "run")
    (run / "prefalign_config.yaml").write_text(yaml.safe_dump({"model": {"model_name_or_path": "x", "dtype": "auto"}}))
    (run / "base.json").write_text(json.dumps({"name": "x", "local": None, "fingerprint": "0" * 16}))
    with pytest.raises(
        ModelError, match=r"was trained on 'x' with other weights than .* \(fingerprint 0000000000000000, here"
    ):
        merge_adapters([str(run)], tmp_path / "out")
    noted = {"name": "x", "local": None, "fingerprint": fingerprint(load(tiny_llava))}
    (run / "base.json").write_text(json.dumps(noted))
    load_processor(ModelConfig(str(tiny_llava))).save_pretrained(run)
    out = merge_adapters([str(run)], tmp_path / "out")
    assert (out / "prefalign_config.yaml").is_file()  # a model card is written from it
    assert (out / "chat_template.jinja").read_text() == (run / "chat_template.jinja").read_text()
    assert (out / "chat_template.jinja").read_text() != (tiny_llava / "chat_template.jinja").read_text()


def test_an_adapter_finds_its_base_from_anywhere(tiny_llava, tmp_path, monkeypatch):
    """Trained as `--model.model_name_or_path runs/sft`; the run noted which folder that was."""
    base = shutil.copytree(tiny_llava, tmp_path / "runs" / "sft")
    monkeypatch.chdir(tmp_path)
    made = save_adapter(Path("runs/sft"), tmp_path / "adapter")
    (made / "base.json").write_text(base_file("runs/sft", fingerprint(load(base)), "0" * 8)["base.json"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = merge_adapters(["../adapter"], tmp_path / "out")
    assert json.loads((out / "merge.json").read_text())["base"]["name"] == str(base)
    assert isinstance(load(made), PeftModel)
    note = json.loads((made / "base.json").read_text())
    (made / "base.json").write_text(json.dumps({**note, "name": "runs/other"}))
    with pytest.raises(ModelError, match="there is no folder 'runs/sft'|'runs/sft' is neither a folder here"):
        merge_adapters(["../adapter"], tmp_path / "again")


def test_another_base_is_noticed_whatever_the_dtypes(adapter, tiny_llava, tmp_path):
    """Trained in bfloat16 and merged as stored, as the bundled configs do."""
    run, other = (
        shutil.copytree(adapter, tmp_path / "run"),
        perturbed(tiny_llava, tmp_path / "other", noise=0.1, seed=3),
    )
    (run / "prefalign_config.yaml").write_text(yaml.safe_dump({"model": {"dtype": "bfloat16"}}))
    noted = {"name": "x", "local": None, "fingerprint": fingerprint(load(tiny_llava, dtype="bfloat16"))}
    (run / "base.json").write_text(json.dumps(noted))
    for dtype in ("auto", "float32", "bfloat16"):
        assert merge_adapters([str(run)], tmp_path / dtype, dtype=dtype).is_dir()
        with pytest.raises(ModelError, match=f"was trained on 'x' with other weights .*{noted['fingerprint']}, here"):
            merge_adapters([str(run)], tmp_path / "out", base=str(other), dtype=dtype)
    (run / "base.json").write_text(json.dumps({**noted, "fingerprint": "0" * 16, "changed": True}))
    assert merge_adapters([str(run)], tmp_path / "changed").is_dir()  # of a rounded base: no base is known by it


def test_an_adapter_of_quantised_weights_goes_onto_their_original(adapter, tiny_llava, tmp_path):
    """What the refusal and the config's header advise."""
    run, rounded = shutil.copytree(adapter, tmp_path / "run"), shutil.copytree(tiny_llava, tmp_path / "base-4bit")
    settings = json.loads((rounded / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "awq"}}))
    named = json.loads((run / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(rounded)}
    (run / "adapter_config.json").write_text(json.dumps(named))
    (run / "prefalign_config.yaml").write_text(yaml.safe_dump({"model": {"model_name_or_path": str(rounded)}}))
    for name, text in base_file(str(rounded), "0" * 16, "0" * 8, changed=True).items():
        (run / name).write_text(text)
    with pytest.raises(ModelError, match=r"base-4bit' holds quantised weights \(awq\).*Merge into the 16-bit model"):
        merge_adapters([str(run)], tmp_path / "out")
    out, wanted = (merge_adapters([str(run)], tmp_path / "out", base=str(tiny_llava)),
                   merge_adapters([str(adapter)], tmp_path / "plain"))  # fmt: skip
    assert all(torch.equal(tensor, stored(wanted)[name]) for name, tensor in stored(out).items())


def test_what_is_not_an_adapter(tiny_llava, adapter, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (
        (tiny_llava, r"llava' is a full model, not an adapter: there is nothing to merge"),
        (tmp_path / "empty", r"has no adapter_config.json \(it holds: nothing\), so it is not an adapter"),
        ("no-one/nothing", "'no-one/nothing' is not a folder here and could not be downloaded"),
        ("runs/no/such", "is not a folder here and could not be downloaded"),
    ):
        with pytest.raises(ModelError, match=message):
            merge_adapters([str(name)], tmp_path / "out")
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(
        ModelError, match=r"no weights in safetensors form \(only adapter_model.bin, which are not read"
    ):
        merge_adapters([str(pickled)], tmp_path / "out")


def test_a_quantised_base_is_refused(adapter, tiny_llava, tmp_path):
    base = shutil.copytree(tiny_llava, tmp_path / "base-4bit")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"base-4bit' holds quantised weights \(gptq\).*Merge into the 16-bit model"):
        merge_adapters([str(adapter)], tmp_path / "out", base=str(base))


def test_adapters_that_replace_weights(tiny_llava, tmp_path):
    whole = save_adapter(tiny_llava, tmp_path / "whole", modules_to_save=["lm_head"])
    out = merge_adapters([str(whole)], tmp_path / "out")
    batch = question(out)
    torch.testing.assert_close(logits(load(out), batch), logits(load(whole), batch), atol=2e-3, rtol=1e-4)
    dora = save_adapter(tiny_llava, tmp_path / "dora", use_dora=True)
    for made in (whole, dora):
        with pytest.raises(
            ModelError, match=r"scale 0.5 scales what LoRA adds, .*Merge it with scale 1, then .*merge_models"
        ):
            merge_adapters([str(made)], tmp_path / "half", scale=0.5)
        with pytest.raises(ModelError, match="holds whole modules or DoRA magnitudes, which cannot be combined"):
            merge_adapters([str(whole), str(dora)], tmp_path / "both")
    out = merge_adapters([str(dora)], tmp_path / "dora_out")
    torch.testing.assert_close(logits(load(out), batch), logits(load(dora), batch), atol=2e-3, rtol=1e-4)


def test_a_tied_head_cannot_take_an_adapter(tiny_checkpoints, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that this can lead to complications
        for number, more in enumerate(({"targets": r".*lm_head"}, {"modules_to_save": ["lm_head"]})):
            made = save_adapter(tiny_checkpoints["gemma3"], tmp_path / f"adapter{number}", **more)
            with pytest.raises(ModelError, match="one matrix for both: merged, a change of one would change the other"):
                merge_adapters([str(made)], tmp_path / "out")


def test_damaged_adapters(adapter, tmp_path):
    from safetensors.torch import save_file

    broken = shutil.copytree(adapter, tmp_path / "broken")
    tensors = stored(adapter)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] * float("nan")}, broken / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="merged weights are not finite, so an adapter is damaged"):
        merge_adapters([str(broken)], tmp_path / "out")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, broken / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"does not fit .*: 1 tensor\(s\) without a counterpart, such as .*lora_A"):
        merge_adapters([str(broken)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dtypes(tiny_llava, tmp_path):
    half = tmp_path / "half"
    load(tiny_llava, dtype="float16").save_pretrained(half)
    load_processor(ModelConfig(str(tiny_llava))).save_pretrained(half)
    made = save_adapter(half, tmp_path / "adapter")
    for dtype, wanted in (("auto", torch.float16), ("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        tensors = stored(merge_adapters([str(made)], tmp_path / dtype, dtype=dtype))
        assert {tensor.dtype for tensor in tensors.values()} == {wanted}
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")


def test_all_from_the_hub(adapter, tiny_llava, tmp_path, monkeypatch):
    from huggingface_hub import constants

    def repository(folder, commits):
        return Repository(
            private=False, files={file.name: file.read_bytes() for file in folder.iterdir()}, commits=commits
        )

    base = shutil.copytree(tiny_llava, tmp_path / "base")
    (base / "LICENSE.txt").write_text("terms")
    (base / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    with StandInHub() as server:
        server.repositories["model", "tester/base"] = repository(base, 7)
        server.repositories["model", "tester/adapter"] = repository(adapter, 3)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        out = merge_adapters(["tester/adapter"], tmp_path / "out", base="tester/base")
    note = json.loads((out / "merge.json").read_text())
    assert (note["base"]["revision"], note["adapters"][0]["revision"]) == (f"{7:040d}", f"{3:040d}")
    assert note["base"]["license"] == "mit"
    assert (out / "LICENSE.txt").read_text() == "terms"
    local = stored(merge_adapters([str(adapter)], tmp_path / "local"))
    assert all(torch.equal(tensor, local[name]) for name, tensor in stored(out).items())


def test_the_recipes_from_the_command_line(tmp_path, capsys):
    from prefalign.cli import main

    made = save_adapter(SCENES_BASE, tmp_path / "adapter")
    one = ["run", "merge_adapter", "--config", "recipes/merge_adapter", "--adapter", str(made)]
    assert main([*one, "--output", str(tmp_path / "policy")]) == 0
    assert "policy is a full model" in capsys.readouterr().out
    assert main([*one, "--output", str(tmp_path / "policy"), "--scale", "0.5"]) == 1
    assert "holds another merge" in capsys.readouterr().err
    two = ["run", "merge_models", "--config", "recipes/merge_models_scenes", "--models", str(tmp_path / "policy")]
    assert main([*two, "--output", str(tmp_path / "swept"), "--alpha", "[0, 0.5, 1]"]) == 0
    assert "--model.model_name_or_path" in capsys.readouterr().out
    start, end = stored(SCENES_BASE), stored(tmp_path / "policy")
    swept = [stored(tmp_path / "swept" / f"alpha-{alpha}") for alpha in ("0", "0.5", "1")]
    for name in start:
        assert torch.equal(swept[0][name], start[name])
        torch.testing.assert_close(swept[1][name], (start[name] + end[name]) / 2, atol=1e-6, rtol=1e-5)
        assert torch.equal(swept[2][name], end[name])
    stage = bundled.load_stage("merge_models")
    for message, more in (
        ("text_model and base are both given", {"base": "a", "text_model": "b"}),
        ("text_model is merged with one VLM, and there are 2 models", {"models": ["a", "b"], "text_model": "c"}),
        (r"alpha: \[0.5, 0.5\] names no value, or one twice", {"alpha": [0.5, 0.5]}),
        (r"alpha: \[\] names no value", {"alpha": []}),
        ("models: no model is named; there is nothing to merge", {"models": []}),
        ("models: no model is named; there is nothing to merge", {"models": [], "text_model": "a"}),
    ):
        with pytest.raises(ValueError, match=message):
            stage.main(config.build(stage.Config, {"models": "a", "output": tmp_path / "x", **more}))

"""Merging whole models on disk, and the folders that come of it: complete, whole or absent, never mistaken for another."""

import json
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefalign import bundled, config, merged_folders
from prefalign.checkpoints import ModelError
from prefalign.counterparts import Partner, match_names
from prefalign.merged_folders import is_made, whole_folder
from prefalign.merging import Arithmetic, merge_llm, merge_vlms
from prefalign.models import ModelConfig, load_model, load_processor
from tests.merging_cases import (
    answer,
    perturbed,
    question,
    save_adapter,
    save_text_llm,
    stored,
)

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def tuned(tiny_llava, tmp_path_factory):
    return perturbed(tiny_llava, tmp_path_factory.mktemp("merging") / "tuned", noise=0.05, seed=1)


@pytest.fixture(scope="module")
def other(tiny_llava, tmp_path_factory):
    return perturbed(tiny_llava, tmp_path_factory.mktemp("merging") / "other", noise=0.05, seed=2)


# weights


def test_a_tuned_model_drawn_back_to_its_start(tiny_llava, tuned, tmp_path):
    merged = merge_vlms([str(tuned)], tmp_path / "out", base=str(tiny_llava), alpha=0.3)
    start, end, after = stored(tiny_llava), stored(tuned), stored(merged)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert 0 < len(moved) < len(start)
    for name in start:
        torch.testing.assert_close(after[name], 0.7 * start[name] + 0.3 * end[name], atol=1e-6, rtol=1e-5)
        assert name in moved or torch.equal(after[name], start[name])
    whole = stored(merge_vlms([str(tuned)], tmp_path / "one", base=str(tiny_llava)))
    assert all(torch.equal(whole[name], end[name]) for name in end)


def test_seeds_are_averaged(tiny_llava, tuned, other, tmp_path):
    folders = [tiny_llava, tuned, other]
    tensors = [stored(folder) for folder in folders]
    mean = stored(merge_vlms([str(folder) for folder in folders], tmp_path / "mean"))
    weighted = stored(merge_vlms([str(folder) for folder in folders], tmp_path / "weighted", weights=[0.5, 0.2, 0.3]))
    for name in mean:
        one, two, three = (each[name] for each in tensors)
        torch.testing.assert_close(mean[name], (one + two + three) / 3, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(weighted[name], 0.5 * one + 0.2 * two + 0.3 * three, atol=1e-6, rtol=1e-5)


def test_a_mean_has_the_dtype_of_the_first_model(tiny_llava, tuned, tmp_path):
    """Whichever of the two is the narrow one, and whether a tensor is mixed or the same in both."""
    load_model(ModelConfig(str(tuned), device="cpu", dtype="float16")).save_pretrained(tmp_path / "half")
    load_processor(ModelConfig(str(tuned))).save_pretrained(tmp_path / "half")
    for first, second, dtype in ((tiny_llava, "half", torch.float32), (tmp_path / "half", tiny_llava, torch.float16)):
        for weights in ([0.5, 0.5], [0.0, 1.0]):
            out = merge_vlms([str(first), str(tmp_path / second)], tmp_path / f"{dtype}{weights[0]}", weights=weights)
            assert {tensor.dtype for tensor in stored(out).values()} == {dtype}
            assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    start, end, mean = stored(tiny_llava), stored(tmp_path / "half"), stored(tmp_path / "torch.float320.5")
    for name in start:
        torch.testing.assert_close(mean[name], (start[name] + end[name].float()) / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "dare_ties"])
def test_several_tunings_of_one_start(method, tiny_llava, tuned, other, tmp_path):
    how = Arithmetic(method, None if method == "linear" else 0.5, seed=3)
    merged = merge_vlms([str(tuned), str(other)], tmp_path / "out", base=str(tiny_llava), weights=[0.6, 0.5], alpha=0.5,
                        arithmetic=how)  # fmt: skip
    start, one, two, after = (stored(folder) for folder in (tiny_llava, tuned, other, merged))
    for name in start:
        wanted = how.combine(start[name], [one[name], two[name]], [0.3, 0.25], name)
        assert torch.equal(after[name], wanted)
    assert load_model(ModelConfig(str(merged), **CPU)).dtype == torch.float32


def test_names_of_other_versions_are_matched(tiny_llava, tuned, tmp_path):
    """transformers 5 saves some models under names other than the Hub's: the ending decides."""
    renamed = shutil.copytree(tuned, tmp_path / "renamed")
    tensors = stored(renamed)
    as_new = {
        name.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head", "lm_head")
        .replace("vision_tower.vision_model.", "model.vision_tower.")
        .replace("multi_modal_projector", "model.multi_modal_projector"): tensor
        for name, tensor in tensors.items()
    }
    assert not as_new.keys() & tensors.keys()
    save_file(as_new, renamed / "model.safetensors", {"format": "pt"})
    first = stored(merge_vlms([str(tuned)], tmp_path / "a", base=str(tiny_llava), alpha=0.5))
    second = stored(merge_vlms([str(tiny_llava)], tmp_path / "b", base=str(renamed), alpha=0.5))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-5)


def test_names_without_one_counterpart_are_left_out():
    both = match_names(["a.layers.0.q.weight", "a.layers.1.q.weight"], ["b.layers.0.q.weight"])
    assert both == {"a.layers.0.q.weight": "b.layers.0.q.weight"}
    assert match_names(["a.layers.0.q.weight", "c.layers.0.q.weight"], ["b.layers.0.q.weight"]) == {}
    assert match_names(["visual.blocks.0.q.weight"], ["model.blocks.0.q.weight"]) == {}  # another tower
    assert match_names(["a.norm.weight"], ["norm.weight", "b.x_norm.weight"]) == {"a.norm.weight": "norm.weight"}


def test_sharded_checkpoints_stay_sharded(tiny_llava, tuned, tmp_path):
    sharded = tmp_path / "sharded"
    load_model(ModelConfig(str(tuned), **CPU)).save_pretrained(sharded, max_shard_size="200KB")
    load_processor(ModelConfig(str(tuned))).save_pretrained(sharded)
    files = {file.name for file in sharded.glob("*.safetensors")}
    assert len(files) > 2
    merged = merge_vlms([str(sharded)], tmp_path / "out", base=str(tiny_llava), alpha=0.5)
    assert {file.name for file in merged.glob("*.safetensors")} == files
    one, two = stored(merged), stored(merge_vlms([str(tuned)], tmp_path / "one", base=str(tiny_llava), alpha=0.5))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    load_model(ModelConfig(str(merged), **CPU))
    (sharded / sorted(files)[0]).unlink()
    with pytest.raises(ModelError, match=r"sharded' lacks model-00001-of-.*, which its index names"):
        merge_vlms([str(sharded)], tmp_path / "two", base=str(tiny_llava), alpha=0.5)


def test_only_one_tensor_is_in_hand_at_a_time(tiny_llava, tuned, other, tmp_path, monkeypatch):
    """Of the partners no tensor is kept after it was merged."""
    read, alive, most = Partner.read, [], []

    def watched(self, name, like):
        most.append(sum(reference() is not None for reference in alive))
        tensor = read(self, name, like)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Partner, "read", watched)
    merge_vlms([str(tuned), str(other)], tmp_path / "out", base=str(tiny_llava), weights=[0.5, 0.5])
    assert len(most) > 80
    assert max(most) <= 3


def test_weights_alpha_and_base_must_fit(tiny_llava, tuned, tiny_gemma3, tmp_path):
    out, models = tmp_path / "out", [str(tiny_llava), str(tuned)]
    with pytest.raises(ValueError, match="3 weights for 2 models"):
        merge_vlms(models, out, weights=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="one model alone has nothing to be merged with"):
        merge_vlms(models[:1], out)
    with pytest.raises(ValueError, match=r"sum to 1.5: without a `base` .*Make them sum to 1"):
        merge_vlms(models, out, weights=[1.0, 0.5])
    with pytest.raises(ValueError, match=r"method 'ties' with alpha 1.0 needs task vectors. Give as `base`"):
        merge_vlms(models, out, arithmetic=Arithmetic("ties", 0.5))
    with pytest.raises(ValueError, match=r"method 'linear' with alpha 0.5 needs task vectors"):
        merge_vlms(models, out, alpha=0.5)
    with pytest.raises(ValueError, match="no model is named; there is nothing to merge"):
        merge_vlms([], out)
    with pytest.raises(ValueError, match=r"weights \[nan\] are not all numbers to multiply with"):
        merge_vlms(models[1:], out, base=models[0], weights=[math.nan])
    for name in (models[0], f"{tiny_llava.parent}/../{tiny_llava.parent.name}/{tiny_llava.name}"):
        with pytest.raises(ModelError, match="is among the models and is their base: .*Take it out of `models`"):
            merge_vlms([models[1], name], out, base=models[0])
    with pytest.raises(ModelError, match="is named twice in models .*Give it once, with a larger weight"):
        merge_vlms([models[1], models[1]], out, base=models[0])
    with pytest.raises(ModelError, match="do not compute alike|are not of one architecture|different vocabularies"):
        merge_vlms([models[0], str(tiny_gemma3)], out)
    assert not out.exists()


# folders


def test_a_finished_merge_is_kept_and_another_refused(tiny_llava, tuned, tmp_path):
    out = tmp_path / "deep" / "out"
    merge_vlms([str(tuned)], out, base=str(tiny_llava), alpha=0.5)
    note = json.loads((out / "merge.json").read_text())
    assert (note["stage"], note["alpha"], note["base"]) == ("merge_vlms", 0.5, str(tiny_llava))
    assert [source["name"] for source in note["sources"]] == [str(tuned), str(tiny_llava)]
    assert note["libraries"]["peft"]
    before = (out / "model.safetensors").stat().st_mtime_ns
    merge_vlms([str(tuned)], out, base=str(tiny_llava), alpha=0.5)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ModelError, match=r"out holds another merge \(see its merge.json\)"):
        merge_vlms([str(tuned)], out, base=str(tiny_llava), alpha=0.6)
    (out / "merge.json").unlink()
    with pytest.raises(ModelError, match="out exists and is not empty. Delete it"):
        merge_vlms([str(tuned)], out, base=str(tiny_llava), alpha=0.5)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that is there and cannot be read")
def test_nothing_is_left_of_a_merge_that_failed(tiny_llava, tuned, tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    half = shutil.copytree(tuned, tmp_path / "half")
    config = half / "generation_config.json"
    config.unlink()
    config.symlink_to("/proc/self/mem")  # a file that is there and cannot be read
    with pytest.raises(OSError, match="Input/output error"):
        merge_vlms([str(half)], out, base=str(tiny_llava), alpha=0.5)
    assert not out.exists()
    assert not partial.exists()
    partial.mkdir()  # of a process that was killed
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"half")
    config.unlink()
    merge_vlms([str(half)], out, base=str(tiny_llava), alpha=0.5)
    assert not partial.exists()
    assert [file.name for file in out.glob("*.safetensors")] == ["model.safetensors"]


def test_nothing_is_left_of_a_merge_that_was_interrupted(tmp_path):
    def interrupted(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out", {}, 0) as partial:
        interrupted(partial)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_there_twice_are_read_once(tiny_llava, tuned, tmp_path):
    """Mistral's repositories hold them under their maker's names too."""
    both = shutil.copytree(tuned, tmp_path / "both")
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, both / "consolidated.safetensors")
    merged = merge_vlms([str(both)], tmp_path / "out", base=str(tiny_llava), alpha=0.5)
    wanted = stored(merge_vlms([str(tuned)], tmp_path / "one", base=str(tiny_llava), alpha=0.5))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in stored(merged).items())
    [source, _] = json.loads((merged / "merge.json").read_text())["sources"]
    assert source["bytes"] == (tuned / "model.safetensors").stat().st_size
    (both / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"both' has its weights in consolidated\*.safetensors only"):
        merge_vlms([str(both)], tmp_path / "two", base=str(tiny_llava), alpha=0.5)


def test_each_model_can_be_pinned(tiny_llava, tuned, tmp_path, monkeypatch):
    """Commits of one repository in the Hub's cache: a base, what was tuned from it, a text model."""
    text = save_text_llm(tiny_llava, tmp_path / "text", noise=0.05)
    commits = {"base": "a" * 40, "tuned": "b" * 40, "text": "c" * 40}
    for name, folder in (("base", tiny_llava), ("tuned", tuned), ("text", text)):
        shutil.copytree(folder, tmp_path / "cache" / "models--tester--line" / "snapshots" / commits[name])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    recipe = bundled.load_stage("merge_models")

    def merged(output, **more):
        given = {"models": "tester/line", "revision": commits["tuned"], "alpha": 0.5, "output": tmp_path / output}
        return stored(recipe.main(config.build(recipe.Config, {**given, **more}))[0])

    of_base = merged("one", base="tester/line", base_revision=commits["base"])
    wanted = stored(merge_vlms([str(tuned)], tmp_path / "1", base=str(tiny_llava), alpha=0.5))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in of_base.items())
    of_text = merged("two", text_model="tester/line", text_revision=commits["text"])
    wanted = stored(merge_llm(str(tuned), str(text), tmp_path / "2", 0.5))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in of_text.items())
    for pinned, partner in (("base_revision", "base"), ("text_revision", "text_model")):
        with pytest.raises(ValueError, match=f"{pinned} is 'v2' and there is no {partner}. Give both, or leave it out"):
            merged("three", **{pinned: "v2"})


def test_a_full_disk_is_explained(tiny_llava, tuned, tmp_path, monkeypatch):
    out = tmp_path / "out"
    usage = merged_folders.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merged_folders.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelError, match=r"merged model takes 0.0 GB and the disk that holds .*out has 0.0 GB free"):
        merge_vlms([str(tuned)], out, base=str(tiny_llava), alpha=0.5)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []

    def write(folder):
        (folder / "model.safetensors").symlink_to("/dev/full")
        (folder / "model.safetensors").write_bytes(b"x" * 10_000)

    with pytest.raises(ModelError, match="became full before .* nothing was left there. Free some space and start"), \
            whole_folder(out, {}, 0) as partial:  # fmt: skip
        write(partial)
    assert list(tmp_path.iterdir()) == []
    message = "Error while serializing: I/O error: No space left on device (os error 28)"  # safetensors' words
    with pytest.raises(ModelError, match="became full before"), whole_folder(out, {}, 0):
        raise RuntimeError(message)
    with pytest.raises(ModelError, match="became full before"), whole_folder(out, {}, 0):
        raise RuntimeError("the weights could not be written") from RuntimeError(message)


def test_licences_go_with_the_weights_and_the_card_does_not(tiny_llava, tuned, tmp_path):
    licensed = shutil.copytree(tuned, tmp_path / "licensed")
    (licensed / "README.md").write_text("---\nlicense: llama3\nlanguage: en\n---\nlicense: not this\n")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "optimizer.pt", "trainer_state.json", "custom.py"):
        (licensed / name).write_text(name)
    merged = merge_vlms([str(licensed)], tmp_path / "out", base=str(tiny_llava), alpha=0.5)
    names = {file.name for file in merged.iterdir()}
    assert {"LICENSE", "NOTICE.txt", "USE_POLICY.md", "custom.py", "merge.json", "generation_config.json"} <= names
    assert not {"README.md", "optimizer.pt", "trainer_state.json"} & names
    sources = json.loads((merged / "merge.json").read_text())["sources"]
    assert [source["license"] for source in sources] == ["llama3", None]


def test_quantised_weights_and_adapters_are_refused(tiny_llava, tuned, tmp_path):
    quantised = shutil.copytree(tuned, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    message = (
        r"quantised' holds quantised weights \(bitsandbytes\).*Merge into the 16-bit model .* then quantise the result"
    )
    with pytest.raises(ModelError, match=message):
        merge_vlms([str(quantised)], tmp_path / "out", base=str(tiny_llava))
    adapter = save_adapter(tiny_llava, tmp_path / "adapter")
    with pytest.raises(
        ModelError, match=r"is an adapter, .*prefalign run merge_adapter --adapter .*adapter --output FOLDER"
    ):
        merge_vlms([str(adapter)], tmp_path / "out", base=str(tiny_llava))


def test_unwritable_places_are_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match=r"cannot be written: .*Give another `output`"), \
            whole_folder(tmp_path / "file" / "out", {}, 0):  # fmt: skip
        pass
    with pytest.raises(ModelError, match="file exists and is not empty|file holds another merge"):
        is_made(tmp_path / "file", {})


def test_merged_model_answers_and_sees(tiny_llava, tmp_path):
    text = save_text_llm(tiny_llava, tmp_path / "text", noise=0.05)
    merged = merge_llm(str(tiny_llava), str(text), tmp_path / "out", 0.9)
    model = load_model(ModelConfig(str(merged), **CPU))
    batch = question(merged)
    assert len(answer(model, batch)) > batch["input_ids"].shape[1]
    assert load_file(merged / "model.safetensors").keys() == load_file(tiny_llava / "model.safetensors").keys()

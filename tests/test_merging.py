"""Merging models on disk: arithmetic against PEFT and by hand, the language model alone, whole models, refusals."""

import hashlib
import json
import shutil

import pytest
import torch
import transformers
from peft.utils import merge_utils
from safetensors.torch import save_file

from prefalign import families
from prefalign.adapters import merge_adapters
from prefalign.checkpoints import ModelError
from prefalign.counterparts import match_names
from prefalign.merging import Arithmetic, merge_llm, merge_vlms
from prefalign.models import ModelConfig, load_model, load_processor
from tests.merging_cases import (
    logits,
    question,
    save_adapter,
    save_text_llm,
    stored,
)

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def texts(tiny_checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return {name: save_text_llm(vlm, folder / f"text_{name}", noise=0.05) for name, vlm in tiny_checkpoints.items()}


# arithmetic


def vectors(count=2, shape=(40, 30)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count + 1)]


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_thinning_is_pefts(method):
    start, *tuned = vectors()
    how = Arithmetic(method, density=0.3, seed=4)
    ours = how.combine(start, tuned, [0.7, 0.4], "a.weight")
    differences = [tensor - start for tensor in tuned]
    found = []
    for seed in range(2):  # PEFT draws from torch's generator: replay ours, and another to see that the draw counts
        how_seeded = Arithmetic(method, density=0.3, seed=4 + seed)
        with torch.random.fork_rng():
            digits = hashlib.sha256(f"{how_seeded.seed}|a.weight".encode()).hexdigest()[:15]
            torch.manual_seed(int(digits, 16))
            found.append(start + getattr(merge_utils, method)(differences, torch.tensor([0.7, 0.4]), 0.3))
    assert torch.equal(ours, found[0])
    assert torch.equal(ours, found[1]) == (method == "ties")


def test_ties_by_hand():
    """Kept of three: (3, -1, .) and (-1, -2, .); signs of the sum (2, -3): first entry 3 alone, second the mean of both."""
    start = torch.ones(3)
    tuned = [start + torch.tensor([3.0, -1.0, 0.5]), start + torch.tensor([-1.0, -2.0, 0.4])]
    how = Arithmetic("ties", density=2 / 3)
    assert how.default_weights(2) == [1.0, 1.0]
    assert how.combine(start, tuned, [1.0, 1.0], "w").tolist() == [4.0, -0.5, 1.0]
    assert how.combine(start, tuned, [0.5, 0.5], "w").tolist() == [2.5, 0.25, 1.0]


def test_linear_by_hand():
    start, one, two = torch.tensor([1.0, 2.0, -4.0]), torch.tensor([3.0, 2.0, 0.0]), torch.tensor([1.0, 6.0, 0.0])
    assert Arithmetic().combine(start, [one], [0.25], "w").tolist() == [1.5, 2.0, -3.0]
    assert Arithmetic().combine(start, [one, two], [0.5, 0.25], "w").tolist() == [2.0, 3.0, -1.0]
    assert Arithmetic().default_weights(4) == [0.25] * 4


def test_dare_keeps_a_share_and_scales_it_up():
    start, tuned = torch.zeros(100, 100), torch.ones(100, 100)
    how = Arithmetic("dare_linear", density=0.25, seed=1)
    merged = how.combine(start, [tuned], [1.0], "a")
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert merged.mean().item() == pytest.approx(1.0, abs=0.06)
    state = torch.random.get_rng_state()
    assert torch.equal(how.combine(start, [tuned], [1.0], "a"), merged)  # drawn from seed and name alone
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(how.combine(start, [tuned], [1.0], "b"), merged)
    assert not torch.equal(Arithmetic("dare_linear", 0.25, 2).combine(start, [tuned], [1.0], "a"), merged)


def test_sums_are_taken_in_float32():
    """256 + 1 is 256 in bfloat16: the mean of 256, 257 and 258 is 257 only if nothing is rounded on the way."""
    start = torch.full((2,), 256.0, dtype=torch.bfloat16)
    tuned = [torch.full((2,), 257.0), torch.full((2,), 258.0, dtype=torch.bfloat16)]
    merged = Arithmetic().combine(start, [value.to(torch.float32) for value in tuned], [1 / 3, 1 / 3], "w")
    assert merged.tolist() == [257.0, 257.0]
    half = Arithmetic().combine(start, [tuned[1]], [0.5], "w")
    assert half.dtype == torch.bfloat16


def test_settings_of_the_arithmetic_are_checked():
    with pytest.raises(
        ValueError, match="method 'slerp' is not known; use one of linear, ties, dare_linear, dare_ties"
    ):
        Arithmetic("slerp")
    with pytest.raises(ValueError, match="density 0.5 means nothing to `linear`"):
        Arithmetic("linear", 0.5)
    for density in (None, 0.0, 1.5):
        with pytest.raises(ValueError, match=f"density is {density}. Give `density` above 0, up to 1"):
            Arithmetic("ties", density)


# the language model towards its text model


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3"])
def test_alpha_one_is_the_vlm_to_the_bit(family, tiny_checkpoints, texts, tmp_path):
    merged = merge_llm(str(tiny_checkpoints[family]), str(texts[family]), tmp_path / "out", 1.0)
    before, after = stored(tiny_checkpoints[family]), stored(merged)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours = {file.name for file in merged.iterdir()} - {"merge.json"}
    assert ours == {file.name for file in tiny_checkpoints[family].iterdir()}
    for name in ours - {"model.safetensors"}:
        assert (merged / name).read_bytes() == (tiny_checkpoints[family] / name).read_bytes()


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3"])
def test_alpha_zero_answers_text_as_the_text_model(family, tiny_checkpoints, texts, tmp_path):
    merged = merge_llm(str(tiny_checkpoints[family]), str(texts[family]), tmp_path / "out", 0.0)
    model = load_model(ModelConfig(str(merged), **CPU))
    text = transformers.AutoModelForCausalLM.from_pretrained(texts[family]).eval()
    vlm = load_model(ModelConfig(str(tiny_checkpoints[family]), **CPU))
    batch = load_processor(ModelConfig(str(merged))).tokenizer("What is in the image?", return_tensors="pt")
    assert torch.equal(logits(model, batch), logits(text, batch))
    assert not torch.allclose(logits(model, batch), logits(vlm, batch), atol=0.1)


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3"])
def test_between_only_the_language_model_moves(family, tiny_checkpoints, texts, tmp_path):
    merged = merge_llm(str(tiny_checkpoints[family]), str(texts[family]), tmp_path / "out", 0.4)
    before, after, text = stored(tiny_checkpoints[family]), stored(merged), stored(texts[family])
    language = {name for name in before if families.tower(name) == "language_model"}
    assert 0 < len(language) < len(before)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name not in language), name
    partner = match_names(language, text)
    assert partner.keys() == language
    for name in language:
        wanted = 0.4 * before[name] + 0.6 * text[partner[name]]
        torch.testing.assert_close(after[name], wanted, atol=1e-6, rtol=1e-5)
    model = load_model(ModelConfig(str(merged), **CPU))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (family == "gemma3")
    one, two = (logits(model, question(merged, seed))[:, -1] for seed in (0, 1))
    assert not torch.allclose(one, two, atol=1e-3)


def test_half_of_a_model_and_itself_is_the_model(tiny_llava, tmp_path):
    same = save_text_llm(tiny_llava, tmp_path / "same", noise=0.0)
    before = stored(tiny_llava)
    copies = [str(shutil.copytree(tiny_llava, tmp_path / f"copy-{number}")) for number in range(2)]
    for merged in (
        merge_llm(str(tiny_llava), str(same), tmp_path / "a", 0.5),
        merge_vlms(copies[:1], tmp_path / "b", base=str(tiny_llava), alpha=0.5),
        merge_vlms([str(tiny_llava), *copies], tmp_path / "c"),
        merge_vlms(copies, tmp_path / "d", base=str(tiny_llava), arithmetic=Arithmetic("dare_ties", 0.5)),
    ):
        after = stored(merged)
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_adapter_and_interpolation_agree(dtype, tiny_llava, tmp_path):
    base = tmp_path / "base"
    load_model(ModelConfig(str(tiny_llava), dtype=dtype, **CPU)).save_pretrained(base)
    load_processor(ModelConfig(str(tiny_llava))).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter")
    text = save_text_llm(base, tmp_path / "text", noise=0.0)
    whole = merge_adapters([str(adapter)], tmp_path / "whole")
    scaled = stored(merge_adapters([str(adapter)], tmp_path / "scaled", scale=0.4))
    drawn = stored(merge_llm(str(whole), str(text), tmp_path / "drawn", 0.4))
    moved = [name for name, tensor in stored(base).items() if not torch.equal(tensor, scaled[name])]
    assert len(moved) == 6  # q_proj, v_proj and up_proj of two layers
    tolerance = {"float32": 1e-6, "bfloat16": 1 / 64}[dtype]
    for name in scaled:
        torch.testing.assert_close(scaled[name], drawn[name], atol=tolerance, rtol=tolerance)


def add_image_tokens(vlm, folder):
    """Two tokens more at the end of the vocabulary, and one ordinary special token that stands for something else."""
    config = ModelConfig(str(vlm), **CPU)
    model, processor = load_model(config), load_processor(config)
    processor.tokenizer.add_tokens(["<extra_a>", "<extra_b>"], special_tokens=True)
    model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def rename_token(text, old, new):
    file = text / "tokenizer.json"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = text / name
        file.write_text(file.read_text().replace(json.dumps(old), json.dumps(new)))


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_rows_of_image_tokens_stay_the_vlms(family, tiny_checkpoints, texts, tmp_path):
    vlm = add_image_tokens(tiny_checkpoints[family], tmp_path / "vlm")
    text = shutil.copytree(texts[family], tmp_path / "text")
    image = {"llava": "<image>", "gemma3": "<image_soft_token>"}[family]
    rename_token(text, image, "<reserved>")
    token = load_processor(ModelConfig(str(vlm))).tokenizer.convert_tokens_to_ids(image)
    before, after = stored(vlm), stored(merge_llm(str(vlm), str(text), tmp_path / "out", 0.0))
    theirs = stored(text)
    tables = [name for name in before if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(tables) == {"llava": 2, "gemma3": 1}[family]
    for name in tables:
        other = theirs[match_names([name], theirs)[name]]
        rows = len(other)
        assert len(before[name]) == rows + 2
        assert torch.equal(after[name][rows:], before[name][rows:])
        assert torch.equal(after[name][token], before[name][token])
        shared = [row for row in range(rows) if row != token]
        assert torch.equal(after[name][shared], other[shared])
        assert not torch.equal(after[name][shared], before[name][shared])


def test_tied_heads_are_interpolated_once_even_where_they_are_stored_twice(tiny_gemma3, texts, tmp_path):
    vlm, text = shutil.copytree(tiny_gemma3, tmp_path / "vlm"), shutil.copytree(texts["gemma3"], tmp_path / "text")
    for copy in (vlm, text):
        tensors = stored(copy)
        (embedding,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
        assert not any(name.endswith("lm_head.weight") for name in tensors)
        save_file(
            {**tensors, "lm_head.weight": tensors[embedding].clone()}, copy / "model.safetensors", {"format": "pt"}
        )
    for number, first in enumerate((vlm, tiny_gemma3)):
        for second in (text, texts["gemma3"]):
            how = Arithmetic("dare_linear", 0.5)
            out = tmp_path / f"out{number}{second.name}"
            after = stored(merge_llm(str(first), str(second), out, 0.5, arithmetic=how))
            assert ("lm_head.weight" in after) == (first is vlm)
            (embedding,) = (after[name] for name in after if name.endswith("embed_tokens.weight"))
            assert torch.equal(after.get("lm_head.weight", embedding), embedding)
            model = load_model(ModelConfig(str(out), **CPU))
            assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_a_text_model_with_tied_head_gives_its_embedding_to_both(tiny_llava, texts, tmp_path):
    text = shutil.copytree(texts["llava"], tmp_path / "text")
    tensors = stored(text)
    del tensors["lm_head.weight"]
    save_file(tensors, text / "model.safetensors", {"format": "pt"})
    after = stored(merge_llm(str(tiny_llava), str(text), tmp_path / "out", 0.0))
    heads = [tensor for name, tensor in after.items() if name.endswith(("lm_head.weight", "embed_tokens.weight"))]
    assert len(heads) == 2
    assert all(torch.equal(head, tensors["model.embed_tokens.weight"]) for head in heads)


def test_what_does_not_belong_together_is_refused(tiny_llava, tiny_gemma3, texts, tmp_path):
    vlm, text = str(tiny_llava), texts["llava"]

    def changed(name, **values):
        copy = shutil.copytree(text, tmp_path / name)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **values}))
        return copy

    def refused(other, match, alpha=0.5):
        with pytest.raises(ModelError, match=match):
            merge_llm(vlm, str(other), tmp_path / "out", alpha)
        assert not (tmp_path / "out").exists()

    words = shutil.copytree(text, tmp_path / "words")
    vocabulary = json.loads((words / "tokenizer.json").read_text())
    table = vocabulary["model"]["vocab"]
    (one, two) = (token for token, index in table.items() if index in (50, 60))
    table[one], table[two] = table[two], table[one]
    (words / "tokenizer.json").write_text(json.dumps(vocabulary))
    refused(words, r"have different vocabularies: 2 ordinary token\(s\) differ, the first is 50: .*cannot be averaged")

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    refused(changed("rope", rope_parameters=rope), r"do not compute alike \(rope.rope_theta: 10000.0 -> 500000.0\)")
    refused(changed("layers", num_hidden_layers=3), r"do not compute alike \(num_hidden_layers: 2 -> 3\)")
    refused(texts["gemma3"], r"do not compute alike \(.*hidden_act: silu -> None")
    refused(tiny_gemma3, r"reads pictures itself \(gemma3\). Give it as `base`")

    nameless = shutil.copytree(text, tmp_path / "nameless")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (nameless / name).unlink()
    refused(nameless, "has no tokenizer that can be read")

    short = shutil.copytree(text, tmp_path / "short")
    tensors = stored(short)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, short / "model.safetensors", {"format": "pt"})
    refused(
        short, r"not of one architecture: 1 tensor\(s\) of .*llava' have no counterpart .*layers.1.mlp.up_proj.weight"
    )
    tensors |= {"model.layers.1.mlp.up_proj.weight": gone, "model.layers.1.extra.weight": torch.ones(3)}
    save_file(tensors, short / "model.safetensors", {"format": "pt"})
    refused(short, r"1 tensor\(s\) of .*short' have no counterpart in the other \(model.layers.1.extra.weight\)")
    del tensors["model.layers.1.extra.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(100, 64)
    save_file(tensors, short / "model.safetensors", {"format": "pt"})
    refused(short, r"not of one size: .*up_proj.weight is \(128, 64\) in the first and \(100, 64\) in the second")

    untied = shutil.copytree(texts["gemma3"], tmp_path / "untied")
    tensors = stored(untied)
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape)
    save_file(tensors, untied / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match="first uses its input embedding as its output head, and the second has a head"
    ):
        merge_llm(str(tiny_gemma3), str(untied), tmp_path / "out", 0.5)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"alpha {alpha} is not from 0 .* to 1"):
            merge_llm(vlm, str(text), tmp_path / "out", alpha)
    with pytest.raises(ModelError, match=r"text_llava' \(llama\) does not read pictures. .*give it as `text_model`"):
        merge_llm(str(text), str(text), tmp_path / "out", 0.5)

"""Loading: what is read, what it is made of, and each error by its message."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stand_in_hub import Repository, StandInHub
from tiny_vlms import picture, save_tiny

from prefalign import checkpoints, families
from prefalign.engines import Request
from prefalign.engines.transformers import load_engine
from prefalign.models import (
    ModelConfig,
    ModelError,
    fingerprint,
    freeze,
    load_model,
    load_processor,
    parameter_table,
)
from prefalign.records import user_message


def _copy(checkpoint: Path, target: Path) -> Path:
    return Path(shutil.copytree(checkpoint, target))


def _adapter(checkpoint: Path, folder: Path, seed: int) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_model(ModelConfig(str(checkpoint))), lora).save_pretrained(folder)
    return folder


def test_load_gives_the_stored_weights_in_eval_mode(tiny_llava: Path) -> None:
    model = load_model(ModelConfig(str(tiny_llava), device="cpu"))
    assert isinstance(model, transformers.LlavaForConditionalGeneration)
    assert not model.training
    stored = load_file(tiny_llava / "model.safetensors")
    assert "vision_tower.vision_model.embeddings.class_embedding" in stored  # the Hub's names
    (head,) = (value for key, value in stored.items() if key.endswith("lm_head.weight"))
    assert torch.equal(head, model.lm_head.weight)


def test_float16_is_computed_in_float32_on_a_cpu_and_says_so(
    tiny_llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_model(ModelConfig(str(tiny_llava))).half().save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        model = load_model(ModelConfig(str(tmp_path), device="cpu"))
    assert model.dtype == torch.float32
    assert "stored in float16, which a CPU computes badly; loaded in float32" in caplog.text
    assert load_model(ModelConfig(str(tmp_path), dtype="float16", device="cpu")).dtype == torch.float16
    assert load_model(ModelConfig(str(tmp_path), dtype="bfloat16", device="cpu")).dtype == torch.bfloat16


def test_fingerprint_is_of_the_values(tiny_llava: Path, tmp_path: Path) -> None:
    model = load_model(ModelConfig(str(tiny_llava)))
    first = fingerprint(model)
    assert len(first) == 16
    model.save_pretrained(tmp_path / "again")
    assert fingerprint(load_model(ModelConfig(str(tmp_path / "again")))) == first
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-4
    assert fingerprint(model) != first
    half = load_model(ModelConfig(str(tiny_llava))).half()
    assert fingerprint(half) != first  # rounding changed the values
    assert fingerprint(half) == fingerprint(half.float())  # holding them in a wider type did not


def test_fingerprint_tells_adapters_apart(tiny_llava: Path, tmp_path: Path) -> None:
    base = fingerprint(load_model(ModelConfig(str(tiny_llava))))
    one, two = (_adapter(tiny_llava, tmp_path / str(seed), seed) for seed in (1, 2))
    prints = {fingerprint(load_model(ModelConfig(str(tiny_llava), adapter=str(folder)))) for folder in (one, two)}
    assert len(prints | {base}) == 3


def test_an_adapter_folder_alone_loads_on_its_base(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _adapter(tiny_llava, tmp_path / "run", 1)
    alone = load_model(ModelConfig(str(folder)))
    both = load_model(ModelConfig(str(tiny_llava), adapter=str(folder)))
    assert fingerprint(alone) == fingerprint(both)
    assert load_processor(ModelConfig(str(folder))).tokenizer.vocab_size > 0  # the base's, the folder has none
    with pytest.raises(ModelError, match=r"is an adapter, and adapter .* was given too"):
        load_model(ModelConfig(str(folder), adapter=str(folder)))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ModelError, match="does not say which model it belongs to"):
        load_model(ModelConfig(str(folder)))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/away/model"}))
    with pytest.raises(
        ModelError, match=r"was trained on a model that is not found: there is no folder '/gone/away/model'"
    ):
        load_model(ModelConfig(str(folder)))
    with pytest.raises(ModelError, match=r"has no adapter_config.json, so it is not a PEFT adapter"):
        load_model(ModelConfig(str(tiny_llava), adapter=str(tiny_llava)))


@pytest.mark.parametrize("with_processor", [False, True], ids=["weights", "with processor"])
def test_an_adapter_on_the_hub_alone_loads_on_its_base(
    with_processor: bool, tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloaded once, then from the cache without a network; the revision is the adapter's, not the base's."""
    from huggingface_hub import constants

    folder = _adapter(tiny_llava, tmp_path / "run", 1)
    if with_processor:
        load_processor(ModelConfig(str(tiny_llava))).save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"x")
    with StandInHub() as server:
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        server.repositories["model", "tester/adapter"] = Repository(private=False, files=files, commits=1)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        config = ModelConfig("tester/adapter", model_revision="main")
        source, adapter, revision = checkpoints.resolve(config)
    assert (source, revision) == (str(tiny_llava), None)
    assert adapter is not None
    assert (Path(adapter) / "adapter_model.safetensors").is_file()
    assert not (Path(adapter) / "training_args.bin").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fingerprint(load_model(config)) == fingerprint(load_model(ModelConfig(str(folder))))
    assert load_processor(config).tokenizer.vocab_size > 0
    with pytest.raises(ModelError, match=r"'tester/adapter' is an adapter, and adapter .* was given too"):
        load_model(ModelConfig("tester/adapter", adapter=str(folder)))


def test_parameter_table_adds_up(tiny_llava: Path) -> None:
    model = load_model(ModelConfig(str(tiny_llava)))
    rows = {row["tower"]: row for row in parameter_table(model)}
    total = sum(parameter.numel() for parameter in model.parameters())
    assert rows["total"] == {"tower": "total", "parameters": total, "trainable": total}
    # two linear layers with bias: 32 -> 64 -> 64
    assert rows["projector"]["parameters"] == (32 * 64 + 64) + (64 * 64 + 64)
    assert sum(rows[name]["parameters"] for name in families.TOWERS) == total
    frozen = freeze(model, ["vision", "projector"])
    after = {row["tower"]: row["trainable"] for row in parameter_table(model)}
    assert frozen == rows["vision"]["parameters"] + rows["projector"]["parameters"]
    assert after == {
        "vision": 0,
        "projector": 0,
        "language_model": total - frozen,
        "total": total - frozen,
    }


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "gemma3", "paligemma"])
def test_every_tower_is_found_in_every_family(name: str, tmp_path: Path) -> None:
    model = load_model(ModelConfig(str(save_tiny(name, tmp_path))))
    counts = {row["tower"]: row["parameters"] for row in parameter_table(model)}
    assert min(counts.values()) > 0
    assert counts["language_model"] == sum(
        parameter.numel()
        for key, parameter in model.named_parameters()
        if ".language_model." in key or ".text_model." in key or key.startswith("lm_head")
    )


def test_freeze_refuses_what_is_not_there(tiny_llava: Path) -> None:
    model = load_model(ModelConfig(str(tiny_llava)))
    with pytest.raises(
        ModelError, match="no tower called 'visual' to freeze; there are vision, projector, language_model"
    ):
        freeze(model, ["visual"])
    with pytest.raises(ModelError, match="has no projector to freeze"):
        freeze(transformers.LlamaForCausalLM(model.config.text_config), ["projector"])


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder './nowhere'"):
        load_model(ModelConfig("./nowhere"))
    with pytest.raises(ModelError, match=r"there is no folder 'a/b/c'"):
        load_processor(ModelConfig("a/b/c"))
    with pytest.raises(ModelError, match=r"there is no folder 'prefalign/nowhere'"):  # its first part is a folder here
        load_model(ModelConfig("prefalign/nowhere"))
    with pytest.raises(
        ModelError, match=r"'some-owner/some-vlm' is neither a folder here nor in the local cache .* HF_HUB_OFFLINE"
    ):
        load_model(ModelConfig("some-owner/some-vlm"))
    with pytest.raises(ModelError, match=r"it is not the name of a model on the Hub"):
        load_model(ModelConfig("my model"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match=r"is a file; name the folder that holds it"):
        load_model(ModelConfig(str(file)))
    with pytest.raises(ModelError, match=r"has no config.json \(it holds: model.safetensors\), so it is not a model"):
        load_model(ModelConfig(str(tmp_path)))


def test_an_unreachable_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"the Hub at http://127.0.0.1:9 cannot be reached \(ConnectError\)"):
        load_model(ModelConfig("some-owner/some-vlm"))


def test_unknown_families_are_named(tiny_llava: Path, tmp_path: Path) -> None:
    tiny = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    transformers.BertModel(transformers.BertConfig(**tiny)).save_pretrained(tmp_path / "bert")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny)).save_pretrained(tmp_path / "llama")
    for name, shown in (("bert", r"'bert' \(BertModel\)"), ("llama", r"'llama' \(LlamaForCausalLM\)")):
        with pytest.raises(ModelError, match=rf"model_type {shown}, .* Families known to work: LLaVA-1.5, .*Qwen3-VL"):
            load_model(ModelConfig(str(tmp_path / name)))
    odd = _copy(tiny_llava, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "megavlm", "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(
        ModelError, match=r"model_type 'megavlm' .* It comes with code of its own: set trust_remote_code"
    ):
        load_model(ModelConfig(str(odd)))
    (odd / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match=r"config.json of .*odd' could not be read"):
        load_model(ModelConfig(str(odd)))


def test_damaged_weights(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_llava, tmp_path / "copy")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model.safetensors in .* is damaged \(.*; [\d,]+ bytes\)"):
        load_model(ModelConfig(str(folder)))
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="is damaged .* needs `git lfs pull`"):
        load_model(ModelConfig(str(folder)))
    file.unlink()
    with pytest.raises(ModelError, match=r"has no weights in safetensors form \(none\)"):
        load_model(ModelConfig(str(folder)))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"only pytorch_model.bin, which are not read since loading them can run code"):
        load_model(ModelConfig(str(folder)))


def test_missing_tensors_are_not_filled_with_noise(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_llava, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    gone = [key for key in weights if "multi_modal_projector" in key]
    kept = {key: value for key, value in weights.items() if key not in gone}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lack 4 tensor\(s\) that a LlavaForConditionalGeneration has .*they would be random"
    ):
        load_model(ModelConfig(str(folder)))


def test_missing_processor_files(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_llava, tmp_path / "copy")
    (folder / "processor_config.json").unlink()
    with pytest.raises(
        ModelError, match=r"has no processor \(missing: processor_config.json or preprocessor_config.json\)"
    ):
        load_processor(ModelConfig(str(folder)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"missing: tokenizer.json and processor_config.json"):
        load_processor(ModelConfig(str(folder)))


def test_a_processor_that_cannot_be_read(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_llava, tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{broken")
    (folder / "processor_config.json").write_text("{broken")
    with pytest.raises(ModelError, match=r"the processor of .*copy' could not be loaded"):
        load_processor(ModelConfig(str(folder)))


def test_scenes_is_the_shipped_base(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = _adapter(tiny_llava, tmp_path / "run", 1)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/another/machine/prefalign/scenes/base"
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(checkpoints, "SCENES_BASE", tiny_llava)
    assert fingerprint(load_model(ModelConfig("scenes"))) == fingerprint(load_model(ModelConfig(str(tiny_llava))))
    assert load_model(ModelConfig(str(adapter))).peft_config  # a run of another installation finds this one's base
    monkeypatch.setattr(checkpoints, "SCENES_BASE", tmp_path / "nothing")
    with pytest.raises(ModelError, match="the tiny model of `scenes` is not in this installation"):
        load_model(ModelConfig("scenes"))


def test_settings_that_mean_nothing(tiny_llava: Path) -> None:
    with pytest.raises(ModelError, match="dtype 'fp16' is not known; use one of auto, float32"):
        load_model(ModelConfig(str(tiny_llava), dtype="fp16"))
    with pytest.raises(ModelError, match="device 'gpu' is not one that torch knows"):
        load_model(ModelConfig(str(tiny_llava), device="gpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="device 'cuda' was asked for and torch sees no GPU"):
            load_model(ModelConfig(str(tiny_llava), device="cuda"))


def test_the_template_begins_with_what_the_tokenizer_begins_with(tiny_llava: Path) -> None:
    """LLaVA-1.5's template has no <s>, its tokenizer adds one; TRL tokenises rendered text without it."""
    stored = transformers.AutoProcessor.from_pretrained(tiny_llava)
    ours = load_processor(ModelConfig(str(tiny_llava)))
    question = [{"role": "user", "content": [{"type": "text", "text": "Yes?"}]}]
    plain = stored.apply_chat_template(question, add_generation_prompt=True)
    assert plain == "USER: Yes? ASSISTANT:"
    assert families.render(ours, question) == "<bos>" + plain
    assert (
        ours.tokenizer(families.render(ours, question), add_special_tokens=False).input_ids
        == stored.tokenizer(plain).input_ids
    )


def test_options_of_the_processor_reach_the_pictures_and_what_is_saved(tiny_llava: Path, tmp_path: Path) -> None:
    shown = picture(0)
    plain, small = (
        load_processor(ModelConfig(str(tiny_llava), processor=options))
        for options in (None, {"size": {"height": 42, "width": 42}, "crop_size": {"height": 42, "width": 42}})
    )
    assert plain.image_processor(shown)["pixel_values"][0].shape != (3, 42, 42)
    assert small.image_processor(shown)["pixel_values"][0].shape == (3, 42, 42)
    small.save_pretrained(_copy(tiny_llava, tmp_path / "saved"))
    assert load_processor(ModelConfig(str(tmp_path / "saved"))).image_processor.size == small.image_processor.size
    with pytest.raises(
        ModelError, match=r"processor.max_pixel: a CLIPImageProcessor\w* has no such option.*It has .*size"
    ):
        load_processor(ModelConfig(str(tiny_llava), processor={"max_pixel": 100}))


def test_an_engine_with_options_of_the_processor_sees_other_pictures_and_is_another_one(tiny_llava: Path) -> None:
    request = Request("row", [user_message("What?", 1)], [picture(0)])
    engines = [
        load_engine(ModelConfig(str(tiny_llava), device="cpu", processor=options))
        for options in (None, {"image_mean": [0.0, 0.0, 0.0]}, {"image_mean": [0.1, 0.1, 0.1]})
    ]
    assert len({engine.fingerprint for engine in engines}) == 3
    values = [engine.logprobs([request], ["A cat."])[0].sum().item() for engine in engines]
    assert len(set(values)) == 3

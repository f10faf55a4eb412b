"""Adapters, text models and questions for the merging tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from prefalign.families import render
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.records import user_message
from tests.tiny_vlms import picture

LANGUAGE = r".*(language_model|text_model).*\.(q_proj|v_proj|up_proj)"
VISION_TOO = r".*\.(q_proj|v_proj)"


def save_adapter(base: Path, folder: Path, *, seed: int = 1, targets: str = LANGUAGE, r: int = 4, **more: Any) -> Path:
    """A random adapter that moves every layer it sits on."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, init_lora_weights=False, **more)
    get_peft_model(load_model(ModelConfig(str(base), device="cpu")), lora).save_pretrained(folder)
    return folder


def save_text_llm(vlm: Path, folder: Path, *, noise: float, seed: int = 5, config: Any = None) -> Path:
    """The language model of a VLM as a text model of its own, every weight moved by noise."""
    model = load_model(ModelConfig(str(vlm), device="cpu"))
    config = config or model.config.get_text_config()
    config.tie_word_embeddings = model.lm_head.weight is model.get_input_embeddings().weight
    text = transformers.AutoModelForCausalLM.from_config(config)
    inner = getattr(model.model, "language_model", None)
    text.model.load_state_dict((inner if inner is not None else model.model.text_model).state_dict())
    if not text.config.tie_word_embeddings:
        text.lm_head.load_state_dict(model.lm_head.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in text.parameters():
            weight.add_(noise * torch.randn_like(weight))
    text.save_pretrained(folder)
    load_processor(ModelConfig(str(vlm))).tokenizer.save_pretrained(folder)
    return folder


def perturbed(vlm: Path, folder: Path, *, noise: float, seed: int) -> Path:
    """A VLM of the same line, as another run would leave it."""
    config = ModelConfig(str(vlm), device="cpu")
    model = load_model(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "vision" not in name and "visual" not in name:
                weight.add_(noise * torch.randn_like(weight))
    model.save_pretrained(folder)
    load_processor(config).save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def question(folder: Path, seed: int = 0) -> Any:
    """A question about a picture of noise, prepared by the folder's own processor."""
    processor = load_processor(ModelConfig(str(folder)))
    text = render(processor, [user_message("what is in the picture ?", 1)])
    return processor(text=[text], images=[[picture(seed)]], add_special_tokens=False, return_tensors="pt")


def logits(model: Any, batch: Any) -> torch.Tensor:
    """(1, T, V)."""
    with torch.no_grad():
        return model(**batch).logits


def answer(model: Any, batch: Any) -> list[int]:
    """Twelve greedy tokens."""
    with torch.no_grad():
        return model.generate(**batch, max_new_tokens=12, do_sample=False)[0].tolist()

"""What a model's own forward pass leaves untrained: in a vision tower what follows the layer whose states are read."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from prefalign import families
from prefalign.engines import Request
from prefalign.engines.transformers import TransformersEngine
from prefalign.records import user_message

SIZE = (224, 224)
"""Of the picture: large enough for every processor, one tile for those that cut."""


def unused_by_plain_pass(model: torch.nn.Module, processor: ProcessorMixin, names: Collection[str]) -> set[str]:
    """Which trainable tensors get no gradient from a forward pass as the model's authors wrote it, on a question and a picture.

    The model is left as it was, gradients included.

    Args:
        model: the model, with or without an adapter, or what holds such models (a policy and its value).
        processor: its processor.
        names: tensors to look at, by their names in `model`.

    Returns:
        Names out of `names`. Of an adapter that is not active the pass does not tell, nor where memory does not suffice for it:
        such names are left out.
    """
    silent = _inactive(model)
    wanted = {
        name: weight
        for name, weight in model.named_parameters()
        if name in names and weight.requires_grad and id(weight) not in silent
    }
    found: set[str] = set()
    for core in _generators(model):
        own = {id(weight) for weight in core.parameters()}
        inside = {name: weight for name, weight in wanted.items() if id(weight) in own}
        engine = TransformersEngine(core, processor, batch_size=1)
        batch = engine.encode([Request("plain", [user_message("What is it?", 1)], [Image.new("RGB", SIZE)])])
        if not inside or not batch.rows:
            continue
        with suppress(torch.OutOfMemoryError), engine.inference() as plain, torch.enable_grad():
            logits = plain(**batch.tensors, use_cache=False).logits
            gradients = torch.autograd.grad(logits.float().sum(), list(inside.values()), allow_unused=True)
            found |= {name for name, gradient in zip(inside, gradients, strict=True) if gradient is None}
    return found


def _generators(model: torch.nn.Module) -> list[Any]:
    """The language models with a head in a module, each once."""
    core = families.core(model)
    if isinstance(core, PreTrainedModel):
        return [core] if core.can_generate() else []
    return [one for child in core.children() for one in _generators(child)]


def _inactive(model: torch.nn.Module) -> set[int]:
    """Ids of the weights of adapters that a forward pass does not go through."""
    return {
        id(weight)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, weight in layer.named_parameters()
        if not name.startswith("base_layer.") and not set(name.split(".")) & set(layer.active_adapters)
    }

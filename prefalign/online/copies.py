"""How value and reference of a PPO run come from its policy: copies of an adapter, or of the parts of a model that train."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from prefalign import families
from prefalign.config import ConfigError


def is_of(name: str, adapter: str) -> bool:
    """Whether a parameter is a LoRA weight of an adapter."""
    return f".{adapter}." in name and ".lora_" in name


def copy_adapter(model: Any, source: str, target: str) -> None:
    """Give an adapter of a `PeftModel` the weights of another one of the same shape."""
    state = {
        name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model, adapter_name=source).items()
    }
    set_peft_model_state_dict(model, state, adapter_name=target)


def moved(model: Any, adapter: str) -> bool:
    """Whether an adapter changes anything: its second factor starts at 0."""
    return any(is_of(name, adapter) and ".lora_B." in name and bool(p.any()) for name, p in model.named_parameters())


def copy_of_what_trains(model: Any) -> Any:
    """A copy that shares with the original what holds nothing trainable."""
    return copy.deepcopy(model, {id(part): part for _, part in _still_parts(model)})


def like(value: Any, policy: Any) -> Any:
    """A value model of the policy's architecture, which gets the policy's own parts where they do not train.

    Raises:
        ConfigError: it is of another architecture.
    """
    shapes = [{name: parameter.shape for name, parameter in model.named_parameters()} for model in (value, policy)]
    if shapes[0] != shapes[1]:
        strange = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ConfigError(
            f"the value model and the policy are not of one architecture (they differ in {', '.join(strange[:2])}), and both run "
            "on the same prompts. Leave `value_model` out to start the values from the policy."
        )
    for name, part in _still_parts(policy):
        setattr(families.core(value).model, name, part)
    return value


def _still_parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Parts right under the backbone that have weights, of which none trains."""
    for name, part in families.core(model).model.named_children():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            yield name, part


def disable_dropout(model: nn.Module) -> None:
    """No dropout anywhere, that of adapters and attention included: with it the first ratio would not be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)

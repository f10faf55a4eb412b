"""The policy that training starts from, for every recipe that trains."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from prefalign.config import ConfigError
from prefalign.models import ModelConfig, load_model
from prefalign.training.lora import LoraSettings

if TYPE_CHECKING:
    from peft import PeftModel


def load_policy(config: ModelConfig, lora: LoraSettings | None, *, device: str, continues: bool = False) -> Any:
    """The model that training starts from.

    Where all weights train, an adapter (`config` names one, or is one) is merged first, and `dtype: auto` is float32 (as in
    TRL): steps of 1e-6 are lost in a checkpoint's 16 bits.

    Args:
        config: which model.
        lora: settings of the adapter that is trained; None: all weights train.
        device: device of this process, for `config.device: auto`.
        continues: train the model's own adapter on where `lora` describes it. Preference training cannot: its reference is
            the policy without the adapter, which would be the model before that adapter.

    Returns:
        A transformers model, or a `PeftModel` whose adapter trains.

    Raises:
        ConfigError: the model is an adapter and training cannot go on with it, or it cannot be merged.
    """
    on_device = device if config.device == "auto" else config.device
    dtype = "float32" if lora is None and config.dtype == "auto" else config.dtype
    model = load_model(replace(config, device=on_device, dtype=dtype))
    if not is_peft_model(model):
        return model
    merge = f"`prefalign run merge_adapter --adapter {config.adapter or config.model_name_or_path} --output FOLDER`"
    if lora is not None and continues:
        _check_adapter(model, lora)
        model.set_adapter(model.active_adapter)
        return model
    if lora is not None:
        raise ConfigError(
            "lora: the model is an adapter already, and a second one would be saved without the first. Merge it first "
            f"({merge}), or leave `lora` out to train all weights of the merged model."
        )
    if in_parts(model):
        raise ConfigError(
            "model: an adapter cannot be merged into weights that are shared out (DeepSpeed ZeRO-3). Merge and save the model "
            f"first ({merge}), or train it with ZeRO-2 or in one process."
        )
    return model.merge_and_unload().requires_grad_(True)  # PEFT froze it


def in_parts(model: nn.Module) -> bool:
    """Whether each process holds a part of every weight (DeepSpeed ZeRO-3), so that the model cannot be copied or merged."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _check_adapter(model: PeftModel, lora: LoraSettings) -> None:
    """Check that an adapter is the one that a config describes, so that the config of a run tells the truth."""
    adapter = model.peft_config[model.active_adapter]
    if adapter.peft_type != "LORA":
        raise ConfigError(
            f"lora: the model brings a {adapter.peft_type.value} adapter, which is not LoRA. Leave `lora` out to merge it and "
            "train all weights, or name the model without it."
        )
    pairs = (
        ("r", adapter.r, lora.r),
        ("alpha", adapter.lora_alpha, lora.alpha),
        ("dropout", adapter.lora_dropout, lora.dropout),
    )
    wrong = [f"lora.{name} is {asked} and the adapter's {has}" for name, has, asked in pairs if has != asked]
    base = model.get_base_model()
    has = {name.removesuffix(".base_layer") for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    linear = {name for name, module in base.named_modules() if isinstance(module, (nn.Linear, LoraLayer))}
    asked = {name for name in linear if re.fullmatch(lora.target_modules, name)}
    if has != asked:
        some = ", ".join(sorted(has ^ asked)[:2])
        wrong.append(
            f"lora.target_modules matches {len(asked)} modules and the adapter is on {len(has)} (they differ in {some})"
        )
    if wrong:
        raise ConfigError(
            f"lora: the model is an adapter already, which training goes on with, and {'; '.join(wrong)}. Write the adapter's "
            "settings, or merge and save the model first to put a new adapter on it."
        )

"""How a run's own config shares out the model, for those who set it up in one process without doing so: doctor and plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefalign import bundled
from prefalign.config import ConfigError
from prefalign.training.lora import check_four_bits
from prefalign.training.memory import CASTING, Profile

SHARING = ("deepspeed", "fsdp", "fsdp_config")
"""Fields of `trainer` that spread a run over processes."""
SHARED_OUT = ("zero3", "fsdp2")
"""Profiles in which a device holds a part of the weights; the trainer does not do that with weights of 4 bits."""


def asked_profile(trainer: Mapping[str, Any]) -> Profile | None:
    """The profile that a config's `trainer:` mapping asks for; None: it names none.

    Raises:
        ConfigError: two at once, a DeepSpeed file that cannot be read, or a stage of ZeRO that is neither 2 nor 3.
    """
    deepspeed, fsdp = trainer.get("deepspeed"), trainer.get("fsdp")
    if deepspeed and fsdp:
        raise ConfigError("trainer.deepspeed and trainer.fsdp both share out the weights; leave one out.")
    if fsdp:
        return "fsdp2"
    if not deepspeed:
        return None
    settings = deepspeed
    if not isinstance(deepspeed, Mapping):
        file = Path(bundled.find(str(deepspeed)))
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"trainer.deepspeed: {file} is no JSON that can be read ({error}).") from error
    stage = (settings.get("zero_optimization") or {}).get("stage", 0)
    if stage not in (2, 3):
        raise ConfigError(
            f"trainer.deepspeed asks for stage {stage} of ZeRO, and only 2 and 3 are known here. Take one of configs/deepspeed/, "
            "or DDP without it."
        )
    return "zero2" if stage == 2 else "zero3"


def check_sharing(config: Any) -> Profile | None:
    """What a run's config asks for, checked against its other settings as the run does, which shares out the weights.

    Args:
        config: of `recipes/train_preference.py`.

    Raises:
        ConfigError: see `asked_profile`; or weights of 4 bits, or batches in parts, that cannot be shared out so.
    """
    profile = asked_profile(config.trainer)
    check_four_bits(config.model, config.lora, shared_out=profile in SHARED_OUT)
    if profile in CASTING and config.tokens_per_pass is not None:
        raise ConfigError(
            f"tokens_per_pass: DeepSpeed and FSDP count one backward pass per batch, and parts would be several (the config asks "
            f"for {profile}). Leave it out and lower trainer.per_device_train_batch_size."
        )
    return profile

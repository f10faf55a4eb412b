"""LoRA that stays in the language model, for every family."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefalign.config import ConfigError, nearest

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn
    from transformers import TrainingArguments

    from prefalign.models import ModelConfig

LANGUAGE_LINEAR = (
    r"(?!.*(vision|visual|projector|connector|merger|aligner))"
    r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)


@dataclass
class LoraSettings:
    """Low-rank adapter.

    Attributes:
        r: rank; higher learns more and takes more memory.
        alpha: scale; updates are multiplied by alpha / r.
        dropout: on the adapter's input while training; no effect in preference training unless `trainer.disable_dropout:
            false`, since TRL turns all dropout off there by default, so that policy and reference agree at the start.
        target_modules: regular expression over full module names; the default is every linear layer of the language
            model's blocks in all families, never the vision tower or the projector.
    """

    r: int = 64
    alpha: int = 128
    dropout: float = 0.05
    target_modules: str = LANGUAGE_LINEAR

    def to_peft(self) -> LoraConfig:
        """The same in PEFT's terms."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )


def check_quantised(model: ModelConfig, lora: LoraSettings | None, arguments: TrainingArguments) -> None:
    """Check that a model that is to be loaded in 4 bits can be trained as a run asks for.

    Raises:
        ConfigError: all weights would train, or be shared out.
    """
    from prefalign.training.arguments import shares_weights

    check_four_bits(model, lora, shared_out=shares_weights(arguments))


def check_four_bits(model: ModelConfig, lora: LoraSettings | None, *, shared_out: bool) -> None:
    """The same where it is known whether weights are shared out over processes.

    Raises:
        ConfigError: see `check_quantised`.
    """
    if not model.load_in_4bit:
        return
    if lora is None:
        raise ConfigError(
            "model.load_in_4bit: weights of 4 bits cannot be trained, and without `lora` all weights would be. Set `lora` to "
            "train an adapter on them (QLoRA), or load_in_4bit to false."
        )
    if shared_out:
        raise ConfigError(
            "model.load_in_4bit: DeepSpeed ZeRO-3 and FSDP share out the weights, and those of 4 bits stay whole in every "
            "process here. Use DDP or ZeRO-2, or set load_in_4bit to false."
        )


def check_targets(model: nn.Module, lora: LoraSettings) -> None:
    """Check that an adapter has modules to sit on.

    Args:
        model: without the adapter.
        lora: its settings.

    Raises:
        ConfigError: `target_modules` matches none.
    """
    if lora.target_modules.lower() == "all-linear":  # PEFT's word for every linear layer but the head
        return
    try:
        wanted = re.compile(lora.target_modules)
    except re.error as error:
        raise ConfigError(
            f"lora.target_modules {lora.target_modules!r} is not a regular expression: {error}."
        ) from error
    names = [name for name, _ in model.named_modules()]
    if not any(wanted.fullmatch(name) for name in names):
        linear = [name for name in names if re.fullmatch(LANGUAGE_LINEAR, name)] or names
        raise ConfigError(
            f"lora.target_modules {lora.target_modules!r} matches no module of the model. It is a regular expression over full "
            f"module names, such as {linear[0]} and {linear[-1]}: `.*\\.q_proj` matches every q_proj."
        )


def check_trainable(model: nn.Module, frozen: Sequence[str]) -> None:
    """Check that something trains, and nothing in a frozen tower.

    Raises:
        ConfigError: no such tower; an adapter sits in a tower that is meant to stay as it is, or everything is frozen.
    """
    from prefalign.families import TOWERS, tower

    for name in frozen:
        if name not in TOWERS:
            raise ConfigError(f"freeze: there is no tower called {name!r}; {nearest(name, TOWERS)}")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError(f"freeze: {', '.join(frozen)} leaves nothing to train. Take one off the list.")
    for name in trainable:
        if tower(name) in frozen:
            raise ConfigError(
                f"lora.target_modules reaches {name}, and `freeze` names the {tower(name)} tower. Narrow the expression, "
                f"or take {tower(name)!r} off `freeze`."
            )

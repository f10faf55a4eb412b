"""`SupervisedTrainer`: TRL's `SFTTrainer` on answers to pictures, and the policy that it starts from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from trl import SFTConfig, SFTTrainer

from prefalign.config import ConfigError
from prefalign.models import ModelConfig, load_model
from prefalign.training.examples import COLUMNS, AnswerCollator
from prefalign.training.lora import LoraSettings
from prefalign.training.upkeep import Upkeep

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, ProcessorMixin


class SupervisedTrainer(Upkeep, SFTTrainer):
    """Train a vision-language model to imitate answers: TRL's loss (`nll` or `dft`) on the answers' tokens only.

    Args:
        model: policy; a full model or a `PeftModel`, which is trained on. May be built in memory.
        args: TRL's arguments.
        train_dataset: rows as `examples.load_examples` gives them.
        processing_class: the model's processor, saved with every checkpoint.
        eval_dataset: held-out rows.
        peft_config: wrap `model` in a new adapter.
        files: text files by name, written beside every saved model.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        args: SFTConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin,
        eval_dataset: Dataset | None = None,
        peft_config: PeftConfig | None = None,
        files: Mapping[str, str] | None = None,
    ):
        super().__init__(
            model=model,
            args=args,
            data_collator=AnswerCollator(processing_class, args.max_length),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            files=files,
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)


def load_policy(config: ModelConfig, lora: LoraSettings | None, *, device: str) -> Any:
    """The model that training starts from.

    An adapter (`config` names one, or is one) is trained on if `lora` asks for one, and merged if all weights train. For full
    training `dtype: auto` is float32 (as in TRL): steps of 1e-6 are lost in a checkpoint's 16 bits.

    Args:
        config: which model.
        lora: settings of the adapter that is trained; None: all weights train.
        device: device of this process, for `config.device: auto`.

    Returns:
        A transformers model, or a `PeftModel` whose adapter trains.

    Raises:
        ConfigError: the adapter is not what `lora` says.
    """
    on_device = device if config.device == "auto" else config.device
    dtype = "float32" if lora is None and config.dtype == "auto" else config.dtype
    model = load_model(replace(config, device=on_device, dtype=dtype))
    if not is_peft_model(model):
        return model
    if lora is None:
        return model.merge_and_unload().requires_grad_(True)  # PEFT froze it
    _check_adapter(model, lora)
    model.set_adapter(model.active_adapter)
    return model


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

"""`SupervisedTrainer`: TRL's `SFTTrainer` on answers to pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trl import SFTConfig, SFTTrainer

from prefalign.training.examples import COLUMNS, AnswerCollator
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

"""Teach a vision-language model answers by imitation: supervised fine-tuning with TRL's `SFTTrainer`, LoRA or full weights.

For warm starts before preference training, for STIC's second stage (arXiv 2405.19716: answers after the model's own description
of the picture), and for the control that a preference method has to beat (the chosen answers of its pairs).

Needs: a folder of examples (`stic` with `produce: sft`), of pairs, or of prompts with reference answers; and a model. Started
again with the same config it goes on from its last checkpoint and ends with the weights of an uninterrupted run. Several
processes: `torchrun --nproc_per_node N`, or `accelerate launch` with a profile of configs/accelerate/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefalign.models import ModelConfig
from prefalign.training.lora import LoraSettings


@dataclass
class Config:
    """One training run.

    Attributes:
        model: starting weights; an adapter is trained on where `lora` describes it, and merged without `lora`.
        data: folder of examples, pairs or prompts to imitate.
        output: folder of the run: checkpoints, final model or adapter with its processor, logs, resolved config.
        eval_data: folder of held-out rows; measured at the end, and during the run with `trainer.eval_strategy`.
        answer: what is imitated: of pairs `chosen` (the default) or the reference `answer`, of prompts `answer`; examples
            have one answer, their last turn.
        trainer: fields of TRL's `SFTConfig` by name.
        lora: train an adapter; without it all weights that are not frozen.
        freeze: towers that stay as they are: `vision`, `projector`, `language_model`.
        resume: "auto" goes on from the last checkpoint if there is one; true demands one; false refuses one.
        seed: order of the rows and start of the adapter.
    """

    model: ModelConfig
    data: Path
    output: Path
    eval_data: Path | None = None
    answer: Literal["chosen", "answer"] | None = None
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": "trl.SFTConfig"})
    lora: LoraSettings | None = None
    freeze: list[str] = field(default_factory=lambda: ["vision"])
    resume: Literal["auto"] | bool = "auto"
    seed: int = 0


def main(config: Config) -> None:
    """Train, or go on training, and save everything that an evaluation and a model card need."""
    from accelerate.utils import is_peft_model
    from trl import SFTConfig

    from prefalign.training.arguments import shares_weights, training_arguments
    from prefalign.training.distributed import running_processes
    from prefalign.training.examples import AnswerCollator, check_pictures, keep_usable, load_examples
    from prefalign.training.frame import begin_run, claim_folder, prepare_training, train_run
    from prefalign.training.lora import check_quantised, check_targets, check_trainable
    from prefalign.training.runs import files_of
    from prefalign.training.sft import SupervisedTrainer

    prepare_training(config.trainer)
    arguments = training_arguments(config.trainer, output=config.output, seed=config.seed, kind=SFTConfig)
    check_quantised(config.model, config.lora, arguments)
    folders = [config.data, *([config.eval_data] if config.eval_data else [])]
    datasets = [load_examples(folder, config.answer) for folder in folders]
    check_pictures(datasets, folders, processes=arguments.world_size, in_parts=shares_weights(arguments))
    start = begin_run(config, arguments, files_of(config, *folders, data="data"), continues=True)
    if start is None:
        return
    goes_on = is_peft_model(start.model)
    if config.lora and not goes_on:
        check_targets(start.model, config.lora)
    collator = AnswerCollator(start.processor, arguments.max_length)
    rows, kept = keep_usable(datasets[0], collator)
    eval_rows, held_out = keep_usable(datasets[1], collator) if config.eval_data else (None, None)
    trainer = SupervisedTrainer(
        start.model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=start.processor,
        peft_config=config.lora.to_peft() if config.lora and not goes_on else None,
        files=start.files,
    )
    running = running_processes(trainer.accelerator, config.trainer)
    check_trainable(trainer.model, config.freeze)
    lines = [f"{kept.rows_used} rows, {kept.summary() or 'all used'}; {running}"]
    if held_out and held_out.summary():
        lines.append(f"{held_out.rows_used} held-out rows, {held_out.summary()}")
    if goes_on:
        lines.append(f"training goes on with the adapter of {config.model.adapter or config.model.model_name_or_path}")
    claim_folder(config, trainer, start, running, lines)
    train_run(config, trainer, start, kept, held_out.counts() if held_out else None)


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

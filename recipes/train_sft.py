"""Teach a vision-language model answers by imitation: supervised fine-tuning with TRL's `SFTTrainer`, LoRA or full weights.

For warm starts before preference training, for STIC's second stage (arXiv 2405.19716: answers after the model's own description
of the picture), and for the control that a preference method has to beat (the chosen answers of its pairs).

Needs: a folder of examples (`stic` with `produce: sft`), of pairs, or of prompts with reference answers; and a model. Started
again with the same config it goes on from its last checkpoint and ends with the weights of an uninterrupted run. Several
processes: `torchrun --nproc_per_node N`, or `accelerate launch` with a profile of configs/accelerate/.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
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
    trainer: dict[str, Any] = field(default_factory=dict)
    lora: LoraSettings | None = None
    freeze: list[str] = field(default_factory=lambda: ["vision"])
    resume: Literal["auto"] | bool = "auto"
    seed: int = 0


def main(config: Config) -> None:
    """Train, or go on training, and save everything that an evaluation and a model card need."""
    from accelerate.utils import is_peft_model
    from trl import SFTConfig

    from prefalign.config import to_mapping
    from prefalign.models import fingerprint, freeze, load_processor, parameter_table
    from prefalign.training.arguments import check_precision, training_arguments
    from prefalign.training.distributed import claim_processes, prepare_processes, running_processes
    from prefalign.training.examples import AnswerCollator, check_pictures, keep_usable, load_examples
    from prefalign.training.lora import check_quantised, check_targets, check_trainable
    from prefalign.training.policy import load_policy
    from prefalign.training.runs import base_file, claim_run, full_disk_explained, is_finished, open_run, run_files
    from prefalign.training.sft import SupervisedTrainer
    from prefalign.training.upkeep import plain_lines_without_a_terminal, train_and_save

    plain_lines_without_a_terminal()
    prepare_processes(config.trainer)
    arguments = training_arguments(config.trainer, output=config.output, seed=config.seed, kind=SFTConfig)
    check_quantised(config.model, config.lora, arguments)
    folders = [config.data, *([config.eval_data] if config.eval_data else [])]
    datasets = [load_examples(folder, config.answer) for folder in folders]
    shares = arguments.fsdp_plugin_args or getattr(arguments.deepspeed_plugin, "zero_stage", 0) == 3
    check_pictures(datasets, folders, processes=arguments.world_size, in_parts=bool(shares))
    manifests = [(folder / "manifest.json").read_text(encoding="utf-8") for folder in folders]
    files = run_files(to_mapping(config), *manifests, data="data")
    main_process, processes = arguments.process_index == 0, arguments.world_size
    open_run(config.output, files, resume=config.resume, processes=processes)

    processor = load_processor(config.model)
    collator = AnswerCollator(processor, arguments.max_length)
    model = load_policy(config.model, config.lora, device=str(arguments.device), continues=True)
    check_precision(model.dtype, arguments)
    goes_on = is_peft_model(model)
    changed = goes_on or bool(getattr(model, "is_quantized", False))
    files |= base_file(config.model.model_name_or_path, fingerprint(model), changed=changed)
    checkpoint = open_run(config.output, files, resume=config.resume, processes=processes)
    if is_finished(config.output):
        if main_process:
            print(f"{config.output} is finished; nothing to do.")
        return
    if config.lora is None:
        freeze(model, config.freeze)
    elif not goes_on:
        check_targets(model, config.lora)
    used = [keep_usable(dataset, collator) for dataset in datasets]
    rows, kept = used[0]
    trainer = SupervisedTrainer(
        model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=used[1][0] if config.eval_data else None,
        processing_class=processor,
        peft_config=config.lora.to_peft() if config.lora and not goes_on else None,
        files=files,
    )
    running = running_processes(trainer.accelerator, config.trainer)
    check_trainable(trainer.model, config.freeze)
    if main_process:
        for row in parameter_table(trainer.model):
            print(f"{row['tower']:<15}{row['parameters']:>16,} parameters{row['trainable']:>16,} trainable")
        print(f"{kept.rows_used} rows, {kept.summary() or 'all used'}; {running}")
        if config.eval_data and used[1][1].summary():
            print(f"{used[1][1].rows_used} held-out rows, {used[1][1].summary()}")
        if goes_on:
            print(f"training goes on with the adapter of {config.model.adapter or config.model.model_name_or_path}")
        if checkpoint:
            print(f"going on from {checkpoint.name}")
    with full_disk_explained(config.output):
        if main_process:
            claim_run(config.output, files)
        claim_processes(config.output, running, main_process=main_process)
    eval_counts = {f"eval_{name}": count for name, count in used[1][1].counts().items()} if config.eval_data else None
    train_and_save(trainer, config.output, checkpoint=checkpoint, rows=asdict(kept), counts=kept.counts(),
                   eval_counts=eval_counts)  # fmt: skip
    if main_process:
        print(f"saved {config.output}")


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

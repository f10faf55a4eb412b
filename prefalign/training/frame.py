"""What every run that trains does around its own steps: open its folder, load what it starts from, claim, train and save.

`config` is always the config of a stage that trains; `model`, `lora`, `freeze`, `output`, `resume` and `trainer` are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from prefalign.models import fingerprint, freeze, load_processor, parameter_table
from prefalign.processors import processor_fingerprint
from prefalign.training.arguments import check_precision
from prefalign.training.distributed import Processes, claim_processes, prepare_processes
from prefalign.training.policy import load_policy
from prefalign.training.runs import base_file, claim_run, full_disk_explained, is_finished, open_run
from prefalign.training.upkeep import Upkeep, plain_lines_without_a_terminal, train_and_save


@dataclass
class Start:
    """What a run starts from.

    Attributes:
        model: before training, an adapter that training goes on with included; where all weights train, its towers are frozen.
        processor: its processor.
        fingerprint: of its weights.
        files: those of the run (`runs.run_files`) and `runs.base_file`.
        checkpoint: where the run goes on; None: at the beginning.
    """

    model: Any
    processor: Any
    fingerprint: str
    files: dict[str, str]
    checkpoint: Path | None = None


def prepare_training(trainer: Mapping[str, Any]) -> None:
    """Do what comes before the training arguments are made.

    Args:
        trainer: the `trainer:` mapping of the config.

    Raises:
        ConfigError: as `distributed.prepare_processes`.
    """
    plain_lines_without_a_terminal()
    prepare_processes(trainer)


def load_start(config: Any, arguments: Any, files: Mapping[str, str], *, continues: bool = False) -> Start:
    """Weights and processor.

    Args:
        config: of the run.
        arguments: of its trainer.
        files: `runs.run_files` of the run.
        continues: train the model's own adapter on (`policy.load_policy`).

    Raises:
        ModelError: there is no such model or tower, or it cannot be loaded.
        ConfigError: its weights cannot be trained as the settings say.
    """
    processor = load_processor(config.model)
    model = load_policy(config.model, config.lora, device=str(arguments.device), continues=continues)
    check_precision(model.dtype, arguments)
    base = fingerprint(model)
    changed = is_peft_model(model) or bool(getattr(model, "is_quantized", False))
    if config.lora is None:
        freeze(model, config.freeze)
    note = base_file(config.model.model_name_or_path, base, processor_fingerprint(processor), changed=changed)
    return Start(model, processor, base, {**files, **note})


def begin_run(config: Any, arguments: Any, files: Mapping[str, str], *, continues: bool = False) -> Start | None:
    """Check that the folder is the run's to use, before a model is loaded and once more with its weights; nothing is written.

    Args:
        config: of the run.
        arguments: of its trainer.
        files: `runs.run_files` of the run.
        continues: train the model's own adapter on (`policy.load_policy`).

    Returns:
        What the run starts from; None: it is finished, which is said.

    Raises:
        RunError: as `runs.open_run`.
        ModelError: as `load_start`.
        ConfigError: as `load_start`.
    """
    processes = arguments.world_size
    open_run(config.output, files, resume=config.resume, processes=processes)
    start = load_start(config, arguments, files, continues=continues)
    start.checkpoint = open_run(config.output, start.files, resume=config.resume, processes=processes)
    if not is_finished(config.output):
        return start
    if arguments.process_index == 0:
        print(f"{config.output} is finished; nothing to do.")
    return None


def claim_folder(config: Any, trainer: Upkeep, start: Start, running: Processes, lines: Sequence[str]) -> None:
    """Say what is about to train, and make the folder the run's own.

    Args:
        config: of the run.
        trainer: its trainer.
        start: from `begin_run`.
        running: from `distributed.running_processes`.
        lines: what the run says of its rows.

    Raises:
        RunError: the folder holds checkpoints of a run on other processes, or its disk is full.
    """
    main_process = trainer.is_world_process_zero()
    if main_process:
        for row in parameter_table(trainer.model):
            print(f"{row['tower']:<15}{row['parameters']:>16,} parameters{row['trainable']:>16,} trainable")
        for line in lines:
            print(line)
        if start.checkpoint:
            print(f"going on from {start.checkpoint.name}")
    with full_disk_explained(config.output):
        if main_process:
            claim_run(config.output, start.files)
        claim_processes(config.output, running, main_process=main_process)


def train_run(
    config: Any, trainer: Upkeep, start: Start, fit: Any, eval_counts: Mapping[str, int] | None = None
) -> None:
    """Train from the checkpoint or from the start, and save everything that an evaluation and a model card need.

    Args:
        config: of the run.
        trainer: its trainer.
        start: from `begin_run`.
        fit: which rows are trained on: a dataclass with `counts`.
        eval_counts: numbers of held-out rows; None: there are none.

    Raises:
        RunError: the disk that holds the run is full.
    """
    held_out = None if eval_counts is None else {f"eval_{name}": count for name, count in eval_counts.items()}
    train_and_save(trainer, config.output, checkpoint=start.checkpoint, rows=asdict(fit), counts=fit.counts(),
                   eval_counts=held_out)  # fmt: skip
    if trainer.is_world_process_zero():
        print(f"saved {config.output}")

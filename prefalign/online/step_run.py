"""A run of online DPO step by step put together as its config says, for the recipe and `prefalign doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign.config import ConfigError, to_mapping
from prefalign.losses import VIEWS, read_losses, views_of
from prefalign.manifest import write_atomically
from prefalign.models import check_towers
from prefalign.online.annotating import Annotator, read_annotator
from prefalign.online.prompts import gather_prompts
from prefalign.online.round_checks import check_held_out
from prefalign.online.settings import FREE
from prefalign.online.step import ROW_COLUMNS, OnlineStepTrainer, OnTheFly
from prefalign.records import Pair, Prompt
from prefalign.store import OutputConfig, read_records, write_records
from prefalign.text import load_similarity
from prefalign.training.arguments import training_arguments
from prefalign.training.checks import check_settings
from prefalign.training.distributed import claim_processes, running_processes
from prefalign.training.frame import load_start
from prefalign.training.lora import check_quantised, check_trainable
from prefalign.training.pairs import load_columns, pairs_manifest
from prefalign.training.runs import CONFIG_FILE, claim_run, files_of, is_finished, open_run, run_files
from prefalign.training.upkeep import train_and_save

if TYPE_CHECKING:
    from prefalign.losses import Weighted
    from prefalign.online.settings import OnlineConfig


def step_rows(prompts: Path, offline: Path | None) -> Iterator[Pair]:
    """Rows of a run step by step: each prompt once, with the first offline pair that belongs to it, or with no answers."""
    known = {prompt.id for prompt in read_records(prompts, Prompt)}
    seen: set[str] = set()
    for pair in read_records(offline, Pair) if offline is not None else ():
        parents = [name for name in (pair.meta.get("parent"), pair.id) if name in known and name not in seen]
        if parents and pair.on_two_pictures:
            raise ConfigError(
                f"pair {pair.id} of {offline} rejects an answer about `rejected_images`, which online_dpo_step does not read: on "
                "`images` it may be right. Train on these pairs with train_preference and losses [{name: two_pictures}]."
            )
        if parents:
            seen.add(parents[0])
            yield replace(pair, id=parents[0], rejected_images=[])
    for prompt in read_records(prompts, Prompt):
        if prompt.id not in seen:
            yield Pair(prompt.id, prompt.images, prompt.messages, [], [], "online_step", answer=prompt.answer,
                       facts=prompt.facts)  # fmt: skip


def read_settings(config: OnlineConfig) -> tuple[Any, list[Weighted], Annotator | None]:
    """TRL's arguments, losses and annotator of a run, before anything is loaded or written.

    Raises:
        ConfigError: several processes, losses on a picture that no row has, or a setting that one of the three refuses.
        ModelError: there is no tower of a name in `freeze`.
    """
    arguments: Any = training_arguments(config.trl, output=config.output, seed=config.seed)
    if arguments.world_size > 1:
        raise ConfigError(
            f"trainer.algorithm is 'online_dpo_step' and {arguments.world_size} processes run: one whose rows give no pair would "
            "wait for the others for ever. Start one process, or take rounds (online_dpo)."
        )
    check_held_out(arguments)
    check_quantised(config.model, config.lora, arguments)
    losses = read_losses(config.losses, beta=arguments.beta)
    check_settings(losses, arguments, reference="online", tokens_per_pass=None, brings_reference=False,
                   adapts=config.lora is not None)  # fmt: skip
    check_towers(config.freeze)
    pictured = [view for view in views_of(losses) if VIEWS[view].images == "rejected_images"]
    if pictured:
        raise ConfigError(
            f"losses: the views {', '.join(pictured)} look at `rejected_images`, and a row of online_dpo_step has none: answers "
            "are drawn to a prompt's own pictures, and those of offline pairs are not read. Take losses on the texts, such as "
            "[{name: text}], or train on the offline pairs with train_preference."
        )
    hiding = config.bdhs is not None
    return arguments, losses, None if hiding else read_annotator(config.annotator, config.rewards, config.margin)


def make_trainer(
    config: OnlineConfig, files: dict[str, str], read: tuple[Any, list[Weighted], Annotator | None]
) -> OnlineStepTrainer:
    """The trainer of a run, on the rows in its folder.

    Args:
        config: the run.
        files: text files by name, written beside every saved model; the base is added to them.
        read: what `read_settings` gave.
    """
    arguments, losses, annotator = read
    start = load_start(config, arguments, files)
    fly = OnTheFly(
        annotator,
        config.sampling,
        config.responses,
        config.p_offline,
        config.seed,
        config.bdhs,
        load_similarity(config.similarity) if config.bdhs is not None else None,
        config.batch_size,
    )
    trainer = OnlineStepTrainer(
        start.model,
        args=arguments,
        train_dataset=load_columns(config.output / "rows", ROW_COLUMNS),
        processing_class=start.processor,
        losses=losses,
        peft_config=config.lora.to_peft() if config.lora else None,
        files=start.files,
        fast_path=config.fast_path,
        fly=fly,
    )
    check_trainable(trainer.model, config.freeze)
    return trainer


def train_steps(config: OnlineConfig) -> None:
    """Train step by step, or go on from the last checkpoint, and save the policy in the output folder."""
    if config.offline is not None:
        pairs_manifest(config.offline)
    read = read_settings(config)  # bad settings are to fail before the folder is the run's
    own = {CONFIG_FILE: run_files(to_mapping(config), "")[CONFIG_FILE]}
    open_run(config.output, own, resume=config.resume, free=FREE)
    if is_finished(config.output):
        print(f"{config.output} is finished; nothing to do.")
        return
    claim_run(config.output, own)
    rows = config.output / "rows"
    write_records("online_rows", step_rows(gather_prompts(config), config.offline), output=OutputConfig(rows), record=Pair,
                  settings={"offline": config.offline is not None}, seed=config.seed)  # fmt: skip
    trainer = make_trainer(config, files_of(config, rows, data="data"), read)
    checkpoint = open_run(config.output, trainer.files, resume=config.resume, free=FREE)
    for name, text in trainer.files.items():
        write_atomically(config.output / name, text.encode())
    claim_processes(config.output, running_processes(trainer.accelerator, config.trl), main_process=True)
    counts = {"rows_in": len(trainer.train_dataset), "rows_used": len(trainer.train_dataset)}
    print(f"{counts['rows_in']} prompts" + (f"; going on from {checkpoint.name}" if checkpoint else ""))
    train_and_save(trainer, config.output, checkpoint=checkpoint, rows=counts, counts=counts)

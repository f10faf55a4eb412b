"""GRPO and RLOO: TRL's trainers on our rewards, with the pictures intact and the upkeep of the other trainers.

Papers: GRPO, arXiv 2402.03300; RLOO, arXiv 2402.14740. Algorithm and losses are TRL 1.16's. What is ours: rewards that see the
pictures and facts of their own row, weights as the config loads them (revision, adapter, precision), exact resume, and a
reference that is the policy as it starts: with full weights TRL loads the model's path again, at whatever revision is the default
there and without what was merged into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from prefalign import families
from prefalign.config import ConfigError, to_mapping
from prefalign.manifest import write_atomically
from prefalign.online.prompts import gather_prompts, load_prompts
from prefalign.rewards import as_trl_functions, read_rewards
from prefalign.training.arguments import training_arguments
from prefalign.training.distributed import claim_processes, prepare_processes, running_processes
from prefalign.training.frame import load_start
from prefalign.training.lora import check_quantised, check_trainable
from prefalign.training.policy import in_parts
from prefalign.training.runs import CONFIG_FILE, claim_run, files_of, is_finished, open_run, run_files
from prefalign.training.upkeep import Upkeep, train_and_save

if TYPE_CHECKING:
    from prefalign.online.settings import OnlineConfig


PRIVATE = ("_get_per_token_logps_and_entropies",)
"""Names of TRL's trainers that are overridden here."""


class _Pictured(Upkeep):
    """What GRPO and RLOO share here: the reference is the policy as it starts, and a batch is known to hold pictures."""

    ref_model: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.ref_model is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            reference.load_state_dict(self.accelerator.unwrap_model(self.model).state_dict())

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As TRL's; its rows are not collated yet, so their pictures are looked for there."""
        self.saw_pictures = self.saw_pictures or any(row.get("images") for row in inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_per_token_logps_and_entropies(self, *args: Any, batch_num_images: Any = None, **kwargs: Any) -> Any:
        """As TRL's, which hands on all that a processor gives and knows nothing of LLaVA-OneVision's count of pictures per row.

        Raises:
            ValueError: a row has several pictures, which the model reads otherwise than one, and could not tell.
        """
        if batch_num_images is not None and int(batch_num_images.max()) > 1:
            family = families.family(families.core(self.accelerator.unwrap_model(self.model)).config)
            raise ValueError(
                f"a row has {int(batch_num_images.max())} pictures, and TRL's online trainers do not tell the {family} which "
                "pictures belong together: it would see them as tiles of one. Use rows of one picture, another family, or "
                "trainer.algorithm online_dpo."
            )
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


class GroupTrainer(_Pictured, GRPOTrainer):
    """TRL's `GRPOTrainer` with `Upkeep`."""


class LeaveOneOutTrainer(_Pictured, RLOOTrainer):
    """TRL's `RLOOTrainer` with `Upkeep`."""


TRAINERS: dict[str, tuple[type[Any], type[Any]]] = {
    "grpo": (GRPOConfig, GroupTrainer),
    "rloo": (RLOOConfig, LeaveOneOutTrainer),
}


def read_arguments(config: OnlineConfig) -> Any:
    """TRL's arguments of a run.

    Raises:
        ConfigError: as `training_arguments`, and fewer than two answers to a prompt.
    """
    kind = TRAINERS[config.algorithm][0]
    answers = config.trl.get("num_generations", 2)
    if isinstance(answers, int) and answers < 2:
        raise ConfigError(
            f"trainer.num_generations is {answers}: answers to a prompt are compared with each other, so that one alone teaches "
            "nothing. Give 2 or more."
        )
    return training_arguments(config.trl, output=config.output, seed=config.seed, kind=kind)


def check_arguments(arguments: Any, *, full_weights_in_parts: bool) -> None:
    """Check what would go wrong later, or resume inexactly.

    Raises:
        ConfigError: generations are kept over several optimizer steps and checkpoints fall between, or a reference is needed of
            weights that are shared out.
    """
    accumulation = arguments.gradient_accumulation_steps
    kept_for = max(arguments.steps_per_generation // accumulation, 1) * arguments.num_iterations
    if arguments.save_strategy == "steps" and int(arguments.save_steps) % kept_for:
        raise ConfigError(
            f"trainer.save_steps is {int(arguments.save_steps)}, and answers are used for {kept_for} optimizer steps "
            "(steps_per_generation x num_iterations): they are not saved, so a run that goes on from a checkpoint between would "
            f"not end with the same weights. Give a multiple of {kept_for}."
        )
    if arguments.beta and full_weights_in_parts:
        raise ConfigError(
            f"trainer.beta is {arguments.beta} and all weights train under DeepSpeed ZeRO-3, which shares them out: the "
            "reference cannot be made a copy of the policy. Train an adapter (`lora`), or set trainer.beta to 0."
        )


def make_trainer(config: OnlineConfig, files: dict[str, str]) -> Any:
    """TRL's trainer for `trainer.algorithm`, on the run's prompts, model and rewards.

    Args:
        config: the run.
        files: text files by name, written beside every saved model; the base is added to them.
    """
    trainer_class = TRAINERS[config.algorithm][1]
    arguments = read_arguments(config)
    check_quantised(config.model, config.lora, arguments)
    rewards = read_rewards(config.rewards)
    start = load_start(config, arguments, files)
    check_arguments(arguments, full_weights_in_parts=config.lora is None and in_parts(start.model))
    ends = families.end_token_ids(start.processor, families.core(start.model).generation_config)
    trainer = trainer_class(
        model=start.model,
        reward_funcs=as_trl_functions(rewards, end_token_ids=ends),
        args=arguments,
        train_dataset=load_prompts(config.output / "prompts"),
        processing_class=start.processor,
        peft_config=config.lora.to_peft() if config.lora else None,
        files=start.files,
    )
    check_trainable(trainer.model, config.freeze)
    return trainer


def train_policy_gradient(config: OnlineConfig) -> None:
    """Train with GRPO or RLOO, or go on from the last checkpoint, and save the policy in the output folder."""
    prepare_processes(config.trl)
    arguments = read_arguments(config)
    check_arguments(arguments, full_weights_in_parts=False)
    check_quantised(config.model, config.lora, arguments)
    read_rewards(config.rewards).check()  # bad settings are to fail before the folder is the run's
    processes = arguments.world_size
    own = {CONFIG_FILE: run_files(to_mapping(config), "")[CONFIG_FILE]}
    open_run(config.output, own, resume=config.resume, processes=processes)
    if is_finished(config.output):
        print(f"{config.output} is finished; nothing to do.")
        return
    with arguments.main_process_first(desc="read the prompts"):
        if arguments.process_index == 0:
            claim_run(config.output, own)
        prompts = gather_prompts(config)
    trainer = make_trainer(config, files_of(config, prompts, data="data"))
    checkpoint = open_run(config.output, trainer.files, resume=config.resume, processes=processes)
    running = running_processes(trainer.accelerator, config.trl)
    main_process = trainer.is_world_process_zero()
    if main_process:
        for name, text in trainer.files.items():
            write_atomically(config.output / name, text.encode())
        print(f"{len(trainer.train_dataset)} prompts; {running}" + (f"; from {checkpoint.name}" if checkpoint else ""))
    claim_processes(config.output, running, main_process=main_process)
    rows = {"prompts": len(trainer.train_dataset)}
    train_and_save(trainer, config.output, checkpoint=checkpoint, rows=rows, counts=rows)

"""Train a reward model that sees the picture and, in a rating turn, the facts: a vision-language model with a scalar head.

Paper: Fact-RLHF, arXiv 2309.14525. With `attributes` one score for each (HelpSteer's five); with `prompt.plain` the question and
answer models of Align2LLaVA, arXiv 2409.18541.

Needs: a pairs folder (the output of any stage that makes pairs; facts, margins and scores are used where rows have them) and a
model. Started again with the same config it goes on from its last checkpoint. Several processes: `torchrun --nproc_per_node N`.
The output folder is the reward model: rewards name it as `path`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefalign.models import ModelConfig
from prefalign.rewards.augmentation import RatingPrompt
from prefalign.training.lora import LoraSettings


@dataclass
class Config:
    """One training run.

    Attributes:
        model: starting weights: the policy's own, for one base with several adapters in PPO.
        pairs: folder of pairs to train on.
        output: folder of the run, and of the reward model.
        eval_pairs: folder of held-out pairs; measured at the end with facts and without, and their answers make the score scale.
        attributes: names of the scores. Several need `meta.scores` of both sides in each row, or rows with `meta.attribute`.
        objective: `ranking`: Bradley-Terry; `regression`: squared error of `meta.scores`.
        prompt: how a conversation and an answer become the text that is scored.
        facts: show the rows' facts in the rating turn.
        drop_facts: share of training rows shown without facts, so that the model can also score without.
        centring: kind of the term that keeps scores around zero, times `trainer.center_rewards_coefficient`: `squared` (TRL)
            or `abs_mean` (Fact-RLHF, which depends on how a batch is cut).
        margins: ask for a lead of the row's `margin`.
        rejected_pictures: show the rejected answer on `rejected_images`, where a row has them.
        fast_path: `auto` runs prompt and pictures once per pair where the family allows it exactly; `off` repeats them.
        reference_rows: pairs whose answers make the score scale.
        trainer: fields of TRL's `RewardConfig` by name.
        lora: train an adapter; without it all weights that are not frozen.
        freeze: towers that stay as they are: `vision`, `projector`, `language_model`.
        resume: "auto" goes on from the last checkpoint if there is one; true demands one; false refuses one.
        seed: order of rows and facts, start of head and adapter.
    """

    model: ModelConfig
    pairs: Path
    output: Path
    eval_pairs: Path | None = None
    attributes: list[str] = field(default_factory=lambda: ["reward"])
    objective: Literal["ranking", "regression"] = "ranking"
    prompt: RatingPrompt = field(default_factory=RatingPrompt)
    facts: bool = True
    drop_facts: float = 0.15
    centring: Literal["squared", "abs_mean"] = "squared"
    margins: bool = False
    rejected_pictures: bool = False
    fast_path: Literal["auto", "off"] = "auto"
    reference_rows: int = 256
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": "trl.RewardConfig"})
    lora: LoraSettings | None = None
    freeze: list[str] = field(default_factory=lambda: ["vision"])
    resume: Literal["auto"] | bool = "auto"
    seed: int = 0


def main(config: Config) -> None:
    """Train, or go on training, and save a reward model that proves itself when it is loaded."""
    from prefalign.rewards.reward_run import build_trainer, read_inputs
    from prefalign.rewards.rows import keep_fitting
    from prefalign.training.distributed import running_processes
    from prefalign.training.frame import begin_run, claim_folder, prepare_training, train_run
    from prefalign.training.lora import check_trainable

    prepare_training(config.trainer)
    inputs = read_inputs(config, output=config.output, trainer=config.trainer)
    start = begin_run(config, inputs.arguments, inputs.files)
    if start is None:
        return
    trainer = build_trainer(config, inputs, start)
    running = running_processes(trainer.accelerator, config.trainer)
    check_trainable(trainer.model.model, config.freeze)
    longest = inputs.arguments.max_length
    trainer.train_dataset, fit = keep_fitting(trainer.train_dataset, trainer.data_collator, longest)
    lines, eval_counts = [f"{fit.rows_used} pairs, {fit.summary()}; {running}"], None
    if config.eval_pairs:
        trainer.eval_dataset, held_out = keep_fitting(trainer.eval_dataset, trainer.data_collator, longest)
        lines.append(f"{held_out.rows_used} held-out pairs, {held_out.summary()}")
        eval_counts = held_out.counts()
    claim_folder(config, trainer, start, running, lines)
    train_run(config, trainer, start, fit, eval_counts)


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

"""Train a vision-language model on preference pairs: a weighted list of losses over views of a pair, LoRA or full weights.

Paper: DPO, arXiv 2305.18290 (loss `text`: any TRL `trainer.loss_type`), with the image-side losses of mDPO, rDPO, S-VCO,
POVID, CHiP and others beside it; `prefalign/losses/` names the paper of each. `trainer.loss_type: [sft]` imitates the chosen
answers, the control that a preference method has to beat.

Needs: a pairs folder (the output of any stage that makes pairs) and a model. Started again with the same config it goes on from
its last checkpoint and ends with the weights of an uninterrupted run. Several processes: `torchrun --nproc_per_node N`, or
`accelerate launch` with a profile of configs/accelerate/; several nodes: recipes/slurm/train_preference.sbatch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefalign.models import ModelConfig
from prefalign.negatives import Negative
from prefalign.training.lora import LoraSettings


@dataclass
class Config:
    """One training run.

    Attributes:
        model: the policy's starting weights, which are the reference too.
        pairs: folder of pairs to train on.
        output: folder of the run: checkpoints, final model or adapter with its processor, logs, resolved config.
        eval_pairs: folder of held-out pairs; measured at the end, and during the run with `trainer.eval_strategy`.
        losses: what is minimised: entries {name, weight, settings of the term}; the total is their weighted sum. Names are those
            of `prefalign.losses.TERMS`. Losses on the other picture need pairs with `rejected_images`, or a `negative`.
        negative: makes `rejected_images` on the fly for rows without them.
        reference: `cached` computes the reference's log-probs once; `online` runs it in every step, which losses that read its
            logits and `trainer.sync_ref_model` need.
        reference_folder: where they are kept, for runs that share them; by default `reference` in the output folder.
        fast_path: `auto` runs prompt and pictures once per pair where the family allows it exactly; `off` repeats them as
            TRL does.
        tokens_per_pass: most tokens of one forward pass; a batch that holds more is run in parts. Null: a batch is one pass.
        trainer: fields of TRL's `DPOConfig` by name.
        lora: train an adapter; without it all weights that are not frozen.
        freeze: towers that stay as they are: `vision`, `projector`, `language_model`.
        resume: "auto" goes on from the last checkpoint if there is one; true demands one; false refuses one.
        seed: order of the rows, start of the adapter, and with a row's id its negative.
    """

    model: ModelConfig
    pairs: Path
    output: Path
    eval_pairs: Path | None = None
    losses: list[dict[str, Any]] = field(default_factory=lambda: [{"name": "text"}])
    negative: Negative | None = None
    reference: Literal["cached", "online"] = "cached"
    reference_folder: Path | None = None
    fast_path: Literal["auto", "off"] = "auto"
    tokens_per_pass: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": "trl.DPOConfig"})
    lora: LoraSettings | None = None
    freeze: list[str] = field(default_factory=lambda: ["vision"])
    resume: Literal["auto"] | bool = "auto"
    seed: int = 0


def main(config: Config) -> None:
    """Train, or go on training, and save everything that an evaluation and a model card need."""
    from prefalign.training.distributed import running_processes
    from prefalign.training.frame import begin_run, claim_folder, prepare_training, train_run
    from prefalign.training.lora import check_trainable
    from prefalign.training.pairs import keep_fitting
    from prefalign.training.preference_run import build_trainer, read_inputs
    from prefalign.training.reference import cache_reference
    from prefalign.training.runs import full_disk_explained

    prepare_training(config.trainer)
    inputs = read_inputs(config, output=config.output, trainer=config.trainer)
    start = begin_run(config, inputs.arguments, inputs.files)
    if start is None:
        return
    trainer = build_trainer(config, inputs, start)
    running = running_processes(trainer.accelerator, config.trainer)
    check_trainable(trainer.model, config.freeze)
    trainer.train_dataset, fit = keep_fitting(trainer.train_dataset, trainer.data_collator)
    lines, eval_counts = [f"{fit.rows_used} pairs, {fit.summary() or 'all fit'}; {running}"], None
    if config.eval_pairs:
        trainer.eval_dataset, held_out = keep_fitting(trainer.eval_dataset, trainer.data_collator)
        eval_counts = {"rows_in": held_out.rows_in, "rows_used": held_out.rows_used}
        if held_out.summary():
            lines.append(f"{held_out.rows_used} held-out pairs, {held_out.summary()}")
    claim_folder(config, trainer, start, running, lines)
    if config.reference == "cached" and trainer.needs_reference:
        with full_disk_explained(config.output):
            kept = config.reference_folder or config.output / "reference"
            report = cache_reference(trainer, kept, reference=start.fingerprint)
        if trainer.is_world_process_zero():
            print(report)
    train_run(config, trainer, start, fit, eval_counts)


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

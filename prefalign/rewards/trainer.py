"""`RewardTrainer`: Bradley-Terry training of a `RewardModel` on pairs with pictures and facts.

TRL's `RewardTrainer` takes text only; its loss, its names of metrics and its arguments (`RewardConfig`) are kept here.

Legend of shapes: `B` pairs, `A` attributes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import mse_loss, softplus
from transformers import Trainer, TrainerCallback
from trl import RewardConfig
from trl.trainer.utils import disable_dropout_in_model

from prefalign.config import ConfigError
from prefalign.manifest import write_atomically
from prefalign.rewards.rows import COLUMNS, as_mapping, scores_of
from prefalign.rewards.vlm import RewardModel
from prefalign.training.arguments import shares_weights, training_arguments
from prefalign.training.upkeep import Upkeep, check_finite

if TYPE_CHECKING:
    from datasets import Dataset

    from prefalign.rewards.collator import RewardCollator

logger = logging.getLogger(__name__)

Centring = Literal["squared", "abs_mean"]


WITHOUT_EFFECT = {
    "chat_template_path": "the processor has the template of the model",
    "eos_token": "a conversation ends in an open sentence",
    "activation_offloading": "it is a part of TRL's own trainer",
    "trust_remote_code": "`model` says how the model is loaded",
}
"""Fields of TRL's `RewardConfig` that say nothing here, and why, besides those that `training_arguments` refuses."""


def reward_arguments(settings: Mapping[str, Any], *, output: Path, seed: int) -> RewardConfig:
    """Build TRL's arguments from a config's `trainer:` mapping; `center_rewards_coefficient` is 0.001 where nothing is said.

    Raises:
        ConfigError: as `training_arguments`, for fields of the text trainer that would have no effect, and for
            `dataloader_persistent_workers`.
    """
    if wrong := [name for name in settings if name in WITHOUT_EFFECT]:
        lines = [f"trainer.{name}: has no effect here ({WITHOUT_EFFECT[name]}); leave it out." for name in wrong]
        raise ConfigError("\n  ".join(lines))
    if settings.get("dataloader_persistent_workers"):
        raise ConfigError(
            "trainer.dataloader_persistent_workers: workers that outlive an epoch keep the collator that they began with, so the "
            "order of facts would never change and held-out rows would be measured with facts where they are left out. Leave "
            "it out."
        )
    return training_arguments(
        {"center_rewards_coefficient": 0.001, **settings}, output=output, seed=seed, kind=RewardConfig
    )


def check_whole(arguments: RewardConfig) -> None:
    """Check that every process holds all weights, which the head's pass beside the model's own forward needs.

    Raises:
        ConfigError: DeepSpeed ZeRO-3 or FSDP, which share them out.
    """
    if shares_weights(arguments):
        raise ConfigError(
            "DeepSpeed ZeRO-3 and FSDP share out the weights, and a reward model runs its language model without the "
            "vocabulary's head, beside the forward pass that they gather weights for. Use DDP or ZeRO-2,"
            " with `lora` for a large model."
        )


def bradley_terry(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    direction: torch.Tensor | None = None,
    margin: torch.Tensor | None = None,
    centring: float = 0.0,
    kind: Centring = "squared",
) -> torch.Tensor:
    """Loss of pairs under Bradley and Terry's model, with a term that keeps scores around zero.

    Fact-RLHF (arXiv 2309.14525, code): binary cross-entropy of the difference with label 1, and 0.001 |mean of (r_w + r_l)|
    (`abs_mean`). TRL squares before the mean (`squared`, arXiv 2312.09244 equation 2), which, other than `abs_mean`, is the same
    for a batch and for its parts.

    Args:
        chosen: (B, A) scores of the chosen answers.
        rejected: (B, A) of the rejected ones.
        direction: (B, A) 1: chosen is better, -1: rejected is, 0: the pair says nothing of this attribute. None: all 1.
        margin: (B,) by how much the better one has to lead before the loss falls below ln 2 (TRL's `margin`).
        centring: factor of the centring term; 0 leaves it out.
        kind: which centring term.

    Returns:
        Scalar: the mean over all B x A, those of direction 0 counted as zeros.
    """
    lead = chosen - rejected
    if direction is not None:
        lead = lead * direction
    if margin is not None:
        lead = lead - margin[:, None]
    losses = softplus(-lead)
    if direction is not None:
        losses = losses * direction.abs()
    loss = losses.mean()
    if centring:
        both = chosen + rejected
        loss = loss + centring * (both.square().mean() if kind == "squared" else both.mean(dim=0).abs().mean())
    return loss


class RewardTrainer(Upkeep, Trainer):
    """Train a reward model.

    Metrics have TRL's names: `accuracy`, `margin`, `min_reward`, `mean_reward`, `max_reward`, over all pairs since the last log
    or of an evaluation (TRL averages batches, so a last, smaller batch counts more). Pairs without a direction count in none of
    the first two; of several attributes each has `accuracy/<name>` too. The last evaluation is made twice where rows have facts:
    `eval_accuracy` with facts, `eval_without_facts_accuracy` without.

    Args:
        model: the reward model, trained in place.
        args: TRL's arguments; `center_rewards_coefficient`, `disable_dropout` and all of transformers' count.
        train_dataset: rows as `rows.load_reward_pairs` gives them.
        eval_dataset: held-out rows.
        objective: `ranking`: Bradley-Terry; `regression`: squared error of each attribute's score (`meta.scores`), as HelpSteer.
        centring: kind of the centring term.
        margins: use the rows' `margin`.
        facts: show facts.
        drop_facts: share of training rows whose facts are left out.
        rejected_pictures: show rejected answers on `rejected_images` where a row has them.
        reference_rows: pairs, held-out ones if there are any, whose answers make the score scale.
        files: text files by name, written beside every saved model.

    Raises:
        FloatingPointError: a logged training loss, or a weight that is to be saved, is not a finite number.
    """

    model: RewardModel
    data_collator: RewardCollator

    def __init__(
        self,
        model: RewardModel,
        *,
        args: RewardConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        objective: Literal["ranking", "regression"] = "ranking",
        centring: Centring = "squared",
        margins: bool = False,
        facts: bool = True,
        drop_facts: float = 0.15,
        rejected_pictures: bool = False,
        reference_rows: int = 256,
        files: Mapping[str, str] | None = None,
    ):
        self.objective = objective
        self.centring = centring
        self.margins = margins
        self.reference_rows = reference_rows
        self._scores: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        if args.disable_dropout:
            disable_dropout_in_model(model)
        model.freeze_unused()
        collator = model.collator(
            views=("chosen", "rejected"),
            facts=facts,
            drop_facts=drop_facts,
            seed=args.seed,
            rejected_pictures=rejected_pictures,
            targets=objective == "regression",
        )
        if objective == "regression":
            # the head alone would need thousands of small steps to reach the scores' mean
            scores = torch.tensor(
                [scores_of(row, model.attributes) for row in train_dataset.select_columns(["id", "meta"])]
            )
            with torch.no_grad():
                model.head.bias.copy_(scores.mean(dim=(0, 2)))
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=model.processor,
            files=files,
        )
        self.can_return_loss = True
        self.label_names: list[str] = []
        self.model_accepts_loss_kwargs = False
        self.add_callback(_Epochs(self))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Held-out rows keep their facts, in one order."""
        collator = self.data_collator
        self.data_collator = replace(collator, drop_facts=0.0, epoch=0)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch of `RewardCollator`."""
        self.saw_pictures = self.saw_pictures or bool(
            inputs["packed"]["vision"] if "packed" in inputs else "pixel_values" in inputs["plain"]
        )
        given = {name: inputs[name] for name in ("packed", "plain", "places") if name in inputs}
        scores = model(**given)
        chosen, rejected = scores.chunk(2)
        if self.objective == "regression":
            loss = mse_loss(torch.stack([chosen, rejected]), inputs["targets"])
        else:
            loss = bradley_terry(
                chosen,
                rejected,
                direction=inputs["direction"],
                margin=inputs["margin"] if self.margins else None,
                centring=self.args.center_rewards_coefficient or 0.0,
                kind=self.centring,
            )
        rows = torch.stack([chosen.detach(), rejected.detach(), inputs["direction"]], dim=1)
        self._scores["train" if self.model.training else "eval"].append(
            self.accelerator.gather_for_metrics(rows).float().cpu()
        )
        return (loss, {"rewards": scores}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, with the metrics of the pairs since the last log."""
        if self._scores["train"] and "loss" in logs:
            logs.update(self._metrics("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As transformers', with the metrics of all pairs."""
        self._scores["eval"].clear()
        kwargs["prediction_loss_only"] = True
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._metrics("eval").items()})
        return output

    def _metrics(self, mode: str) -> dict[str, float]:
        rows = torch.cat(self._scores[mode])
        self._scores[mode].clear()
        chosen, rejected, direction = rows.unbind(dim=1)
        lead = (chosen - rejected) * direction
        told = direction != 0
        scores = torch.cat([chosen, rejected])
        metrics = {
            "min_reward": scores.min().item(),
            "mean_reward": scores.mean().item(),
            "max_reward": scores.max().item(),
        }
        if bool(told.any()):
            metrics |= {"accuracy": (lead[told] > 0).float().mean().item(), "margin": lead[told].mean().item()}
        names = self.model.attributes if len(self.model.attributes) > 1 else []
        for number, name in enumerate(names):
            if bool(told[:, number].any()):
                metrics[f"accuracy/{name}"] = (lead[told[:, number], number] > 0).float().mean().item()
        return metrics

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with facts; outside of training once more without them, where a held-out row has some."""
        metrics = dict(super().evaluate(*args, **kwargs))
        collator = self.data_collator
        if self.is_in_train or not (collator.facts and self._has_facts()):
            return metrics
        collator.facts = False
        try:
            return metrics | super().evaluate(*args, **{**kwargs, "metric_key_prefix": "eval_without_facts"})
        finally:
            collator.facts = True

    def _has_facts(self) -> bool:
        rows, rating = self.eval_dataset.select_columns(["facts"]), self.data_collator.rating
        return rating.shows_facts and any(rating.facts_of({"facts": as_mapping(row["facts"])}) for row in rows)

    def calibrate(self) -> None:
        """Find the score scale and the golden rows, on held-out pairs where there are some."""
        dataset = self.train_dataset if self.eval_dataset is None else self.eval_dataset
        rows = []
        for number in range(min(self.reference_rows, len(dataset))):
            row = dataset[number]
            other = row["rejected_images"] if self.data_collator.rejected_pictures else None
            known = {**row, "facts": {} if other else as_mapping(row["facts"])}
            rows += [known, {**known, "chosen": row["rejected"], "images": other or row["images"]}]
        model = self.accelerator.unwrap_model(self.model)
        model.calibrate(rows, batch_size=2 * self.args.per_device_eval_batch_size)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save; the finished model with its score scale and golden rows, which checkpoints have not."""
        if not _internal_call:
            self.calibrate()
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        check_finite({name: weight for name, weight in self.model.named_parameters() if weight.requires_grad})
        self.accelerator.unwrap_model(self.model).save(folder)
        for name, text in self.files.items():
            write_atomically(folder / name, text.encode())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.accelerator.unwrap_model(model or self.model).restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.accelerator.unwrap_model(self.model).restore(Path(str(self.state.best_model_checkpoint)))


class _Epochs(TrainerCallback):
    """Tell the collator which pass over the data begins or goes on."""

    def __init__(self, trainer: RewardTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.data_collator.epoch = int((state.epoch or 0.0) + 1e-6)

"""`PreferenceTrainer`: TRL's `DPOTrainer` on documents: weighted terms over views, a shared prefix, a reference computed once.

TRL's losses, logging, checkpoints, PEFT and distributed handling are kept. What is ours is how log-probs come about: one forward
pass gives every view of every row, and TRL's `_compute_loss` is then called with a model that returns what was computed. The
private names leaned on are listed in `PRIVATE`, which a test checks.

Legend of shapes: `B` rows, `N` labels of all answers of a batch, `L` tokens of TRL's layout, `A` of the longest answer.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

from prefalign import families
from prefalign.config import ConfigError
from prefalign.losses import Scores, Weighted, read_losses, views_of
from prefalign.manifest import write_atomically
from prefalign.training.checkpoints import REFERENCE_FOLDER, TERMS_FILE, restore_reference, restore_terms
from prefalign.training.checks import check_settings, needs_reference
from prefalign.training.collator import PreferenceCollator, blank_vision
from prefalign.training.forward import share, unshare
from prefalign.training.frozen import FrozenTower, NoInputHooks, frozen_tower
from prefalign.training.pairs import COLUMNS
from prefalign.training.routes import find_route
from prefalign.training.scoring import FIELDS, has_pictures, run, tokens_in, view_scores
from prefalign.training.upkeep import Upkeep

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import PreTrainedModel, ProcessorMixin

    from prefalign.negatives import Negative

logger = logging.getLogger(__name__)

PRIVATE = (
    "_compute_loss",
    "_set_signature_columns_if_needed",
)


class PreferenceTrainer(Upkeep, DPOTrainer):
    """Train a vision-language model on pairs with a weighted list of preference terms.

    Args:
        model: policy; a full model or a `PeftModel`. May be built in memory.
        args: TRL's arguments.
        train_dataset: rows as `pairs.load_pairs` gives them.
        processing_class: the model's processor, saved with every checkpoint.
        losses: weighted terms; by default TRL's losses on the two answers.
        eval_dataset: held-out rows.
        ref_model: reference. By default the policy without its adapter, or a frozen copy of the policy as it is now (TRL
            loads the model's path again, at whatever revision is the default there). Weights that ZeRO-3 shares out cannot be
            copied.
        peft_config: wrap `model` in an adapter.
        files: text files by name, written beside every saved model.
        negative: how `rejected_images` are made for rows without them (see `PreferenceCollator`).
        negative_seed: seed of these pictures.
        fast_path: `auto` shares prompts and pictures where the family allows it exactly; `off` takes TRL's layout.
        reference: `online` runs the reference in every step; `cached` reads its log-probs from a cache that
            `reference.cache_reference` fills before training, and keeps no reference model.
        tokens_per_pass: most tokens of one forward pass. A batch that holds more, held-out ones too, is run in parts, which hold
            what fits instead of a fixed number of rows; the loss stays the mean over its rows. A single row that is longer is a
            pass of its own, with one warning. None: a batch is one pass.

    Raises:
        ConfigError: settings that contradict each other.
    """

    data_collator: PreferenceCollator
    aux_loss_enabled: bool

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        args: DPOConfig,
        train_dataset: Dataset,
        processing_class: ProcessorMixin,
        losses: Sequence[Weighted] | None = None,
        eval_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        files: Mapping[str, str] | None = None,
        negative: Negative | None = None,
        negative_seed: int = 0,
        fast_path: Literal["auto", "off"] = "auto",
        reference: Literal["online", "cached"] = "online",
        tokens_per_pass: int | None = None,
    ):
        self.losses = list(losses) if losses is not None else read_losses([{"name": "text"}], beta=args.beta)
        self.views = views_of(self.losses)
        self.full_logits = {view for entry in self.losses for view in entry.term.logits}
        self.needs_reference = needs_reference(self.losses, args.loss_type)
        self.starts_from_adapter = is_peft_model(model)
        self.reference = reference
        self.tokens_per_pass = tokens_per_pass or 0
        self.warned_of_a_long_row = False
        adapts = peft_config is not None or self.starts_from_adapter
        check_settings(
            self.losses,
            args,
            reference=reference,
            tokens_per_pass=tokens_per_pass,
            brings_reference=ref_model is not None,
            adapts=adapts,
        )
        unshare(model)
        self.route = find_route(model, fast_path)
        if self.route.layout == "plain" and fast_path == "auto":
            logger.warning("The fast path is off: prompts cannot be shared exactly, because %s.", self.route.reason)
        collator = PreferenceCollator(
            processing_class,
            self.views,
            args.max_length,
            negative,
            negative_seed,
            layout=self.route.layout,
            image_token_id=families.image_token_ids(model.config)[0],
            tokens_per_pass=tokens_per_pass,
        )
        online = self.needs_reference and reference == "online"
        still = frozen_tower(model)
        if not online:
            ref_model = _NoReference(model.config)
        elif ref_model is None and not adapts:
            if is_deepspeed_zero3_enabled():
                raise ConfigError(
                    "reference is 'online' and all weights train under DeepSpeed ZeRO-3, which shares them out, so the policy "
                    "cannot be copied, and TRL would load its path once more, at whatever revision is the default there. Set "
                    "reference to 'cached', or give `ref_model`, loaded as the policy was."
                )
            # what is frozen is the same in both, so both may use the one, unless the reference is written to
            shared = [still, *(weight for weight in model.parameters() if not weight.requires_grad)]
            written = args.sync_ref_model or args.fsdp_plugin_args
            ref_model = copy.deepcopy(model, {} if written else {id(part): part for part in shared if part is not None})
            ref_model.requires_grad_(False).eval()
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            files=files,
        )
        self.precompute_ref_logps = True  # TRL is handed the reference's log-probs, wherever they come from
        if not online:
            self.ref_model = None
        if self.aux_loss_enabled:
            logger.warning("The load-balancing loss of this mixture of experts is left out of the total.")
            self.aux_loss_enabled = False
        share(self.model, self.route.layout)
        if self.ref_model is not None:
            share(self.accelerator.unwrap_model(self.ref_model), self.route.layout)
        still = frozen_tower(self.model)  # an adapter has frozen what it does not reach
        self.frozen = FrozenTower(still, keep=online) if still is not None else None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            collator.dummy = blank_vision(processing_class)
        no_hooks = NoInputHooks(self)
        no_hooks.on_train_begin(self.args, self.state, self.control)  # TRL's own hooks, under those that `train` adds
        self.add_callback(no_hooks)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as TRL does; losses that keep a state and a reference that moves go on with the checkpoint's.

        Raises:
            ConfigError: a reference that moves, in a checkpoint of DeepSpeed or FSDP.
            ValueError: the checkpoint lacks them.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(str(self.args.output_dir))
        if folder:
            restore_terms(self._stateful(), Path(folder))
            if self.args.sync_ref_model:
                sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
                restore_reference(self.accelerator.unwrap_model(self.ref_model), Path(folder), sharded=sharded)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As transformers does, but DeepSpeed's 16 bits are not for the reference's log-probs: their sums would be rounded."""
        prepared = super()._prepare_inputs(inputs)
        if "reference" in inputs:
            prepared["reference"] = {view: logps.to(self.args.device) for view, logps in inputs["reference"].items()}
        return prepared

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step on a batch, or on its parts one after the other: gradients add up, metrics are means over the batch's rows."""
        step = super().training_step
        if "parts" not in inputs:
            return step(model, inputs, *args, **kwargs)
        return self._over_parts(inputs, "train", lambda part: step(model, part, *args, **kwargs))

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The loss of a held-out batch, or of its parts one after the other, which give no logits."""
        step = super().prediction_step
        if "parts" not in inputs:
            return step(model, inputs, prediction_loss_only, ignore_keys)
        return self._over_parts(inputs, "eval", lambda part: step(model, part, True, ignore_keys)[0]), None, None

    def _over_parts(self, inputs: dict[str, Any], mode: str, run_part: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        before = self._metrics[mode]
        means: dict[str, float] = defaultdict(float)
        total = torch.zeros((), device=self.accelerator.device)
        for part in inputs["parts"]:
            if not self.warned_of_a_long_row and len(part["ids"]) == 1 and tokens_in(part) > self.tokens_per_pass:
                self.warned_of_a_long_row = True
                logger.warning(
                    "tokens_per_pass is %d and row %s alone takes %d: such a row is a pass of its own.",
                    self.tokens_per_pass, part["ids"][0], tokens_in(part),
                )  # fmt: skip
            self._metrics[mode] = defaultdict(list)
            total = total + run_part(part)
            for name, values in self._metrics[mode].items():
                means[name] += part["weight"] * values[-1]
        self._metrics[mode] = before
        for name, value in means.items():
            before[name].append(value)
        before["num_tokens"] = [self._total_train_tokens]
        return total

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        self.saw_pictures = self.saw_pictures or (self.model.training and has_pictures(inputs))
        reference = self._reference(inputs)
        policy = run(model, inputs, full_logits=bool(self.full_logits))
        if self.frozen is not None:
            self.frozen.forget()
        scores = view_scores(inputs, self.views, policy, reference, logits=self.full_logits)
        text = next((entry for entry in self.losses if entry.name == "text"), None)
        with nullcontext() if text is not None else torch.no_grad():
            loss = self._trl_loss(inputs, policy, scores)
        total = loss * text.weight if text is not None else torch.zeros((), device=loss.device)
        logged = {}
        for entry in self.losses:
            if entry.name == "text":
                continue
            losses, metrics = entry.term.loss(scores)
            total = total + entry.weight * losses.mean()
            for name, value in {"loss": losses.detach(), **metrics}.items():
                logged[f"{entry.name}/{name}"] = value.float().mean()
        self._log_terms(logged)
        total = total * inputs.get("weight", 1.0)
        return (total, policy) if return_outputs else total

    def _reference(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        """The same under the reference, without gradient; None where it is not needed or comes with the rows."""
        if not self.needs_reference or "reference" in inputs:
            return None
        if self.reference == "cached":
            raise RuntimeError(
                "reference is 'cached' and no cache has been filled. Call `prefalign.training.reference.cache_reference` before "
                "training, or set reference to 'online'."
            )
        with torch.no_grad(), self.as_reference() as model:
            return run(model, inputs, full_logits=bool(self.full_logits))

    @contextmanager
    def as_reference(self, policy: Any = None) -> Iterator[Any]:
        """The reference: a model of its own, or the policy with its adapter off (TRL's copy of it, where it started from one).

        Args:
            policy: the policy as it can be called; by default `self.model`.
        """
        if self.ref_model is not None:
            yield self.ref_model
            return
        policy = self.model if policy is None else policy
        unwrapped = self.accelerator.unwrap_model(self.model)
        training = policy.training
        policy.eval()
        adapter = "ref" if "ref" in getattr(unwrapped, "peft_config", {}) else None
        # a run that starts from an adapter and keeps no copy of it asks before training, while the adapter is the reference
        as_it_is = not is_peft_model(unwrapped) or (self.starts_from_adapter and adapter is None)
        try:
            with nullcontext() if as_it_is else use_adapter(unwrapped, adapter_name=adapter):
                yield policy
        finally:
            policy.train(training)

    def _trl_loss(
        self, inputs: Mapping[str, Any], policy: Mapping[str, torch.Tensor], scores: Mapping[str, Scores]
    ) -> torch.Tensor:
        """TRL's own loss and metrics on the first two views, from what has been computed."""
        first, second = (*self.views, self.views[0])[:2]
        index = torch.cat([inputs["index"][first], inputs["index"][second]])
        batch = {key: inputs[key] for key in ("input_ids", "attention_mask", "completion_mask")}
        mask = batch["completion_mask"][:, 1:].bool()

        def spread_out(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        outputs = FusedCausalLMOutput(
            **{name: spread_out(value[index]) for name, value in policy.items() if name in FIELDS}
        )
        references = [scores[view].ref_logps for view in (first, second)]
        if references[0] is None:
            sums = [torch.zeros(len(mask) // 2, device=mask.device)] * 2
        else:
            flat = torch.cat(
                [logps[scores[view].mask] for view, logps in zip((first, second), references, strict=True)]  # type: ignore[index]
            )
            per_token = spread_out(flat)
            # summed in TRL's layout, as its policy sums are: equal log-probs give margins of exactly 0
            sums = list(_sums(per_token, mask, self.ld_alpha).chunk(2))
        batch |= {"ref_chosen_logps": sums[0], "ref_rejected_logps": sums[1]}
        loss = super()._compute_loss(lambda **_: outputs, batch, False)
        metrics = self._metrics["train" if self.model.training else "eval"]
        if references[0] is None:
            for name in [name for name in metrics if name.startswith("rewards/")]:
                del metrics[name]
        if len(self.views) == 1:
            for name in [name for name in metrics if name.endswith(("/rejected", "/margins", "/accuracies"))]:
                if name.startswith(("rewards/", "logps/", "logits/")):
                    del metrics[name]
        return loss

    def _log_terms(self, logged: Mapping[str, torch.Tensor]) -> None:
        if not logged:
            return
        means = self.accelerator.gather(torch.stack(list(logged.values()))[None]).mean(dim=0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in zip(logged, means, strict=True):
            metrics[name].append(value)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        states = {entry.name: entry.term.state_dict() for entry in self._stateful()}
        if self.args.should_save and states:
            write_atomically(Path(output_dir or self.args.output_dir) / TERMS_FILE, json.dumps(states).encode())
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.args.sync_ref_model and output_dir not in (None, self.args.output_dir) and not sharded:
            self.accelerator.unwrap_model(self.ref_model).save_pretrained(Path(str(output_dir)) / REFERENCE_FOLDER)

    def _stateful(self) -> list[Weighted]:
        return [entry for entry in self.losses if hasattr(entry.term, "state_dict")]


def _sums(per_token: torch.Tensor, mask: torch.Tensor, ld_alpha: float | None) -> torch.Tensor:
    """Sums over answers as `DPOTrainer.compute_ref_log_probs` takes them, (2B,).

    Not by calling it: it turns gradient checkpointing off and on, which adds a hook to every embedding in every step.
    """
    if ld_alpha is None:
        return per_token.sum(dim=1)
    shorter = torch.minimum(*mask.sum(dim=1).chunk(2)).repeat(2)
    tail = mask.cumsum(dim=1) > shorter[:, None]
    return (per_token * ~tail).sum(dim=1) + ld_alpha * (per_token * tail).sum(dim=1)


class _NoReference(nn.Module):
    """Stands where TRL wants a reference model, for runs that keep none."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.nothing = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this run has no reference model")

"""Settings of a preference run that contradict each other, told before anything is loaded or written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trl import DPOConfig

from prefalign.config import ConfigError, nearest
from prefalign.losses import VIEWS, Weighted
from prefalign.losses.text import COUPLED, LOSS_TYPES, REFERENCE_FREE

OF_TEXT = (
    "loss_type", "loss_weights", "ld_alpha", "use_weighting", "label_smoothing", "f_divergence_type",
    "f_alpha_divergence_coef", "discopop_tau",
)  # fmt: skip
"""Fields of `DPOConfig` that only the term `text` reads."""


def check_settings(
    losses: Sequence[Weighted],
    args: DPOConfig,
    *,
    reference: str,
    tokens_per_pass: int | None,
    brings_reference: bool,
    adapts: bool,
) -> None:
    """Check what `PreferenceTrainer` is given.

    Args:
        losses: weighted terms.
        args: TRL's arguments.
        reference: `online` or `cached`.
        tokens_per_pass: most tokens of one pass, or None.
        brings_reference: whether a reference model is given.
        adapts: whether an adapter trains.

    Raises:
        ConfigError: says what contradicts what, and what to do.
    """
    if args.router_aux_loss_coef:
        raise ConfigError(
            f"trainer.router_aux_loss_coef is {args.router_aux_loss_coef}, and the load-balancing loss is not "
            "defined for shared prompts. Leave it out."
        )
    if tokens_per_pass is not None and tokens_per_pass < 1:
        raise ConfigError(f"tokens_per_pass is {tokens_per_pass}; give the most tokens of one pass, such as 8192.")
    if tokens_per_pass is not None and args.world_size > 1:
        raise ConfigError(
            f"tokens_per_pass: TRL's metrics are exchanged with every pass, and {args.world_size} processes would "
            "make different numbers of passes. Leave it out and lower trainer.per_device_train_batch_size."
        )
    _check_text(losses, args)
    together = coupled(losses, args.loss_type)
    if tokens_per_pass is not None and together:
        raise ConfigError(
            f"tokens_per_pass: in loss {', '.join(together)} the rows of a batch depend on each other, so a batch cannot be "
            "run in parts. Leave tokens_per_pass out and lower trainer.per_device_train_batch_size."
        )
    if tokens_per_pass is not None and (args.deepspeed_plugin is not None or args.fsdp_plugin_args):
        raise ConfigError(
            "tokens_per_pass: DeepSpeed and FSDP count one backward pass per batch, and parts would be several. "
            "Leave it out and lower trainer.per_device_train_batch_size."
        )
    if args.precompute_ref_log_probs:
        raise ConfigError(
            "trainer.precompute_ref_log_probs: TRL's own cache is refused for pictures and misses what its numbers "
            "depend on. Set `reference: cached` instead."
        )
    if args.sync_ref_model and reference == "cached":
        raise ConfigError(
            "reference is 'cached' and trainer.sync_ref_model is true: the reference moves with the policy, so a "
            "cache of it would be wrong from the first sync on. Set reference to 'online', or sync_ref_model to false."
        )
    if args.sync_ref_model and adapts:
        raise ConfigError(
            "trainer.sync_ref_model: with an adapter the reference is the model without it, which has no weights of its own to "
            "move. Leave it out, or train all weights."
        )
    if args.sync_ref_model and not needs_reference(losses, args.loss_type):
        raise ConfigError(
            f"trainer.sync_ref_model: the losses ({', '.join(entry.name for entry in losses)}) look at no reference, so there is "
            "none to move. Leave it out."
        )
    reading = [entry.name for entry in losses if entry.term.logits]
    if reading and reference == "cached":
        raise ConfigError(
            f"reference is 'cached' and {', '.join(reading)} reads the reference's logits over the whole vocabulary, which "
            "are not stored. Set reference to 'online'."
        )
    if brings_reference and reference == "cached":
        raise ConfigError(
            "reference is 'cached' and a `ref_model` is given: the cache is filled by the policy as it starts, so "
            "that model would never be asked. Set reference to 'online', or leave ref_model out."
        )


def _check_text(losses: Sequence[Weighted], args: DPOConfig) -> None:
    """Check what TRL's own loss reads, and that there is one if anything is set for it."""
    if not args.loss_type:
        raise ConfigError("trainer.loss_type: the list is empty, so `text` has no loss. TRL's default is [sigmoid].")
    for kind in args.loss_type:
        if kind not in LOSS_TYPES:
            raise ConfigError(f"trainer.loss_type: TRL has no loss {kind!r}; {nearest(kind, list(LOSS_TYPES))}")
    if not any(entry.name == "text" for entry in losses):
        plain = DPOConfig.__dataclass_fields__
        for name in OF_TEXT:
            factory = plain[name].default_factory
            default = factory() if callable(factory) else plain[name].default
            if getattr(args, name) != default:
                raise ConfigError(
                    f"trainer.{name} is {getattr(args, name)!r}, and only the loss `text` reads it, which is not among the "
                    f"losses ({', '.join(entry.name for entry in losses)}). Leave it out, or add {{name: text}} to `losses`."
                )
        return
    if not 0 < args.beta < math.inf:
        raise ConfigError(
            f"trainer.beta is {args.beta}, no scale of a reward: at 0 nothing has a gradient, and below it the rejected answer "
            "is preferred. Give a positive number; 0.1 is usual."
        )
    if not all(0 < weight < math.inf for weight in args.loss_weights or ()):
        raise ConfigError(
            f"trainer.loss_weights is {args.loss_weights}; a weight is a positive number, and below 0 the opposite would be "
            "trained. Take a loss that is not wanted off trainer.loss_type."
        )
    if not 0 <= args.label_smoothing < 0.5:
        raise ConfigError(
            f"trainer.label_smoothing is {args.label_smoothing}; it is the share of wrong labels, from 0 to below 0.5: at a half "
            "the labels say nothing (`robust` divides by 0), above it they say the opposite."
        )


def needs_reference(losses: Sequence[Weighted], loss_types: Sequence[str]) -> bool:
    """Whether any term of a run reads reference log-probs."""
    return any(
        not set(loss_types) <= REFERENCE_FREE if entry.name == "text" else entry.term.needs_reference
        for entry in losses
    )


def reading_rejected(losses: Sequence[Weighted], loss_types: Sequence[str]) -> list[str]:
    """Names of the losses that depend on the rejected answer."""
    return [
        entry.name
        for entry in losses
        if not (entry.name == "text" and set(loss_types) == {"sft"})
        and any(VIEWS[view].answer == "rejected" for view in entry.term.views)
    ]


def coupled(losses: Sequence[Weighted], loss_types: Sequence[str]) -> list[str]:
    """Names of the losses in which rows of a batch depend on each other."""
    return [
        name
        for entry in losses
        for name in (
            sorted(set(loss_types) & COUPLED) if entry.name == "text" else [entry.name] * (not entry.term.per_row)
        )
    ]

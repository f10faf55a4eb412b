"""From a batch to scores: one forward pass over all views, whatever its layout, and what it says of each view's answers.

Legend of shapes: `B` rows, `N` labels of all answers of a batch, `A` tokens of the longest answer of a side, `V` entries of
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from prefalign.losses import VIEWS, Scores

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
"""Per-token outputs of TRL's fused head that its loss and metrics read."""


def run(model: Any, batch: Mapping[str, Any], *, full_logits: bool = False) -> dict[str, torch.Tensor]:
    """One forward pass over all views of a batch.

    Args:
        model: a model wrapped by `forward.share`, inside whatever trains it in several processes.
        batch: from `PreferenceCollator`.
        full_logits: return the logits too.

    Returns:
        The head's fields (`FIELDS`), (N,) each, and with `full_logits` `logits` (N, V).
    """
    extra = {"dummy": batch["dummy"]} if "dummy" in batch else {}
    if "packed" in batch:
        outputs = model(packed=batch["packed"], full_logits=full_logits, **extra)
        if not full_logits:
            return {name: outputs[name][0] for name in FIELDS if outputs.get(name) is not None}
        return _from_logits(outputs.logits[0], batch["packed"]["layout"].labels)
    plain = {key: value for key, value in batch["plain"].items() if key != "completion_mask"}
    mask = batch["plain"]["completion_mask"][:, 1:].bool()
    if full_logits:
        logits = model(**plain, use_cache=False, **extra).logits[:, :-1]
        return _from_logits(logits[mask], plain["input_ids"][:, 1:][mask])
    labels = plain["input_ids"].masked_fill(batch["plain"]["completion_mask"] == 0, -100)
    outputs = model(**plain, labels=labels, use_cache=False, fused_lm_head=True, **extra)
    return {name: outputs[name][mask] for name in FIELDS if outputs.get(name) is not None}


def view_scores(
    batch: Mapping[str, Any],
    views: Sequence[str],
    policy: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor] | None,
    *,
    logits: Collection[str] = (),
) -> dict[str, Scores]:
    """What policy and reference say of each view.

    Args:
        batch: from `PreferenceCollator`.
        views: names of the views.
        policy: what `run` returned for the policy.
        reference: the same for the reference; None: take what the batch brings from a cache, if it does.
        logits: views whose full logits are wanted.
    """
    scores = {}
    for view in views:
        answers, index = batch["answers"][VIEWS[view].answer], batch["index"][view]
        mask = answers["mask"]
        entry = Scores(_spread(policy["log_probs"], mask, index), mask, answers["ids"])
        if reference is not None:
            entry.ref_logps = _spread(reference["log_probs"], mask, index)
        elif "reference" in batch:
            entry.ref_logps = batch["reference"][view]
        if view in logits:
            entry.logits = _spread(policy["logits"], mask, index)
            entry.ref_logits = None if reference is None else _spread(reference["logits"], mask, index)
        scores[view] = entry
    return scores


def has_pictures(batch: Mapping[str, Any]) -> bool:
    """Whether a collated batch holds any picture."""
    return bool(batch["packed"]["vision"]) if "packed" in batch else "pixel_values" in batch["plain"]


def tokens_in(batch: Mapping[str, Any]) -> int:
    """Tokens that a forward pass over a collated batch takes, padding included."""
    return int((batch["packed"]["tokens"] if "packed" in batch else batch["plain"])["input_ids"].numel())


def _spread(values: torch.Tensor, mask: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Values of labels, (N,) or (N, V), at their places in (B, A) or (B, A, V); 0 elsewhere."""
    empty = values.new_zeros((*mask.shape, *values.shape[1:]))
    where = mask if values.ndim == 1 else mask[..., None].expand_as(empty)
    return empty.masked_scatter(where, values[index])


def _from_logits(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The head's fields from full logits (N, V), as `ChunkedLogProbFunction` defines them."""
    logits = logits.float()
    all_logps = logits.log_softmax(dim=-1)
    with torch.no_grad():
        rest = {
            "entropy": -(all_logps.exp() * all_logps).sum(dim=-1),
            "mean_logits": logits.mean(dim=-1),
            "is_top1": logits.argmax(dim=-1) == labels,
            "log_sum_sq_probs": (2 * all_logps).logsumexp(dim=-1),
        }
    return {"log_probs": all_logps.gather(1, labels[:, None])[:, 0], **rest, "logits": logits}

"""Scores of views for the tests of the preference terms: by hand, at random, with padding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from prefalign.losses import VIEWS, Scores, Weighted

VOCABULARY = 7


def by_hand(logps: Sequence[float], ref_logps: Sequence[float], ids: Sequence[int] | None = None) -> Scores:
    """One row whose tokens all count."""
    tokens = list(range(1, len(logps) + 1)) if ids is None else list(ids)
    return Scores(
        logps=torch.tensor([logps], dtype=torch.float32).requires_grad_(),
        mask=torch.ones(1, len(logps), dtype=torch.bool),
        ids=torch.tensor([tokens]),
        ref_logps=torch.tensor([ref_logps], dtype=torch.float32),
    )


def at_random(
    entry: Weighted, lengths: dict[str, Sequence[int]], *, seed: int, reference: str = "other"
) -> dict[str, Scores]:
    """What a term is given for answers of these lengths: log-probs that belong to random logits, leaves of the graph.

    Args:
        entry: the term.
        lengths: tokens of each row's answer, by answer side.
        seed: of everything drawn.
        reference: `other` model, or the `same` as the policy.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = {}
    for answer in ("chosen", "rejected"):
        mask = torch.arange(max(lengths[answer])) < torch.tensor(lengths[answer])[:, None]
        sides[answer] = mask, torch.randint(1, VOCABULARY, mask.shape, generator=generator) * mask
    found = {}
    for view in entry.term.views:
        mask, ids = sides[VIEWS[view].answer]
        draws = [torch.randn(*mask.shape, VOCABULARY, generator=generator) for _ in range(2)]
        logits, ref_logits = draws if reference == "other" else (draws[0], draws[0].clone())
        logps, ref_logps = (
            each.log_softmax(2).gather(2, ids[..., None]).squeeze(2) * mask for each in (logits, ref_logits)
        )
        found[view] = Scores(logps.requires_grad_(), mask, ids, ref_logps)
        if view in entry.term.logits:
            found[view].logits, found[view].ref_logits = logits.requires_grad_(), ref_logits
        if not entry.term.needs_reference:
            found[view].ref_logps = None
    return found


def padded(scores: dict[str, Scores], columns: int) -> dict[str, Scores]:
    """The same with more padding, and with numbers that are none wherever logits are not to be looked at."""
    found = {}
    for view, side in scores.items():
        rows = len(side.ids)
        mask = torch.cat([side.mask, torch.zeros(rows, columns, dtype=torch.bool)], dim=1)
        wide = replace(side, mask=mask, ids=torch.cat([side.ids, torch.zeros(rows, columns, dtype=torch.long)], dim=1))
        wide.logps = torch.cat([side.logps.detach(), torch.zeros(rows, columns)], dim=1).requires_grad_()
        if side.ref_logps is not None:
            wide.ref_logps = torch.cat([side.ref_logps, torch.zeros(rows, columns)], dim=1)
        for name in ("logits", "ref_logits"):
            if getattr(side, name) is not None:
                garbage = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(VOCABULARY)[:VOCABULARY]
                logits = torch.cat([getattr(side, name).detach(), garbage.expand(rows, columns, -1)], dim=1).clone()
                logits[~mask] = garbage
                setattr(wide, name, logits.requires_grad_(name == "logits"))
        found[view] = wide
    return found


def gradients(entry: Weighted, scores: dict[str, Scores]) -> dict[tuple[str, str], torch.Tensor | None]:
    """Gradient of the summed loss, by view and by `logps` or `logits`; None where nothing flows."""
    losses, _ = entry.term.loss(scores)
    leaves = {(view, "logps"): side.logps for view, side in scores.items()}
    leaves |= {(view, "logits"): side.logits for view, side in scores.items() if side.logits is not None}
    found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def pick(rng: random.Random, rows: int, longest: int) -> dict[str, list[int]]:
    """Lengths of the answers of some rows."""
    return {answer: [rng.randint(1, longest) for _ in range(rows)] for answer in ("chosen", "rejected")}

"""Does the model look? The same questions under the true picture, another one, a spoilt one, or none.

    drop D_c = Acc(true) - Acc(c)          R_c = D_c / (Acc(true) - chance), undefined when the divisor is below 2 points
    flip rate: parsed answers that change  follow rate: answers that agree with the truth of the picture shown instead
    d(y) = (log p(y | I, x) - log p(y | I_c, x)) / |y|     y: the gold reply, end of turn included

Source: the spec's section 8 (MMStar's multimodal gain is the drop of condition `none`; mDPO, arXiv 2406.11839, for d(y)).
Between two runs, the difference of the summed log-prob drop is mDPO's visual preference margin with the other run as reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefalign.evals import Item, Prediction, Scored, attributes, reply_status, yesno
from prefalign.evidence import unusable
from prefalign.images import open_image
from prefalign.records import Message, message_text, placeholder_count

if TYPE_CHECKING:
    from PIL import Image

CONDITIONS = ("blank", "noise", "mismatched", "none")
LEAST_ABOVE_CHANCE = 0.02
_BLOCK = 1200
_SAME_QUESTION_SAME_LABEL, _UNKNOWN_LABEL, _SAME_GROUP, _OTHER_NUMBER = 4, 2, 100, 1000


@dataclass(frozen=True)
class Variant:
    """An item under one condition (`true` or one of `CONDITIONS`).

    Attributes:
        donor: whose picture is shown (`mismatched`).
        gold_logprob: whether the log-prob of the gold reply is measured too.
    """

    item: Item
    condition: str = "true"
    donor: Item | None = None
    gold_logprob: bool = False

    @property
    def eval(self) -> str:
        return self.item.eval if self.condition == "true" else "reliance"

    @property
    def id(self) -> str:
        return self.item.id if self.condition == "true" else f"{self.item.eval}/{self.item.id}@{self.condition}"

    def messages(self) -> list[Message]:
        """The conversation; `none` takes the placeholders out."""
        if self.condition != "none":
            return self.item.messages
        return [
            {**turn, "content": [block for block in turn["content"] if block["type"] != "image"]}
            for turn in self.item.messages
        ]

    def pictures(self, *, seed: int = 0, noise_step: int = 500) -> list[Image.Image]:
        """Decoded pictures as shown. Size stays that of the true picture, so that the number of image tokens does."""
        true = [open_image(image) for image in self.item.images]
        if self.condition == "true":
            return true
        if self.condition == "none":
            return []
        if self.condition != "mismatched":
            return unusable(
                true,
                "blank" if self.condition == "blank" else "noise",
                identity=self.id,
                seed=seed,
                noise_step=noise_step,
            )
        assert self.donor is not None
        shown = [open_image(image) for image in self.donor.images]
        return [
            other.resize(own.size) if other.size != own.size else other for own, other in zip(true, shown, strict=True)
        ]


def variants(items: Sequence[Item], conditions: Sequence[str], *, seed: int = 0) -> list[Variant]:
    """Every item under every condition but `true`, with the gold reply's log-prob measured.

    Raises:
        ValueError: for an unknown condition.
    """
    unknown = sorted(set(conditions) - set(CONDITIONS))
    if unknown:
        raise ValueError(
            f"unknown condition {unknown[0]!r}: the probe knows {', '.join(CONDITIONS)} (the true picture is always asked)."
        )
    others = donors(items, seed=seed) if "mismatched" in conditions else {}
    found = []
    for item in items:
        for condition in conditions:
            donor = others.get((item.eval, item.id))
            if condition != "mismatched" or donor is not None:
                found.append(Variant(item, condition, donor if condition == "mismatched" else None, gold_logprob=True))
    return found


def donors(items: Sequence[Item], *, seed: int = 0) -> dict[tuple[str, str], Item]:
    """Whose picture each item is shown instead of its own: a fixed derangement, each picture used once.

    Best is an item with the same question and another label, so that the truth of the picture shown is known and differs;
    else one of another group. An item for which only its own group is left gets none. Neither the order of items nor the
    process changes the result (`scipy.optimize.linear_sum_assignment`, ties broken by the seed).

    Returns:
        (eval, id) -> donor.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    ordered = sorted(items, key=lambda item: (placeholder_count(item.messages), _question(item), _shuffled(item, seed)))
    blocks = max(1, round(len(ordered) / _BLOCK))
    found = {}
    for number in range(blocks):
        block = ordered[len(ordered) * number // blocks : len(ordered) * (number + 1) // blocks]
        group, question, label, pictures = (
            np.unique(np.array(values, dtype=str), return_inverse=True)[1]
            for values in (
                [item.group for item in block],
                [_question(item) for item in block],
                [f"{item.eval} {item.label}" for item in block],
                [str(len(item.images)) for item in block],
            )
        )
        same = question[:, None] == question
        cost = np.where(same, np.where(label[:, None] == label, _SAME_QUESTION_SAME_LABEL, 0), _UNKNOWN_LABEL).astype(
            np.float64
        )
        cost += np.where(group[:, None] == group, _SAME_GROUP, 0) + np.where(
            pictures[:, None] == pictures, 0, _OTHER_NUMBER
        )
        cost += np.random.default_rng(seed).random(cost.shape) * 0.5
        for one, other in zip(*linear_sum_assignment(cost), strict=True):
            if cost[one, other] < _SAME_GROUP:
                found[block[one].eval, block[one].id] = block[other]
    return found


def score(item: Item, replies: Mapping[str, Prediction], labels: Mapping[tuple[str, str], str] | None = None) -> Scored:
    """Compare the replies to one item across conditions.

    Args:
        item: a yes/no or short-answer item.
        replies: condition to reply; `true` and any of `CONDITIONS`.
        labels: (question, id of the shown item) to the gold label, for the follow rate.

    Returns:
        numbers: `posed_c` (1) for each condition asked; for those with a reply under it and under `true` also `asked_c`,
        `true_c`, `correct_c`, `drop_c`, `flip_c`, `above_chance_c`; for known labels `followable` and `follow`; with log-probs
        `scored_c`, `logprob_drop_c` (per token), `logprob_sum_drop_c` and `lower_c` (1 if the gold reply became less likely).
    """
    true = replies.get("true")
    status = reply_status(true)
    numbers = {f"posed_{condition}": 1.0 for condition in replies if condition != "true"}
    if status is not None or true is None:
        return Scored("reliance", f"{item.eval}/{item.id}", item.group, status or "error", item.kind, None, numbers)
    seen = _score(item, true)
    chance = 0.5 if item.eval == "yesno" else 1 / len(item.choices) if item.choices else 0.0
    for condition, reply in replies.items():
        if condition == "true":
            continue
        if true.logp is not None and reply.logp is not None and true.logp_tokens:
            drop = true.logp - reply.logp
            numbers |= {f"scored_{condition}": 1.0, f"logprob_sum_drop_{condition}": drop,
                        f"logprob_drop_{condition}": drop / true.logp_tokens, f"lower_{condition}": float(drop > 0)}  # fmt: skip
        if reply_status(reply) is not None:
            continue
        other = _score(item, reply)
        right, still = seen.numbers["correct"], other.numbers["correct"]
        numbers |= {
            f"asked_{condition}": 1.0,
            f"true_{condition}": right,
            f"correct_{condition}": still,
            f"drop_{condition}": right - still,
            f"above_chance_{condition}": right - chance,
            f"flip_{condition}": float(seen.parsed != other.parsed),
        }
        shown = (labels or {}).get((_question(item), reply.shown)) if condition == "mismatched" else None
        if shown is not None:
            agrees = other.parsed == (shown if item.eval == "yesno" else attributes.parse(shown, item.choices))
            numbers |= {"followable": 1.0, "follow": float(agrees)}
    complete = any(name.startswith("asked_") for name in numbers)
    return Scored(
        "reliance", f"{item.eval}/{item.id}", item.group, "ok" if complete else "error", item.kind, seen.parsed, numbers
    )


def shown_labels(items: Sequence[Item]) -> dict[tuple[str, str], str]:
    """(question, item id) to gold label: the truth of a question on every picture it was asked about."""
    return {(_question(item), item.id): item.label for item in items if item.label is not None}


def _score(item: Item, reply: Prediction) -> Scored:
    return yesno.score(item, reply) if item.eval == "yesno" else attributes.score(item, reply)


def _question(item: Item) -> str:
    return message_text(item.messages)


def _shuffled(item: Item, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{item.eval}:{item.id}".encode()).hexdigest()

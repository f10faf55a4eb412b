"""What fits: the largest batch and the largest picture for a given memory, each found by planning for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

from prefalign import families
from prefalign.training.documents import PromptTooLong
from prefalign.training.sized_rows import RowSize

if TYPE_CHECKING:
    from prefalign.training.planner import Planner

STEP, LARGEST = 28, 8192
"""Steps in which pictures are tried, and the largest, in pixels."""
SIDE = 672
"""Width and height, in pixels, of pictures that are tried for their number."""
COUNTED = 32
"""Batches of up to three times this are counted. What a larger one takes is taken to lie on the line through twice and three
times it: by then the head works in chunks of full length, unless answers are shorter than this, and a row costs less than one of
the first."""
MOST = 1024
"""Most pairs in a batch, and most pictures in a prompt, that are tried."""


@dataclass
class Fit:
    """The largest of something that fits.

    Attributes:
        what: `batch`, `picture` or `pictures`.
        size: pairs in a batch of one device, pixels of a side, or pictures in a prompt; 0: not even the smallest.
        tokens: image tokens of a row.
        need: memory at that size, in bytes; at size 0, of the smallest.
        limit: why it ends there: the device's `memory`, the `context` of the model, the `processor`, which makes larger pictures
            smaller, or the `search`.
    """

    what: Literal["batch", "picture", "pictures"]
    size: int
    tokens: int
    need: float
    limit: Literal["memory", "context", "processor", "search"]


def largest_batch(planner: Planner) -> Fit:
    """Largest batch of one device whose rows are as long as the longest looked at."""
    needs: dict[int, float] = {}

    def counted(number: int) -> float:
        if number not in needs:
            needs[number] = planner.need(planner.setup, planner.longest(number)).total
        return needs[number]

    def need(number: int) -> float:
        if number > 3 * COUNTED:
            one, two = counted(2 * COUNTED), counted(3 * COUNTED)
            needs[number] = two + (two - one) * (number - 3 * COUNTED) / COUNTED
        return counted(number)

    size, limit = largest(need, planner.memory, MOST)
    return Fit("batch", size, planner.tokens(planner.rows[-1]).pictures, needs[max(size, 1)], limit)


def largest_picture(planner: Planner) -> Fit:
    """Largest square picture that fits when all rows of a batch hold such ones beside texts as long as the longest row's.

    For a family that makes the same number of tokens of every picture: the most pictures in a prompt.
    """
    row = planner.rows[-1]
    longest = planner.tokens(row)
    text = RowSize(longest.prompt, longest.answer, max(1, len(row["images"])), STEP)

    @cache
    def tokens(steps: int) -> float:
        try:
            return planner.tokens(planner.sized(replace(text, side=steps * STEP), 1)[0]).pictures
        except PromptTooLong:
            return math.inf

    most = 1
    while 2 * most * STEP <= LARGEST and tokens(2 * most) > tokens(most):
        most *= 2
    if most == 1:
        # small ones are read fast; a picture of no more tokens is the same to the model
        side = STEP if tokens(SIDE // STEP) == tokens(1) else SIDE
        return _search(planner, "pictures", lambda number: replace(text, pictures=number, side=side), MOST)
    ends = 2 * most * STEP <= LARGEST and math.isfinite(tokens(most))
    if ends:  # the smallest that makes as many tokens
        smaller, _ = largest(tokens, tokens(most) - 1, most - 1)
        most = smaller + 1
    found = _search(planner, "picture", lambda steps: replace(text, side=steps * STEP), most)
    found.size *= STEP
    if ends and found.limit == "search":
        found.limit = "processor"
    return found


def _search(planner: Planner, what: Literal["picture", "pictures"], sized: Callable[[int], RowSize], most: int) -> Fit:
    context = families.context_length(planner.model_config) or math.inf
    seen: dict[int, tuple[int, float]] = {}

    @cache
    def length(number: int) -> float:
        try:
            return planner.tokens(planner.sized(sized(number), 1)[0]).longest
        except PromptTooLong:
            return math.inf

    # a length is measured faster than a need is counted
    room, _ = largest(length, context, most)

    def need(number: int) -> float:
        rows = planner.sized(sized(number), planner.batch)
        seen[number] = planner.tokens(rows[0]).pictures, planner.need(planner.setup, rows).total
        return seen[number][1]

    size, limit = largest(need, planner.memory, max(room, 1))
    if room < most and size >= room:
        size, limit = room, "context"
    return Fit(what, size, *seen[max(size, 1)], limit)


def largest(
    need: Callable[[int], float], memory: float, most: int
) -> tuple[int, Literal["memory", "context", "search"]]:
    """The largest number whose need does not exceed the memory, and what stops a larger one.

    Needs grow with the number, and about in a straight line, along which the next number to try is guessed. The number found and
    the one after it have both been tried.

    Args:
        need: memory for a number; infinite where it is no question of memory.
        memory: what there is.
        most: where the search ends.

    Returns:
        A number from 0 (not even 1) to `most`, and `memory`, `context` (the next need is infinite) or `search`.
    """
    low, high, number = 0, most + 1, 1
    known: dict[int, float] = {}
    while high - low > 1:
        known[number] = need(number)
        low, high = (number, high) if known[number] <= memory else (low, number)
        finite = sorted(key for key, value in known.items() if math.isfinite(value))
        near = sorted(sorted(finite, key=lambda key: abs(known[key] - memory))[:2])
        if len(near) < 2 or known[near[0]] >= known[near[1]]:
            guess = 2 * number if high > most else (low + high) // 2
        else:
            one, two = near
            guess = math.floor(one + (memory - known[one]) * (two - one) / (known[two] - known[one]))
        if high <= most and math.isinf(known[high]):
            guess = (low + high) // 2
        number = min(max(guess, low + 1), high - 1)
    if high > most:
        return low, "search"
    return low, "memory" if math.isfinite(known[high]) else "context"

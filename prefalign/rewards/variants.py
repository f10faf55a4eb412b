"""Pairs as a reward sees them: as they are, without their sources, in another order, with an object that is not there.

Legend of shapes: `N` pairs of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prefalign.config import ConfigError
from prefalign.corruption import blank
from prefalign.images import encode_png, open_image, sha256
from prefalign.records import Pair, message_text, row_seed
from prefalign.rewards.reward import Response, Reward

if TYPE_CHECKING:
    from prefalign.images import EncodedImage
    from prefalign.records import Message

VARIANTS = ("own", "without_facts", "shuffled_picture", "blank_picture")


@dataclass(frozen=True)
class Graded:
    """One pair as a reward sees it; NaN: no score, or nothing to compare.

    Attributes:
        id: the pair's.
        picture: what pairs are grouped by in intervals.
        scores: score of the chosen and of the rejected answer.
        lengths: words of the chosen and of the rejected answer.
        margins: by variant (`VARIANTS`), score of the chosen answer minus that of the rejected one.
        swapped: the margin with the two answers handed over in the other order.
        noticed: score of the chosen answer with a true object added minus that with an absent one added.
        logit: the margin as the reward itself gives it, before weight and scale; NaN where it is a sum of several scores.
    """

    id: str
    picture: str
    scores: tuple[float, float]
    lengths: tuple[int, int]
    margins: dict[str, float]
    swapped: float
    noticed: float
    logit: float


def grade_block(
    block: Sequence[Pair],
    scored: Callable[[list[Response]], list[float]],
    factor: Callable[[Response], float],
    sentence: str,
    seed: int,
) -> list[Graded]:
    """Score the pairs of a block in every variant.

    Args:
        block: pairs; the picture of another row and the names of absent objects come from it.
        scored: gives the scores of responses.
        factor: what the margin of a response is multiplied by (`logit_factor`).
        sentence: how an object is written behind an answer.
        seed: draws names of objects, by the pair's id.
    """
    digests = ["".join(sha256(image) for image in pair.images) for pair in block]
    chosen = [_response(pair, pair.chosen) for pair in block]
    rejected = [_response(pair, pair.rejected) for pair in block]
    scores = (scored(chosen), scored(rejected))
    together = scored([side for pair in zip(rejected, chosen, strict=True) for side in pair])
    swapped = [after - before for before, after in zip(together[::2], together[1::2], strict=True)]
    margins = {"own": [good - bad for good, bad in zip(*scores, strict=True)]}
    others = _partners(block, digests)
    variants: dict[str, Callable[[int, Response], Response | None]] = {
        "without_facts": lambda row, response: replace(response, facts={}) if response.facts else None,
        "shuffled_picture": lambda row, response: (
            None if others[row] is None else replace(response, images=block[others[row]].images)  # type: ignore[index]
        ),
        "blank_picture": lambda row, response: (
            replace(response, images=[_blanked(image) for image in block[row].images]) if block[row].images else None
        ),
    }
    for name, change in variants.items():
        margins[name] = _compared(scored, [(change(r, chosen[r]), change(r, rejected[r])) for r in range(len(block))])
    noticed = _compared(
        scored,
        [_with_objects(pair, response, block, sentence, seed) for pair, response in zip(block, chosen, strict=True)],
    )
    return [
        Graded(
            id=pair.id,
            picture=digests[row],
            scores=(scores[0][row], scores[1][row]),
            lengths=(len(chosen[row].text.split()), len(rejected[row].text.split())),
            margins={name: values[row] for name, values in margins.items()},
            swapped=swapped[row],
            noticed=noticed[row],
            logit=margins["own"][row] * factor(chosen[row]),
        )
        for row, pair in enumerate(block)
    ]


def _compared(
    scored: Callable[[list[Response]], list[float]], sides: Sequence[tuple[Response | None, Response | None]]
) -> list[float]:
    """Score of the first minus that of the second; NaN where there is nothing to compare."""
    known = [row for row, (first, second) in enumerate(sides) if first is not None and second is not None]
    values = scored([side for row in known for side in sides[row] if side is not None]) if known else []
    found = [math.nan] * len(sides)
    for number, row in enumerate(known):
        found[row] = values[2 * number] - values[2 * number + 1]
    return found


def _response(pair: Pair, answer: Sequence[Message]) -> Response:
    return Response(pair.id, pair.images, pair.prompt, message_text(answer), answer=pair.answer, facts=pair.facts)


def _partners(block: Sequence[Pair], digests: Sequence[str]) -> list[int | None]:
    """For each row the next row of the block with as many pictures, and others; None: there is none."""
    partners: list[int | None] = []
    for row, pair in enumerate(block):
        later = [(row + step) % len(block) for step in range(1, len(block))]
        fitting = (other for other in later if pair.images and len(block[other].images) == len(pair.images))
        partners.append(next((other for other in fitting if digests[other] != digests[row]), None))
    return partners


def _with_objects(
    pair: Pair, chosen: Response, block: Sequence[Pair], sentence: str, seed: int
) -> tuple[Response | None, Response | None]:
    """The chosen answer with an object that is there written behind it, and with one that is not."""
    import random

    present = _object_names(pair)
    absent = sorted({name for other in block for name in _object_names(other)} - set(present))
    if not present or not absent:
        return None, None
    rng = random.Random(row_seed(seed, pair.id))
    names = (rng.choice(present), rng.choice(absent))
    true, false = (replace(chosen, text=chosen.text + sentence.format(name=name)) for name in names)
    return true, false


def _object_names(pair: Pair) -> list[str]:
    things = pair.facts.get("objects") or []
    return sorted({thing["name"] if isinstance(thing, Mapping) else str(thing) for thing in things})


def _blanked(image: EncodedImage) -> EncodedImage:
    return encode_png(blank(open_image(image), colour="black"))


def scored_by(reward: Reward, responses: list[Response], term: str) -> list[float]:
    """One term of a reward's scores.

    Raises:
        ConfigError: the reward gives no such term.
    """
    scores = reward.score(responses)
    if term not in scores:
        raise ConfigError(f"term: the rewards give {', '.join(scores)}, and none called {term!r}. Name one of these.")
    return [float(value) for value in scores[term].tolist()]


def logit_factor(reward: Reward, term: str, response: Response) -> float:
    """What a margin is multiplied by to be one of raw scores (log-odds, of a model trained by ranking).

    Args:
        reward: what is graded; a reward that is no weighted list is taken as raw.
        term: which of its scores.
        response: whose scale counts.

    Returns:
        NaN for a sum of several scores, which are no log-odds together.
    """
    from prefalign.rewards import Combined
    from prefalign.rewards.learned import LearnedReward

    if not isinstance(reward, Combined):
        return 1.0
    label, _, name = term.rpartition("/")
    entries = [entry for entry in reward.entries if term == "total" or entry.name == label]
    if len(entries) > 1:
        return math.nan
    (entry,) = entries
    if not isinstance(entry.reward, LearnedReward):
        weight = 1.0 if term != "total" else entry.weight
        return 1 / weight if isinstance(weight, (int, float)) else math.nan
    if entry.reward.weights is not None:
        return math.nan
    if term != "total":
        return entry.reward.deviation(response, name)
    names = [attribute for attribute in entry.reward.model.attributes if entry.weight_of(attribute)]
    return entry.reward.deviation(response, names[0]) / entry.weight_of(names[0]) if len(names) == 1 else math.nan


def blocks(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    """Pairs in lists of `size`, the last one shorter."""
    block: list[Pair] = []
    for pair in pairs:
        block.append(pair)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block

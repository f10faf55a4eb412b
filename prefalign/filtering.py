"""Which pairs are worth training on: the filters' settings, and the decision for a whole set from numbers alone.

Each filter is off unless it is given. They are asked in this order, and the first that objects names the reason:

    near_identical      the two answers are (nearly) the same text on the same picture
    length_ratio        one answer is many times longer than the other
    no_margin, low_margin   the scorer's margin is missing or too small
    benchmark_picture   a picture is on a list of benchmark pictures (exact, perceptual, or by file name)
    duplicate_pair      the same texts on the same (or a re-encoded) picture as in an earlier pair
    text_only           the chosen answer is preferred without a usable picture too, so nothing about the picture is learnt
    weak_evidence       the verifier does not find more in the picture for the chosen answer than for the rejected one
    claims_not_worse    the rejected answer does not claim more that the verifier cannot find in the picture
    picture_limit       enough pairs of this picture are kept already
    length_balance      dropped so that chosen answers are not longer than rejected ones

Where one pair of several can stay, it is the first in input order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefalign.duplicates import Names, leaders
from prefalign.evidence import ClaimConfig


@dataclass
class TextFilter:
    """Near-identical answers.

    Attributes:
        max_similarity: highest similarity of chosen and rejected (rapidfuzz, 1: equal but for case, blanks and punctuation).
    """

    max_similarity: float = 0.98


@dataclass
class LengthFilter:
    """How long answers may be beside each other.

    Attributes:
        unit: what lengths are counted in.
        max_ratio: longer over shorter answer; 0: any.
        balance: `mean`: drop the fewest pairs so that the mean of length(chosen) - length(rejected) is within the tolerance,
            those with the largest difference on the offending side first. `median`: drop pairs of the commoner sign, largest
            difference first, until neither sign is commoner. `off`: drop none.
        tolerance: of the mean, in units.
    """

    unit: Literal["words", "characters"] = "words"
    max_ratio: float = 0.0
    balance: Literal["off", "mean", "median"] = "off"
    tolerance: float = 0.5


@dataclass
class MarginFilter:
    """Pairs whose scorer was not sure.

    Attributes:
        floor: smallest `margin` that is kept.
        missing: what happens to pairs without a margin.
    """

    floor: float = 0.0
    missing: Literal["drop", "keep"] = "drop"


@dataclass
class ContaminationFilter:
    """Benchmark pictures.

    Attributes:
        lists: folders of pictures and lists, as `duplicates.read_picture_lists` reads them.
        names: file names that are compared: `coco` knows COCO's numbers, `all` compares any name, `none` only contents.
        max_distance: bits of the perceptual hash that may differ; -1 compares no perceptual hashes.
        on_overlap: `drop` the pairs, or `stop` the run.
    """

    lists: list[Path]
    names: Names = "coco"
    max_distance: int = 4
    on_overlap: Literal["drop", "stop"] = "drop"


@dataclass
class DuplicateFilter:
    """Pairs and pictures that come again.

    Attributes:
        max_distance: bits of the perceptual hash by which two pictures may differ and count as one; -1: only equal bytes are one.
        per_picture: most pairs kept of one picture; 0: any number. Several questions about one picture are usual, so later
            pairs of a picture are no duplicates in themselves.
    """

    max_distance: int = 4
    per_picture: int = 0


@dataclass
class RelianceFilter:
    """Pairs that can be told apart without looking.

    Attributes:
        ceiling: largest log p(chosen) - log p(rejected) without a usable picture that is kept.
        average: `token` divides each by its number of tokens, `sum` does not.
    """

    ceiling: float = 0.0
    average: Literal["token", "sum"] = "token"


@dataclass
class EvidenceFilter:
    """Pairs in which the picture does not speak for the chosen answer.

    Attributes:
        floor: smallest evidence(chosen) - evidence(rejected) that is kept, in nats.
        prior_weight: w of `prefalign.evidence`. 1: what the picture adds; 0: plain likelihood, which likes common phrases.
    """

    floor: float = 0.0
    prior_weight: float = 0.5


@dataclass
class ClaimFilter(ClaimConfig):
    """Pairs whose rejected answer claims no more that is not there.

    Attributes:
        floor: smallest expected number by which unsupported claims of the rejected answer exceed those of the chosen one.
    """

    floor: float = 0.5


@dataclass
class Filters:
    """All filters; the first that objects names the reason, in the order of the module's docstring.

    Attributes:
        texts: near-identical answers.
        length: ratio and balance of lengths.
        margin: the scorer's margin.
        contamination: benchmark pictures.
        duplicates: repeated pairs and pictures.
        reliance: pairs that are decided without the picture.
        evidence: pairs that the picture does not decide.
        claims: pairs whose answers differ in no claim that the picture decides.
    """

    texts: TextFilter | None = None
    length: LengthFilter | None = None
    margin: MarginFilter | None = None
    contamination: ContaminationFilter | None = None
    duplicates: DuplicateFilter | None = None
    reliance: RelianceFilter | None = None
    evidence: EvidenceFilter | None = None
    claims: ClaimFilter | None = None

    @property
    def score(self) -> bool:
        """Whether a filter needs a model."""
        return any(part is not None for part in (self.reliance, self.evidence, self.claims))

    @property
    def perceptual(self) -> bool:
        """Whether a filter compares perceptual hashes."""
        return any(part is not None and part.max_distance >= 0 for part in (self.contamination, self.duplicates))


@dataclass(slots=True)
class Measured:
    """What is known of a pair when decisions are taken: numbers and digests, no picture and no text.

    Attributes:
        id: the pair's id.
        verdict: reason, and message if it goes to quarantine, for a pair that cannot be used whatever the filters.
        similarity: of the two answers; None for a pair of pictures with one text.
        difference: length(chosen) - length(rejected).
        ratio: longer over shorter.
        margin: the scorer's.
        benchmark: whether one of its pictures is on a list.
        text: digest of question and answers.
        pictures: digest of each picture (those of `rejected_images` last), and perceptual hash.
        images: how many of them are `images`.
        text_preference: of chosen without the picture.
        evidence: evidence margin.
        claims: expected unsupported claims of the rejected answer less those of the chosen one.
    """

    id: str
    verdict: tuple[str, str | None] | None = None
    similarity: float | None = None
    difference: int = 0
    ratio: float = 1.0
    margin: float | None = None
    benchmark: bool = False
    text: str = ""
    pictures: list[tuple[str, int | None]] = field(default_factory=list)
    images: int = 0
    text_preference: float | None = None
    evidence: float | None = None
    claims: float | None = None


def decide_unscored(rows: Sequence[Measured], filters: Filters) -> list[str | None]:
    """Why each pair goes before a verifier is asked, or None: the filters down to `duplicate_pair`, in their order.

    Args:
        rows: measures in input order.
        filters: which are asked.
    """
    reasons: list[str | None] = [
        row.verdict[0] if row.verdict is not None else _own_reason(row, filters) for row in rows
    ]
    if filters.duplicates is not None:
        groups = _picture_groups(rows, filters.duplicates)
        met: set[tuple[str, tuple[int, ...]]] = set()
        for number, row in enumerate(rows):
            key = (row.text, groups[number])
            if reasons[number] is None and key in met:
                reasons[number] = "duplicate_pair"
            elif reasons[number] is None:
                met.add(key)
    return reasons


def decide(rows: Sequence[Measured], filters: Filters, unscored: Sequence[str | None]) -> list[str | None]:
    """Why each pair goes, or None: what was decided before scoring stays, then the verifier and the filters after it.

    A duplicate of a pair that then could not be scored stays a duplicate: it was not scored either.

    Args:
        rows: measures in input order, with the verifier's numbers or verdict for each pair that had no reason to go.
        filters: which are asked.
        unscored: the reasons of `decide_unscored`.
    """
    reasons = list(unscored)
    for number in _left(unscored):
        row = rows[number]
        reasons[number] = row.verdict[0] if row.verdict is not None else _verifier_reason(row, filters)
    if filters.duplicates is not None and filters.duplicates.per_picture:
        groups = _picture_groups(rows, filters.duplicates)
        kept: Counter[tuple[int, ...]] = Counter()
        for number in _left(reasons):
            shown = groups[number][: rows[number].images]
            if not shown:
                continue
            kept[shown] += 1
            if kept[shown] > filters.duplicates.per_picture:
                reasons[number] = "picture_limit"
    if filters.length is not None and filters.length.balance != "off":
        left = _left(reasons)
        for place in unbalanced([rows[number].difference for number in left], filters.length):
            reasons[left[place]] = "length_balance"
    return reasons


def _left(reasons: Sequence[str | None]) -> list[int]:
    return [number for number, reason in enumerate(reasons) if reason is None]


def _own_reason(row: Measured, filters: Filters) -> str | None:
    if filters.texts is not None and row.similarity is not None and row.similarity > filters.texts.max_similarity:
        return "near_identical"
    if filters.length is not None and filters.length.max_ratio and row.ratio > filters.length.max_ratio:
        return "length_ratio"
    if filters.margin is not None and row.margin is None and filters.margin.missing == "drop":
        return "no_margin"
    if filters.margin is not None and row.margin is not None and row.margin < filters.margin.floor:
        return "low_margin"
    return "benchmark_picture" if row.benchmark else None


def _verifier_reason(row: Measured, filters: Filters) -> str | None:
    likelihoods = filters.reliance is not None or filters.evidence is not None
    assert not likelihoods or row.evidence is not None, f"pair {row.id} reached the verifier's filters without a score"
    one_text = row.similarity is None  # such a pair has no claims to count and no preference among its texts
    assert filters.claims is None or one_text or row.claims is not None, (
        f"pair {row.id} reached `claims` without a count"
    )
    if (
        filters.reliance is not None
        and row.text_preference is not None
        and row.text_preference > filters.reliance.ceiling
    ):
        return "text_only"
    if filters.evidence is not None and row.evidence is not None and row.evidence < filters.evidence.floor:
        return "weak_evidence"
    if filters.claims is not None and row.claims is not None and row.claims < filters.claims.floor:
        return "claims_not_worse"
    return None


def _picture_groups(rows: Sequence[Measured], duplicates: DuplicateFilter | None) -> list[tuple[int, ...]]:
    """The pictures of each pair by the number of the first picture that is like them."""
    pictures = list(dict.fromkeys(picture for row in rows for picture in row.pictures))
    places = {picture: number for number, picture in enumerate(pictures)}
    if duplicates is not None and duplicates.max_distance >= 0:
        hashes = [found for _, found in pictures if found is not None]
        assert len(hashes) == len(pictures)
        places = dict(zip(pictures, leaders(hashes, duplicates.max_distance), strict=True))
    return [tuple(places[picture] for picture in row.pictures) for row in rows]


def unbalanced(differences: Sequence[int], rule: LengthFilter) -> list[int]:
    """Which of N pairs to drop so that neither side is longer, as few as the rule allows.

    Args:
        differences: length(chosen) - length(rejected) of each, in input order. Of equal ones the last is dropped first.
        rule: `mean` takes the largest differences of the longer side until the mean is within the tolerance (no other choice
            of as many brings it lower); `median` takes them until no more pairs are longer on that side than on the other.
    """
    total, count = sum(differences), len(differences)
    sign = 1 if (total if rule.balance == "mean" else sum((d > 0) - (d < 0) for d in differences)) > 0 else -1
    excess = sign * sum((d > 0) - (d < 0) for d in differences)
    dropped: list[int] = []
    for number in sorted(range(len(differences)), key=lambda n: (-sign * differences[n], -n)):
        if rule.balance == "mean" and sign * total <= rule.tolerance * count:
            break
        if rule.balance == "median" and excess <= 0:
            break
        dropped.append(number)
        total, count, excess = total - differences[number], count - 1, excess - 1
    return sorted(dropped)


def summary(rows: Sequence[Measured], reasons: Sequence[str | None]) -> dict[str, Any]:
    """What the filters did, for `filters.json`: counts by reason, mean length difference before and after, share of scored pairs
    that are preferred without the picture."""
    left = _left(reasons)
    asked = [row.text_preference for row in rows if row.text_preference is not None]

    def mean(values: Sequence[float]) -> float | None:
        return round(sum(values) / len(values), 4) if values else None

    return {
        "pairs": len(rows),
        "kept": len(left),
        "dropped": dict(sorted(Counter(reason for reason in reasons if reason is not None).items())),
        "length_difference_before": mean([row.difference for row in rows]),
        "length_difference_after": mean([rows[number].difference for number in left]),
        "preferred_without_the_picture": mean([float(value > 0) for value in asked]),
    }

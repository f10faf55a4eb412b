"""From scores to training sets: which answers of one prompt make a pair, which is imitated, and under which attributes.

Source: Li, Lin and Pei, "Multi-modal Preference Alignment Remedies Regression of Visual Instruction Tuning on Language
Model", arXiv 2402.10884: the gap rule of the released data notebook, rejection sampling, SteerLM's attribute line; what makes a
usable pair after Amirloo et al., arXiv 2407.02477. Differs from the release: besides a random rejected answer the worst or the
nearest one can be taken, attributes may stand in the system turn, and attribute lines that leak into answers can be stripped
(`AskedAttributes`).

Answers are `Candidates.responses` (mappings with `text`, `scores`, `finish_reason`); qualities are one number for each, None
where a score is missing. Everything is a pure function of its arguments; draws come from a `random.Random` or a seed.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from prefalign.records import Message, assistant_message, row_seed, user_message
from prefalign.text import normalised

HELPSTEER: dict[str, float] = {"helpfulness": 1.0, "correctness": 1.0, "coherence": 1.0}
"""Attributes that the published quality adds up, 0 to 4 each; complexity and verbosity do not count."""

Qualities = Sequence[float | None]
Rejected = Literal["random", "worst", "nearest"]

_LEAKED = re.compile(r"<attributes>(?:[^<]*</attributes>|[^<\n]*\n?)|</attributes>")
_AGAIN = "Rate of that answer: {before}\nAnswer again, so that the rate is: {after}"
_AGAIN_AS_TOLD = "Rate of that answer: {before}\nAnswer again, so that the rate is what was asked for at the start."
_UNFINISHED = ("length", "max_tokens", "content_filter", "abort", "error")


@dataclass(frozen=True)
class Choice:
    """A pair among the answers of one prompt, by their numbers.

    Attributes:
        chosen: number of the better answer.
        rejected: number of the worse one.
        margin: quality of chosen less that of rejected.
    """

    chosen: int
    rejected: int
    margin: float


def quality(response: Mapping[str, Any], weights: Mapping[str, float] = HELPSTEER) -> float | None:
    """Weighted sum of an answer's scores; None if one of them is missing.

    Args:
        response: an answer with `scores` by name.
        weights: by name of the score; the published one adds up three attributes to 0..12.
    """
    scores = response.get("scores") or {}
    terms = []
    for name, weight in weights.items():
        value = scores.get(name)
        if value is None:
            return None
        terms.append(weight * value)
    return math.fsum(terms)


def is_finished(response: Mapping[str, Any]) -> bool:
    """Whether a generator ended an answer by itself.

    Args:
        response: an answer; `finished` decides where it is given (rows that were scored elsewhere), else `finish_reason`, in the
            words of our engines, OpenAI's and vLLM's servers; with neither it counts as finished.

    Example:
        >>> [is_finished(one) for one in ({}, {"finish_reason": "length"}, {"finish_reason": "stop", "finished": False})]
        [True, False, False]
    """
    told = response.get("finished")
    return told if isinstance(told, bool) else response.get("finish_reason") not in _UNFINISHED


def unusable(responses: Sequence[Mapping[str, Any]], *, unfinished: bool = False) -> list[str | None]:
    """Why each answer of a prompt can be neither chosen nor rejected, or None: it is `empty`, `unfinished` or a `duplicate`.

    Args:
        responses: the answers; of equal ones (up to case, blanks and punctuation) the first is kept.
        unfinished: keep answers that ran into the length limit or were cut off otherwise (`is_finished`).
    """
    seen: set[str] = set()
    found: list[str | None] = []
    for response in responses:
        text = normalised(response["text"])
        if not response["text"].strip():
            found.append("empty")
        elif not unfinished and not is_finished(response):
            found.append("unfinished")
        elif text in seen:
            found.append("duplicate")
        else:
            seen.add(text)
            found.append(None)
    return found


def edit_similarity(one: str, other: str) -> float:
    """1 less the Levenshtein distance over the longer length, of texts without case, blanks and punctuation."""
    from rapidfuzz.distance import Levenshtein

    return float(Levenshtein.normalized_similarity(normalised(one), normalised(other)))


def make_dpo_pairs(
    qualities: Qualities,
    rng: random.Random,
    *,
    min_gap: float = 2.0,
    rejected: Rejected = "random",
    per_prompt: int = 1,
    group_size: int | None = 4,
    allowed: Collection[int] | None = None,
) -> list[Choice]:
    """Pairs of one prompt by the gap rule.

    Chosen is the answer of the highest quality (the first on ties), rejected one that is worse by `min_gap` at least. With
    several pairs of one prompt the chosen answer is the same and the rejected ones differ.

    Args:
        qualities: one for each answer, None: not graded.
        rng: draws the rejected answer (`random`).
        min_gap: least difference of a pair; 2 of 12 takes the grader's noise out. Above 0: no pair of equals.
        rejected: `random` among those below the gap (published), `worst` for the largest margin, `nearest` for the hardest pair.
        per_prompt: most pairs of one prompt.
        group_size: answers that must be graded, else there is no pair (4, as published); None: any two.
        allowed: numbers of the answers that may be used; None: all.

    Returns:
        Pairs in the order of the policy; none if the prompt gives none.

    Raises:
        ValueError: for a gap that is not above 0 or fewer than one pair.
    """
    if not min_gap > 0:
        raise ValueError(
            f"min_gap is {min_gap}: answers of equal quality would become pairs, whose order says nothing. Give a gap above 0 "
            "in the unit of the quality (2 of 12, as published)."
        )
    if per_prompt < 1:
        raise ValueError(f"per_prompt is {per_prompt}, so no prompt would give a pair. Give 1 or more.")
    graded = {number: value for number, value in enumerate(qualities) if value is not None}
    if len(graded) < 2 or (group_size is not None and len(graded) != group_size):
        return []
    usable = _allowed(graded, allowed)
    if not usable:
        return []
    best = max(usable, key=lambda number: (usable[number], -number))
    worse = [number for number in usable if _gap(usable, best, number) >= min_gap]
    if rejected == "random":
        rng.shuffle(worse)
    else:
        sign = 1 if rejected == "worst" else -1
        worse.sort(key=lambda number: (sign * usable[number], number))
    return [Choice(best, number, _gap(usable, best, number)) for number in worse[:per_prompt]]


def ranked_pairs(qualities: Qualities, *, min_gap: float = 2.0, allowed: Collection[int] | None = None) -> list[Choice]:
    """Every two answers of a prompt that differ by `min_gap` at least, the best chosen ones first.

    Comparisons for a reward model, up to n (n - 1) / 2 of each prompt.

    Args:
        qualities: one for each answer, None: not graded (in no pair).
        min_gap: least difference, above 0.
        allowed: numbers of the answers that may be used; None: all.
    """
    if not min_gap > 0:
        raise ValueError(f"min_gap is {min_gap}: equals would be ranked by their number. Give a gap above 0.")
    values = _allowed({number: value for number, value in enumerate(qualities) if value is not None}, allowed)
    order = sorted(values, key=lambda number: (-values[number], number))
    return [
        Choice(one, other, _gap(values, one, other))
        for one, other in itertools.combinations(order, 2)
        if _gap(values, one, other) >= min_gap
    ]


def make_rs(
    qualities: Qualities, *, k: int = 1, min_quality: float | None = None, allowed: Collection[int] | None = None
) -> list[int]:
    """Best of n, for SFT (rejection sampling): numbers of the `k` best answers, the best first, on ties the first.

    Args:
        qualities: one for each answer, None: not graded.
        k: answers that are kept.
        min_quality: least quality; None: any. The release kept perfect answers only (12).
        allowed: numbers of the answers that may be used; None: all.
    """
    values = _allowed({number: value for number, value in enumerate(qualities) if value is not None}, allowed)
    if min_quality is not None:
        values = {number: value for number, value in values.items() if value >= min_quality}
    return sorted(values, key=lambda number: (-values[number], number))[:k]


def best_of_n_kl(n: int) -> float:
    """Upper bound on the KL divergence (nats) of best-of-n from the sampler: log n - (n - 1) / n; 0.64 for n = 4.

    Exact where no two answers tie (Beirami et al., arXiv 2401.01879). Compare rejection sampling with DPO at equal KL by it.
    """
    if n < 1:
        raise ValueError(f"n is {n}; best-of-n draws at least one answer.")
    return math.log(n) - (n - 1) / n


def bare_scores(scores: Mapping[str, float | None]) -> dict[str, float]:
    """Scores without missing ones, by the name of the term alone where no two rewards have a term of that name.

    Example:
        >>> bare_scores({"judge/helpfulness": 4.0, "total": 4.0, "a/value": 1.0, "b/value": 2.0, "c/gone": None})
        {'helpfulness': 4.0, 'total': 4.0, 'a/value': 1.0, 'b/value': 2.0}
    """
    names = Counter(name.rsplit("/", 1)[-1] for name in scores)
    return {
        bare if names[bare := name.rsplit("/", 1)[-1]] == 1 else name: value
        for name, value in scores.items()
        if value is not None
    }


def attribute_line(scores: Mapping[str, float | None], names: Sequence[str], *, decimals: int = 0) -> str | None:
    """SteerLM's line of attributes; None if a score is missing.

    Args:
        scores: by name.
        names: which, in this order. A name is written without what stands before its last `/`, the label of its reward.
        decimals: digits that are kept; 0 for the integers 0 to 4 of a judge.

    Example:
        >>> attribute_line({"judge/helpfulness": 4.0, "judge/verbosity": 2.0}, ["judge/helpfulness", "judge/verbosity"])
        '<attributes>helpfulness:4,verbosity:2</attributes>'
    """
    parts = []
    for name in names:
        value = scores.get(name)
        if value is None:
            return None
        parts.append(f"{name.rsplit('/', 1)[-1]}:{round(value, decimals) + 0.0:.{decimals}f}")
    return f"<attributes>{','.join(parts)}</attributes>"


def with_attributes(messages: Sequence[Message], line: str, place: Literal["user", "system"] = "user") -> list[Message]:
    """A conversation that asks for an answer of these attributes; at inference give the line of what is wanted.

    Args:
        messages: conversation up to the user turn; left as it is.
        line: from `attribute_line`.
        place: at the end of the last user turn, as published, or at the end of the system turn (one is made if there is none),
            from where it leaks less into answers.
    """
    block = {"type": "text", "text": line}
    if place == "user":
        last = messages[-1]
        return [*messages[:-1], {**last, "content": [*last["content"], {**block, "text": f"\n{line}"}]}]
    if messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": [*first["content"], {**block, "text": f"\n{line}"}]}, *messages[1:]]
    return [{"role": "system", "content": [block]}, *messages]


def keeps_attributes(seed: int, row: str, drop_prob: float = 0.1) -> bool:
    """Whether a row carries its attributes: it loses them with `drop_prob`, so that the model also answers without."""
    return random.Random(row_seed(seed, f"{row}/attributes")).random() >= drop_prob


def make_steerlm(
    messages: Sequence[Message],
    response: Mapping[str, Any],
    line: str | None,
    *,
    place: Literal["user", "system"] = "user",
) -> list[Message]:
    """A conversation to imitate whose prompt tells the attributes of its answer; `line` None leaves them out."""
    asked = list(messages) if line is None else with_attributes(messages, line, place)
    return [*asked, assistant_message(response["text"])]


def make_two_turn(
    messages: Sequence[Message],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    lines: tuple[str, str],
    *,
    place: Literal["user", "system"] = "user",
) -> list[Message]:
    """The two-turn variant: an answer, how it was rated, how the next one shall be rated, and an answer that is.

    The loss belongs on the last turn alone, as `recipes/train_sft.py` puts it: the first answer may be the worse one.

    Args:
        messages: conversation up to the user turn.
        before: the first answer.
        after: the answer to imitate.
        lines: attribute lines of the two.
        place: where the line of what is wanted stands: in the second user turn, or at the end of the system turn.
    """
    asked = [*messages, assistant_message(before["text"])]
    if place == "user":
        asked.append(user_message(_AGAIN.format(before=lines[0], after=lines[1])))
    else:
        asked = with_attributes([*asked, user_message(_AGAIN_AS_TOLD.format(before=lines[0]))], lines[1], "system")
    return [*asked, assistant_message(after["text"])]


def strip_attributes(text: str) -> str:
    """An answer without attribute lines that leaked into it, whole or cut off; for evaluation of models trained on them.

    Example:
        >>> strip_attributes("A cat.\\n<attributes>helpfulness:4</attributes>")
        'A cat.'
    """
    found = _LEAKED.sub("", text)
    return found if found == text else found.strip()


@dataclass
class AskedAttributes:
    """What a model trained on SteerLM rows is asked for, written as its training wrote it, and what is done about leaks.

    Attributes:
        values: value of each score, by the names and in the order of the rows' `steerlm.attributes` (published: helpfulness,
            correctness and coherence 4, complexity and verbosity 2); empty: the question is left as it is, as in the rows that
            lost their line (`drop_prob`).
        decimals: `steerlm.decimals` of the rows.
        place: `steerlm.place` of the rows.
        strip: take attribute lines out of answers (`strip_attributes`) before they are scored or shown again.
    """

    values: dict[str, float] = field(default_factory=dict)
    decimals: int = 0
    place: Literal["user", "system"] = "user"
    strip: bool = True

    def __post_init__(self) -> None:
        if not self.values and not self.strip:
            raise ValueError(
                "attributes: no value is asked for and nothing is stripped, so the section does nothing. Give `values`, as in "
                "{judge/helpfulness: 4}, or leave the section out."
            )
        if wrong := [name for name, value in self.values.items() if not math.isfinite(value)]:
            raise ValueError(
                f"attributes.values: {wrong[0]} is {self.values[wrong[0]]}, which no row of training has. Give a grade (0 to 4)."
            )

    def asked(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation that asks for these values: that of a row of `make_steerlm` without its answer."""
        line = attribute_line(self.values, list(self.values), decimals=self.decimals) if self.values else None
        return list(messages) if line is None else with_attributes(messages, line, self.place)

    def stripped(self, answer: str) -> str:
        """An answer without leaked lines, or as it is if they stay."""
        return strip_attributes(answer) if self.strip else answer


def _gap(values: Mapping[int, float], one: int, other: int) -> float:
    """Difference of two qualities; grades in steps of a tenth meet their gap although binary fractions do not."""
    return round(values[one] - values[other], 9)


def _allowed(values: Mapping[int, float], allowed: Collection[int] | None) -> dict[int, float]:
    return {number: value for number, value in values.items() if allowed is None or number in allowed}

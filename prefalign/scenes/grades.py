"""Grades of captions by the truth of their scene: what a judge of five attributes would say if it never erred.

Whole numbers from 0 to 4, as in `prefalign.judge.RUBRIC`; a reward for `datagen/quality_pairs.py`: the tiny model cannot judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefalign.scenes import language
from prefalign.scenes.language import Mention

if TYPE_CHECKING:
    from prefalign.rewards import Response


def five(responses: Sequence[Response]) -> dict[str, list[float | None]]:
    """Grades for `{name: function, function: "prefalign.scenes.grades:five", label: judge}`.

    Args:
        responses: captions, with `language.facts` of their scene.

    Returns:
        By attribute, one grade for each response; None where the facts list no objects.
    """
    graded = [grades(one.text, one.facts) if "objects" in one.facts else None for one in responses]
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {name: [None if one is None else one[name] for one in graded] for name in names}


def grades(text: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """The five grades of one caption.

    helpfulness: share of the objects that are named with nothing false about them; correctness: 4 less one for each mention
    that is false in any detail (0 where nothing is named); coherence: share of the sentences that this world can say, and that
    are said once; complexity: share of colour, size and place that mentions give; verbosity: mentions for each object, two
    make 4.

    False mentions are counted because `prefalign.judge` prefers the answer that says less that is false. By their share a long
    caption with three of them passes a short one with two.

    Args:
        text: the caption.
        facts: `language.facts` of the scene.
    """
    things: Sequence[Mapping[str, Any]] = facts["objects"]
    mentions = [mention for mention in language.parse(text) if not mention.negated]
    fitting = [[number for number, thing in enumerate(things) if _fits(mention, thing)] for mention in mentions]
    said = language.sentences(text)
    sound = {sentence for sentence in said if language.sentence_parses(sentence)}
    details = sum(value is not None for mention in mentions for value in (mention.colour, mention.size, mention.place))
    return {
        "helpfulness": _grade(len({number for some in fitting for number in some}), len(things)),
        "correctness": float(max(0, 4 - sum(not some for some in fitting))) if mentions else 0.0,
        "coherence": _grade(len(sound), len(said)),
        "complexity": _grade(details, 3 * len(mentions)),
        "verbosity": _grade(min(len(mentions), 2 * len(things)), 2 * len(things)),
    }


def _fits(mention: Mention, thing: Mapping[str, Any]) -> bool:
    said = {"shape": mention.shape, "colour": mention.colour, "size": mention.size, "place": mention.place}
    return all(value in (None, thing[name]) for name, value in said.items())


def _grade(part: int, whole: int) -> float:
    return float((8 * part + whole) // (2 * whole)) if whole else 0.0  # halves go up: 1 of 8 is 1, 5 of 8 is 3

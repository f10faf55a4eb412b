"""What captions of a model say that the true caption contradicts, statement by statement: rejected answers, and DNLI's figures.

Source: KnowAda (arXiv 2411.09018; code moranyanuka/KnowAda, `eval/generate_propositions.py`) labels the statements of generated
captions to measure them. That the most contradicted one makes a rejected answer is ours.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from prefalign.engines import Completion, Engine, Request, Sampling
from prefalign.knowledge import Annotator, Captioned, Reply
from prefalign.records import Message, row_seed
from prefalign.text import same_answer

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class RejectedConfig:
    """Where rejected answers come from; not in the paper.

    Attributes:
        original_share: share of rows whose rejected answer is the caption before it was adapted. That is true, so it teaches
            caution and not correctness: keep it small. Rows whose caption did not change, or not in that length, take the other.
        num_generations: captions of its own that the model is asked for otherwise; the most contradicted one is rejected.
        length_ratio: words of rejected over chosen, least and most; further apart, DPO learns length.
        sampling: how its own captions are drawn.
    """

    original_share: float = 0.1
    num_generations: int = 4
    length_ratio: tuple[float, float] = (0.67, 1.5)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not 0 <= self.original_share <= 1:
            raise ValueError(f"original_share is {self.original_share}; it is a share of rows from 0 to 1 (0.1).")
        if self.num_generations < 1:
            raise ValueError(f"rejected.num_generations is {self.num_generations}; give 1 or more (4).")
        least, most = self.length_ratio
        if not 0 < least <= 1 <= most:
            raise ValueError(
                f"length_ratio is {list(self.length_ratio)}, and captions of equal length are outside of it. Give a least ratio "
                "up to 1 and a most from 1 on ([0.67, 1.5])."
            )

    def matched(self, chosen: str, rejected: str) -> bool:
        """Whether two captions are near enough in length."""
        least, most = self.length_ratio
        return least <= len(rejected.split()) / len(chosen.split()) <= most


@dataclass(frozen=True)
class Chosen:
    """A caption that is to have a rejected one beside it.

    Attributes:
        captioned: the picture's caption as it was.
        text: the chosen caption.
        messages: what is asked for a caption.
        images: the decoded pictures.
    """

    captioned: Captioned
    text: str
    messages: list[Message]
    images: list[Image.Image]


@dataclass(frozen=True)
class Rejected:
    """A rejected answer: `own` caption of the model or the `original`, and how many of its statements are contradicted."""

    text: str
    kind: Literal["own", "original"]
    contradicted: int = 0
    statements: int = 0


def rejected_captions(
    rows: Sequence[Chosen], engine: Engine, annotator: Annotator, config: RejectedConfig, *, seed: int
) -> list[Rejected | Reply | None]:
    """What is rejected beside each chosen caption.

    Args:
        rows: the chosen captions.
        engine: the model to be trained, which is asked for captions of its own.
        annotator: who labels their statements.
        config: which captions can be rejected.
        seed: seed of the stage; with a row's id it decides every draw.

    Returns:
        One for each row: the rejected caption; a request that failed (`generation_failed`): the caption or the labels that it
        would have brought might have been the most contradicted; or None, if no caption of the model's own has the chosen one's
        length and a contradicted statement.
    """
    found: dict[str, Rejected] = {}
    failed: dict[str, Reply] = {}
    others = []
    for row in rows:
        name, original = row.captioned.id, row.captioned.caption
        drawn = random.Random(row_seed(seed, f"{name}/rejected")).random() < config.original_share
        if drawn and not same_answer(original, row.text) and config.matched(row.text, original):
            found[name] = Rejected(original, "original")
        else:
            others.append(row)
    requests = [
        Request(f"{row.captioned.id}/own/{number}", row.messages, row.images, seed=seed)
        for row in others
        for number in range(config.num_generations)
    ]
    said = iter(engine.generate(requests, config.sampling) if requests else [])
    candidates = []
    for row in others:
        own = [next(said) for _ in range(config.num_generations)]
        lost = [completion.error for completion in own if completion.finish_reason == "error"]
        if lost:
            failed[row.captioned.id] = _failed(f"a caption of its own: {lost[-1]}")
        else:
            candidates += [(row.captioned, text) for text in _finished(row, own, config)]
    labelled = annotator.statements(candidates) if candidates else []
    for (captioned, text), labels in zip(candidates, labelled, strict=True):
        if isinstance(labels, Reply):
            if labels.refused == "generation_failed":
                failed[captioned.id] = _failed(f"the statements of a caption: {labels.message}")
            continue
        one = Rejected(text, "own", labels.count("contradicted"), len(labels))
        if one.contradicted > (found[captioned.id].contradicted if captioned.id in found else 0):
            found[captioned.id] = one
    return [failed.get(row.captioned.id, found.get(row.captioned.id)) for row in rows]


def _finished(row: Chosen, said: Sequence[Completion], config: RejectedConfig) -> list[str]:
    """The finished captions among a model's own that have the chosen one's length, each once."""
    texts = [completion.text.strip() for completion in said if completion.finish_reason == "stop"]
    return [text for text in dict.fromkeys(texts) if text and config.matched(row.text, text)]


def _failed(message: str) -> Reply:
    return Reply(refused="generation_failed", message=message)


def dnli(labels: Sequence[str], reference_statements: int) -> dict[str, float]:
    """KnowAda's figures of one caption: what its reference bears out and contradicts. Over images their mean is taken.

    The released code takes the judge's own sums; here labels are counted.

    Args:
        labels: of each of its statements: `entailed`, `contradicted` or `neutral`; at least one.
        reference_statements: how many statements the reference makes, at least one.

    Returns:
        Entailed and contradicted statements, over all of its own (`descriptiveness_precision`, `contradiction_precision`) and
        over those of the reference (`..._recall`, which can exceed 1: these are the caption's statements, too).

    Example:
        >>> dnli(["entailed", "entailed", "neutral", "contradicted"], 5)["descriptiveness_recall"]
        0.4
    """
    return {
        f"{name}_{figure}": labels.count(label) / whole
        for name, label in (("descriptiveness", "entailed"), ("contradiction", "contradicted"))
        for figure, whole in (("precision", len(labels)), ("recall", reference_statements))
    }

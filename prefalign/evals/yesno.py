"""POPE-style yes/no questions: five figures, two readings of a reply.

Source: Li et al. 2023, arXiv 2305.10355; AoiDragon/POPE `evaluate.py`. The released code (`strict` here) cuts the reply at the
first full stop and calls it "no" if a word is exactly `No`, `no` or `not`, and "yes" otherwise, so that silence and "maybe"
are "yes". `robust` goes by the yes or no that a reply begins with ("Yes, a person with no hat."), whatever its case; without
one by the first sentence that has a yes/no word, "n't" included. Where that says both, or that it does not know, and where
no sentence says either, the reply is unparsed: it counts as wrong, and as neither a yes nor a no.
Figures with 0/0 are undefined, where the released code stops.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefalign.evals import Item, Prediction, Scored, reply_status
from prefalign.evals.reading import read_jsonl, read_once
from prefalign.images import EncodedImage
from prefalign.records import user_message
from prefalign.text import split_sentences

_YES = {"yes", "yeah", "yep"}
_NO = {"no", "not", "nope", "cannot", "none"}
_LEADING = re.compile(
    r"[^a-z]*(?:(?P<yes>yes|yeah|yep)|(?P<no>no|nope))\b(?!\s*(?:/|,?\s*(?:or|and)\b)\s*(?:yes|no)\b)"
)
_UNSURE = re.compile(r"\b(?:not|cannot|\w+n't) (?:\w+ ){0,2}?(?:know|sure|certain|tell|say|clear|determine|possible)\b")


def strict(text: str) -> str:
    """`yes` or `no` as the released code reads a reply; there is no third answer."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def robust(text: str) -> str | None:
    """`yes`, `no`, or None for a reply that says both at once, neither, or that it does not know."""
    plain = text.lower().replace("\u2019", "'")
    leading = _LEADING.match(plain)
    if leading:
        return leading.lastgroup
    for sentence in split_sentences(plain):
        words = re.findall(r"[a-z]+(?:'[a-z]+)?", sentence)
        said_yes = any(word in _YES for word in words)
        said_no = any(word in _NO or word.endswith("n't") for word in words)
        if _UNSURE.search(sentence) or (said_yes and said_no):
            return None
        if said_yes or said_no:
            return "yes" if said_yes else "no"
    return None


def score(item: Item, prediction: Prediction | None) -> Scored:
    """Compare a reply with `item.label` in both readings.

    Returns:
        numbers: `asked` (1), `words`, `gold_yes`; `correct`, `tp`, `fp`, `fn`, `tn`, `said_yes`, and these with `strict_` before.

    Raises:
        ValueError: if the item's label is neither `yes` nor `no`.
    """
    if item.label not in ("yes", "no"):
        raise ValueError(f"item {item.id} has label {item.label!r}; a yes/no question is answered with `yes` or `no`.")
    status = reply_status(prediction)
    if status is not None or prediction is None:
        return Scored("yesno", item.id, item.group, status or "error", item.kind)
    parsed = robust(prediction.text)
    numbers = {"asked": 1.0, "words": float(len(prediction.text.split())), "gold_yes": float(item.label == "yes")}
    numbers |= _cells(parsed, item.label)
    numbers |= {f"strict_{name}": value for name, value in _cells(strict(prediction.text), item.label).items()}
    return Scored("yesno", item.id, item.group, "unparsed" if parsed is None else "ok", item.kind, parsed, numbers)


def _cells(said: str | None, gold: str) -> dict[str, float]:
    return {
        "correct": float(said == gold),
        "tp": float(said == gold == "yes"),
        "fp": float(said == "yes" != gold),
        "tn": float(said == gold == "no"),
        "fn": float(gold == "yes" != said),
        "said_yes": float(said == "yes"),
    }


def figures(rows: Sequence[Mapping[str, float]], *, reading: str = "") -> dict[str, float | None]:
    """POPE's five figures over scored items' `numbers`; `reading="strict_"` takes the released code's reading."""
    total = {name: sum(row[reading + name] for row in rows) for name in ("correct", "tp", "fp", "fn", "said_yes")}
    asked = sum(row["asked"] for row in rows)
    above, below = 2 * total["tp"], 2 * total["tp"] + total["fp"] + total["fn"]
    return {
        "accuracy": _ratio(total["correct"], asked),
        "precision": _ratio(total["tp"], total["tp"] + total["fp"]),
        "recall": _ratio(total["tp"], total["tp"] + total["fn"]),
        "f1": _ratio(above, below),
        "yes_ratio": _ratio(total["said_yes"], asked),
    }


def constant_answers(labels: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The five figures of always saying yes and of always saying no: what a model must beat."""
    found = {}
    for constant in ("yes", "no"):
        found[f"always_{constant}"] = figures([{"asked": 1.0, **_cells(constant, label)} for label in labels])
    return found


def read_pope(
    questions: str | Path,
    images: str | Path | None = None,
    *,
    suffix: str = "",
    known: dict[Path, EncodedImage] | None = None,
) -> list[Item]:
    """Read POPE questions: JSONL of `{"question_id", "image", "text", "label"}`.

    Args:
        questions: a split's file; its name goes into the item ids, so that several splits can be asked together.
        images: folder of the pictures; None to score saved answers without them.
        suffix: appended to each question, e.g. `Please answer yes or no.`; the benchmark itself asks the bare question.
        known: pictures read before, by path; those read now are added, so that questions and splits share them.

    Raises:
        ValueError: for a file without rows, or a line without these keys (`question_id` may be missing).
    """
    path = Path(questions)
    known = {} if known is None else known
    items = []
    for number, row in read_jsonl(path, required=("image", "text", "label")):
        pictures = [read_once(Path(images) / row["image"], known)] if images is not None else []
        items.append(
            Item(
                eval="yesno",
                id=f"{path.stem}-{row.get('question_id', number)}",
                group=str(row["image"]),
                images=pictures,
                messages=[user_message(f"{row['text']} {suffix}".strip(), images=1)],
                label=str(row["label"]).lower(),
                answer=str(row["label"]).capitalize(),
                kind=path.stem,
            )
        )
    return items


def read_pope_answers(path: str | Path, items: Sequence[Item]) -> list[Prediction]:
    """Read POPE answers: JSONL of `{"question", "answer"}` in the order of the questions (the format has no id).

    Raises:
        ValueError: if number, order or wording do not match the questions: every later answer would score another question.
    """
    rows = read_jsonl(path, required=("answer",))
    if len(rows) != len(items):
        raise ValueError(
            f"{Path(path).name} has {len(rows)} answers for {len(items)} questions; they are joined by order, so the "
            "numbers must agree. Give the answers of this very split."
        )
    predictions = []
    for (number, row), item in zip(rows, items, strict=True):
        asked = item.messages[-1]["content"][-1]["text"]
        given = str(row.get("question", asked)).strip()
        if not (given.startswith(asked) or asked.startswith(given)):
            raise ValueError(
                f"{Path(path).name} line {number} answers {given!r}, but the question in its place is {asked!r}: "
                "the order differs. Give the answers in the order of the questions."
            )
        predictions.append(Prediction("yesno", item.id, item.group, asked, str(row["answer"])))
    return predictions


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None

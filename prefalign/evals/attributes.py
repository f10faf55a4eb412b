"""Short answers (colour, count, place, ...): right if they equal the gold answer after normalisation.

Case, punctuation, articles, number words and spelling variants do not count. With a closed set of `choices` a whole sentence
is understood too ("The ring is blue."): it is right if it names exactly one choice, the gold one; longer names go first, so
"top left" is not "left".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from prefalign.english import ARTICLES, NUMBERS
from prefalign.evals import Item, Prediction, Scored, reply_status
from prefalign.evals.reading import read_jsonl, read_once
from prefalign.images import EncodedImage
from prefalign.records import user_message

_WORDS = {word: str(number) for number, word in enumerate(NUMBERS)} | {
    "gray": "grey",
    "center": "centre",
    "color": "colour",
}


def normalise(text: str) -> str:
    """Lower case without punctuation and articles; number words as digits, one spelling of grey and centre."""
    words = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+(?:['-][^\W\d_]+)*", text.lower())
    return " ".join(_WORDS.get(word, word) for word in words if word not in ARTICLES)


def parse(text: str, choices: Sequence[str] = ()) -> str | None:
    """The answer that a reply gives, normalised; None if it names none or several of the choices.

    Args:
        choices: the answers that can be given; empty: the whole reply is the answer.
    """
    plain = normalise(text)
    if not choices:
        return plain or None
    known = {normalise(choice): choice for choice in choices}
    if "0" in known:
        plain = re.sub(r"\b(?:no|none)\b", "0", plain)
    if plain in known:
        return plain
    pattern = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    found = set(re.findall(rf"\b(?:{pattern})\b", plain))
    return found.pop() if len(found) == 1 else None


def score(item: Item, prediction: Prediction | None) -> Scored:
    """Compare a reply with `item.label`.

    Returns:
        numbers: `asked` (1), `words` and `correct`.

    Raises:
        ValueError: if the item has no label, or one that is not among its choices.
    """
    gold = parse(item.label or "", item.choices)
    if gold is None:
        raise ValueError(
            f"item {item.id} has gold answer {item.label!r}, which is not one of {', '.join(item.choices) or 'any words'}; "
            "no reply could be right. Mend the row."
        )
    status = reply_status(prediction)
    if status is not None or prediction is None:
        return Scored("attributes", item.id, item.group, status or "error", item.kind)
    parsed = parse(prediction.text, item.choices)
    numbers = {"asked": 1.0, "words": float(len(prediction.text.split())), "correct": float(parsed == gold)}
    return Scored("attributes", item.id, item.group, "unparsed" if parsed is None else "ok", item.kind, parsed, numbers)


def constant_answers(items: Sequence[Item]) -> dict[str, float]:
    """Accuracy of always giving the most frequent gold answer, by kind."""
    labels: dict[str, list[str | None]] = {}
    for item in items:
        labels.setdefault(item.kind, []).append(parse(item.label or "", item.choices))
    return {kind: max(map(known.count, known)) / len(known) for kind, known in labels.items()}


def read_short(questions: str | Path, images: str | Path | None = None) -> list[Item]:
    """Read short-answer questions: JSONL of `{"id", "image", "question", "answer"}`, optional `kind`, `group`, `choices`.

    Args:
        images: folder of the pictures; None to score saved answers without them.

    Raises:
        ValueError: for a file without rows, a line without these keys, or an id that is there twice.
    """
    path = Path(questions)
    items: dict[str, Item] = {}
    known: dict[Path, EncodedImage] = {}
    for number, row in read_jsonl(path, required=("id", "image", "question", "answer")):
        name = str(row["id"])
        if name in items:
            raise ValueError(
                f"{path.name} line {number} repeats id {name!r}; answers are joined on ids. Make them distinct."
            )
        items[name] = Item(
            eval="attributes",
            id=name,
            group=str(row.get("group", row["image"])),
            images=[read_once(Path(images) / row["image"], known)] if images is not None else [],
            messages=[user_message(row["question"], images=1)],
            label=str(row["answer"]),
            kind=str(row.get("kind", "")),
            choices=tuple(map(str, row.get("choices", ()))),
        )
    return list(items.values())

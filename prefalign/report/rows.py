"""The report of any folder of rows: pairs have a page of their own, candidates, examples and prompts are shown as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefalign.manifest import Manifest
from prefalign.pairing import is_finished
from prefalign.records import Candidates, Example, Message, Pair, Prompt, message_text
from prefalign.report.charts import histogram
from prefalign.report.overview import as_number, described, finished, median_of, percent, plain, problems, sampled
from prefalign.report.page import flattened, thumbnail, write_page
from prefalign.report.pairs import write_pair_report
from prefalign.seen import Spread
from prefalign.shards import read_shards
from prefalign.store import read_records
from prefalign.text import same_answer

AT_ONCE = 6  # responses or turns of a card that are open; the others fold away
NAMES: dict[type, str] = {Candidates: "candidates", Example: "examples", Prompt: "prompts"}
FLAGS = {
    "empty": "an answer without a word",
    "unfinished": "an answer that the generator did not end by itself (finish reason length, error, ...)",
    "score missing": "a response without one of the scores that others of the row have",
    "one answer": "all responses are the same text: nothing to choose between",
    "no answer": "a conversation without an assistant's turn: nothing to imitate",
    "no picture": "nothing to look at",
    "unreadable picture": "cannot be decoded (looked for in the rows shown only)",
}

Row = Candidates | Example | Prompt


@dataclass
class _Said:
    """A turn or response on a card; `finish` is empty where nothing is known of it."""

    name: str
    text: str
    answer: bool = True
    finish: str = ""
    unfinished: bool = False
    scores: list[tuple[str, str]] = field(default_factory=list)

    @property
    def words(self) -> int:
        return len(self.text.split())


@dataclass
class _Statistics:
    rows: int = 0
    pictures: int = 0
    flagged: int = 0
    answers: int = 0
    words: Counter[float] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    finishes: Counter[str] = field(default_factory=Counter)
    scores: dict[str, Spread] = field(default_factory=dict)

    def add(self, row: Row, flags: Sequence[str]) -> None:
        answers = _answers(row)
        self.rows += 1
        self.pictures += len(row.images)
        self.flagged += bool(flags)
        self.flags.update(flags)
        self.answers += len(answers)
        self.words.update(len(text.split()) for text in answers)
        for response in row.responses if isinstance(row, Candidates) else ():
            self.finishes[str(response.get("finish_reason") or "not told")] += 1
            for name, value in (response.get("scores") or {}).items():
                score, figure = self.scores.setdefault(name, Spread()), as_number(value)
                if figure is not None:
                    score.add(figure)


def write_report(folder: Path, output: Path, *, limit: int = 200) -> Path:
    """Write the report of a stage's folder as one HTML file, whatever rows it holds.

    Args:
        folder: folder of pairs, candidates, examples or prompts that a stage wrote.
        output: HTML file to write; a folder gets a `report.html`.
        limit: most rows shown as cards: evenly spaced ones and some flagged ones that these miss; the figures are of all rows.

    Returns:
        The file written.

    Raises:
        ValueError: if `limit` is not positive, the folder has no manifest (names folders inside that have one) or no shards or
            damaged ones, or its rows are of no kind that is known.
    """
    folder, output = Path(folder), Path(output)
    manifest = finished(folder)
    shards = read_shards(folder)
    record = _record_of(folder, shards.columns)
    if record is Pair:
        return write_pair_report(folder, output, limit=limit)
    if limit < 1:
        raise ValueError(f"limit is {limit}; a report shows at least one row. Give --limit 1 or more.")
    stats = _Statistics()
    cards: list[dict[str, Any]] = []
    extra = 0
    for number, (row, flags, shown) in enumerate(sampled(read_records(folder, record), shards.rows, limit, _flags), 1):
        stats.add(row, flags)
        extra += shown == "flagged"
        if shown:
            cards.append(_card(number, row, flags))
    unreadable = [card["flags"] for card in cards if "unreadable picture" in card["flags"]]
    stats.flags["unreadable picture"] = len(unreadable)
    stats.flagged += sum(len(flags) == 1 for flags in unreadable)
    return write_page("rows.html.j2", output, extra=extra, **_overview(folder, manifest, record, stats, cards))


def _record_of(folder: Path, columns: Sequence[str]) -> type[Any]:
    if "rejected" in columns or not columns:  # without shards the page of pairs says what is wrong
        return Pair
    if "messages" not in columns:
        raise ValueError(
            f"the rows of {folder} are no pairs, candidates, examples or prompts (they have {', '.join(columns)}), so there is "
            "no report of them. Give the output folder of a stage."
        )
    if "responses" in columns:
        return Candidates
    return Example if "meta" in columns else Prompt


def _overview(
    folder: Path, manifest: Manifest, record: type, stats: _Statistics, cards: list[dict[str, Any]]
) -> dict[str, Any]:
    named = NAMES[record]
    return {
        **described(folder, manifest),
        "named": named,
        "counted": _counted(record, stats),
        "stats": stats,
        "cards": cards,
        "at_once": AT_ONCE,
        "problems": problems(manifest, stats.rows, named),
        "tiles": _tiles(manifest, named, stats),
        "flags": [
            {"name": name, "meaning": meaning, "rows": stats.flags[name]}
            for name, meaning in FLAGS.items()
            if stats.flags[name]
        ],
        "scores": [
            {"name": name, "missing": stats.answers - score.count,
             "mean": plain(score.mean) if score.count else "none",
             "range": f"{plain(score.least)} to {plain(score.greatest)}" if score.count else "none"}
            for name, score in stats.scores.items()
        ],
        "chart": histogram("Length of the answers", {"answers": stats.words}, x_label="words", whole=True),
        "orders": [("words", "Words")] if stats.answers else [],
    }  # fmt: skip


def _counted(record: type, stats: _Statistics) -> str:
    if record is Candidates:
        return f"{_several(stats.rows, 'prompt')} with {_several(stats.answers, 'response')}"
    return _several(stats.rows, NAMES[record][:-1])


def _several(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' if number != 1 else ''}"


def _tiles(manifest: Manifest, named: str, stats: _Statistics) -> list[dict[str, str]]:
    dropped, answers = sum(manifest.dropped.values()), "Responses" if named == "candidates" else "Answers"
    return [
        {"name": "Rows", "value": f"{stats.rows:,}", "more": f"from {manifest.rows_used:,} of {manifest.rows_in:,} rows"},
        {"name": "Rows dropped", "value": f"{dropped:,}", "more": f"{percent(dropped, manifest.rows_in)} of the rows"},
        {"name": answers, "value": f"{stats.answers:,}", "more": f"{stats.answers / max(stats.rows, 1):.3g} a row"},
        {"name": "Median words", "value": f"{median_of(stats.words):g}", "more": "of an answer"},
        {"name": "Pictures", "value": f"{stats.pictures:,}", "more": f"{stats.pictures / max(stats.rows, 1):.3g} a row"},
        {"name": "Flagged", "value": f"{stats.flagged:,}", "more": f"{percent(stats.flagged, stats.rows)} of the rows"},
    ]  # fmt: skip


def _answers(row: Row) -> list[str]:
    """Responses of candidates, the assistant's turns of an example, the reference answer of a prompt."""
    if isinstance(row, Candidates):
        return [response["text"] for response in row.responses]
    if isinstance(row, Example):
        return [message_text([message]) for message in row.messages if message["role"] == "assistant"]
    return [row.answer] if row.answer is not None else []


def _flags(row: Row) -> list[str]:
    answers, flags = _answers(row), []
    if any(not text.split() for text in answers):
        flags.append("empty")
    if isinstance(row, Candidates):
        if not all(map(is_finished, row.responses)):
            flags.append("unfinished")
        scores = [response.get("scores") or {} for response in row.responses]
        names = {name for given in scores for name in given}
        if any(given.get(name) is None for given in scores for name in names):
            flags.append("score missing")
        if len(answers) > 1 and all(same_answer(answers[0], text) for text in answers[1:]):
            flags.append("one answer")
    if isinstance(row, Example) and not answers:
        flags.append("no answer")
    if not row.images:
        flags.append("no picture")
    return flags


def _card(number: int, row: Row, flags: list[str]) -> dict[str, Any]:
    pictures = [thumbnail(image) for image in row.images]
    if any(not thumb.uri for thumb in pictures):
        flags = [*flags, "unreadable picture"]
    asked, said = _turns(row)
    known = row.meta if isinstance(row, Example) else {"facts": row.facts} if row.facts else {}
    return {
        "number": number,
        "id": row.id,
        "flags": flags,
        "pictures": pictures,
        "asked": [(message["role"], message_text([message])) for message in asked],
        "said": said,
        "words": sum(len(text.split()) for text in _answers(row)),
        "answer": None if isinstance(row, Example) else row.answer,
        "settings": [("id", row.id), *flattened(known)],
    }


def _turns(row: Row) -> tuple[list[Message], list[_Said]]:
    """What stands beside the pictures, and what stands below: an example from its first answer on, responses."""
    if isinstance(row, Candidates):
        return row.messages, [_response(place, response) for place, response in enumerate(row.responses)]
    if isinstance(row, Prompt):
        return row.messages, []
    roles = [message["role"] for message in row.messages]
    first = roles.index("assistant") if "assistant" in roles else len(roles)
    said = [
        _Said(message["role"].capitalize(), message_text([message]), answer=message["role"] == "assistant")
        for message in row.messages[first:]
    ]
    if said and isinstance(row.meta.get("scores"), Mapping):
        said[-1].scores = _scores(row.meta["scores"])
    return row.messages[:first], said


def _response(place: int, response: Mapping[str, Any]) -> _Said:
    finish = str(response.get("finish_reason") or "")
    scores = _scores(response.get("scores") or {})
    return _Said(f"Response {place + 1}", response["text"], True, finish, not is_finished(response), scores)


def _scores(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Scores for a card; names lose what is before the slash where they still differ without it."""
    brief = {name: name.rsplit("/", 1)[-1] for name in scores}
    names = brief if len(set(brief.values())) == len(brief) else {name: name for name in scores}
    return [(names[name], "missing" if value is None else plain(value)) for name, value in scores.items()]

"""The report of a folder of pairs: what was kept and dropped, how long the answers are, and the pairs themselves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefalign.manifest import Manifest
from prefalign.records import Pair, message_text
from prefalign.report.charts import Chart, histogram
from prefalign.report.overview import as_number, described, finished, median_of, percent, plain, problems, sampled
from prefalign.report.page import MINUS, flattened, marked, thumbnail, write_page
from prefalign.shards import read_shards
from prefalign.store import read_records
from prefalign.text import lexical_similarity, same_answer

FEWEST_WORDS = 3
LARGEST_RATIO = 2.0
NEAR_IDENTICAL = 0.97  # of word and word-pair counts; the level above which the released filters drop a pair

FLAGS = {
    "identical": "the same answer on the same picture: no gradient",
    "near-identical": f"answers alike above {NEAR_IDENTICAL} in their words and word pairs",
    "empty": "an answer without a word: trains silence",
    "short": f"an answer of fewer than {FEWEST_WORDS} words",
    "length ratio": f"one answer more than {LARGEST_RATIO:g} times as long as the other: teaches length",
    "no picture": "nothing to look at: trains the language model alone",
    "same rejected picture": "the rejected picture is the picture itself",
    "unreadable picture": "cannot be decoded (looked for in the pairs shown only)",
}
_WORD = re.compile(r"[^\W\d_]+")
_FUNCTION_WORDS = frozenset(
    ("a", "an", "and", "are", "as", "at", "be", "been", "by", "can", "for", "from", "has", "have", "in", "is", "it", "its", "no",
     "not", "of", "on", "or", "that", "the", "their", "there", "these", "this", "to", "was", "were", "which", "while", "who",
     "with", "yes")
)  # fmt: skip


@dataclass
class _Statistics:
    pairs: int = 0
    flagged: int = 0
    words_chosen: Counter[float] = field(default_factory=Counter)
    words_rejected: Counter[float] = field(default_factory=Counter)
    chosen_longer: int = 0
    rejected_longer: int = 0
    similarity: Counter[float] = field(default_factory=Counter)
    margin: Counter[float] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    rejected_pictures: int = 0
    one_sided: Counter[str] = field(default_factory=Counter)

    def add(self, pair: Pair, flags: list[str]) -> None:
        chosen, rejected = message_text(pair.chosen), message_text(pair.rejected)
        lengths = len(chosen.split()), len(rejected.split())
        self.pairs += 1
        self.flagged += bool(flags)
        self.words_chosen[lengths[0]] += 1
        self.words_rejected[lengths[1]] += 1
        self.chosen_longer += lengths[0] > lengths[1]
        self.rejected_longer += lengths[0] < lengths[1]
        similarity = as_number(pair.meta.get("similarity"))
        if similarity is not None:
            self.similarity[round(similarity, 3)] += 1
        if pair.margin is not None:
            self.margin[float(f"{pair.margin:.3g}")] += 1
        self.flags.update(flags)
        self.methods[pair.method] += 1
        self.pictures += len(pair.images)
        self.rejected_pictures += len(pair.rejected_images)
        words = set(_WORD.findall(chosen.lower())), set(_WORD.findall(rejected.lower()))
        self.one_sided.update(words[0] - words[1])
        self.one_sided.subtract(words[1] - words[0])


def write_pair_report(folder: Path, output: Path, *, limit: int = 200) -> Path:
    """Write the report of a stage's pairs as one HTML file.

    Rows are streamed twice (a count from the shards' footers, then one pass); statistics are over all pairs, cards over
    at most `limit`: evenly spaced ones and, where these miss them, some that are flagged.

    Args:
        folder: folder of pairs that a stage wrote.
        output: HTML file to write; a folder gets a `report.html`.
        limit: most pairs shown as cards.

    Returns:
        The file written.

    Raises:
        ValueError: if `limit` is not positive, or the folder has no manifest or no shards, or damaged ones.
    """
    folder, output = Path(folder), Path(output)
    if limit < 1:
        raise ValueError(f"limit is {limit}; a report shows at least one pair. Give --limit 1 or more.")
    manifest = finished(folder)
    total = read_shards(folder).rows
    stats = _Statistics()
    cards: list[dict[str, Any]] = []
    extra = 0
    for number, (pair, flags, shown) in enumerate(sampled(read_records(folder, Pair), total, limit, _flags), 1):
        stats.add(pair, flags)
        extra += shown == "flagged"
        if shown:
            cards.append(_card(number, pair, flags))
    for card in cards:
        if "unreadable picture" in card["flags"]:
            stats.flags["unreadable picture"] += 1
    return write_page("pairs.html.j2", output, extra=extra, **_overview(folder, manifest, stats, cards))


def _overview(folder: Path, manifest: Manifest, stats: _Statistics, cards: list[dict[str, Any]]) -> dict[str, Any]:
    dropped = sum(manifest.dropped.values())
    lengths = {"chosen": stats.words_chosen, "rejected": stats.words_rejected}
    charts: list[Chart | None] = [
        histogram("Length of the answers", lengths, x_label="words", whole=True),
        histogram("Similarity of chosen and rejected", {"pairs": stats.similarity}, x_label="similarity"),
        histogram("Margin", {"pairs": stats.margin}, x_label="margin"),
    ]
    one_sided = [(word, number) for word, number in stats.one_sided.items() if number and word not in _FUNCTION_WORDS]
    one_sided.sort(key=lambda entry: (-entry[1], entry[0]))
    fewest = sorted(one_sided, key=lambda entry: (entry[1], entry[0]))
    names = list(FLAGS) + sorted(set(stats.flags) - set(FLAGS))
    orders = [("words", "Chosen minus rejected words")]
    orders += [("margin", "Margin")] if stats.margin else []
    orders += [("similarity", "Similarity")] if stats.similarity else []
    counted = [f"{name} ({number:,})" for name, number in stats.methods.most_common()]
    return {
        **described(folder, manifest),
        "stats": stats,
        "cards": cards,
        "problems": problems(manifest, stats.pairs, "pairs"),
        "methods": ", ".join(counted if len(counted) > 1 else stats.methods),
        "tiles": _tiles(manifest, stats, dropped),
        "flags": [
            {"name": name, "meaning": FLAGS.get(name, "set by the stage"), "rows": stats.flags[name]}
            for name in names
            if stats.flags[name]
        ],
        "vocabulary": {
            "chosen": [(word, number) for word, number in one_sided[:8] if number > 0],
            "rejected": [(word, -number) for word, number in fewest[:8] if number < 0],
        },
        "histograms": [chart for chart in charts if chart is not None],
        "orders": orders,
    }


def _tiles(manifest: Manifest, stats: _Statistics, dropped: int) -> list[dict[str, str]]:
    pairs = max(stats.pairs, 1)
    median = f"{median_of(stats.words_chosen):g} / {median_of(stats.words_rejected):g}"
    pictures = f"{stats.rejected_pictures:,} rejected pictures" if stats.rejected_pictures else "no rejected pictures"
    return [
        {"name": "Pairs", "value": f"{stats.pairs:,}", "more": f"from {manifest.rows_used:,} of {manifest.rows_in:,} rows"},
        {"name": "Rows dropped", "value": f"{dropped:,}", "more": f"{percent(dropped, manifest.rows_in)} of the rows"},
        {"name": "Median words", "value": median, "more": "chosen / rejected"},
        {"name": "Chosen is longer", "value": percent(stats.chosen_longer, pairs),
         "more": f"rejected is longer: {percent(stats.rejected_longer, pairs)}"},
        {"name": "Pictures", "value": f"{stats.pictures:,}", "more": pictures},
        {"name": "Flagged", "value": f"{stats.flagged:,}", "more": f"{percent(stats.flagged, pairs)} of the pairs"},
    ]  # fmt: skip


def _card(number: int, pair: Pair, flags: list[str]) -> dict[str, Any]:
    chosen, rejected = message_text(pair.chosen), message_text(pair.rejected)
    removed, added = marked(rejected, chosen)
    pictures = [thumbnail(image) for image in pair.images]
    others = [thumbnail(image) for image in pair.rejected_images]
    if any(not thumb.uri for thumb in (*pictures, *others)):
        flags = [*flags, "unreadable picture"]
    similarity = as_number(pair.meta.get("similarity"))
    facts = [("margin", _signed(pair.margin))] if pair.margin is not None else []
    facts += [("similarity", f"{similarity:.3g}")] if similarity is not None else []
    return {
        "number": number,
        "id": pair.id,
        "method": pair.method,
        "flags": flags,
        "pictures": pictures,
        "other_pictures": others,
        "prompt": [(message["role"], message_text([message])) for message in pair.prompt],
        "chosen": added,
        "rejected": removed,
        "words_chosen": len(chosen.split()),
        "words_rejected": len(rejected.split()),
        "scores": {side: _scores(pair.meta.get("scores"), side) for side in ("chosen", "rejected")},
        "margin": pair.margin,
        "similarity": similarity,
        "answer": pair.answer,
        "key_facts": facts,
        "settings": [("id", pair.id), *flattened(pair.meta), *flattened({"facts": pair.facts} if pair.facts else {})],
    }


def _flags(pair: Pair) -> list[str]:
    chosen, rejected = message_text(pair.chosen), message_text(pair.rejected)
    lengths = sorted((len(chosen.split()), len(rejected.split())))
    flags = []
    if not pair.rejected_images:
        if same_answer(chosen, rejected):
            flags.append("identical")
        elif lexical_similarity([chosen], [rejected])[0] > NEAR_IDENTICAL:
            flags.append("near-identical")
    if lengths[0] == 0:
        flags.append("empty")
    elif lengths[0] < FEWEST_WORDS:
        flags.append("short")
    if lengths[0] and lengths[1] > LARGEST_RATIO * lengths[0]:
        flags.append("length ratio")
    if not pair.images:
        flags.append("no picture")
    if pair.rejected_images and [i["bytes"] for i in pair.rejected_images] == [i["bytes"] for i in pair.images]:
        flags.append("same rejected picture")
    own = pair.meta.get("flags") or []
    own = [name for name, value in own.items() if value] if isinstance(own, Mapping) else own
    return flags + [str(name) for name in own if str(name) not in flags]


def _scores(scores: Any, side: str) -> list[str]:
    """`{"chosen": 7, "rejected": 2}`, `{"chosen": {"judge": 7}}` or `{"judge": {"chosen": 7}}`, as texts for one side."""
    if not isinstance(scores, Mapping):
        return []
    found = scores.get(side)
    if isinstance(found, Mapping):
        return [f"{name} {plain(value)}" for name, value in found.items()]
    if found is not None:
        return [f"score {plain(found)}"]
    return [
        f"{name} {plain(value[side])}" for name, value in scores.items() if isinstance(value, Mapping) and side in value
    ]


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", MINUS)

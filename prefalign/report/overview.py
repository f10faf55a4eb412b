"""What every page about a stage's folder says: what its manifest counts, whether that adds up, how the rows were made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import prefalign
from prefalign.manifest import Manifest, read_manifest, refuse_data_file
from prefalign.report.page import MINUS, flattened

FLAGGED_SHARE = 5  # one card in so many is kept for flagged rows that the even sample misses
Row = TypeVar("Row")


def finished(folder: Path) -> Manifest:
    """The manifest of a folder to report on.

    Raises:
        ValueError: there is none; names the folders inside that have one.
    """
    refuse_data_file(folder, "pairs")
    if (manifest := read_manifest(folder)) is not None:
        return manifest
    if inside := ", ".join(str(file.parent) for file in sorted(folder.glob("*/manifest.json"))):
        raise ValueError(f"{folder} holds several folders of rows, and a report is of one of them. Give one: {inside}.")
    raise ValueError(
        f"{folder} has no manifest.json, so what was dropped is not known: the stage did not finish, or this is not a "
        "folder of rows. Start the same command again (it resumes), or give the output folder of a stage."
    )


def described(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Title, counts and provenance, as the templates name them."""
    identity = dict(manifest.config)
    settings = identity.pop("settings", {})
    rest = {"stage": manifest.stage, "code_version": manifest.code_version, "seed": manifest.seed, "models": manifest.models,
            "libraries": manifest.libraries, **identity}  # fmt: skip
    return {
        "title": folder.resolve().name,
        "version": prefalign.__version__,
        "manifest": manifest,
        "dropped_total": sum(manifest.dropped.values()),
        "models": ", ".join(f"{role} {fingerprint[:25]}" for role, fingerprint in manifest.models.items()),
        "provenance": {"settings": flattened(settings) or [("settings", "none")], "rest": flattened(rest)},
    }


def problems(manifest: Manifest, rows: int, named: str) -> list[str]:
    """What does not add up, in sentences; `rows` were found in the shards, and `named` is what they are called."""
    dropped, found = sum(manifest.dropped.values()), []
    if manifest.rows_in != manifest.rows_used + dropped:
        found.append(
            f"The manifest does not add up: {manifest.rows_in:,} rows in, but {manifest.rows_used:,} used and "
            f"{dropped:,} dropped make {manifest.rows_used + dropped:,}."
        )
    if manifest.rows_out != rows:
        found.append(
            f"The shards hold {rows:,} {named}, the manifest says {manifest.rows_out:,}: rows were added or lost since."
        )
    if not manifest.complete:
        found.append("The stage did not finish; the numbers are of what it had done.")
    return found


def sampled(
    rows: Iterable[Row], total: int, limit: int, flags_of: Callable[[Row], list[str]]
) -> Iterator[tuple[Row, list[str], Literal["even", "flagged", None]]]:
    """All rows with their flags, and why a row is shown as a card, if it is: at most `limit` are, most of them evenly spaced."""
    wanted = evenly(total, limit if total <= limit else limit - limit // FLAGGED_SHARE)
    room = limit - len(wanted)
    for index, row in enumerate(rows):
        flags = flags_of(row)
        if index in wanted:
            yield row, flags, "even"
        elif flags and room > 0:
            room -= 1
            yield row, flags, "flagged"
        else:
            yield row, flags, None


def evenly(total: int, count: int) -> set[int]:
    """At most `count` of `total` places, evenly spaced, the first and the last among them."""
    if count >= total:
        return set(range(total))
    if count == 1:
        return {0}
    return {round(number * (total - 1) / (count - 1)) for number in range(count)}


def as_number(value: Any) -> float | None:
    """The value if it is a number (True and False are none), else None."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def plain(value: Any) -> str:
    """A value as text, fractions with three digits."""
    return f"{value:.3g}".replace("-", MINUS) if isinstance(value, float) else str(value)


def percent(part: int, whole: int) -> str:
    """A share with one decimal; `none` of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "none"


def median_of(counts: Mapping[float, int]) -> float:
    """The median of values given as value to how often; 0 of nothing."""
    half, seen = sum(counts.values()) / 2, 0
    ordered = sorted(counts)
    for i, value in enumerate(ordered):
        seen += counts[value]
        if seen == half and i + 1 < len(ordered):
            return (value + ordered[i + 1]) / 2
        if seen > half:
            return value
    return 0

"""Rows of a table in a text file: CSV and TSV with a header, quoted as spreadsheets, pandas and `datasets` write them.

Such a file has texts only, so what a column holds says how its cells are read. An empty cell is no value. Turns and lists of
pictures are JSON; labels and facts are numbers, true or false where JSON would write them so; anything else stays as it is
written, an id with zeros before it or an answer that is JSON itself.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefalign.sources.columns import PICTURES
from prefalign.sources.config import BadRow

SEPARATORS = {".csv": ",", ".tsv": "\t"}
LARGEST = 2**27
"""Characters of the longest cell, such as a picture as base64."""
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_LISTS = ("conversations", "rejected_conversations", "messages", "rejected_messages", "responses", "completions")
_PICTURES = (*PICTURES, "rejected_images", "chosen_images")
_TEXT_OR_TURNS = ("prompt", "question", "problem", "instruction_prompt", "chosen", "rejected", "chosen_response",
                  "rejected_response", "completion")  # fmt: skip
_VALUES = ("label", "kto_tag", "preference", "margin")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False}


def rows(file: Path, facts: Collection[str] = ()) -> Iterator[Callable[[], Mapping[str, Any] | BadRow]]:
    """Functions that read the rows of a table, in order; one row is in memory.

    Args:
        file: `.csv` (commas) or `.tsv` (tabs), UTF-8, the first row its header.
        facts: columns whose cells may be numbers, beside labels and margins.

    Raises:
        ValueError: for a header that names no columns, or one twice, or is separated otherwise; for a quote that is never
            closed, since it would swallow the rows behind it. A row that does not fit the header is a `BadRow`.
    """
    csv.field_size_limit(LARGEST)
    typed = {*_VALUES, *facts}
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=SEPARATORS[file.suffix], strict=True)
        header: list[str] | None = None
        while True:
            where = f"{file.name} line {reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise ValueError(
                    f"{where} has a quote that is not closed, or in the wrong place ({error}), so it cannot be told where this "
                    'row ends. A quote inside a cell is written twice (""), and the whole cell in quotes.'
                ) from error
            if not cells:
                continue
            if header is None:
                header = _header(cells, file)
            else:
                yield partial(_row, header, cells, where, typed)
    if header is None:
        raise ValueError(f"{file.name} has no header, only blank lines: there is nothing to read.")


def not_utf_8(byte: int) -> str:
    """What to say of a text with a byte that is not UTF-8."""
    return (
        f"is not UTF-8 (byte {byte:#04x}), so it would be read with other words than were written. Convert the file, as with "
        "`iconv -f WINDOWS-1252 -t UTF-8`."
    )


def undecoded(text: str) -> str | None:
    """What is wrong with a text that was decoded with `surrogateescape`; None: nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the low byte of a surrogate is the byte that was there
        return not_utf_8(ord(text[error.start]) & 0xFF)
    return None


def _header(cells: Sequence[str], file: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    if (wrong := undecoded("".join(names))) is not None:
        raise ValueError(f"{file.name} {wrong}")
    separator = SEPARATORS[file.suffix]
    other = next((mark for mark in _NAMES if mark != separator and mark in names[0]), None)
    if len(names) == 1 and other is not None:
        raise ValueError(
            f"{file.name} has a header of one column, {names[0][:60]!r}: it seems to be separated by {_NAMES[other]}, and a "
            f"{file.suffix} file is read by its {_NAMES[separator]}. "
            + ("Name it .tsv." if other == "\t" else "Name it .csv." if other == "," else "Save it with commas.")
        )
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    if twice:
        raise ValueError(
            f"{file.name} has two columns called {twice[0]!r}; only one could count. Give one another name."
        )
    return names


def _row(header: Sequence[str], cells: Sequence[str], where: str, typed: Collection[str]) -> Mapping[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(
            "bad_table",
            f"{where} has {len(cells)} cell(s) and the header {len(header)}, so they do not tell what they are. Put cells with "
            "separators inside into quotes.",
        )
    if (wrong := undecoded("".join(cells))) is not None:
        return BadRow("bad_encoding", f"{where} {wrong}")
    row = {}
    for name, cell in zip(header, cells, strict=True):
        if not name:  # the numbers that pandas writes before each row
            continue
        try:
            row[name] = _value(name, cell, typed)
        except (ValueError, RecursionError) as error:
            return BadRow(
                "bad_json",
                f"{where}, column {name!r}, is not complete JSON ({error}): {cell[:60]!r}. A table holds turns and answers as "
                "JSON, which json.dumps writes; str() of a Python list is not JSON.",
            )
    return row


def _value(name: str, cell: str, typed: Collection[str]) -> Any:
    text = cell.strip()
    if not text:
        return None
    if name in _LISTS:
        return json.loads(text)
    if name in typed:
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        if _NUMBER.fullmatch(text) and math.isfinite(number := json.loads(text)):
            return number
    if name in (*_PICTURES, *_TEXT_OR_TURNS) and text.startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return cell
        if name in _PICTURES or (
            found and all(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in found)
        ):
            return found
    return cell

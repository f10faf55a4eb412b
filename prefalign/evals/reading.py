"""Read a benchmark's files: every error names the file, the line, what is missing and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefalign.images import EncodedImage, read_image


def read_jsonl(path: str | Path, *, required: Sequence[str] = ()) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a JSONL file with their line numbers, from 1; blank lines are passed over.

    Args:
        path: the file.
        required: keys that each row must have.

    Raises:
        ValueError: if there is no such file, it holds no row, or a line is not a whole JSON object or lacks a key.
    """
    path = Path(path)
    rows = []
    # not splitlines(): replies may hold U+2028 and the like
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path.name} line {number} is not complete JSON ({error.msg}): {line[:60]!r}. Was the file cut off? Fetch or "
                "write it again; leaving the line out would score other questions than the benchmark's."
            ) from error
        check_row(row, required, f"{path.name} line {number}")
        rows.append((number, row))
    if not rows:
        raise ValueError(
            f"{path.name} holds no rows: there would be nothing to score. Check how the file was written, or leave it out."
        )
    return rows


def read_json(path: str | Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: if there is no such file, or it is not whole JSON.
    """
    path = Path(path)
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path.name} is not complete JSON ({error}). Was the download cut off? Fetch it again."
        ) from error


def read_text(path: Path) -> str:
    """Text of a file.

    Raises:
        ValueError: if there is no such file, or it is not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}. Check the path in the config.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not text in UTF-8 ({error.reason} at byte {error.start}). Is it packed?"
        ) from error


def check_row(row: Any, required: Sequence[str], where: str) -> None:
    """Raise `ValueError` for a row that is no object or lacks a key; `where` begins the message."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is a {type(row).__name__}, not an object with {', '.join(required) or 'keys'}.")
    missing = [key for key in required if key not in row]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)} (it has {', '.join(map(str, row)) or 'nothing'}); each row needs "
            f"{', '.join(required)}. Rename or add what is missing."
        )


def read_once(path: Path, known: dict[Path, EncodedImage]) -> EncodedImage:
    """A picture's bytes, shared by all questions about it; `known` holds what was read before."""
    if path not in known:
        known[path] = read_image(path)
    return known[path]

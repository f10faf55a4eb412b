"""Raw rows of a source, streamed: files of one machine here, data sets of the Hub through `sources.hub`."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefalign.records import canonical_json
from prefalign.seen import RepeatedIds
from prefalign.sources import hub
from prefalign.sources.columns import ID_COLUMNS, source_id
from prefalign.sources.config import BadRow, DataConfig
from prefalign.sources.layouts import AUTO

SUFFIXES = (".jsonl", ".json", ".parquet")


def files_of(config: DataConfig) -> list[Path]:
    """The data files that `config.path` names, in order; none for a data set of the Hub, which is looked up. Stages call it
    before they load a model, so that a typo costs no time.

    Raises:
        ValueError: if there is none, one is of a kind that is not read, a stage's output is not finished, or the folder of
            the pictures does not exist; or the Hub cannot be asked, or has no such data set, revision or split.
    """
    path = config.path
    embedded = (path / "manifest.json").is_file()  # a stage's output holds its pictures
    if config.images is not None and not embedded and not config.images.is_dir():
        raise ValueError(f"data.images is {str(config.images)!r}, and there is no such folder, so no picture would be found. "
                         "Give the folder that the rows' picture paths start from.")  # fmt: skip
    if hub.is_named(config):
        hub.check(config)
        return []
    given = [name for name in ("split", "config", "revision") if getattr(config, name) is not None]
    if given and path.exists():
        raise ValueError(
            f"{path} is on this disk, and data.{given[0]} is for data sets of the Hub: it would change nothing. Leave it out, or "
            "name the file of that split."
        )
    if path.is_dir():
        if (path / "progress").is_dir() and not embedded:
            raise ValueError(f"folder {path} is the output of a stage that is not finished: rows would be missing. Start that "
                             "stage again (it goes on where it stopped), then this one.")  # fmt: skip
        files = sorted(path.glob("data/*.parquet")) or sorted(path.glob("*.parquet")) or sorted(path.glob("*.jsonl"))
        if not files:
            lists = [file.name for file in sorted(path.glob("*.json"))]
            hint = f" It has {', '.join(lists[:4])}." if lists else ""
            if "dataset_info.json" in lists:
                hint += " What dataset_info.json says of columns is not read; they need the names that LLaMA-Factory expects."
            raise ValueError(
                f"folder {path} holds no .parquet or .jsonl rows. Give the data file itself as `data.path`.{hint}"
            )
        return files
    if not path.is_file():
        raise ValueError(
            f"no data at {path}. Set `data.path` to a JSONL, JSON or Parquet file, to a stage's output, or to a data set of the "
            "Hub (OWNER/NAME)."
        )
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name}: rows are read from .jsonl, .json and .parquet, not {path.suffix or 'this'!r}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty: there is nothing to do. Check how it was written.")
    return [path]


def fingerprint(config: DataConfig) -> str:
    """What the rows are and how they are read, so that a resumed run notices other data.

    SHA-256 over the data files' contents (streamed); for a data set of the Hub over its name, commit, configuration and split. A
    layout other than `auto` counts too.
    """
    digest = hashlib.sha256()
    if hub.is_named(config):
        digest.update(canonical_json(hub.provenance(config)).encode())
    for file in files_of(config):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    if config.layout != AUTO:
        digest.update(f"layout:{config.layout}".encode())
    return digest.hexdigest()


def read_rows(config: DataConfig, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any] | BadRow]:
    """Stream raw rows; at most one Parquet batch or one line is in memory (a `.json` list is read whole).

    Args:
        config: where they are.
        columns: read only these, where the files keep columns apart (Parquet).
    """
    rows = hub.rows(config, columns) if hub.is_named(config) else _of_files(config, columns)
    yield from itertools.islice(rows, config.limit or None)


def survey(config: DataConfig) -> tuple[int, RepeatedIds]:
    """Number of rows that `read_rows` will give, and the ids that more than one of them has."""
    total = 0

    def ids() -> Iterator[str]:
        nonlocal total
        for row in read_rows(config, ID_COLUMNS):
            total += 1
            identity = None if isinstance(row, BadRow) else source_id(row)
            if identity is not None:
                yield identity

    repeated = RepeatedIds(ids())
    return total, repeated


def parquet_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Stream the rows of a Parquet file, of all or of the named columns that it has.

    Raises:
        ValueError: if the file is not whole.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file)
        wanted = [name for name in opened.schema_arrow.names if name in columns] if columns is not None else None
        if wanted == []:
            yield from ({} for _ in range(opened.metadata.num_rows))
            return
        for batch in opened.iter_batches(batch_size=64, columns=wanted):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file.name} is not a whole Parquet file ({error}). Was the download or the copy cut off? Fetch it "
                         "again.") from error  # fmt: skip


def _of_files(config: DataConfig, columns: Sequence[str] | None) -> Iterator[Mapping[str, Any] | BadRow]:
    for file in files_of(config):
        yield from _read_file(file, columns)


def _read_file(file: Path, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any] | BadRow]:
    if file.suffix == ".parquet":
        yield from parquet_rows(file, columns)
        return
    if file.suffix == ".json":
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.name} is not complete JSON ({error}). Was the download cut off?") from error
        if not isinstance(rows, list):
            raise ValueError(f"{file.name} must be a list of rows, got a {type(rows).__name__}.")
        for number, row in enumerate(rows, 1):
            yield row if isinstance(row, dict) else _not_an_object(row, f"{file.name} row {number}")
        return
    with file.open(encoding="utf-8", errors="replace") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BadRow("bad_json", f"{file.name} line {number} is not complete JSON ({error}): {line[:60]!r}")
                continue
            yield row if isinstance(row, dict) else _not_an_object(row, f"{file.name} line {number}")


def _not_an_object(row: Any, where: str) -> BadRow:
    return BadRow("bad_json", f"{where} is a {type(row).__name__}, not an object.")

"""Raw rows of a source, streamed: files of one machine here, data sets of the Hub through `sources.hub`."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefalign.records import canonical_json
from prefalign.seen import RepeatedIds
from prefalign.shards import check_shards
from prefalign.sources import hub, llama_factory, parquet, tables
from prefalign.sources.columns import ID_COLUMNS, source_id
from prefalign.sources.config import DESCRIPTIONS, BadRow, DataConfig
from prefalign.sources.layouts import AUTO

SUFFIXES = (".jsonl", ".json", ".parquet", *tables.SEPARATORS)
_SHARD = re.compile(r"(\w[\w.]*)-\d+-of-\d+")
_SPLITS = re.compile(
    r"(?<![^-._ 0-9])(train|training|validation|valid|val|dev|test|testing|eval|evaluation)(?![^-._ 0-9])", re.I
)
RawRow = Mapping[str, Any] | BadRow
DeferredRow = Callable[[], RawRow]


def files_of(config: DataConfig) -> list[Path]:
    """The data files that `config.path` names, in order; none for a data set of the Hub, which is looked up. Stages call it
    before they load a model, so that a typo costs no time.

    Raises:
        ValueError: if there is none, one is of a kind that is not read, a stage's output is not finished or lost shards, a
            folder has files of two kinds or of several splits, or the folder of the pictures does not exist; or the Hub cannot be
            asked, or has no such data set, revision or split.
    """
    config = llama_factory.source_of(config)
    path = config.path
    embedded = (path / "manifest.json").is_file()  # a stage's output holds its pictures
    if config.images is not None and not embedded and not config.images.is_dir():
        raise ValueError(f"data.images is {str(config.images)!r}, and there is no such folder, so no picture would be found. "
                         "Give the folder that the rows' picture paths start from.")  # fmt: skip
    if hub.is_named(config):
        hub.check(config)
        return []
    files = _rows_of_folder(path, embedded) if path.is_dir() else []
    splits = [] if embedded else sorted({split for split in map(_split_of, files) if split is not None})
    known = ("config", "revision") if splits else ("split", "config", "revision")
    given = [name for name in known if getattr(config, name) is not None]
    if given and path.exists():
        raise ValueError(
            f"{path} is on this disk, and data.{given[0]} is for data sets of the Hub: it would change nothing. Leave it out, or "
            "name the file of that split."
        )
    if path.is_dir():
        check_shards(path)
        if (path / "progress").is_dir() and not embedded:
            raise ValueError(f"folder {path} is the output of a stage that is not finished: rows would be missing. Start that "
                             "stage again (it goes on where it stopped), then this one.")  # fmt: skip
        if not files:
            lists = [file.name for kind in ("*.json", "*.csv", "*.tsv") for file in sorted(path.glob(kind))]
            hint = f" It has {', '.join(lists[:4])}." if lists else ""
            if DESCRIPTIONS in lists:
                hint += f" {path / DESCRIPTIONS}@NAME reads what dataset_info.json names."
            raise ValueError(
                f"folder {path} holds no .parquet or .jsonl rows. Give the data file itself as `data.path`.{hint}"
            )
        return _of_split(config, files, splits)
    if not path.is_file():
        raise ValueError(
            f"no data at {path}. Set `data.path` to a JSONL, JSON, Parquet, CSV or TSV file, to a stage's output, or to a data "
            "set of the Hub (OWNER/NAME)."
        )
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name}: rows are read from {', '.join(SUFFIXES)}, not {path.suffix or 'this'!r}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty: there is nothing to do. Check how it was written.")
    return [path]


def _rows_of_folder(path: Path, embedded: bool) -> list[Path]:
    kinds = ("data/*.parquet", "*.parquet", "*.jsonl", "data/*.jsonl")
    found = [files for kind in kinds if (files := sorted(path.glob(kind)))]
    if len(found) > 1 and not embedded:
        one, other = (files[0].relative_to(path) for files in found[:2])
        raise ValueError(
            f"folder {path} holds {one} and {other}, which are not read together, so rows would be left out. Give a file, or a "
            "folder with nothing but the files that you mean, as `data.path`."
        )
    return found[0] if found else []


def _split_of(file: Path) -> str | None:
    """The split that a file's name says, as `datasets` and the Hub name them; None: it says none, or several."""
    if named := _SHARD.match(file.name):
        return named[1]
    said = {word.lower() for word in _SPLITS.findall(file.stem)}
    return said.pop() if len(said) == 1 else None


def _of_split(config: DataConfig, files: list[Path], splits: Sequence[str]) -> list[Path]:
    """The files of a folder that are read, if their names tell several splits those of one."""
    if config.split is None and len(splits) > 1:
        raise ValueError(
            f"folder {config.path} has the splits {', '.join(splits)}, and no more than one can be meant: what is kept for "
            "testing would be trained on. Give one of them as `data.split`."
        )
    if config.split is None:
        return files
    if config.split not in splits:
        raise ValueError(
            f"folder {config.path} has no split {config.split!r}, only {', '.join(splits)}. Give one of them as `data.split`."
        )
    return [file for file in files if _split_of(file) == config.split]


def fingerprint(config: DataConfig) -> str:
    """What the rows are and how they are read, so that a resumed run notices other data.

    SHA-256 over the data files' contents (streamed); for a data set of the Hub over its name, commit, configuration and split. A
    layout other than `auto` and the description of a `dataset_info.json` count too.
    """
    digest = hashlib.sha256()
    if source := provenance(config):
        digest.update(canonical_json(source).encode())
    if (description := llama_factory.described(config)) is not None:
        digest.update(canonical_json(description.given).encode())
    for file in files_of(config):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    if config.layout != AUTO:
        digest.update(f"layout:{config.layout}".encode())
    return digest.hexdigest()


def provenance(config: DataConfig) -> dict[str, str]:
    """Which rows these are: `repository`, `commit`, `config` and `split` of a data set of the Hub; empty for files."""
    return hub.provenance(llama_factory.source_of(config))


def revision_name(config: DataConfig) -> str | None:
    """The branch or tag of a data set of the Hub that is asked for; None: `main`, a commit, or files."""
    named = llama_factory.source_of(config)
    if named.revision in (None, "main") or named.revision == provenance(config).get("commit"):
        return None
    return named.revision


def recall(config: DataConfig, source: Mapping[str, str] | None, revision: str | None = None) -> None:
    """Take the word of a finished folder for the commit that it was made from, where the Hub does not tell the present one.

    Args:
        config: names the data set.
        source: `provenance` of the folder's rows; None: there is no such folder.
        revision: `revision_name` of that time.
    """
    if hub.is_named(named := llama_factory.source_of(config)):
        hub.recall(named, source, revision or "main")


def read_rows(config: DataConfig, columns: Sequence[str] | None = None) -> Iterator[RawRow]:
    """Stream raw rows; at most one Parquet batch or one row is in memory (a `.json` list is read whole).

    Args:
        config: where they are.
        columns: read only these, where the files keep columns apart (Parquet).
    """
    return (read() for read in _deferred(config, columns))


class RowReader:
    """Raw rows by their place, read forwards: what is left out is not read where the files allow it.

    Whole files and row groups of Parquet are skipped by their footers, on this disk and on the Hub; lines of JSON are not parsed,
    those of a table only cut into cells. What the Hub has in another form streams past, and becomes no Python objects up to the
    first row that is asked for.

    Args:
        config: where the rows are.
    """

    def __init__(self, config: DataConfig):
        self._config = config
        self._rows: Iterator[DeferredRow] | None = None
        self._next = 0

    def read(self, first: int, count: int) -> list[RawRow]:
        """The rows from one place on, as many as there are; `first` is not before the end of an earlier call's."""
        if self._rows is None:
            self._rows, self._next = _deferred(self._config, None, first), first
        rows = itertools.islice(self._rows, first - self._next, first - self._next + count)
        self._next = first + count
        return [read() for read in rows]


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
    return (read() for read in _of_parquet(file, columns))


def _deferred(config: DataConfig, columns: Sequence[str] | None, first: int = 0) -> Iterator[DeferredRow]:
    """Functions that read the rows from one place on."""
    if (description := llama_factory.described(config)) is not None:
        raw = _deferred(description.source(config), columns, first)
        if columns is not None:  # ids, which no description renames
            return raw
        return (functools.partial(_translated, description, read) for read in raw)
    rows: Iterator[DeferredRow]
    if hub.is_named(config):
        rows = hub.deferred_rows(config, columns, first)
    else:
        rows = (row for file in files_of(config) for row in _of_file(file, columns, config.fact_columns))
        rows = itertools.islice(rows, first, None)
    return itertools.islice(rows, max(config.limit - first, 0) if config.limit else None)


def _translated(description: llama_factory.Description, read: DeferredRow) -> RawRow:
    return description.row(read())


def _of_file(file: Path, columns: Sequence[str] | None, facts: Sequence[str]) -> Iterator[DeferredRow]:
    if file.suffix == ".parquet":
        yield from _of_parquet(file, columns)
    elif file.suffix == ".json":
        yield from _of_list(file)
    elif file.suffix in tables.SEPARATORS:
        yield from tables.rows(file, facts)
    else:
        with file.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield functools.partial(_of_line, line, f"{file.name} line {number}")


def _of_parquet(file: Path, columns: Sequence[str] | None) -> Iterator[Callable[[], dict[str, Any]]]:
    import pyarrow.parquet as pq

    guard = functools.partial(_whole, file)
    with guard():
        footer = pq.read_metadata(file)
    yield from parquet.deferred_rows(footer, lambda: file.open("rb"), guard, columns)


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """Explain a Parquet file that is damaged."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file.name} is not a whole Parquet file ({error}). Was the download or the copy cut off? Fetch it "
                         "again.") from error  # fmt: skip


def _of_list(file: Path) -> Iterator[DeferredRow]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} {tables.not_utf_8(error.object[error.start])}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not complete JSON ({error}). Was the download cut off?") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file.name} must be a list of rows, got a {type(rows).__name__}.")
    for number, row in enumerate(rows, 1):
        yield functools.partial(_object, row, f"{file.name} row {number}")


def _of_line(line: str, where: str) -> RawRow:
    if (wrong := tables.undecoded(line)) is not None:
        return BadRow("bad_encoding", f"{where} {wrong}")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow("bad_json", f"{where} is not complete JSON ({error}): {line[:60]!r}")
    return _object(row, where)


def _object(row: Any, where: str) -> RawRow:
    if isinstance(row, dict):
        return row
    return BadRow("bad_json", f"{where} is a {type(row).__name__}, not an object.")

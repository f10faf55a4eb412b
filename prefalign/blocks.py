"""One block of a stage's output on disk: its shard, the rows it could not work on, the ledger whose rename commits it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prefalign import sources
from prefalign.manifest import write_atomically
from prefalign.records import Candidates, Example, Pair, Prompt
from prefalign.sources import BadRow

Record = Pair | Candidates | Example | Prompt
AnyRecord = TypeVar("AnyRecord", Pair, Candidates, Example, Prompt)
MAX_BLOCK_BYTES = 2**31 - 2**20  # Arrow's limit on the bytes of one list column, less what frames them


class StoreError(RuntimeError):
    """A stage cannot go on; the message says what is on disk and how to continue."""


class NoRows(StoreError):
    """A stage went through all its rows and made none.

    Args:
        why: the rows and the reasons for which they were dropped.
        advice: how to continue.

    Attributes:
        why: as given.
    """

    def __init__(self, why: str, advice: str):
        super().__init__(why, advice)
        self.why = why

    def __str__(self) -> str:
        return " ".join(self.args)


def commit(
    folder: Path,
    number: int,
    records: Sequence[Record],
    quarantine: Sequence[Mapping[str, Any]],
    ledger: Mapping[str, Any],
    record: type[Record],
) -> None:
    """Write a block's files, the ledger last; files of an earlier try that it has no use for are deleted.

    Args:
        folder: the stage's output.
        number: number of the block.
        records: what goes into the shard; none: no shard.
        quarantine: rows of `quarantined`; none: no file.
        ledger: counts and ids of the block.
        record: class of the records.

    Raises:
        StoreError: if the pictures are more than an Arrow column holds.
    """
    failures = folder / "quarantine" / f"{number:05d}.jsonl"
    shard = folder / "data" / f"train-{number:05d}.parquet"
    if quarantine:
        write_atomically(failures, "".join(json.dumps(row) + "\n" for row in quarantine).encode())
    else:
        failures.unlink(missing_ok=True)
    if records:
        write_atomically(shard, _to_parquet(records, record))
    else:
        shard.unlink(missing_ok=True)
    write_atomically(folder / "progress" / f"{number:05d}.json", json.dumps(ledger).encode())


def quarantined(index: int, row: Mapping[str, Any] | BadRow, reason: str, message: str) -> dict[str, Any]:
    """A row of the quarantine: number of the input, why it failed, and the raw row without its pictures' bytes."""
    return {"index": index, "reason": reason, "message": message,
            "row": None if isinstance(row, BadRow) else sources.legible(row)}  # fmt: skip


def first_message(folder: Path) -> str:
    """A sentence with the first message in the quarantine and where the others are; empty if there is none."""
    file = min(folder.glob("quarantine/*.jsonl"), default=None)
    if file is None:
        return ""
    with file.open(encoding="utf-8") as stream:
        message = json.loads(next(stream))["message"]
    return f" First message: {message} All messages are in {file.parent}."


def _to_parquet(records: Sequence[Record], record: type[Record]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("images", "rejected_images"):
        size = sum(len(image["bytes"]) for item in records for image in getattr(item, name, []))
        if size > MAX_BLOCK_BYTES:
            raise StoreError(
                f"a block of {len(records)} rows holds {size:,} bytes of `{name}`, above Arrow's limit of {MAX_BLOCK_BYTES:,}. "
                "Lower --output.block_size and give another --output.path."
            )
    schema = record.features().arrow_schema
    table = pa.Table.from_pylist([item.to_row() for item in records], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()

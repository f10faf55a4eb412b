"""One block of a stage's rows: read, and on disk its shard, the rows it could not work on, the ledger whose rename commits it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prefalign import sources
from prefalign.images import ImageError
from prefalign.locks import locked
from prefalign.manifest import write_atomically
from prefalign.records import Candidates, Example, Pair, Prompt, RecordError
from prefalign.seen import SeenIds
from prefalign.sources import BadRow

Input = Prompt | Pair | Candidates
Record = Pair | Candidates | Example | Prompt
Row = Mapping[str, Any] | BadRow
AnyRecord = TypeVar("AnyRecord", Pair, Candidates, Example, Prompt)
CAUSES = {
    "cut_off": "Answers reached their limit on tokens (`max_new_tokens`) before they ended.",
    "few_judged": "Fewer than two answers of a row could be judged; `answers` in claims.json counts why (`unreadable_list`: the "
    "splitter wrote no list of claims).",
    "group_size": "The rows have other than `pairs.group_size` graded answers.",
    "low_quality": "The best answer of no row reaches `best.min_quality`: draw more answers, or lower it.",
    "no_facts": "`annotator: rules` reads the facts of the embedded world, which other rows lack: set annotator to `engine`, and "
    "name `large`.",
    "no_picture": "The rows name no picture (`image` or `images`).",
    "no_reference": "The rows have no `answer`, nor a last turn of the assistant, and this stage starts from one.",
    "small_gap": "No two answers of a row differ enough in score: draw more answers, or lower `pairs.min_gap`.",
    "unreadable_annotation": "The large model wrote no question and answer in the form that it was asked for.",
}
"""What lies behind a reason for which all rows of a run may be dropped."""
UNANSWERED = ("generation_failed", "judge_failed")
"""Reasons for which a row has failed that may not hold another time: a model or a server gave no answer."""
OF_EVERY_STAGE = ("config.json", "manifest.json")
MAX_BLOCKS = 100_000  # shards are read in order of their names, by `datasets` too, and names have five digits
MAX_BLOCK_BYTES = 2**31 - 2**20  # Arrow's limit on the bytes of one list column, less what frames them


@dataclass
class Dropped:
    """A row that a stage decided not to keep; counted by `reason`."""

    reason: str


@dataclass
class Failed:
    """A row that could not be worked on; kept in quarantine with its message and counted by `reason`."""

    reason: str
    message: str


Outcome = Sequence[Record] | Dropped | Failed


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


@dataclass
class Block:
    """A block of rows, read: what can be worked on, and what became of the others.

    Attributes:
        number: of the block.
        first: index of its first row.
        rows: as the source gave them.
        inputs: the good ones with their place in `rows`.
        dropped: how many are duplicates.
        quarantine: rows that could not be read.
        ids: of `inputs`, with the digest of what each holds.
    """

    number: int
    first: int
    rows: list[Row]
    inputs: list[tuple[int, Input]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    ids: dict[str, str] = field(default_factory=dict)

    @property
    def given(self) -> list[Input]:
        """What `process` is called with."""
        return [given for _, given in self.inputs]


def read_block(number: int, first: int, rows: list[Row], read: Callable[[Row], Input], seen: SeenIds) -> Block:
    """Read the rows of a block. Blocks are read in order, so that of rows with one id the first of all inputs keeps it.

    Args:
        number: of the block.
        first: index of its first row.
        rows: as the source gave them.
        read: makes a record of a row.
        seen: ids of all rows before; those of this block are added.
    """
    block = Block(number, first, rows)
    for offset, row in enumerate(rows):
        try:
            given = read(row)
            digest = sources.content_digest(given)
            if (known := seen.holds(given.id, digest)) is False:
                raise RecordError("conflicting_id", f"id {given.id!r} belongs to an earlier row with other content, so rows "
                                  "made from the two could not be told apart. Give each row its own id.")  # fmt: skip
        except (RecordError, ImageError) as error:
            block.quarantine.append(quarantined(first + offset, row, error.reason, str(error)))
            continue
        if known:
            block.dropped["duplicate"] += 1
            continue
        seen.add(given.id, digest)
        block.ids[given.id] = digest
        block.inputs.append((offset, given))
    return block


def finish(folder: Path, block: Block, outcomes: Sequence[Outcome], record: type[Record]) -> dict[str, Any]:
    """Write what became of a block's rows into a stage's folder, unless another process has done so before.

    Args:
        folder: the stage's output.
        block: as it was read.
        outcomes: one for each of its inputs; records that fail their check drop their row.
        record: class of the records.

    Returns:
        The block's ledger, this process's or the other one's: shard, quarantine and ledger are always of one process.
    """
    dropped, quarantine = block.dropped.copy(), list(block.quarantine)
    records: list[Record] = []
    used = 0
    assert len(outcomes) == len(block.inputs), "a stage gives one outcome per input"
    for (offset, _), outcome in zip(block.inputs, outcomes, strict=True):
        if isinstance(outcome, Dropped):
            dropped[outcome.reason] += 1
        elif isinstance(outcome, Failed):
            quarantine.append(quarantined(block.first + offset, block.rows[offset], outcome.reason, outcome.message))
        elif unfit := _unfit(outcome):
            dropped[unfit] += 1
        else:
            used += 1
            records.extend(outcome)
    for row in quarantine:
        dropped[row["reason"]] += 1
    ledger = {"block": block.number, "rows_in": len(block.rows), "rows_used": used, "rows_out": len(records),
              "dropped": dict(sorted(dropped.items())), "quarantined": len(quarantine), "ids": block.ids}  # fmt: skip
    shard = to_parquet(records, record)
    with locked(folder / "progress" / ".lock"):
        if (done := read_ledger(folder, block.number)) is not None:
            return done
        commit(folder, block.number, shard, quarantine, ledger)
    return ledger


def ledger_file(folder: Path, number: int) -> Path:
    """The ledger of a block, there or not."""
    return folder / "progress" / f"{number:05d}.json"


def read_ledger(folder: Path, number: int) -> dict[str, Any] | None:
    """The ledger of a block; None if it is not committed."""
    try:
        ledger: dict[str, Any] = json.loads(ledger_file(folder, number).read_bytes())
    except FileNotFoundError:
        return None
    return ledger


def commit(
    folder: Path,
    number: int,
    shard: bytes | None,
    quarantine: Sequence[Mapping[str, Any]],
    ledger: Mapping[str, Any],
) -> None:
    """Write a block's files, the ledger last; files of an earlier try that it has no use for are deleted.

    Args:
        folder: the stage's output.
        number: number of the block.
        shard: `to_parquet` of its records; None: no shard.
        quarantine: rows of `quarantined`; none: no file.
        ledger: counts and ids of the block.

    Raises:
        StoreError: for the 100,001st block.
    """
    if number >= MAX_BLOCKS:
        raise StoreError(too_many(f"more than {MAX_BLOCKS:,}"))
    failures = folder / "quarantine" / f"{number:05d}.jsonl"
    file = folder / "data" / f"train-{number:05d}.parquet"
    if quarantine:
        write_atomically(failures, "".join(json.dumps(row) + "\n" for row in quarantine).encode())
    else:
        failures.unlink(missing_ok=True)
    if shard is not None:
        write_atomically(file, shard)
    else:
        file.unlink(missing_ok=True)
    write_atomically(ledger_file(folder, number), json.dumps(ledger).encode())


def too_many(count: str, least: int | None = None) -> str:
    """Why a folder cannot have so many blocks, and what to do; `least` is the smallest block size that is enough, if known."""
    enough = "Raise --output.block_size" if least is None else f"Raise --output.block_size to {least:,} or more"
    return (
        f"the rows make {count} blocks, and a folder has {MAX_BLOCKS:,} at most: the numbers in its shards' names have five "
        "digits, and with a sixth they would be read in another order than that of the rows. "
        f"{enough} (with another --output.path, if this one has blocks of that size)."
    )


def quarantined(index: int, row: Mapping[str, Any] | BadRow, reason: str, message: str) -> dict[str, Any]:
    """A row of the quarantine: number of the input, why it failed, and the raw row without its pictures' bytes."""
    return {"index": index, "reason": reason, "message": message,
            "row": None if isinstance(row, BadRow) else sources.legible(row)}  # fmt: skip


def first_message(folder: Path) -> str:
    """The first message of the commonest reason in a folder's quarantine (the first on ties); empty if there is none."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for file in sorted(folder.glob("quarantine/*.jsonl")):
        with file.open(encoding="utf-8") as stream:
            for row in map(json.loads, stream):
                counts[row["reason"]] += 1
                first.setdefault(row["reason"], row["message"])
    return first[counts.most_common(1)[0][0]] if first else ""


def told_message(folder: Path) -> str:
    """A sentence with `first_message` and where the others are; empty if there is none."""
    message = first_message(folder)
    return f" First message: {message} All messages are in {folder / 'quarantine'}." if message else ""


def likely_cause(folder: Path, dropped: Mapping[str, int]) -> str:
    """Sentences with what lies behind the commonest reason, if that is known, and which files of figures a stage has written.

    Args:
        folder: the stage's output.
        dropped: counts by reason.
    """
    commonest = max(dropped, key=lambda reason: dropped[reason], default="")
    figures = [str(file) for file in sorted(folder.glob("*.json")) if file.name not in OF_EVERY_STAGE]
    told = [CAUSES.get(commonest, ""), f"Figures are in {', '.join(figures)}." if figures else ""]
    return "".join(f" {sentence}" for sentence in told if sentence)


def to_parquet(records: Sequence[Record], record: type[Record]) -> bytes | None:
    """A shard's content; None for no records.

    Raises:
        StoreError: if the pictures are more than an Arrow column holds.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not records:
        return None
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
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _unfit(records: Sequence[Record]) -> str | None:
    """Why a row's records cannot be written, or None."""
    try:
        for record in records:
            record.check()
    except RecordError as error:
        return error.reason
    return None if records else "no_record"

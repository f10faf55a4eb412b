"""Stage output that survives anything: atomic shards, a manifest that adds up, resume by itself, quarantine.

A stage's folder holds

    config.json        what decides the rows; another config refuses the folder
    data/train-*.parquet   one shard per block of inputs, written to a temporary name, synced, renamed
    quarantine/*.jsonl     rows that failed, with reason and message
    progress/*.json        one ledger per finished block; its rename commits the block
    manifest.json      the sum of all ledgers, written last

Work is cut into blocks by input index, so a run killed at any moment and started again with the same config makes the
same batches and ends with the same rows. So do several processes that share out the blocks (`execution`): of rows with one id
the first of all inputs counts, whoever works on it.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefalign import blocks, folders, sources
from prefalign.blocks import AnyRecord, Block, Dropped, Failed, Input, Outcome, Record, StoreError
from prefalign.execution import SAMPLED, SHARD, WORKER, LeftToOthers, Shard
from prefalign.folders import Ledgers
from prefalign.manifest import Manifest, write_atomically
from prefalign.progress import progress_bar
from prefalign.records import Candidates, Pair, Prompt
from prefalign.seen import RepeatedIds, SeenIds
from prefalign.sources import DataConfig

__all__ = [
    "READERS",
    "Block",
    "Dropped",
    "Failed",
    "Input",
    "Job",
    "Outcome",
    "OutputConfig",
    "StoreError",
    "read_records",
    "run_job",
    "run_stage",
    "write_records",
]


@dataclass
class OutputConfig:
    """Where a stage writes, and when it gives up.

    Attributes:
        path: folder of the stage's output.
        block_size: inputs per block; one block is one batch of work, one shard and one step of progress. A folder has 100,000
            blocks at most.
        max_quarantine: stop when more rows than this have failed.
    """

    path: Path
    block_size: int = 64
    max_quarantine: int = 100

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size is {self.block_size}; a block has at least 1 row (64 is usual).")
        if self.max_quarantine < 0:
            raise ValueError(f"max_quarantine is {self.max_quarantine}; 0 stops at the first row that fails.")


Process = Callable[[list[Any]], Iterable[Outcome]]
READERS: dict[type[Input], Callable[..., Input]] = {
    Prompt: sources.to_prompt,
    Pair: sources.to_pair,
    Candidates: sources.to_candidates,
}
"""What a row of a stage's data can be read as."""


def run_stage(
    stage: str,
    data: DataConfig,
    process: Process,
    *,
    output: OutputConfig,
    record: type[Record],
    settings: Mapping[str, Any],
    seed: int,
    models: Mapping[str, str] | None = None,
    reads: type[Input] = Prompt,
) -> Manifest:
    """Read prompts, pairs or candidates, work on them block by block, write records; continue where an earlier run stopped.

    Args:
        stage: stage name for manifest and messages.
        data: where prompts come from.
        process: takes the good inputs of one block and gives one outcome each, in order: a list of records,
            `Dropped` or `Failed`. Each record is checked; one that fails its check drops its row. The first call comes after the
            folder was claimed, so it may put files of its own into `output.path`.
        output: folder, block size, quarantine limit.
        record: class of the records that `process` gives.
        settings: everything that changes the rows (not devices or batch sizes).
        seed: seed of the stage.
        models: model names to fingerprints, for the manifest and the config check.
        reads: what a row of `data` is read as.

    Returns:
        The manifest, also written to `manifest.json`.

    Raises:
        StoreError: if the folder belongs to another config, too many rows failed, nothing was left, the disk is full, or the rows
            make more than 100,000 blocks.
    """
    job = Job(stage, data, output, record, dict(settings), seed, dict(models or {}), reads)
    if (worker := WORKER.get()) is not None:
        served: Manifest = worker.serve(job, process)
        return served

    def here(given: Iterator[Block]) -> Iterator[tuple[Block, Sequence[Outcome]]]:
        for block in given:
            yield block, list(process(block.given)) if block.inputs else []

    shard = SHARD.get()
    made = run_job(job, here, shard)
    SHARD.set(shard if shard.alone else replace(shard, rest=True))
    return made


def write_records(
    stage: str,
    records: Iterable[AnyRecord],
    *,
    output: OutputConfig,
    record: type[AnyRecord],
    settings: Mapping[str, Any],
    seed: int,
) -> Manifest:
    """Write records that are cheap to make again (an export): same folder layout, one shard per block, no resume, no checks.

    Raises:
        StoreError: if the folder belongs to another config, the disk is full, or the records make more than 100,000 blocks.
    """
    folder = output.path
    identity = folders.identity_of(stage, settings, seed, output.block_size)
    if (done := folders.finished(folder, identity)) is not None:
        return done
    with folders.claimed(folder, identity):
        ledgers = Ledgers(folder)
        for number, block in enumerate(_batched(records, output.block_size)):
            ledger = {"block": number, "rows_in": len(block), "rows_used": len(block), "rows_out": len(block),
                      "dropped": {}, "quarantined": 0}  # fmt: skip
            blocks.commit(folder, number, blocks.to_parquet(block, record), [], ledger)
            ledgers.count(ledger)
        manifest = ledgers.manifest(stage, identity)
        write_atomically(folder / "manifest.json", json.dumps(vars(manifest), indent=2).encode())
    return manifest


def read_records(folder: Path, record: type[AnyRecord]) -> Iterator[AnyRecord]:
    """Stream the records of a stage's folder, pictures still encoded."""
    shards = sorted(folder.glob("data/*.parquet"))
    if not shards:
        raise ValueError(f"{folder} holds no data/*.parquet shards; give the output folder of a stage.")
    for shard in shards:
        for row in sources.parquet_rows(shard):
            yield record.from_row(row)


@dataclass(frozen=True)
class Job:
    """What a stage asks of `run_stage`, but for the work itself: alike in every process that works for it."""

    stage: str
    data: DataConfig
    output: OutputConfig
    record: type[Record]
    settings: dict[str, Any]
    seed: int
    models: dict[str, str]
    reads: type[Input]


Spread = Callable[[Iterator[Block]], Iterator[tuple[Block, Sequence[Outcome]]]]
"""Takes blocks as it has hands for them, gives each back with one outcome for each of its inputs, in any order."""


def run_job(job: Job, spread: Spread, shard: Shard) -> Manifest:
    """What `run_stage` does, whoever does the work.

    Args:
        job: what is to be done.
        spread: has the work done.
        shard: which blocks are done here.

    Raises:
        StoreError: as `run_stage` does.
        LeftToOthers: if `shard` has done its blocks and other processes have not.
    """
    folder = job.output.path
    identity = folders.identity_of(job.stage, job.settings, job.seed, job.output.block_size, job.models, job.data)
    if (done := folders.finished(folder, identity)) is not None:
        print(f"{job.stage}: {folder} is already complete ({done.rows_out} rows)", file=sys.stderr)
        return done
    total, repeated = sources.survey(job.data)
    count = math.ceil(total / job.output.block_size)
    if count > blocks.MAX_BLOCKS:
        raise StoreError(blocks.too_many(f"{count:,}", math.ceil(total / blocks.MAX_BLOCKS)))
    with folders.claimed(folder, identity, alone=shard.alone):
        ledgers = Ledgers(folder)
        _run_blocks(job, spread, shard, ledgers, total, repeated)
        if missing := ledgers.missing(count):
            raise LeftToOthers(
                f"shard {shard.number}/{shard.count} of {job.stage} has done its blocks; {missing} of {count} in {folder} are "
                "still to be done by the other shards. The last of them to end writes the manifest; started without --shard, "
                "the same command does what is left."
            )
        manifest = ledgers.manifest(job.stage, identity)
        if manifest.rows_out == 0:
            raise blocks.NoRows(
                f"{job.stage} made no row out of {manifest.rows_in}: {_reasons(manifest.dropped)}."
                f"{blocks.likely_cause(folder, manifest.dropped)}{blocks.told_message(folder)}",
                f"Mend the cause{_anew(folder, shard, ', with any config')}.",
            )
        folders.sweep(folder)
        write_atomically(folder / "manifest.json", json.dumps(vars(manifest), indent=2).encode())
    return manifest


def _anew(folder: Path, shard: Shard, config: str = "") -> str:
    """How to go on with a folder without a row; what blocks it has are forgotten, unless other processes are at work there."""
    if not shard.alone:
        return f", stop the other shards, delete {folder} and start again"
    if any(folder.glob("data/*.parquet")):  # of shards that are at work, or of a block that was killed in its commit
        return " and start again"
    folders.start_afresh(folder)
    return f" and start again: {folder} starts afresh{config}"


def _run_blocks(job: Job, spread: Spread, shard: Shard, ledgers: Ledgers, total: int, repeated: RepeatedIds) -> None:
    """Have the blocks of a shard done that are not, and count them. Of the rows of other shards only the ids matter."""
    size = job.output.block_size
    seen = SeenIds(total)
    all_distinct = not len(repeated) and repeated.total == total
    reader = sources.RowReader(job.data)
    as_input = functools.partial(READERS[job.reads], config=job.data, repeated=repeated)
    own = sum(min(size, total - first) for first in range(0, total, size) if shard.owns(first // size))
    with progress_bar(total=own, desc=job.stage, unit="row", leave=not SAMPLED.get()) as bar:

        def read(number: int) -> Block:
            first = number * size
            return blocks.read_block(number, first, reader.read(first, size), as_input, seen)

        def to_do() -> Iterator[Block]:
            for number in range(math.ceil(total / size)):
                if (ledger := ledgers.read(number)) is not None:
                    for identity, digest in ledger["ids"].items():
                        seen.add(identity, digest)
                    _check_failures(job, shard, ledgers, ledger)
                    bar.update(ledger["rows_in"] * shard.owns(number))
                elif shard.owns(number):
                    yield read(number)
                elif not all_distinct:
                    read(number)

        for block, outcomes in spread(to_do()):
            if not shard.alone:
                ledgers.refresh()
            _check_answers(job, shard, ledgers, block, outcomes)
            ledger = blocks.finish(job.output.path, block, outcomes, job.record)
            ledgers.count(ledger)
            _check_failures(job, shard, ledgers, ledger)
            bar.update(len(block.rows))


def _check_answers(job: Job, shard: Shard, ledgers: Ledgers, block: Block, outcomes: Sequence[Outcome]) -> None:
    """Stop before a block is written that passes the limit because models did not answer: another time they may."""
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    lost = [outcome for outcome in failed if outcome.reason in blocks.UNANSWERED]
    total = ledgers.counts["quarantined"] + len(block.quarantine) + len(failed)
    folder = job.output.path
    if not lost or total <= job.output.max_quarantine or blocks.read_ledger(folder, block.number) is not None:
        return
    ledgers.refresh()
    again = " and start again: this block was not written, and its rows are asked again"
    if shard.alone and not ledgers.counts["rows_out"]:
        again = _anew(folder, shard)
    raise StoreError(
        f"{job.stage} stopped: {total} rows failed, above --output.max_quarantine {job.output.max_quarantine} (last block: "
        f"{len(lost)} of {len(block.inputs)} rows got no answer). First message: {lost[0].message} Mend the cause, or raise the "
        f"limit,{again}."
    )


def _check_failures(job: Job, shard: Shard, ledgers: Ledgers, last: Mapping[str, Any]) -> None:
    if ledgers.counts["quarantined"] <= job.output.max_quarantine:
        return
    folder = job.output.path
    ledgers.refresh()
    how = "Mend the data and start in another folder, or raise the limit and start again: it resumes."
    if not ledgers.counts["rows_out"]:
        how = f"No row was made yet: mend the cause{_anew(folder, shard)}."
    raise StoreError(
        f"{job.stage} stopped: {ledgers.counts['quarantined']} rows failed, above --output.max_quarantine "
        f"{job.output.max_quarantine} (last block: {_reasons(last['dropped'])}).{blocks.told_message(folder)} {how}"
    )


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block

"""Stage output that survives anything: atomic shards, a manifest that adds up, resume by itself, quarantine.

A stage's folder holds

    config.json        what decides the rows; another config refuses the folder
    data/train-*.parquet   one shard per block of inputs, written to a temporary name, synced, renamed
    quarantine/*.jsonl     rows that failed, with reason and message
    progress/*.json        one ledger per finished block; its rename commits the block
    manifest.json      the sum of all ledgers, written last

Work is cut into blocks by input index, so a run killed at any moment and started again with the same config makes the
same batches and ends with the same rows.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefalign
from prefalign import blocks, sources
from prefalign.blocks import AnyRecord, Record, StoreError
from prefalign.images import ImageError
from prefalign.manifest import Manifest, differences, library_versions, read_manifest, write_atomically
from prefalign.records import SCHEMA_VERSION, Candidates, Pair, Prompt, RecordError, canonical_json
from prefalign.seen import SeenIds
from prefalign.sources import BadRow, DataConfig


@dataclass
class OutputConfig:
    """Where a stage writes, and when it gives up.

    Attributes:
        path: folder of the stage's output.
        block_size: inputs per block; one block is one batch of work, one shard and one step of progress.
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
Process = Callable[[list[Any]], Iterable[Outcome]]
Input = Prompt | Pair | Candidates
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
        StoreError: if the folder belongs to another config, too many rows failed, nothing was left, or the disk is full.
    """
    folder = output.path
    identity = _identity(stage, settings, seed, output, models, data)
    if (finished := _finished(folder, identity)) is not None:
        return finished
    total, repeated = sources.survey(data)
    with _disk_errors(folder):
        _claim_folder(folder, identity)
        job = _Job(stage, data, process, output, record, repeated, reads, SeenIds(total))
        manifest = _sum_up(stage, identity, _run_blocks(job, total))
        if manifest.rows_out == 0:
            _start_afresh(folder)
            raise blocks.NoRows(
                f"{stage} made no row out of {manifest.rows_in}: {_reasons(manifest.dropped)}.{blocks.first_message(folder)}",
                f"Mend the cause and start again: {folder} starts afresh, with any config.",
            )
        write_atomically(folder / "manifest.json", json.dumps(vars(manifest), indent=2).encode())
    return manifest


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
        StoreError: if the folder belongs to another config or the disk is full.
    """
    folder = output.path
    identity = _identity(stage, settings, seed, output)
    if (finished := _finished(folder, identity)) is not None:
        return finished
    with _disk_errors(folder):
        _claim_folder(folder, identity)
        ledgers = []
        for number, block in enumerate(_batched(records, output.block_size)):
            ledger = {"block": number, "rows_in": len(block), "rows_used": len(block), "rows_out": len(block),
                      "dropped": {}, "quarantined": 0}  # fmt: skip
            blocks.commit(folder, number, block, [], ledger, record)
            ledgers.append(ledger)
        manifest = _sum_up(stage, identity, ledgers)
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


@dataclass
class _Job:
    """What `run_stage` was asked for, the ids that several rows have, and the content of each id met so far."""

    stage: str
    data: DataConfig
    process: Process
    output: OutputConfig
    record: type[Record]
    repeated: Container[str]
    reads: type[Input]
    seen: SeenIds


def _run_blocks(job: _Job, total: int) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    output = job.output
    quarantined = made = 0
    with tqdm(total=total, desc=job.stage, unit="row", disable=None) as bar:
        for number, rows in enumerate(_batched(sources.read_rows(job.data), output.block_size)):
            ledger_file = output.path / "progress" / f"{number:05d}.json"
            if ledger_file.is_file():
                ledger = json.loads(ledger_file.read_text())
                for identity, digest in ledger["ids"].items():
                    job.seen.add(identity, digest)
            else:
                ledger = _work_block(job, number, rows)
            quarantined += ledger["quarantined"]
            made += ledger["rows_out"]
            if quarantined > output.max_quarantine:
                how = "Mend the data and start in another folder, or raise the limit and start again: it resumes."
                if not made:
                    _start_afresh(output.path)
                    how = f"No row was made yet: mend the cause and start again, {output.path} starts afresh."
                raise StoreError(
                    f"{job.stage} stopped: {quarantined} rows failed, above --output.max_quarantine "
                    f"{output.max_quarantine} (last block: {_reasons(ledger['dropped'])})."
                    f"{blocks.first_message(output.path)} {how}"
                )
            bar.update(len(rows))
            yield ledger


def _work_block(job: _Job, number: int, rows: list[Mapping[str, Any] | BadRow]) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    quarantine: list[dict[str, Any]] = []
    inputs: list[tuple[int, Input]] = []
    ids: dict[str, str] = {}
    first = number * job.output.block_size
    for offset, row in enumerate(rows):
        try:
            given = READERS[job.reads](row, job.data, repeated=job.repeated)
            digest = sources.content_digest(given)
            if (known := job.seen.holds(given.id, digest)) is False:
                raise RecordError("conflicting_id", f"id {given.id!r} belongs to an earlier row with other content, so rows "
                                  "made from the two could not be told apart. Give each row its own id.")  # fmt: skip
        except (RecordError, ImageError) as error:
            quarantine.append(blocks.quarantined(first + offset, row, error.reason, str(error)))
            continue
        if known:
            dropped["duplicate"] += 1
            continue
        job.seen.add(given.id, digest)
        ids[given.id] = digest
        inputs.append((offset, given))
    records: list[Record] = []
    used = 0
    outcomes = list(job.process([given for _, given in inputs])) if inputs else []
    assert len(outcomes) == len(inputs), "a stage gives one outcome per input"
    for (offset, _), outcome in zip(inputs, outcomes, strict=True):
        if isinstance(outcome, Dropped):
            dropped[outcome.reason] += 1
        elif isinstance(outcome, Failed):
            quarantine.append(blocks.quarantined(first + offset, rows[offset], outcome.reason, outcome.message))
        elif unfit := _unfit(outcome):
            dropped[unfit] += 1
        else:
            used += 1
            records.extend(outcome)
    for row in quarantine:
        dropped[row["reason"]] += 1
    ledger = {"block": number, "rows_in": len(rows), "rows_used": used, "rows_out": len(records),
              "dropped": dict(sorted(dropped.items())), "quarantined": len(quarantine), "ids": ids}  # fmt: skip
    blocks.commit(job.output.path, number, records, quarantine, ledger, job.record)
    return ledger


def _unfit(records: Sequence[Record]) -> str | None:
    """Why a row's records cannot be written, or None."""
    try:
        for record in records:
            record.check()
    except RecordError as error:
        return error.reason
    return None if records else "no_record"


def _identity(
    stage: str,
    settings: Mapping[str, Any],
    seed: int,
    output: OutputConfig,
    models: Mapping[str, str] | None = None,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """What decides the rows. The picture folder's name counts, as a digest: a manifest is published, machine paths are not."""
    images = "" if data is None or data.images is None else hashlib.sha256(data.images.as_posix().encode()).hexdigest()
    read = (
        {} if data is None else {name: value for name in ("fact_columns", "question") if (value := getattr(data, name))}
    )
    return {"stage": stage, "schema_version": SCHEMA_VERSION, "settings": json.loads(canonical_json(settings)),
            "seed": seed, "models": dict(models or {}), "data_sha256": sources.fingerprint(data) if data else "",
            "images_folder_sha256": images, "limit": data.limit if data else 0,
            "block_size": output.block_size, **read}  # fmt: skip


def _finished(folder: Path, identity: Mapping[str, Any]) -> Manifest | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    _claim_folder(folder, identity)
    return manifest


def _start_afresh(folder: Path) -> None:
    """Forget the blocks of a run that made no row. Its quarantine stays to be read until the next start."""
    for ledger in folder.glob("progress/*.json"):
        ledger.unlink()


def _claim_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    file = folder / "config.json"
    if file.is_file():
        before = json.loads(file.read_text())
        unused = not any(
            next(folder.glob(kind), None) for kind in ("progress/*.json", "data/*.parquet", "manifest.json")
        )
        if before != identity and not (unused and "data_sha256" in before):
            changed = "; ".join(differences(before, identity))
            raise StoreError(
                f"{folder} holds rows made with another config ({changed}). Mixing them would make the manifest a lie: "
                "give another `output.path`, or delete the folder."
            )
        if not unused:
            return
        for failures in folder.glob("quarantine/*.jsonl"):
            failures.unlink()
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise StoreError(f"{folder} is not empty and holds no stage's output. Give another `output.path`.")
    write_atomically(file, json.dumps(identity, indent=2).encode())


def _sum_up(stage: str, identity: Mapping[str, Any], ledgers: Iterable[Mapping[str, Any]]) -> Manifest:
    manifest = Manifest(stage=stage, complete=True, schema_version=SCHEMA_VERSION, code_version=prefalign.__version__,
                        config=dict(identity), seed=identity["seed"], models=dict(identity["models"]),
                        libraries=library_versions(), rows_in=0, rows_used=0, rows_out=0)  # fmt: skip
    dropped: Counter[str] = Counter()
    for ledger in ledgers:
        manifest.rows_in += ledger["rows_in"]
        manifest.rows_used += ledger["rows_used"]
        manifest.rows_out += ledger["rows_out"]
        manifest.quarantined += ledger["quarantined"]
        dropped.update(ledger["dropped"])
    manifest.dropped = dict(sorted(dropped.items()))
    return manifest


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while block := list(itertools.islice(iterator, size)):
        yield block


class _disk_errors:
    """Turn a full or read-only disk into a message that says how to go on."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"the disk that holds {self.folder} is full. Finished blocks are safe: free some space and start the same "
                "command again, it resumes."
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
            raise StoreError(
                f"cannot write to {self.folder} ({error.strerror}). Give an `output.path` you may write to."
            ) from error

"""A stage's folder: whom it belongs to, and which of its blocks are committed, by whatever process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import prefalign
from prefalign import sources
from prefalign.blocks import StoreError, read_ledger
from prefalign.locks import is_alone, open_to_lock, share
from prefalign.manifest import Manifest, differences, library_versions, read_manifest, temporary, write_atomically
from prefalign.records import SCHEMA_VERSION, canonical_json
from prefalign.sources import DataConfig

STALE = 600.0  # seconds after which nobody is still writing a block's file


def identity_of(
    stage: str,
    settings: Mapping[str, Any],
    seed: int,
    block_size: int,
    models: Mapping[str, str] | None = None,
    data: DataConfig | None = None,
) -> dict[str, Any]:
    """What decides the rows, as `config.json` has it.

    Args:
        stage: name of the stage.
        settings: everything that changes the rows.
        seed: seed of the stage.
        block_size: inputs per block.
        models: model names to fingerprints.
        data: where the rows come from; None: from nowhere (an export). The picture folder's name counts, as a digest: a manifest
            is published, machine paths are not. A branch or tag is noted as `revision`, and decides nothing beside its commit.
    """
    images = "" if data is None or data.images is None else hashlib.sha256(data.images.as_posix().encode()).hexdigest()
    read: dict[str, Any] = (
        {} if data is None else {name: value for name in ("fact_columns", "question") if (value := getattr(data, name))}
    )
    source = {} if data is None else sources.provenance(data)
    if data is not None and source and (name := sources.revision_name(data)):
        read["revision"] = name
    return {"stage": stage, "schema_version": SCHEMA_VERSION, "settings": json.loads(canonical_json(settings)),
            "seed": seed, "models": dict(models or {}), "data_sha256": sources.fingerprint(data) if data else "",
            "images_folder_sha256": images, "limit": data.limit if data else 0,
            "block_size": block_size, **read, **({"source": source} if source else {})}  # fmt: skip


def finished(folder: Path, identity: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a finished folder of this config, or None.

    Raises:
        StoreError: it is finished with another config.
    """
    if not (folder / "manifest.json").is_file():
        return None
    claim(folder, identity)
    return read_manifest(folder)


def recall_source(folder: Path, data: DataConfig) -> None:
    """Let a finished folder say which commit of the Hub it was made from: a rerun then needs no network to find it complete."""
    made = _claimed_for(folder) if (folder / "manifest.json").is_file() else None
    sources.recall(data, *((made.get("source"), made.get("revision")) if made is not None else (None, None)))


def _claimed_for(folder: Path) -> dict[str, Any] | None:
    """What a stage's `config.json` says; None: there is none, or it is somebody else's."""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and "stage" in found else None


def _rows_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What of `config.json` decides the rows: the commit, and not under which name it was asked for."""
    return {name: value for name, value in identity.items() if name != "revision"}


def _refusal(folder: Path, before: Mapping[str, Any], identity: Mapping[str, Any], *, unused: bool) -> StoreError:
    changed = "; ".join(differences(before, identity))
    if unused and "data_sha256" in before:
        return StoreError(
            f"{folder} was claimed for another config ({changed}), and another process may be at work there. Wait until it has "
            "ended, or give another `output.path`; if there is none, delete the folder."
        )
    was, now = (each.get("source") or {} for each in (before, identity))
    how = "give another `output.path`, or delete the folder."
    if was.get("repository") == now.get("repository") and was.get("commit") != now.get("commit"):
        how = (
            f"{now['repository']} on the Hub has changed since: give `data.revision: {was['commit']}` to go on with the rows of "
            "then, or another `output.path` for those of now."
        )
    return StoreError(
        f"{folder} holds rows made with another config ({changed}). Mixing them would make the manifest a lie: {how}"
    )


@contextmanager
def claimed(folder: Path, identity: Mapping[str, Any], *, alone: bool = True) -> Iterator[None]:
    """Claim a folder (`claim`) and show other processes that this one is at work there.

    Args:
        folder: the output folder.
        identity: what decides the rows.
        alone: this process works on all blocks; a folder in which another one is at work is not taken over all the same.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)
        with open_to_lock(folder / ".at_work") as mark:
            empty = is_alone(mark)
            claim(folder, identity, alone=alone and empty)
            share(mark)
            claim(folder, identity, alone=False)  # between the two locks another one may have come
            yield
            if is_alone(mark):
                (folder / ".at_work").unlink(missing_ok=True)


def claim(folder: Path, identity: Mapping[str, Any], *, alone: bool = True) -> None:
    """Write `config.json` into a folder that is empty or was claimed and not used, or see that it is this config's.

    Args:
        folder: the output folder.
        identity: what decides the rows.
        alone: no other process is at work there. If one may be, whoever comes first claims the folder, and no other config can
            take it over.

    Raises:
        StoreError: the folder belongs to another config, or to somebody else.
    """
    _refuse_foreign(folder)
    file = folder / "config.json"
    if (before := _claimed_for(folder)) is not None:
        unused = not any(
            next(folder.glob(kind), None) for kind in ("progress/*.json", "data/*.parquet", "manifest.json")
        )
        same = _rows_of(before) == _rows_of(identity)
        if not same and not (alone and unused and "data_sha256" in before):
            raise _refusal(folder, before, identity, unused=unused)
        if not unused or not alone:
            return
        for failures in folder.glob("quarantine/*.jsonl"):
            failures.unlink()
        if same:
            return
    content = json.dumps(identity, indent=2).encode()
    if alone:
        write_atomically(file, content)
    else:
        create(file, content)
        claim(folder, identity, alone=False)


def _refuse_foreign(folder: Path) -> None:
    """Raise `StoreError` if a folder holds files, and no stage has claimed it."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if any(not name.startswith(".") for name in names) and _claimed_for(folder) is None:
        raise StoreError(f"{folder} is not empty and holds no stage's output. Give another `output.path`.")


def create(file: Path, content: bytes) -> None:
    """Write a file whole unless another process has done so before; whichever of them came first, the file is not changed."""
    unfinished = temporary(file)
    write_atomically(unfinished, content)
    try:
        os.link(unfinished, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(unfinished, file)
    unfinished.unlink(missing_ok=True)


def start_afresh(folder: Path) -> None:
    """Forget the blocks of a run that made no row, and what it decided. Its quarantine stays to be read until the next start."""
    for kind in ("progress/*.json", "survey/decided-*.json"):
        for file in folder.glob(kind):
            file.unlink()


def sweep(folder: Path) -> None:
    """Delete what killed writers of blocks have left under temporary names, once every block is committed.

    Processes that are alive may still write blocks that others have committed before them, so a file is deleted only if its
    writer was a process of this machine that is gone, or if it is older than `STALE` seconds.
    """
    for kind in (".", "data", "quarantine", "progress", "survey", "pool"):
        sweep_up(folder / kind)
    for lock in (folder / "progress" / ".lock", *(folder / "survey").glob(".*.lock")):
        lock.unlink(missing_ok=True)


def sweep_up(folder: Path) -> None:
    """Delete what writers that are gone have left in one folder."""
    for left in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if _is_abandoned(left):
                left.unlink()


def _is_abandoned(unfinished: Path) -> bool:
    if time.time() - unfinished.lstat().st_mtime > STALE:
        return True
    writer = re.search(rf"\.{re.escape(socket.gethostname())}-(\d+)\.tmp$", unfinished.name)
    if writer is None:
        return False
    try:
        os.kill(int(writer[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is another user's
        pass
    return False


class Ledgers:
    """The ledgers of a folder's committed blocks, summed up; memory holds their counts.

    Attributes:
        counts: `rows_in`, `rows_used`, `rows_out` and `quarantined` of all blocks known so far.
        dropped: rows dropped by reason.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._known: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()

    def read(self, number: int) -> dict[str, Any] | None:
        """A block's ledger, counted; None if the block is not committed."""
        if (ledger := read_ledger(self._folder, number)) is not None:
            self.count(ledger)
        return ledger

    def count(self, ledger: Mapping[str, Any]) -> None:
        """Add a committed block to the sums, once."""
        if ledger["block"] not in self._known:
            self._known.add(ledger["block"])
            self.counts.update({name: ledger[name] for name in ("rows_in", "rows_used", "rows_out", "quarantined")})
            self.dropped.update(ledger["dropped"])

    def refresh(self) -> None:
        """Count the blocks that other processes have committed meanwhile."""
        with suppress(FileNotFoundError):
            for entry in os.listdir(self._folder / "progress"):
                if not entry.startswith(".") and int(entry.removesuffix(".json")) not in self._known:
                    self.read(int(entry.removesuffix(".json")))

    def manifest(self, stage: str, identity: Mapping[str, Any]) -> Manifest:
        """The sum of the ledgers, and what the rows were made with."""
        counts = {name: self.counts[name] for name in ("rows_in", "rows_used", "rows_out", "quarantined")}
        return Manifest(stage=stage, complete=True, schema_version=SCHEMA_VERSION, code_version=prefalign.__version__,
                        config=dict(identity), seed=identity["seed"], models=dict(identity["models"]),
                        libraries=library_versions(), dropped=dict(sorted(self.dropped.items())), **counts)  # fmt: skip

    def missing(self, blocks: int) -> int:
        """How many of so many blocks are not committed."""
        return sum(number not in self._known and self.read(number) is None for number in range(blocks))


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a message that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"the disk that holds {folder} is full. Finished blocks are safe: free some space and start the same "
                "command again, it resumes."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS):
            raise StoreError(
                f"cannot write to {folder} ({error.strerror}). Give an `output.path` you may write to."
            ) from error
        raise

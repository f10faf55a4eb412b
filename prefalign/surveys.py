"""Passes over all inputs of a stage before any of them is decided on.

What a `Survey` finds is kept on disk, so that a killed run goes on where it was, and so is what is decided on all of it, so that
all rows of a folder follow one decision.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign import folders, sources
from prefalign.execution import SAMPLED, SHARD
from prefalign.images import ImageError, sha256
from prefalign.manifest import write_atomically
from prefalign.records import RecordError
from prefalign.seen import Owners, SeenIds
from prefalign.sources import DataConfig
from prefalign.store import READERS, Input, OutputConfig

PATIENCE = 120.0
"""Seconds after which a mark that was not renewed is a dead process's. File systems that nodes share may show a change a minute
late."""
Work = Callable[[list[Any]], list[dict[str, Any]]]
"""Takes the readable inputs of a block, gives what was found of them as JSON-able mappings."""
Rows = Callable[[], list[Any]]
Again = Callable[[dict[str, Any]], bool]
"""Whether a row that an earlier run has found is to be found anew."""


@dataclass(frozen=True)
class Survey:
    """Passes of a stage over its inputs; what each has found is in `survey/` of the output.

    Attributes:
        stage: name of the stage, for the progress bar.
        data: the inputs.
        output: where the stage writes, and in blocks of how many inputs.
        reads: what a row is read as.
        total: number of rows (`sources.survey`).
        repeated: ids that several rows have (`sources.survey`).
    """

    stage: str
    data: DataConfig
    output: OutputConfig
    reads: type[Input]
    total: int
    repeated: Container[str]

    def __call__(self, kind: str, work: Work, again: Again | None = None) -> Iterator[list[dict[str, Any]]]:
        """Work on the readable inputs of each block; what a killed run has done is taken from disk.

        What decides the rows (data, settings, model) is in the `config.json` with which `run_stage` has claimed the folder.
        Of several processes at work on one folder (`execution`) each does its own blocks first, then those of the others that
        nobody has done and nobody is at: whoever begins a block leaves a mark and renews it while it works. At the end each
        waits for blocks that others are at, since they may be asking a server for answers that are paid for, and does those
        whose mark was not renewed for `PATIENCE` seconds. What came to disk first counts. Only rows that are found anew (`again`)
        may look different to two processes: what they decide, and of which rows, belongs into `decide`.

        Args:
            kind: name of the pass.
            work: what it does with the inputs of a block.
            again: rows of an earlier run that are worked on once more, each by the process that owns its block, until there is
                a `decision` about the pass. `work` then gives one mapping for each input. None: none is.
        """
        from tqdm import tqdm

        shard = SHARD.get()
        if self.decision(kind) is not None:
            again = None
        if not shard.alone:
            for number, block in self._blocks():
                if shard.owns(number) and (self._begins(kind, number) or self.file(kind, number).is_file()):
                    self._found(kind, number, block, work, again)
            for number, block in self._blocks():
                if not shard.owns(number) and self._begins(kind, number):
                    self._found(kind, number, block, work, None)
        name, stays = f"{self.stage}: {kind}", not SAMPLED.get()
        with tqdm(total=self.total, desc=name, unit="row", disable=None, leave=stays) as bar:
            seen: dict[Path, tuple[int, float]] = {}
            for number, block in self._blocks():
                if not shard.alone and not self.file(kind, number).is_file():
                    self._wait(kind, number, seen)
                found = self._found(kind, number, block, work, again if shard.alone else None)
                bar.update(min(self.output.block_size, self.total - number * self.output.block_size))
                yield found

    def decide(self, kind: str, decision: dict[str, Any]) -> dict[str, Any]:
        """Put down what follows from all that a pass has found, unless that has been done.

        Args:
            kind: name of the pass, which is finished.
            decision: all that has to be the same in every process and after every restart, JSON-able.

        Returns:
            The decision that stands: the first one.
        """
        if (stands := self.decision(kind)) is None:
            content = json.dumps({"of": self._config(), "decision": decision})
            folders.create(self.output.path / "survey" / f"decided-{kind}.json", content.encode())
            stands = self.decision(kind)
        assert stands is not None, "nobody deletes what belongs to this config"
        return stands

    def decision(self, kind: str) -> dict[str, Any] | None:
        """The decision that stands about a pass; None: there is none yet."""
        stands = self._read(self.output.path / "survey" / f"decided-{kind}.json")
        return None if stands is None else stands["decision"]

    def file(self, kind: str, number: int) -> Path:
        """Where what a pass has found of a block is kept, under `rows`."""
        return self.output.path / "survey" / f"{kind}-{number:05d}.json"

    def _blocks(self) -> Iterator[tuple[int, Rows]]:
        """Number of each block, and what reads its rows."""
        reader, size = sources.RowReader(self.data), self.output.block_size
        for number in range(math.ceil(self.total / size)):
            yield number, functools.partial(reader.read, number * size, size)

    def _begins(self, kind: str, number: int) -> bool:
        """Whether this shard is the one to do a block, which it then has marked. It goes on with what it was at when killed."""
        if self._kept(kind, number) is not None:
            return False
        mark, shard = self._mark(kind, number), SHARD.get()
        who = f"{shard.number}/{shard.count}"
        if not mark.is_file():
            folders.create(mark, who.encode())
        with suppress(FileNotFoundError):  # another shard has just done it
            return mark.read_text() == who
        return False

    def _wait(self, kind: str, number: int, seen: dict[Path, tuple[int, float]]) -> None:
        """Wait until a block is done, or is this shard's to do: nobody is at it, or whoever was seems to be dead.

        Args:
            kind: name of the pass.
            number: of the block.
            seen: by mark when it was last renewed, by the clock of its file system, and since when that is known here.
        """
        mark = self._mark(kind, number)
        while self._kept(kind, number) is None and not self._begins(kind, number):
            for other in mark.parent.glob(f".{kind}-*.begun"):
                with suppress(FileNotFoundError):
                    renewed = other.stat().st_mtime_ns
                    if seen.get(other, (None,))[0] != renewed:
                        seen[other] = renewed, time.monotonic()
            if mark in seen and time.monotonic() - seen[mark][1] > PATIENCE:
                del seen[mark]
                mark.unlink(missing_ok=True)
            else:
                time.sleep(min(1.0, PATIENCE / 4))

    @contextmanager
    def _at_work(self, kind: str, number: int) -> Iterator[None]:
        """Renew this shard's mark of a block from time to time; take it away if the work fails."""
        mark, ended = self._mark(kind, number), threading.Event()

        def renew() -> None:
            while not ended.wait(PATIENCE / 12):
                with suppress(FileNotFoundError):
                    os.utime(mark)

        thread = threading.Thread(target=renew, daemon=True)
        if not SHARD.get().alone:
            thread.start()
        try:
            yield
        except BaseException:
            mark.unlink(missing_ok=True)
            raise
        finally:
            ended.set()

    def _found(self, kind: str, number: int, block: Rows, work: Work, again: Again | None) -> list[dict[str, Any]]:
        """What was found of a block, on disk or now."""
        found = self._kept(kind, number)
        if found is None:
            with self._at_work(kind, number):
                made = {"of": self._config(), "rows": work(self._inputs(block))}
            folders.create(self.file(kind, number), json.dumps(made).encode())
            found = self._kept(kind, number)
        elif again is not None and any(map(again, found)):
            inputs = self._inputs(block)
            places = [place for place, row in enumerate(found) if again(row)]
            for place, row in zip(places, work([inputs[place] for place in places]), strict=True):
                found[place] = row
            write_atomically(self.file(kind, number), json.dumps({"of": self._config(), "rows": found}).encode())
        assert found is not None, "nobody deletes what belongs to this config"
        self._mark(kind, number).unlink(missing_ok=True)
        return found

    def _inputs(self, block: Rows) -> list[Any]:
        """The readable inputs of a block."""
        inputs = []
        for row in block():
            try:
                inputs.append(READERS[self.reads](row, self.data, repeated=self.repeated))
            except (RecordError, ImageError):
                continue  # the store puts it into quarantine
        return inputs

    def _kept(self, kind: str, number: int) -> list[dict[str, Any]] | None:
        """What is on disk of a block."""
        found = self._read(self.file(kind, number))
        return None if found is None else found["rows"]

    def _read(self, file: Path) -> dict[str, Any] | None:
        """What is on disk. What an earlier config has left there is deleted."""
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
        except FileNotFoundError:
            return None
        if found["of"] == self._config():
            return found
        file.unlink(missing_ok=True)
        return None

    def _config(self) -> str:
        return hashlib.sha256((self.output.path / "config.json").read_bytes()).hexdigest()

    def _mark(self, kind: str, number: int) -> Path:
        return self.output.path / "survey" / f".{kind}-{number:05d}.begun"


def picture_owners(data: DataConfig) -> Owners:
    """Which of the rows that show a picture alone makes its pair. Rows that the store will refuse own nothing."""
    from tqdm import tqdm

    total, repeated = sources.survey(data)
    seen = SeenIds(total)

    def shown() -> Iterator[tuple[str, str]]:
        rows = tqdm(sources.read_rows(data), total=total, desc="rows of each picture", unit="row", disable=None,
                    leave=not SAMPLED.get())  # fmt: skip
        for row in rows:
            try:
                prompt = sources.to_prompt(row, data, repeated=repeated)
            except (RecordError, ImageError):
                continue
            digest = sources.content_digest(prompt)
            known = seen.holds(prompt.id, digest)
            if known is None:
                seen.add(prompt.id, digest)
            if known is not False and len(prompt.images) == 1:
                yield sha256(prompt.images[0]), prompt.id

    return Owners(shown())

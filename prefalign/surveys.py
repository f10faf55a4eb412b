"""Passes over all inputs of a stage before any of them is decided on.

What a `Survey` finds is kept on disk, so that a killed run goes on where it was, and so is what is decided on all of it, so that
all rows of a folder follow one decision.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign import folders, sources
from prefalign.execution import SAMPLED, SHARD
from prefalign.images import ImageError, sha256
from prefalign.locks import locked
from prefalign.manifest import write_atomically
from prefalign.progress import progress_bar
from prefalign.records import RecordError, canonical_json
from prefalign.seen import Owners, SeenIds
from prefalign.sources import DataConfig
from prefalign.store import READERS, Input, OutputConfig

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
        rule: settings that no pass reads, only what is decided on it, as `pairs.min_gap`: with other values of these in a folder
            without a row, passes stay, and decisions are made anew.
    """

    stage: str
    data: DataConfig
    output: OutputConfig
    reads: type[Input]
    total: int
    repeated: Container[str]
    rule: tuple[str, ...] = ()

    def __call__(self, kind: str, work: Work, again: Again | None = None) -> Iterator[list[dict[str, Any]]]:
        """Work on the readable inputs of each block; what a killed run has done is taken from disk.

        What decides the rows (data, settings, model) is in the `config.json` with which `run_stage` has claimed the folder.
        Of several processes at work on one folder (`execution`) each does its own blocks first, then those of the others that
        nobody has done and nobody is at. At the end it waits for blocks that others are at, since they may be asking a server for
        answers that are paid for; a process that dies lets go of its block.

        Args:
            kind: name of the pass.
            work: what it does with the inputs of a block.
            again: rows of an earlier run that are worked on once more, until there is a `decision` about the pass. A block that
                another process has worked on since this pass began is taken as it is. `work` then gives one mapping for each
                input. None: none is.
        """
        shard, earlier = SHARD.get(), {}
        if again is not None and self.decision(kind) is None:
            earlier = {number: self._state(kind, number) for number in range(self._count)}

        def found_of(number: int, block: Rows, *, wait: bool) -> list[dict[str, Any]] | None:
            def is_old(row: dict[str, Any]) -> bool:
                return again is not None and again(row) and earlier.get(number) == self._state(kind, number)

            return self._found(kind, number, block, work, is_old, wait=wait)

        for own in () if shard.alone else (True, False):
            for number, block in self._blocks():
                if shard.owns(number) == own:
                    found_of(number, block, wait=False)
        name, stays = f"{self.stage}: {kind}", not SAMPLED.get()
        with progress_bar(total=self.total, desc=name, unit="row", leave=stays) as bar:
            for number, block in self._blocks():
                found = found_of(number, block, wait=True)
                assert found is not None, "it was waited for"
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
        stands = self._read(self.output.path / "survey" / f"decided-{kind}.json", self._config())
        return None if stands is None else stands["decision"]

    def file(self, kind: str, number: int) -> Path:
        """Where what a pass has found of a block is kept, under `rows`."""
        return self.output.path / "survey" / f"{kind}-{number:05d}.json"

    @property
    def _count(self) -> int:
        return math.ceil(self.total / self.output.block_size)

    def _blocks(self) -> Iterator[tuple[int, Rows]]:
        """Number of each block, and what reads its rows."""
        reader, size = sources.RowReader(self.data), self.output.block_size
        for number in range(self._count):
            yield number, functools.partial(reader.read, number * size, size)

    def _state(self, kind: str, number: int) -> tuple[int, int] | None:
        """What changes whenever a block's file is written; None: there is none."""
        try:
            file = self.file(kind, number).stat()
        except FileNotFoundError:
            return None
        return file.st_ino, file.st_mtime_ns

    def _found(
        self, kind: str, number: int, block: Rows, work: Work, again: Again, *, wait: bool
    ) -> list[dict[str, Any]] | None:
        """What was found of a block, on disk or now; None: another process is at it, and is not waited for."""

        def on_disk() -> tuple[list[dict[str, Any]] | None, bool]:
            found = self.kept(kind, number)
            return found, found is not None and not any(map(again, found))

        found, done = on_disk()
        if done:
            return found
        lock = self.output.path / "survey" / f".{kind}-{number:05d}.lock"
        with locked(lock, wait=wait) as held:
            if not held:
                return None
            found, done = on_disk()
            if not done:
                made = {"of": self._config(*self.rule), "rows": self._work_on(found, block, work, again)}
                write = folders.create if found is None else write_atomically
                write(self.file(kind, number), json.dumps(made).encode())
                found = self.kept(kind, number)
            lock.unlink(missing_ok=True)  # not if the work failed: others may wait for it
        return found

    def _work_on(
        self, found: list[dict[str, Any]] | None, block: Rows, work: Work, again: Again
    ) -> list[dict[str, Any]]:
        """What is found of a block, or of those of its rows that are found anew."""
        inputs = self._inputs(block)
        if found is None:
            return work(inputs)
        places = [place for place, row in enumerate(found) if again(row)]
        for place, row in zip(places, work([inputs[place] for place in places]), strict=True):
            found[place] = row
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

    def kept(self, kind: str, number: int) -> list[dict[str, Any]] | None:
        """What a pass has found of a block, if it has done it."""
        found = self._read(self.file(kind, number), self._config(*self.rule))
        return None if found is None else found["rows"]

    def _read(self, file: Path, config: str) -> dict[str, Any] | None:
        """What is on disk. What an earlier config has left there is deleted."""
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
        except FileNotFoundError:
            return None
        if found["of"] == config:
            return found
        file.unlink(missing_ok=True)
        return None

    def _config(self, *rule: str) -> str:
        """Digest of the folder's config, but for the settings of a rule."""
        known = json.loads((self.output.path / "config.json").read_bytes())
        return hashlib.sha256(canonical_json(but_for(known, rule)).encode()).hexdigest()


def but_for(config: dict[str, Any], rule: Iterable[str]) -> dict[str, Any]:
    """A folder's config without some of its settings.

    Args:
        config: as `config.json` has it.
        rule: names of the settings, as `pairs.min_gap`.
    """
    found: dict[str, Any] = copy.deepcopy(config)
    for name in rule:
        *sections, last = name.split(".")
        within = found.get("settings", {})
        for section in sections:
            within = within.get(section, {})
        within.pop(last, None)
    return found


def picture_owners(data: DataConfig) -> Owners:
    """Which of the rows that show a picture alone makes its pair. Rows that the store will refuse own nothing."""
    total, repeated = sources.survey(data)
    seen = SeenIds(total)

    def shown() -> Iterator[tuple[str, str]]:
        rows = progress_bar(sources.read_rows(data), total=total, desc="rows of each picture", unit="row",
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

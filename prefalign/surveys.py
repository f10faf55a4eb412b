"""Passes over all inputs of a stage before any of them is decided on, kept on disk so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign import sources
from prefalign.execution import SHARD
from prefalign.folders import Ledgers
from prefalign.images import ImageError
from prefalign.manifest import write_atomically
from prefalign.records import RecordError
from prefalign.sources import DataConfig
from prefalign.store import READERS, Input, OutputConfig

Work = Callable[[list[Any]], list[dict[str, Any]]]
"""Takes the readable inputs of a block, gives what was found of them as JSON-able mappings."""
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
        Of several processes at work on one folder (`execution`) each does its own blocks first, and then of the others' those
        that are not done yet: nobody waits for anybody.

        Args:
            kind: name of the pass.
            work: what it does with the inputs of a block.
            again: rows of an earlier run that are worked on once more, each by the process that owns its block, until the block
                is committed. `work` then gives one mapping for each input. None: none is.
        """
        from tqdm import tqdm

        shard = SHARD.get()
        if not shard.alone:
            for number, block in self._blocks():
                if shard.owns(number):
                    self._found(kind, number, block, work, again)
        with tqdm(total=self.total, desc=f"{self.stage}: {kind}", unit="row", disable=None) as bar:
            for number, block in self._blocks():
                found = self._found(kind, number, block, work, again if shard.alone else None)
                bar.update(len(block))
                yield found

    def file(self, kind: str, number: int) -> Path:
        """Where what a pass has found of a block is kept, under `rows`."""
        return self.output.path / "survey" / f"{kind}-{number:05d}.json"

    def _blocks(self) -> Iterator[tuple[int, list[Any]]]:
        raw = sources.read_rows(self.data)
        for number in itertools.count():
            block = list(itertools.islice(raw, self.output.block_size))
            if not block:
                return
            yield number, block

    def _found(self, kind: str, number: int, block: list[Any], work: Work, again: Again | None) -> list[dict[str, Any]]:
        """What was found of a block, on disk or now."""
        of = hashlib.sha256((self.output.path / "config.json").read_bytes()).hexdigest()
        file = self.file(kind, number)
        done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        rows: list[dict[str, Any]] = done.get("rows", [])
        if done.get("of") != of:
            rows = work(self._inputs(block))
        elif again is not None and any(map(again, rows)) and not Ledgers(self.output.path).file(number).is_file():
            inputs = self._inputs(block)
            places = [place for place, row in enumerate(rows) if again(row)]
            for place, row in zip(places, work([inputs[place] for place in places]), strict=True):
                rows[place] = row
        else:
            return rows
        write_atomically(file, json.dumps({"of": of, "rows": rows}).encode())
        return rows

    def _inputs(self, block: list[Any]) -> list[Any]:
        """The readable inputs of a block."""
        inputs = []
        for row in block:
            try:
                inputs.append(READERS[self.reads](row, self.data, repeated=self.repeated))
            except (RecordError, ImageError):
                continue  # the store puts it into quarantine
        return inputs

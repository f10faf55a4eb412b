"""Passes over all inputs of a stage before any of them is decided on, kept on disk so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign import folders, sources
from prefalign.execution import SHARD
from prefalign.images import ImageError
from prefalign.records import RecordError
from prefalign.sources import DataConfig
from prefalign.store import READERS, Input, OutputConfig

Work = Callable[[list[Any]], list[dict[str, Any]]]
"""Takes the readable inputs of a block, gives what was found of them as JSON-able mappings."""


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

    def __call__(self, kind: str, work: Work) -> Iterator[list[dict[str, Any]]]:
        """Work on the readable inputs of each block; what a killed run has done is taken from disk.

        What decides the rows (data, settings, model) is in the `config.json` with which `run_stage` has claimed the folder.
        Of several processes at work on one folder (`execution`) each does its own blocks first, then those of the others that
        nobody has done and nobody is at: whoever begins a block leaves a mark. Nobody waits for anybody: at the end each does
        what is missing, marked or not, since who left the mark may be dead. All see the same: what came to disk first.

        Args:
            kind: name of the pass.
            work: what it does with the inputs of a block.
        """
        from tqdm import tqdm

        shard = SHARD.get()
        if not shard.alone:
            for mine in (shard.owns, lambda number: not shard.owns(number)):
                for number, block in self._blocks():
                    if mine(number) and self._begins(kind, number):
                        self._found(kind, number, block, work)
        with tqdm(total=self.total, desc=f"{self.stage}: {kind}", unit="row", disable=None) as bar:
            for number, block in self._blocks():
                found = self._found(kind, number, block, work)
                bar.update(len(block))
                yield found

    def _blocks(self) -> Iterator[tuple[int, list[Any]]]:
        raw = sources.read_rows(self.data)
        for number in itertools.count():
            block = list(itertools.islice(raw, self.output.block_size))
            if not block:
                return
            yield number, block

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

    def _found(self, kind: str, number: int, block: list[Any], work: Work) -> list[dict[str, Any]]:
        """What was found of a block, on disk or now."""
        found = self._kept(kind, number)
        if found is None:
            inputs = []
            for row in block:
                try:
                    inputs.append(READERS[self.reads](row, self.data, repeated=self.repeated))
                except (RecordError, ImageError):
                    continue  # the store puts it into quarantine
            made = {"of": self._config(), "rows": work(inputs)}
            folders.create(self._file(kind, number), json.dumps(made).encode())
            found = self._kept(kind, number)
        assert found is not None, "nobody deletes what belongs to this config"
        self._mark(kind, number).unlink(missing_ok=True)
        return found

    def _kept(self, kind: str, number: int) -> list[dict[str, Any]] | None:
        """What is on disk of a block. What an earlier config has left there is deleted."""
        try:
            found = json.loads(self._file(kind, number).read_bytes())
        except FileNotFoundError:
            return None
        if found["of"] == self._config():
            rows: list[dict[str, Any]] = found["rows"]
            return rows
        self._file(kind, number).unlink(missing_ok=True)
        return None

    def _config(self) -> str:
        return hashlib.sha256((self.output.path / "config.json").read_bytes()).hexdigest()

    def _file(self, kind: str, number: int) -> Path:
        return self.output.path / "survey" / f"{kind}-{number:05d}.json"

    def _mark(self, kind: str, number: int) -> Path:
        return self.output.path / "survey" / f".{kind}-{number:05d}.begun"

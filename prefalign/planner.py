"""What a data stage will cost, before it is started: the stage runs on its first rows in a scratch folder, and is scaled up.

Everything after loading is taken to grow with the number of rows: calls, tokens, time, pools, embeddings. Batches of a small
sample are emptier than those of the run, so the time is rather too long than too short.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from prefalign import bundled, sources
from prefalign.blocks import first_message
from prefalign.engines import USAGE, Usage
from prefalign.execution import SAMPLED
from prefalign.manifest import differences, read_manifest
from prefalign.sources import DataConfig
from prefalign.store import StoreError

SAMPLE = 8


@dataclass
class Plan:
    """What a stage will need.

    Attributes:
        stage: name of the stage.
        rows_in: rows of the data, or those expected of an earlier stage that is not run yet.
        rows_out: rows expected.
        dropped: rows expected to be dropped, by reason.
        requests: answers to be generated or scored.
        text_tokens: tokens of their prompts that are text.
        image_tokens: tokens of their prompts that are pictures.
        new_tokens: tokens to be generated, or of answers to be scored.
        bytes: disk space of the output folder.
        seconds: time, without loading.
        seconds_loading: time until the first row, as it was in the sample.
        sampled: rows that were run.
        sampled_out: rows that they gave.
        blocks: blocks of the run.
        blocks_done: blocks that the output folder holds already.
        conflict: why the run will refuse its output folder; empty: it will not.
        after: the stage whose sample was read, where its output does not exist yet.
        failed: rows expected to fail (quarantine).
        max_quarantine: failed rows above which the run stops.
        unkept: sections of the config whose server is asked and paid for by the sample, and again by the run, since no file keeps
            the answers.
        pooled: whether rows were compared with the pictures of the sample, where the run has all of them.
    """

    stage: str
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    requests: int
    text_tokens: int
    image_tokens: int
    new_tokens: int
    bytes: int
    seconds: float
    seconds_loading: float
    sampled: int
    sampled_out: int
    blocks: int
    blocks_done: int
    conflict: str = ""
    after: str = ""
    failed: int = 0
    max_quarantine: int = 0
    pooled: bool = False
    unkept: list[str] = field(default_factory=list)


@dataclass
class Stage:
    """A stage to be planned: its name, its module, and its resolved config with `data` and `output`."""

    name: str
    module: ModuleType
    config: Any

    def __post_init__(self) -> None:
        names = {entry.name for entry in dataclasses.fields(self.config)}
        if not {"data", "output"} <= names:
            raise ValueError(
                f"{self.name} has no `data` and `output` sections, so it cannot be run on its first rows. Plan a stage that "
                "makes pairs (`prefalign list`: those in datagen/)."
            )

    @property
    def rows(self) -> Path:
        """The folder of its rows."""
        return bundled.rows_folder(self.module, self.config)


@dataclass
class _Sample:
    """What running the first rows showed."""

    folder: Path
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    usage: Usage
    loading: float
    seconds: float
    failed: int = 0
    plan: Plan | None = None


def plan(stages: Sequence[Stage], *, rows: int = SAMPLE) -> list[Plan]:
    """Run each stage on its first rows and scale what was counted to all of them.

    A stage that reads the output folder of an earlier one in the list, not finished yet, is run on that one's sample and scaled
    to the rows expected of it. Nothing is written outside a scratch folder, which is deleted.

    Args:
        stages: what is planned, in the order it will be run.
        rows: rows of the sample. As many as `output.block_size` give batches as full as the run's.

    Raises:
        ValueError: if `rows` is below 1, or a stage gives no row because all of the sample failed; else what the stage raises.
    """
    if rows < 1:
        raise ValueError(f"--rows {rows}: a plan needs at least 1 row to run (8 are usual).")
    samples: dict[Path, _Sample] = {}
    plans = []
    with tempfile.TemporaryDirectory(prefix="prefalign-plan-") as scratch:
        for number, stage in enumerate(stages):
            sample, made = _plan(stage, Path(scratch) / f"{number}", rows, samples)
            samples[stage.rows.resolve()] = sample
            plans.append(made)
    return plans


def _plan(stage: Stage, scratch: Path, rows: int, samples: Mapping[Path, _Sample]) -> tuple[_Sample, Plan]:
    config = stage.config
    data: DataConfig = config.data
    earlier = samples.get(data.path.resolve())
    if earlier is None or read_manifest(data.path) is not None:
        earlier = None
        total, _ = sources.survey(data)
    else:
        assert earlier.plan is not None
        total = min(earlier.plan.rows_out, data.limit or earlier.plan.rows_out)
        data = dataclasses.replace(data, path=earlier.folder)
    limit = min(rows, data.limit or rows)
    if earlier is not None and not total:
        sample = _Sample(scratch, 0, 0, {}, Usage(), 0.0, 0.0)
    else:
        sample = _run(stage, dataclasses.replace(data, limit=limit), scratch)
    scale = total / max(1, sample.rows_in)
    blocks = math.ceil(total / config.output.block_size)
    finished = read_manifest(stage.rows) is not None
    made = Plan(
        stage=stage.name,
        rows_in=total,
        rows_out=round(sample.rows_out * scale),
        dropped={reason: round(count * scale) for reason, count in sample.dropped.items()},
        requests=round(sample.usage.requests * scale),
        text_tokens=round((sample.usage.prompt_tokens - sample.usage.image_tokens) * scale),
        image_tokens=round(sample.usage.image_tokens * scale),
        new_tokens=round(sample.usage.new_tokens * scale),
        bytes=_bytes(scratch, scale, blocks),
        seconds=sample.seconds * scale,
        seconds_loading=sample.loading,
        sampled=sample.rows_in,
        sampled_out=sample.rows_out,
        blocks=blocks,
        blocks_done=blocks if finished else len(list(stage.rows.glob("progress/*.json"))),
        conflict=_conflict(stage.rows, sample.folder, config.data.limit) if earlier is None else "",
        after=earlier.plan.stage if earlier is not None and earlier.plan is not None else "",
        failed=round(sample.failed * scale),
        max_quarantine=config.output.max_quarantine,
        pooled=(scratch / "pool").is_dir(),
        unkept=_unkept(config),
    )
    sample.plan = made
    return sample, made


def _run(stage: Stage, data: DataConfig, scratch: Path) -> _Sample:
    """Run a stage on its sample. It claims its folder when everything is loaded, so that file says when work began."""
    output = dataclasses.replace(stage.config.output, path=scratch, max_quarantine=data.limit)
    before = dataclasses.replace(USAGE)
    config = dataclasses.replace(stage.config, data=data, output=output)
    folder = bundled.rows_folder(stage.module, config)
    print(f"{stage.name}: running its first rows to measure them (--rows {data.limit}) ...", file=sys.stderr)
    started = time.time()
    failed = 0
    sampled = SAMPLED.set(True)
    try:
        manifest = stage.module.main(config)
        counts = manifest.rows_in, manifest.rows_out, manifest.dropped
        failed = manifest.quarantined
    except StoreError as error:
        counts = _nothing_made(stage.name, folder, error)
    finally:
        SAMPLED.reset(sampled)
    claimed = (folder / "config.json").stat().st_mtime
    used = {name: value - getattr(before, name) for name, value in vars(USAGE).items()}
    return _Sample(folder, *counts, Usage(**used), max(0.0, claimed - started), time.time() - claimed, failed)


def _nothing_made(name: str, scratch: Path, error: StoreError) -> tuple[int, int, dict[str, int]]:
    """Counts of a sample of which every row was dropped; an error if rows failed."""
    nothing = re.search(r" made no row out of (\d+): (.*?)\. ", str(error))
    if nothing is None:
        raise error
    if message := first_message(scratch):
        raise ValueError(
            f"{name} made no row out of the first {nothing[1]} ({nothing[2]}), so nothing can be foretold. The first message: "
            f"{message} Mend the cause, or take more rows with --rows."
        ) from error
    return int(nothing[1]), 0, {reason: int(count) for count, reason in re.findall(r"(\d+) (\w+)", nothing[2])}


def _unkept(section: Any, name: str = "", *, kept: bool = False) -> list[str]:
    """Names of the models of a config that a server answers for and whose answers no file keeps."""
    if dataclasses.is_dataclass(section):
        section = vars(section)
    if isinstance(section, (list, tuple)):
        section = {str(number): entry for number, entry in enumerate(section)}
    if not isinstance(section, Mapping):
        return []
    if section.get("engine") == "openai":
        server = section.get("server") or {}
        cache = server.get("cache") if isinstance(server, Mapping) else server.cache
        return [] if kept or cache else [name]
    kept = section.get("name") == "judge" and bool(section.get("cache"))
    return [one for key, entry in section.items() for one in _unkept(entry, f"{name}.{key}".lstrip("."), kept=kept)]


def _bytes(folder: Path, scale: float, blocks: int) -> int:
    """Disk space of all rows: what grows with rows is scaled; each block adds one shard's footer."""
    import pyarrow.parquet as pq

    growing = footers = 0
    for file in folder.rglob("*"):
        if not file.is_file() or file.name in ("config.json", "manifest.json"):
            continue
        size = file.stat().st_size
        footer = pq.read_metadata(file).serialized_size if file.suffix == ".parquet" else 0
        footers = max(footers, footer)
        growing += size - footer
    return round(growing * scale) + footers * blocks


def _conflict(output: Path, scratch: Path, limit: int) -> str:
    """How the config that an output folder was started with differs from the planned one, whose limit the sample has not."""
    if not (output / "config.json").is_file() or not any(output.glob("progress/*.json")):
        return ""
    before, now = (json.loads((folder / "config.json").read_text()) for folder in (output, scratch))
    return "; ".join(differences(before, {**now, "limit": limit}))

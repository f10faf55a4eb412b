"""What shards of work and Ray's actors cost for each row, beside one plain process.

    python benchmarks/executors.py [--json FILE] [--rows 512] [--actors 1,2,4] [--shards 2] [--rounds 3]

`povid`             rules edit the answers, no model: what is left is reading, sending to and fro, and storing.
`sample_responses`  one answer of up to 24 tokens from the scenes model on a CPU. Actors and shards share the machine's cores.

Each is run on an eighth of the rows and on all. The difference gives the share of a row, the rest is the start: imports, models,
actors (the cluster runs already; shards are started as commands). All ways take turns within a round; figures are medians over
the rounds. Models think on one thread.

`ms_per_row`     wall time of a row. `overhead_ms` is that less the plain process's: below zero where cores are idle without Ray.
`cpu_ms`         processor time of a row, of all processes together, Ray's own included; `overhead_cpu_ms` likewise. It hardly
                 depends on what else the machine does.
`driver_cpu_ms`  that of Ray's driver alone: how many actors one driver can keep busy follows from it.

Processor times of other processes are read from `/proc`: needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from prefalign import bundled, config, running
from prefalign.execution import Options

SETTINGS: dict[str, dict[str, Any]] = {
    "povid": {},
    "sample_responses": {"num_generations": 1, "sampling": {"max_new_tokens": 24}},
}
BLOCK = 16
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> dict[int, float]:
    """Processor time so far of this process and each one under it, by process, with children that it has waited for."""
    parents, spent = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ends just now
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                spent[int(entry.name)] = sum(map(int, fields[11:15])) / TICKS

    def belongs(one: int) -> bool:
        return one == os.getpid() or (one in parents and belongs(parents[one]))

    return {one: seconds for one, seconds in spent.items() if belongs(one)}


@contextlib.contextmanager
def cpu_time() -> Iterator[list[float]]:
    """Gives a list that holds, at the end, the processor time that all processes took.

    Ray waits for no actor that it ends: what they took is read before they are dismissed.
    """
    from prefalign.ray_executor import _Crew

    at_end: list[dict[int, float]] = []
    dismiss = _Crew.dismiss

    def look_and_dismiss(crew: _Crew) -> None:
        at_end.append(cpu_seconds())
        dismiss(crew)

    found: list[float] = []
    before = cpu_seconds()
    with mock.patch.object(_Crew, "dismiss", look_and_dismiss):
        yield found
    after = at_end[0] if at_end else cpu_seconds()
    found.append(sum(seconds - before.get(one, 0) for one, seconds in after.items()))


def run(stage: str, data: Path, output: Path, way: Options | int) -> tuple[float, float, float]:
    """Wall time of a run over exported rows, processor time of all processes, and that of this one.

    Args:
        stage: its name.
        data: rows.
        output: a new folder.
        way: options of a run that is started here, or how many shards are started as commands.
    """
    module = bundled.load_stage(stage)
    given = {"data": {"path": str(data)}, "output": {"path": str(output), "block_size": BLOCK}, **SETTINGS[stage]}
    values = config.merge(config.read_yaml(bundled.find(f"datagen/{stage}_scenes")), given)
    started, worked = time.perf_counter(), time.process_time()
    with cpu_time() as everything:
        if isinstance(way, Options):
            running.run(stage, module, config.build(module.Config, values), way)
        else:
            run_shards(stage, values, output.with_suffix(".yaml"), way)
    return time.perf_counter() - started, everything[0], time.process_time() - worked


def run_shards(stage: str, values: dict[str, Any], settings: Path, count: int) -> None:
    """Start the shards of a stage as commands and wait for them."""
    settings.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "prefalign.cli", "run", stage, "--config", str(settings), "--shard"]
    shards = [subprocess.Popen([*command, f"{part}/{count}"], stdout=subprocess.DEVNULL) for part in range(count)]
    for shard in shards:
        shard.wait()
    if any(shard.returncode for shard in shards):
        raise SystemExit(f"a shard of {stage} failed")


def measure(
    stage: str, rows: int, actors: list[int], shards: list[int], rounds: int, root: Path
) -> list[dict[str, Any]]:
    """The lines of one stage: one plain process, then each number of actors and of shards."""
    from prefalign.scenes.export import export

    sizes = (rows // 8, rows)
    for size in sizes:
        if not (root / f"rows-{size}").exists():
            export(root / f"rows-{size}", split="train_biased", kind="caption", start=0, stop=size)
    ways: dict[str, Options | int] = {"plain": Options()}
    ways |= {f"ray_{count}": Options(executor="ray", actors=count) for count in actors}
    ways |= {f"shards_{count}": count for count in shards}
    run(stage, root / f"rows-{sizes[0]}", root / f"{stage}-warm", ways["plain"])
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way, how in ways.items():
            few, all_rows = (
                run(stage, root / f"rows-{size}", root / f"{stage}-{way}-{size}-{number}", how) for size in sizes
            )
            row, cpu, driver = ((more - less) / (sizes[1] - sizes[0]) for more, less in zip(all_rows, few, strict=True))
            figures = {"ms_per_row": 1000 * row, "cpu_ms": 1000 * cpu, "start_s": few[0] - sizes[0] * row}
            if way != "plain":
                plain = found["plain"][number]
                figures["overhead_ms"] = figures["ms_per_row"] - plain["ms_per_row"]
                figures["overhead_cpu_ms"] = figures["cpu_ms"] - plain["cpu_ms"]
            if way.startswith("ray"):
                figures["driver_cpu_ms"] = 1000 * driver
            found[way].append(figures)
    lines: list[dict[str, Any]] = []
    for way, each in found.items():
        for name in each[0]:
            value = statistics.median(figures[name] for figures in each)
            unit = "s" if name == "start_s" else "ms a row"
            lines.append({"name": f"executors/{stage}/{way}/{name}", "value": round(value, 4), "unit": unit,
                          "baseline": None, "goal": None})  # fmt: skip
            print(f"{lines[-1]['name']:<52} {value:.2f} {unit}", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--actors", default="1,2,4")
    parser.add_argument("--shards", default="2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(SETTINGS))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    actors, shards = ([int(count) for count in given.split(",")] for given in (chosen.actors, chosen.shards))
    import torch

    from prefalign.ray_executor import connect

    torch.set_num_threads(1)
    ray = connect("local", num_cpus=max(actors), include_dashboard=False)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            lines = [
                line
                for stage in chosen.parts.split(",")
                for line in measure(stage, chosen.rows, actors, shards, chosen.rounds, Path(scratch))
            ]
    finally:
        ray.shutdown()
    if chosen.json:
        chosen.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()

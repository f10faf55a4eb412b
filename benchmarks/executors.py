"""What shards of work and Ray's actors cost for each row, beside one plain process.

    python benchmarks/executors.py [--json FILE] [--rows 512] [--actors 1,2,4] [--repeats 3] [--parts povid,sample_responses]

`povid`             rules edit the answers, no model: what is left is reading, sending to and fro, and storing.
`sample_responses`  one answer of up to 24 tokens from the scenes model on a CPU. Actors share the machine's cores.

Each is run on an eighth of the rows and on all, `repeats` times, of which the fastest counts. The difference gives the time of a
row, the rest is the start (imports, models, actors; the cluster runs already). Models think on one thread. `overhead_ms` is the
time of a row less that in one plain process: below zero where actors have cores to themselves. `driver_cpu_ms` is the processor
time of the driver for a row (of the plain process: everything); how many actors one driver can keep busy follows from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from prefalign import bundled, config, running
from prefalign.execution import Options

SETTINGS: dict[str, dict[str, Any]] = {
    "povid": {},
    "sample_responses": {"num_generations": 1, "sampling": {"max_new_tokens": 24}},
}
BLOCK = 16


def seconds(stage: str, data: Path, output: Path, options: Options) -> tuple[float, float]:
    """Wall time of a run over exported rows, and the processor time of this process."""
    module = bundled.load_stage(stage)
    given = {"data": {"path": str(data)}, "output": {"path": str(output), "block_size": BLOCK}, **SETTINGS[stage]}
    values = config.merge(config.read_yaml(bundled.find(f"datagen/{stage}_scenes")), given)
    resolved = config.build(module.Config, values)
    started, worked = time.perf_counter(), time.process_time()
    running.run(stage, module, resolved, options)
    return time.perf_counter() - started, time.process_time() - worked


def measure(stage: str, rows: int, actors: list[int], repeats: int, root: Path) -> list[dict[str, Any]]:
    """The lines of one stage: one plain process, then each number of actors."""
    from prefalign.scenes.export import export

    sizes = (rows // 8, rows)
    for size in sizes:
        if not (root / f"rows-{size}").exists():
            export(root / f"rows-{size}", split="train_biased", kind="caption", start=0, stop=size)
    ways = {"plain": Options(), **{f"ray_{count}": Options(executor="ray", actors=count) for count in actors}}
    seconds(stage, root / f"rows-{sizes[0]}", root / f"{stage}-warm", ways["plain"])
    lines: list[dict[str, Any]] = []
    plain = 0.0
    for way, options in ways.items():
        tried = [
            [
                seconds(stage, root / f"rows-{size}", root / f"{stage}-{way}-{size}-{number}", options)
                for number in range(repeats)
            ]
            for size in sizes
        ]
        row, worked = (
            (min(run[kind] for run in tried[1]) - min(run[kind] for run in tried[0])) / (sizes[1] - sizes[0])
            for kind in (0, 1)
        )
        plain = row if way == "plain" else plain
        start = min(run[0] for run in tried[0]) - sizes[0] * row
        found = {
            "ms_per_row": (1000 * row, "ms"),
            "driver_cpu_ms": (1000 * worked, "ms a row"),
            "start_s": (start, "s"),
        }
        if way != "plain":
            found["overhead_ms"] = (1000 * (row - plain), "ms a row")
        for name, (value, unit) in found.items():
            lines.append({"name": f"executors/{stage}/{way}/{name}", "value": round(value, 4), "unit": unit,
                          "baseline": round(1000 * plain, 4) if name == "ms_per_row" else None, "goal": None})  # fmt: skip
            print(f"{lines[-1]['name']:<48} {value:.2f} {unit}", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--actors", default="1,2,4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", default=",".join(SETTINGS))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    actors = [int(count) for count in chosen.actors.split(",")]
    import torch

    from prefalign.ray_executor import connect

    torch.set_num_threads(1)
    ray = connect("local", num_cpus=max(actors), include_dashboard=False)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            lines = [
                line
                for stage in chosen.parts.split(",")
                for line in measure(stage, chosen.rows, actors, chosen.repeats, Path(scratch))
            ]
    finally:
        ray.shutdown()
    if chosen.json:
        chosen.json.write_text(json.dumps(lines, indent=2) + "\n")


if __name__ == "__main__":
    main()

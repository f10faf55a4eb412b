"""Kill data generation with SIGKILL at random moments, resume it, and compare with an uninterrupted run.

    python benchmarks/chaos.py --kills 20 [--stage bdhs] [--rows 96] [--json FILE]

Each trial starts the stage in an empty folder, kills it at a moment drawn uniformly over an uninterrupted run's duration,
starts it again (which may be killed once more), lets it end, and compares every file except the ledgers' temporary ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PRELOAD = ["torch", "transformers", "datasets", "pyarrow.parquet", "prefalign.engines.transformers"]


def generate(stage: str, prompts: str, output: str) -> None:
    """One run of a stage over exported prompts (in a process of its own)."""
    import torch

    from prefalign import bundled, config

    torch.set_num_threads(1)
    module = bundled.load_stage(stage)
    values = config.merge(
        config.read_yaml(bundled.find(f"datagen/{stage}_scenes")),
        {"data": {"path": prompts}, "output": {"path": output, "block_size": 8}},
    )
    module.main(config.build(module.Config, values))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output folder."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stage", default="bdhs")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()

    from prefalign.scenes.export import export

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    rng = random.Random(chosen.seed)
    equal = killed = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        export(root / "prompts", split="train_biased", kind="caption", regime="seen", start=0, stop=chosen.rows)

        def launch(name: str, kill_after: float | None = None) -> bool:
            """Run to the end, or kill after so many seconds; returns whether it was killed."""
            process = context.Process(target=generate, args=(chosen.stage, str(root / "prompts"), str(root / name)))
            process.start()
            process.join(kill_after)
            if process.exitcode is None:
                process.kill()
                process.join()
                return True
            if process.exitcode:
                raise SystemExit(f"the stage itself failed with exit status {process.exitcode}")
            return False

        launch("warm_up")
        started = time.perf_counter()
        launch("straight")
        duration = time.perf_counter() - started
        expected = contents(root / "straight")
        print(f"uninterrupted: {duration:.1f} s, {len(expected)} files", flush=True)
        for trial in range(chosen.kills):
            name = f"trial-{trial}"
            moments: list[str] = []
            for _ in range(2):
                moment = rng.uniform(0.02, 1.0) * duration
                if launch(name, moment):
                    killed += 1
                    moments.append(f"{moment:.2f} s")
            launch(name)
            same = contents(root / name) == expected
            equal += same
            print(f"trial {trial + 1}: killed at {', '.join(moments) or 'no moment'}: "
                  f"{'identical' if same else 'DIFFERENT'}", flush=True)  # fmt: skip
    print(f"{equal} of {chosen.kills} trials identical, {killed} kills")
    rows: list[dict[str, Any]] = [
        {"name": f"chaos/{chosen.stage}/identical", "value": equal, "unit": "trials", "baseline": chosen.kills,
         "goal": chosen.kills},
        {"name": f"chaos/{chosen.stage}/kills", "value": killed, "unit": "kills", "baseline": None, "goal": chosen.kills},
    ]  # fmt: skip
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(0 if equal == chosen.kills else 1)


if __name__ == "__main__":
    main()

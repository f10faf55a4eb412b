"""Kill data generation with SIGKILL at random moments, resume it, and compare with an uninterrupted run.

    python benchmarks/chaos.py [--stage all] [--kills 5] [--rows 32] [--json FILE]

Every `configs/datagen/*_scenes.yaml` is a case (`bdhs`, `stic`, `stic_sft`, ...). A trial starts it in an empty folder, kills it
at a moment drawn uniformly over an uninterrupted run's duration, starts it again (which may be killed once more), lets it end,
and compares every file of the folder, caches such as `pool/` included, except hidden temporary ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from prefalign import bundled, config

PRELOAD = ["torch", "transformers", "datasets", "pyarrow.parquet", "prefalign.engines.transformers"]
BLOCK = 8


def cases() -> dict[str, str]:
    """Name of each case to the stage it runs."""
    names = [name.removeprefix("datagen/").removesuffix("_scenes") for name in bundled.configs()
             if name.startswith("datagen/") and name.endswith("_scenes")]  # fmt: skip
    known = sorted(bundled.stages(), key=len, reverse=True)
    return {name: next(stage for stage in known if name == stage or name.startswith(f"{stage}_")) for name in names}


def generate(case: str, data: str, output: str) -> None:
    """One run of a case over exported rows (in a process of its own)."""
    import torch

    torch.set_num_threads(1)
    run_config(f"datagen/{case}_scenes", cases()[case], data, output)


def run_config(name: str, stage: str, data: str, output: str) -> None:
    """Run a bundled config over other rows."""
    module = bundled.load_stage(stage)
    changes = {"data": {"path": data}, "output": {"path": output, "block_size": BLOCK}}
    values = config.merge(config.read_yaml(bundled.find(name)), changes)
    module.main(config.build(module.Config, values))


def prepare(case: str, root: Path, rows: int) -> Path:
    """The rows that a case reads: the scenes export that its config names, scored answers, or else POVID's pairs."""
    from prefalign.scenes.export import export

    path = bundled.find(f"datagen/{case}_scenes")
    named = re.search(r"scenes export --output (\S+) (.*?) --stop", path.read_text())
    if named and named[1] == config.read_yaml(path)["data"]["path"]:
        options = dict(re.findall(r"--(split|kind|regime) (\w+)", named[2]))
        folder = root / "-".join(options.values())
        export(
            folder, split=options.get("split"), kind=options["kind"], regime=options.get("regime"), start=0, stop=rows
        )
        return folder
    export(root / "prompts", split="train_biased", kind="caption", start=0, stop=rows)
    if case == "select_responses":
        for name, read, made in (("datagen/sample_responses", "prompts", "sampled"),
                                 ("reward_models/score_responses", "sampled", "scored")):  # fmt: skip
            run_config(f"{name}_scenes", name.split("/")[1], str(root / read), str(root / made))
        return root / "scored"
    if not (root / "pairs").exists():
        generate("povid", str(root / "prompts"), str(root / "pairs"))
    return root / "pairs"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output folder."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def launch(context: ForkServerContext, case: str, data: Path, output: Path, kill_after: float | None = None) -> bool:
    """Run a case to the end, or kill it after so many seconds. Returns whether it was killed."""
    process = context.Process(target=generate, args=(case, str(data), str(output)))
    process.start()
    process.join(kill_after)
    if process.exitcode is None:
        process.kill()
        process.join()
        return True
    if process.exitcode:
        raise SystemExit(f"{case} itself failed with exit status {process.exitcode}")
    return False


def try_case(
    context: ForkServerContext, case: str, root: Path, rows: int, kills: int, rng: random.Random
) -> list[dict[str, Any]]:
    """Trials of one case until it was killed so many times; the lines of the result file."""
    data = prepare(case, root, rows)
    launch(context, case, data, root / f"{case}-warm_up")
    started = time.perf_counter()
    launch(context, case, data, root / f"{case}-straight")
    duration = time.perf_counter() - started
    expected = contents(root / f"{case}-straight")
    print(f"{case}: uninterrupted {duration:.1f} s, {len(expected)} files", flush=True)
    equal = trials = killed = 0
    while killed < kills:
        output = root / f"{case}-{trials}"
        moments: list[float] = []
        started = time.perf_counter()
        for _ in range(2):
            moment = rng.uniform(0.02, 1.0) * (duration - sum(moments))
            if not launch(context, case, data, output, moment):
                break
            moments.append(moment)
        if not moments:  # the machine is faster now than it was
            duration = time.perf_counter() - started
        launch(context, case, data, output)
        found = contents(output)
        other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        trials += 1
        killed += len(moments)
        equal += not other
        when = ", ".join(f"{moment:.2f} s" for moment in moments) or "no moment"
        print(f"  killed at {when}: {f'DIFFERENT: {other[:5]}' if other else 'identical'}", flush=True)
    return [
        {"name": f"chaos/{case}/identical", "value": equal, "unit": "trials", "baseline": trials, "goal": trials},
        {"name": f"chaos/{case}/kills", "value": killed, "unit": "kills", "baseline": None, "goal": kills},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stage", default="all", help=f"all, or some of {','.join(cases())}")
    parser.add_argument("--kills", type=int, default=5, help="of each case")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    wanted = list(cases()) if chosen.stage == "all" else chosen.stage.split(",")
    if unknown := set(wanted) - set(cases()):
        parser.error(f"no case called {', '.join(sorted(unknown))}; there are {', '.join(cases())}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in wanted:
            found += try_case(
                context, case, Path(scratch), chosen.rows, chosen.kills, random.Random(f"{chosen.seed} {case}")
            )
    for line in found:
        print(f"{line['name']:<32} {line['value']} of {line['goal']} {line['unit']}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if all(line["value"] >= line["goal"] for line in found) else 1)


if __name__ == "__main__":
    main()

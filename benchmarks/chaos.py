"""Kill data generation with SIGKILL at random moments, resume it, and compare with an uninterrupted run.

    python benchmarks/chaos.py [--executor local] [--stage all] [--kills 5] [--rows 32] [--json FILE]
    python benchmarks/chaos.py --server .venv-vllm/bin/python [--executor all] [--stage all] [--rows 32] [--json FILE]

Every `configs/datagen/*_scenes.yaml` is a case (`bdhs`, `stic`, `stic_sft`, ...), and `score_responses`. A trial starts it in an
empty folder, kills it at a moment drawn uniformly over an uninterrupted run's duration, starts it again (which may be killed once
more), lets it end, and compares every file of the folder, caches such as `pool/` included, except hidden temporary ones.

`local`   one process, killed and started again.
`shards`  three processes on one folder, started at once; one of them, drawn, is killed and started again.
`ray`     a driver and two actors, of which in turn an actor and the driver is killed. A killed driver is started again; a killed
          actor is the executor's affair. Processes are found in `/proc`: needs Linux.
What `shards` and `ray` make is compared with the uninterrupted run of one process.

With `--server` the vLLM server that a stage asks is killed instead (`chaos_server.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from prefalign import bundled, config, running
from prefalign.execution import Options, Shard

EXECUTORS = ("local", "shards", "ray")
SHARDS = 3
ACTORS = 2
PRELOAD = ["torch", "transformers", "datasets", "pyarrow.parquet", "prefalign.engines.transformers"]
BLOCK = 8
SCORING = "score_responses"


def cases() -> dict[str, str]:
    """Name of each case to the stage it runs."""
    names = [name.removeprefix("datagen/").removesuffix("_scenes") for name in bundled.configs()
             if name.startswith("datagen/") and name.endswith("_scenes")]  # fmt: skip
    known = sorted(bundled.stages(), key=len, reverse=True)
    found = {name: next(stage for stage in known if name == stage or name.startswith(f"{stage}_")) for name in names}
    return {**found, SCORING: SCORING}


def config_name(case: str) -> str:
    """The bundled config of a case."""
    return f"{'reward_models' if case == SCORING else 'datagen'}/{case}_scenes"


def generate(
    case: str, data: str, output: str, options: Options | None = None, settings: dict[str, Any] | None = None
) -> None:
    """One run of a case over other rows than its config names, perhaps with other settings."""
    import torch

    torch.set_num_threads(1)
    changes = {"data": {"path": data}, "output": {"path": output, "block_size": BLOCK}, **(settings or {})}
    module = bundled.load_stage(cases()[case])
    values = config.merge(config.read_yaml(bundled.find(config_name(case))), changes)
    running.run(cases()[case], module, config.build(module.Config, values), options or Options())


def generate_quietly(case: str, data: str, output: str, options: Options, settings: dict[str, Any] | None) -> None:
    """One run in a process of its own, whose messages go to a file beside its folder."""
    with open(f"{output}.log", "ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    generate(case, data, output, options, settings)


def prepare(case: str, root: Path, rows: int) -> Path:
    """The rows that a case reads: the scenes export that its config names, scored answers, or else POVID's pairs."""
    from prefalign.scenes.export import export

    path = bundled.find(config_name(case))
    named = re.search(r"scenes export --output (\S+) (.*?) --stop", path.read_text())
    if named and named[1] == config.read_yaml(path)["data"]["path"]:
        options = dict(re.findall(r"--(split|kind|regime) (\w+)", named[2]))
        folder = root / "-".join(options.values())
        export(
            folder, split=options.get("split"), kind=options["kind"], regime=options.get("regime"), start=0, stop=rows
        )
        return folder
    export(root / "prompts", split="train_biased", kind="caption", start=0, stop=rows)
    if case in (SCORING, "select_responses"):
        for name, read, made in (("sample_responses", "prompts", "sampled"), (SCORING, "sampled", "scored")):
            if not (root / made).exists():
                generate(name, str(root / read), str(root / made))
        return root / ("sampled" if case == SCORING else "scored")
    if not (root / "pairs").exists():
        generate("povid", str(root / "prompts"), str(root / "pairs"))
    return root / "pairs"


def settings_of(case: str, scratch: Path) -> dict[str, Any] | None:
    """Settings of a case beside its config's: the labeller that `rlaif_v` asks, trained here once."""
    if case != "rlaif_v":
        return None
    from prefalign.scenes import labeller

    folder = scratch / "labeller"
    if not folder.exists():
        print("training a labeller", flush=True)
        labeller.build(folder)
    return {"labeller": {"model_name_or_path": str(folder)}}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output folder."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def start(
    context: ForkServerContext, case: str, data: Path, output: Path, options: Options, settings: dict[str, Any] | None
) -> BaseProcess:
    """Start a run of a case in a process of its own."""
    process = context.Process(target=generate_quietly, args=(case, str(data), str(output), options, settings))
    process.start()
    return process


def end(output: Path, process: BaseProcess, seconds: float | None = None) -> bool:
    """Wait for a run, or kill it after so many seconds. Returns whether it was killed."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        return True
    if process.exitcode:
        said = Path(f"{output}.log").read_text(errors="replace")
        raise SystemExit(f"the stage itself failed with exit status {process.exitcode}:\n{said[-3000:]}")
    return False


@dataclass
class Ground:
    """Where a case is tried: its rows, how long an uninterrupted run takes, settings beside its config's, kills so far."""

    context: ForkServerContext
    case: str
    data: Path
    rng: random.Random
    duration: float = 0.0
    settings: dict[str, Any] | None = None
    kills: int = 0

    def start(self, output: Path, options: Options | None = None) -> BaseProcess:
        """Start a run."""
        return start(self.context, self.case, self.data, output, options or Options(), self.settings)

    def run(self, output: Path, options: Options | None = None, kill_after: float | None = None) -> bool:
        """A run to the end, or killed after so many seconds. Returns whether it was killed."""
        return end(output, self.start(output, options), kill_after)

    def moment(self, spent: float = 0.0) -> float:
        """Seconds until a kill."""
        return self.rng.uniform(0.02, 1.0) * (self.duration - spent)


def try_local(ground: Ground, output: Path) -> list[str]:
    """A run killed up to twice. Returns when."""
    moments: list[float] = []
    started = time.perf_counter()
    for _ in range(2):
        moment = ground.moment(sum(moments))
        if not ground.run(output, kill_after=moment):
            break
        moments.append(moment)
    if not moments:  # the machine is faster now than it was
        ground.duration = time.perf_counter() - started
    ground.run(output)
    return [f"{moment:.2f} s" for moment in moments]


def try_shards(ground: Ground, output: Path) -> list[str]:
    """Three shards at once, one of them killed and started again. Returns which and when."""
    options = [Options(Shard(number, SHARDS)) for number in range(SHARDS)]
    processes = [ground.start(output, each) for each in options]
    victim, moment = ground.rng.randrange(SHARDS), ground.moment()
    killed = end(output, processes.pop(victim), moment)
    if killed:
        ground.run(output, options[victim])
    for process in processes:
        end(output, process)
    return [f"{moment:.2f} s (shard {victim})"] if killed else []


def try_ray(ground: Ground, output: Path, options: Options) -> list[str]:
    """A run on actors, one of which or whose driver is killed, in turn. Returns which and when.

    Args:
        ground: the case.
        output: folder of the run.
        options: actors, on a cluster of this process.
    """
    started = time.perf_counter()
    driver, moment = ground.start(output, options), ground.moment()
    if ground.kills % 2:
        victim = "driver"
        killed = end(output, driver, moment)
        if killed:
            ground.run(output, options)
    else:
        victim, killed = "actor", False
        driver.join(moment)
        while driver.exitcode is None and not killed:  # there may be none yet
            if actors := actors_under(os.getpid()):
                os.kill(ground.rng.choice(actors), signal.SIGKILL)
                killed = True
            time.sleep(0.02)
        end(output, driver)
    if not killed:  # the machine is faster now than it was
        ground.duration = time.perf_counter() - started
    return [f"{moment:.2f} s ({victim})"] if killed else []


def actors_under(process: int) -> list[int]:
    """Ids of the actors among the descendants of a process."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ends just now
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_text()

    def descends(one: int) -> bool:
        return one == process or (one in parents and descends(parents[one]))

    return sorted(one for one, name in names.items() if name.startswith("ray::_Actor") and descends(one))


@contextlib.contextmanager
def cluster() -> Iterator[str]:
    """A Ray cluster of this process, which processes started later may use: its address."""
    from prefalign.ray_executor import connect

    ray = connect("local", num_cpus=2 * ACTORS, include_dashboard=False)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def try_case(
    ground: Ground, root: Path, attempt: Callable[[Ground, Path], list[str]], executor: str, whole: Options, kills: int
) -> list[dict[str, Any]]:
    """Trials of one case until something was killed so many times; the lines of the result file.

    Args:
        ground: the case.
        root: folder of all trials.
        attempt: one trial; returns what it has killed.
        executor: its name.
        whole: options of an uninterrupted run, over whose duration the kills are drawn.
        kills: how many.
    """
    case = ground.case
    ground.run(root / f"{case}-straight")
    started = time.perf_counter()
    ground.run(root / f"{case}-whole", whole)
    ground.duration = time.perf_counter() - started
    expected = contents(root / f"{case}-straight")
    print(f"{case}, {executor}: uninterrupted {ground.duration:.1f} s, {len(expected)} files", flush=True)
    equal = trials = 0
    while ground.kills < kills:
        output = root / f"{case}-{executor}-{trials}"
        moments = attempt(ground, output)
        found = contents(output)
        other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        trials += 1
        ground.kills += len(moments)
        equal += not other
        when = ", ".join(moments) or "no moment"
        print(f"  killed at {when}: {f'DIFFERENT: {other[:5]}' if other else 'identical'}", flush=True)
    name = f"chaos/{case}" if executor == "local" else f"chaos/{executor}/{case}"
    return [
        {"name": f"{name}/identical", "value": equal, "unit": "trials", "baseline": trials, "goal": trials},
        {"name": f"{name}/kills", "value": ground.kills, "unit": "kills", "baseline": None, "goal": kills},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--executor", default="local", help=f"all, or some of {','.join(EXECUTORS)}")
    parser.add_argument("--stage", default="all", help=f"all, or some of {','.join(cases())}")
    parser.add_argument("--server", type=Path, help="Python of vLLM's environment: kill a server of it, not the stage")
    parser.add_argument("--kills", type=int, default=5, help="of each case")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    serving = bundled.load_stage(str(Path(__file__).with_name("chaos_server.py"))) if chosen.server else None
    there = list(serving.ROWS if serving else cases())
    executors = list(EXECUTORS) if chosen.executor == "all" else chosen.executor.split(",")
    wanted = there if chosen.stage == "all" else chosen.stage.split(",")
    for kind, asked, known in (("executor", executors, EXECUTORS), ("case", wanted, there)):
        if unknown := set(asked) - set(known):
            parser.error(f"no {kind} called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if serving and (reason := serving.missing(chosen.server)):
        print(f"SKIPPED: killing a vLLM server, since {reason}.")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers and clusters end too
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    found = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        attempts: dict[str, Callable[[Ground, Path], list[str]]] = {"local": try_local, "shards": try_shards}
        whole = dict.fromkeys(EXECUTORS, Options())
        if "ray" in executors:
            address = stack.enter_context(cluster())
            whole["ray"] = Options(executor="ray", actors=ACTORS, ray_address=address)
            attempts["ray"] = lambda ground, output: try_ray(ground, output, whole["ray"])
        if serving:
            parts = {name: [whole[name]] for name in EXECUTORS}
            parts["shards"] = [Options(Shard(number, SHARDS)) for number in range(SHARDS)]
            found = serving.kill_servers(
                chosen.server,
                parts,
                executors,
                wanted,
                chosen.rows,
                Path(scratch),
                functools.partial(start, context),
                contents,
            )
        for executor in executors if not serving else []:
            for case in wanted:
                root = Path(scratch) / executor
                rng = random.Random(f"{chosen.seed} {case}")
                data, settings = prepare(case, root, chosen.rows), settings_of(case, Path(scratch))
                ground = Ground(context, case, data, rng, settings=settings)
                found += try_case(ground, root, attempts[executor], executor, whole[executor], chosen.kills)
    for line in found:
        print(f"{line['name']:<40} {line['value']} of {line['goal']} {line['unit']}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(0 if all(line["value"] >= line["goal"] for line in found) else 1)


if __name__ == "__main__":
    main()

"""`chaos.py --server`: a vLLM server is killed with SIGKILL while it answers a stage, and started again.

`soon`  at once: the stage waits for it in its retries, and ends by itself.
`late`  after the stage has given up: the same command is started again.

`sample_responses` asks a policy for answers, `rlaif_v` the same model as policy and as labeller of its own answers' claims; both
keep answers in `model.server.cache`. A server draws anew when it is asked anew, so rows are compared with what one undisturbed
process makes of the answers that were kept: the folder is the same, and it asks for nothing more. The ids are those of a run with
answers of its own. What was paid for are the answers in the server's log: as many as were kept, so none twice.
"""

from __future__ import annotations

import random
import re
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign import bundled
from prefalign.checkpoints import SCENES_BASE
from prefalign.models import ModelConfig, load_processor
from prefalign.records import Candidates, Pair
from prefalign.scenes.export import export
from prefalign.store import read_records

HERE = Path(__file__).parent
MOMENTS = {"soon": 60, "late": 1}
"""When the server comes back, and how often a request is tried again."""
RECORDS: dict[str, type[Any]] = {"sample_responses": Candidates, "rlaif_v": Pair}
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--no-enable-chunked-prefill")
TIMEOUT = 400.0


def missing(python: Path) -> str | None:
    """Why a Python cannot serve, or None."""
    if not python.is_file():
        return f"there is no {python} (`make vllm-env`)"
    has_vllm = subprocess.run([python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"])
    return f"{python} has no vLLM (`make vllm-env`)" if has_vllm.returncode else None


def shim(python: Path) -> dict[str, str]:
    """What lets torchvision load beside a torch without CUDA, as in the Makefile."""
    cuda = subprocess.run([python, "-c", "import sys, torch; sys.exit(torch.version.cuda is None)"])
    return {"PYTHONPATH": str(HERE.parent / "tests" / "torchvision_shim")} if cuda.returncode else {}


class Stage:
    """Runs of one case on one executor, as commands.

    Args:
        case: of `RECORDS`.
        address: of the server.
        name: what it calls the model.
        data: rows.
        parts: options of each process that works on the same folder.
    """

    def __init__(self, case: str, address: str, name: str, data: Path, parts: Sequence[Sequence[str]]) -> None:
        self.parts = parts
        self.command = [sys.executable, "-m", "prefalign.cli", "run", case, "--config", f"datagen/{case}_scenes",
                        "--model.engine", "openai", "--model.model_name_or_path", name, "--model.server.base_url", address,
                        "--model.server.concurrency", "4", "--data.path", str(data), "--output.block_size", "4",
                        "--num_generations", "3"]  # fmt: skip

    def start(self, output: Path, cache: Path, retries: int, parts: Sequence[Sequence[str]] | None = None) -> Running:
        """Start its processes, or others."""
        given = [
            "--output.path",
            str(output),
            "--model.server.cache",
            str(cache),
            "--model.server.max_retries",
            str(retries),
        ]
        log = output.with_suffix(".log")
        with log.open("ab") as said:
            return Running(
                [subprocess.Popen([*self.command, *given, *part], stdout=said, stderr=subprocess.STDOUT)
                 for part in (self.parts if parts is None else parts)], log
            )  # fmt: skip


@dataclass
class Running:
    """Processes of a run, and the file that they write their messages to."""

    processes: list[subprocess.Popen[bytes]]
    log: Path

    def ended(self) -> bool:
        """Whether all have ended."""
        return all(process.poll() is not None for process in self.processes)

    def failed(self) -> bool:
        """Wait for the end; whether one of them failed."""
        exits = [process.wait(TIMEOUT) for process in self.processes]
        return any(exits)

    def end(self) -> None:
        """Wait for the end, which has to be a good one."""
        if self.failed():
            raise SystemExit(f"the stage itself failed:\n{self.log.read_text()[-3000:]}")


def given(log: Path) -> int:
    """Answers that a server gave, by its log."""
    return len(re.findall(r'"POST /v1/chat/completions HTTP/1.1" 200', log.read_text(errors="replace")))


def kept(cache: Path) -> int:
    """Answers in a file of kept ones."""
    with closing(sqlite3.connect(cache)) as base:
        return int(base.execute("SELECT count(*) FROM replies").fetchone()[0])


def ids(case: str, folder: Path) -> Counter[str]:
    """How often each id stands in a folder."""
    return Counter(row.id for row in read_records(folder, RECORDS[case]))


def kill_amid(server: Any, run: Running, answers: int) -> int:
    """Kill a server that has given so many answers and works on others. Returns on how many; 0: the run was over before."""
    while not run.ended():
        if given(server.log) >= answers and (under_way := server.running()):
            server.kill()
            return int(under_way)
        time.sleep(0.02)
    return 0


def try_server(
    server: Any, stage: Stage, root: Path, moment: str, share: float, whole: int
) -> tuple[Path, Path, int, int]:
    """One run whose server is killed. Returns its folder, its kept answers, the answers given, and what was under way."""
    output, cache, before = root / "out", root / "kept.sqlite", given(server.log)
    root.mkdir(parents=True)
    run = stage.start(output, cache, MOMENTS[moment])
    under_way = kill_amid(server, run, before + round(share * whole))
    if under_way and moment == "soon":
        server.start()
        run.end()
    elif under_way:
        if not run.failed():
            raise SystemExit(f"a run whose server was gone ended well:\n{run.log.read_text()[-3000:]}")
        server.start()
        stage.start(output, cache, MOMENTS[moment]).end()
    else:
        run.end()
    return output, cache, given(server.log) - before, under_way


def try_case(
    server: Any, case: str, executor: str, stage: Stage, alone: Stage, root: Path, contents: Callable[[Path], Any]
) -> list[dict[str, Any]]:
    """Both moments of a case on an executor; the lines of the result file.

    Args:
        server: it runs.
        case: of `RECORDS`.
        executor: its name.
        stage: the case on the executor.
        alone: the case in one process.
        root: folder of all runs of the case.
        contents: every file of a folder.
    """
    root.mkdir(exist_ok=True)
    straight = root / "straight"
    if not straight.exists():
        alone.start(straight, root / "straight.sqlite", 1).end()
    whole = kept(root / "straight.sqlite")
    lines = []
    for moment in MOMENTS:
        rng, under_way = random.Random(f"{case} {executor} {moment}"), 0
        while not under_way:
            share = rng.uniform(0.1, 0.8)
            trial = root / f"{executor}-{moment}-{share:.3f}"
            output, cache, paid, under_way = try_server(server, stage, trial, moment, share, whole)
        before = given(server.log)
        alone.start(trial / "again", cache, MOMENTS[moment]).end()
        again = given(server.log) - before
        found, expected = contents(output), contents(trial / "again")
        other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        same_ids = ids(case, output) == ids(case, straight)
        print(f"{case}, {executor}, {moment}: killed after {share:.0%} of the answers with {under_way} under way: "
              f"{f'DIFFERENT: {other[:5]}' if other else 'identical'}, {sum(ids(case, output).values())} rows, ids "
              f"{'the same' if same_ids else 'DIFFERENT'}, {paid} answers given, {kept(cache)} kept, {again} asked for again",
              flush=True)  # fmt: skip
        name = f"chaos/server/{executor}/{case}/{moment}"
        lines += [
            {"name": f"{name}/identical", "value": int(not other), "unit": "runs", "baseline": None, "goal": 1},
            {"name": f"{name}/same_ids", "value": int(same_ids), "unit": "runs", "baseline": None, "goal": 1},
            {"name": f"{name}/kept", "value": kept(cache), "unit": "answers", "baseline": None, "goal": paid + again},
        ]
    return lines


def kill_servers(
    python: Path, executors: Sequence[str], wanted: Sequence[str], rows: int, root: Path, parts: dict[str, Any],
    contents: Callable[[Path], Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """All cases on all executors with one server; the lines of the result file.

    Args:
        python: of vLLM's environment.
        executors: which.
        wanted: cases, of `RECORDS`.
        rows: prompts.
        root: folder of all runs.
        parts: by executor the options of each of its processes.
        contents: every file of a folder.
    """
    serving = bundled.load_stage(str(HERE / "serving.py"))
    export(root / "prompts", split="train_fair", kind="caption", start=0, stop=rows)
    load_processor(ModelConfig("scenes")).save_pretrained(root / "processor")
    options = [*OPTIONS, "--chat-template", str(root / "processor" / "chat_template.jinja")]
    server = serving.VllmServer(SCENES_BASE, root / "server.log", options, python=python, variables=shim(python))
    found = []
    with server:
        for case in wanted:
            stages = {
                name: Stage(case, server.address, server.name, root / "prompts", parts[name])
                for name in (*executors, "local")
            }
            for executor in executors:
                found += try_case(server, case, executor, stages[executor], stages["local"], root / case, contents)
    return found

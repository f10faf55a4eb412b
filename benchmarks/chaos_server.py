"""`chaos.py --server`: a vLLM server is killed with SIGKILL while it answers a stage, and started again.

`soon`  at once: the stage waits for it in its retries, and ends by itself.
`late`  after the stage has given up: the same command is started again.

It is killed when all processes of the stage have found it: one that finds no server when it starts says so and ends.

`sample_responses` and `quality_pairs` ask a policy for answers, `rlaif_v` the same model as policy and as labeller of its own
answers' claims; all keep answers in `model.server.cache`. A server draws anew when it is asked anew, so rows are compared with
what one undisturbed process makes of the answers that were kept: the folder is the same, and it asks for nothing more. The ids
are those of a run with answers of its own. What was paid for are the answers in the server's log: as many as were kept, so none
twice. A run that leaves rows of fewer than four prompts in five says little, whatever they are: it does not count as a good one.
"""

from __future__ import annotations

import math
import random
import re
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from prefalign import bundled
from prefalign.checkpoints import SCENES_BASE
from prefalign.execution import Options
from prefalign.models import ModelConfig, load_processor
from prefalign.records import Candidates, Pair, Prompt
from prefalign.scenes.export import export
from prefalign.store import read_records

HERE = Path(__file__).parent
MOMENTS = {"soon": 60, "late": 1}
"""When the server comes back, and how often a request is tried again."""
ROWS: dict[str, tuple[str, type[Any]]] = {
    "sample_responses": (".", Candidates),
    "quality_pairs": ("answers", Candidates),
    "rlaif_v": (".", Pair),
}
"""By case where in its folder the rows are, and what they are."""
SETTINGS: dict[str, dict[str, Any]] = {
    "sample_responses": {"num_generations": 3},
    "quality_pairs": {},
    # The one model of the server labels too. To whole claims it nearly always says yes; it sees whether something is at a place.
    "rlaif_v": {
        "num_generations": 4,
        "labeller": None,
        "divide": {"rules": {"claim": "There is something {where}.", "question": "What is {where}?"}},
        "conquer": {"yes": ["A"], "no": ["Nothing"]},
        "pairs": {"min_gap": 1.0, "least_kept": 0.9},
    },
}
"""By case what is set beside its config and the server."""
LEAST_COMPARED = 0.8
"""Share of the prompts that rows have to be left of."""
OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--no-enable-chunked-prefill",
           "--skip-mm-profiling")  # fmt: skip
TIMEOUT = 600.0
MODEL = "tiny"


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


@dataclass
class Stage:
    """Runs of one case on one executor.

    Attributes:
        start: of `chaos.py`, with its context.
        case: of `ROWS`.
        data: rows.
        address: of the server.
        parts: options of each process that works on the same folder.
    """

    start: Callable[..., BaseProcess]
    case: str
    data: Path
    address: str
    parts: Sequence[Options]

    @property
    def askers(self) -> int:
        """Processes that ask the server: shards, or actors (Ray's driver asks nothing)."""
        return sum(part.actors or 1 for part in self.parts)

    def begin(self, output: Path, cache: Path, retries: int) -> list[BaseProcess]:
        """Start its processes."""
        server = {"base_url": self.address, "cache": str(cache), "max_retries": retries, "concurrency": 4}
        model = {"model_name_or_path": MODEL, "engine": "openai", "server": server}
        settings = {"model": model, "output": {"path": str(output), "block_size": 4}, **SETTINGS[self.case]}
        return [self.start(self.case, self.data, output, part, settings) for part in self.parts]


@dataclass
class Trial:
    """What came of a run whose server was killed.

    Attributes:
        name: executor, case and moment.
        share: of the answers of an undisturbed run, which it had given.
        under_way: answers that it worked on then.
        different: files that are not as an undisturbed process makes them of the kept answers.
        same_ids: whether the ids are those of an undisturbed run, each as often.
        rows: in the folder.
        compared: prompts that these are of.
        prompts: how many there are.
        paid: answers that the server gave.
        kept: answers in the cache.
        again: answers that the undisturbed process asked for.
    """

    name: str
    share: float
    under_way: int
    different: list[str]
    same_ids: bool
    rows: int
    compared: int
    prompts: int
    paid: int
    kept: int
    again: int

    @property
    def least(self) -> int:
        """Prompts that there have to be rows of."""
        return math.ceil(LEAST_COMPARED * self.prompts)

    def summary(self) -> str:
        """A line to print."""
        files = f"DIFFERENT: {self.different[:5]}" if self.different else "identical"
        few = "" if self.compared >= self.least else f" (TOO FEW COMPARED: {self.least} are needed)"
        ids = "the same" if self.same_ids else "DIFFERENT"
        return (
            f"{self.name}: killed after {self.share:.0%} of the answers with {self.under_way} under way: {files}, {self.rows} "
            f"rows of {self.compared} of {self.prompts} prompts{few}, ids {ids}, {self.paid} answers given, {self.kept} kept, "
            f"{self.again} asked for again"
        )

    def lines(self) -> list[dict[str, Any]]:
        """Its lines of the result file. It was a good one if each value reaches its goal."""
        values = {
            "identical": (int(not self.different), "runs", 1),
            "same_ids": (int(self.same_ids), "runs", 1),
            "compared": (self.compared, "prompts", self.least),
            "kept": (self.kept, "answers", self.paid + self.again),
        }
        return [
            {"name": f"chaos/server/{self.name}/{what}", "value": value, "unit": unit, "baseline": None, "goal": goal}
            for what, (value, unit, goal) in values.items()
        ]


def failed(processes: Sequence[BaseProcess]) -> bool:
    """Wait for the end of a run; whether one of its processes failed."""
    for process in processes:
        process.join(TIMEOUT)
    return any(process.exitcode != 0 for process in processes)


def finish(processes: Sequence[BaseProcess], output: Path) -> None:
    """Wait for the end of a run, which has to be a good one."""
    if failed(processes):
        raise SystemExit(f"the stage itself failed:\n{said(output)}")


def said(output: Path) -> str:
    """The end of what a run told."""
    return Path(f"{output}.log").read_text(errors="replace")[-3000:]


def given(log: Path) -> int:
    """Answers that a server gave, by its log."""
    return len(re.findall(r'"POST /v1/chat/completions HTTP/1.1" 200', log.read_text(errors="replace")))


def found(log: Path) -> int:
    """How often a process that started has found a server, by its log: each asks once for the models."""
    return len(re.findall(r'"GET /v1/models HTTP/1.1" 200', log.read_text(errors="replace")))


def kept(cache: Path) -> int:
    """Answers in a file of kept ones."""
    with closing(sqlite3.connect(cache)) as base:
        return int(base.execute("SELECT count(*) FROM replies").fetchone()[0])


def rows_of(case: str, folder: Path) -> list[Candidates | Pair]:
    """The rows of a run of a case."""
    place, record = ROWS[case]
    return list(read_records(folder / place, record))


def ids(rows: Sequence[Candidates | Pair]) -> Counter[str]:
    """How often each id stands among rows."""
    return Counter(row.id for row in rows)


def prompts_of(rows: Sequence[Candidates | Pair]) -> set[str]:
    """Ids of the prompts that rows were made of."""
    return {row.meta["parent"] if isinstance(row, Pair) else row.id for row in rows}


def kill_amid(server: Any, run: Sequence[BaseProcess], askers: int, answers: int) -> tuple[int, int]:
    """Kill a server that all have found, that has given so many answers and that works on others.

    Args:
        server: it runs.
        run: processes that have just been started.
        askers: how many will ask it.
        answers: how many more it gives before.

    Returns:
        Answers given until then, and under way. None is under way if the run was over before.
    """
    found_before, given_before = found(server.log), given(server.log)
    while any(process.exitcode is None for process in run):
        gave = given(server.log) - given_before
        if found(server.log) - found_before >= askers and gave >= answers and (under_way := server.running()):
            server.kill()
            return gave, int(under_way)
        time.sleep(0.02)
    return 0, 0


def try_server(server: Any, stage: Stage, folder: Path, moment: str, answers: int) -> tuple[int, int]:
    """One run whose server is killed, and that ends well. Arguments and result are those of `kill_amid`."""
    output, cache = folder / "out", folder / "kept.sqlite"
    folder.mkdir()
    run = stage.begin(output, cache, MOMENTS[moment])
    gave, under_way = kill_amid(server, run, stage.askers, answers)
    if under_way and moment == "late":
        if not failed(run):
            raise SystemExit(f"a run whose server was gone ended well:\n{said(output)}")
        server.start()
        run = stage.begin(output, cache, MOMENTS[moment])
    elif under_way:
        server.start()
    finish(run, output)
    return gave, under_way


def try_case(
    server: Any, executor: str, stage: Stage, alone: Stage, root: Path, contents: Callable[[Path], dict[str, bytes]]
) -> list[dict[str, Any]]:
    """Both moments of a case on an executor; the lines of the result file.

    Args:
        server: it runs.
        executor: its name.
        stage: the case on the executor.
        alone: the case in one process.
        root: folder of all runs of the case.
        contents: of `chaos.py`.
    """
    case, straight = stage.case, root / "straight"
    root.mkdir(exist_ok=True)
    if not straight.exists():
        finish(alone.begin(straight, root / "straight.sqlite", 1), straight)
    whole = kept(root / "straight.sqlite")
    lines = []
    for moment in MOMENTS:
        rng, under_way = random.Random(f"{case} {executor} {moment}"), 0
        while not under_way:
            share = rng.uniform(0.1, 0.8)
            folder = root / f"{executor}-{moment}-{share:.3f}"
            before = given(server.log)
            gave, under_way = try_server(server, stage, folder, moment, round(share * whole))
        paid = given(server.log) - before
        output, cache, again = folder / "out", folder / "kept.sqlite", folder / "again"
        finish(alone.begin(again, cache, MOMENTS[moment]), again)
        made, expected, rows = contents(output), contents(again), rows_of(case, output)
        trial = Trial(
            name=f"{executor}/{case}/{moment}",
            share=gave / whole,
            under_way=under_way,
            different=sorted(name for name in {*made, *expected} if made.get(name) != expected.get(name)),
            same_ids=ids(rows) == ids(rows_of(case, straight)),
            rows=len(rows),
            compared=len(prompts_of(rows)),
            prompts=sum(1 for _ in read_records(stage.data, Prompt)),
            paid=paid,
            kept=kept(cache),
            again=given(server.log) - before - paid,
        )
        print(trial.summary(), flush=True)
        lines += trial.lines()
    return lines


def kill_servers(
    python: Path,
    parts: Mapping[str, Sequence[Options]],
    executors: Sequence[str],
    wanted: Sequence[str],
    rows: int,
    root: Path,
    start: Callable[..., BaseProcess],
    contents: Callable[[Path], dict[str, bytes]],
) -> list[dict[str, Any]]:
    """All cases on all executors with one server; the lines of the result file.

    Args:
        python: of vLLM's environment.
        parts: by executor the options of each of its processes.
        executors: which.
        wanted: cases, of `ROWS`.
        rows: prompts.
        root: folder of all runs.
        start: of `chaos.py`, with its context.
        contents: of `chaos.py`.
    """
    serving = bundled.load_stage(str(HERE / "serving.py"))
    export(root / "prompts", split="train_fair", kind="caption", start=0, stop=rows)
    load_processor(ModelConfig("scenes")).save_pretrained(root / "processor")
    options = [*OPTIONS, "--chat-template", str(root / "processor" / "chat_template.jinja")]
    server = serving.VllmServer(
        SCENES_BASE, root / "server.log", options, name=MODEL, python=python, variables=shim(python)
    )
    lines = []
    with server:
        for case in wanted:
            on = {name: Stage(start, case, root / "prompts", server.address, each) for name, each in parts.items()}
            for executor in executors:
                lines += try_case(server, executor, on[executor], on["local"], root / case, contents)
    return lines

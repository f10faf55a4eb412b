"""The sampling of a round in a process of its own, by the Python of another environment: vLLM's, which has no TRL.

    python -m prefalign.online.sampling_job JOB.json

`prefalign.online.serving` writes the job, reads the outcome and holds the other end of this process's standard input: when that
is closed, the run is gone, and sampling ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from prefalign import config as settings
from prefalign.blocks import NoRows
from prefalign.engines import Engine, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.engines.loading import load_engine
from prefalign.manifest import write_atomically
from prefalign.online.sampling import SAMPLE, Draw, drawn_answers, sample
from prefalign.records import Prompt
from prefalign.store import OutputConfig, read_records


@dataclass
class Job:
    """What is to be drawn, and where it goes.

    Attributes:
        phase: `check` draws an answer to each of the first prompts and scores it; `sample` draws the round's candidates.
        model: the policy, and the engine that draws.
        prompts: folder of the round's prompts.
        outcome: JSON file that is written at the end. `check`: `answers`, each with `id`, `text` and `logprobs`, one per token.
            `sample`: `no_rows`, null or why no prompt was answered.
        candidates: folder of the candidates.
        check_prompts: how many prompts `check` takes.
        sampling: how candidates are drawn.
        responses: answers to each prompt.
        offline: as in `Draw`; so are `p_offline`, `seed` and `visit`.
        p_offline: see there.
        seed: see there.
        visit: see there.
        block_size: prompts of one block of candidates.
        batch_size: rows in one forward pass of the transformers engine.
    """

    phase: Literal["check", "sample"]
    model: EngineConfig
    prompts: Path
    outcome: Path
    candidates: Path
    check_prompts: int
    sampling: Sampling
    responses: int
    p_offline: float
    seed: int
    visit: int
    block_size: int
    batch_size: int
    offline: list[str] = field(default_factory=list)


def run_job(job: Job) -> None:
    """Load the policy, draw, and write the outcome."""
    engine = load_engine(job.model, batch_size=job.batch_size, needs=["sample", "logprobs"], stage=SAMPLE)
    found = _check(job, engine) if job.phase == "check" else _sample(job, engine)
    write_atomically(job.outcome, json.dumps(found).encode())


def _check(job: Job, engine: Engine) -> dict[str, Any]:
    prompts = list(islice(read_records(job.prompts, Prompt), job.check_prompts))
    requests, answers = drawn_answers(engine, prompts, max_new_tokens=job.sampling.max_new_tokens, seed=job.seed)
    texts = [answer.text for answer in answers]
    scored = engine.logprobs(requests, texts)
    return {
        "answers": [
            {"id": request.id, "text": text, "logprobs": values.tolist()}
            for request, text, values in zip(requests, texts, scored, strict=True)
        ]
    }


def _sample(job: Job, engine: Engine) -> dict[str, Any]:
    draw = Draw(frozenset(job.offline), job.p_offline, job.seed, job.visit)
    try:
        sample(job.prompts, engine, draw, sampling=job.sampling, responses=job.responses,
               output=OutputConfig(job.candidates, block_size=job.block_size))  # fmt: skip
    except NoRows as error:
        return {"no_rows": error.args}
    return {"no_rows": None}


def _end_with_the_run() -> None:
    """Wait until standard input is closed. A run that was killed cannot say so, and its engine would keep the GPU."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    run_job(settings.build(Job, json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

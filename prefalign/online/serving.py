"""The trainer's side of a round that is sampled by another process: the policy it serves, the check, the candidates.

    round-1/served/     the policy as one model, if it has an adapter; removed when the candidates are there
    round-1/serving/    the jobs, what they gave, and what the engine said

Every round starts the engine anew on the folder of its policy, so that nothing has to be pushed into a running one. The check has
a process of its own: it has left the GPU when the trainer loads the policy to compare.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefalign.adapters import merge_adapters
from prefalign.blocks import NoRows
from prefalign.checkpoints import resolve
from prefalign.config import to_mapping
from prefalign.engines.config import EngineConfig
from prefalign.manifest import write_atomically
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.online import sampling_job
from prefalign.online.checking import Gap, gap_of, trainer_logprobs
from prefalign.online.round_checks import autocast, first_prompts, free_memory, gap_bound, keep_gap
from prefalign.online.sampling import Draw, check_requests
from prefalign.online.sampling_job import Job
from prefalign.online.settings import engine_python
from prefalign.training.runs import RunError

if TYPE_CHECKING:
    from prefalign.online.settings import OnlineConfig


def draw_candidates(config: OnlineConfig, folder: Path, prompts: Path, draw: Draw, policy: ModelConfig) -> None:
    """Check an engine in a process of its own, and let it answer a round's prompts.

    Args:
        config: of the run.
        folder: of the round; `check.json` and `candidates/` are written there.
        prompts: folder of the round's prompts.
        draw: which of them are answered.
        policy: the policy that the round trains.

    Raises:
        EngineGap: the engine does not have the policy's weights; nothing was sampled.
        NoRows: no prompt was answered.
        RunError: the process failed.
    """
    job = make_job(config, folder, prompts, draw, serve(config, policy, folder / "served"))
    if config.check.prompts:
        check_engine(config, job, policy, folder)
        free_memory()
    outcome = run_job(config, replace(job, phase="sample"), folder)
    if outcome["no_rows"] is not None:
        raise NoRows(*outcome["no_rows"])


def serve(config: OnlineConfig, policy: ModelConfig, folder: Path) -> EngineConfig:
    """The policy as an engine loads it: an adapter is merged into its base, in a folder; full weights stay where they are.

    vLLM does not score through an adapter, and takes none on tower or projector; a merged one it serves as any model.
    """
    source, adapter, revision = resolve(policy)
    served = policy
    if adapter is not None:
        merge_adapters([adapter], folder, base=source, base_revision=revision, dtype=policy.dtype)
        served = replace(policy, model_name_or_path=str(folder), model_revision=None, adapter=None)
    values = vars(served) | {"attn_implementation": None}  # the trainer's
    return EngineConfig(**values, engine=config.engine, vllm=config.vllm)


def remove_served(folder: Path) -> None:
    """Remove the merged policy of a round that needs it no more."""
    shutil.rmtree(folder / "served", ignore_errors=True)


def make_job(config: OnlineConfig, folder: Path, prompts: Path, draw: Draw, served: EngineConfig) -> Job:
    """The job that checks an engine; with `phase` `sample` the one that makes the candidates."""
    return Job(
        phase="check",
        model=served,
        prompts=prompts,
        outcome=folder / "serving" / "outcome.json",
        candidates=folder / "candidates",
        check_prompts=config.check.prompts,
        sampling=config.sampling,
        responses=config.responses,
        p_offline=draw.p_offline,
        seed=draw.seed,
        visit=draw.visit,
        block_size=config.rounds.block_size,
        batch_size=config.batch_size,
        offline=sorted(draw.offline),
    )


def check_engine(config: OnlineConfig, job: Job, policy: ModelConfig, folder: Path) -> None:
    """Compare an engine's log-probs of its own answers with the trainer's on the policy; written to `check.json`.

    Raises:
        EngineGap: they are further apart than the bound.
        RunError: the process failed.
    """
    answers = run_job(config, job, folder)["answers"]
    if not answers:
        return
    model, processor = load_model(policy), load_processor(policy)
    keep_gap(_gap(config, job, answers, model, processor), gap_bound(config, model.dtype), folder)


def _gap(config: OnlineConfig, job: Job, answers: list[dict[str, Any]], model: Any, processor: Any) -> Gap:
    asked = {request.id: request for request in check_requests(first_prompts(job.prompts, job.check_prompts), job.seed)}
    requests = [asked[answer["id"]] for answer in answers]
    texts = [answer["text"] for answer in answers]
    trained = trainer_logprobs(model, processor, requests, texts, autocast=autocast(config))
    return gap_of(requests, [torch.tensor(answer["logprobs"]) for answer in answers], trained)


def run_job(config: OnlineConfig, job: Job, folder: Path) -> dict[str, Any]:
    """Have a job done in a process of its own, which ends when this one does; returns its outcome.

    Raises:
        RunError: the process failed; says where its output is.
    """
    place = job.outcome.parent
    place.mkdir(parents=True, exist_ok=True)
    file, log = place / f"{job.phase}.json", place / f"{job.phase}.txt"
    write_atomically(file, json.dumps(to_mapping(job), indent=2).encode())
    job.outcome.unlink(missing_ok=True)
    python = engine_python(config)
    print(f"{folder.name}: {job.phase} by {job.model.engine}; what it says is in {log}", flush=True)
    command = [python, "-m", sampling_job.__name__, str(file)]
    with (
        log.open("w") as said,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT) as process,
    ):
        code = process.wait()
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        last = (errors or lines or ["it said nothing"])[-1]
        raise RunError(
            f"{folder.name}: the process that samples ({python}) ended with code {code}: {last}. Its whole output is in "
            f"{log}. Mend the cause and start the same command again: answers that are written are kept."
        )
    outcome: dict[str, Any] = json.loads(job.outcome.read_text(encoding="utf-8"))
    return outcome

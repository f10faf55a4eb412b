"""First arrow of a round: a slice of the prompts, and several answers of the current policy to each."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign import stages, store
from prefalign.engines import Completion, Engine, Request, Sampling, require
from prefalign.images import open_image
from prefalign.records import Candidates, Prompt, row_seed
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import normalised

if TYPE_CHECKING:
    from PIL import Image

    from prefalign.manifest import Manifest

SAMPLE = "sample_policy"
NEAR_IDENTICAL = 0.95
"""Edit similarity above which two answers say the same."""


@dataclass(frozen=True)
class Draw:
    """Which prompts take their pair from the offline set, and which from the policy: mixed DPO, section 3.3.

    Attributes:
        offline: ids of the prompts that have an offline pair.
        p_offline: probability that such a prompt takes it.
        seed: seed of the run.
        visit: number of the round or step; another one draws anew.
    """

    offline: frozenset[str]
    p_offline: float
    seed: int
    visit: int

    def takes_offline(self, identity: str) -> bool:
        """One Bernoulli draw for a prompt, from (seed, visit, id) alone."""
        if identity not in self.offline:
            return False
        return random.Random(row_seed(self.seed, f"{self.visit}/{identity}/mix")).random() < self.p_offline


def sample(
    prompts: Path,
    engine: Engine,
    draw: Draw,
    *,
    sampling: Sampling,
    responses: int,
    output: OutputConfig,
) -> Manifest:
    """Answers of the policy to the prompts that are drawn online, as `Candidates` with the prompts' ids.

    Each response keeps its tokens, how it ended, the sampling settings, and its summed log-prob under the policy that drew it
    (untempered, end of turn included), for monitoring KL and what later rounds make of it.

    Args:
        prompts: folder of the round's prompts.
        engine: on the current policy; needs `sample` and `logprobs`.
        draw: which prompts are answered; the others are counted as `drawn_offline`.
        sampling: how answers are drawn; the noise follows from (seed, visit, prompt, number of the response).
        responses: answers to each prompt.
        output: folder of the candidates.
    """
    require(engine, ["sample", "logprobs"], SAMPLE)
    seed = row_seed(draw.seed, f"visit {draw.visit}")

    def prepare(prompt: Prompt) -> list[Image.Image] | Dropped | Failed:
        return Dropped("drawn_offline") if draw.takes_offline(prompt.id) else stages.opened(prompt.images)

    def work(rows: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        requests = [
            Request(f"{prompt.id}/{number}", prompt.messages, images, seed=seed)
            for prompt, images in rows
            for number in range(responses)
        ]
        answers = engine.generate(requests, sampling)
        scored = engine.logprobs(requests, answers)
        drawn = [
            response(answer, float(logps.sum()), sampling, engine.fingerprint)
            for answer, logps in zip(answers, scored, strict=True)
        ]
        return [
            _outcome(prompt, answers[place : place + responses], drawn[place : place + responses])
            for place, (prompt, _) in zip(range(0, len(drawn), responses), rows, strict=True)
        ]

    return store.run_stage(
        SAMPLE,
        DataConfig(prompts),
        lambda block: stages.in_order(block, prepare, work),
        output=output,
        record=Candidates,
        settings={
            "sampling": asdict(sampling), "responses": responses, "visit": draw.visit, "p_offline": draw.p_offline,
            "offline": hashlib.sha256("\n".join(sorted(draw.offline)).encode()).hexdigest()[:16],
        },
        seed=draw.seed,
        models={"policy": engine.fingerprint},
    )  # fmt: skip


def response(answer: Completion, logp: float, sampling: Sampling, generator: str) -> dict[str, Any]:
    """One response of `Candidates`."""
    return {
        "text": answer.text.strip(),
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "tokens": len(answer.token_ids) + (answer.finish_reason == "stop"),
        "logp": round(logp, 6) if logp == logp else None,
        "settings": asdict(sampling),
        "generator": generator,
    }


def _outcome(prompt: Prompt, answers: Sequence[Completion], drawn: list[dict[str, Any]]) -> Outcome:
    errors = [answer.error for answer in answers if answer.finish_reason == "error"]
    if errors:
        return Failed("generation_failed", str(errors[0]))
    return [Candidates(prompt.id, prompt.images, prompt.messages, drawn, prompt.answer, prompt.facts)]


def usable(drawn: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
    """The responses that can stand in a pair, and if fewer than two can, why.

    Taken out: `unfinished` (ran into the length limit: as a rejected answer it would teach to stop early, as a chosen one not to
    stop), `empty`, and all but the first of `duplicate` responses (case, blanks and punctuation aside).
    """
    left, reason, known = [], None, set()
    for entry in drawn:
        same = normalised(entry["text"])
        if entry["finish_reason"] != "stop":
            reason = "unfinished"
        elif not entry["text"].strip():
            reason = "empty"
        elif same in known:
            reason = "duplicate"
        else:
            known.add(same)
            left.append(entry)
    return left, None if len(left) > 1 else reason or "one_response"


def near_identical(one: str, other: str) -> bool:
    """Whether two answers differ by so few characters that a preference between them is noise."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_similarity(one, other) > NEAR_IDENTICAL


def check_requests(prompts: Sequence[Prompt], seed: int) -> list[Request]:
    """What the policy is asked so that its answers can be checked: each prompt once."""
    return [
        Request(f"{prompt.id}/check", prompt.messages, [open_image(image) for image in prompt.images], seed=seed)
        for prompt in prompts
    ]


def drawn_answers(
    engine: Engine, prompts: Sequence[Prompt], *, max_new_tokens: int, seed: int
) -> tuple[list[Request], list[Completion]]:
    """One answer of the policy to each prompt, at temperature 1: what the checks are made on."""
    requests = check_requests(prompts, seed)
    answers = engine.generate(requests, Sampling(max_new_tokens=max_new_tokens))
    good = [(request, answer) for request, answer in zip(requests, answers, strict=True) if answer.text.strip()]
    return [request for request, _ in good], [answer for _, answer in good]

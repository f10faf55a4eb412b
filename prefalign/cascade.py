"""A cascade over conversations: each stage scores what the one before kept, and keeps a share of it (arXiv 2409.18541).

Scores come from rewards, or from what the picture adds to the answers (information gain). A stage that rates answers can let the
model write several to each question and keep the best. All passes are `Survey`s, so a killed run goes on where it was, and all
processes follow one decision about each stage. That may be to stop, as too many rows have failed. What is started then makes an
attempt of its own: it takes over what is scored, and asks again about all rows that a judge or the model failed, also in stages
before, which it decides anew. No row has been written by then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefalign.blocks import UNANSWERED
from prefalign.curation import Aggregate, Compare, Turn, aggregated, keep_best, turns_of
from prefalign.engines import Engine, Request, Sampling
from prefalign.evidence import Without, information_gain
from prefalign.records import Prompt, user_message
from prefalign.stages import opened
from prefalign.store import Failed, StoreError
from prefalign.surveys import Survey

if TYPE_CHECKING:
    from PIL import Image

    from prefalign.rewards import Combined

UNUSABLE = ("no_picture", "no_reference")
"""Reasons for which a row never comes to the first stage."""


@dataclass
class CascadeStage:
    """One stage of the cascade.

    Attributes:
        name: name of the stage: its column in the score table, and what rows that it drops are counted under.
        rates: each `question` by itself with the pictures, or each `answer` in its conversation.
        score: `rewards` (the list's total), or `information_gain` (answers only; needs the model).
        rewards: the weighted list, as `prefalign.rewards.read_rewards` takes it.
        keep: share of the rows that is kept, rounded up.
        aggregate: a conversation's score from those of its turns.
        compare: share of each type, of all, or of all by z-score within type (`curation.keep_best`).
        num_generations: answers of the model that compete with the one there is, for each question; the best is kept.
    """

    name: str
    rates: Literal["question", "answer"] = "answer"
    score: Literal["rewards", "information_gain"] = "rewards"
    rewards: list[dict[str, Any]] = field(default_factory=list)
    keep: float = 0.3
    aggregate: Aggregate = "mean"
    compare: Compare = "within_type"
    num_generations: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+", self.name):
            raise ValueError(f"stage {self.name!r} has no name to count rows under. Use letters, digits and _.")
        if not 0 < self.keep <= 1:
            raise ValueError(f"stage {self.name} keeps {self.keep}; give a share above 0 and up to 1 (0.3).")
        if self.num_generations < 0:
            raise ValueError(f"stage {self.name} has num_generations {self.num_generations}; give 0 or more.")
        if (self.score == "rewards") != bool(self.rewards):
            raise ValueError(
                f"stage {self.name} scores by {self.score} and names {len(self.rewards)} rewards. Give `rewards` a list, or set "
                "score to information_gain without one."
            )
        if self.rates == "question" and (self.score == "information_gain" or self.num_generations):
            raise ValueError(
                f"stage {self.name} rates questions, and information gain and num_generations are of answers. Set rates to "
                "answer."
            )

    @property
    def needs_model(self) -> bool:
        """Whether the stage needs the model."""
        return bool(self.num_generations) or self.score == "information_gain"


@dataclass
class Rated:
    """What a cascade found of a row.

    Attributes:
        type: its type.
        words: words of its answers.
        scores: of each stage that it came to, by name; None where one is missing.
        answers: by `Turn.place`, answers of the model that were better than its own.
        dropped: why it is not kept, None if it is.
        failed: reason and message, if it could not be worked on.
    """

    type: str
    words: int
    scores: dict[str, float | None] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)
    dropped: str | None = None
    failed: tuple[str, str] | None = None


@dataclass(frozen=True)
class Judges:
    """Who scores and writes.

    Attributes:
        rewards: of each stage that scores by rewards, by its name.
        engine: the model, for stages that need one.
        sampling: how competing answers are drawn.
        question_prompt: what a question is rated as the answer to.
        without: what stands for no usable picture (information gain).
        seed: seed of the draws.
    """

    rewards: Mapping[str, Combined]
    engine: Engine | None
    sampling: Sampling
    question_prompt: str
    without: Without
    seed: int


def run_cascade(
    survey: Survey, stages: Sequence[CascadeStage], judges: Judges, *, stratify_by: str
) -> dict[str, Rated]:
    """Score and thin out all rows, stage by stage.

    Args:
        survey: passes over the rows, read as prompts; of one id the first counts.
        stages: the cascade.
        judges: who scores.
        stratify_by: key of a row's facts that names its type.

    Returns:
        Every readable row by id, in input order; those with neither `dropped` nor `failed` are kept.

    Raises:
        StoreError: after a stage, if more rows than `output.max_quarantine` have failed in it and those before.
    """
    table: dict[str, Rated] = {}
    for block in survey("rows", lambda prompts: [_measured(prompt, stratify_by) for prompt in prompts]):
        for found in block:
            table.setdefault(found["id"], Rated(found["type"], found["words"], dropped=found["dropped"]))
    attempt = 0
    while any("stopped" in (survey.decision(_kind(stage, attempt)) or ()) for stage in stages):
        attempt += 1
    for stage in stages:
        kind = _kind(stage, attempt)
        known = _answered(survey, stage, kind)
        came: dict[str, Any] = {n: None for n, row in table.items() if row.dropped is None and row.failed is None}
        waiting = set(came)

        def work(
            prompts: list[Prompt],
            stage: CascadeStage = stage,
            waiting: set[str] = waiting,
            known: dict[str, Any] = known,
        ) -> list[dict[str, Any]]:
            first = {prompt.id: prompt for prompt in reversed(prompts) if prompt.id in waiting}
            asked = [prompt for prompt in prompts if first.get(prompt.id) is prompt and prompt.id not in known]
            scored = _score_block(asked, {prompt.id: table[prompt.id].answers for prompt in asked}, stage, judges)
            found = {one["id"]: one for one in scored}
            return [
                found.get(prompt.id) or known[prompt.id]
                if first.get(prompt.id) is prompt
                else {"id": prompt.id, "passed": True}
                for prompt in prompts
            ]

        def again(found: dict[str, Any], waiting: set[str] = waiting) -> bool:
            return found["id"] in waiting and not _is_answer(found)

        for block in survey(kind, work, again):
            for found in block:
                if "passed" in found or found["id"] not in waiting:
                    continue
                waiting.discard(found["id"])
                came[found["id"]], row = found["failed"], table[found["id"]]
                row.scores[stage.name] = found["score"]
                row.answers.update({int(place): text for place, text in found["answers"].items()})
        stands = _decided(survey, stage, kind, table, came)
        for name, (reason, message) in stands["failed"].items():  # whatever was answered since
            table[name].failed, table[name].scores[stage.name] = (reason, message), None
        for name in set(came).difference(stands["kept"], stands["failed"]):
            scored = table[name].scores.get(stage.name) is not None
            table[name].dropped = f"below_{stage.name}" if scored else f"unscored_{stage.name}"
    return table


def _kind(stage: CascadeStage, attempt: int) -> str:
    """Name of the pass over a stage's rows, and of what is decided on it."""
    return f"stage-{stage.name}" if attempt == 0 else f"stage-{stage.name}.{attempt}"


def _is_answer(found: Mapping[str, Any]) -> bool:
    """Whether what a pass has found of a row holds another time too."""
    return "passed" not in found and (found["failed"] is None or found["failed"][0] not in UNANSWERED)


def _answered(survey: Survey, stage: CascadeStage, kind: str) -> dict[str, Any]:
    """What other attempts have found of a stage's rows, by id, but for those that got no answer."""
    known: dict[str, Any] = {}
    for file in sorted((survey.output.path / "survey").glob(f"stage-{stage.name}[-.]*.json")):
        other, _, number = file.stem.rpartition("-")
        if other != kind:
            known |= {found["id"]: found for found in survey.kept(other, int(number)) or () if _is_answer(found)}
    return known


def _decided(
    survey: Survey, stage: CascadeStage, kind: str, table: Mapping[str, Rated], came: Mapping[str, Any]
) -> dict[str, Any]:
    """The decision about a stage, made now if there is none: rows kept of those that `came` to it, and why others failed."""
    stands = survey.decision(kind)
    if stands is None:
        failed = {name: why for name, why in came.items() if why is not None}
        lost = [*failed.values(), *(row.failed for row in table.values() if row.failed is not None)]
        scores = {name: value for name in came if (value := table[name].scores.get(stage.name)) is not None}
        if len(lost) > survey.output.max_quarantine:
            made: dict[str, Any] = {"stopped": _stop(survey, stage, lost)}
        else:
            kept = keep_best(scores, {name: table[name].type for name in scores}, stage.keep, stage.compare)
            made = {"kept": sorted(kept), "failed": failed}
        stands = survey.decide(kind, made)
    if "stopped" in stands:
        raise StoreError(stands["stopped"])
    return stands


def _stop(survey: Survey, stage: CascadeStage, lost: Sequence[Sequence[str]]) -> str:
    """What a run says that stops because of these failures (reason and message of each)."""
    unanswered = [why for why in lost if why[0] in UNANSWERED]
    reason, message = [*unanswered, *lost][0]
    return (
        f"{survey.stage} stopped after stage {stage.name}: {len(lost)} rows failed, above --output.max_quarantine "
        f"{survey.output.max_quarantine} (one of them: {reason}: {message[:400]}). No row was kept yet, and what is scored "
        f"stays. Mend the cause and start again: the {len(unanswered)} rows that got no answer, in this stage and those before, "
        f"are asked about again. To go on without what fails then, give --output.max_quarantine {len(lost)} or more."
    )


def _measured(prompt: Prompt, stratify_by: str) -> dict[str, Any]:
    turns = turns_of(prompt)
    dropped = None
    if not prompt.images:
        dropped = UNUSABLE[0]
    elif not turns or not all(turn.answer.strip() for turn in turns):
        dropped = UNUSABLE[1]
    kind = str(prompt.facts.get(stratify_by, ""))
    return {"id": prompt.id, "type": kind, "words": sum(len(turn.answer.split()) for turn in turns), "dropped": dropped}


def _score_block(
    prompts: Sequence[Prompt], answers: Mapping[str, Mapping[int, str]], stage: CascadeStage, judges: Judges
) -> list[dict[str, Any]]:
    """Score the conversations of a block.

    All turns in one call of whatever scores; where answers compete turn by turn, as what is kept is the context of the next.
    """
    found: dict[str, dict[str, Any]] = {}
    images: dict[str, list[Image.Image]] = {}
    for prompt in prompts:
        opened_images = opened(prompt.images)
        found[prompt.id] = {"id": prompt.id, "failed": None, "score": None, "answers": {}}
        if isinstance(opened_images, Failed):
            found[prompt.id]["failed"] = (opened_images.reason, opened_images.message)
        else:
            images[prompt.id] = opened_images
    usable = [prompt for prompt in prompts if prompt.id in images]
    most = max((len(turns_of(prompt)) for prompt in usable), default=0)
    turns: dict[str, list[float | None]] = {}
    for part in [slice(number, number + 1) for number in range(most)] if stage.num_generations else [slice(None)]:
        asked = [
            _Asked(prompt, images[prompt.id], turn, [turn.answer])
            for prompt in usable
            if found[prompt.id]["failed"] is None
            for turn in turns_of(prompt, {**answers[prompt.id], **found[prompt.id]["answers"]})[part]
        ]
        if stage.num_generations:
            _compete(asked, stage.num_generations, judges)
        _score(asked, stage, judges)
        for one in asked:
            if one.failed is not None:
                found[one.prompt.id]["failed"] = (one.failed.reason, one.failed.message)
                continue
            scores = one.scores
            known = [place for place, value in enumerate(scores) if value is not None]
            best = max(known, key=lambda place: (scores[place] or 0.0, -place), default=0)
            turns.setdefault(one.prompt.id, []).append(scores[best])
            if best:
                found[one.prompt.id]["answers"][one.turn.place] = one.texts[best]
    for name, scores in turns.items():
        if found[name]["failed"] is None:
            found[name]["score"] = aggregated(scores, stage.aggregate)
    return list(found.values())


@dataclass
class _Asked:
    """A turn with the answers that compete for it, its own first, and their scores; `failed` if somebody did not answer."""

    prompt: Prompt
    images: list[Image.Image]
    turn: Turn
    texts: list[str]
    scores: list[float | None] = field(default_factory=list)
    failed: Failed | None = None


def _compete(asked: Sequence[_Asked], count: int, judges: Judges) -> None:
    """Let the model write answers; empty and unfinished ones do not compete, one that cannot be had fails its turn."""
    assert judges.engine is not None
    requests = [
        Request(f"{one.prompt.id}/{one.turn.place}/{number}", one.turn.context, one.images, seed=judges.seed)
        for one in asked
        for number in range(count)
    ]
    said = judges.engine.generate(requests, judges.sampling)
    for place, one in enumerate(asked):
        for completion in said[place * count : (place + 1) * count]:
            if completion.error is not None:
                one.failed = Failed("generation_failed", completion.error)
            elif completion.finish_reason != "length" and completion.text.strip():
                one.texts.append(completion.text.strip())


def _score(asked: Sequence[_Asked], stage: CascadeStage, judges: Judges) -> None:
    """Give a score to each text of each turn, or `failed` where a judge did not reply or facts cannot be read."""
    waiting = [one for one in asked if one.failed is None]
    if not waiting:
        return
    if stage.score == "information_gain":
        assert judges.engine is not None
        requests = [
            Request(f"{one.prompt.id}/{one.turn.place}", one.turn.context, one.images)
            for one in waiting
            for _ in one.texts
        ]
        texts = [text for one in waiting for text in one.texts]
        gains = iter(information_gain(judges.engine, requests, texts, without=judges.without, seed=judges.seed))
        for one in waiting:
            one.scores = [next(gains) for _ in one.texts]
        return
    from prefalign.rewards import FactsError

    try:
        _reward(waiting, stage, judges)
    except FactsError as error:  # of one row: each by itself
        rows = dict.fromkeys(one.prompt.id for one in waiting)
        for name in rows if len(rows) > 1 else ():
            _score([one for one in waiting if one.prompt.id == name], stage, judges)
        for one in waiting if len(rows) == 1 else ():
            one.failed = Failed("bad_facts", str(error))


def _reward(waiting: Sequence[_Asked], stage: CascadeStage, judges: Judges) -> None:
    """Have a stage's rewards score each text of each turn, all in one call."""
    from prefalign.rewards import Response, stored

    responses: list[Response] = []
    places = []
    for one in waiting:
        name, facts = f"{one.prompt.id}/{one.turn.place}", one.prompt.facts
        start = len(responses)
        if stage.rates == "question":
            question = [user_message(judges.question_prompt, len(one.images))]
            responses.append(Response(name, one.images, question, one.turn.question, facts=facts))
        else:
            context, reference = one.turn.context, one.turn.answer
            responses += [Response(name, one.images, context, text, reference, facts) for text in one.texts]
        places.append(range(start, len(responses)))
    rewards = judges.rewards[stage.name]
    totals = rewards.score(responses)["total"].tolist()
    for one, own in zip(waiting, places, strict=True):
        one.scores = [None if totals[place] != totals[place] else totals[place] for place in own]
        one.failed = stored.judge_failure(rewards, own)

"""A VLM or an LLM as judge: scores by attribute, and the better of two responses.

A judge that sees no pictures (`pictures: false`) is given the facts instead, and has no verdict where there are none.

Sources: attributes of HelpSteer as graded in arXiv 2402.10884; pairwise judge of online DPO, arXiv 2407.02477, section 3 (there
LLaVA-1.6-34B, in one order). What is asked, and how replies are read, is in `prefalign.judge`.

Legend of shapes: `N` responses.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefalign.engines import Engine, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.judge import (
    REMINDER,
    RUBRIC,
    Judge,
    Question,
    Vote,
    comparison_prompt,
    grading_prompt,
    known_text,
    picture_hash,
    read_grades,
    read_vote,
    transcript,
    wording_version,
)
from prefalign.records import row_seed
from prefalign.replies import Replies
from prefalign.rewards.reward import Response, Verdict
from prefalign.text import same_answer

if TYPE_CHECKING:
    import torch

GRADING = wording_version("grades", grading_prompt("", "", list(RUBRIC), pictures=True), REMINDER)
COMPARING = wording_version("pairs", comparison_prompt("", "", "", pictures=True), REMINDER)


_GIVEN: dict[str, Literal["first", "second", "tie"]] = {"A": "first", "B": "second", "tie": "tie"}
_SWAPPED: dict[str, Literal["first", "second", "tie"]] = {"A": "second", "B": "first", "tie": "tie"}


def _greedy() -> Sampling:
    return Sampling(max_new_tokens=256, temperature=0.0)


@dataclass
class _Asking:
    """Settings that both judges share.

    Attributes:
        model: the judge's model.
        engine: an `Engine` to ask instead, from Python.
        pictures: show the pictures; false for an LLM, which is told the facts.
        facts: tell what is known of the pictures (captions, rationales, objects, reference answer) beside showing them.
        sampling: how replies are drawn; greedy unless set.
        cache: file that keeps every reply, so that a rerun asks nothing but what failed or could not be read.
        batch_size: replies in one forward pass.
    """

    model: EngineConfig | None = None
    engine: Any = field(default=None, repr=False)
    pictures: bool = True
    facts: bool = False
    sampling: Sampling = field(default_factory=_greedy)
    cache: str | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if (self.model is None) == (self.engine is None):
            given = "neither is" if self.model is None else "both are"
            raise ValueError(
                f"a judge is either a `model` or, from Python, an `engine`, and {given} given. Name one model."
            )
        if self.engine is not None and not callable(getattr(self.engine, "generate", None)):
            raise ValueError(
                f"engine is a {type(self.engine).__name__}, which cannot generate. In a config set `model`."
            )

    def check(self) -> None:
        """Look for the judge's model, without loading it."""
        if self.model is not None:
            from prefalign.engines.loading import check_engine

            check_engine(self.model, stage="the judge")

    def _judge(self, wording: str) -> Judge:
        engine: Engine = self.engine
        if self.model is not None:
            from prefalign.engines.loading import load_engine

            engine = load_engine(self.model, batch_size=self.batch_size)
        if self.cache:
            Replies(Path(self.cache))  # a file of another kind is found before anything is paid for
        told = "+facts" if self.facts or not self.pictures else ""
        version = f"{wording}{told}{'' if self.pictures else '-pictures'}"
        return Judge(engine, version, self.sampling, Path(self.cache) if self.cache else None)

    def _known(self, response: Response) -> str:
        """What the judge is told of the pictures."""
        return known_text(response.facts, response.answer) if self.facts or not self.pictures else ""

    def _can_judge(self, response: Response) -> bool:
        """Whether the judge is shown or told anything of the row's pictures."""
        return self.pictures or not response.images or bool(self._known(response))


@dataclass
class JudgedAttributes(_Asking):
    """Whole numbers from 0 to 4 for each attribute, each response graded alone.

    Every score counts with weight 1 unless `weight` names terms; arXiv 2402.10884 adds up helpfulness, correctness and coherence.

    Attributes:
        attributes: which of helpfulness, correctness, coherence, complexity and verbosity.
        seed: with the response it decides in which order they are asked for.
    """

    attributes: list[str] = field(default_factory=lambda: list(RUBRIC))
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._backwards = False
        self.failures: dict[int, str] = {}
        unknown = [name for name in self.attributes if name not in RUBRIC]
        if unknown or not self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise ValueError(
                f"attributes {self.attributes}: there is a rubric for each of {', '.join(RUBRIC)}; name some of them, "
                "once each."
            )

    @property
    def terms(self) -> tuple[str, ...]:
        """The attributes that are graded."""
        return tuple(self.attributes)

    @cached_property
    def judge(self) -> Judge:
        """The judge; its model is loaded here."""
        return self._judge(GRADING)

    @property
    def version(self) -> str:
        """Model and wording."""
        return self.judge.version

    def again(self) -> JudgedAttributes:
        """The same judge, asked for its attributes in the reverse order: how far it agrees with itself.

        Raises:
            ValueError: with one attribute, whose question would be the same.
        """
        if len(self.attributes) < 2:
            raise ValueError(
                f"the judge grades {self.attributes[0]} alone, so it would be asked the same question again and say the same. "
                "Name a second attribute, or do not ask again (regrade: 0)."
            )
        other = dataclasses.replace(self, model=None, engine=self.judge.engine)
        other._backwards = True
        return other

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """By attribute, (N,) from 0 to 4; NaN for all where the judge gave no readable reply in three attempts.

        Where it gave none at all `failures` says why, by place of the response.
        """
        import torch

        rows = [row for row, response in enumerate(responses) if self._can_judge(response)]
        found = self.judge.ask(
            [self._question(responses[row]) for row in rows],
            lambda reply: read_grades(reply, self.attributes),
        )
        self.failures = {rows[place]: message for place, message in self.judge.failed.items()}
        self.judge.counts["missing"] += len(responses) - len(rows)
        grades = {row: one for row, one in zip(rows, found, strict=True) if one is not None}
        return {
            name: torch.tensor(
                [float(grades[row][name]) if row in grades else math.nan for row in range(len(responses))]
            )
            for name in self.attributes
        }

    def _question(self, response: Response) -> Question:
        conversation = transcript(response.messages)
        order = list(self.attributes)
        random.Random(row_seed(self.seed, f"{conversation}\n{response.text}")).shuffle(order)
        if self._backwards:
            order.reverse()
        text = grading_prompt(
            conversation, response.text, order, self._known(response), pictures=self.pictures and bool(response.images)
        )
        return Question(response.id, text, response.images if self.pictures else ())


@dataclass
class PairwiseJudge(_Asking):
    """Names the better of two responses, asked in both orders.

    There is a winner, or a tie, only if both orders say so; the confidence is the mean of the two that were stated.
    """

    @cached_property
    def judge(self) -> Judge:
        """The judge; its model is loaded here."""
        return self._judge(COMPARING)

    @property
    def version(self) -> str:
        """Model and wording."""
        return self.judge.version

    def compare(self, pairs: Sequence[tuple[Response, Response]]) -> list[Verdict]:
        """One verdict for each pair, in order. Responses that are the same text tie without being asked about.

        Raises:
            ValueError: for a pair of two different prompts, or of one prompt about different pictures.
        """
        asked = [self._to_ask(*pair) for pair in pairs]
        questions = [
            self._question(one, other)
            for (first, second), ask in zip(pairs, asked, strict=True)
            if ask
            for one, other in ((first, second), (second, first))
        ]
        votes = self.judge.ask(questions, read_vote)
        places = iter(range(0, len(votes), 2))
        return [self._asked(votes, next(places)) if ask else self._unasked(*pair)
                for pair, ask in zip(pairs, asked, strict=True)]  # fmt: skip

    def _asked(self, votes: Sequence[Vote | None], place: int) -> Verdict:
        """The verdict of the votes at `place` and after it."""
        verdict = _verdict(votes[place], votes[place + 1])
        failed = self.judge.failed
        if (error := failed.get(place, failed.get(place + 1))) is not None:
            return dataclasses.replace(verdict, reason="no reply", error=error)
        return verdict

    def _to_ask(self, first: Response, second: Response) -> bool:
        pictures = [[picture_hash(image) for image in response.images] for response in (first, second)]
        if first.messages != second.messages or pictures[0] != pictures[1]:
            raise ValueError(
                f"responses {first.id} and {second.id} answer different prompts or pictures, so neither is the better one. "
                "Compare responses to one prompt."
            )
        return not same_answer(first.text, second.text) and self._can_judge(first)

    def _unasked(self, first: Response, second: Response) -> Verdict:
        if same_answer(first.text, second.text):
            return Verdict("tie", reason="the same text")
        return Verdict(None, reason="the judge sees no pictures, and the row has no facts")

    def _question(self, first: Response, second: Response) -> Question:
        text = comparison_prompt(
            transcript(first.messages), first.text, second.text, self._known(first),
            pictures=self.pictures and bool(first.images),
        )  # fmt: skip
        return Question(first.id, text, first.images if self.pictures else ())


def _verdict(given: Vote | None, swapped: Vote | None) -> Verdict:
    """The verdict of two votes, the second on the swapped order."""
    votes = (_GIVEN[given.better] if given else None, _SWAPPED[swapped.better] if swapped else None)
    if given is None or swapped is None:
        return Verdict(None, reason="no readable reply", votes=votes)
    if votes[0] != votes[1]:
        return Verdict(None, reason=f"the two orders disagree: {votes[0]}, then {votes[1]}", votes=votes)
    stated = [vote.confidence for vote in (given, swapped) if vote.confidence is not None]
    confidence = sum(stated) / len(stated) if len(stated) == 2 else None
    return Verdict(votes[0], confidence, given.reason, votes)

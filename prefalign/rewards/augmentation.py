"""What a reward model reads: the conversation, the candidate answer, and a turn that asks for a rating with the facts in it.

The score is read at the last token of an assistant sentence that is opened and not finished. Facts are known to the reward model
alone: they stand in the rating turn, under its first point, and neither policy nor value model ever sees them.

Paper: Fact-RLHF, arXiv 2309.14525 (layout of the turn, facts shuffled at every use). Departures from the released code: the
wording; both answers of a pair see the facts in one order; facts are optional, and training drops them for a share of the rows.
`plain` is the text of Align2LLaVA's two models, arXiv 2409.18541.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefalign import families
from prefalign.config import ConfigError
from prefalign.records import Message, message_text, normalise_messages, placeholder_count, row_seed, user_message

if TYPE_CHECKING:
    from transformers import ProcessorMixin

ASK = """Rate the last answer on four points.
1. Accurate: it says what the picture shows, leaves nothing of weight out and adds nothing.{facts}
2. Helpful: it does what was asked.
3. Natural: it reads like the words of a fluent person.
4. Concise: it neither pads nor repeats.
Give one mark for all four together."""

LEAD = "The answer has to agree with these descriptions of the picture, taken as a whole:"

OPENING = "On all four points together, this answer earns a mark of"

_MARK = "PREFALIGNMARK"


@dataclass(frozen=True)
class RatingPrompt:
    """How a conversation and a candidate answer become the text that is scored.

    Attributes:
        ask: the rating turn; `{facts}` is where the facts go.
        lead: sentence before the facts; it is left out with them.
        fact: one line of facts, with `{fact}`. Of several pictures each line says which: by `{number}`, or, without it, by
            `Picture 2: ` before the fact.
        opening: start of the assistant's sentence whose last token is scored.
        fact_keys: where facts stand in a row's `facts`; the first key that a row has is taken, so that a row with rationales
            is judged by these and one without by its captions.
        plain: no turns at all but this text, with `{answer}`, and where it is wanted `{question}` and `{facts}`; the score is
            read at its last token. None: the conversation in the model's chat template, and the rating turn.

    Raises:
        ConfigError: `plain` without one `{answer}`, or an `opening` that is empty.
    """

    ask: str = ASK
    lead: str = LEAD
    fact: str = "- {fact}"
    opening: str = OPENING
    fact_keys: list[str] = field(default_factory=lambda: ["rationales", "captions"])
    plain: str | None = None

    def __post_init__(self) -> None:
        if self.plain is not None and self.plain.count("{answer}") != 1:
            raise ConfigError(
                f"prompt.plain {self.plain!r} holds {{answer}} {self.plain.count('{answer}')} times, so it is not clear what is "
                "scored. Write it once, as in 'Question: {question}\\nAnswer: {answer}'."
            )
        if self.plain is None and not self.opening.strip():
            raise ConfigError(
                "prompt.opening is empty, so there is no sentence at whose end the score could be read. Write its beginning, or "
                "leave it out for the usual one."
            )

    @property
    def shows_facts(self) -> bool:
        """Whether there is a place for facts."""
        return bool(self.fact_keys) and "{facts}" in (self.ask if self.plain is None else self.plain)

    def facts_of(self, row: Mapping[str, Any]) -> list[str]:
        """The lines of facts that a row has, in their stored order; none where it has none.

        Args:
            row: a row with `facts` as a mapping. Of several pictures, each has its own under `pictures`.
        """
        facts = row.get("facts") or {}
        each = facts.get("pictures")
        if isinstance(each, list) and len(each) > 1:
            numbered = self.fact if "{number}" in self.fact else self.fact.replace("{fact}", "Picture {number}: {fact}")
            return [
                numbered.replace("{number}", str(number)).replace("{fact}", line)
                for number, one in enumerate(each, start=1)
                for line in self._lines(one)
            ]
        return [self.fact.replace("{number}", "1").replace("{fact}", line) for line in self._lines(facts)]

    def _lines(self, facts: Mapping[str, Any]) -> list[str]:
        for key in self.fact_keys:
            found = facts.get(key) or []
            lines = [found] if isinstance(found, str) else [line for line in found if isinstance(line, str)]
            if lines := [line.strip() for line in lines if line.strip()]:
                return lines
        return []

    def split(
        self,
        processor: ProcessorMixin,
        messages: Sequence[Message],
        answer: Sequence[Message],
        facts: Sequence[str] = (),
        *,
        end: str = "",
    ) -> tuple[str, str]:
        """The text that is scored, cut where the answer begins.

        Args:
            processor: the model's processor.
            messages: conversation up to the user's turn.
            answer: assistant turn(s).
            facts: lines of facts, in the order in which they are shown.
            end: what ends an answer where the chat template does not (`families.missing_end`).

        Returns:
            What is the same for every answer to `messages`, and the rest. Joined they are the whole text.

        Raises:
            ValueError: the chat template writes a conversation that goes on differently from its beginning.
        """
        block = "".join(f"\n{line}" for line in (self.lead, *facts) if line) if facts else ""
        if self.plain is not None:
            return self._plain(processor, messages, message_text(answer), block)
        ended = [*answer[:-1], {**answer[-1], "content": [*answer[-1]["content"], {"type": "text", "text": end}]}]
        turn = user_message(self.ask.replace("{facts}", block))
        whole = families.render(processor, [*messages, *(ended if end else answer), turn], self.opening)
        prompt, _ = families.render_answer(processor, messages, "!")
        if not whole.startswith(prompt):
            raise ValueError(
                f"the chat template of this {type(processor).__name__} writes an earlier turn otherwise than a last one, so the "
                f"rating turn cannot follow the answer ({prompt[-60:]!r} is not how it goes on). Use `prompt.plain`."
            )
        return prompt, whole[len(prompt) :]

    def _plain(
        self, processor: ProcessorMixin, messages: Sequence[Message], answer: str, facts: str
    ) -> tuple[str, str]:
        assert self.plain is not None
        text, question = "", ""
        for message in messages:
            words = message_text([message]).strip()
            if message["role"] == "assistant":
                text += self._filled(question, words, "") + "\n"
            elif message["role"] == "user":
                question = words
        before, after = self._filled(question, _MARK, facts).split(_MARK)
        begin = _begin(processor) + image_marks(processor, placeholder_count(messages)) + text
        start = before.rstrip(" ")
        return begin + start, before[len(start) :] + answer + after

    def _filled(self, question: str, answer: str, facts: str) -> str:
        assert self.plain is not None
        slots = {"facts": facts, "question": question, "answer": answer}
        return re.sub(r"\{(facts|question|answer)\}", lambda slot: slots[slot[1]], self.plain)


def shown_facts(facts: Sequence[str], *, identity: str, seed: int, epoch: int = 0, drop: float = 0.0) -> list[str]:
    """Facts as one use of a row shows them: in another order each time, or not at all.

    Args:
        facts: the row's lines.
        identity: id of the row. Order and drop depend on it, `seed` and `epoch` only, so a resumed run shows what an
            uninterrupted one shows.
        seed: seed of the run.
        epoch: number of the pass over the data.
        drop: share of uses without facts.
    """
    rng = random.Random(row_seed(seed, f"facts {epoch} {identity}"))
    if rng.random() < drop:
        return []
    shuffled = list(facts)
    rng.shuffle(shuffled)
    return shuffled


def image_marks(processor: ProcessorMixin, count: int) -> str:
    """How the chat template writes `count` pictures, without the turn around them."""
    if not count:
        return ""
    texts = []
    for pictures in (count, 0):
        messages = normalise_messages([user_message(_MARK, pictures)])
        texts.append(families.render(processor, messages).split(_MARK)[0])
    shown, bare = texts
    same = 0
    while same < min(len(shown), len(bare)) and shown[same] == bare[same]:
        same += 1
    tail = 0
    while tail < len(bare) - same and shown[-1 - tail] == bare[-1 - tail]:
        tail += 1
    return shown[same : len(shown) - tail]


def _begin(processor: ProcessorMixin) -> str:
    """The begin-of-sequence token, where the tokenizer would add it."""
    tokenizer = processor.tokenizer
    if tokenizer.bos_token is None or families.rewrites_prompt(processor):
        return ""
    return tokenizer.bos_token if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""

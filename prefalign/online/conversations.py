"""Conversations in a rollout: linked questions asked one after the other, every answer drawn, every question given.

Source:
    Dr-LLaVA, arXiv 2405.19567; released code `AlaaLab/Dr-LLaVA`, models/ppo_trainer.py: the questions are permuted for each
    sample, the picture stands in whichever comes first, and log-probs, KL and losses run over the answers' tokens alone.
Differs from the authors' code:
    Any number of questions; earlier answers are kept as the tokens that were drawn instead of being read and written again; every
    turn may be rewarded at its own end (`turn_rewards`), which with gamma 1 has the same return at the first turn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from prefalign import families
from prefalign.config import ConfigError
from prefalign.engines import Completion, Request
from prefalign.records import Message, assistant_message, normalise_messages, user_message
from prefalign.rewards import Combined, Response

if TYPE_CHECKING:
    from PIL import Image

_ANSWER = "PREFALIGNANSWER"


@dataclass
class Conversation:
    """What is asked.

    Attributes:
        messages: up to and including the first question.
        later: the questions after it.
        facts: what is known, the rules of the conversation in the order in which it is held.
    """

    messages: list[Message]
    later: list[str]
    facts: dict[str, Any]


def facts_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a row's pictures."""
    facts = row.get("facts") or {}
    return json.loads(facts) if isinstance(facts, str) else dict(facts)


def single(row: Mapping[str, Any]) -> Conversation:
    """The row's own question alone."""
    return Conversation(normalise_messages(row["messages"]), [], facts_of(row))


def linked(row: Mapping[str, Any], drawn_by: str, *, permute: bool, seed: int) -> Conversation:
    """All questions of `facts["rules"]["questions"]`, the first with the pictures.

    Args:
        row: a prompt whose question is one of them.
        drawn_by: with `seed`, what the order is drawn by.
        permute: draw an order; else that of the row.
        seed: of the run.

    Raises:
        ValueError: the row has no such questions, or `asked` does not name one variable for each.
    """
    facts = facts_of(row)
    rules = facts.get("rules") or {}
    questions, asked = list(rules.get("questions") or []), list(rules.get("asked") or [])
    if not questions or len(questions) != len(asked):
        raise ValueError(
            f"row {row['id']}: facts.rules has {len(questions)} `questions` and {len(asked)} names in `asked`, and a "
            "conversation needs one name for each question. Use rows of linked questions (`prefalign.scenes.linked` "
            "shows their form), or set trainer.conversations to false."
        )
    order = list(range(len(questions)))
    if permute:
        random.Random(f"{seed} {drawn_by}").shuffle(order)
    messages = normalise_messages(row["messages"])
    pictures = [block for block in messages[-1]["content"] if block["type"] == "image"]
    first = {"role": "user", "content": [*pictures, {"type": "text", "text": questions[order[0]]}]}
    rules = {**rules, "questions": [questions[n] for n in order], "asked": [asked[n] for n in order]}
    return Conversation([*messages[:-1], first], rules["questions"][1:], {**facts, "rules": rules})


@dataclass
class Course:
    """A conversation that is being held.

    Attributes:
        identity: of the answer.
        plan: what is asked.
        pictures: decoded.
        number: of the answer in its rollout.
        tokens: ids after the prompt: answers as they were drawn and the questions between them.
        drawn: of each, whether the policy drew it.
        turn: of each, the answer that it belongs to, or that a question leads to.
        texts: the answers.
        finished: all answers ended by themselves.
        failed: why it could not go on.
    """

    identity: str
    plan: Conversation
    pictures: list[Image.Image]
    number: int = 0
    tokens: list[int] = field(default_factory=list)
    drawn: list[bool] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    finished: bool = True
    failed: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether an answer is still to be drawn."""
        return self.failed is None and len(self.texts) <= len(self.plan.later)

    @property
    def messages(self) -> list[Message]:
        """The conversation up to the last question."""
        said = [*self.plan.messages]
        for text, question in zip(self.texts, self.plan.later, strict=False):
            said += [assistant_message(text), user_message(question)]
        return said

    def request(self, seed: int) -> Request:
        """Ask for the next answer."""
        number = f"/{len(self.texts)}" if self.texts else ""
        return Request(self.identity + number, self.plan.messages, self.pictures, seed=seed, given=list(self.tokens))

    def take(self, completion: Completion, processor: Any) -> None:
        """Take an answer, and put the next question after it."""
        if completion.error is not None:
            self.failed, self.finished = completion.error, False
            return
        ended = completion.end_token is not None
        number = len(self.texts)
        self._add(
            [*completion.token_ids, *([completion.end_token] if completion.end_token is not None else [])], number, True
        )
        self.texts.append(completion.text)
        self.finished = self.finished and ended
        if number < len(self.plan.later):
            between = bridge(processor, self.plan.messages, self.plan.later[number], ended=ended)
            self._add(between, number + 1, False)

    def _add(self, tokens: list[int], turn: int, drawn: bool) -> None:
        self.tokens += tokens
        self.drawn += [drawn] * len(tokens)
        self.turn += [turn] * len(tokens)


def bridge(processor: Any, messages: list[Message], question: str, *, ended: bool) -> list[int]:
    """Tokens from the end of an answer to the start of the next one, as the chat template writes them.

    Args:
        processor: the model's.
        messages: a conversation that ends with a question, for the template.
        question: the next one.
        ended: the answer ended by itself, so the mark that closes a turn is there already.

    Raises:
        ConfigError: the template holds no conversations.
    """
    text = families.render(processor, [*messages, assistant_message(_ANSWER), user_message(question)])
    _, found, after = text.rpartition(_ANSWER)
    if not found or families.rewrites_prompt(processor):
        raise ConfigError(
            f"the chat template of the {type(processor).__name__} holds one question and one answer only. Set "
            "trainer.conversations to false, or use a model that is made for conversations."
        )
    tokens = list(processor.tokenizer(after, add_special_tokens=False).input_ids)
    end = families.turn_end_id(processor)
    opening = tokens.index(end) + 1 if end in tokens[:3] else 0
    return tokens[opening:] if ended else tokens


def turn_rewards(rewards: Combined, responses: list[Response]) -> list[torch.Tensor]:
    """What each turn of each conversation earns by itself, (turns,) each, of the rewards that say it by turn.

    What other rewards say of a whole conversation is not in it, and neither is a term that is missing.
    """
    found = [torch.zeros(sum(m["role"] == "assistant" for m in one.messages) + 1) for one in responses]
    for entry in rewards.entries:
        by_turn = getattr(entry.reward, "turn_scores", None)
        for number, terms in enumerate(by_turn(responses) if by_turn is not None else []):
            for term, values in terms.items():
                if entry.weight_of(term) and not bool(values.isnan().any()):
                    found[number] = found[number] + entry.weight_of(term) * values
    return found


def spread_turns(earned: torch.Tensor, total: float, turn: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """A reward for each token: every turn's at its last drawn token, and what is left of the total at the last of all.

    Args:
        earned: (turns,).
        total: what all tokens together get.
        turn: (T,) number of the turn.
        drawn: (T,) bool.

    Returns:
        (T,) float32.
    """
    placed = torch.zeros(len(turn))
    if not bool(drawn.any()):
        return placed
    last = int(drawn.nonzero()[-1])
    for number, value in enumerate(earned.tolist()):
        own = (drawn & (turn == number)).nonzero()
        if len(own):
            placed[int(own[-1])] += value
    placed[last] += total - float(placed.sum())
    return placed

"""Where a row stops: at a sentence end that is certain, or where the model's context is full."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from prefalign.engines import Request, Usage
from prefalign.text import first_sentence

if TYPE_CHECKING:
    from prefalign.engines.sharing import Stem
    from prefalign.engines.transformers import TransformersEngine

CONTEXT_TAIL = 8
"""Prompt tokens that are decoded with an answer, so that blanks and split characters at the join come out right."""

SENTENCE_MARKS = frozenset(".!?\n\u3002\uff01\uff1f")


@dataclass
class Row:
    """A request that is on its way: its text and the token ids that follow it, the first `given` of which are prompt too."""

    index: int
    request: Request
    prompt: str
    tail: list[int]
    given: int = 0


@dataclass
class Batch:
    """Rows that run together, what the model is given, their lengths without padding, and how many image tokens each has.

    With `stems` the tensors are those of the stems, from whose prefill the rows go on (`sharing.py`).
    """

    rows: list[Row] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    stems: list[Stem] = field(default_factory=list)

    def tails(self) -> list[list[int]]:
        """The last `CONTEXT_TAIL` token ids of each row's prompt."""
        if self.stems:
            return [tail for stem in self.stems for tail in stem.tails()]
        return self.tensors["input_ids"][:, -CONTEXT_TAIL:].tolist()

    def count(self, usage: Usage, *, drawn: int | None = None) -> None:
        """Add the batch to `usage`: `drawn` tokens were generated; None: the answers in the rows' tails were scored."""
        answers = 0 if drawn is not None else sum(len(row.tail) - row.given for row in self.rows)
        usage.requests += len(self.rows)
        usage.prompt_tokens += sum(self.lengths) - answers
        usage.image_tokens += sum(self.image_tokens)
        usage.new_tokens += answers if drawn is None else drawn


class RowStop(StoppingCriteria):
    """Stop a row at a certain sentence end, or where the context is full. `stopped` has the number of its new tokens."""

    def __init__(self, engine: TransformersEngine, batch: Batch, width: int):
        self.engine = engine
        self.width = width
        self.rows = batch.rows
        self.lengths = batch.lengths
        self.tails = batch.tails()
        self.stopped: dict[int, int] = {}
        self.sentences = [index for index, row in enumerate(batch.rows) if row.request.stop_at_sentence]
        self.marks = engine.sentence_tokens() if self.sentences else None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids.shape[1] - self.width
        context = self.engine.context
        if context is not None and max(self.lengths) + new >= context:
            for index, length in enumerate(self.lengths):
                if length + new >= context:
                    self.stopped.setdefault(index, new)
        if self.sentences and self.marks is not None:
            recent = input_ids[:, max(self.width, input_ids.shape[1] - 3) :].cpu()
            for index in self.sentences:
                if (
                    index not in self.stopped
                    and self.marks[recent[index]].any()
                    and self._ended(index, input_ids[index])
                ):
                    self.stopped[index] = new
        done = torch.zeros(len(self.rows), dtype=torch.bool, device=input_ids.device)
        if self.stopped:
            done[list(self.stopped)] = True
        return done

    def _ended(self, index: int, ids: torch.Tensor) -> bool:
        tail, new = self.tails[index], ids[self.width :].tolist()
        if any(token in self.engine.ends for token in new):
            return False
        request = self.rows[index].request
        return certain_sentence(request.prefix, self.engine.new_text(request, tail, new)) is not None


def certain_sentence(prefix: str, text: str) -> str | None:
    """The part of `text` up to the first sentence end after the prefix, once something follows that end; else None."""
    joined, start = prefix + text, 0
    while start < len(joined):
        end = start + len(first_sentence(joined[start:]))
        if end >= len(joined):
            return None
        if end > len(prefix.rstrip()):
            return joined[len(prefix) : end]
        start = end
    return None

"""Online DPO step by step: every batch samples from the policy as it is, annotates, and trains on that. For small models.

Source: Amirloo et al., arXiv 2407.02477, sections 3.2 (online), 3.3 (mixed) and 3.4 (online BDHS). The loss is that of
`PreferenceTrainer`, unchanged; the batch it is called on is made anew in every step. Generation inside a step leaves a GPU idle
most of the time: for more than small models take rounds (`rounds.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from prefalign import families
from prefalign.engines import Request, Sampling
from prefalign.engines.transformers import TransformersEngine
from prefalign.guided import BiasConfig, Item, corrupted_answers, rejection
from prefalign.images import open_image
from prefalign.online.annotating import Annotator, as_response
from prefalign.online.sampling import Draw, near_identical, response, usable
from prefalign.records import Prompt, assistant_message, normalise_messages, row_seed
from prefalign.training.pairs import COLUMNS
from prefalign.training.preference import PreferenceTrainer

if TYPE_CHECKING:
    from prefalign.text import Similarity

ROW_COLUMNS = (*COLUMNS, "answer", "facts")
"""What a run step by step reads of its rows."""

DROPPED = "online/dropped_"
"""Start of the names of the shares of rows that gave no pair."""


@dataclass
class OnTheFly:
    """How a prompt becomes a pair in a step.

    Attributes:
        annotator: says which answer is better; None with `bdhs`.
        sampling: how answers are drawn.
        responses: answers to each prompt.
        p_offline: probability that a row with an offline pair takes it.
        seed: with the step and a row's id it decides every draw.
        bdhs: chosen is the row's reference answer, rejected what the policy says with its eyes nearly closed.
        similarity: what compares answers for `bdhs`.
        batch_size: rows of one forward pass of the engine.
    """

    annotator: Annotator | None
    sampling: Sampling
    responses: int = 2
    p_offline: float = 0.0
    seed: int = 0
    bdhs: BiasConfig | None = None
    similarity: Similarity | None = None
    batch_size: int = 16


class OnlineStepTrainer(PreferenceTrainer):
    """`PreferenceTrainer` whose batches are prompts; their pairs are made by the policy in the step that trains on them.

    A row that gives no usable pair takes no part, and the others weigh what they would have weighed beside it: the loss is the
    sum over pairs divided by the rows of the batch. Where no row gives one, the step's gradient is zero.

    An answer trains on the very tokens that were drawn: a row whose text the tokenizer cuts otherwise is dropped (`retokenised`).

    Logged: `online/share` (of rows that took the policy's answers), `online/pairs` (usable pairs per row), `online/gap`,
    `online/length_gap` (characters of chosen less rejected) and `online/dropped_<reason>` (per row, so
    that with `online/pairs` they add up to 1).

    Args:
        *args: passed on.
        fly: how pairs are made.
        **kwargs: passed on; rows of `train_dataset` have the columns of pairs, `answer` and `facts`. `chosen` and `rejected` are
            the row's offline pair, or empty. `reference` is `online`.
    """

    def __init__(self, *args: Any, fly: OnTheFly, **kwargs: Any):
        self.fly = fly
        super().__init__(*args, **kwargs)
        self.pairs_collator = self.data_collator
        self.data_collator = _as_they_are  # type: ignore[assignment]
        self.engine = TransformersEngine(self.model, self.pairs_collator.processor, batch_size=fly.batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(ROW_COLUMNS)

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """Prompts to a batch of pairs; a batch that is one already (held-out pairs) is left as it is."""
        if not isinstance(inputs, list):
            return super()._prepare_inputs(inputs)
        pairs = self.make_pairs(inputs)
        batch = self._collated(pairs)
        self._log_pairs(inputs, pairs)
        kept = [pair for pair in pairs if pair.reason is None]
        if not kept:
            return {"no_pairs": True}
        return super()._prepare_inputs({**batch, "weight": len(kept) / len(inputs)})

    def _collated(self, pairs: list[_Made]) -> dict[str, Any]:
        """The batch of all pairs whose answers are the tokens that were drawn; the others are marked `retokenised`."""
        while kept := [pair for pair in pairs if pair.reason is None]:
            batch = self.pairs_collator([pair.row for pair in kept])
            for number, pair in enumerate(kept):
                for side, drawn in pair.tokens.items():
                    trained = batch["answers"][side]["ids"][number, : len(drawn)].tolist()
                    if trained != drawn:
                        pair.reason = "retokenised"
            if all(pair.reason is None for pair in kept):
                return batch
        return {}

    def make_pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[_Made]:
        """For each row its offline pair, a pair of the policy's answers, or why there is none."""
        step = self.state.global_step
        draw = Draw(frozenset(row["id"] for row in rows if row["chosen"]), self.fly.p_offline, self.fly.seed, step)
        made = [_Made({**row, "online": not draw.takes_offline(row["id"])}) for row in rows]
        online = [pair for pair in made if pair.row["online"]]
        if online and self.fly.bdhs is not None:
            self._by_hiding(online, self.fly.bdhs, seed=row_seed(self.fly.seed, f"step {step}"))
        elif online:
            self._by_annotating(online, seed=row_seed(self.fly.seed, f"step {step}"))
        return made

    def _by_hiding(self, pairs: list[_Made], bias: BiasConfig, *, seed: int) -> None:
        """Online BDHS: the reference answer against what the policy makes of it with most image tokens hidden."""
        assert self.fly.similarity is not None
        items = [
            Item(pair.row["id"], normalise_messages(pair.row["prompt"]), _pictures(pair.row), pair.row["answer"] or "")
            for pair in pairs
        ]
        for pair, item in zip(pairs, items, strict=True):
            if not item.answer.strip():
                pair.reason = "no_reference"
        asked = [(pair, item) for pair, item in zip(pairs, items, strict=True) if pair.reason is None]
        answers = corrupted_answers(
            self.engine, [item for _, item in asked], bias, self.fly.sampling, self.fly.similarity, seed=seed
        )
        for (pair, item), answer in zip(asked, answers, strict=True):
            pair.reason = rejection(item, answer)
            pair.answer(item.answer, answer.text)

    def _by_annotating(self, pairs: list[_Made], *, seed: int) -> None:
        """Answers of the policy as it is, the better one chosen by the annotator."""
        assert self.fly.annotator is not None
        number = self.fly.responses
        requests = [
            Request(f"{pair.row['id']}/{place}", normalise_messages(pair.row["prompt"]), pictures, seed=seed)
            for pair in pairs
            for pictures in [_pictures(pair.row)]
            for place in range(number)
        ]
        answers = self.engine.generate(requests, self.fly.sampling)
        entries = [response(answer, 0.0, self.fly.sampling, "") for answer in answers]
        groups = []
        for place, pair in enumerate(pairs):
            left, pair.reason = usable(entries[place * number : (place + 1) * number])
            if pair.reason is None:
                groups.append((pair, _prompt(pair.row), left))
        found = self.fly.annotator.prefer(
            [[as_response(prompt, entry) for entry in left] for _, prompt, left in groups]
        )
        end = families.turn_end_id(self.pairs_collator.processor)
        for (pair, _, left), preference in zip(groups, found, strict=True):
            if preference.chosen is None or preference.rejected is None:
                pair.reason = preference.reason
                continue
            chosen, rejected = left[preference.chosen], left[preference.rejected]
            pair.answer(chosen["text"], rejected["text"])
            pair.gap = preference.gap
            pair.tokens = {"chosen": [*chosen["token_ids"], end], "rejected": [*rejected["token_ids"], end]}
            if near_identical(chosen["text"], rejected["text"]):
                pair.reason = "near_identical"

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if "no_pairs" not in inputs:
            return super()._compute_loss(model, inputs, return_outputs)
        nothing = sum(
            (parameter.sum() * 0 for parameter in model.parameters() if parameter.requires_grad), torch.zeros(())
        )
        return (nothing, {}) if return_outputs else nothing

    def _log_pairs(self, rows: Sequence[Any], pairs: Sequence[_Made]) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        online = [pair for pair in pairs if pair.row["online"]]
        usable_pairs = [pair for pair in online if pair.reason is None]
        metrics["online/share"].append(len(online) / len(rows))
        steps = len(metrics["online/share"])
        metrics["online/pairs"].append(len([pair for pair in pairs if pair.reason is None]) / len(rows))
        gaps = [pair.gap for pair in usable_pairs if pair.gap is not None]
        if gaps:
            metrics["online/gap"].append(sum(gaps) / len(gaps))
        if usable_pairs:
            metrics["online/length_gap"].append(sum(pair.longer for pair in usable_pairs) / len(usable_pairs))
        counts = Counter(f"{DROPPED}{pair.reason}" for pair in pairs if pair.reason is not None)
        for name in {*counts, *(name for name in metrics if name.startswith(DROPPED))}:
            shares = metrics[name]
            shares += [0.0] * (steps - 1 - len(shares))  # the steps since the last log in which none was dropped for it
            shares.append(counts[name] / len(rows))


@dataclass
class _Made:
    """A row on its way to a pair.

    `reason` says why it gives none; `tokens` are those that were drawn, by side, end of turn included (none: a text of another
    origin); `longer` is by how many characters chosen is longer.
    """

    row: dict[str, Any]
    reason: str | None = None
    tokens: dict[str, list[int]] = field(default_factory=dict)
    gap: float | None = None
    longer: int = 0

    def answer(self, chosen: str, rejected: str) -> None:
        """Take these as the two answers."""
        self.row = {**self.row, "chosen": [assistant_message(chosen)], "rejected": [assistant_message(rejected)]}
        self.longer = len(chosen) - len(rejected)


def _as_they_are(rows: list[Any]) -> list[Any]:
    return rows


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    return [open_image(picture) for picture in row["images"]]


def _prompt(row: Mapping[str, Any]) -> Prompt:
    facts = json.loads(row["facts"]) if row["facts"] else {}
    return Prompt(row["id"], row["images"], normalise_messages(row["prompt"]), row["answer"], facts)

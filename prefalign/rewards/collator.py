"""Rows of pairs, or single responses, to batches for a reward model: prompt and pictures once, every answer with its rating turn.

The rating turns are branches of the documents that preference training runs (`prefalign.training.layout`). Only the last position
of a branch is kept; a layout leaves out a branch's last token, so each branch is given one more that nothing reads.

Legend of shapes: `B` rows, `V` views, `M` = V x B answers in the order of the views, `N` distinct branches, `A` attributes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from prefalign.config import ConfigError
from prefalign.records import Message, message_text, normalise_messages
from prefalign.rewards.augmentation import RatingPrompt, shown_facts
from prefalign.rewards.rows import as_mapping, directions, scores_of
from prefalign.training.collator import PreferenceCollator
from prefalign.training.documents import Documents, Reader, name, stack_vision


class UnreadableAnswer(ValueError):
    """An answer, its facts or its conversation that no score can be read at: nothing at all, or a picture's mark in words."""


@dataclass
class RatingReader(Reader):
    """Prepare rows of which every answer is followed by its rating turn.

    Attributes:
        rating: how a conversation becomes the text that is scored.
        facts: show the rows' facts.
        drop: share of rows whose facts are left out, another draw in each epoch.
        epoch: number of the pass over the data.
        image_token_id: id of a piece of a picture, which no answer may hold.
    """

    rating: RatingPrompt = field(default_factory=RatingPrompt)
    facts: bool = True
    drop: float = 0.0
    epoch: int = 0
    image_token_id: int | None = None

    def _texts(self, row: Mapping[str, Any], messages: list[Message]) -> tuple[str, str, str]:
        lines: list[str] = []
        if self.facts and self.rating.shows_facts and not self._two_pictures(row):
            stored = self.rating.facts_of({**row, "facts": as_mapping(row.get("facts"))})
            lines = shown_facts(stored, identity=str(row.get("id")), seed=self.seed, epoch=self.epoch, drop=self.drop)
        self._check_marks(row, message_text(messages))
        texts = []
        for side in ("chosen", "rejected"):
            answer = normalise_messages(row.get(side) or row["chosen"])
            prompt, text = self.rating.split(self.processor, messages, answer, lines, end=self.end)
            self._check(row, text)
            texts.append((prompt, text))
        (prompt, chosen), (_, rejected) = texts
        return prompt, chosen, rejected

    def _two_pictures(self, row: Mapping[str, Any]) -> bool:
        """Whether the sides show different pictures: facts are known of one only, and shown there alone would give it away."""
        return "rejected_on_rejected_image" in self.views and row["rejected_images"] != row["images"]

    def _check(self, row: Mapping[str, Any], text: str) -> None:
        if not text:
            raise UnreadableAnswer(
                f"row {name(row)}: the answer is empty, and `prompt.plain` ends with it, so there is nothing to read a score at."
            )
        self._check_marks(row, text)

    def _check_marks(self, row: Mapping[str, Any], text: str) -> None:
        piece = self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id) if self.image_token_id else None
        for mark in (piece, getattr(self.processor, "boi_token", None)):
            if mark and mark in text:
                raise UnreadableAnswer(
                    f"row {name(row)}: an answer, its facts or an earlier turn hold {mark!r}, which stands for a picture that is "
                    "not there. Take the row out, or the mark out of its text."
                )

    def _answer(self, text: str) -> torch.Tensor:
        tokens = super()._answer(text)
        return torch.cat([tokens, tokens[-1:]])


@dataclass
class RewardCollator(PreferenceCollator):
    """Collate rows with the columns of `rows.COLUMNS`; `PreferenceCollator` says what `layout` and `image_token_id` are.

    Attributes:
        rating: how a conversation becomes the text that is scored.
        facts: show the rows' facts.
        drop_facts: share of rows whose facts are left out.
        epoch: number of the pass over the data; the order of facts and the rows that lose them follow from it.
        attributes: names of the scores, in order.
        rejected_pictures: show the rejected answer on the row's `rejected_images`, where it has them.
        targets: add the graders' scores of both sides (regression).
        encoded: digests of pictures (`Document.pictures`) whose features the caller has: a batch of these alone names them in
            `packed["pictures"]`, in the order of its documents, and holds no pixels.
    """

    rating: RatingPrompt = field(default_factory=RatingPrompt)
    facts: bool = True
    drop_facts: float = 0.0
    epoch: int = 0
    attributes: Sequence[str] = ("reward",)
    rejected_pictures: bool = False
    targets: bool = False
    encoded: Collection[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.drop_facts <= 1:
            raise ConfigError(
                f"drop_facts is {self.drop_facts}; it is a share of the rows, from 0 to 1 (0.15 is usual)."
            )

    @property
    def reader(self) -> RatingReader:
        """What prepares the rows."""
        views = ["chosen", "rejected_on_rejected_image"] if self.rejected_pictures else list(self.views)
        return RatingReader(
            self.processor,
            views,
            self._end,
            seed=self.seed,
            rating=self.rating,
            facts=self.facts,
            drop=self.drop_facts,
            epoch=self.epoch,
            image_token_id=self.image_token_id,
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build a batch of pairs.

        Returns:
            `direction` (B, A) of `rows.directions`, `margin` (B,) of the rows (0 where they have none), with `targets` also
            `targets` (2, B, A); and what `RewardModel.forward` takes: `packed` or `plain`, and `places` (M,).

        Raises:
            UnreadableAnswer: an answer is nothing where the text ends with it, or words hold the mark of a picture.
            ValueError: placeholders and pictures of a side disagree, or a row lacks scores.
        """
        batch: dict[str, Any] = {
            "direction": torch.tensor([directions(row, self.attributes) for row in rows]),
            "margin": torch.tensor([float(row.get("margin") or 0.0) for row in rows]),
        }
        if self.targets:
            scores = torch.tensor([scores_of(row, self.attributes) for row in rows])
            batch["targets"] = scores.permute(2, 0, 1).contiguous()
        return batch | self.answers(rows)

    def answers(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The model's inputs for the answers of some rows: both sides, or with `views` of `chosen` alone that one."""
        read = self._read(rows)
        places = [place for view in read.places.values() for place in view]
        padding = self._padding()
        if self.layout == "plain":
            views = list(read.places)
            plain = replace(self, views=views)._plain(read, padding)
            last = plain["attention_mask"].sum(dim=1) - 2
            del plain["completion_mask"]
            shown = [read.documents[number].vision for view in views for number, _ in read.places[view]]
            return {"plain": plain | stack_vision(shown), "places": last}
        packed, _ = replace(self, views=())._packed(read, padding)
        pictures = [document.pictures for document in read.documents if document.vision]
        if pictures and all(digest in self.encoded for digest in pictures):
            packed |= {"vision": {}, "pictures": pictures}
        layout = packed["layout"]
        ends = torch.tensor([len(answer) for document in read.documents for answer in document.answers]).cumsum(0) - 1
        packed["layout"] = replace(layout, label_rows=layout.label_rows[ends], labels=layout.labels[ends])
        firsts = [0]
        for document in read.documents:
            firsts.append(firsts[-1] + len(document.answers))
        return {"packed": packed, "places": torch.tensor([firsts[number] + branch for number, branch in places])}

    def is_readable(self, row: Mapping[str, Any]) -> bool:
        """Whether a score can be read at a row's answers; `UnreadableAnswer` says when not. Pictures are not looked at."""
        try:
            self.reader._texts(row, normalise_messages(row["prompt"]))
        except UnreadableAnswer:
            return False
        return True

    def longest(self, row: Mapping[str, Any]) -> int:
        """Tokens of a row's longer side, pictures, facts and rating turn included."""
        read = replace(self, drop_facts=0.0)._read([row])
        return max(len(document.prompt) + len(answer) - 1 for document in read.documents for answer in document.answers)

    def _read(self, rows: Sequence[Mapping[str, Any]]) -> Documents:
        if self.rejected_pictures:
            rows = [{**row, "rejected_images": row.get("rejected_images") or row["images"]} for row in rows]
        return self.reader.read(rows)

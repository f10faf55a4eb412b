"""Rows of pairs to batches: every view of every row, for the shared path or for the plain one. Image tokens are never cut.

Legend of shapes: `B` rows, `V` views, `L` tokens of the longest row of the plain layout, `A` of the longest answer of a side,
`N` labels of all branches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from prefalign.families import missing_end, rewrites_prompt
from prefalign.losses import VIEWS
from prefalign.negatives import Negative
from prefalign.training.documents import Document, Documents, Reader, name, stack_vision
from prefalign.training.layout import fill, lay_out
from prefalign.training.reference import ReferenceCache, row_key

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass
class Lengths:
    """Tokens of one row.

    Attributes:
        prompt: prompt with its image tokens, the longest of its picture sides.
        total: that prompt and the longer answer, end of turn included.
        alike: tokens at the start of the answers that are the same in all of them; 0 where they are one text.
    """

    prompt: int
    total: int
    alike: int


@dataclass
class PreferenceCollator:
    """Collate rows with `images`, `rejected_images`, `prompt`, `chosen`, `rejected` for the views of some loss terms.

    In the plain layout with the views `chosen` and `rejected`, its batch is that of TRL's `DataCollatorForVisionPreference`. Rows
    are read, never edited. Pictures are encoded (`{"bytes", "path"}`) or `PIL.Image`.

    Attributes:
        processor: the model's processor.
        views: names of `VIEWS`; the first two are what TRL's own losses and metrics compare.
        max_length: longest sequence; only answers are cut to it, all views of a row alike. None cuts nothing.
        negative: how `rejected_images` are made for rows that have none, decided by `seed` and the row's id: the same at every
            visit, for policy and reference, and the same that the stage `image_contrast` stores with these settings.
        seed: seed of the negatives.
        layout: `plain` repeats prompt and pictures for every view, as TRL does; `split` runs each document once, all in one
            row; `mask` runs each document once, in a row of its own.
        image_token_id: id of a piece of a picture; needed by the shared layouts.
        dummy: vision inputs of some picture, added to batches that hold none, so that every process runs the vision tower.
        cache: reference log-probs computed before, added to every batch.
        tokens_per_pass: split a batch into parts that take at most this many tokens each (`PreferenceTrainer`).
    """

    processor: ProcessorMixin
    views: Sequence[str] = ("chosen", "rejected")
    max_length: int | None = None
    negative: Negative | None = None
    seed: int = 0
    layout: Literal["plain", "split", "mask"] = "plain"
    image_token_id: int | None = None
    dummy: Mapping[str, torch.Tensor] | None = None
    cache: ReferenceCache | None = None
    tokens_per_pass: int | None = None

    @cached_property
    def _end(self) -> str:
        return missing_end(self.processor)

    @property
    def reader(self) -> Reader:
        """What prepares the rows."""
        return Reader(self.processor, self.views, self._end, self.negative, self.seed)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build a batch.

        Returns:
            `input_ids`, `attention_mask`, `completion_mask` (2B, L): TRL's layout of the first two views;
            `answers`: per side `ids` (B, A) and `mask` (B, A) bool;
            `index`: per view the positions of its rows' labels among all N, in row order;
            `plain`: model inputs of all V x B rows and their `completion_mask`, or `packed`: see `forward.share`;
            `dummy`: vision inputs, only where no row holds a picture;
            `reference`: per view (B, A) cached reference log-probs, with a `cache`;
            `ids`: the rows' ids.
            With `tokens_per_pass` only the first three, and `parts`: such batches with their `rows` by number and their `weight`.

        Raises:
            ValueError: placeholders and pictures of a side disagree, or a prompt leaves no room (`PromptTooLong`).
        """
        read = self.reader.read(rows, self.max_length)
        if self.tokens_per_pass is None:
            return self._batch(rows, read)
        groups = read.passes(self.tokens_per_pass, self.layout)
        parts = [self._batch([rows[row] for row in group], read.part(group)) for group in groups]
        for part, group in zip(parts, groups, strict=True):
            part |= {"rows": group, "weight": len(group) / len(rows)}
        return {**self._two(self._plain(read, self._padding()), len(rows)), "parts": parts}

    def collate(self, read: Documents, ids: Sequence[str]) -> dict[str, Any]:
        """A batch of documents that were made or read before: a rollout's prompts with the answers drawn to them.

        Args:
            read: documents and the places of each row's views.
            ids: the rows' ids.
        """
        return self._batch([{"id": identity} for identity in ids], read)

    def _two(self, plain: Mapping[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
        """TRL's layout of the first two views, of the tokens of all."""
        views = list(self.views)
        places = [view * rows + row for view in (0, min(1, len(views) - 1)) for row in range(rows)]
        two = {key: plain[key][places] for key in ("input_ids", "attention_mask", "completion_mask")}
        columns = int(two["attention_mask"].sum(dim=1).max())
        return {key: value[:, :columns] for key, value in two.items()}

    def _batch(self, rows: Sequence[Mapping[str, Any]], read: Documents) -> dict[str, Any]:
        padding = self._padding()
        plain = self._plain(read, padding)
        batch: dict[str, Any] = dict(self._two(plain, len(rows)))
        batch["ids"] = [row.get("id") for row in rows]
        batch["answers"] = self._answers(read, padding)
        if self.layout == "plain":
            shown = [read.documents[number].vision for view in self.views for number, _ in read.places[view]]
            batch["plain"] = plain | stack_vision(shown)
            labels = int(plain["completion_mask"].sum())
            lengths = [int(batch["answers"][VIEWS[view].answer]["mask"].sum()) for view in self.views]
            batch["index"] = dict(zip(self.views, torch.arange(labels).split(lengths), strict=True))
        else:
            batch["packed"], batch["index"] = self._packed(read, padding)
        if self.dummy is not None and not any(document.vision for document in read.documents):
            batch["dummy"] = dict(self.dummy)
        if self.cache is not None:
            batch["reference"] = self._cached(rows, batch["answers"])
        return batch

    def lengths(self, row: Mapping[str, Any]) -> Lengths:
        """Tokens that one row needs."""
        documents = self.reader.read([row]).documents
        prompt = max(len(document.prompt) for document in documents)
        answers = [answer.tolist() for document in documents for answer in document.answers]
        differs = (len(set(tokens)) > 1 for tokens in zip_longest(*answers))
        alike = next((place for place, differ in enumerate(differs) if differ), 0)
        return Lengths(prompt, prompt + max(map(len, answers)), alike)

    def _padding(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def _plain(self, read: Documents, padding: int) -> dict[str, torch.Tensor]:
        """Tokens of every view of every row, prompt and answer, padded at the right."""
        rows = [
            (read.documents[number], read.documents[number].answers[branch])
            for view in self.views
            for number, branch in read.places[view]
        ]
        ones = [torch.ones(len(document.prompt) + len(answer), dtype=torch.long) for document, answer in rows]
        inputs = {
            "input_ids": _padded([torch.cat([document.prompt, answer]) for document, answer in rows], padding),
            "attention_mask": _padded(ones, 0),
            "completion_mask": _padded(
                [torch.cat([torch.zeros_like(document.prompt), torch.ones_like(answer)]) for document, answer in rows],
                0,
            ),
        }
        for key in rows[0][0].types:
            whole = [torch.cat([document.types[key], self._types(key, answer)]) for document, answer in rows]
            inputs[key] = _padded(whole, 0)
        return inputs

    def _types(self, key: str, answer: torch.Tensor) -> torch.Tensor:
        """Type ids over an answer: PaliGemma's 0 is the prompt, read in both directions; elsewhere 0 is text."""
        suffix = key == "token_type_ids" and rewrites_prompt(self.processor)
        return torch.full_like(answer, int(suffix))

    def _answers(self, read: Documents, padding: int) -> dict[str, dict[str, torch.Tensor]]:
        sides: dict[str, dict[str, torch.Tensor]] = {}
        for view in self.views:
            answers = [read.documents[number].answers[branch] for number, branch in read.places[view]]
            sides.setdefault(
                VIEWS[view].answer,
                {"ids": _padded(answers, padding), "mask": _padded([torch.ones_like(a) for a in answers], 0).bool()},
            )
        return sides

    def _packed(self, read: Documents, padding: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        documents = read.documents
        prompts, answers = [d.prompt for d in documents], [d.answers for d in documents]
        layout = lay_out(prompts, answers, one_row=self.layout == "split")
        tokens = {"input_ids": fill(layout, prompts, answers, padding=padding)}
        for key in documents[0].types:
            branches = [[self._types(key, answer) for answer in d.answers] for d in documents]
            # past the end, a number that stands for no picture and no prompt
            tokens[key] = fill(layout, [d.types[key] for d in documents], branches, padding=-1)
        vision, ranges = self._vision(documents)
        starts: list[list[tuple[int, int]]] = []
        at = 0
        for document in documents:
            starts.append([])
            for answer in document.answers:
                starts[-1].append((at, at + len(answer)))
                at += len(answer)
        index = {
            view: torch.cat([torch.arange(*starts[number][branch]) for number, branch in read.places[view]])
            for view in self.views
        }
        packed = {"tokens": tokens, "layout": layout, "vision": vision, "ranges": ranges}
        if any(key.endswith("grid_thw") for key in vision):
            packed["prompts"] = self._prompts(documents, padding)
        return packed, index

    def _vision(self, documents: Sequence[Document]) -> tuple[dict[str, torch.Tensor], list[tuple[int, int]] | None]:
        """Vision inputs of each distinct list of pictures, and where each document finds its image tokens among them."""
        known: dict[str, tuple[int, int]] = {}
        parts, ranges, at = [], [], 0
        for document in documents:
            if not document.vision:
                continue
            if document.pictures not in known:
                assert self.image_token_id is not None
                pieces = int((document.prompt == self.image_token_id).sum())
                known[document.pictures] = (at, pieces)
                parts.append(document.vision)
                at += pieces
            ranges.append(known[document.pictures])
        return stack_vision(parts), None if len(known) == len(ranges) else ranges

    def _prompts(self, documents: Sequence[Document], padding: int) -> dict[str, torch.Tensor]:
        """The prompts as a batch, from which families with rotary positions in three dimensions work those out."""
        prompts = {
            "input_ids": _padded([d.prompt for d in documents], padding),
            "attention_mask": _padded([torch.ones_like(d.prompt) for d in documents], 0),
        }
        for key in documents[0].types:
            prompts[key] = _padded([d.types[key] for d in documents], 0)
        grids = [{key: value for key, value in d.vision.items() if key.endswith("grid_thw")} for d in documents]
        return prompts | stack_vision(grids)

    def _cached(self, rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        assert self.cache is not None
        keys = [row_key(row) for row in rows]
        unknown = [name(row) for row, key in zip(rows, keys, strict=True) if key not in self.cache]
        if unknown:
            raise KeyError(
                f"no reference log-probs are cached for {len(unknown)} rows ({', '.join(unknown[:3])}); the rows "
                "changed after the cache was filled. Fill it with the rows of the run (`cache_reference`), or set "
                "reference to 'online'."
            )
        entries = [self.cache[key] for key in keys]
        reference = {view: _padded([entry[view] for entry in entries], 0.0) for view in self.views}
        for view in reference:
            wanted = answers[VIEWS[view].answer]["mask"].sum(dim=1).tolist()
            have = [len(entry[view]) for entry in entries]
            if have != wanted:
                raise ValueError(
                    f"the cached reference log-probs of view {view!r} have {have} tokens and the answers {wanted}: "
                    f"they were made with another tokenizer, template or cut. Delete {self.cache.folder} and start again."
                )
        return reference


def _padded(values: Sequence[torch.Tensor], padding: float) -> torch.Tensor:
    return pad_sequence(list(values), batch_first=True, padding_value=padding)


def blank_vision(processor: ProcessorMixin) -> dict[str, torch.Tensor]:
    """Vision inputs of one small grey picture, for `PreferenceCollator.dummy`."""
    from PIL import Image

    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "."}]}]
    row = {"id": "dummy", "images": [Image.new("RGB", (64, 64), (127, 127, 127))], "prompt": [message]}
    return Reader(processor, ["chosen"], "").read([{**row, "chosen": answer, "rejected": answer}]).documents[0].vision

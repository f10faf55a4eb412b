"""Rows of pairs to documents: prompts with their pictures, each prepared once, and the answers that follow them.

Two rows of a batch with the same prompt and pictures share a document, and within a document the same answer is one branch; so
the six pairs of four ranked answers are one document with four branches.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl.data_utils import apply_chat_template

from prefalign.families import rewrites_prompt
from prefalign.images import EncodedImage, encode_png, open_image, read_image
from prefalign.losses import VIEWS
from prefalign.losses.term import EITHER
from prefalign.negatives import Negative, negatives
from prefalign.records import Message, normalise_messages, placeholder_count

if TYPE_CHECKING:
    from PIL import Image
    from transformers import ProcessorMixin


@dataclass
class Document:
    """A prompt with its pictures, as the processor prepares it, and the answers to it.

    Attributes:
        prompt: (P,) token ids, image tokens included.
        types: per-token inputs of the family over the prompt, each (P,) (`token_type_ids`, `mm_token_type_ids`).
        vision: what the processor made of the pictures (`pixel_values`, grids, sizes, masks); empty without pictures.
        pictures: digest of the pictures, equal for equal lists of pictures.
        answers: (A,) token ids of each distinct answer.
    """

    prompt: torch.Tensor
    types: dict[str, torch.Tensor]
    vision: dict[str, torch.Tensor]
    pictures: str
    answers: list[torch.Tensor] = field(default_factory=list)

    def branch(self, answer: torch.Tensor) -> int:
        """Number of the branch that holds an answer, which is added if it is new."""
        for number, known in enumerate(self.answers):
            if torch.equal(known, answer):
                return number
        self.answers.append(answer)
        return len(self.answers) - 1


@dataclass
class Documents:
    """The documents of a batch and where each view of each row stands.

    Attributes:
        documents: in the order of their first use, view by view and row by row.
        places: view name to (document, branch) of each row.
    """

    documents: list[Document]
    places: dict[str, list[tuple[int, int]]]

    def part(self, rows: Sequence[int]) -> Documents:
        """Some rows with the documents and answers that they use."""
        kept: dict[int, Document] = {}
        places: dict[str, list[tuple[int, int]]] = {view: [] for view in self.places}
        for view, all_places in self.places.items():
            for row in rows:
                number, branch = all_places[row]
                whole = self.documents[number]
                mine = kept.setdefault(number, replace(whole, answers=[]))
                places[view].append((number, mine.branch(whole.answers[branch])))
        order = {number: place for place, number in enumerate(kept)}
        renumbered = {
            view: [(order[number], branch) for number, branch in found] for view, found in places.items()
        }  # fmt: skip
        return Documents(list(kept.values()), renumbered)

    def passes(self, budget: int, layout: str) -> list[list[int]]:
        """Rows put together so that each group takes at most `budget` tokens in a layout, or is one row.

        Rows on the same document stay together as far as they fit, since its prompt is then run once; groups are filled largest
        first. Each row is in one group.
        """
        rows = len(next(iter(self.places.values())))
        alike: dict[tuple[int, ...], list[int]] = {}
        for row in range(rows):
            alike.setdefault(tuple(places[row][0] for places in self.places.values()), []).append(row)
        pieces: list[list[int]] = []
        for together in alike.values():
            piece: list[int] = []
            for row in together:
                if piece and self.part([*piece, row]).tokens(layout) > budget:
                    pieces.append(piece)
                    piece = []
                piece.append(row)
            pieces.append(piece)
        groups: list[list[int]] = []
        for piece in sorted(pieces, key=lambda piece: -self.part(piece).tokens(layout)):
            fits = next((group for group in groups if self.part([*group, *piece]).tokens(layout) <= budget), None)
            if fits is None:
                groups.append(list(piece))
            else:
                fits += piece
        return groups

    def tokens(self, layout: str) -> int:
        """Tokens of a forward pass over all documents in a layout (`Route.layout`), padding included."""
        if layout == "plain":
            rows = [self.documents[number] for places in self.places.values() for number, _ in places]
            answers = [self.documents[n].answers[branch] for places in self.places.values() for n, branch in places]
            return len(rows) * max(len(row.prompt) + len(a) for row, a in zip(rows, answers, strict=True))
        lengths = [len(document.prompt) + sum(len(a) - 1 for a in document.answers) for document in self.documents]
        return sum(lengths) if layout == "split" else len(lengths) * max(lengths)


@dataclass
class Reader:
    """Prepare rows for a processor.

    Attributes:
        processor: the model's processor.
        views: names of `VIEWS` that are looked at.
        end: what every answer is given at its end (`families.missing_end`).
        negative: how `rejected_images` are made for rows that have none.
        seed: seed of the negatives.
    """

    processor: ProcessorMixin
    views: Sequence[str]
    end: str
    negative: Negative | None = None
    seed: int = 0

    def read(self, rows: Sequence[Mapping[str, Any]], max_length: int | None = None) -> Documents:
        """The documents of some rows.

        Args:
            rows: rows with the columns of `Pair`.
            max_length: answers are cut so that the longest prompt of the row and the answer fit; None cuts nothing.

        Raises:
            ValueError: placeholders and pictures of a side disagree, or a prompt leaves no room (`PromptTooLong`).
        """
        found: dict[tuple[str, str], int] = {}
        documents: list[Document] = []
        places: dict[str, list[tuple[int, int]]] = {view: [] for view in self.views}
        sides = list(dict.fromkeys(VIEWS[view].images for view in self.views))
        for row in rows:
            messages = normalise_messages(row["prompt"])
            prompts = {}
            for side in sides:
                text, chosen, rejected = self._texts(row, messages if side else without_pictures(messages))
                digest, load = self._pictures(row, side, placeholder_count(messages))
                if (text, digest) not in found:
                    found[text, digest] = len(documents)
                    documents.append(self._document(text, load(), digest))
                prompts[side] = found[text, digest]
            longest = max(len(documents[number].prompt) for number in prompts.values())
            if max_length is not None and longest >= max_length:
                raise PromptTooLong(
                    f"row {name(row)}: the prompt has {longest} tokens with its image tokens, and max_length {max_length} "
                    f"leaves no room for an answer. Raise max_length to {longest + 1} or more, or leave it out."
                )
            room = None if max_length is None else max_length - longest
            answers = {"chosen": self._answer(chosen)[:room], "rejected": self._answer(rejected)[:room]}
            for view in self.views:
                number = prompts[VIEWS[view].images]
                places[view].append((number, documents[number].branch(answers[VIEWS[view].answer])))
        return Documents(documents, places)

    def _texts(self, row: Mapping[str, Any], messages: list[Message]) -> tuple[str, str, str]:
        """Prompt, chosen and rejected as text, split where TRL splits them; answers always end with an end of turn."""
        sides = {side: normalise_messages(row[side]) for side in ("chosen", "rejected")}
        texts = apply_chat_template({"prompt": messages, **sides}, self.processor)
        return texts["prompt"], texts["chosen"] + self.end, texts["rejected"] + self.end

    def _document(self, text: str, pictures: list[Image.Image], digest: str) -> Document:
        if not pictures and rewrites_prompt(self.processor):
            raise ValueError(
                f"the {type(self.processor).__name__} prepares no prompt without a picture, and a row or a loss term "
                "asks for one. Leave out the rows without pictures, and terms with views `..._without_image`."
            )
        images = [pictures] if pictures else None
        # text as a list and pictures as a list of lists: some processors read a bare list as a batch
        prepared = self.processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")
        prompt = prepared["input_ids"][0]
        types, vision = {}, {}
        for key, value in prepared.items():
            if key in ("input_ids", "attention_mask", "labels"):
                continue
            if isinstance(value, torch.Tensor) and value.shape == (1, len(prompt)) and key.endswith("token_type_ids"):
                types[key] = value[0]
            else:
                vision[key] = value
        return Document(prompt, types, vision, digest)

    def _answer(self, text: str) -> torch.Tensor:
        return self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0].long()

    def _pictures(
        self, row: Mapping[str, Any], side: str | None, placeholders: int
    ) -> tuple[str, Callable[[], list[Image.Image]]]:
        """Digest of the pictures of a side, and how to decode them."""
        if side is None:
            return "", list
        if side == EITHER:
            side = "rejected_images" if row.get("rejected_images") else "images"
        stored = row.get(side) or []
        if side == "rejected_images" and not stored and placeholders and self.negative is not None:
            own, load = self._pictures(row, "images", placeholders)
            made = json.dumps([own, asdict(self.negative), self.seed, row["id"]], sort_keys=True)
            negative = self.negative
            return digest_of([made.encode()]), lambda: negatives(
                load(), negative, seed=self.seed, identity=row["id"]
            )  # fmt: skip
        if len(stored) != placeholders:
            hint = (
                "A loss term looks at rejected_images: use pairs that have them, a `negative`, or losses that need none."
                if side == "rejected_images"
                else "Write one placeholder for each picture, in order."
            )
            raise ValueError(
                f"row {name(row)}: the prompt has {placeholders} image placeholder(s) and `{side}` holds {len(stored)} "
                f"picture(s); the model would see the wrong picture or none. {hint}"
            )
        return digest_of([picture_bytes(picture) for picture in stored]), lambda: [
            decode(picture) for picture in stored
        ]


class PromptTooLong(ValueError):
    """A prompt that fills `max_length`: cutting it would cut image tokens or leave no answer."""


def without_pictures(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with its image blocks taken out, not only their pixels."""
    return [
        {**message, "content": [block for block in message["content"] if block["type"] != "image"]}
        for message in messages
    ]


def decode(picture: EncodedImage | Image.Image) -> Image.Image:
    """An RGB picture from encoded bytes, from a `datasets` file reference, or from a `PIL.Image` that `datasets` decoded."""
    if isinstance(picture, Mapping):
        if picture["bytes"] is None and picture["path"]:
            return open_image(read_image(Path(picture["path"])))
        return open_image(picture)
    if picture.mode == "RGB":
        return picture
    return open_image(encode_png(picture if picture.mode != "CMYK" else picture.convert("RGB")))


def picture_bytes(picture: EncodedImage | Image.Image) -> bytes:
    """What tells one picture from another: its encoded bytes, read from its file where it is given by path, or its pixels."""
    if isinstance(picture, Mapping):
        encoded = picture["bytes"] if picture["bytes"] is not None else read_image(Path(str(picture["path"])))["bytes"]
        assert encoded is not None
        return encoded
    return f"{picture.size} ".encode() + decode(picture).tobytes()


def digest_of(pieces: Sequence[bytes]) -> str:
    """One digest of several byte strings, with their borders; empty for none."""
    if not pieces:
        return ""
    whole = hashlib.sha256()
    for piece in pieces:
        whole.update(hashlib.sha256(piece).digest())
    return whole.hexdigest()


def name(row: Mapping[str, Any]) -> str:
    """A row in an error message."""
    return str(row.get("id", "(without id)"))


def stack_vision(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Vision inputs of several documents as one batch: joined in order, dimensions that differ filled up with zeros.

    Zeros are what every processor pads with (tiles of LLaVA-NeXT, images of Idefics3), and what the models skip.
    """
    parts = [part for part in parts if part]
    joined = {}
    for key in parts[0] if parts else ():
        tensors = [part[key] for part in parts]
        sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
        padded = []
        for tensor in tensors:
            room = [(0, size - have) for size, have in zip(sizes, tensor.shape[1:], strict=True)]
            flat = [number for pair in reversed(room) for number in pair]
            padded.append(torch.nn.functional.pad(tensor, flat) if any(flat) else tensor)
        joined[key] = torch.cat(padded)
    return joined

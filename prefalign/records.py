"""What travels between stages: prompts, candidates, pairs and examples, one Parquet schema each.

Column names and message shape are TRL's, so a directory of pairs trains with stock `DPOTrainer` as it is. `meta` and
`facts` are JSON text on disk and mappings in memory. Pictures stay the encoded bytes they came as.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from prefalign.images import EncodedImage
from prefalign.text import same_answer

if TYPE_CHECKING:
    from datasets import Features

SCHEMA_VERSION = 1

ON_TWO_PICTURES = "rejected_on_rejected_images"
"""Key in `Pair.meta`; see `Pair.on_two_pictures`."""

Message = dict[str, Any]
"""`{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}`"""


class RecordError(ValueError):
    """A row that cannot be used; `reason` is the word it is counted under in a manifest."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def record_id(*, method: str, parent: str, settings: Mapping[str, Any], model: str, seed: int, index: int = 0) -> str:
    """Identity of a generated row: 24 hex digits of SHA-256 over canonical JSON.

    Args:
        method: name of the method that makes the row.
        parent: id of the row it is made from.
        settings: row-changing settings only; never engine, batch size, device or paths.
        model: fingerprint of the generator (`Engine.fingerprint`).
        seed: seed of the stage.
        index: number of the row among those made from one parent.
    """
    identity = {"schema": SCHEMA_VERSION, "method": method, "parent": parent, "settings": settings, "model": model,
                "seed": seed, "index": index}  # fmt: skip
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:24]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no blanks and no NaN, so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def row_seed(seed: int, identity: str) -> int:
    """63-bit seed of one row, from the stage's seed and the row's id: order and workers do not change it."""
    digest = hashlib.sha256(f"{seed}:{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def user_message(text: str, images: int = 0) -> Message:
    """A user turn with `images` placeholders before the text."""
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant_message(text: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Bring message lists to one shape: content as blocks, without the nulls that Arrow adds to image blocks.

    Raises:
        RecordError: `bad_messages` for what is no list of turns, a turn without role or with content that is neither text
            nor blocks.
    """
    if not isinstance(messages, (list, tuple)):
        raise RecordError("bad_messages", f"messages are a list of turns, got {str(messages)[:120]!r}.")
    result: list[Message] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise RecordError("bad_messages", f"a message needs `role` and `content`, got {str(message)[:120]!r}.")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(message.get("role"), str) or not isinstance(content, (list, tuple)):
            raise RecordError("bad_messages", f"a message needs `role` and `content`, got {str(dict(message))[:120]}.")
        blocks = []
        for block in content:
            kind = block.get("type") if isinstance(block, Mapping) else None
            if kind == "image":
                blocks.append({"type": "image"})
            elif kind == "text" and isinstance(block.get("text"), str):
                blocks.append({"type": "text", "text": block["text"]})
            else:
                raise RecordError(
                    "bad_messages",
                    f"a content block is text or image, got {str(block)[:120]}; video is not read.",
                )
        result.append({"role": message["role"], "content": blocks})
    return result


def message_text(messages: Sequence[Message]) -> str:
    """All text of a message list, turns joined by newlines."""
    turns = ("".join(block["text"] for block in message["content"] if block["type"] == "text") for message in messages)
    return "\n".join(turns)


def without_images(messages: Sequence[Message]) -> list[Message]:
    """The same conversation with no picture in it: placeholders out, and the line breaks that set them apart."""
    turns = []
    for message in messages:
        blocks = [block for block in message["content"] if block["type"] != "image"]
        if len(blocks) < len(message["content"]):
            blocks = [{"type": "text", "text": block["text"].strip("\n")} for block in blocks]
        turns.append({"role": message["role"], "content": blocks})
    return turns


def placeholder_count(messages: Sequence[Message]) -> int:
    """Number of image placeholders in a message list."""
    return sum(block["type"] == "image" for message in messages for block in message["content"])


def _check_placeholders(messages: Sequence[Message], images: Sequence[EncodedImage], where: str) -> None:
    placeholders = placeholder_count(messages)
    if placeholders != len(images):
        raise RecordError(
            "placeholder_mismatch",
            f"{where} has {placeholders} image placeholder(s) for {len(images)} picture(s); a model would see the wrong "
            "picture or fail. Write one `<image>` for each picture, in order.",
        )


def _message_features() -> Any:
    from datasets import List, Value

    return List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})


@dataclass
class _Record:
    JSON_FIELDS: ClassVar[tuple[str, ...]] = ()
    MESSAGE_FIELDS: ClassVar[tuple[str, ...]] = ()

    def to_row(self) -> dict[str, Any]:
        """The row as it is written to Parquet."""
        row = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return {key: canonical_json(value) if key in self.JSON_FIELDS else value for key, value in row.items()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Read a Parquet row back (`datasets` must not have decoded the pictures).

        Raises:
            RecordError: `missing_column` naming the columns that a row lacks.
        """
        fields = dataclasses.fields(cls)
        required = [
            f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in row]
        if missing:
            raise RecordError(
                "missing_column", f"a {cls.__name__} row lacks {', '.join(missing)}; it has {', '.join(sorted(row))}."
            )
        values = {entry.name: row[entry.name] for entry in fields if entry.name in row}
        for name in cls.JSON_FIELDS:
            if isinstance(values.get(name), str):
                values[name] = json.loads(values[name])
        for name in cls.MESSAGE_FIELDS:
            values[name] = normalise_messages(values[name])
        return cls(**values)

    def check(self) -> None:
        """Raise `RecordError` if the record cannot be used; `store` checks every record that it writes."""
        raise NotImplementedError

    @classmethod
    def features(cls) -> Features:
        """Column types on disk, readable by `datasets.load_dataset` as they are."""
        raise NotImplementedError


@dataclass
class Prompt(_Record):
    """A question about pictures, with what is known of its answer.

    Attributes:
        id: identity of the row, unique within its source.
        images: encoded pictures in the order of their placeholders.
        messages: conversation up to and including the user turn to be answered.
        answer: reference answer, if there is one.
        facts: what is known of the pictures (captions, objects, rationales).
    """

    JSON_FIELDS = ("facts",)
    MESSAGE_FIELDS = ("messages",)

    id: str
    images: list[EncodedImage]
    messages: list[Message]
    answer: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def check_pictures(self) -> None:
        """Raise `RecordError` if placeholders and pictures do not agree or nothing is asked: what every stage needs."""
        _check_placeholders(self.messages, self.images, f"prompt {self.id}")
        if not self.messages or self.messages[-1]["role"] != "user":
            raise RecordError("no_user_turn", f"prompt {self.id} does not end with a user turn; nothing is asked.")

    def check(self) -> None:
        """Raise `RecordError` if the prompt cannot be put to a model."""
        self.check_pictures()

    @classmethod
    def features(cls) -> Features:
        from datasets import Features, Image, List, Value

        return Features({"id": Value("string"), "images": List(Image()), "messages": _message_features(),
                         "answer": Value("string"), "facts": Value("string")})  # fmt: skip


@dataclass
class Candidates(_Record):
    """A prompt and several responses to it.

    Attributes:
        responses: one mapping each with `text`; sampled ones have `token_ids` (end of sequence excluded), `tokens` (counted with
            it), `finish_reason`, `settings` (sampling), `index` and `generator`, scored ones `scores` by name (None: missing).
    """

    JSON_FIELDS = ("facts", "responses")
    MESSAGE_FIELDS = ("messages",)

    id: str
    images: list[EncodedImage]
    messages: list[Message]
    responses: list[dict[str, Any]]
    answer: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def check_pictures(self) -> None:
        """Raise `RecordError` if placeholders and pictures do not agree or nothing is asked."""
        _check_placeholders(self.messages, self.images, f"candidates {self.id}")
        if not self.messages or self.messages[-1]["role"] != "user":
            raise RecordError("no_user_turn", f"candidates {self.id} do not end with a user turn; nothing is asked.")

    def check(self) -> None:
        """Raise `RecordError` if the prompt cannot be put to a model or a response has no text to read."""
        self.check_pictures()
        for response in self.responses:
            if not isinstance(response, Mapping) or not isinstance(response.get("text"), str):
                raise RecordError(
                    "bad_responses", f"candidates {self.id}: a response needs `text`, got {str(response)[:120]!r}."
                )

    @classmethod
    def features(cls) -> Features:
        from datasets import Features, Value

        return Features({**Prompt.features(), "responses": Value("string")})


@dataclass
class Pair(_Record):
    """A chosen and a rejected answer to one prompt.

    Attributes:
        images: encoded pictures that both `chosen` and `rejected` are conditioned on (not `rejected` where `on_two_pictures`).
        prompt: conversation up to the user turn, one placeholder for each picture.
        chosen: assistant turn(s) preferred.
        rejected: assistant turn(s) dispreferred.
        method: name of the method that made the pair.
        rejected_images: the other picture(s) of the pair, reached only through views that name it; empty: none.
        answer: reference answer.
        facts: what is known of the pictures.
        margin: by how much the chosen answer is better, in the scorer's units.
        meta: provenance (generator, seed, settings, picture SHA-256, parent row, scores, flags).
    """

    JSON_FIELDS = ("facts", "meta")
    MESSAGE_FIELDS = ("prompt", "chosen", "rejected")

    id: str
    images: list[EncodedImage]
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    method: str
    rejected_images: list[EncodedImage] = field(default_factory=list)
    answer: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    margin: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def on_two_pictures(self) -> bool:
        """Whether `rejected` is about `rejected_images` and may be right of `images`: a pair for the loss `two_pictures`."""
        return self.meta.get(ON_TWO_PICTURES) is True

    def check_pictures(self) -> None:
        """Raise `RecordError` if placeholders and pictures of a side do not agree or nothing is asked."""
        _check_placeholders(self.prompt, self.images, f"pair {self.id}")
        if self.rejected_images:
            _check_placeholders(self.prompt, self.rejected_images, f"pair {self.id} (rejected picture)")
        if not self.prompt or self.prompt[-1]["role"] != "user":
            raise RecordError(
                "no_user_turn", f"pair {self.id}: the prompt does not end with a user turn; nothing is asked."
            )

    def check(self) -> None:
        """Raise `RecordError` if the pair cannot teach anything or cannot be shown to a model."""
        self.check_pictures()
        chosen, rejected = message_text(self.chosen), message_text(self.rejected)
        for side, text in (("chosen", chosen), ("rejected", rejected)):
            if not text.strip():
                raise RecordError(
                    f"empty_{side}", f"pair {self.id}: the {side} answer is empty; it would train silence."
                )
        if not self.rejected_images and same_answer(chosen, rejected):
            raise RecordError(
                "identical_answers",
                f"pair {self.id}: chosen and rejected are the same text on the same picture, so the gradient is zero. "
                "Drop the row.",
            )

    @classmethod
    def features(cls) -> Features:
        from datasets import Features, Image, List, Value

        text, messages, pictures = Value("string"), _message_features(), List(Image())
        return Features({"id": text, "images": pictures, "prompt": messages, "chosen": messages, "rejected": messages,
                         "method": text, "rejected_images": pictures, "answer": text, "facts": text,
                         "margin": Value("float64"), "meta": text})  # fmt: skip


@dataclass
class Example(_Record):
    """A conversation to imitate, in TRL's SFT form."""

    JSON_FIELDS = ("meta",)
    MESSAGE_FIELDS = ("messages",)

    id: str
    images: list[EncodedImage]
    messages: list[Message]
    meta: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `RecordError` if placeholders and pictures do not agree."""
        _check_placeholders(self.messages, self.images, f"example {self.id}")

    @classmethod
    def features(cls) -> Features:
        from datasets import Features, Image, List, Value

        return Features({"id": Value("string"), "images": List(Image()), "messages": _message_features(),
                         "meta": Value("string")})  # fmt: skip

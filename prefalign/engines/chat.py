"""Conversations in OpenAI's form: messages, and their pictures as data URLs."""

from __future__ import annotations

import base64
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefalign.engines import Request
from prefalign.images import encode_png, pixels_sha256
from prefalign.records import Message

if TYPE_CHECKING:
    from PIL import Image


class Pictures:
    """The pictures of a call as data URLs: each distinct one encoded once, when first sent, and let go after its last use."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._digests: dict[int, str] = {}
        for image in (image for request in requests for image in request.images):
            if id(image) not in self._digests:
                self._digests[id(image)] = pixels_sha256(image)
        self._locks = {digest: threading.Lock() for digest in self._digests.values()}
        self._uses: Counter[str] = Counter()
        self._urls: dict[str, str] = {}

    def digest(self, image: Image.Image) -> str:
        """SHA-256 of a picture's mode, size and pixels."""
        return self._digests[id(image)]

    def count(self, requests: Iterable[Request]) -> None:
        """Take note of what will be sent."""
        self._uses.update(self.digest(image) for request in requests for image in request.images)

    def together(self, asked: Mapping[str, Request]) -> list[str]:
        """Keys of requests, those about the same pictures next to each other, so that a server's prefix cache helps."""
        places: dict[tuple[str, ...], int] = {}
        for request in asked.values():
            places.setdefault(self._of(request), len(places))
        return sorted(asked, key=lambda key: places[self._of(asked[key])])

    def url(self, image: Image.Image) -> str:
        """`data:image/png;base64,...`"""
        digest = self.digest(image)
        with self._locks[digest]:
            if digest not in self._urls:
                encoded = base64.b64encode(encode_png(image)["bytes"]).decode()
                self._urls[digest] = f"data:image/png;base64,{encoded}"
            return self._urls[digest]

    def done(self, request: Request) -> None:
        """A request was answered, or failed."""
        for digest in self._of(request):
            with self._locks[digest]:
                self._uses[digest] -= 1
                if self._uses[digest] <= 0:
                    self._urls.pop(digest, None)

    def _of(self, request: Request) -> tuple[str, ...]:
        return tuple(self.digest(image) for image in request.images)


def chat_messages(request: Request, pictures: Pictures) -> list[dict[str, Any]]:
    """A conversation in OpenAI's form, pictures in place; a turn without one is plain text, which every server takes."""
    images = iter(request.images)

    def content(message: Message) -> str | list[dict[str, Any]]:
        blocks = message["content"]
        if all(block["type"] == "text" for block in blocks):
            return "".join(block["text"] for block in blocks)
        return [
            {"type": "text", "text": block["text"]}
            if block["type"] == "text"
            else {"type": "image_url", "image_url": {"url": pictures.url(next(images))}}
            for block in blocks
        ]

    return [{"role": message["role"], "content": content(message)} for message in request.messages]

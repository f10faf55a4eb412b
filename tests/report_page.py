"""A report's page, walked through: what it holds, and that it fetches and runs nothing of others'."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from prefalign.images import EncodedImage, encode_png

VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Walks a page: checks nesting, collects elements with their attributes and text."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice on <{tag}>"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and css in (a.get("class") or "")]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def picture(colour, size=(64, 64)) -> EncodedImage:
    return encode_png(Image.new("RGB", size, colour))


def pixels(uri: str) -> np.ndarray:
    head, content = uri.split(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), dtype=float)


def assert_self_contained(page: Page, html: str) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "srcset", "href", "xlink:href", "action", "poster", "data", "background"):
            value = attributes.get(name)
            if tag == "a" and value is not None:
                assert not re.match(r"[a-z]+:|/", value)
            elif value is not None:
                assert value.startswith("data:image/"), f"<{tag} {name}={value[:60]!r}>"
        assert not [name for name in attributes if name.startswith("on")]
        assert "url(" not in (attributes.get("style") or "")
    style, script = (re.search(rf"<{tag}>(.*?)</{tag}>", html, re.S)[1] for tag in ("style", "script"))
    for word in ("http:", "https:", "@import", "url(", "src="):
        assert word not in style
    for word in ("http:", "https:", "fetch(", "import", "XMLHttpRequest", "innerHTML"):
        assert word not in script
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:")

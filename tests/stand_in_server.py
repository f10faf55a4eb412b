"""A local server that speaks OpenAI's protocol: it looks at pictures, counts what it is asked, and fails on command.

An answer tells the colour in the middle of the first picture and a digest of the pixels of all of them, so that another picture,
or one that was changed on its way, is another answer. A request is known by the first word of its last user turn.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import socket
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from prefalign.engines import Request, Sampling
from prefalign.engines.config import ServerConfig
from prefalign.engines.openai import OpenAIEngine
from prefalign.records import user_message
from tests.tiny_vlms import picture

KEY = "sk-" + "standin" * 4
MODEL = "tiny-vlm"
GREEDY = Sampling(max_new_tokens=32, temperature=0.0)
DRAWN = Sampling(max_new_tokens=32)
PICTURES = [picture(number) for number in range(4)]


@dataclass
class Asked:
    """A chat completion that was asked for: its name, body and key, and when it came and was answered."""

    name: str
    body: dict[str, Any]
    came: float
    answered: bool = False


@dataclass
class StandInServer:
    """The server; use it as a context manager.

    Attributes:
        owner: what it calls itself in its list of models.
        key: the key it wants; "" wants none.
        faults: by name of a request, what happens to its first tries: a status, or one of `cut`, `late`, `no credit` (a 429),
            `no json`, `nested`, `no answer`, `no words`, `reset`, `blanks` (one every 0.2 s, for 4 s, then an answer), `half`
            (nothing for 4 s after the head of the answer).
        fails_after: answers after which it wants another key; None: it goes on.
        delay: seconds that an answer takes.
        headers: sent with every failure.
        words: what it says instead of looking, by name of the request.
        top: the likeliest first tokens that it tells of.
        headers_seen: of every request, in order.
    """

    owner: str = "vllm"
    key: str = ""
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    fails_after: int | None = None
    delay: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    words: dict[str, str | None] = field(default_factory=dict)
    top: list[tuple[str, float]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    headers_seen: list[dict[str, str]] = field(default_factory=list)
    listed: int = 0
    busy: int = 0
    busiest: int = 0
    gone: bool = False

    def __enter__(self) -> StandInServer:
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.gone = True
        self.http.shutdown()
        self.http.server_close()

    def settings(self, **changes: Any) -> ServerConfig:
        """How it is reached."""
        return ServerConfig(**{"base_url": self.url, "timeout": 20.0, "max_retries": 4, **changes})

    def answers(self) -> Counter[str]:
        """How often each request was answered."""
        return Counter(one.name for one in self.asked if one.answered)


class _Handler(BaseHTTPRequestHandler):
    owner: StandInServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *message: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.owner.lock:
            self.owner.listed += 1
        if not self._welcome():
            return
        if self.path != "/v1/models":
            self._json({"detail": "Not Found"}, 404)
            return
        known = {"object": "model", "created": 1, "owned_by": self.owner.owner}
        self._json({"object": "list", "data": [{"id": name, **known} for name in (MODEL, "other")]})

    def do_POST(self) -> None:
        server = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        turn = [one for one in body["messages"] if one["role"] == "user"][-1]["content"]
        text = turn if isinstance(turn, str) else "".join(one["text"] for one in turn if one["type"] == "text")
        asked = Asked(text.split()[0], body, time.monotonic())
        with server.lock:
            server.asked.append(asked)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
            todo = server.faults.get(asked.name)
            fault = todo.pop(0) if todo else 0
            if server.fails_after is not None and sum(server.answers().values()) >= server.fails_after:
                fault = 401
        try:
            if not self._welcome():
                return
            if fault := "reset" if server.gone else fault:
                self._fail(fault)
                return
            time.sleep(server.delay)
            reply = json.dumps(self._reply(asked)).encode()
        finally:
            with server.lock:
                server.busy -= 1
        with server.lock:
            asked.answered = True
        self._send(reply)

    def _welcome(self) -> bool:
        given = self.headers.get("Authorization", "")
        self.owner.headers_seen.append(dict(self.headers))
        if self.owner.key and given != f"Bearer {self.owner.key}":
            self._json({"error": {"message": f"Incorrect API key provided: {given}", "code": "invalid_api_key"}}, 401)
            return False
        return True

    def _fail(self, fault: int | str) -> None:
        given = self.headers.get("Authorization", "")
        if isinstance(fault, int):
            codes = {400: "context_length_exceeded", 422: "unsupported_value"}
            error = {"message": f"fault {fault} of {given}", "code": codes.get(fault)}
            if fault == 422:
                error["param"] = "temperature"
            self._json({"error": error}, {422: 400}.get(fault, fault), self.owner.headers)
        elif fault == "no credit":
            self._json({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, 429)
        elif fault in ("blanks", "half"):
            self._slowly(b" " if fault == "blanks" else b"")
        elif fault == "late":
            time.sleep(3.0)
        elif fault == "no json":
            self._send(b'{"choices": [{"message": {"content": "half an ans')
        elif fault == "nested":
            self._send(b"[" * 100_000)
        elif fault == "no answer":
            self._json({"error": {"message": f"upstream broke for {given}"}})
        elif fault == "no words":
            self._json({"choices": []})
        elif fault == "cut":
            self._send(json.dumps({"choices": [{"message": {"content": "half"}}]}).encode(), short=9)
            self.close_connection = True
        else:
            assert fault == "reset", fault
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

    def _slowly(self, piece: bytes) -> None:
        """The head of an answer at once, `piece` every 0.2 s, and after 4 s the answer."""
        body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "late"}}]}).encode()
        self._send(piece * 20 + body, short=len(piece * 20 + body))
        self.close_connection = True
        with contextlib.suppress(OSError):  # who asked has gone
            for _ in range(20):
                self.wfile.write(piece)
                time.sleep(0.2)
            self.wfile.write(body)

    def _reply(self, asked: Asked) -> dict[str, Any]:
        body = asked.body
        drawn = f" Drawn with {body['seed']}." if "seed" in body else ""
        words = self.owner.words.get(asked.name, f" {looked(body['messages'])}{drawn}")
        said = words or ""
        reason = "content_filter" if said == "withheld" else "stop"
        message = {"role": "assistant", "content": words}
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "message": message}
        if body.get("return_token_ids"):
            choice["token_ids"] = [*range(10, 10 + len(said.split())), 2]
        if body.get("logprobs"):
            top = [{"token": token, "logprob": value, "bytes": None} for token, value in self.owner.top]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]} if top else None
        usage = {"prompt_tokens": 7, "completion_tokens": len(said.split()) + 1, "total_tokens": 0}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [choice],
            "usage": usage,
        }

    def _json(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(body).encode(), status, headers)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None, short: int = 0) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - short])
        except OSError:
            pass  # who asked has gone


def looked(messages: list[dict[str, Any]]) -> str:
    """What there is to see in the pictures of a conversation."""
    blocks = [block for message in messages if not isinstance(message["content"], str) for block in message["content"]]
    urls = [block["image_url"]["url"] for block in blocks if block["type"] == "image_url"]
    if not urls:
        return "No picture."
    start = "data:image/png;base64,"
    assert all(url.startswith(start) for url in urls)
    return described([Image.open(io.BytesIO(base64.b64decode(url.removeprefix(start)))) for url in urls])


def described(images: list[Image.Image]) -> str:
    """What the server says of decoded pictures."""
    pixels = b"".join(image.tobytes() for image in images)
    middle = images[0].getpixel((images[0].width // 2, images[0].height // 2))
    return f"{len(images)} of {middle}, {hashlib.sha256(pixels).hexdigest()[:12]}."


def engine_on(server, **changes):
    return OpenAIEngine(MODEL, server.settings(**changes))


def model_section(server, **changes):
    """The `model` section of a config."""
    return {"model_name_or_path": MODEL, "device": "auto", "engine": "openai",
            "server": dataclasses.asdict(server.settings(**changes))}  # fmt: skip


def about(name, *images, **more):
    return Request(name, [user_message(f"{name} what is this?", len(images))], list(images), **more)


def some(count):
    return [about(f"row{number}", PICTURES[number % len(PICTURES)]) for number in range(count)]


def seen(request):
    return described(request.images)

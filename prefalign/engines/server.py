"""The connection to an OpenAI-compatible server: its key, its models, tries with growing pauses, and what its faults mean.

Tries and pauses are the OpenAI library's. What it does not watch is added where every try passes: a limit of requests per minute
before it is sent, a limit of time for the whole answer (the library's counts between two bytes), and a look at what came back, so
that a body which is late or no answer counts as a failed try like any other.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from prefalign.engines.config import ServerConfig

try:
    import httpx2
    import openai
except ImportError as error:
    raise ImportError(
        "a server is asked through the libraries openai and httpx2, and they are not installed or too old. Run "
        '`pip install "prefalign[judge]"`.'
    ) from error

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
NO_KEY = "none"
"""What is sent where no key is set: servers that want none do not look at it."""
QUIET = 30.0
"""Seconds between two messages about tries that failed: many requests wait at once."""
LONGEST = 120.0
"""Longest `Retry-After`, in seconds, for which the library waits."""
SETTINGS = ("temperature", "top_p", "top_k", "repetition_penalty", "seed", "logprobs", "top_logprobs")
"""Settings that a server refuses for every request or for none."""


class ServerError(RuntimeError):
    """Nothing more can be asked of the server; the message says what to do."""


class RequestFailed(Exception):
    """One request came to nothing, after all its tries."""


class Stopped(Exception):
    """A request that was not sent because the call it belongs to has stopped."""


class _InTime(httpx2.SyncByteStream):
    """The body of a response, which fails as late when a piece of it comes after the time it had."""

    def __init__(self, body: httpx2.SyncByteStream, request: httpx2.Request, until: float) -> None:
        self.body, self.request, self.until = body, request, until

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.body:
            if time.monotonic() > self.until:
                raise httpx2.ReadTimeout("the answer was not whole in time", request=self.request)
            yield piece

    def close(self) -> None:
        self.body.close()


class _Client(openai.OpenAI):
    """OpenAI's client, which says that it waits for a next try, and whose pauses end when `stopping` is set."""

    stopping = threading.Event()
    silent_until = 0.0

    def _sleep_for_retry(self, *, retries_taken: int, max_retries: int, options: Any, response: Any) -> None:
        pause = self._calculate_retry_timeout(
            max_retries - retries_taken, options, response.headers if response else None
        )
        logger.info("Retrying request in %f seconds (retry %i of %s)", pause, retries_taken + 1, max_retries)
        if time.monotonic() >= self.silent_until:
            self.silent_until = time.monotonic() + QUIET
            what = "no whole answer came" if response is None else f"it answered {response.status_code}"
            logger.warning(
                "%s: a request failed (%s); try %d of %d follows in %.1f s", self.base_url, what, retries_taken + 2,
                max_retries + 1, pause,
            )  # fmt: skip
        if self.stopping.wait(pause):
            raise Stopped


class Server:
    """A server, asked once for its models and then for chat completions.

    Args:
        model: name of the model there.
        settings: address, key, tries and limits.

    Attributes:
        address: up to `/v1`.
        owner: what the server says of itself in its list of models: `vllm`, `sglang`, `llamacpp`, `openai`, ...
        failed_tries: tries so far that had to be made again.

    Raises:
        ValueError: if the address or the key cannot be used.
        ServerError: if no server answers there, it refuses the key, or has no such model.
    """

    def __init__(self, model: str, settings: ServerConfig) -> None:
        self.model = model
        self.settings = settings
        self.address = _address(settings)
        self.key = _key(settings, self.address)
        self.failed_tries = 0
        self._stopping = threading.Event()
        self._turn = threading.Lock()
        self._next = 0.0
        hooks: dict[str, list[Any]] = {"request": [self._before], "response": [self._after]}
        self.client = _Client(
            api_key=self.key or NO_KEY,
            base_url=self.address,
            max_retries=settings.max_retries,
            timeout=openai.Timeout(settings.timeout, connect=min(10.0, settings.timeout)),
            http_client=openai.DefaultHttpxClient(event_hooks=hooks),
        )
        self.client.stopping = self._stopping
        self.owner = self._owner()

    @property
    def is_openai(self) -> bool:
        """Whether this is OpenAI itself, or Azure, and not a server that speaks the same."""
        return self._is_at("openai.com") or self._is_at("openai.azure.com")

    def _is_at(self, domain: str) -> bool:
        return f".{urlsplit(self.address).hostname}".endswith(f".{domain}")

    def complete(self, body: dict[str, Any]) -> Any:
        """The chat completion that answers a request.

        Raises:
            RequestFailed: if this request alone came to nothing.
            ServerError: if none can be answered.
        """
        try:
            return self.client.chat.completions.create(**body)
        except openai.OpenAIError as error:
            raise self._meaning(error) from None  # the library's own error may quote the key

    def open(self) -> None:
        """Begin a call: requests may be sent."""
        self._stopping.clear()

    def stop(self) -> None:
        """Send nothing more, not even tries that are due; who waits for the time of a next try stops waiting."""
        self._stopping.set()

    def close(self) -> None:
        """Leave the server for good; what is under way comes to nothing."""
        self.stop()
        self.client.close()

    def _before(self, request: httpx2.Request) -> None:
        """Wait for this try's turn, and send OpenAI's organization and project, of the environment, to nobody else."""
        if not self._is_at("openai.com"):
            for name in ("OpenAI-Organization", "OpenAI-Project"):
                request.headers.pop(name, None)
        limit = self.settings.requests_per_minute
        with self._turn:
            self.failed_tries += request.headers.get("x-stainless-retry-count", "0") != "0"
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + 60 / limit if limit else now
        self._stopping.wait(start - now)
        if self._stopping.is_set():
            raise Stopped
        request.extensions.setdefault("until", time.monotonic() + self.settings.timeout)

    def _after(self, response: httpx2.Response) -> None:
        """Raise what the library takes for a failed try if a body comes late, or should be an answer and is none."""
        extensions = response.request.extensions
        assert isinstance(response.stream, httpx2.SyncByteStream)
        response.stream = _InTime(response.stream, response.request, extensions["until"])
        extensions["timeout"]["read"] = max(0.001, extensions["until"] - time.monotonic())
        if response.status_code != 200:
            return
        response.read()
        asked = "chat completion" if response.request.url.path.endswith("/chat/completions") else "list of models"
        try:
            body = response.json()
        except (ValueError, RecursionError):
            body = None
        if not (_is_completion(body) if asked == "chat completion" else _is_list(body)):
            shown = self._shown(response.text)
            raise httpx2.DecodingError(f"no {asked} but {shown!r}", request=response.request)

    def _owner(self) -> str:
        """Ask for the models, once."""
        client = self.client.with_options(max_retries=min(2, self.settings.max_retries))
        try:
            models = {one.id: one for one in client.models.list().data}
        except openai.OpenAIError as error:
            raise self._unreachable(error) from None
        found = models.get(self.model) or models.get(f"models/{self.model}")
        if found is None:
            names = ", ".join(sorted(models)[:8]) or "none"
            raise ServerError(
                f"{self.address} has no model {self.model!r}; it serves {names}{', ...' if len(models) > 8 else ''}. Set "
                "model_name_or_path to one of these names."
            )
        return str(getattr(found, "owned_by", None) or "")

    def _unreachable(self, error: openai.OpenAIError) -> ServerError:
        """Why the models could not be listed."""
        if isinstance(error, openai.APITimeoutError):
            return ServerError(
                f"no answer from {self.address} within {self.settings.timeout:g} s. Look whether the server is up, or set "
                "server.base_url (or OPENAI_BASE_URL) to where it is."
            )
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__
            if isinstance(cause, httpx2.DecodingError):
                return ServerError(
                    f"{self.address}/models gave {cause}, so this is no OpenAI-compatible server. Set server.base_url (or "
                    "OPENAI_BASE_URL) to the address up to and including /v1."
                )
            return self._gone(cause)
        if isinstance(error, openai.APIStatusError):
            if error.status_code in (401, 403):
                return self._locked(error)
            if _no_credit(error):
                return self._unpaid(error)
            if error.status_code == 404:
                return ServerError(
                    f"{self.address}/models is not there (404). Set server.base_url (or OPENAI_BASE_URL) to the address up to "
                    "and including /v1."
                )
            return ServerError(f"{self.address}/models answers {self._told(error)}. Try again when the server is well.")
        return ServerError(f"{self.address}: {self._shown(str(error))}")

    def _meaning(self, error: openai.OpenAIError) -> RequestFailed | ServerError:
        """What a chat completion that failed says about this request, or about all."""
        made = _tries(error)
        tries = f"in {made} tries" if made > 1 else "in the one try it had"
        cause = error.__cause__
        if isinstance(cause, (httpx2.ConnectError, httpx2.ConnectTimeout)):
            return self._gone(cause)
        if isinstance(error, openai.APITimeoutError):
            return RequestFailed(
                f"no whole answer within {self.settings.timeout:g} s {tries}. Raise server.timeout, or lower server.concurrency."
            )
        if isinstance(error, openai.APIConnectionError):
            if isinstance(cause, httpx2.DecodingError):
                return RequestFailed(f"the server sent {cause} {tries}")
            return RequestFailed(f"the connection broke before the answer was whole {tries} ({type(cause).__name__})")
        if not isinstance(error, openai.APIStatusError):
            return RequestFailed(self._shown(str(error)))
        if error.status_code == 401:
            return self._locked(error)
        if error.status_code == 404:
            return ServerError(
                f"{self.address} answers {self._told(error)} when {self.model!r} is asked. Set model_name_or_path to a model "
                "that it serves for chat."
            )
        if _no_credit(error):
            return self._unpaid(error)
        unsupported = error.code in ("unsupported_parameter", "unsupported_value")
        if error.status_code == 400 and (unsupported or error.param in SETTINGS):
            return ServerError(
                f"{self.model!r} at {self.address} does not take the setting {error.param!r} as it is: {self._told(error)}. Set "
                "`sampling` to what it takes; it is not left out silently."
            )
        wait = self.client._parse_retry_after_header(error.response.headers) or 0
        if error.status_code in (429, 503) and wait > LONGEST:
            return ServerError(
                f"{self.address} answers {self._told(error)}, and no request waits longer than {LONGEST:g} s. Start the same "
                "command again after that time: what is finished is kept."
            )
        repeated = error.status_code in (408, 409, 429) or error.status_code >= 500
        return RequestFailed(f"the server answered {self._told(error)}" + (f" {tries}" if repeated else ""))

    def _locked(self, error: openai.APIStatusError) -> ServerError:
        name = self.settings.api_key_env
        if not self.key:
            return ServerError(
                f"{self.address} wants a key ({error.status_code}), and the environment variable {name} is not set. Put the key "
                "there, or name another variable in server.api_key_env."
            )
        return ServerError(
            f"{self.address} refuses the key in the environment variable {name} ({error.status_code}). Put a valid key for this "
            "address there, one that may list models and use them."
        )

    def _unpaid(self, error: openai.APIStatusError) -> ServerError:
        return ServerError(f"{self.address}: {self._told(error)}. Add credit to the account, then start again.")

    def _gone(self, cause: BaseException | None) -> ServerError:
        return ServerError(
            f"no server answers at {self.address} ({self._shown(str(cause))}). Start it, or set server.base_url (or "
            "OPENAI_BASE_URL) to where it is; what is finished is kept, so start the same command again."
        )

    def _told(self, error: openai.APIStatusError) -> str:
        """Status of a failed request, and the server's words for it."""
        body = error.body
        words = body.get("message") if isinstance(body, dict) else body
        wait = error.response.headers.get("retry-after")
        after = f"; Retry-After: {wait}" if wait and error.status_code in (429, 503) else ""
        return f"{error.status_code} ({self._shown(str(words or 'without a reason'))}{after})"

    def _shown(self, text: str) -> str:
        """A text from outside, short and without the key."""
        if self.key:
            text = text.replace(self.key, "<key>")
        return text if len(text) <= 300 else f"{text[:300]}..."


def _address(settings: ServerConfig) -> str:
    address = (settings.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).strip().rstrip("/")
    parts = urlsplit(address)
    if parts.username or parts.password:
        raise ValueError(
            f"the server's address (of {parts.hostname}) holds a user name or password, which would be written into configs and "
            "manifests. Take it out, and put the key into the environment variable that server.api_key_env names."
        )
    if parts.query or parts.fragment:
        raise ValueError(
            f"the server's address (of {parts.hostname}) goes on after a ? or #, which requests do not keep, and which would be "
            "written into configs and manifests if it is a key. Take it out: server.base_url ends in a path such as /v1, and a "
            "key belongs into the environment variable that server.api_key_env names."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"{address!r} is no address of a server. Set server.base_url (or OPENAI_BASE_URL) to one such as http://localhost:8000/v1."
        )
    return address


def _key(settings: ServerConfig, address: str) -> str:
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key and address == OPENAI:
        raise ValueError(
            f"{address} wants a key, and the environment variable {settings.api_key_env} is not set. Put the key there, or set "
            "server.base_url (or OPENAI_BASE_URL) to the address of another server."
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"the environment variable {settings.api_key_env} holds blanks, line breaks or other characters that no key has. Set "
            "it again."
        )
    return key


def _tries(error: openai.OpenAIError) -> int:
    """How often a request was sent that failed: fewer times than it may be, if the server wants no other try."""
    request = getattr(error, "request", None)
    return int(request.headers.get("x-stainless-retry-count", 0)) + 1 if request is not None else 1


def _no_credit(error: openai.APIStatusError) -> bool:
    """Whether an account is empty: OpenAI says so with a 429, others (OpenRouter, DeepSeek) with 402."""
    return error.status_code == 402 or error.code == "insufficient_quota"


def _is_completion(body: Any) -> bool:
    choices = body.get("choices") if isinstance(body, dict) else None
    message = (
        choices[0].get("message") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    )
    return isinstance(message, dict) and isinstance(message.get("content"), (str, type(None)))


def _is_list(body: Any) -> bool:
    listed = body.get("data") if isinstance(body, dict) else None
    return isinstance(listed, list) and all(isinstance(one, dict) and isinstance(one.get("id"), str) for one in listed)

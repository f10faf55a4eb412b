"""Generation by a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, OpenAI itself and other providers.

Pictures travel as lossless PNG of the decoded picture, so that a server sees the pixels that the transformers engine sees. What
a server says of itself (`owned_by` in its list of models) decides what it is trusted to honour; a setting that it is not known
to honour is refused, since most servers ignore what they do not know without a word.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from prefalign.engines import USAGE, Completion, FirstToken, ImageAttention, Request, Sampling, require
from prefalign.engines.chat import Pictures, chat_messages
from prefalign.engines.config import EngineConfig, ServerConfig
from prefalign.engines.parallel import ask_all
from prefalign.engines.sampling import check_sampling
from prefalign.engines.server import RequestFailed, Server, ServerError
from prefalign.engines.stopping import certain_sentence
from prefalign.records import canonical_json, placeholder_count, row_seed
from prefalign.replies import Replies

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PLAIN: dict[str, dict[str, float]] = {
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "sglang": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
}
"""By server, its names of the settings beyond OpenAI's, and what switches each off. They are always sent: left out, the server
takes its own defaults or those of the checkpoint's author."""
CONTINUES = ("vllm", "sglang")
"""Servers that go on with an answer that is begun."""
OWN_DEVICE = {"adapter": None, "load_in_4bit": False, "dtype": "auto", "processor": None, "device": "auto",
              "attn_implementation": None, "trust_remote_code": False}  # fmt: skip
"""Settings of a model in this process, which no server is told, and their defaults."""
TOP = 20
"""Most likely tokens that servers tell of: OpenAI's limit, and vLLM's unless it is started with another."""


@dataclass
class Answer:
    """What a server answered: the text and how it ended, token ids and the likeliest first tokens where it gives them."""

    text: str
    finish_reason: str
    token_ids: list[int] = field(default_factory=list)
    top: list[tuple[str, float]] = field(default_factory=list)
    prompt_tokens: int = 0
    new_tokens: int = 0


class OpenAIEngine:
    """An `Engine` on a server. It is asked for its models once, here.

    The capabilities of the class are those of some server, those of an engine its own server's.

    Args:
        model: name of the model there.
        settings: which server, and how it is asked.
        revision: what tells weights of one name apart; part of the fingerprint.

    Raises:
        ValueError: if the settings cannot be used, or the model's name is a path.
        ServerError: if no server answers, it refuses the key, or has no such model.
    """

    capabilities: frozenset[str] = frozenset({"sample", "prefix", "first_token"})

    def __init__(self, model: str, settings: ServerConfig | None = None, *, revision: str | None = None) -> None:
        self.settings = settings or ServerConfig()
        _check_settings(self.settings)
        _check_name(model)
        self.model = model
        self.fingerprint = f"{model}@{revision}" if revision else model
        self.replies = Replies(self.settings.cache) if self.settings.cache is not None else None
        self.server = Server(model, self.settings)
        if self.server.owner not in CONTINUES:
            self.capabilities = self.capabilities - {"prefix"}

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order.

        A request that the server does not answer (its prompt is too long, or all tries failed) comes back alone with
        `finish_reason` `error`. Token ids are known of vLLM alone, and of an answer that was cut at a sentence not even there.

        Args:
            requests: what to answer. The server draws with a seed made of a request's seed and id; whether it gives the same
                answer twice is up to it.
            sampling: how to draw.

        Raises:
            ValueError: for a setting that the server cannot honour, by its name.
            ServerError: if the server cannot be used any more. What it answered until then is in the cache.
        """
        check_sampling(sampling)
        self._check(requests, sampling)
        return [
            _completion(request, answer)
            for request, answer in zip(requests, self._answers(requests, sampling), strict=True)
        ]

    def first_token(self, requests: Sequence[Request], words: Sequence[str]) -> list[FirstToken]:
        """Probability that the answer to each request begins with each word, from the likeliest first tokens.

        A token counts for a word that it spells, whatever blanks stand around it; a word that is none of the 20 likeliest, or
        takes more than one token, has 0.

        Returns:
            One for each request, in order; one that fails says why.

        Raises:
            ValueError: if there are no words, one is empty, or two are the same.
            ServerError: if the server tells no probabilities.
        """
        spelled = [word.strip() for word in words]
        if not words or not all(spelled) or len(set(spelled)) < len(spelled):
            raise ValueError(
                f"words are {list(words)}; give at least one that an answer can begin with, none empty and none twice."
            )
        sampling = Sampling(max_new_tokens=1)
        self._check(requests, sampling)
        found = []
        for request, answer in zip(requests, self._answers(requests, sampling, top=True), strict=True):
            if isinstance(answer, str):
                found.append(FirstToken({}, _completion(request, answer).error))
                continue
            probs = dict.fromkeys(spelled, 0.0)
            for token, logprob in answer.top:
                if token.strip() in probs:
                    probs[token.strip()] += math.exp(logprob)
            found.append(FirstToken(dict(zip(words, probs.values(), strict=True))))
        return found

    def logprobs(self, requests: Sequence[Request], answers: Sequence[str | Completion]) -> list[torch.Tensor]:
        """Refused: a chat server scores no given answer."""
        raise _refusal("log-probs of given answers (logprobs)")

    def attention(
        self, requests: Sequence[Request], answers: Sequence[str | Completion], *, layer: int | None = None
    ) -> list[ImageAttention]:
        """Refused: a chat server shows no attention."""
        raise _refusal("the attention of answers to their pictures (attention)")

    def _check(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Refuse what the server cannot honour."""
        if sampling.contrast is not None:
            raise _refusal("decoding against the prompt without its picture (sampling.contrast)")
        if sampling.attention_layer is not None:
            raise _refusal("the attention of answers to their pictures (sampling.attention_layer)")
        if any(request.image_mask is not None for request in requests):
            raise _refusal("hiding image tokens (image_mask)")
        if any(request.given for request in requests):
            raise _refusal("going on after given token ids (given)")
        if "prefix" not in self.capabilities and any(request.prefix.rstrip() for request in requests):
            raise _refusal("a forced start of the answer (prefix) was asked for, which", owner=self.server.owner)
        if self.server.owner not in PLAIN:
            for name, value, off in (
                ("top_k", sampling.top_k, 0),
                ("repetition_penalty", sampling.repetition_penalty, 1),
            ):
                if value != off:
                    raise ValueError(
                        f"sampling.{name} is {value:g}, and {self.server.address} (which calls itself {self.server.owner!r}) is "
                        f"not known to honour it; many servers ignore it silently. Set sampling.{name} to {off} (off), or use "
                        f"one of {', '.join(PLAIN)}."
                    )

    def _answers(self, requests: Sequence[Request], sampling: Sampling, *, top: bool = False) -> list[Answer | str]:
        """What was answered to each request, or why nothing was; equal requests are asked once."""
        pictures = Pictures(requests)
        found: dict[str, Answer | str] = {}
        keys: list[str] = []
        asked: dict[str, Request] = {}
        for request in requests:
            key = self._key(request, sampling, pictures, top)
            keys.append(key)
            if (holes := placeholder_count(request.messages)) != len(request.images):
                found[key] = (
                    f"it has {holes} image placeholder(s) for {len(request.images)} picture(s). Write one for each picture."
                )
            else:
                asked.setdefault(key, request)
        if self.replies is not None:
            found |= {key: Answer(**json.loads(reply)) for key, reply in self.replies.kept(asked).items()}
        self._ask({key: one for key, one in asked.items() if key not in found}, sampling, pictures, top, found)
        answers = [found[key] for key in keys]
        for answer in answers:
            if isinstance(answer, Answer):
                USAGE.requests += 1
                USAGE.prompt_tokens += answer.prompt_tokens
                USAGE.new_tokens += answer.new_tokens
        return answers

    def _ask(
        self,
        asked: dict[str, Request],
        sampling: Sampling,
        pictures: Pictures,
        top: bool,
        found: dict[str, Answer | str],
    ) -> None:
        """Put requests to the server, those about one picture after each other, and keep every answer as it comes."""
        if not asked:
            return
        pictures.count(asked.values())
        failed_before = self.server.failed_tries
        found |= ask_all(
            pictures.together(asked),
            lambda key: self._answer(asked[key], sampling, pictures, top),
            self._keep,
            self.server,
        )
        if failed := self.server.failed_tries - failed_before:
            logger.info(
                "%s: %d of the tries for %d requests failed and were made again.",
                self.server.address,
                failed,
                len(asked),
            )

    def _keep(self, batch: Sequence[tuple[str, Answer | str | BaseException]]) -> None:
        if self.replies is not None:
            got = {key: json.dumps(dataclasses.asdict(one)) for key, one in batch if isinstance(one, Answer)}
            self.replies.keep(got, self.fingerprint)

    def _answer(self, request: Request, sampling: Sampling, pictures: Pictures, top: bool) -> Answer:
        try:
            response = self.server.complete(self._body(request, sampling, pictures, top))
        finally:
            pictures.done(request)
        choice = response.choices[0]
        reason = choice.finish_reason
        if reason not in ("stop", "length"):
            raise RequestFailed(f"the server broke off with finish_reason {reason!r}")
        tops = getattr(choice.logprobs, "content", None) if top else None
        if top and not tops:
            raise ServerError(
                f"{self.model!r} at {self.server.address} tells no probabilities of its tokens (top_logprobs), which first_token "
                "needs. Use `engine: transformers`, or a server that does, such as vLLM."
            )
        usage = response.usage
        return Answer(
            choice.message.content or "",
            reason,
            list(getattr(choice, "token_ids", None) or []),
            [(entry.token, entry.logprob) for entry in tops[0].top_logprobs] if tops else [],
            getattr(usage, "prompt_tokens", None) or 0,
            getattr(usage, "completion_tokens", None) or 0,
        )

    def _body(self, request: Request, sampling: Sampling, pictures: Pictures, top: bool) -> dict[str, Any]:
        """The request as the server takes it."""
        owner = self.server.owner
        extra: dict[str, Any] = dict(PLAIN.get(owner, {}))
        if sampling.top_k:
            extra["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1:
            extra["repeat_penalty" if owner == "llamacpp" else "repetition_penalty"] = sampling.repetition_penalty
        messages = chat_messages(request, pictures)
        if prefix := request.prefix.rstrip():  # a model writes the blank with the next word
            messages.append({"role": "assistant", "content": prefix})
            extra |= {"add_generation_prompt": False, "continue_final_message": True}
        if owner == "vllm":
            extra["return_token_ids"] = True
        length = "max_completion_tokens" if self.server.is_openai else "max_tokens"
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            length: sampling.max_new_tokens,
            "extra_body": extra,
        }
        if top:
            body |= {"logprobs": True, "top_logprobs": TOP}
        elif sampling.temperature:
            body["seed"] = _seed(request)
        return body

    def _key(self, request: Request, sampling: Sampling, pictures: Pictures, top: bool) -> str:
        """Digest of all that decides an answer. The address is not part of it."""
        content = {
            "model": self.fingerprint,
            "messages": request.messages,
            "images": [pictures.digest(image) for image in request.images],
            "sampling": dataclasses.asdict(sampling),
            "seed": _seed(request) if sampling.temperature and not top else None,
            "prefix": request.prefix.rstrip(),
            "top": TOP if top else 0,
        }
        return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def load_engine(config: EngineConfig, *, needs: Sequence[str] = (), stage: str = "this stage") -> OpenAIEngine:
    """The engine of a config; what no server can do is refused before one is asked.

    Raises:
        ValueError: if the engine lacks one of `needs`, or the config asks for what only a model in this process has.
        ServerError: if no server answers, it refuses the key, or has no such model.
    """
    require(OpenAIEngine, needs, stage)
    for name, off in OWN_DEVICE.items():
        value = getattr(config, name)
        if value != off and (name, value) != (
            "device",
            "cpu",
        ):  # "no GPU here", as configs that run anywhere say, is true
            raise ValueError(
                f"{name} is {value!r}, and a server decides itself what it loads, and how. Set {name} to {json.dumps(off)}, "
                "start the server so, and give the name that it serves the model under as model_name_or_path."
            )
    engine = OpenAIEngine(config.model_name_or_path, config.server, revision=config.model_revision)
    if set(needs) - engine.capabilities:
        raise _refusal(f"{stage} needs a forced start of the answer (prefix), which", owner=engine.server.owner)
    return engine


def _completion(request: Request, answer: Answer | str) -> Completion:
    """A completion as the transformers engine gives it: blanks at the join as they read well, cut at a sentence if asked for."""
    if isinstance(answer, str):
        return Completion(request.id, "", finish_reason="error", error=f"request {request.id}: {answer}")
    joined = request.prefix and not request.prefix[-1].isspace()
    text = answer.text if joined else answer.text.lstrip()
    if request.stop_at_sentence and (cut := certain_sentence(request.prefix, text)) is not None:
        return Completion(request.id, cut, finish_reason="sentence")
    ids, end, ended = answer.token_ids, None, answer.finish_reason == "stop"
    if ids and ended:
        ids, end = ids[:-1], ids[-1]
    counted = 0 if ids else max(0, answer.new_tokens - ended)
    return Completion(
        request.id, text, token_ids=ids, finish_reason=answer.finish_reason, end_token=end, counted=counted
    )


def _seed(request: Request) -> int:
    """Seed of a request in 31 bits, which every server takes."""
    return row_seed(request.seed, request.id) % 2**31


def _check_settings(settings: ServerConfig) -> None:
    for name, least in (("concurrency", 1), ("requests_per_minute", 0), ("max_retries", 0)):
        if (value := getattr(settings, name)) < least:
            raise ValueError(f"server.{name} is {value}; give {least} or more.")
    if settings.timeout <= 0:
        raise ValueError(f"server.timeout is {settings.timeout:g}; give the seconds until a request counts as failed.")


def _check_name(model: str) -> None:
    if model.startswith("~") or PurePosixPath(model).is_absolute() or PureWindowsPath(model).is_absolute():
        raise ValueError(
            f"model_name_or_path is {model!r}, the path that a server calls a model by which was given no name. Every row and "
            "its id would hold it: the same model elsewhere makes other ids, and `prefalign publish` refuses rows with paths. "
            "Start the server with a name (vLLM and SGLang: --served-model-name, llama.cpp: --alias), and give that."
        )


def _refusal(what: str, *, owner: str | None = None) -> ValueError:
    if owner is None:
        return ValueError(
            f"{what} was asked for, which no server does over OpenAI's protocol. Use `engine: transformers`."
        )
    return ValueError(
        f"{what} a server that calls itself {owner!r} is not known to do: {', '.join(CONTINUES)} are. Use one of these, or "
        "`engine: transformers`."
    )

"""Generation behind one interface: requests in, completions out, batching and ordering inside the engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from prefalign.records import Message

if TYPE_CHECKING:
    import torch
    from PIL import Image

CAPABILITIES = {
    "sample": "draw answers with temperature, top-p and top-k",
    "logprobs": "log-probs of a given answer",
    "prefix": "force the start of the answer",
    "image_mask": "hide a share of the image tokens",
    "contrast": "decode against the same prompt without its picture (M3ID)",
    "attention": "attention of an answer to each image token",
    "first_token": "probabilities of words at the start of an answer",
    "vision_embed": "features of pictures from the model's own vision encoder",
}


@dataclass(frozen=True)
class ImageMask:
    """Hide image tokens from attention: each one is hidden with probability `share`, drawn from `seed`."""

    share: float
    seed: int


@dataclass
class Request:
    """One answer to generate or to score.

    Attributes:
        id: identity; with `seed` it decides the sampling noise, whatever batch the request lands in.
        messages: conversation up to the user turn, one placeholder for each picture.
        images: decoded RGB pictures in the order of their placeholders.
        prefix: forced start of the assistant turn, not part of the completion's text.
        seed: seed of the stage.
        image_mask: hide a share of the image tokens (needs capability `image_mask`).
        stop_at_sentence: end the completion at its first sentence end.
        given: token ids that follow the prompt: earlier answers of a conversation as they were drawn, with the questions between
            them. Not together with `prefix`; the messages end before them.
    """

    id: str
    messages: list[Message]
    images: list[Image.Image]
    prefix: str = ""
    seed: int = 0
    image_mask: ImageMask | None = None
    stop_at_sentence: bool = False
    given: list[int] = field(default_factory=list)


@dataclass
class Contrast:
    """Decoding against the model's own answer without the picture: M3ID (arXiv 2403.14003).

    Attributes:
        decay: lambda, how fast the picture's share fades with each generated token; the correction's weight at token t is
            `exp(decay * (t + offset)) - 1`.
        gate: alpha, the correction acts where the most likely token has a probability below this; above 1 it always does.
        offset: t0, tokens that count as generated before the first.
        max_weight: cap of the weight (not in the paper), which is exponential in t; None: no cap.
        plausible: keep tokens of at least this share of the most likely token's probability (not in the paper); 0 keeps all.
        without: `removed` takes the placeholders out of the other prompt, `hidden` masks the image tokens in it.
    """

    decay: float = 0.02
    gate: float = 0.3
    offset: int = 0
    max_weight: float | None = 10.0
    plausible: float = 0.0
    without: Literal["removed", "hidden"] = "removed"


@dataclass
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        top_p: draw from the likeliest tokens that together have this probability; 1 cuts nothing.
        top_k: draw from so many of the likeliest tokens; 0 cuts nothing.
        repetition_penalty: what the logits of tokens that occurred are divided by (multiplied, if negative); 1: none.
        contrast: decode against the model's own answer without the picture (M3ID); None: plainly.
        attention_layer: measure meanwhile how much of an answer's attention goes to each image token in that decoder layer
            (needs capability `attention`): 0-based, negative from the end, or `middle`; None: not measured.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    contrast: Contrast | None = None
    attention_layer: int | Literal["middle"] | None = None


@dataclass
class Contrasted:
    """What a decoding with `Sampling.contrast` did to an answer.

    Attributes:
        without: `removed` or `hidden`: how the picture was taken away (hidden where the model needs a picture).
        active: share of the answer's tokens that were chosen under the correction.
        dependence: mean over its tokens of how much the picture decides the next one: the Hellinger distance of the distributions
            with and without it, in [0, 1].
    """

    without: str
    active: float
    dependence: float


@dataclass
class Completion:
    """A generated answer.

    Attributes:
        id: the request's id.
        text: new text only, without the forced prefix and special tokens.
        token_ids: new tokens, end-of-sequence excluded; none where a server does not give them.
        finish_reason: `stop` (end of sequence), `sentence`, `length`, or `error`.
        error: why this request alone failed, when `finish_reason` is `error`.
        contrast: what a decoding with `Sampling.contrast` did; None where there was no picture to take away.
        attention: what `Sampling.attention_layer` asked for, of the tokens in `token_ids` that were fed back: what
            `Engine.attention` gives for this completion. None where it was not asked for, or the request failed.
        end_token: id of the end-of-sequence that ended it, of several that may; None where none did.
        counted: how many new tokens a server that gives no ids counted, end-of-sequence excluded.
    """

    id: str
    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "stop"
    error: str | None = None
    contrast: Contrasted | None = None
    attention: ImageAttention | None = field(default=None, compare=False)
    end_token: int | None = field(default=None, compare=False)
    counted: int = field(default=0, compare=False)

    @property
    def length(self) -> int:
        """Number of new tokens, end-of-sequence excluded."""
        return len(self.token_ids) or self.counted


@dataclass
class ImageAttention:
    """Attention of one answer to the image tokens of its prompt, in prompt order.

    Attributes:
        weights: (N,) float32, mean over heads and over the answer's query rows; empty if it could not be measured.
        image: (N,) int64, number of the picture that each token belongs to.
        error: why it could not be measured, or None.
        layer: number of the decoder layer that was read.
    """

    weights: torch.Tensor
    image: torch.Tensor
    error: str | None = None
    layer: int | None = None


@dataclass(frozen=True)
class FirstToken:
    """How likely an answer is to begin with each of some words.

    Attributes:
        probs: by word, the probability of its first token; empty if the request failed.
        error: why the request failed, or None.
    """

    probs: dict[str, float]
    error: str | None = None


class Engine(Protocol):
    """What a stage asks of a generator."""

    capabilities: frozenset[str]
    fingerprint: str

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order."""
        ...

    def logprobs(self, requests: Sequence[Request], answers: Sequence[str | Completion]) -> list[torch.Tensor]:
        """Log-probs of given answers, teacher-forced.

        Returns:
            One float32 tensor of shape (T_i,) per request: a value for each token of the answer and its end-of-turn.
        """
        ...

    def attention(
        self, requests: Sequence[Request], answers: Sequence[str | Completion], *, layer: int | None = None
    ) -> list[ImageAttention]:
        """Attention of given answers to the image tokens of their prompts, in one decoder layer."""
        ...

    def first_token(self, requests: Sequence[Request], words: Sequence[str]) -> list[FirstToken]:
        """Probability that the answer to each request begins with each word: that of the word's first token.

        Returns:
            One for each request, in order, without temperature or penalties; a request that fails is alone in that, and says why.

        Raises:
            ValueError: if two words begin with the same token: a sum over both would count it twice.
        """
        ...


@dataclass
class Usage:
    """What engines of this process were asked for so far; `planner` extrapolates from it.

    Attributes:
        requests: answers generated or scored.
        prompt_tokens: tokens of their prompts, image tokens included, padding not.
        image_tokens: image tokens of their prompts.
        new_tokens: tokens generated, or tokens of answers scored.
    """

    requests: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    new_tokens: int = 0


USAGE = Usage()


def require(
    engine: Engine | type[Engine], needed: Sequence[str], stage: str, *, can: Collection[str] | None = None
) -> None:
    """Raise if an engine lacks a capability that a stage needs.

    Args:
        engine: the engine, or its class where that alone says what it can do.
        needed: capabilities.
        stage: its name, for the message.
        can: what the engine can do with the model at hand, before it is loaded; None: what `engine` says of itself.

    Raises:
        ValueError: names what is missing and an engine that has it.
    """
    missing = sorted(set(needed) - set(engine.capabilities if can is None else can))
    if missing:
        wanted = "; ".join(f"{name} ({CAPABILITIES[name]})" for name in missing)
        name = engine.__name__ if isinstance(engine, type) else type(engine).__name__
        if isinstance(engine, type) and can is None:
            raise ValueError(
                f"{stage} needs {wanted}, which {name} cannot do with any model. Set `engine` to transformers."
            )
        raise ValueError(
            f"{stage} needs {wanted}, which {name} cannot do with this model. Use the transformers engine and a "
            "model that has its pictures among the tokens of its prompt, such as LLaVA or Qwen-VL."
        )

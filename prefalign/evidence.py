"""What a picture says for an answer: log-probs of answers with their picture and without a usable one.

    prior(y)    = log p(y | no usable picture, x)          how likely the text is by itself
    evidence(y) = log p(y | picture, x) - w * prior(y)     w = 1: what seeing the picture adds (pointwise mutual information),
                                                           w = 0: plain log-likelihood

The difference of two answers' evidence judges a pair by the model alone, without knowing what is in the picture; the difference
of their priors tells whether the pair can be told apart without looking. Sums are over the answer's tokens, end of turn included.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from prefalign.engines import Engine, ImageMask, Request, require
from prefalign.records import Pair, message_text, row_seed, user_message, without_images
from prefalign.text import same_answer

if TYPE_CHECKING:
    from PIL import Image

Without = Literal["blank", "noise", "hidden", "removed"]
"""No usable picture: one of its own mean colour, a noised one, image tokens masked, or no picture in the prompt at all."""


@dataclass(frozen=True)
class Answer:
    """Summed log-prob of an answer and its number of tokens, end of turn included. `total` is NaN where it has no score."""

    total: float
    tokens: int


@dataclass(frozen=True)
class Judged:
    """Log-probs of a pair's answers.

    Attributes:
        chosen: the chosen answer with the pair's picture.
        rejected: the rejected answer with the same picture; of a pair whose two answers are one text, that text with
            `rejected_images`.
        chosen_prior: the chosen answer without a usable picture; None where the answers are one text.
        rejected_prior: the rejected answer without a usable picture; None likewise.
    """

    chosen: Answer
    rejected: Answer
    chosen_prior: Answer | None = None
    rejected_prior: Answer | None = None

    @property
    def complete(self) -> bool:
        """Whether every answer has a score."""
        known = (self.chosen, self.rejected, self.chosen_prior, self.rejected_prior)
        return all(answer is None or answer.total == answer.total for answer in known)

    def text_preference(self, average: Literal["sum", "token"] = "sum") -> float | None:
        """By how much the chosen answer is preferred without the picture; None for a pair of pictures with one text."""
        if self.chosen_prior is None or self.rejected_prior is None:
            return None
        if average == "token":
            return (
                self.chosen_prior.total / self.chosen_prior.tokens
                - self.rejected_prior.total / self.rejected_prior.tokens
            )
        return self.chosen_prior.total - self.rejected_prior.total

    def evidence_margin(self, prior_weight: float = 1.0) -> float:
        """evidence(chosen) - evidence(rejected); for a pair of pictures with one text, of the two pictures."""
        seen = self.chosen.total - self.rejected.total
        return seen - prior_weight * (self.text_preference() or 0.0)


def judge(engine: Engine, pairs: Sequence[tuple[Pair, Sequence[Image.Image], Sequence[Image.Image]]], *,
          without: Without = "blank", seed: int = 0) -> list[Judged]:  # fmt: skip
    """Score both answers of every pair with and without the picture, all in one call of the engine.

    Args:
        engine: who judges; needs `logprobs`, and `image_mask` for `hidden`.
        pairs: each with its decoded `images` and `rejected_images`.
        without: what stands for no usable picture.
        seed: seed of the noise.

    Raises:
        ValueError: if the engine cannot do it.
    """
    require(engine, ["logprobs", *(["image_mask"] if without == "hidden" else [])], "scoring pairs")
    requests: list[Request] = []
    answers: list[str] = []
    counts: list[int] = []
    for pair, images, others in pairs:
        chosen, rejected = message_text(pair.chosen), message_text(pair.rejected)
        true = Request(pair.id, pair.prompt, list(images))
        if others and same_answer(chosen, rejected):
            requests += [true, Request(pair.id, pair.prompt, list(others))]
            answers += [chosen, chosen]
            counts.append(2)
        else:
            spoilt = request_without(true, without, seed=seed)
            requests += [true, true, spoilt, spoilt]
            answers += [chosen, rejected, chosen, rejected]
            counts.append(4)
    scored = (Answer(float(values.sum()), len(values)) for values in engine.logprobs(requests, answers))
    return [Judged(*itertools.islice(scored, count)) for count in counts]


def information_gain(
    engine: Engine, requests: Sequence[Request], answers: Sequence[str], *, without: Without = "blank", seed: int = 0
) -> list[float | None]:
    """What the picture adds to each answer, in nats per token; a score of instruction data that needs no reward model.

    Equation: mean_t [log p(a_t | picture, q, a_<t) - log p(a_t | no usable picture, q, a_<t)], end of turn included.
    Source: the image-text mutual information of ViSA, arXiv 2502.19917, by one model instead of several agents.

    Args:
        engine: who judges; needs `logprobs`, and `image_mask` for `hidden`.
        requests: the questions with their pictures.
        answers: an answer to each.
        without: what stands for no usable picture.
        seed: seed of the noise.

    Returns:
        One value for each answer; None where it cannot be scored or there is no picture to add anything.
    """
    require(engine, ["logprobs", *(["image_mask"] if without == "hidden" else [])], "information gain")
    blind = [request_without(request, without, seed=seed) for request in requests]
    scored = engine.logprobs([*requests, *blind], [*answers, *answers])
    gains = (
        float(seen.mean() - prior.mean())
        for seen, prior in zip(scored[: len(requests)], scored[len(requests) :], strict=True)
    )
    return [
        None if math.isnan(gain) or not request.images else gain for request, gain in zip(requests, gains, strict=True)
    ]


@dataclass
class ClaimConfig:
    """How an answer is taken apart into claims, and how each is put to the verifier.

    Attributes:
        patterns: regular expressions; every match in an answer is a claim, its named groups fill the templates. The template's
            `{claim}` begins in lower case, its `{Claim}` with a capital, whatever the group is called.
        question: what the verifier is asked with the pair's pictures.
        supported: the reply that supports the claim.
        refuted: the reply that speaks against it; empty: the supporting reply is judged by its own log-prob.
        threshold: log p(supported) - log p(refuted) at which a claim is as likely to be there as not (nats).
    """

    patterns: list[str] = field(default_factory=lambda: [r"(?P<claim>[^.!?]+[.!?])"])
    question: str = 'Is this statement true of the picture? "{Claim}" Answer with yes or no.'
    supported: str = "Yes"
    refuted: str = "No"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if not re.compile(pattern).groupindex:
                raise ValueError(
                    f"claim pattern {pattern!r} has no named group, so no question can be made of what it finds. Write the "
                    "claim as (?P<claim>...)."
                )

    def of(self, answer: str) -> list[dict[str, str]]:
        """The claims of an answer: what fills the templates."""
        found = (match.groupdict(default="") for pattern in self.patterns for match in re.finditer(pattern, answer))
        return [
            {key: text for name, value in groups.items() for key, text in _both_cases(name, value.strip())}
            for groups in found
        ]


def _both_cases(name: str, text: str) -> list[tuple[str, str]]:
    return [(name.lower(), text[:1].lower() + text[1:]), (name.capitalize(), text[:1].upper() + text[1:])]


def unsupported_claims(
    engine: Engine, pairs: Sequence[tuple[Pair, Sequence[Image.Image]]], claims: ClaimConfig
) -> list[tuple[float, float] | None]:
    """How many claims of the chosen and of the rejected answer the verifier expects not to be in the picture.

    A claim counts with the probability that it is refuted, `1 / (1 + exp(log p(supported) - log p(refuted) - threshold))`.

    Args:
        engine: who judges; needs `logprobs`. All questions of all pairs go to it together.
        pairs: each with its decoded `images`.
        claims: how claims are found and asked.

    Returns:
        (chosen, rejected) of each pair; None where a claim has no score.

    Source: dividing an answer into claims and counting those that a yes/no question refutes is RLAIF-V's (arXiv 2405.17220).
    There an LLM writes the questions and claims are counted whole; here a template does, and they count by probability.
    """
    requests: list[Request] = []
    answers: list[str] = []
    owners: list[tuple[int, int]] = []
    replies = [claims.supported, *([claims.refuted] if claims.refuted else [])]
    for number, (pair, images) in enumerate(pairs):
        for side, turns in enumerate((pair.chosen, pair.rejected)):
            for filling in claims.of(message_text(turns)):
                asked = [user_message(claims.question.format_map(filling), len(images))]
                for reply in replies:
                    requests.append(Request(f"{pair.id}/{len(requests)}", asked, list(images)))
                    answers.append(reply.format_map(filling))
                owners.append((number, side))
    values = [float(tokens.sum()) for tokens in engine.logprobs(requests, answers)]
    counts = [[0.0, 0.0] for _ in pairs]
    for place, (number, side) in enumerate(owners):
        own = values[place * len(replies) : (place + 1) * len(replies)]
        odds = own[0] - (own[1] if len(own) > 1 else 0.0) - claims.threshold
        counts[number][side] += 0.5 - 0.5 * math.tanh(odds / 2)  # the logistic function of -odds, without overflow
    return [None if math.isnan(chosen + rejected) else (chosen, rejected) for chosen, rejected in counts]


def on_target(pair: Pair) -> Pair:
    """The pair with its target picture alone, where `meta["target_index"]` (from 1, MIA-DPO's) names one of several; else the
    pair as it is. Of the rejected pictures the one at the same place stays.

    A model that looked at the wrong one of several pictures prefers its own answer when it sees them all again. Shown the target
    alone it cannot.
    """
    target = pair.meta.get("target_index")
    if not isinstance(target, int) or not 1 <= target <= len(pair.images) or len(pair.images) < 2:
        return pair
    places = itertools.count(1)
    prompt = [
        {**turn, "content": [block for block in turn["content"] if block["type"] != "image" or next(places) == target]}
        for turn in pair.prompt
    ]
    alone = slice(target - 1, target)
    return dataclasses.replace(
        pair, prompt=prompt, images=pair.images[alone], rejected_images=pair.rejected_images[alone]
    )


def request_without(request: Request, how: Without, *, seed: int = 0) -> Request:
    """The same request with no usable picture."""
    if how == "removed":
        return Request(request.id, without_images(request.messages), [], request.prefix, request.seed)
    if how == "hidden":
        hidden = ImageMask(1.0, 0) if request.images else None
        return Request(request.id, request.messages, request.images, request.prefix, request.seed, hidden)
    images = unusable(request.images, how, identity=request.id, seed=seed)
    return Request(request.id, request.messages, images, request.prefix, request.seed)


def unusable(
    images: Sequence[Image.Image],
    how: Literal["blank", "noise"],
    *,
    identity: str,
    seed: int = 0,
    noise_step: int = 500,
) -> list[Image.Image]:
    """The pictures blanked with their mean colour or drowned in diffusion noise; sizes, and so image tokens, stay.

    Args:
        images: RGB pictures.
        how: which of the two.
        identity: with `seed` and a picture's place in the list it decides the noise.
        seed: seed of the noise.
        noise_step: step of the noise schedule (`corruption.noise_factors`).
    """
    from prefalign.corruption import blank, diffusion_noise

    if how == "blank":
        return [blank(image, colour="mean") for image in images]
    return [
        diffusion_noise(image, step=noise_step, seed=row_seed(seed, f"{identity}/{number}"))
        for number, image in enumerate(images)
    ]

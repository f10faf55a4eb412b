"""Answers that a model would give if it hardly saw the picture: BDHS (arXiv 2407.02477).

Every sentence of the reference answer is begun as it stands and finished by the model while most image tokens are hidden
(or the picture is noised). `datagen/bdhs.py` calls this with a fixed generator; online BDHS calls it with the policy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefalign.corruption import diffusion_noise, noise_factors
from prefalign.engines import Completion, Engine, ImageMask, Request, Sampling, require
from prefalign.records import Message, row_seed
from prefalign.text import Similarity, first_sentence, same_answer, split_inside, split_sentences, swap_yes_no

if TYPE_CHECKING:
    from PIL import Image

_TERMINALS = ".!?\u3002\uff01\uff1f"
_CLOSERS = "\"')]*\u2019\u201d"


@dataclass
class BiasConfig:
    """How the picture is hidden and when an answer counts as corrupted.

    Attributes:
        variant: `attention` hides image tokens from attention at every layer and step; `noise` shows a noised picture.
        rho_th: expected share of image tokens hidden (`attention`); 1 is blind, 0 hides nothing.
        noise_step: step of POVID's schedule (`noise`).
        guided: begin every sentence as the reference does; otherwise the whole answer is drawn freely.
        threshold: an answer less similar to the reference than this is accepted.
        iterations: rounds until an answer is accepted.
        unguided_last: with more than one round, draw the last one without guidance and take it whatever its similarity.
    """

    variant: Literal["attention", "noise"] = "attention"
    rho_th: float = 0.99
    noise_step: int = 500
    guided: bool = True
    threshold: float = 0.97
    iterations: int = 5
    unguided_last: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.rho_th <= 1:
            raise ValueError(f"rho_th {self.rho_th} is a share of image tokens to hide: give a value from 0 to 1 (0.99).")
        if not 0 < self.threshold <= 1.01:
            raise ValueError(
                f"threshold {self.threshold} is a cosine similarity below which an answer is accepted: give a value above 0 "
                "and up to 1 (0.97); 1.01 accepts every answer at once."
            )
        if self.iterations < 1:
            raise ValueError(f"iterations {self.iterations}: at least 1 round is needed to make an answer (5).")
        if self.variant == "noise":
            noise_factors(self.noise_step)


@dataclass
class Item:
    """A question about pictures with its reference answer; `id` and the seed decide every draw."""

    id: str
    messages: list[Message]
    images: list[Image.Image]
    answer: str


@dataclass
class Corrupted:
    """A corrupted answer and how it came about.

    Attributes:
        text: the answer.
        guided: whether sentences were begun as the reference's.
        iteration: round it was made in, from 1.
        split_points: per sentence, how many of its characters were forced (empty when unguided).
        yesno_swapped: indices of sentences whose leading yes or no was turned around.
        picture_seed: seed of the attention mask or of the noise.
        similarity: to the reference.
        empty: a completion came back without text.
        error: why the generator failed on it.
    """

    text: str
    guided: bool
    iteration: int
    split_points: list[int] = field(default_factory=list)
    yesno_swapped: list[int] = field(default_factory=list)
    picture_seed: int = 0
    similarity: float = 1.0
    empty: bool = False
    error: str | None = None


@dataclass
class _Piece:
    """One sentence of a reference answer on its way: blanks before, forced head, original ending and blanks after."""

    before: str
    head: str
    gap: str
    ending: str
    after: str
    request: Request | None


def corrupted_answers(
    engine: Engine,
    items: Sequence[Item],
    bias: BiasConfig,
    sampling: Sampling,
    similarity: Similarity,
    *,
    seed: int,
) -> list[Corrupted]:
    """A corrupted answer for each item: BDHS algorithm 1, over all items at once.

    Each round draws a new mask and new split points for the items not yet accepted, and asks the engine for all their
    sentences in one call. An item is accepted when no completion was empty and its similarity to the reference is below
    `bias.threshold`; what the last round gives is returned whatever its similarity, so a caller still drops empty, identical
    and failed answers (`rejection`).

    Args:
        engine: generator; needs `sample`, `prefix` when guided, `image_mask` for the attention variant.
        items: questions with pictures and reference answers.
        bias: how pictures are hidden and answers accepted.
        sampling: how answers are drawn.
        similarity: compares whole answers.
        seed: seed of the stage or of the training step.

    Returns:
        One result per item, in order.

    Raises:
        ValueError: if the engine lacks a capability.
    """
    needed = ["sample", *(["prefix"] if bias.guided else []), *(["image_mask"] if bias.variant == "attention" else [])]
    require(engine, needed, "BDHS")
    results: dict[int, Corrupted] = {}
    waiting = list(range(len(items)))
    for iteration in range(1, bias.iterations + 1):
        if not waiting:
            break
        last = iteration == bias.iterations
        guided = bias.guided and not (last and iteration > 1 and bias.unguided_last)
        draw = guided_completions if guided else free_completions
        drawn = draw(engine, [items[index] for index in waiting], bias, sampling, seed=seed, iteration=iteration)
        scores = similarity([items[index].answer for index in waiting], [answer.text for answer in drawn])
        still = []
        for index, answer, score in zip(waiting, drawn, scores, strict=True):
            answer.similarity = score
            results[index] = answer
            if answer.empty or score >= bias.threshold:
                still.append(index)
        waiting = still
    return [results[index] for index in range(len(items))]


def rejection(item: Item, answer: Corrupted) -> str | None:
    """Why an answer cannot serve as the rejected one: `generation_failed`, `empty_rejected`, `identical_answers`, or None."""
    if answer.error is not None:
        return "generation_failed"
    if not answer.text.strip():
        return "empty_rejected"
    return "identical_answers" if same_answer(item.answer, answer.text) else None


def guided_completions(
    engine: Engine, items: Sequence[Item], bias: BiasConfig, sampling: Sampling, *, seed: int, iteration: int = 1
) -> list[Corrupted]:
    """Finish every sentence of every reference answer with the picture hidden: all sentences of all items in one call.

    Sentence k is asked for with the ORIGINAL sentences 1..k-1 and the head of sentence k as the forced start of the answer, so
    sentences do not depend on one another. A leading yes or no is turned around with probability one half. What comes back is
    cut at its first sentence end and gets the terminal punctuation and the blanks of the original sentence.

    Args:
        engine: generator with `prefix` (and `image_mask` for the attention variant).
        items: questions with pictures and reference answers.
        bias: variant and its strength.
        sampling: how completions are drawn.
        seed: seed of the stage or of the training step.
        iteration: number of the round; another round draws other masks, split points, swaps and completions.

    Returns:
        One result per item, in order, `similarity` not yet filled in.

    Source: BDHS section 3.4.2, equation 7, algorithm 1.
    Departures: positions are between words (the paper says random); a sentence of one word is drawn afresh, or only turned
    around; the end of a sentence is a full stop that white space follows, not any full stop.
    """
    results, pieces = [], []
    for item in items:
        rng = random.Random(row_seed(seed, f"{item.id}/{iteration}/split"))
        result = Corrupted("", True, iteration, picture_seed=row_seed(seed, f"{item.id}/{iteration}/picture"))
        shown = _shown(item, bias, result.picture_seed)
        results.append(result)
        pieces.append(_pieces(item, result, rng, {**shown, "seed": seed}))
    requests = [piece.request for row in pieces for piece in row if piece.request is not None]
    completions = _generate(engine, requests, sampling)
    for result, row in zip(results, pieces, strict=True):
        result.text = "".join(_finished(piece, completions, result) for piece in row)
    return results


def free_completions(
    engine: Engine, items: Sequence[Item], bias: BiasConfig, sampling: Sampling, *, seed: int, iteration: int = 1
) -> list[Corrupted]:
    """A whole answer to every question with the picture hidden and no guidance; arguments as in `guided_completions`."""
    results, requests = [], []
    for item in items:
        result = Corrupted("", False, iteration, picture_seed=row_seed(seed, f"{item.id}/{iteration}/picture"))
        shown = _shown(item, bias, result.picture_seed)
        results.append(result)
        requests.append(Request(id=f"{item.id}/{iteration}", messages=item.messages, seed=seed, **shown))
    completions = _generate(engine, requests, sampling)
    for result, request in zip(results, requests, strict=True):
        completion = completions[request.id]
        result.text = completion.text.strip()
        result.error = completion.error
        result.empty = not result.text
    return results


def _shown(item: Item, bias: BiasConfig, picture_seed: int) -> dict[str, Any]:
    """The picture side of an item's requests: one mask, or one noised picture, for all its sentences."""
    if bias.variant == "attention":
        return {"images": item.images, "image_mask": ImageMask(bias.rho_th, picture_seed)}
    noised = [
        diffusion_noise(image, seed=picture_seed + number, step=bias.noise_step) for number, image in enumerate(item.images)
    ]
    return {"images": noised}


def _pieces(item: Item, result: Corrupted, rng: random.Random, shown: dict[str, Any]) -> list[_Piece]:
    """Cut an answer into sentences, each with its request; note swaps and split points in `result`."""
    pieces = []
    earlier = ""
    for number, part in enumerate(split_sentences(item.answer)):
        original = part.strip()
        before = part[: len(part) - len(part.lstrip())]
        after = part[len(part.rstrip()) :] if original else ""
        swapped = swap_yes_no(original) if rng.random() >= 0.5 else None
        sentence = original if swapped is None else swapped
        if swapped is not None:
            result.yesno_swapped.append(number)
        head, tail = split_inside(sentence, rng)
        result.split_points.append(len(head))
        ending = sentence[len(_without_ending(sentence)) :]
        request = None
        if not original or (swapped is not None and not head):
            head, ending = sentence, ""
        else:
            prefix = earlier + before + head if head else (earlier + before).rstrip(" \t")
            request = Request(f"{item.id}/{iteration_of(result)}/{number}", item.messages, prefix=prefix,
                              stop_at_sentence=True, **shown)  # fmt: skip
        pieces.append(_Piece(before, head, tail[: len(tail) - len(tail.lstrip())], ending, after, request))
        earlier += part
    return pieces

"""Answers that a model would give if it hardly saw the picture: BDHS (arXiv 2407.02477).

Every sentence of the reference answer is begun as it stands and finished by the model while most image tokens are hidden
(or the picture is noised). `datagen/bdhs.py` calls this with a fixed generator; online BDHS calls it with the policy.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from prefalign import stages
from prefalign.corruption import diffusion_noise, noise_factors
from prefalign.engines import Completion, Engine, ImageMask, Request, Sampling, require
from prefalign.records import Message, Pair, assistant_message, message_text, row_seed
from prefalign.store import Failed
from prefalign.text import Similarity, first_sentence, same_answer, split_inside, split_sentences, swap_yes_no

if TYPE_CHECKING:
    from PIL import Image

_ENDING = re.compile("[.!?\u3002\uff01\uff1f]+[\"')\\]*\u2019\u201d]*$")


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
            raise ValueError(
                f"rho_th {self.rho_th} is a share of image tokens to hide: give a value from 0 to 1 (0.99)."
            )
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold {self.threshold} is the cosine similarity below which an answer is accepted; outside (0, 1] all "
                "or none would be. Give 0.97, as published."
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
        finish_reason: `stop`, or `length` if an unguided answer was cut off by the limit on its tokens (a guided sentence gets
            the original's ending, wherever the limit fell).
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
    finish_reason: Literal["stop", "length"] = "stop"
    error: str | None = None


@dataclass
class _Piece:
    """One sentence of a reference answer on its way: `head` is its forced start, or all of it when `settled`.

    `prefix` is what the answer is forced to start with; `before`, `gap` and `after` are the original's blanks before the
    sentence and at the cut, and its terminal punctuation with the blanks that follow.
    """

    prefix: str
    head: str
    before: str = ""
    gap: str = ""
    after: str = ""
    settled: bool = False


def needs(bias: BiasConfig) -> list[str]:
    """What an engine must be capable of."""
    return ["sample", *(["prefix"] if bias.guided else []), *(["image_mask"] if bias.variant == "attention" else [])]


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
    sentences in one call. An item is accepted when no completion was empty or cut off and its similarity to the reference is
    below `bias.threshold`; one that the generator refuses is given up at once. What the last round gives is returned whatever its
    similarity, so a caller still drops empty, cut off, identical and failed answers (`rejection`).

    Departure: the paper does not say what becomes of a completion that reaches the limit; kept as a rejected answer it would
    teach to avoid answers that stop in mid-sentence.

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
    require(engine, needs(bias), "BDHS")
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
            broken = answer.empty or answer.finish_reason == "length"
            if answer.error is None and (broken or score >= bias.threshold):
                still.append(index)
        waiting = still
    return [results[index] for index in range(len(items))]


def regenerated(
    engine: Engine,
    pairs: Sequence[Pair],
    bias: BiasConfig,
    sampling: Sampling,
    similarity: Similarity,
    *,
    seed: int,
    round: int,
) -> list[Pair]:
    """The same pairs with rejected answers drawn anew from the policy as it is now: online BDHS (arXiv 2407.02477, section 3.4).

    Put the engine on the model in training (`TransformersEngine(trainer.model, processor)`): it is set to eval mode for the call
    and back, and no gradient is kept. Call it with a block of pairs (64, say): the pictures of all of them are decoded at once.

    Args:
        engine: generator on the current policy; needs what `corrupted_answers` needs.
        pairs: pairs on their own pictures; the chosen answer is what sentences are begun with.
        bias: how pictures are hidden and answers accepted.
        sampling: how answers are drawn.
        similarity: compares whole answers.
        seed: seed of the run.
        round: number of the regeneration (epoch or step); another one draws other masks, split points and words.

    Returns:
        One pair for each, in order, with the same id. A pair that gives no usable answer (`rejection`, or a picture that cannot
        be opened) keeps the one it has and all that `meta` says of it. `meta["round_tried"]` is `round` for all;
        `meta["round"]` says in which round the answer was drawn, `meta["online"]` that it was.

    Raises:
        ValueError: if the engine lacks a capability.
    """
    opened = [stages.opened(pair.images) for pair in pairs]
    items = {
        index: Item(pair.id, pair.prompt, images, message_text(pair.chosen))
        for index, (pair, images) in enumerate(zip(pairs, opened, strict=True))
        if not isinstance(images, Failed)
    }
    answers = corrupted_answers(engine, list(items.values()), bias, sampling, similarity,
                                seed=row_seed(seed, f"round {round}"))  # fmt: skip
    result = [replace(pair, meta={**pair.meta, "round_tried": round}) for pair in pairs]
    for (index, item), answer in zip(items.items(), answers, strict=True):
        if rejection(item, answer) is None:
            meta = {**result[index].meta, "online": True, "round": round, "guided": answer.guided,
                    "iteration_accepted": answer.iteration, "similarity": answer.similarity}  # fmt: skip
            result[index] = replace(pairs[index], rejected=[assistant_message(answer.text)], meta=meta)
    return result


def rejection(item: Item, answer: Corrupted) -> str | None:
    """Why an answer cannot serve as the rejected one; None if it can.

    Returns:
        `generation_failed`; `empty_rejected` (no text at all); `empty_completion` (a sentence to which nothing was added);
        `cut_off` (an unguided answer reached its limit); `identical_answers`.
    """
    if answer.error is not None:
        return "generation_failed"
    if not answer.text.strip():
        return "empty_rejected"
    if answer.empty:
        return "empty_completion"
    if answer.finish_reason == "length":
        return "cut_off"
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
        results.append(result)
        pieces.append(_cut(item.answer, result, rng))
    requests = []
    for item, result, row in zip(items, results, pieces, strict=True):
        shown = _shown(item, bias, result.picture_seed)
        requests += [
            Request(
                f"{item.id}/{iteration}/{number}",
                item.messages,
                prefix=piece.prefix,
                seed=seed,
                stop_at_sentence=True,
                **shown,
            )
            for number, piece in enumerate(row)
            if not piece.settled
        ]
    completions = iter(engine.generate(requests, sampling) if requests else [])
    for result, row in zip(results, pieces, strict=True):
        result.text = "".join(
            piece.head if piece.settled else _finished(piece, next(completions), result) for piece in row
        )
    return results


def free_completions(
    engine: Engine, items: Sequence[Item], bias: BiasConfig, sampling: Sampling, *, seed: int, iteration: int = 1
) -> list[Corrupted]:
    """A whole answer to every question with the picture hidden and no guidance; arguments as in `guided_completions`."""
    results, requests = [], []
    for item in items:
        result = Corrupted("", False, iteration, picture_seed=row_seed(seed, f"{item.id}/{iteration}/picture"))
        results.append(result)
        shown = _shown(item, bias, result.picture_seed)
        requests.append(Request(f"{item.id}/{iteration}", item.messages, seed=seed, **shown))
    for result, completion in zip(results, engine.generate(requests, sampling), strict=True):
        result.text = completion.text.strip()
        result.error = completion.error
        result.empty = not result.text
        if completion.finish_reason == "length":
            result.finish_reason = "length"
    return results


def _shown(item: Item, bias: BiasConfig, picture_seed: int) -> dict[str, Any]:
    """The picture side of an item's requests: one mask, or one set of noised pictures, for all its sentences."""
    if bias.variant == "attention":
        return {"images": item.images, "image_mask": ImageMask(bias.rho_th, picture_seed)}
    noised = [
        diffusion_noise(image, seed=picture_seed + number, step=bias.noise_step)
        for number, image in enumerate(item.images)
    ]
    return {"images": noised}


def _cut(answer: str, result: Corrupted, rng: random.Random) -> list[_Piece]:
    """Cut an answer into sentences with their forced starts; note swaps and split points in `result`."""
    pieces = []
    earlier = ""
    for number, part in enumerate(split_sentences(answer)):
        original = part.strip()
        before, after = part.split(original, 1) if original else (part, "")
        swapped = swap_yes_no(original) if rng.random() >= 0.5 else None
        sentence = original if swapped is None else swapped
        if swapped is not None:
            result.yesno_swapped.append(number)
        head, tail = split_inside(sentence, rng)
        result.split_points.append(len(head))
        if not original or (swapped is not None and not head):
            pieces.append(_Piece("", before + sentence + after, settled=True))
        else:
            # a start that ends in a blank would be tokenised apart from the word that follows it
            prefix = (earlier + before + head) if head else (earlier + before).rstrip(" \t")
            gap = tail[: len(tail) - len(tail.lstrip())]
            pieces.append(
                _Piece(prefix, head, before=before, gap=gap, after=sentence[len(_without_ending(sentence)) :] + after)
            )
        earlier += part
    return pieces


def _finished(piece: _Piece, completion: Completion, result: Corrupted) -> str:
    """Head and completion as one sentence with the original's ending; note failure and emptiness in `result`."""
    result.error = result.error or completion.error
    new = completion.text
    if piece.head and new[:1].isspace():
        new = piece.gap + new.lstrip()
    whole = first_sentence(piece.head + new)
    if len(whole) <= len(piece.head):
        whole = piece.head + first_sentence(new)
    body = _without_ending(whole.strip())
    result.empty = result.empty or not new.strip() or not body
    return piece.before + body + piece.after


def _without_ending(sentence: str) -> str:
    """A sentence without its terminal punctuation and the closing quotes after it."""
    return _ENDING.sub("", sentence)

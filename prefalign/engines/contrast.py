"""Decoding against the model's own answer without the picture: M3ID (Favero et al., CVPR 2024, arXiv 2403.14003).

A model is taken to mix what it sees with what it would say blind, and the blind share to grow with every token it has written.
Solved for what it sees, at generated token t (counted from 0):

    w_t   = exp(decay * (t + offset)) - 1
    score = l_c + [max l_c < log(gate)] * w_t * (l_c - l_u)

`l_c` and `l_u` are log-probs with and without the picture. No code was released. Additions, both settings of `Contrast`: a cap of
the weight, which is exponential in t, and a plausibility cut as in contrastive decoding.

Legend of shapes: `B` rows of a batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

from prefalign import families
from prefalign.engines import USAGE, Completion, Contrast, Contrasted, Request
from prefalign.engines.sampling import ban
from prefalign.engines.stopping import Batch
from prefalign.records import Message, user_message, without_images

if TYPE_CHECKING:
    from prefalign.engines.transformers import TransformersEngine

_LARGEST_EXPONENT = 80.0  # float32 ends near exp(88)

_log = logging.getLogger(__name__)


def weight(contrast: Contrast, step: int) -> float:
    """The correction's weight at generated token `step`, counted from 0."""
    grown = math.expm1(min(contrast.decay * (step + contrast.offset), _LARGEST_EXPONENT))
    return grown if contrast.max_weight is None else min(grown, contrast.max_weight)


def corrected(
    seeing: torch.Tensor, blind: torch.Tensor, contrast: Contrast, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of the next token, corrected for what the model would say without the picture.

    Args:
        seeing: (B, V) float32 logits with the picture, before temperature and penalties; tokens that cannot be said at -inf.
        blind: (B, V) float32 logits without it.
        contrast: the settings.
        step: number of the generated token, from 0.

    Returns:
        Scores (B, V): `seeing` where nothing is corrected, else the method's score plus a constant of the row (so that a
        repetition penalty finds logits on their usual scale); whether a row was corrected (B,) bool; and how much the picture
        decides the next token (B,): the Hellinger distance of the two distributions, in [0, 1] (the paper's PDM-H).
    """
    log_seeing, log_blind = seeing.log_softmax(-1), blind.log_softmax(-1)
    top = log_seeing.amax(-1, keepdim=True)
    strength = weight(contrast, step)
    unsure = top.exp() < contrast.gate
    apart = torch.where(log_seeing.isneginf() | log_blind.isneginf(), 0.0, log_seeing - log_blind)
    scores = seeing + strength * apart
    if contrast.plausible > 0:
        scores = scores.masked_fill(log_seeing < top + math.log(contrast.plausible), float("-inf"))
    active = unsure & (strength > 0)
    distance = ((log_seeing / 2).exp() - (log_blind / 2).exp()).square().sum(-1).div(2).sqrt()
    return torch.where(active, scores, seeing), active.squeeze(-1), distance


class BlindBranch(LogitsProcessor):
    """The same rows without their pictures, run beside `generate` with a cache of their own; first in the list of processors.

    Each step costs one more forward pass of one token; nothing is computed twice.

    Args:
        model: the model under its wrappers.
        batch: the prompts without pictures, left-padded on their own.
        contrast: the settings.
        way: `removed` or `hidden`: how the pictures were taken away.
        banned: tokens that no answer holds.
        words: size of the tokenizer's vocabulary.
        width: length of the padded prompts with pictures.
    """

    def __init__(
        self, model: Any, batch: Batch, contrast: Contrast, way: str, *, banned: list[int], words: int, width: int
    ) -> None:
        self.model = model
        self.batch = batch
        self.contrast = contrast
        self.way = way
        self.banned = banned
        self.words = words
        self.width = width
        self.cache: Any = None
        self.mask = batch.tensors["attention_mask"]
        self.positions = batch.tensors["position_ids"]
        self.active: list[torch.Tensor] = []
        self.distances: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        blind = self._next(input_ids[:, -1:]).to(scores.device)
        seeing, blind = (ban(values, self.banned, self.words) for values in (scores, blind))
        scores, active, distance = corrected(seeing, blind, self.contrast, step)
        self.active.append(active)
        self.distances.append(distance)
        return scores

    def _next(self, chosen: torch.Tensor) -> torch.Tensor:
        """(B, V) float32 logits after the prompt, then after each chosen token (B, 1)."""
        if self.cache is None:
            out = self.model(**self.batch.tensors, use_cache=True, logits_to_keep=1)
        else:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
            self.positions = self.positions[..., -1:] + 1
            out = self.model(
                input_ids=chosen,
                attention_mask=self.mask,
                position_ids=self.positions,
                past_key_values=self.cache,
                use_cache=True,
            )
        self.cache = out.past_key_values
        return out.logits[:, -1].to(torch.float32, copy=True)

    def note(self, completions: Sequence[Completion]) -> None:
        """Write into each completion how often it was corrected and how much the picture decided; count the tokens spent."""
        active, distances = torch.stack(self.active, 1).cpu(), torch.stack(self.distances, 1).cpu()
        for row, completion in enumerate(completions):
            size = len(completion.token_ids)
            if size:
                completion.contrast = Contrasted(
                    self.way, active[row, :size].float().mean().item(), distances[row, :size].mean().item()
                )
        USAGE.prompt_tokens += sum(self.batch.lengths)
        USAGE.image_tokens += sum(self.batch.image_tokens)
        USAGE.new_tokens += sum(len(completion.token_ids) for completion in completions)


def blind_branch(engine: TransformersEngine, batch: Batch, contrast: Contrast, width: int) -> BlindBranch:
    """The branch of a batch whose rows have pictures; see `way_without` for how they are taken away."""
    way = way_without(engine, contrast.without)
    if way == "hidden":
        mask = batch.tensors["attention_mask"]
        pieces = families.image_token_mask(batch.tensors["input_ids"], engine.config)
        hidden = {**batch.tensors, "attention_mask": mask.masked_fill(pieces, 0)}
        blind = Batch(batch.rows, hidden, batch.lengths, batch.image_tokens)
    else:
        requests = [row.request for row in batch.rows]
        blind = engine.encode(
            [replace(one, messages=text_only(one.messages), images=[], image_mask=None) for one in requests]
        )
        assert len(blind.rows) == len(batch.rows), "a prompt that fits with its pictures fits without them"
    return BlindBranch(families.core(engine.model), blind, contrast, way,
                       banned=engine.banned, words=len(engine.tokenizer), width=width)  # fmt: skip


def way_without(engine: TransformersEngine, wanted: str) -> str:
    """How the picture is taken away: `removed` if that is wanted and the model can be asked without a picture, else `hidden`.

    PaliGemma's processor refuses a prompt without a picture. There the image tokens stay and are masked, so positions are those
    of the prompt with its picture; `Completion.contrast.without` says which it was.
    """
    return "hidden" if wanted == "removed" and not engine.reads_text_alone else wanted


def text_alone_works(engine: TransformersEngine) -> bool:
    """Whether processor and model take a prompt without a picture, found by asking one; said in the log if not."""
    batch = engine.encode([Request("text alone", [user_message("?")], [])])
    try:
        if batch.rows:
            with torch.no_grad():
                families.core(engine.model)(**batch.tensors, use_cache=False)
            return True
    except (ValueError, TypeError, AttributeError):
        pass
    _log.warning(
        "a %s cannot be asked without a picture, so its image tokens are hidden where they should be removed",
        engine.config.model_type,
    )
    return False


def text_only(messages: Sequence[Message]) -> list[Message]:
    """The conversation without pictures; a turn that was nothing but pictures keeps an empty text, which templates expect."""
    return [{**turn, "content": turn["content"] or [{"type": "text", "text": ""}]} for turn in without_images(messages)]

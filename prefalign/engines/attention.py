"""How much of an answer's attention goes to each image token, read from one decoder layer.

`generate(output_attentions=True)` needs the eager kernel and keeps a (heads, T, T) map for every layer. Here one pass
over prompt and given answer runs SDPA up to the layer asked for, computes there the rows of the answer only, and stops. Queries
and keys arrive after rotary positions and norms, so nothing depends on the family of the model. An answer that is yet to be drawn
costs less if it is watched meanwhile (`watching.py`).

Legend of shapes: `B` rows of a batch, `T` tokens, `A` last tokens that hold every row's answer, `H` heads, `K` key heads, `D`
width of a head, `N` image tokens of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefalign import families
from prefalign.engines import USAGE, Completion, ImageAttention, Request
from prefalign.engines.stopping import Batch, Row

if TYPE_CHECKING:
    from prefalign.engines.transformers import TransformersEngine

KERNEL = "prefalign_probe"
_MAPPED = ("full_attention", "sliding_attention", "chunked_attention")
_CHUNK_BYTES = 2**24


@dataclass
class _Probe:
    """What is asked of the layer, and what it answered: `asked` (B, A) bool query rows, `weights` (B, T) their mean."""

    layer: int
    asked: torch.Tensor
    weights: torch.Tensor | None = None


class _LayerReached(Exception):
    """Raised inside the forward pass once the layer has been read: nothing above it is needed."""


_ACTIVE: ContextVar[_Probe] = ContextVar("prefalign_probe")


def layer_number(config: Any, layer: int | None) -> int:
    """The decoder layer to read, counted from 0.

    Args:
        config: the model's config.
        layer: 0-based, negative from the end. None: the middle one, `num_layers // 2` (the published 16 of 32), or the nearest to
            it that attends to the whole prompt, where others see a window or keep a running state.

    Raises:
        ValueError: if there is no such layer, or it has no attention map.
    """
    text = config.get_text_config()
    count = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * count
    if layer is None:
        whole = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        return min(whole or range(count), key=lambda index: (abs(index - count // 2), -index))
    if not -count <= layer < count:
        raise ValueError(
            f"attention layer {layer} is outside the decoder, whose {count} layers are numbered 0 to {count - 1}. Take one of "
            f"them, or none for the middle one."
        )
    number = layer % count
    if kinds[number] not in _MAPPED:
        mapped = [index for index, kind in enumerate(kinds) if kind in _MAPPED]
        raise ValueError(
            f"attention layer {number} of this {text.model_type} is of type {kinds[number]!r} and has no attention map: nothing "
            f"says how much of it goes to a picture. Take one of the layers {mapped}."
        )
    return number


def readable_layer(engine: TransformersEngine, layer: int | str | None) -> int:
    """What `layer_number` gives, of a model whose attention to a picture can be read; `middle` is what None is there.

    Raises:
        ValueError: besides, if the model's pictures are not among the tokens of its prompt.
    """
    if "attention" not in engine.capabilities:
        raise ValueError(
            f"attention to image tokens cannot be read from a {engine.config.model_type}, whose pictures are not among the "
            "tokens of the prompt. Use a model that has them there, such as LLaVA or Qwen-VL."
        )
    return layer_number(engine.config, None if layer is None or layer == "middle" else int(layer))


def measure(
    engine: TransformersEngine, requests: Sequence[Request], answers: Sequence[str | Completion], layer: int | None
) -> list[ImageAttention]:
    """What `TransformersEngine.attention` gives, whose docstring says what that is."""
    number = readable_layer(engine, layer)
    failed: dict[int, Completion] = {}
    found: dict[int, ImageAttention] = {}
    for batch in engine.batches(requests, answers, failed, score=True):
        with engine.inference() as model:
            read = _read_layer(engine, model, batch, number)
        batch.count(USAGE)
        found.update(zip((row.index for row in batch.rows), read, strict=True))
    refused = {index: unmeasured(str(completion.error)) for index, completion in failed.items()}
    return [found.get(index) or refused[index] for index in range(len(requests))]


def _read_layer(engine: TransformersEngine, model: Any, batch: Batch, layer: int) -> list[ImageAttention]:
    """Attention of the answers of a batch to the image tokens of their prompts.

    Args:
        engine: the engine that made the batch.
        model: its bare model, in eval mode and without gradients.
        batch: rows whose tail is the answer, teacher-forced.
        layer: number of a decoder layer, from `layer_number`.

    Returns:
        One for each row, on the CPU.

    Raises:
        ValueError: if the layer does not go through transformers' attention interface.
    """
    longest = max(len(row.tail) for row in batch.rows)
    asked = torch.zeros(len(batch.rows), longest, dtype=torch.bool)
    for index, row in enumerate(batch.rows):
        start = longest - len(row.tail) + row.given
        asked[index, start : start + fed_back(row, engine.ends)] = True
    probe = _Probe(layer, asked)
    if asked.any():
        with _probing(model, probe), suppress(_LayerReached):
            model(**batch.tensors, logits_to_keep=1, use_cache=False)
        if probe.weights is None:
            raise out_of_reach(engine, layer)
    pieces = families.image_token_mask(batch.tensors["input_ids"], engine.config).cpu()
    found = []
    for index, row in enumerate(batch.rows):
        weights = None
        if probe.weights is not None and asked[index].any():
            weights = probe.weights[index, pieces[index]]
        found.append(of_request(engine, row.request, weights, int(pieces[index].sum()), layer))
    return found


def out_of_reach(engine: TransformersEngine, layer: int) -> ValueError:
    """The error for a decoder layer that calls no function of the interface."""
    return ValueError(
        f"decoder layer {layer} of this {engine.config.model_type} does not go through transformers' attention "
        "interface, so its attention cannot be read. Take another layer, or a model whose attention does."
    )


def fed_back(row: Row, ends: list[int]) -> int:
    """How many tokens of a row's answer were queries: those before its end-of-sequence, or before its last token.

    The last token of an answer is drawn and never fed back. (The released code reads all rows where this gives none.)
    """
    answer = row.tail[row.given :]
    return next((place for place, token in enumerate(answer) if token in ends), max(0, len(answer) - 1))


def of_request(
    engine: TransformersEngine, request: Request, weights: torch.Tensor | None, count: int, layer: int
) -> ImageAttention:
    """What was read, told apart by picture.

    Args:
        engine: the engine whose model was read.
        request: what was asked.
        weights: (N,) float32 on the CPU; None: no token of the answer was a query.
        count: N.
        layer: number of the layer that was read.
    """
    return replace(_by_picture(engine, request, weights, count), layer=layer)


def _by_picture(
    engine: TransformersEngine, request: Request, weights: torch.Tensor | None, count: int
) -> ImageAttention:
    if count == 0:
        return unmeasured(f"request {request.id}: its prompt holds no image token. Give it a picture.")
    if weights is None:
        return unmeasured(
            f"request {request.id}: no token of its answer was fed back to the model (it has a single token or none), so there "
            "is no query whose attention could be read. Leave it out."
        )
    image = _picture_of_tokens(engine, request, count)
    if image is None:
        return unmeasured(
            f"request {request.id}: its {count} image tokens could not be told apart by picture. Show one picture at a time, or "
            "pictures of one size."
        )
    return ImageAttention(weights, image)


def unmeasured(error: str) -> ImageAttention:
    """The result for a request whose attention could not be read, with the reason."""
    return ImageAttention(torch.zeros(0), torch.zeros(0, dtype=torch.int64), error)


def _picture_of_tokens(engine: TransformersEngine, request: Request, count: int) -> torch.Tensor | None:
    """(N,) number of the picture that each image token shows, in the order of the prompt; None if that is not known."""
    sizes = [(image.height, image.width) for image in request.images]
    if len(set(sizes)) == 1 and count % len(sizes) == 0:
        counts = [count // len(sizes)] * len(sizes)
    else:
        counts = families.image_lengths(engine.processor, sizes)
        if sum(counts) != count:
            counts = [families.image_tokens_among_others(engine.processor, engine.config, size) for size in sizes]
        if sum(counts) != count:
            return None
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(counts))


@contextmanager
def _probing(model: Any, probe: _Probe) -> Iterator[None]:
    """The decoder's attention goes through the probe, whatever it was; left afterwards as it was found."""
    # set on the decoder's configs alone: the vision tower keeps its kernel
    configs = {id(config): config for config in (model.config.get_text_config(), model.get_decoder().config)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    token = _ACTIVE.set(probe)
    try:
        for config in configs.values():
            config._attn_implementation_internal = KERNEL
        yield
    finally:
        for config, kernel in before:
            config._attn_implementation_internal = kernel
        _ACTIVE.reset(token)


def probed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA, except in the layer that is read.

    Args:
        module: attention module of a decoder layer.
        query: (B, H, T, D), after rotary positions and norms.
        key: (B, K, T, D).
        value: (B, K, T, D).
        attention_mask: (B, 1, T, T) bool or additive; None: causal.
        scaling: factor of the scores; D**-0.5 if left out.
        softcap: scores are squashed by `tanh` to this (Gemma2), which SDPA cannot do.
        **more: what the family passes besides.

    Raises:
        ValueError: for attention sinks and position biases, which would have to enter the softmax.
    """
    refuse_unknown(more)
    probe = _ACTIVE.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if module.layer_idx == probe.layer:
        probe.weights = _mean_weights(query, key, attention_mask, scale, softcap, probe.asked.to(query.device)).cpu()
        raise _LayerReached
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    step = _chunk(query, key)
    groups = query.shape[1] // key.shape[1]
    parts = []
    for start in range(0, query.shape[2], step):
        rows = slice(start, min(start + step, query.shape[2]))
        weights = row_weights(query[:, :, rows], key, _seen(attention_mask, rows, key), scale, softcap)
        parts.append(weights.to(value.dtype) @ value.repeat_interleave(groups, dim=1))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def refuse_unknown(more: Mapping[str, Any]) -> None:
    """Raise `ValueError` for what a family passes to its attention that would have to enter the softmax."""
    for name in ("s_aux", "position_bias"):
        if more.get(name) is not None:
            raise ValueError(
                f"this model's attention has {name}, which the probe does not know: what it read would be wrong. Use another "
                "model to measure attention."
            )


AttentionInterface.register(KERNEL, probed_attention)
AttentionMaskInterface.register(KERNEL, sdpa_mask)


def _mean_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    asked: torch.Tensor,
) -> torch.Tensor:
    """(B, T) float32: attention to every token, mean over heads and over the rows asked for; zeros where none is."""
    first, length = query.shape[2] - asked.shape[1], query.shape[2]
    total = torch.zeros(query.shape[0], key.shape[2], device=query.device)
    step = _chunk(query, key)
    for start in range(first, length, step):
        rows = slice(start, min(start + step, length))
        weights = row_weights(query[:, :, rows], key, _seen(mask, rows, key), scale, softcap)
        total += torch.einsum("bhat,ba->bt", weights, asked[:, start - first : rows.stop - first].float())
    return total / (query.shape[1] * asked.sum(1, keepdim=True).clamp(min=1))


def _seen(mask: torch.Tensor | None, rows: slice, key: torch.Tensor) -> torch.Tensor:
    """What some query rows of a pass over whole prompts attend to, for `row_weights`."""
    if mask is not None:
        return mask[:, :, rows]
    places = torch.arange(key.shape[2], device=key.device)
    return places[None] <= places[rows, None]


def row_weights(
    query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """(B, H, A, T) float32: attention of some query rows to every token.

    Args:
        query: (B, H, A, D), after rotary positions and norms.
        key: (B, K, T, D).
        seen: which tokens a row attends to, bool or additive, of a shape that broadcasts to the result's; None: all.
        scale: factor of the scores.
        softcap: scores are squashed by `tanh` to this.
    """
    batch, heads, count, width = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, key.shape[1], groups * count, width)
    scores = (rows @ key.transpose(2, 3)).mul_(scale).view(batch, heads, count, key.shape[2])
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if seen is not None and seen.dtype == torch.bool:
        scores = scores.masked_fill_(~seen, torch.finfo(scores.dtype).min)
    elif seen is not None:
        scores = scores + seen
    return scores.softmax(-1, dtype=torch.float32)


def _chunk(query: torch.Tensor, key: torch.Tensor) -> int:
    """Query rows worked on at a time, so that their maps stay small."""
    return max(1, _CHUNK_BYTES // (4 * query.shape[0] * query.shape[1] * key.shape[2]))

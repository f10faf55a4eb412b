"""Attention to the picture read while an answer is drawn: what `attention.py` reads of a given one, without a pass of its own.

Each token that is fed back is a query in every layer anyway. In the layer asked for, its row of weights is computed beside the
model's own kernel, whose output and masks stay what they are; the prompt and the other layers are not touched.

Legend of shapes: `B` rows of a batch, `T` tokens, `H` heads, `K` key heads, `D` width of a head, `N` most image tokens of a row.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefalign import families
from prefalign.engines import Completion
from prefalign.engines.attention import of_request, out_of_reach, readable_layer, refuse_unknown, row_weights
from prefalign.engines.stopping import Batch

if TYPE_CHECKING:
    from prefalign.engines.transformers import TransformersEngine

KERNEL = "prefalign_watcher"


class Watcher:
    """What one decoder layer shows while a batch is drawn.

    Args:
        engine: the engine that draws.
        batch: its prompts, left-padded.
        layer: number of the layer, 0-based.
        kernel: name of the attention kernel that the model runs.
    """

    def __init__(self, engine: TransformersEngine, batch: Batch, layer: int, kernel: str) -> None:
        self.engine = engine
        self.batch = batch
        self.layer = layer
        self.kernel = kernel
        pieces = families.image_token_mask(batch.tensors["input_ids"], engine.config)
        self.width = pieces.shape[1]
        self.counts = pieces.sum(1).tolist()
        self.places = torch.nn.utils.rnn.pad_sequence([row.nonzero().squeeze(1) for row in pieces], batch_first=True)
        self.reached = False
        self.rows: list[torch.Tensor] = []

    def see(self, query: torch.Tensor, key: torch.Tensor, mask: Any, scale: float, softcap: float | None) -> None:
        """Keep the weights (B, N) of one fed token of each row.

        Args:
            query: (B, H, 1, D), after rotary positions and norms.
            key: (B, K, T, D); of a sliding window, the tokens in it.
            mask: (B, 1, 1, T) bool or additive, (B, T) nonzero where a token counts; None: all count.
            scale: factor of the scores.
            softcap: scores are squashed by `tanh` to this.

        Raises:
            ValueError: for a mask that is no tensor.
        """
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise ValueError(
                f"the attention kernel {self.kernel!r} hides tokens by a {type(mask).__name__}, which cannot be read: padding "
                "would count as seen. Load the model with attn_implementation sdpa or eager."
            )
        seen = mask[:, None, None].bool() if mask is not None and mask.dim() == 2 else mask
        weights = row_weights(query, key, seen, scale, softcap).mean(1).squeeze(1)
        places = self.places.to(weights.device) - (self.width + len(self.rows) + 1 - key.shape[2])
        self.rows.append(weights.gather(1, places.clamp(min=0)).masked_fill_(places < 0, 0))

    def note(self, completions: Sequence[Completion]) -> None:
        """Write into each completion the mean over those of its tokens that were fed back.

        A row that ended earlier than its batch is fed padding, and one cut at its sentence end was drawn further: neither
        counts. As in `attention.fed_back`, the last token of an answer counts if the end of the turn was drawn after it.

        Raises:
            ValueError: if the layer did not go through transformers' attention interface.
        """
        if not self.reached:
            raise out_of_reach(self.engine, self.layer)
        kept = [len(one.token_ids) - (one.finish_reason != "stop") for one in completions]
        rows = torch.stack(self.rows, 1).cpu() if self.rows else None
        for index, (row, completion, size) in enumerate(zip(self.batch.rows, completions, kept, strict=True)):
            count = self.counts[index]
            weights = rows[index, :size, :count].mean(0) if rows is not None and size > 0 else None
            completion.attention = of_request(self.engine, row.request, weights, count, self.layer)


_ACTIVE: ContextVar[Watcher] = ContextVar("prefalign_watcher")


@contextmanager
def watching(engine: TransformersEngine, model: Any, batch: Batch, layer: int | str | None) -> Iterator[Watcher | None]:
    """While this is open the layer's attention is watched; the model is left as it was found.

    Args:
        engine: the engine that draws.
        model: its bare model.
        batch: what is drawn.
        layer: `Sampling.attention_layer`; None watches nothing and gives None.

    Raises:
        ValueError: if there is no such layer, or its attention cannot be read.
    """
    if layer is None:
        yield None
        return
    number = readable_layer(engine, layer)
    parts = [part for part in model.get_decoder().modules() if getattr(part, "layer_idx", None) == number]
    before = [(part, part.config) for part in parts if hasattr(part, "config")]
    if not before:
        raise out_of_reach(engine, number)
    watcher = Watcher(engine, batch, number, before[0][1]._attn_implementation)
    token = _ACTIVE.set(watcher)
    try:
        for part, config in before:
            # a copy, for this layer alone: masks are made, and other layers run, by the decoder's config
            part.config = copy.copy(config)
            part.config._attn_implementation_internal = KERNEL
        yield watcher
    finally:
        for part, config in before:
            part.config = config
        _ACTIVE.reset(token)


def watched_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **more: Any,
) -> tuple[torch.Tensor, Any]:
    """The model's own kernel, after the watcher saw a query that is alone: a fed token, not the prompt.

    Args:
        module: attention module of the watched layer.
        query: (B, H, T, D), after rotary positions and norms.
        key: (B, K, T, D), those of the cache among them.
        value: (B, K, T, D).
        attention_mask: what the kernel takes.
        **more: what the family passes besides, `scaling` and `softcap` among it.

    Raises:
        ValueError: for attention sinks and position biases, which would have to enter the softmax.
    """
    refuse_unknown(more)
    watcher = _ACTIVE.get()
    watcher.reached = True
    if query.shape[2] == 1:
        scale = more.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        watcher.see(query, key, attention_mask, scale, more.get("softcap"))
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(watcher.kernel, _eager(module))
    attended: tuple[torch.Tensor, Any] = kernel(module, query, key, value, attention_mask, **more)
    return attended


AttentionInterface.register(KERNEL, watched_attention)


def _eager(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The eager kernel of a module's family, which stands beside the module and in no register."""
    found: Callable[..., Any] | None = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    return found

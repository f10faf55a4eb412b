"""The shared forward pass: each document once, each picture once, then TRL's own head on the answers' positions only.

`share(model, layout)` wraps the `forward` of a model that TRL has given its fused head. With `packed=` it encodes the pictures,
runs the language model over the documents, keeps the hidden states that predict an answer's token, and hands them to the head
as labels of their own; without, it is the forward as it was. Policy and reference go through the same wrapper, so log-probs,
metrics and gradients come out of TRL's kernels either way.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer import utils as trl_utils

from prefalign import families
from prefalign.training.attention import SPLIT, dense_masks
from prefalign.training.frozen import FrozenTower
from prefalign.training.layout import Layout, fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_UNDO, _LAYOUT = "_prefalign_undo", "_prefalign_layout"

PLAIN_LAYERS = frozenset({"llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text"})
"""Text models whose layer is attention and MLP, each after a norm and added to its input, and nothing else."""

HEAD_CHUNK = 4096
"""Entries of the vocabulary that TRL's head projects at a time on a CPU (`_small_head_chunks`)."""


def share(model: PreTrainedModel, layout: str) -> None:
    """Let a model run documents.

    Args:
        model: policy or reference, with or without an adapter, after `trl.trainer.utils.add_fused_lm_head`.
        layout: `split`, `mask` or `plain` (`Route.layout`); `plain` only adds what a batch without pictures needs.
    """
    base = families.core(model)
    base.__dict__[_LAYOUT] = layout
    if layout == "split":
        base.config.get_text_config()._attn_implementation = SPLIT
    undo: list[Any] = base.__dict__.setdefault(_UNDO, [])
    if layout == "split" and (last := _last_layer(base)) is not None:
        last.forward = types.MethodType(_label_rows_only, last)
        undo.append(lambda: last.__dict__.pop("forward", None))
    elif layout != "plain":
        undo.append(base.model.register_forward_hook(_keep_label_rows, with_kwargs=True).remove)
    original = base.forward
    waiting: dict[str, Any] = {}

    def add_nothing(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not waiting:
            return None
        nothing = waiting["nothing"] if "nothing" in waiting else _nothing(base.model, waiting["dummy"])
        waiting.clear()
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + nothing.to(kwargs["inputs_embeds"].dtype)}

    undo.append(base.get_decoder().register_forward_pre_hook(add_nothing, with_kwargs=True).remove)

    @functools.wraps(type(base).forward)
    def forward(
        self: Any,
        *args: Any,
        packed: Mapping[str, Any] | None = None,
        dummy: Mapping[str, torch.Tensor] | None = None,
        full_logits: bool = False,
        **kwargs: Any,
    ) -> Any:
        if packed is not None:
            kwargs = _document_inputs(self, packed)
            args = ()
            if not full_logits:
                layout = kwargs["prefix_layout"]
                kwargs |= {"shift_labels": layout.labels[None], "fused_lm_head": True}
        waiting.clear()
        if dummy is not None and packed is not None:
            waiting["nothing"] = _nothing(self.model, dummy)
        elif dummy is not None:
            waiting["dummy"] = dummy  # a family's own forward embeds the text first, and then runs the tower
        with _small_head_chunks(packed is not None and packed["tokens"]["input_ids"].device.type == "cpu"):
            return original(*args, **kwargs)

    base.forward = types.MethodType(forward, base)
    undo.append(lambda: base.__dict__.pop("forward", None))


def hidden_states(model: PreTrainedModel, packed: Mapping[str, Any]) -> torch.Tensor:
    """Hidden states that predict the labels of documents, for a head of one's own (reward, value).

    Args:
        model: a model that `share` wrapped with the layout `split` or `mask`, with or without an adapter.
        packed: as `PreferenceCollator` makes them; `layout.label_rows` says which states are kept.

    Returns:
        (N, width), after the last norm, in the model's dtype, in the order of `layout.label_rows`.

    Raises:
        ValueError: the model runs no documents now.
    """
    base = families.core(model)
    if (layout := shared_layout(model)) not in ("split", "mask"):
        raise ValueError(
            f"the model runs documents with the layout {layout!r} and was given a packed batch: its answers would see one "
            "another. Make the batch with the layout that `share` gave the model (`shared_layout`)."
        )
    return base.model(**_document_inputs(base, packed)).last_hidden_state[0]


def is_shared(model: PreTrainedModel) -> bool:
    """Whether `share` has wrapped a model."""
    return bool(vars(families.core(model)).get(_UNDO))


def shared_layout(model: PreTrainedModel) -> str | None:
    """The layout that `share` gave a model last; None if it is not wrapped."""
    layout: str | None = vars(families.core(model)).get(_LAYOUT)
    return layout


def unshare(model: PreTrainedModel) -> None:
    """Take off what `share` and TRL's head put on a model, before it is trained once more in the same process."""
    base = families.core(model)
    for take_off in base.__dict__.pop(_UNDO, []):
        take_off()
    base.__dict__.pop(_LAYOUT, None)
    for module in base.model.children():
        if isinstance(module.__dict__.get("forward"), FrozenTower):
            del module.__dict__["forward"]


@contextmanager
def _small_head_chunks(wanted: bool) -> Iterator[None]:
    """On a CPU, let TRL's head project `HEAD_CHUNK` entries of the vocabulary at a time instead of 32,768.

    With prompts shared, the scratch of the head is what a step's memory peaks at; on a GPU it is small beside the rest, and
    more chunks are more launches.
    """
    before = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE
    if wanted:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = HEAD_CHUNK
    try:
        yield
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = before


def _document_inputs(base: Any, packed: Mapping[str, Any]) -> dict[str, Any]:
    tokens = packed["tokens"]
    ids = tokens["input_ids"]
    layout: Layout = packed["layout"].to(ids.device)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": _positions(base, layout, packed.get("prompts"), ids.device),
        "prefix_layout": layout,
        "use_cache": False,
    }
    if layout.one_row:
        # of no use to split attention, and four-dimensional so that no mask is built from the restarting positions
        inputs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=ids.device)
        inputs |= {key: value.clamp(min=0) for key, value in tokens.items() if key == "mm_token_type_ids"}
    else:
        inputs["attention_mask"] = _masks(base, layout, tokens)
    if "features" in packed:
        inputs["mm_encoder_outputs"] = {"image": packed["features"]}
    elif packed["vision"]:
        inputs["mm_encoder_outputs"] = {"image": _in_order(_encode(base.model, packed["vision"]), packed["ranges"])}
    return inputs


def encode_pictures(model: PreTrainedModel, packed: Mapping[str, Any]) -> Any:
    """Picture features of documents, for `packed["features"]` of later passes over the same documents.

    They stay right as long as neither tower nor projector trains.

    Args:
        model: a model that `share` wrapped with the layout `split` or `mask`.
        packed: as `PreferenceCollator` makes them, with pictures.

    Returns:
        The family's own output, in the order of the documents' image tokens.
    """
    with torch.no_grad():
        return _in_order(_encode(families.core(model).model, packed["vision"]), packed["ranges"])


def _masks(base: Any, layout: Layout, tokens: Mapping[str, torch.Tensor]) -> Any:
    text = base.config.get_text_config()
    paligemma = base.config.model_type == "paligemma"
    kinds = tokens.get("token_type_ids")
    if kinds is None:
        blocks = torch.full_like(tokens["input_ids"], -1)
    elif paligemma:
        blocks = torch.where(kinds == 0, 0, -1)
    else:
        picture = kinds == 1
        starts = picture & ~torch.nn.functional.pad(picture, (1, 0))[:, :-1]
        blocks = torch.where(picture, starts.long().cumsum(dim=1) - 1, -1)
    return dense_masks(layout, blocks, window=getattr(text, "sliding_window", None), window_everywhere=not paligemma)


def _positions(
    base: Any, layout: Layout, prompts: Mapping[str, torch.Tensor] | None, device: torch.device
) -> torch.Tensor:
    """Positions that restart after the prompt in every branch, (R, S) or (3, R, S)."""
    first = 1 if base.config.model_type == "paligemma" else 0
    if prompts is None:
        own = [torch.arange(prompt, device=device) + first for prompt, _ in layout.documents]
    else:
        whole = families.position_ids(base, prompts)
        own = [whole[:, number, :prompt] for number, (prompt, _) in enumerate(layout.documents)]
    branches = [
        [positions[..., -1:] + 1 + torch.arange(tokens + 1, device=device) for tokens in answers]
        for positions, (_, answers) in zip(own, layout.documents, strict=True)
    ]
    return fill(layout, own, branches, padding=0)


def _encode(backbone: Any, vision: Mapping[str, torch.Tensor]) -> Any:
    """The family's own picture features; without a graph where neither tower nor projector trains."""
    known = inspect.signature(type(backbone).get_image_features).parameters
    given = {key: value for key, value in vision.items() if key in known}
    parts = [(f"{name}.", part.parameters()) for name, part in backbone.named_children()]
    parts += [(name, [parameter]) for name, parameter in backbone.named_parameters(recurse=False)]
    trains = any(
        parameter.requires_grad
        for name, parameters in parts
        if families.tower(name) != "language_model"
        for parameter in parameters
    )
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
        return backbone.get_image_features(**given, return_dict=True)


def _nothing(backbone: Any, vision: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Zero, made of everything that a picture gives the language model, so that each weight behind it gets a gradient."""
    features = _encode(backbone, vision)
    deep = getattr(features, "deepstack_features", None) or []
    pieces = [piece for layer in (features.pooler_output, *deep) for piece in _pieces(layer)]
    return torch.stack([(0.0 * piece).sum() for piece in pieces]).sum()


def _in_order(features: Any, ranges: list[tuple[int, int]] | None) -> Any:
    """Features in the order of the documents' image tokens; a picture that several documents show is repeated."""
    if ranges is None:
        return features
    pooled = features.pooler_output
    chosen = _repeated(pooled, ranges)
    if isinstance(pooled, torch.Tensor):  # in tiles, as it came: SmolVLM before transformers 5.21 counts them
        ordered = type(features)(pooler_output=chosen.unflatten(0, (-1, *pooled.shape[1:-1])))
    else:
        ordered = type(features)(pooler_output=[chosen])
    deep = getattr(features, "deepstack_features", None)
    if deep is not None:
        ordered.deepstack_features = [[_repeated(layer, ranges)] for layer in deep]
    return ordered


def _repeated(pooled: Any, ranges: list[tuple[int, int]]) -> torch.Tensor:
    flat = torch.cat([piece.flatten(0, -2) for piece in _pieces(pooled)])
    return torch.cat([flat[start : start + length] for start, length in ranges])


def _pieces(pooled: Any) -> list[torch.Tensor]:
    return [pooled] if isinstance(pooled, torch.Tensor) else list(pooled)


def _keep_label_rows(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """After the backbone: only the hidden states that predict a token of an answer, (1, N, width)."""
    layout = kwargs.get("prefix_layout")
    if layout is not None:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[layout.label_rows][None]
    return output


def _last_layer(base: Any) -> Any:
    """The last layer of the language model, where it is of the kind that `_label_rows_only` knows; else None."""
    layers = base.get_decoder().layers
    vision = getattr(base.config, "vision_config", None)
    added = len(
        getattr(vision, "deepstack_visual_indexes", None) or []
    )  # picture features added after the first layers
    known = base.config.get_text_config().model_type in PLAIN_LAYERS and added < len(layers)
    return layers[-1] if known else None


def _label_rows_only(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A last decoder layer that goes on, after its attention, with the positions alone that predict a token of an answer.

    Nothing reads the prompt's hidden states after the last attention, so its MLP need not run on them.
    """
    layout = kwargs.get("prefix_layout")
    if layout is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    kept = (hidden_states + attended)[0, layout.label_rows][None]
    return kept + self.mlp(self.post_attention_layernorm(kept))

"""Prompts that begin alike run once: several answers to one question, or several forced starts of one answer (BDHS).

Rows that show the same pictures, ask the same and hide the same image tokens are put on one *stem*, the longest of their prompts.
It is prefilled once with its pictures; each row gets a copy of the cache in which what follows the tokens it shares with the stem
is masked, and goes on with its own last tokens at their own positions. What is computed for a row is what its prompt alone
gives; only the slots that hold nothing lie elsewhere. So it works where a token's key depends on what is before it alone and on
its position, not on its slot: in decoders whose layers all attend to everything before (`can_share`). There image tokens that are
hidden from everybody need not be in the decoder at all, and are left out of its prefill.

Legend of shapes: `U` stems, `B` rows of a batch, `T` tokens of the padded stems, `W` slots of their prefill (`T` less what is
hidden), `S` slots of the rows' own last tokens, `D` width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from prefalign import families
from prefalign.engines.stopping import CONTEXT_TAIL, Batch, Row

MOST_OWN_TOKENS = 16
"""A row with more tokens of its own than this, after those it shares with a stem, is a stem itself."""


@dataclass
class Stem:
    """A prompt that is prefilled, the rows on it, and for each how it goes on.

    Attributes:
        row: the longest of the prompts.
        tokens: its token ids, a picture being one.
        rows: rows that begin like it, itself among them.
        cut: per row, how many tokens at the end of the stem are not its own.
        own: per row, the token ids it goes on with; at least one.
    """

    row: Row
    tokens: list[int]
    rows: list[Row] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    own: list[list[int]] = field(default_factory=list)

    def tails(self) -> list[list[int]]:
        """The last `CONTEXT_TAIL` token ids of each row's prompt."""
        whole = [self.tokens[: len(self.tokens) - cut] + own for cut, own in zip(self.cut, self.own, strict=True)]
        return [ids[-CONTEXT_TAIL:] for ids in whole]

    def take(self, row: Row, tokens: Sequence[int]) -> bool:
        """Put a row on this stem if it begins like it and has few enough tokens of its own."""
        shared = 0
        for mine, other in zip(tokens[:-1], self.tokens, strict=False):
            if mine != other:
                break
            shared += 1
        if not shared or len(tokens) - shared > MOST_OWN_TOKENS:
            return False
        self.rows.append(row)
        self.cut.append(len(self.tokens) - shared)
        self.own.append(list(tokens[shared:]))
        return True


def can_share(config: Any) -> bool:
    """Whether a model's rows may go on from one prefill.

    Not with sliding windows, which count slots; not with linear attention, whose state cannot be cut back; not where a prompt is
    read in both directions (PaliGemma, Gemma 3) or pictures come in beside it (Mllama); nor on a family that no test runs.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    both_ways = config.model_type in ("paligemma", "gemma3")
    alone = config.model_type in families.TESTED and not both_ways and not families.cross_attends(config)
    return alone and kinds == {"full_attention"} and not window


def on_stems(rows: Sequence[Row], tokens: Mapping[int, Sequence[int]], lengths: Mapping[int, int]) -> list[Stem]:
    """Put rows on as few stems as their prompts allow, the longest stems first.

    Args:
        rows: what is to be answered.
        tokens: of each row, by index, the ids of its prompt with one for each picture; the pictures stand before the part that
            differs.
        lengths: of each row, by index, the tokens of its prompt with its image tokens.
    """
    alike: dict[Any, list[Stem]] = {}
    for row in sorted(rows, key=lambda row: (-len(tokens[row.index]), row.index)):
        request = row.request
        asked = (tuple(id(image) for image in request.images), repr(request.messages), request.image_mask)
        stems = alike.setdefault(asked, [])
        if not any(stem.take(row, tokens[row.index]) for stem in stems):
            ids = list(tokens[row.index])
            stems.append(Stem(row, ids, [row], [1], [ids[-1:]]))
    found = [stem for stems in alike.values() for stem in stems]
    return sorted(found, key=lambda stem: (-lengths[stem.row.index], stem.row.index))


def in_batches(stems: Sequence[Stem], size: int) -> list[list[Stem]]:
    """Stems whose rows fill batches of `size`; one that does not fit is continued in the next batch."""
    batches: list[list[Stem]] = [[]]
    room = size
    for stem in stems:
        start = 0
        while start < len(stem.rows):
            if not room:
                batches.append([])
                room = size
            part = slice(start, start + room)
            batches[-1].append(Stem(stem.row, stem.tokens, stem.rows[part], stem.cut[part], stem.own[part]))
            start += len(batches[-1][-1].rows)
            room -= len(batches[-1][-1].rows)
    return [batch for batch in batches if batch]


def rows_of(stems: Sequence[Stem], encoded: Batch) -> Batch:
    """The batch of all rows on some stems, of which `encoded` is the batch; the tensors stay those of the stems."""
    rows, lengths, pieces = [], [], []
    for number, stem in enumerate(stems):
        for row, cut, own in zip(stem.rows, stem.cut, stem.own, strict=True):
            rows.append(row)
            lengths.append(encoded.lengths[number] - cut + len(own))
            pieces.append(encoded.image_tokens[number])
    return Batch(rows, encoded.tensors, lengths, pieces, list(stems))


def prefilled(model: Any, batch: Batch, pad: int) -> dict[str, Any]:
    """Run the stems of a batch and give what `generate` goes on from.

    Args:
        model: the model under its wrappers, in eval mode, gradients off.
        batch: what `rows_of` gave.
        pad: padding id.

    Returns:
        `input_ids` and `attention_mask` (B, W + S), `position_ids` (B, W + S) or (3, B, W + S), and `past_key_values` that hold
        the first W slots.
    """
    stems = {name: batch.tensors[name] for name in ("input_ids", "attention_mask", "position_ids")}
    device = stems["input_ids"].device
    with _visible_only(model, stems["attention_mask"]) as left_out:
        cache = model(**batch.tensors, use_cache=True, logits_to_keep=1).past_key_values
    if left_out:
        stems = {name: _columns(value, *left_out) for name, value in stems.items()}
        stems["attention_mask"] = left_out[1].long()
    which = torch.tensor([number for number, stem in enumerate(batch.stems) for _ in stem.rows], device=device)
    cache.batch_select_indices(which)

    cuts = [cut for stem in batch.stems for cut in stem.cut]
    owns = [own for stem in batch.stems for own in stem.own]
    width, most = stems["input_ids"].shape[1], max(len(own) for own in owns)
    ids = torch.full((len(owns), most), pad, device=device)
    mask = torch.zeros_like(ids)
    shared = stems["attention_mask"][which].clone()
    stem_positions = stems["position_ids"][..., which, :]
    positions = stem_positions.new_zeros((*stem_positions.shape[:-1], most))
    for index, (cut, own) in enumerate(zip(cuts, owns, strict=True)):
        ids[index, most - len(own) :] = torch.tensor(own, device=device)
        mask[index, most - len(own) :] = 1
        shared[index, width - cut :] = 0
        last = stem_positions[..., index, width - cut - 1]
        steps = torch.arange(1, len(own) + 1, device=device)
        positions[..., index, most - len(own) :] = last[..., None] + steps
    return {
        "input_ids": torch.cat([stems["input_ids"][which], ids], 1),
        "attention_mask": torch.cat([shared, mask], 1),
        "position_ids": torch.cat([stem_positions, positions], -1),
        "past_key_values": cache,
    }


@contextmanager
def _visible_only(model: Any, mask: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Let the decoder of a model run over the tokens of `mask` (U, T) alone.

    Yields:
        A list that holds, after the forward pass, what was left: column numbers (U, W) and whether they are tokens (U, W) bool.
        It stays empty where nothing is hidden, or where the decoder is given other things that go by column (Qwen3-VL's features
        for its first layers): there it runs over everything.
    """
    left: list[torch.Tensor] = []
    size = int(mask.sum(1).max())
    decoder = getattr(model.model, "language_model", None) or getattr(model.model, "text_model", None)

    def shorten(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        if args or set(tensors) != {"inputs_embeds", "attention_mask", "position_ids"}:
            return args, given
        # the last `size` columns of a stable sort by visibility: what is visible stays in order, at the right
        columns = mask.bool().int().sort(dim=1, stable=True).indices[:, mask.shape[1] - size :]
        shown = mask.gather(1, columns).bool()
        left.extend((columns, shown))
        embeds = given["inputs_embeds"].gather(1, columns[..., None].expand(-1, -1, given["inputs_embeds"].shape[-1]))
        positions = _columns(given["position_ids"], columns, shown)
        return args, {**given, "inputs_embeds": embeds, "attention_mask": shown.long(), "position_ids": positions}

    if decoder is None or size == mask.shape[1]:
        yield left
        return
    hook = decoder.register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        yield left
    finally:
        hook.remove()


def _columns(values: torch.Tensor, columns: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """Columns (U, W) of values (..., U, T); 0 where a column is no token."""
    return values.gather(-1, columns.expand(*values.shape[:-1], -1)).masked_fill(~shown, 0)

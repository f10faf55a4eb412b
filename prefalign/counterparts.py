"""Which tensor of one checkpoint is which of another, read from disk without building a model.

Names are paired by their common ending, rows of the vocabulary by their tokens; what does not belong together is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefalign import families
from prefalign.checkpoints import ModelError
from prefalign.manifest import differences
from prefalign.merged_folders import Source, weight_files

if TYPE_CHECKING:
    import torch

EMBEDDING, HEAD, COMPUTED = "embed_tokens.weight", "lm_head.weight", "inv_freq"
_SAME = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
         "hidden_activation", "rms_norm_eps")  # fmt: skip
"""Settings of a language model that two must agree on, whatever the family calls itself."""


class Tensors:
    """The tensors of a checkpoint by name, read from disk when they are asked for.

    Attributes:
        source: the checkpoint.
        files: tensor name to file name.
    """

    def __init__(self, source: Source) -> None:
        from safetensors import safe_open

        self.source = source
        index = source.folder / "model.safetensors.index.json"
        if index.is_file():
            self.files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            (file, *others) = weight_files(source.folder)
            if others and file.name != "model.safetensors":
                raise ModelError(
                    f"{source.name!r} has {len(others) + 1} weight files and no model.safetensors.index.json that says which "
                    "tensor is where. Copy or download it again."
                )
            with safe_open(file, framework="pt") as opened:
                self.files = dict.fromkeys(opened.keys(), file.name)
        missing = sorted({file for file in self.files.values() if not (source.folder / file).is_file()})
        if missing:
            raise ModelError(f"{source.name!r} lacks {missing[0]}, which its index names. Copy or download it again.")
        self._opened: dict[str, Any] = {}

    def read(self, name: str) -> torch.Tensor:
        """A tensor; its memory is the file's, mapped."""
        return self._file(name).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def ending(self, ending: str) -> str | None:
        """The only tensor of the language model whose name ends so, at a dot."""
        found = [name for name in self.files if f".{name}".endswith(f".{ending}")]
        return found[0] if len(found) == 1 else None

    def ties_head(self) -> bool:
        """Whether the output head is the embedding: not stored, or stored as a copy."""
        import torch

        head, embedding = self.ending(HEAD), self.ending(EMBEDDING)
        if head is None or embedding is None:
            return True
        return self.shape(head) == self.shape(embedding) and torch.equal(self.read(head), self.read(embedding))

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        file = self.files[name]
        if file not in self._opened:
            self._opened[file] = safe_open(self.source.folder / file, framework="pt")
        return self._opened[file]


@dataclass
class Partner:
    """Another checkpoint, seen with the names and the vocabulary of ours.

    Attributes:
        ours: the checkpoint whose names count.
        theirs: the other.
        scope: our tensors that are merged.
        rows: (rows,) bool, which rows of the vocabulary stand for the same token; None: all.

    Raises:
        ModelError: a tensor of either has no counterpart, or one of another shape.
    """

    ours: Tensors
    theirs: Tensors
    scope: set[str]
    rows: torch.Tensor | None
    names: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        ours, theirs = self.ours, self.theirs
        pair = f"{ours.source.name!r} and {theirs.source.name!r}"
        if ours.ties_head() and not theirs.ties_head():
            raise ModelError(
                f"{pair} cannot be merged: the first uses its input embedding as its output head, and the second has a head of "
                "its own, which has no place in the first. They are not of one line."
            )
        candidates = {name for name in theirs.files if not name.endswith(COMPUTED)}
        self.names = match_names(self.scope, candidates)
        head, embedding = ours.ending(HEAD), ours.ending(EMBEDDING)
        if head is not None and embedding in self.names and theirs.ending(HEAD) is None:
            self.names[head] = self.names[embedding]
        alone = sorted(self.scope - self.names.keys())
        left = sorted(candidates - set(self.names.values()) - ({theirs.ending(HEAD)} if theirs.ties_head() else set()))
        for missing, where in ((alone, ours), (left, theirs)):
            if missing:
                raise ModelError(
                    f"{pair} are not of one architecture: {len(missing)} tensor(s) of {where.source.name!r} have no counterpart "
                    f"in the other ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Merge one line only."
                )
        for name, other in self.names.items():
            skip = 1 if self._has_rows(name) else 0
            if ours.shape(name)[skip:] != theirs.shape(other)[skip:]:
                raise ModelError(
                    f"{pair} are not of one size: {name} is {ours.shape(name)} in the first and {theirs.shape(other)} in the "
                    "second. Merge models of one line only."
                )

    def read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """Their tensor for one of our names; rows of the vocabulary that are not shared are ours.

        Args:
            name: our name.
            like: our tensor.

        Returns:
            A tensor of our shape, in a dtype that holds both exactly where rows are filled in.
        """
        import torch

        theirs = self.theirs.read(self.names[name])
        if not self._has_rows(name) or (self.rows is None and theirs.shape == like.shape):
            return theirs
        count = min(len(like), len(theirs))
        shared = slice(0, count) if self.rows is None else self.rows[:count].nonzero()[:, 0]
        filled = like.to(torch.promote_types(like.dtype, theirs.dtype), copy=True)
        filled[shared] = theirs[shared].to(filled.dtype)
        return filled

    def _has_rows(self, name: str) -> bool:
        return name in (self.ours.ending(HEAD), self.ours.ending(EMBEDDING))


def match_names(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Pair tensor names of one tower by their longest common ending, since prefixes differ between versions and families.

    Returns:
        Our name to theirs, each at most once; names without one clear counterpart are left out.

    Example:
        >>> match_names(["language_model.model.layers.0.mlp.up_proj.weight"], ["model.layers.0.mlp.up_proj.weight"])
        {'language_model.model.layers.0.mlp.up_proj.weight': 'model.layers.0.mlp.up_proj.weight'}
    """
    theirs = list(theirs)
    endings: dict[tuple[str, ...], list[str]] = {}
    for name in theirs:
        parts = name.split(".")
        for start in range(len(parts)):
            endings.setdefault((families.tower(name), *parts[start:]), []).append(name)
    known = set(theirs)
    claims: dict[str, list[tuple[int, str]]] = {}
    for name in ours:
        parts = name.split(".")
        keys = ((families.tower(name), *parts[start:]) for start in range(len(parts)))
        key, candidates = next(((key, endings[key]) for key in keys if key in endings), ((), []))
        if name in known:
            claims.setdefault(name, []).append((len(parts) + 2, name))
        elif len(candidates) == 1:
            claims.setdefault(candidates[0], []).append((len(key), name))
    # a tensor that two lay claim to belongs to the one that shares the longer ending
    best = {other: sorted(claimed, reverse=True)[:2] for other, claimed in claims.items()}
    return {first[0][1]: other for other, first in best.items() if len(first) == 1 or first[0][0] > first[1][0]}


def read_config(source: Source) -> Any:
    """The transformers config of a checkpoint, or `ModelError`."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"config.json of {source.name!r} could not be read: {error}") from error


def reads_pictures(config: Any) -> bool:
    """Whether a config is that of a vision-language model."""
    try:
        families.family(config)
    except ValueError:
        return False
    return True


def check_reads_pictures(source: Source, config: Any) -> None:
    """Raise `ModelError` unless a checkpoint is a vision-language model."""
    if not reads_pictures(config):
        raise ModelError(
            f"{source.name!r} ({config.model_type}) does not read pictures. A text model is merged into the language model of a "
            "VLM: give it as `text_model`, and the VLM as the one of `models`."
        )


def check_same_settings(sources: Sequence[Source], one: Any, two: Any) -> None:
    """Raise `ModelError` if weights mean different things in two language models."""
    changed = list(differences(_settings(one.get_text_config()), _settings(two.get_text_config())))
    if changed:
        raise ModelError(
            f"{sources[0].name!r} and {sources[1].name!r} do not compute alike ({'; '.join(changed)}), so the same weight means "
            "another thing in each. Merge models of one line only."
        )


def _settings(config: Any) -> dict[str, Any]:
    def plain(rope: Mapping[str, Any]) -> dict[str, Any]:
        # positions in time, height and width are those of text where there is no picture
        nested = {name: plain(value) if isinstance(value, Mapping) else value for name, value in rope.items()}
        return {name: value for name, value in nested.items() if "mrope" not in name and name != "type"}

    values = {name: getattr(config, name, None) for name in _SAME}
    return {**values, "rope": plain(getattr(config, "rope_parameters", None) or {})}


def shared_rows(ours: Source, theirs: Source) -> torch.Tensor | None:
    """(rows,) bool: which rows of the vocabulary are the same token in both; None where the tokenizers are equal.

    Raises:
        ModelError: tokens of ordinary text differ, or a tokenizer is missing.
    """
    import torch
    from transformers import AutoTokenizer

    words, added = [], []
    for source in (ours, theirs):
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.folder)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(
                f"{source.name!r} has no tokenizer that can be read ({error}), so nobody can tell whether its vocabulary is the "
                "other model's. Put the tokenizer's files into its folder."
            ) from error
        words.append({index: token for token, index in tokenizer.get_vocab().items()})
        added.append(set(tokenizer.added_tokens_decoder))
    one, two = words
    other = sorted(index for index in one.keys() | two.keys() if one.get(index) != two.get(index))
    ordinary = [
        index for index in other if any(index in w and index not in a for w, a in zip(words, added, strict=True))
    ]
    if ordinary:
        first = ordinary[0]
        raise ModelError(
            f"{ours.name!r} and {theirs.name!r} have different vocabularies: {len(ordinary)} ordinary token(s) differ, the first "
            f"is {first}: {one.get(first)!r} and {two.get(first)!r}. Rows of different words cannot be averaged; merge with "
            "the model that the first was made from."
        )
    if not other:
        return None
    rows = torch.ones(max(*one, *two, *other) + 1, dtype=torch.bool)
    rows[other] = False
    return rows

"""What does not train costs no gradient: a frozen vision tower is run without a graph, and once for policy and reference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from prefalign import families

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer


class FrozenTower:
    """The forward of a vision tower that does not train: never with a graph, and once per batch while `keep` is set.

    Gradient checkpointing lets transformers put a hook on the tower's embedding that asks for gradients, so a frozen tower would
    be run again and back-propagated through, for nothing. Policy and reference show the same pictures, so with `keep` the
    second of two equal calls gets what the first returned.

    Args:
        module: the tower; its `forward` is replaced.
        keep: remember the last call until `forget`.
    """

    def __init__(self, module: torch.nn.Module, *, keep: bool):
        self.original = module.forward
        self.keep = keep
        self.last: tuple[tuple[Any, ...], dict[str, Any], Any, list[int]] | None = None
        functools.update_wrapper(self, self.original)
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # transformers tells the policy's tower alone that it has no cache, which no tower has
        asked = {key: value for key, value in kwargs.items() if key != "use_cache"}
        state = _versions((args, asked))
        if (
            self.last is not None
            and self.last[3] == state
            and _equal(self.last[0], args)
            and _equal(self.last[1], asked)
        ):
            return copy.copy(self.last[2])
        with torch.no_grad():
            output = self.original(*args, **kwargs)
        if self.keep:
            self.last = (args, asked, copy.copy(output), state)  # Qwen's models write into what they get
        return output

    def forget(self) -> None:
        """Let the last output go."""
        self.last = None


def frozen_tower(model: PreTrainedModel) -> torch.nn.Module | None:
    """The vision tower where nothing in it trains: a module right under the backbone.

    None for Qwen's `visual` while the merger inside it trains: its blocks then run for policy and reference each.
    """
    for name, module in families.core(model).model.named_children():
        parameters = list(module.parameters())
        if families.tower(f"{name}.") == "vision" and parameters and not any(p.requires_grad for p in parameters):
            return module
    return None


class NoInputHooks(TrainerCallback):
    """Take off the hooks that ask for gradients at every embedding, a frozen tower's included.

    transformers puts them there with gradient checkpointing, for its reentrant kind only; without them the other kind gives the
    same gradients to the bit, and what does not train is not back-propagated through.

    Args:
        trainer: whose model they are on.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take them off, where the run checkpoints its activations in the other kind."""
        if args.gradient_checkpointing and not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            families.core(self.trainer.accelerator.unwrap_model(self.trainer.model)).disable_input_require_grads()


def _versions(values: Any) -> list[int]:
    """How often each tensor has been written into, so that one changed in place is not taken for what it was."""
    return [leaf._version for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor):
        return (
            isinstance(one, torch.Tensor)
            and isinstance(two, torch.Tensor)
            and one.shape == two.shape
            and one.dtype == two.dtype
            and (one is two or bool(torch.equal(one, two)))
        )
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(_equal, one, two))
    return type(one) is type(two) and one == two

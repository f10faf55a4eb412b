"""What a step costs, counted instead of timed: the peak of live tensors, and floating point operations.

Both figures are the same on every run and every machine of one device type, so tests can hold them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode


class LiveTensors(TorchDispatchMode):
    """Count the bytes of all tensors alive at once while this mode is on, forward, backward and optimizer alike.

    Storages are followed, not tensors: views share one, and what autograd saved stays counted until autograd lets go of it.
    A tensor made before the mode counts from its first use, or from the start if `held` names it. Scratch space inside one
    kernel is never a tensor and is not seen. Tensors on `meta` count with the bytes that they would have.

    Args:
        held: tensors that are there already, such as weights and optimizer state.

    Attributes:
        held: bytes of these tensors, shared storages once.
        live: bytes alive now.
        peak: most bytes alive at once, the held ones included.

    Example:
        >>> with LiveTensors() as meter:
        ...     half = (torch.ones(1024) + 1)[:512]
        >>> meter.peak, meter.live
        (8192, 4096)
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._followed: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        for tensor in held:
            self._follow(tensor)
        self.held = self.live

    @property
    def above_held(self) -> int:
        """Peak without the held tensors: activations, gradients and passing values."""
        return self.peak - self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self._follow(value)
        return result

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # the address of the storage itself, also where its data has none
        if key in self._followed:
            return

        def freed(_: object) -> None:
            self.live -= self._followed.pop(key)[1]

        self._followed[key] = weakref.ref(storage, freed), storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)


def count_flops(step: Callable[[], object], *, compute: bool = True) -> int:
    """Floating point operations of the matrix products, convolutions and attention that a call runs, backward included.

    Counted by torch's `FlopCounterMode`, to which the CPU's attention kernel is added. Attention counts whole, also where a
    causal kernel skips the half that it masks. Not to be combined with `LiveTensors`: with gradient checkpointing, torch's
    counter keeps activations alive that would have been freed.

    Args:
        step: called once.
        compute: False gives zeros for what would be counted, which is several times faster; the count depends on shapes only,
            unless the call decides by values.
    """
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with nullcontext() if compute else _Zeros(counter.flop_registry), counter:
        step()
    return counter.get_total_flops()


class _Zeros(TorchDispatchMode):
    """Zeros of the right shape in place of some operators' results; those that write into given tensors run as they are."""

    def __init__(self, operators: Collection[Any]):
        super().__init__()
        self.operators = operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in self.operators or func._schema.is_mutable:
            return func(*args, **kwargs)
        device = next(value.device for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))
        shapes = func(*tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args),
                      **tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), kwargs))  # fmt: skip
        return tree_map_only(torch.Tensor, lambda shape: torch.zeros_like(shape, device=device), shapes)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *rest: object, **more: object) -> int:
    """Two products of all queries with all keys; heads of (batch, heads, tokens, width) are those of the query."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (width + value[3])


def _attention_backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *rest: object, **more: object
) -> int:
    """The scores again, then the gradients of scores, query, key and value."""
    batch, heads, tokens, width = query
    return 2 * batch * heads * tokens * key[2] * (3 * width + 2 * value[3])


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}

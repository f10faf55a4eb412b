"""The meter of a dry run: live tensors by kind and by part of the step, where most tensors are fake."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from prefalign.training.metering import CPU_ATTENTION, LiveTensors

KINDS = ("activations", "vision", "head", "gradients")
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
# not by FlopCounterMode, whose hooks on modules keep tensors alive
_FLOPS = {**flop_registry, **{kernel: shape_wrapper(count) for kernel, count in CPU_ATTENTION.items()}}


@dataclass
class Moment:
    """The fullest moment of a part of the step, in bytes above all weights.

    Attributes:
        held: most bytes held at once.
        kinds: `held` by kind: `activations` of the language model, `vision`, `head`, `gradients`.
        rest: most bytes held at once that are not gradients.
    """

    held: float = 0
    kinds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    rest: float = 0


class FakeMeter(LiveTensors):
    """Live tensors by kind and by part of the step, fake and real ones.

    It also decides what is computed: operations on real tensors alone are, and give real ones; new tensors of floats are fake.
    """

    def __init__(self, fake: FakeTensorMode, held: Sequence[torch.Tensor]):
        self.fake = fake
        self.kind = "activations"
        self.by_kind: dict[str, float] = dict.fromkeys(KINDS, 0)
        self.kinds: dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]] = {}
        self.paused = True
        super().__init__(held)
        self.paused = False
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self.top, self.bottom = Moment(), Moment()
        self.parts = [self.top]
        self.flops = 0
        self._look()

    def ends_top(self, module: Any, args: Any, output: torch.Tensor) -> None:
        """When the gradient of this output is there, the top layer is done."""
        self._when_graded(output, lambda: [part for part in self.parts if part is not self.top])

    def begins_bottom(self, module: Any, args: Any, output: torch.Tensor) -> None:
        """When the gradient of this output is there, only the bottom layer is left."""
        self._when_graded(output, lambda: [*self.parts, self.bottom])

    def _when_graded(self, output: torch.Tensor, parts: Callable[[], list[Moment]]) -> None:
        def now(gradient: torch.Tensor) -> None:
            self.parts = parts()
            self._look()

        if output.requires_grad:
            output.register_hook(now)

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Count what is made inside as a kind."""
        self.kind, before = kind, self.kind
        try:
            yield
        finally:
            self.kind = before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not follow what is made inside."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def is_gradient(self, parameter: torch.Tensor) -> None:
        """Count the gradient of a parameter as such."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        reference, kind, size = self.kinds[key]
        self.kinds[key] = reference, "gradients", size
        self.by_kind[kind] -= size
        self.by_kind["gradients"] += size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            result = self._real(func, args, kwargs, new=not tensors)
        elif func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if tensors[0].is_floating_point() else 0
        else:
            if func in _INDEXING:
                args = (args[0], _as_numbers(args[1]), *args[2:])
            result = func(*args, **kwargs)
        if func._overloadpacket in _FLOPS:
            self.flops += _FLOPS[func._overloadpacket](*args, **kwargs, out_val=result)
        for value in (*tensors, *tree_leaves(result)):
            if isinstance(value, torch.Tensor):
                self._follow(value)
        return result

    def _real(self, func: Any, args: Any, kwargs: Any, *, new: bool) -> Any:
        if new:
            with self.fake:
                result = func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                return result
        return func(*args, **kwargs)

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if self.paused or key in self._followed:
            if not hasattr(self, "held"):
                super()._follow(tensor)
            return
        super()._follow(tensor)

        def freed(_: object) -> None:
            _, kind, _ = self.kinds.pop(key)
            self.by_kind[kind] -= size

        self.kinds[key] = weakref.ref(storage, freed), self.kind, size
        self.by_kind[self.kind] += size
        self._look()

    def _look(self) -> None:
        held = self.live - self.held
        rest = held - self.by_kind["gradients"]
        for part in self.parts:
            part.rest = max(part.rest, rest)
            if held > part.held:
                part.held, part.kinds = held, dict(self.by_kind)


def _as_numbers(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Masks among indices as the positions that they pick, which must be known."""
    numbers: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            numbers += index.nonzero(as_tuple=True)
        else:
            numbers.append(index)
    return numbers


def marked(call: Callable[..., Any], meter: FakeMeter, kind: str) -> Callable[..., Any]:
    """A function whose new tensors count as a kind."""

    def call_marked(*args: Any, **kwargs: Any) -> Any:
        with meter.making(kind):
            return call(*args, **kwargs)

    return call_marked


@contextmanager
def kernels_of(target: str, meter: FakeMeter) -> Iterator[None]:
    """TRL's head as it is on a device type, its tensors marked."""

    class Head(chunked_logprob.ChunkedLogProbFunction):
        forward = staticmethod(marked(chunked_logprob.ChunkedLogProbFunction.forward, meter, "head"))
        backward = staticmethod(marked(chunked_logprob.ChunkedLogProbFunction.backward, meter, "head"))

    def add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
        with meter.pause():  # one kernel, which reads 16 bits and adds up in 32
            total.addmm_(one.float(), other.float())

    changes: list[tuple[Any, str, Any]] = [(trl_utils, "_ChunkedLogProbFunction", Head)]
    if target == "cuda":
        changes += [
            (chunked_logprob, name, lambda *args, **kwargs: None) for name in ("_forward_tile", "_backward_tile")
        ]
        changes += [(chunked_logprob, "_addmm_fp32", add_product), (trl_utils, "_use_triton", lambda device: True)]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)

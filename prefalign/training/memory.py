"""How the memory of a step is shared out between devices: one device, DDP, ZeRO-2, ZeRO-3, FSDP2.

Sources: ZeRO, arXiv 1910.02054, section 5; DeepSpeed 0.19's defaults for its buffers; PyTorch's DDP (gradients are copied into
buckets) and `fully_shard` (a block is gathered while it runs, and the next one with it).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from prefalign.training.dry_run import Counted, Moment

Profile = Literal["one", "ddp", "zero2", "zero3", "fsdp2"]
CASTING = ("zero2", "zero3", "fsdp2")
"""Profiles that compute in 16 bits by turning weights into them; the others do by autocast."""

REDUCE_BUCKET = 500_000_000
"""Numbers in DeepSpeed's gradient buffer (`reduce_bucket_size`), as the shipped profiles leave it."""
GATHERED = 1_000_000_000
"""Most numbers that ZeRO-3 keeps gathered (`stage3_max_live_parameters`), as the shipped profiles leave it."""
FOUR_BITS = 4.127 / 8
"""Bytes of a number in NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3)."""
EIGHT_BIT_STATE = 2.04
"""Bytes of Adam's two states in 8 bits with their scales, one of 4 bytes for each 256 numbers (bitsandbytes)."""
CONTEXT = 1 << 30
"""Taken on a GPU before the first tensor: CUDA's context, workspaces of its libraries. Assumed, not measured."""
FRAGMENTATION = 1.1
"""What the CUDA allocator reserves for passing tensors, over what they hold. Assumed, not measured."""


@dataclass
class Need:
    """Memory of one device at the fullest moment of a step, in bytes.

    Attributes:
        weights: the policy's, or this device's share of them.
        gathered: weights that other devices hold, while they are in use.
        reference: weights of a reference model of its own.
        optimizer: its state, with the 32-bit copy of weights where it keeps one.
        gradients: at that moment.
        exchange: buffers in which gradients are exchanged.
        activations: of the language model.
        vision: what the vision side made.
        head: logits in chunks, and what the loss makes of them.
        reserved: a GPU's own needs, and gaps between tensors.
    """

    weights: float = 0
    gathered: float = 0
    reference: float = 0
    optimizer: float = 0
    gradients: float = 0
    exchange: float = 0
    activations: float = 0
    vision: float = 0
    head: float = 0
    reserved: float = 0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.asdict(self).values())


def optimizer_bytes(args: Any, dtype: torch.dtype) -> float:
    """Bytes that the optimizer of TRL's arguments keeps per trained number, found by a step on one parameter.

    Args:
        args: TRL's arguments (`optim`, `optim_args`).
        dtype: of the parameter.
    """
    from transformers import Trainer

    try:
        cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        parameter = torch.nn.Parameter(torch.zeros(1024, 1024, dtype=dtype))
        parameter.grad = torch.zeros_like(parameter)
        optimizer = cls([parameter], **settings)
        optimizer.step()
    except (ImportError, ValueError, RuntimeError):
        return (
            2.0 if "8bit" in str(getattr(args.optim, "value", args.optim)) else 8.0
        )  # bitsandbytes is not here, or not for this device
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    return sum(value.untyped_storage().nbytes() for value in kept) / parameter.numel()


def share_out(
    counted: Counted,
    profile: Profile,
    *,
    devices: int,
    optimizer: float,
    width: int,
    quantised: bool = False,
    target: str = "cuda",
) -> Need:
    """What each of some devices needs.

    Args:
        counted: a step of one process in the profile's precision (see `CASTING`).
        profile: how weights, gradients and optimizer state are shared out.
        devices: how many.
        optimizer: bytes of optimizer state per trained number.
        width: bytes of a number in the weights that are computed with.
        quantised: frozen linear layers of the language model in 4 bits.
        target: `cuda` adds what a GPU takes for itself.
    """
    weights = counted.trainable + counted.frozen
    saved = dequantised = 0.0
    if quantised:
        saved = counted.linear_parameters * (width - FOUR_BITS)
        dequantised = counted.matrix_parameters * 2
    weights -= saved
    trained = counted.trainable_parameters
    if profile in ("one", "ddp"):
        need = _of(counted.peak)
        need.weights, need.reference, need.optimizer = weights, counted.reference, trained * optimizer
        if profile == "ddp" and devices > 1:
            need.exchange = counted.gradients
    else:
        need = _passing(counted)
        if profile == "fsdp2":
            need.optimizer = trained * optimizer / devices
            need.gradients = trained * 4 / devices
            need.weights = (trained * 4 + weights - counted.trainable) / devices
            root = max(0.0, (trained + counted.frozen_parameters) - counted.layers * counted.block_parameters)
            need.gathered = (root + 2 * counted.block_parameters) * width - 2 * saved / max(1.0, counted.layers)
            need.exchange = counted.block_parameters * width * counted.gradients / max(1.0, weights + saved)
            need.reference = counted.reference / devices
        else:
            # with 16 bits, and also without: DeepSpeed keeps a 32-bit copy of what trains
            need.optimizer = trained * (optimizer_in_32(optimizer, width) + 4) / devices
            need.gradients = counted.gradients / devices
            need.exchange = REDUCE_BUCKET * width
            need.weights, need.reference = weights, counted.reference
            if profile == "zero3":
                need.weights, need.reference = weights / devices, counted.reference / devices
                need.gathered = min(GATHERED * width, weights) * (devices > 1)
    need.activations += dequantised
    if target == "cuda":
        passing = need.activations + need.vision + need.head + need.gradients + need.gathered
        need.reserved = CONTEXT + (FRAGMENTATION - 1) * passing
    return need


def optimizer_in_32(optimizer: float, width: int) -> float:
    """Bytes of optimizer state per number on a 32-bit copy, from those on weights of `width` bytes."""
    return optimizer * 4 / width if optimizer > EIGHT_BIT_STATE else optimizer


def _of(moment: Moment) -> Need:
    kinds = {name: max(0.0, moment.kinds[name]) for name in ("activations", "vision", "head", "gradients")}
    return Need(**kinds)


def _passing(counted: Counted) -> Need:
    """The fullest moment without gradients, which are shared out as they come."""
    moment = max(counted.top, counted.bottom, key=lambda moment: moment.rest)
    vision, head = (min(moment.rest, max(0.0, moment.kinds[name])) for name in ("vision", "head"))
    return Need(vision=vision, head=head, activations=max(0.0, moment.rest - vision - head))

"""An evaluation in several processes, as torchrun and `accelerate launch` start them: each asks its share of the blocks."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta

from prefalign.models import ModelConfig


@dataclass(frozen=True)
class Share:
    """The share of one process.

    Attributes:
        index: which process this is; 0 joins what all of them wrote, scores and sums up.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process joins the others' replies."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all processes are here; one of them may well take hours longer."""
        if self.count == 1:
            return
        import torch.distributed

        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        torch.distributed.barrier()


ALONE = Share()


def this_share() -> Share:
    """The share that the launcher gave to this process; everything without a launcher."""
    return Share(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def on_own_device(model: ModelConfig, share: Share) -> ModelConfig:
    """The model on a GPU of this process's own, where the device is left to us and there are GPUs."""
    import torch

    if share.count == 1 or model.device != "auto" or not torch.cuda.is_available():
        return model
    return replace(model, device=f"cuda:{os.environ['LOCAL_RANK']}")

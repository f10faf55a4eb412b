"""Which rows each process answers in each iteration, and which answers each update takes."""

from __future__ import annotations

from collections.abc import Iterator

import torch


class RolloutBatches:
    """A batch sampler: the rows of a rollout, again and again as often as its updates visit it, then those of the next.

    Every process asks for it with its own number and gets its own rows; rows that do not fill a rollout are left to the next
    pass, which has another order. The order follows from the seed and the pass alone, so a resumed run goes on in it.

    Args:
        rows: how many there are.
        prompts: rows of one process in a rollout.
        visits: how often a rollout is visited.
        seed: of the order.
        process: number of this process.
        processes: how many there are.
    """

    def __init__(self, rows: int, *, prompts: int, visits: int, seed: int, process: int, processes: int):
        self.rows = rows
        self.prompts = prompts
        self.visits = visits
        self.seed = seed
        self.process = process
        self.processes = processes
        self.epoch = 0

    @property
    def batch_sampler(self) -> RolloutBatches:
        """Itself: where transformers looks for what it tells the number of the pass."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Take the order of a pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // (self.prompts * self.processes) * self.visits

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        together = self.prompts * self.processes
        for start in range(0, len(order) - together + 1, together):
            mine = order[start + self.process * self.prompts :][: self.prompts]
            for _ in range(self.visits):
                yield list(mine)


def visits(answers: int, *, passes: int, size: int, together: int, seed: int) -> list[list[int]]:
    """Numbers of the answers of each forward pass of an iteration: every pass over the rollout in a new order of its prompts.

    Args:
        answers: how many there are.
        passes: over all of them.
        size: answers of one forward pass.
        together: answers to one prompt, which follow each other and share a forward pass.
        seed: of the orders.
    """
    generator = torch.Generator().manual_seed(seed)
    planned = []
    for _ in range(passes):
        order = torch.randperm(answers // together, generator=generator).tolist()
        for start in range(0, len(order), size // together):
            some = order[start : start + size // together]
            planned.append([together * prompt + number for prompt in some for number in range(together)])
    return planned

"""A pairwise judge made of rewards: the response with the higher total is better."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from prefalign import stages
from prefalign.rewards import Combined, Response, Verdict, read_rewards


@dataclass
class ByReward:
    """Compares two responses by the total of weighted rewards; swapping them swaps the verdict.

    Attributes:
        rewards: the list, as a run's `rewards`.
        margin: totals that differ by no more than this are a tie.
    """

    rewards: list[dict[str, Any]]
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise ValueError(
                f"margin is {self.margin}; totals that differ by no more than it are a tie, so it is 0 or more."
            )
        self.combined  # noqa: B018  (bad settings are to fail here)

    @cached_property
    def combined(self) -> Combined:
        """The rewards with their weights."""
        return read_rewards(self.rewards)

    def check(self) -> None:
        """Look for the models of the rewards, without loading one."""
        self.combined.check()

    @property
    def version(self) -> str:
        """Settings of the rewards without this machine's paths, and the versions of those that have one."""
        settings = json.dumps([stages.portable(self.rewards), self.margin], sort_keys=True, default=str)
        versions = [str(entry.reward.version) for entry in self.combined.entries if hasattr(entry.reward, "version")]
        return "/".join(["rewards", hashlib.sha256(settings.encode()).hexdigest()[:8], *versions])

    def compare(self, pairs: Sequence[tuple[Response, Response]]) -> list[Verdict]:
        """One verdict for each pair; None where one of the two has no total."""
        totals = self.combined.score([response for pair in pairs for response in pair])["total"].tolist()
        failures = self.combined.failures
        return [
            Verdict(None, reason="no reply", error=failures.get(2 * row, failures.get(2 * row + 1)))
            if 2 * row in failures or 2 * row + 1 in failures
            else self._verdict(*totals[2 * row : 2 * row + 2])
            for row in range(len(pairs))
        ]

    def _verdict(self, first: float, second: float) -> Verdict:
        gap = first - second
        if gap != gap:
            return Verdict(None, reason="no total: a term with a weight is missing for one of the two")
        winner: Literal["first", "second", "tie"] = "tie"
        if abs(gap) > self.margin:
            winner = "first" if gap > 0 else "second"
        return Verdict(winner, reason=f"totals {first:.4g} and {second:.4g}")

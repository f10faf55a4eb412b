"""`prefalign doctor`: one batch of a run through every check, before the run.

The run is set up as its recipe does it, on a sample of its rows; nothing is written into its output folder and no weight changes.
Checks are functions of a case: of `case.Case` for preference training (`checks.CHECKS`), `scoring.RewardCase` for reward models
(`scoring.CHECKS`), and `drawing.DrawnCase` for runs on the policy's own answers (`drawn_checks`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from prefalign.doctor.findings import Finding, table

__all__ = ["SAMPLE", "STAGES", "Finding", "examine", "table"]

STAGES = ("train_preference", "train_reward_model", "train_ppo", "train_online")
"""Recipes that can be examined."""

SAMPLE = 64
"""Rows that are read, unless told otherwise."""


def examine(stage: ModuleType, config: Any, *, rows: int = SAMPLE) -> list[Finding]:
    """Set a run up and put it through all checks.

    Args:
        stage: the recipe, one of `STAGES`.
        config: its config.
        rows: how many rows are read; one batch of them is run.

    Raises:
        ValueError: whatever the recipe would refuse before its first step.
    """
    from prefalign.doctor import case, drawing, drawn_checks, scoring
    from prefalign.doctor.checks import CHECKS, run_checks

    name = Path(str(stage.__file__)).stem
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if name == "train_reward_model":
            return run_checks(scoring.prepare(config, rows=rows, scratch=scratch), scoring.CHECKS)
        if name == "train_ppo":
            return run_checks(drawing.prepare_ppo(config, rows=rows, scratch=scratch), drawn_checks.PPO_CHECKS)
        if name == "train_online":
            return run_checks(drawing.prepare_online(config, rows=rows, scratch=scratch), drawn_checks.ONLINE_CHECKS)
        return run_checks(case.prepare(config, rows=rows, scratch=scratch), CHECKS)

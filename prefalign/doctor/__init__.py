"""`prefalign doctor`: one batch of a run through every check, before the run.

The run is set up as its recipe does it, on a sample of its rows; nothing is written into its output folder and no weight changes.
Checks are functions of a `case.Case`, listed in `checks.CHECKS`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from prefalign.doctor.findings import Finding, table

__all__ = ["SAMPLE", "STAGES", "Finding", "examine", "table"]

STAGES = ("train_preference",)
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
    from prefalign.doctor.case import prepare
    from prefalign.doctor.checks import run_checks

    with tempfile.TemporaryDirectory() as scratch:
        return run_checks(prepare(stage, config, rows=rows, scratch=Path(scratch)))

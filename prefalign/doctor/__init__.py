"""`prefalign doctor`: one batch of a run through every check, before the run.

The run is set up as its recipe does it, on a sample of its rows; nothing is written into its output folder and no weight changes.
Checks are functions of a `Case`, in one literal list.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from prefalign.doctor import data, model, prompts, world
from prefalign.doctor.case import Case, prepare
from prefalign.doctor.findings import Finding, NotExaminedError, table

__all__ = ["CHECKS", "SAMPLE", "STAGES", "Case", "Finding", "examine", "prepare", "run_checks", "table"]

STAGES = ("train_preference",)
"""Recipes that can be examined."""

SAMPLE = 64
"""Rows that are read, unless told otherwise."""

CHECKS: tuple[tuple[str, Callable[[Case], list[Finding]]], ...] = (
    ("rows", data.check_rows),
    ("manifest", data.check_manifest),
    ("visual tokens", data.check_visual_tokens),
    ("max_length", data.check_max_length),
    ("pictures", data.check_pictures),
    ("other picture", data.check_other_picture),
    ("pairs", data.check_pairs),
    ("template", prompts.check_template),
    ("end of turn", prompts.check_end_of_turn),
    ("padding", prompts.check_padding),
    ("marks in answers", prompts.check_marks_in_answers),
    ("processor saved", prompts.check_processor_saved),
    ("what trains", model.check_what_trains),
    ("lora targets", model.check_lora),
    ("policy = reference", model.check_reference),
    ("reference cache", model.check_reference_cache),
    ("first loss", model.check_first_loss),
    ("gradients", model.check_gradients),
    ("weights move", model.check_weights_move),
    ("picture counts", model.check_picture),
    ("shared = plain", model.check_paths),
    ("device", world.check_device),
    ("disk", world.check_disk),
    ("output", world.check_output),
)


def examine(stage: ModuleType, config: Any, *, rows: int = SAMPLE) -> list[Finding]:
    """Set a run up and put it through all checks.

    Args:
        stage: the recipe, one of `STAGES`.
        config: its config.
        rows: how many rows are read; one batch of them is run.

    Raises:
        ValueError: whatever the recipe would refuse before its first step.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return run_checks(prepare(stage, config, rows=rows, scratch=Path(scratch)))


def run_checks(case: Case) -> list[Finding]:
    """What all checks find. A check that breaks has failed, with the error as its finding, and the others go on."""
    findings = []
    for name, check in CHECKS:
        try:
            findings += check(case)
        except NotExaminedError as reason:
            findings.append(Finding(name, "skip", str(reason)))
        except Exception as error:
            if os.environ.get("PREFALIGN_TRACEBACK"):
                raise
            advice = "The run would most likely stop with this error. PREFALIGN_TRACEBACK=1 shows where it came from."
            findings.append(Finding(name, "fail", f"{type(error).__name__}: {error}", advice))
    return findings

"""The checks of a preference run, in one literal list, and how checks are run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from prefalign.doctor import data, model, prompts, world
from prefalign.doctor.case import Case
from prefalign.doctor.findings import Finding, NotExaminedError

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


def run_checks(case: Any, checks: Sequence[tuple[str, Callable[[Any], list[Finding]]]] = CHECKS) -> list[Finding]:
    """What all checks find. A check that breaks has failed, with the error as its finding, and the others go on."""
    findings: list[Finding] = []
    for name, check in checks:
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

"""The report of a graded reward: what it gets right, what that is owed to, and whether its scores are chances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import prefalign
from prefalign.evals.statistics import Estimate
from prefalign.report.charts import line_chart
from prefalign.report.comparison import number
from prefalign.report.page import flattened, write_page
from prefalign.rewards.grading import METRICS, Grade

NAMES = {
    "accuracy": "Accuracy",
    "accuracy_without_facts": "without facts",
    "accuracy_shuffled_picture": "another row's picture",
    "accuracy_blank_picture": "blank picture",
    "accuracy_length_controlled": "Length-controlled accuracy",
    "length_correlation": "Score follows length",
    "swap_symmetry": "Same winner when swapped",
    "object_sensitivity": "Notices absent objects",
    "calibration_error": "Calibration error",
}
INDENTED = ("accuracy_without_facts", "accuracy_shuffled_picture", "accuracy_blank_picture")
SIGNED = ("length_correlation", "calibration_error")


def write_grades(
    output: Path,
    grades: Mapping[str, Grade],
    domains: Mapping[str, str],
    *,
    settings: Mapping[str, Any],
    problems: Sequence[str] = (),
) -> Path:
    """Write the report as one HTML file.

    Args:
        output: HTML file to write; a folder gets a `report.html`.
        grades: by name of the set of pairs.
        domains: `in` or `out` of the reward's domain, by set.
        settings: resolved config.
        problems: why the reward is unfit to train against; empty if it is fit.
    """
    rows = [
        {
            "name": NAMES[metric],
            "meaning": METRICS[metric],
            "indented": metric in INDENTED,
            "cells": [_cell(found.metrics[metric], share=metric not in SIGNED) for found in grades.values()],
        }
        for metric in METRICS
    ]
    charts = [
        line_chart(
            f"Chance said and share seen: {name}",
            {"seen": [(said, seen) for said, seen, _ in found.calibration], "exact": [(0.0, 0.0), (1.0, 1.0)]},
            x_label="chance that the first answer is better, by its score",
        )
        for name, found in grades.items()
    ]
    columns = [
        {"name": name, "domain": f"{domains[name]} of domain" if domains[name] == "out" else "in domain",
         "pairs": found.pairs, "missing": found.missing}
        for name, found in grades.items()
    ]  # fmt: skip
    return write_page(
        "grades.html.j2",
        output,
        title="Reward grade",
        version=prefalign.__version__,
        columns=columns,
        rows=rows,
        charts_=[chart for chart in charts if chart is not None],
        problems=list(problems),
        settings=flattened(settings),
    )


def _cell(estimate: Estimate, *, share: bool) -> dict[str, str] | None:
    if estimate.value is None:
        return None
    interval = ""
    if estimate.ci95 is not None:
        low, high = (number(bound, share=share) for bound in estimate.ci95)
        interval = f"{low} to {high}"
    return {"value": number(estimate.value, share=share, signed=not share), "interval": interval}

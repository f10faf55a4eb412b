"""The report of a run from its folders: training logs, evaluations before and after, and the pairs it learnt from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefalign.config import read_yaml
from prefalign.report.comparison import MODELS, write_comparison
from prefalign.report.examples import choose_examples

RUN_CONFIG = "prefalign_config.yaml"


def write_run_report(
    output: Path,
    *,
    results: Mapping[str, Any],
    runs: Mapping[str, Path],
    evaluations: Mapping[str, Path],
    config: Mapping[str, Any],
    pairs_report: str | None = None,
) -> Path:
    """Write the report of a run as one HTML file.

    Args:
        output: HTML file to write; a folder gets a `report.html`.
        results: `base`, `aligned` and perhaps `sft_control`, `difference`, `difference_sft`, each metric to `{"value", "ci95"}`
            (see `write_comparison`); `verdict`, a sentence or two, is the summary.
        runs: `aligned` and perhaps `sft_control` to the folder of a training run (`trainer_state.json` holds the curves).
        evaluations: the same names and `base` to the folder of an evaluation.
        config: resolved settings of the whole.
        pairs_report: address of the pairs' report, relative to this one.

    Returns:
        The file written.

    Raises:
        ValueError: if a run has no `trainer_state.json`, an evaluation lacks its answers, or results lack before or after.
    """
    sections: dict[str, Mapping[str, Any]] = {"Settings": config}
    histories = {}
    for name, folder in runs.items():
        histories[MODELS.get(name, name)] = _history(Path(folder))
        if (Path(folder) / RUN_CONFIG).is_file():
            sections[f"Training: {MODELS.get(name, name)}"] = read_yaml(Path(folder) / RUN_CONFIG)
    notes = []
    for name, folder in evaluations.items():
        measured = _json(Path(folder) / "results.json")
        sections[f"Evaluation: {MODELS.get(name, name)}"] = {
            key: measured[key] for key in ("model", "fingerprint", "settings") if key in measured
        }
        notes += [f"{MODELS.get(name, name)}: {note}" for note in measured.get("notes", ())]
    both = "base" in evaluations and "aligned" in evaluations
    return write_comparison(
        output,
        title="Before and after alignment",
        summary=results.get("verdict", ""),
        results={name: values for name, values in results.items() if isinstance(values, Mapping)},
        histories=histories,
        examples=choose_examples(evaluations["base"], evaluations["aligned"]) if both else None,
        config=sections,
        links={"The pairs it learnt from": pairs_report} if pairs_report else None,
        notes=notes,
    )


def _history(folder: Path) -> list[dict[str, Any]]:
    return _json(folder / "trainer_state.json")["log_history"]


def _json(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} is not there, so that run did not finish. Start the same command again; it resumes.")
    return json.loads(file.read_text(encoding="utf-8"))

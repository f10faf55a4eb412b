"""The page of a run: a verdict, before and after with intervals, curves, and the answers that changed most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefalign
from prefalign.report.charts import Chart, intervals, line_chart
from prefalign.report.examples import Example, Examples
from prefalign.report.page import MINUS, flattened, marked, thumbnail, write_page


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: `better` is -1 if lower is better, 1 if higher is, 0 if neither; a share is printed in %."""

    name: str
    meaning: str
    better: int
    share: bool = True


METRICS = {
    "chair_i": Metric("Invented objects (CHAIRi)", "Mentioned objects that are not in the picture", -1),
    "chair_s": Metric("Answers that invent (CHAIRs)", "Answers with at least one invented object", -1),
    "recall": Metric("Objects found (recall)", "Objects in the picture that are mentioned", 1),
    "recall_clear": Metric("Clear objects found", "Recall of clearly visible objects", 1),
    "objects_per_caption": Metric("Objects per caption", "How much is said", 0, share=False),
    "accuracy": Metric("Answer accuracy", "Questions answered right", 1),
    "reliance": Metric("Image reliance", "Accuracy lost when another picture is shown", 1),
}
MODELS = {"base": "Base", "aligned": "Aligned", "sft_control": "SFT control"}
CLASSES = {"Base": "base", "Aligned": "aligned", "SFT control": "sft"}
DIFFERENCES = {"difference": "Aligned", "difference_sft": "SFT control"}
COLUMNS = {"base": "Base", "aligned": "Aligned", "difference": "Aligned \u2212 base", "sft_control": "SFT control",
           "difference_sft": "SFT control \u2212 base"}  # fmt: skip
TILES = ("chair_i", "recall", "accuracy", "objects_per_caption")
PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"loss": "training", "eval_loss": "held out"}),
    ("Reward margin", {"rewards/margins": "training", "eval_rewards/margins": "held out"}),
    ("Reward accuracy", {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"}),
    ("Log-probability of the answers", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    ("Rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    ("Token accuracy", {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held out"}),
)


def write_comparison(
    output: Path,
    *,
    title: str,
    summary: str,
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    examples: Examples | None = None,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    links: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write numbers, curves and examples as one HTML file (`runs.write_run_report` reads them from folders).

    Args:
        output: HTML file to write; a folder gets a `report.html`.
        title: heading.
        summary: the verdict in a sentence or two.
        results: `base` and `aligned` (and `sft_control`) to metric to `{"value", "ci95"}`; `difference` (aligned minus base,
            paired) and `difference_sft` (SFT control minus base) of the same form. Shares are fractions, not per cent.
        histories: name of a training run to its TRL `log_history`.
        examples: answers that got better and that got worse (`choose_examples`).
        config: name of a section ("training", "provenance", ...) to its settings; nested mappings are flattened.
        links: label to address of another report, relative to this one.
        notes: what a reader must know of the numbers.

    Returns:
        The file written.

    Raises:
        ValueError: if `base` or `aligned` has no results, or a link is not relative.
    """
    missing = [name for name in ("base", "aligned") if not results.get(name)]
    if missing:
        raise ValueError(
            f"results have no {' and no '.join(missing)} (they have {', '.join(results) or 'nothing'}): there is no before and "
            "after to show. Evaluate both models first."
        )
    for address in (links or {}).values():
        if ":" in address or address.startswith("/"):
            raise ValueError(
                f"link {address!r} is not relative to the report, so it breaks when the folder is moved or shared. Give a path "
                "from the report's folder."
            )
    models = {key: label for key, label in MODELS.items() if results.get(key)}
    differences = {key: label for key, label in DIFFERENCES.items() if results.get(key)}
    columns = [name for name in COLUMNS if results.get(name)]
    keys = [key for key in METRICS if any(key in results[model] for model in models)]
    keys += sorted({key for model in models for key in results[model]} - set(METRICS))
    return write_page(
        "comparison.html.j2",
        Path(output),
        title=title,
        version=prefalign.__version__,
        summary=summary.replace(" %", "\u00a0%"),
        tiles=[_tile(key, results) for key in TILES if key in keys],
        columns=[COLUMNS[name] for name in columns],
        rows=[_row(key, results, columns) for key in keys],
        forests=_forests(keys, results, models, differences),
        classes=CLASSES,
        shapes={label: number for number, label in enumerate(MODELS.values())},
        histories=[{"name": name, "charts": _panels(history)} for name, history in histories.items()],
        examples=examples,
        kinds={
            "Got better": [_card(example) for example in examples.better] if examples else [],
            "Got worse": [_card(example) for example in examples.worse] if examples else [],
        },
        sections=[{"name": name, "rows": flattened(section)} for name, section in (config or {}).items()],
        links=dict(links or {}),
        notes=list(notes),
    )


def _metric(key: str) -> Metric:
    return METRICS.get(key, Metric(key, "", 0, share=False))


def number(value: float | None, *, share: bool, signed: bool = False) -> str:
    """A metric as text: a share in per cent with one decimal, another number with two or more digits; a true minus sign."""
    if value is None or not math.isfinite(value):
        return "not defined"
    sign = "+" if signed else ""
    text = f"{100 * value:{sign}.1f}" if share else f"{value:{sign}.2f}" if abs(value) >= 0.1 else f"{value:{sign}.3g}"
    return text.replace("-", MINUS)


def _entry(found: Mapping[str, Any] | None, metric: Metric, *, signed: bool = False) -> dict[str, Any] | None:
    if found is None or found["value"] is None:
        return None
    unit = "" if not metric.share else "\u00a0points" if signed else "\u00a0%"
    interval = ""
    if found.get("ci95") is not None:
        low, high = (number(end, share=metric.share, signed=signed) for end in found["ci95"])
        interval = f"{low} to {high}"
    return {"value": number(found["value"], share=metric.share, signed=signed) + unit, "interval": interval,
            **(_judgement(found, metric) if signed else {"word": "", "tone": ""})}  # fmt: skip


def _judgement(found: Mapping[str, Any], metric: Metric) -> dict[str, str]:
    """The word and colour of a difference: only an interval that excludes 0 gets a colour."""
    if found.get("ci95") is None:
        return {"word": "no interval", "tone": ""}
    low, high = found["ci95"]
    if not (low > 0 or high < 0):
        return {"word": "no clear change", "tone": ""}
    direction = 1 if low > 0 else -1
    if metric.better == 0:
        return {"word": "more" if direction > 0 else "less", "tone": ""}
    return {"word": "better", "tone": "good"} if direction == metric.better else {"word": "worse", "tone": "bad"}


def _row(key: str, results: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    metric = _metric(key)
    hint = {-1: "\u2193 lower is better", 0: "", 1: "\u2191 higher is better"}[metric.better]
    return {
        "name": metric.name,
        "meaning": metric.meaning,
        "hint": hint,
        "entries": [_entry(results[name].get(key), metric, signed=name in DIFFERENCES) for name in columns],
    }


def _tile(key: str, results: Mapping[str, Any]) -> dict[str, Any]:
    metric = _metric(key)
    return {
        "name": metric.name,
        "before": _entry(results["base"].get(key), metric),
        "after": _entry(results["aligned"].get(key), metric),
        "change": _entry((results.get("difference") or {}).get(key), metric, signed=True),
    }


def _forests(
    keys: list[str], results: Mapping[str, Any], models: Mapping[str, str], differences: Mapping[str, str]
) -> list[Chart]:
    """Levels and paired differences of the metrics that are shares: they have one scale in common."""

    def rows(columns: Mapping[str, str], arrows: bool) -> list[tuple[str, dict[str, tuple[float, float, float]]]]:
        found = []
        for key in keys:
            metric = _metric(key)
            if not metric.share:
                continue
            marks = {}
            for column, label in columns.items():
                entry = results[column].get(key)
                if entry is not None and entry["value"] is not None and entry.get("ci95") is not None:
                    three = (100 * entry["value"], 100 * entry["ci95"][0], 100 * entry["ci95"][1])
                    if all(math.isfinite(value) for value in three):
                        marks[label] = three
            arrow = {-1: ", better: left", 0: "", 1: ", better: right"}[metric.better] if arrows else ""
            if marks:
                found.append((metric.name + arrow, marks))
        return found

    charts = [
        intervals("Before and after", rows(models, False), x_label="%", zero=False),
        intervals("Change against the base", rows(differences, True), x_label="points", zero=True),
    ]
    return [chart for chart in charts if chart is not None]


def _panels(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    charts = []
    for title, columns in PANELS:
        series = {}
        for key, label in columns.items():
            points = [
                (float(entry["step"]), float(entry[key]))
                for entry in history
                if isinstance(entry.get(key), (int, float)) and "step" in entry
            ]
            if points:
                series[label] = points
        chart = line_chart(title, series) if series else None
        if chart is not None:
            charts.append(chart)
    return charts


def _card(example: Example) -> dict[str, Any]:
    before, after = marked(
        example.before, example.after, invented_before=example.invented_before, invented_after=example.invented_after
    )
    return {
        "example": example,
        "picture": thumbnail(example.image) if example.image is not None else None,
        "pieces_before": before,
        "pieces_after": after,
    }

"""From scored items to metrics with intervals, to the comparison of two runs, to a table. Every metric is a ratio of sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefalign.evals import Scored, statistics
from prefalign.evals.reliance import CONDITIONS, LEAST_ABOVE_CHANCE

MOST_MISSING = 0.01
SHORT = ("yesno", "attributes")


@dataclass(frozen=True)
class Metric:
    """sum of `above` columns / sum of `below` columns, over the items of some evals that have these columns.

    Attributes:
        evals: whose items enter.
        above: numerator columns, added up (a name may be there twice).
        below: denominator columns, added up; the first decides which items enter.
        kind: only items of this kind; None: all.
    """

    evals: tuple[str, ...]
    above: tuple[str, ...]
    below: tuple[str, ...]
    kind: str | None = None

    def rows(self, items: Sequence[Scored]) -> list[Scored]:
        return [item for item in self.asked(items) if self.below[0] in item.numbers]

    def asked(self, items: Sequence[Scored]) -> list[Scored]:
        return [item for item in items if item.eval in self.evals and self.kind in (None, item.kind)]


CHAIR = {
    "chair_i": (("hallucinated",), ("mentions",)),
    "chair_s": (("hallucinating",), ("captions",)),
    "recall": (("hit",), ("truth",)),
    "recall_clear": (("hit_clear",), ("truth_clear",)),
    "objects_per_caption": (("mentions",), ("captions",)),
    "words_per_caption": (("words",), ("captions",)),
}
HEADLINES = (
    "chair_i", "chair_s", "recall", "recall_clear", "objects_per_caption", "words_per_caption",
    "accuracy", "yesno_accuracy", "yesno_precision", "yesno_recall", "yesno_f1", "yes_ratio", "attribute_accuracy",
    "reliance", "reliance_blank", "reliance_noise",
)  # fmt: skip
"""The figures that `table` shows, in order."""
YESNO = {
    "accuracy": (("correct",), ("asked",)),
    "precision": (("tp",), ("said_yes",)),
    "recall": (("tp",), ("gold_yes",)),
    "f1": (("tp", "tp"), ("said_yes", "gold_yes")),
}


def metrics_of(items: Sequence[Scored]) -> dict[str, Metric]:
    """The metrics that these items allow, by name."""
    table = {name: Metric(("chair",), above, below) for name, (above, below) in CHAIR.items()}
    table["accuracy"] = Metric(SHORT, ("correct",), ("asked",))
    table |= {f"yesno_{name}": Metric(("yesno",), above, below) for name, (above, below) in YESNO.items()}
    table["yes_ratio"] = Metric(("yesno",), ("said_yes",), ("asked",))
    for name, (above, below) in YESNO.items():
        table[f"yesno_strict_{name}"] = Metric(("yesno",), _strictly(above), _strictly(below))
    table["yes_ratio_strict"] = Metric(("yesno",), ("strict_said_yes",), ("asked",))
    table["attribute_accuracy"] = Metric(("attributes",), ("correct",), ("asked",))
    for eval_name, name in (("attributes", "attribute_accuracy"), ("yesno", "yesno_accuracy"), ("yesno", "yesno_f1")):
        kinds = sorted({item.kind for item in items if item.eval == eval_name and item.kind})
        if eval_name == "attributes" or len(kinds) > 1:
            for kind in kinds:
                table[f"{name}.{kind}"] = Metric(table[name].evals, table[name].above, table[name].below, kind)
    for condition in CONDITIONS:
        asked = (f"asked_{condition}",)
        drop = "reliance" if condition == "mismatched" else f"reliance_{condition}"
        for name, column, below in (
            (drop, f"drop_{condition}", asked),
            (f"{drop}_normalised", f"drop_{condition}", (f"above_chance_{condition}",)),
            (f"accuracy_{condition}", f"correct_{condition}", asked),
            (f"flip_rate_{condition}", f"flip_{condition}", asked),
            (f"logprob_sum_drop_{condition}", f"logprob_sum_drop_{condition}", (f"scored_{condition}",)),
            (f"logprob_drop_positive_{condition}", f"lower_{condition}", (f"scored_{condition}",)),
        ):
            table[name] = Metric(("reliance",), (column,), below)
    table["follow_rate"] = Metric(("reliance",), ("follow",), ("followable",))
    return {name: metric for name, metric in table.items() if metric.rows(items)}


def aggregate(items: Sequence[Scored], *, draws: int = statistics.DRAWS, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Every metric with its 95 % interval.

    Returns:
        name -> `{"value", "ci95", "n", "missing"}`, with `invalid` (a reason) where more than 1 % of what was asked has no
        score, or the figure is not defined.
    """
    results: dict[str, dict[str, Any]] = {}
    cache: dict[Any, statistics.Resampled] = {}
    for name, metric in metrics_of(items).items():
        rows, asked = metric.rows(items), metric.asked(items)
        key = tuple(map(id, rows))
        if key not in cache:
            cache[key] = _resample({"": rows}, draws, seed)
        estimate = _with(cache[key], metric, ("",), len(rows), name)
        results[name] = _entry(estimate, _missing(metric, asked))
    for condition in CONDITIONS:
        rows = Metric(("reliance",), (), (f"scored_{condition}",)).rows(items)
        if rows:
            values = [row.numbers[f"logprob_drop_{condition}"] for row in rows]
            found = statistics.median(values, [row.group for row in rows], draws=draws, seed=seed)
            results[f"logprob_drop_{condition}"] = _entry(found, 0.0)
    return results


def compare(
    items: Sequence[Scored], baseline: Sequence[Scored], *, draws: int = statistics.DRAWS, seed: int = 0
) -> tuple[dict[str, dict[str, Any]], list[dict[str, str]]]:
    """This run minus the baseline on the items that both scored.

    Binary items get an exact McNemar test, which takes items about one picture for independent (the interval does not), and
    counts of gains, losses and ties; ratios the paired bootstrap. `p_holm` is Holm's correction over all of them. A difference
    is `invalid` where more than 1 % is missing in either run. For `logprob_drop_c` it is the median of per-item differences.

    Returns:
        `difference.NAME` -> `{"value", "ci95", "n", "p", "p_holm", "test"}`, and the items that went from right to wrong.

    Raises:
        ValueError: if the two runs share no item.
    """
    before = {(item.eval, item.id): item for item in baseline}
    shared = [item for item in items if (item.eval, item.id) in before]
    if not shared:
        raise ValueError(
            "this run and its baseline have no item in common, so nothing can be paired. Give both the same data."
        )
    results: dict[str, dict[str, Any]] = {}
    cache: dict[Any, statistics.Resampled] = {}
    for name, metric in metrics_of(shared).items():
        rows = [row for row in metric.rows(shared) if metric.below[0] in before[row.eval, row.id].numbers]
        if not rows:
            continue
        old = [before[row.eval, row.id] for row in rows]
        key = tuple(map(id, rows))
        if key not in cache:
            cache[key] = _resample({"new:": rows, "old:": old}, draws, seed)
        estimate, p = _difference(cache[key], metric, len(rows), name)
        missing = max(
            _missing(metric, metric.asked(run)) for run in (shared, [before[row.eval, row.id] for row in shared])
        )
        results[f"difference.{name}"] = {**_entry(estimate, missing), "p": p, "test": "paired cluster bootstrap"}
        if all(_binary(metric, row) for row in [*rows, *old]):
            pairs = [
                (row.numbers[metric.above[0]], was.numbers[metric.above[0]]) for row, was in zip(rows, old, strict=True)
            ]
            gains, losses = sum(now > was for now, was in pairs), sum(now < was for now, was in pairs)
            counts = {"gains": gains, "losses": losses, "ties": len(pairs) - gains - losses}
            results[f"difference.{name}"] |= {"p": statistics.mcnemar(gains, losses), "test": "exact McNemar", **counts}
    for condition in CONDITIONS:
        column = f"logprob_drop_{condition}"
        rows = [row for row in shared if column in row.numbers and column in before[row.eval, row.id].numbers]
        if rows:
            change = [row.numbers[column] - before[row.eval, row.id].numbers[column] for row in rows]
            found = statistics.median(change, [row.group for row in rows], draws=draws, seed=seed)
            p = statistics.paired_means(change, [0.0] * len(change)).p_wilcoxon if len(change) > 1 else 1.0
            results[f"difference.{column}"] = {**_entry(found, 0.0), "p": p, "test": "Wilcoxon signed-rank"}
    for name, p in statistics.holm({name: entry["p"] for name, entry in results.items()}).items():
        results[name]["p_holm"] = p
    regressions = [
        {"eval": item.eval, "id": item.id}
        for item in shared
        if item.numbers.get("correct") == 0 and before[item.eval, item.id].numbers.get("correct") == 1
    ]
    return results, regressions


def counts(items: Sequence[Scored]) -> dict[str, dict[str, float]]:
    """Per eval: how many were asked, the shares that are unparsed, empty or failed, and words per reply."""
    found: dict[str, dict[str, float]] = {}
    for eval_name in dict.fromkeys(item.eval for item in items):
        rows = [item for item in items if item.eval == eval_name]
        states: list[str] = [item.status for item in rows]
        found[eval_name] = {"n": len(rows)}
        found[eval_name] |= {
            f"{state}_rate": states.count(state) / len(states) for state in ("unparsed", "empty", "error")
        }
        words = [item.numbers["words"] for item in rows if "words" in item.numbers]
        if words:
            found[eval_name]["mean_words"] = sum(words) / len(words)
    return found


def table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The headline metrics as text: value, interval, items, and the difference to the baseline where there is one."""
    names = [name for name in HEADLINES if name in metrics]
    with_baseline = any(name.startswith("difference.") for name in metrics)
    rows = [
        [
            "metric",
            "value",
            "95 % interval",
            "n",
            *(["difference", "95 % interval", "p (Holm)"] if with_baseline else []),
            "",
        ]
    ]
    for name in names:
        entry = metrics[name]
        change = metrics.get(f"difference.{name}")
        cells = [name, _number(entry["value"]), _interval(entry["ci95"]), str(entry["n"])]
        if with_baseline and change is not None:
            cells += [_number(change["value"], "+"), _interval(change["ci95"]), f"{change['p_holm']:.3g}"]
        elif with_baseline:
            cells += ["", "", ""]
        rows.append([*cells, f"INVALID: {entry['invalid']}" if "invalid" in entry else ""])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=False)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells, row[-1]]).rstrip())
    return "\n".join(lines)


def _strictly(columns: tuple[str, ...]) -> tuple[str, ...]:
    """The same columns in the released code's reading; what was asked and what is true does not depend on it."""
    return tuple(f"strict_{column}" if column in ("correct", "tp", "said_yes") else column for column in columns)


def _resample(runs: Mapping[str, Sequence[Scored]], draws: int, seed: int) -> statistics.Resampled:
    """Columns `RUNname` for every number that all rows of a run have; rows of several runs are paired."""
    columns: dict[str, list[float]] = {}
    for run, rows in runs.items():
        names = set.intersection(*(set(row.numbers) for row in rows))
        columns |= {run + name: [row.numbers[name] for row in rows] for name in sorted(names)}
    groups = [row.group for row in next(iter(runs.values()))]
    return statistics.resample(columns, groups, draws=draws, seed=seed)


def _with(
    resampled: statistics.Resampled, metric: Metric, runs: Sequence[str], n: int, name: str
) -> statistics.Estimate:
    summed = _summed(resampled, metric, runs)
    estimate = summed.ratio(f"{runs[0]}above", f"{runs[0]}below", n=n)
    small = name.endswith("_normalised") and summed.sums[f"{runs[0]}below"] < LEAST_ABOVE_CHANCE * n
    return statistics.Estimate(None, None, n) if small else estimate


def _difference(
    resampled: statistics.Resampled, metric: Metric, n: int, name: str
) -> tuple[statistics.Estimate, float]:
    summed = _summed(resampled, metric, ("new:", "old:"))
    if (
        name.endswith("_normalised")
        and min(summed.sums["new:below"], summed.sums["old:below"]) < LEAST_ABOVE_CHANCE * n
    ):
        return statistics.Estimate(None, None, n), 1.0
    return summed.difference(("new:above", "old:above"), ("new:below", "old:below"), n=n)


def _summed(resampled: statistics.Resampled, metric: Metric, runs: Sequence[str]) -> statistics.Resampled:
    """Columns `RUNabove` and `RUNbelow` of a metric."""
    sums: dict[str, float] = {}
    drawn: dict[str, Any] = {}
    for run in runs:
        for part, columns in (("above", metric.above), ("below", metric.below)):
            sums[run + part] = sum(resampled.sums[run + column] for column in columns)
            drawn[run + part] = sum(resampled.draws[run + column] for column in columns)
    return statistics.Resampled(sums, drawn, resampled.clusters)


def _binary(metric: Metric, row: Scored) -> bool:
    one = len(metric.above) == len(metric.below) == 1
    return one and row.numbers[metric.below[0]] == 1 and row.numbers[metric.above[0]] in (0, 1)


def _missing(metric: Metric, asked: Sequence[Scored]) -> float:
    """Share of what was asked that has no score; log-probs and known labels, which only some items have, miss nothing."""
    if metric.evals != ("reliance",):
        return sum(item.status in ("empty", "error") for item in asked) / len(asked)
    condition = metric.below[0].removeprefix("asked_").removeprefix("above_chance_")
    posed = [item for item in asked if f"posed_{condition}" in item.numbers]
    return sum(f"asked_{condition}" not in item.numbers for item in posed) / len(posed) if posed else 0.0


def _entry(estimate: statistics.Estimate, missing: float) -> dict[str, Any]:
    entry: dict[str, Any] = {"value": estimate.value, "ci95": list(estimate.ci95) if estimate.ci95 else None, "n": estimate.n,
                             "missing": missing}  # fmt: skip
    if estimate.empty_draws:
        entry["empty_draws"] = estimate.empty_draws
    if missing > MOST_MISSING:
        entry["invalid"] = f"{missing:.1%} of what was asked has no score"
    elif estimate.value is None:
        entry["invalid"] = "not defined"
    return entry


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"[{interval[0]:.4f}, {interval[1]:.4f}]"

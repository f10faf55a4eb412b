"""Geometry of the charts: numbers in, coordinates out; `charts.html.j2` draws them as inline SVG.

Every chart is `WIDTH` units wide and is shown at about that many pixels on a phone and in a column of a desktop page, so
that its lettering is of one size everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 340
HEIGHT = 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MAX_POINTS = 300
BINS = 16  # of a histogram, about
STYLES = {"rejected": 1, "held out": 2}  # how a curve is drawn, by its label; others are 0


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in chart units, and what it says."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """What all charts have; `series` is what differs."""

    title: str
    x_label: str
    width: int
    height: int
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    series: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, about `count` of them, that cover [low, high] from the inside (1, 2, 2.5 or 5 times a power of ten)."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [0.0 if number == 0 else number * step for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: few digits, a true minus sign, thousands as k."""
    text = f"{value / 1000:.4g}k" if abs(value) >= 10_000 else f"{value:.4g}"
    if "e" in text:
        text = f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return text.replace("-", "\u2212")


def line_chart(
    title: str, series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str = "step"
) -> Chart | None:
    """Curves over steps.

    Args:
        title: heading of the chart.
        series: label to (x, y) points in order; points that are not finite break the line and are counted in a note.
        x_label: name of the x axis.

    Returns:
        The chart, or None without a finite point.
    """
    finite = {
        label: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for label, points in series.items()
    }
    everything = [point for points in finite.values() for point in points]
    if not everything:
        return None
    lost = sum(len(points) for points in series.values()) - len(everything)
    x_low, x_high = _range([x for x, _ in everything], pad=0.0)
    y_low, y_high = _range([y for _, y in everything], pad=0.06)
    across, up = _scales(x_low, x_high, y_low, y_high)
    drawn = []
    for label, points in series.items():
        step = max(1, math.ceil(len(points) / MAX_POINTS))
        kept = [point for i, point in enumerate(points) if i % step == 0 or i == len(points) - 1]
        dots = [
            {"x": across(x), "y": up(y), "title": f"{label}: {short(y)} at {x_label} {short(x)}"}
            for x, y in kept
            if math.isfinite(x) and math.isfinite(y)
        ]
        drawn.append({"label": label, "style": STYLES.get(label, 0), "path": _path(kept, across, up), "dots": dots,
                      "last": short(finite[label][-1][1]) if finite[label] else ""})  # fmt: skip
    note = f"{lost} value{'s' * (lost != 1)} not finite" if lost else ""
    return Chart(title, x_label, WIDTH, HEIGHT, [Tick(across(x), short(x)) for x in nice_ticks(x_low, x_high)],
                 [Tick(up(y), short(y)) for y in nice_ticks(y_low, y_high)], drawn, note)  # fmt: skip


def histogram(
    title: str, series: Mapping[str, Mapping[float, int]], *, x_label: str, whole: bool = False
) -> Chart | None:
    """Bars of counts, one set beside the other.

    Args:
        title: heading of the chart.
        series: label to how often each value occurs.
        x_label: name and unit of the values.
        whole: values are whole numbers, so bins are at least 1 wide.

    Returns:
        The chart, or None without a value. Values beyond the 99.5th percentile join the last bin, which then ends in `+`.
    """
    counts: dict[float, int] = {}
    for values in series.values():
        for value, number in values.items():
            counts[value] = counts.get(value, 0) + number
    if not counts:
        return None
    low, top = min(counts), max(counts)
    high = _percentile(counts, 0.995)
    ticks = nice_ticks(low, high, BINS) if high > low else []
    step = max(ticks[1] - ticks[0] if len(ticks) > 1 else 1.0, 1.0 if whole else 0.0)
    if whole:
        step = math.ceil(step)
    start = math.floor(low / step + 1e-9) * step
    number = max(1, math.floor((high - start) / step + 1e-9) + 1)
    heights = {label: [0] * number for label in series}
    for label, values in series.items():
        for value, count in values.items():
            heights[label][min(number - 1, math.floor((value - start) / step + 1e-9))] += count
    most = max(max(row) for row in heights.values())
    across, up = _scales(start, start + number * step, 0, most * 1.06)
    slot = across(start + step) - across(start)
    wide = (slot - min(3.0, slot * 0.25)) / len(series)
    drawn = []
    for index, (label, row) in enumerate(heights.items()):
        bars = []
        for i, count in enumerate(row):
            if count:
                left, right = start + i * step, start + (i + 1) * step
                reach = _bin_name(left, right, whole, last=i == number - 1 and top > high)
                reach = f"{reach} {x_label}" if whole else f"{x_label} {reach}"
                bars.append({"x": across(left) + index * wide, "y": up(count), "width": max(wide, 1.0),
                             "height": up(0) - up(count), "title": f"{label}: {count:,} at {reach}"})  # fmt: skip
        drawn.append({"label": label, "number": index, "bars": bars})
    x_ticks = [Tick(across(x), short(x)) for x in nice_ticks(start, start + number * step, 6)]
    y_ticks = [Tick(up(y), short(y)) for y in nice_ticks(0, most * 1.06) if y == int(y)]
    note = f"the last bar holds all above {short(start + (number - 1) * step)}" if top > start + number * step else ""
    return Chart(title, x_label, WIDTH, HEIGHT, x_ticks, y_ticks, drawn, note)


def intervals(
    title: str, rows: Sequence[tuple[str, Mapping[str, tuple[float, float, float]]]], *, x_label: str, zero: bool
) -> Chart | None:
    """Values with intervals, one row for each measure and one mark for each model.

    Args:
        title: heading of the chart.
        rows: (name, label to (value, low, high)) from top to bottom.
        x_label: unit of the x axis.
        zero: draw a line at 0 (differences).

    Returns:
        The chart, or None without rows.
    """
    numbers = [number for _, marks in rows for mark in marks.values() for number in mark]
    if not numbers:
        return None
    low, high = _range([*numbers, 0.0] if zero else numbers, pad=0.05)
    labels = list(dict.fromkeys(label for _, marks in rows for label in marks))
    row_height = 26 + 11 * len(labels)
    height = TOP + row_height * len(rows) + BOTTOM
    left = 14
    across = _linear(low, high, left, WIDTH - RIGHT - 4)
    drawn = []
    for i, (name, marks) in enumerate(rows):
        top = TOP + i * row_height
        points = []
        for label, (value, start, stop) in marks.items():
            number = labels.index(label)
            points.append({"x": across(value), "from": across(start), "to": across(stop), "number": number,
                           "y": top + 25 + number * 11,
                           "title": f"{name}, {label}: {short(value)} [{short(start)}, {short(stop)}]"})  # fmt: skip
        drawn.append({"name": name, "top": top - 2, "y": top + 13, "points": points})
    ticks = [Tick(across(x), short(x)) for x in nice_ticks(low, high, 5)]
    origin = [Tick(across(0.0), "0")] if zero else []
    return Chart(title, x_label, WIDTH, height, ticks, origin, [{"rows": drawn, "labels": labels}])


def _bin_name(left: float, right: float, whole: bool, *, last: bool) -> str:
    if last:
        return f"{short(left)} or more"
    if whole:
        return short(left) if right - left == 1 else f"{short(left)} to {short(right - 1)}"
    return f"{short(left)} to {short(right)}"


def _percentile(counts: Mapping[float, int], share: float) -> float:
    wanted, seen = share * sum(counts.values()), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted:
            return value
    return max(counts)


def _range(values: Sequence[float], *, pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        extra = abs(low) * 0.1 or 1.0
        return low - extra, high + extra
    return low - pad * (high - low), high + pad * (high - low)


def _linear(low: float, high: float, start: float, stop: float) -> Any:
    return lambda value: round(start + (value - low) / (high - low) * (stop - start), 2)


def _scales(x_low: float, x_high: float, y_low: float, y_high: float) -> tuple[Any, Any]:
    return _linear(x_low, x_high, LEFT, WIDTH - RIGHT), _linear(y_low, y_high, HEIGHT - BOTTOM, TOP)


def _path(points: Sequence[tuple[float, float]], across: Any, up: Any) -> str:
    parts, pen_up = [], True
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen_up = True
            continue
        parts.append(f"{'M' if pen_up else 'L'}{across(x)} {up(y)}")
        pen_up = False
    return " ".join(parts)

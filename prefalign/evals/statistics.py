"""Intervals and paired tests. Items about one picture are resampled together; every metric is a ratio of sums.

Source: the spec's section 7 (clusters, percentile, 10,000 draws, empty draws skipped and counted). Resampling and tests are
scipy's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

DRAWS = 10_000


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
        value: None where it is not defined (0/0).
        ci95: percentile interval; None if there are fewer than two clusters or every draw was empty.
        n: number of items.
        empty_draws: draws left out because their denominator was 0.
    """

    value: float | None
    ci95: tuple[float, float] | None
    n: int
    empty_draws: int = 0


@dataclass(frozen=True)
class Resampled:
    """Sums of named columns over all items and over each bootstrap draw of clusters.

    Attributes:
        sums: observed sum per column.
        draws: (draws,) sums per column; the same clusters in the same draw for every column.
        clusters: number of clusters; with fewer than two there is no interval.
    """

    sums: dict[str, float]
    draws: dict[str, np.ndarray]
    clusters: int

    def ratio(self, numerator: str, denominator: str, *, n: int) -> Estimate:
        """Estimate of sum(numerator) / sum(denominator)."""
        return self._estimate(self._value(numerator, denominator), self._drawn(numerator, denominator), n)

    def difference(self, numerator: tuple[str, str], denominator: tuple[str, str], *, n: int) -> tuple[Estimate, float]:
        """Estimate of the first ratio minus the second over the same draws, with its two-sided bootstrap p-value.

        The p-value is 2 min(share of draws <= 0, share >= 0), each count plus one, at most 1.
        """
        import numpy as np

        values = [self._value(*pair) for pair in zip(numerator, denominator, strict=True)]
        drawn = self._drawn(numerator[0], denominator[0]) - self._drawn(numerator[1], denominator[1])
        value = None if values[0] is None or values[1] is None else values[0] - values[1]
        known = drawn[~np.isnan(drawn)]
        tail = min((known <= 0).sum(), (known >= 0).sum())
        p = min(1.0, 2 * (tail + 1) / (len(known) + 1)) if self.clusters > 1 else 1.0
        return self._estimate(value, drawn, n), float(p)

    def _estimate(self, value: float | None, drawn: np.ndarray, n: int) -> Estimate:
        return _estimate(value, drawn, n) if self.clusters > 1 else Estimate(value, None, n)

    def _value(self, numerator: str, denominator: str) -> float | None:
        below = self.sums[denominator]
        return self.sums[numerator] / below if below else None

    def _drawn(self, numerator: str, denominator: str) -> np.ndarray:
        import numpy as np

        below = self.draws[denominator]
        return np.where(below != 0, self.draws[numerator] / np.where(below != 0, below, 1), np.nan)


def resample(
    columns: Mapping[str, Sequence[float]], groups: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> Resampled:
    """Draw whole clusters with replacement (`scipy.stats.bootstrap`) and sum every column in each draw.

    Args:
        columns: one number per item and column.
        groups: cluster of each item; sorted before drawing, so the order of items does not matter.
    """
    import numpy as np
    from scipy import stats

    names = list(columns)
    values = np.array([columns[name] for name in names], dtype=np.float64).reshape(len(names), len(groups))
    if not len(groups):
        return Resampled(dict.fromkeys(names, 0.0), {name: np.zeros(draws) for name in names}, 0)
    clusters, member = np.unique(np.asarray(groups), return_inverse=True)
    totals = np.stack([np.bincount(member, weights=row, minlength=len(clusters)) for row in values])
    if len(clusters) == 1:
        drawn = np.repeat(totals, draws, axis=1)
    else:
        drawn = stats.bootstrap(
            (np.arange(len(clusters)),), lambda drawn, axis: _sums(drawn, totals), n_resamples=draws, batch=500,
            vectorized=True, axis=-1, method="percentile", rng=np.random.default_rng(seed),
        ).bootstrap_distribution  # fmt: skip
    sums = dict(zip(names, map(float, totals.sum(axis=1)), strict=True))
    return Resampled(sums, dict(zip(names, drawn, strict=True)), len(clusters))


def median(values: Sequence[float], groups: Sequence[str], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Median (the lower one of an even number) with a cluster-bootstrap interval."""
    import numpy as np
    from scipy import stats

    if not len(values):
        return Estimate(None, None, 0)
    order = np.argsort(values)
    ranked = np.asarray(values, dtype=np.float64)[order]
    clusters, member = np.unique(np.asarray(groups)[order], return_inverse=True)

    def weighted_median(drawn: np.ndarray, axis: int) -> np.ndarray:
        below = _counts(drawn, len(clusters))[:, member].cumsum(axis=1)
        found = ranked[(below * 2 >= below[:, -1:]).argmax(axis=1)]
        return found if drawn.ndim > 1 else found[0]

    value = float(ranked[(len(ranked) - 1) // 2])
    if len(clusters) == 1:
        return Estimate(value, None, len(ranked))
    drawn = stats.bootstrap(
        (np.arange(len(clusters)),), weighted_median, n_resamples=draws, batch=500, vectorized=True, axis=-1,
        method="percentile", rng=np.random.default_rng(seed),
    ).bootstrap_distribution  # fmt: skip
    return _estimate(value, drawn, len(ranked))


def weighted_kappa(first: Sequence[int], second: Sequence[int], *, grades: int) -> float | None:
    """Cohen's kappa with quadratic weights: agreement of two gradings of the same things, over that of chance.

    1 less the mean squared difference over that of all pairs of a first and a second grade (Cohen 1968).

    Args:
        first: grades from 0 to `grades` - 1.
        second: the other grades of the same things, in the same order.
        grades: how many grades there are; it only bounds what is accepted.

    Returns:
        1 for equal gradings, 0 for chance, below 0 for less; None without any grade, or where all grades of both are one value.

    Raises:
        ValueError: lists of different lengths, or a grade outside the range.

    Example:
        >>> weighted_kappa([0, 1, 2, 4], [0, 2, 2, 4], grades=5)
        0.9411764705882353
    """
    import numpy as np

    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} grades: give both grades of each thing.")
    if strange := [grade for grade in (*first, *second) if not 0 <= grade < grades]:
        raise ValueError(f"grade {strange[0]} is not between 0 and {grades - 1}. Count from 0, or raise `grades`.")
    if not len(first):
        return None
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    chance = float(np.mean(np.subtract.outer(one, other) ** 2))
    return None if chance == 0 else 1 - float(np.mean((one - other) ** 2)) / chance


def mcnemar(gains: int, losses: int) -> float:
    """Exact two-sided McNemar p-value from the discordant counts; 1 if there are none."""
    from scipy import stats

    return float(stats.binomtest(gains, gains + losses).pvalue) if gains + losses else 1.0


@dataclass(frozen=True)
class PairedMeans:
    """Mean of the per-item differences: paired t (`error`, `ci95`, `p_t`) and Wilcoxon signed-rank (`p_wilcoxon`)."""

    difference: float
    error: float
    ci95: tuple[float, float]
    p_t: float
    p_wilcoxon: float


def paired_means(run: Sequence[float], baseline: Sequence[float]) -> PairedMeans:
    """Paired comparison of per-item scores that are not binary.

    Raises:
        ValueError: for fewer than two items, or runs of different length.
    """
    import numpy as np
    from scipy import stats

    if len(run) != len(baseline) or len(run) < 2:
        raise ValueError(
            f"a paired test needs the same two or more items in both runs, got {len(run)} and {len(baseline)} scores. "
            "Join the runs on their ids first."
        )
    change = np.asarray(run, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    error = float(change.std(ddof=1) / np.sqrt(len(change)))
    mean = float(change.mean())
    if not change.any():
        return PairedMeans(0.0, 0.0, (0.0, 0.0), 1.0, 1.0)
    if error == 0:
        return PairedMeans(mean, 0.0, (mean, mean), 0.0, float(stats.wilcoxon(change).pvalue))
    test = stats.ttest_rel(run, baseline)
    low, high = test.confidence_interval(0.95)
    return PairedMeans(mean, error, (float(low), float(high)), float(test.pvalue), float(stats.wilcoxon(change).pvalue))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction, as adjusted p-values in the order given."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda entry: entry[1])):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _counts(drawn: Any, clusters: int) -> np.ndarray:
    """How often each cluster is in each draw: (draws, clusters) from drawn cluster numbers (draws, clusters)."""
    import numpy as np

    drawn = np.atleast_2d(drawn).astype(np.int64)
    offsets = np.arange(len(drawn))[:, None] * clusters
    return np.bincount((drawn + offsets).ravel(), minlength=len(drawn) * clusters).reshape(len(drawn), clusters)


def _sums(drawn: Any, totals: np.ndarray) -> np.ndarray:
    """Column sums of drawn clusters: (columns, draws), or (columns,) for one draw."""
    import numpy as np

    result = totals @ _counts(drawn, totals.shape[1]).T.astype(np.float64)
    return result if np.ndim(drawn) > 1 else result[:, 0]


def _estimate(value: float | None, drawn: np.ndarray, n: int) -> Estimate:
    import numpy as np

    known = drawn[~np.isnan(drawn)]
    empty = len(drawn) - len(known)
    if value is None or not len(known):
        return Estimate(value, None, n, empty)
    low, high = np.percentile(known, [2.5, 97.5])
    return Estimate(value, (float(low), float(high)), n, empty)

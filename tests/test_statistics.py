"""Worked numbers of the statistics section (evaluation spec 9.10), and the fast path against plain loops."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from scipy import stats

from prefalign.evals import statistics


def ratio_of_sums(above, below, groups, **how):
    return statistics.resample({"above": above, "below": below}, groups, **how).ratio("above", "below", n=len(groups))


@pytest.mark.parametrize(("gains", "losses", "p"), [(10, 3, 0.0923), (25, 10, 0.0167), (60, 40, 0.0569), (5, 5, 1.0)])
def test_mcnemar_worked_examples(gains, losses, p):
    assert statistics.mcnemar(gains, losses) == pytest.approx(p, abs=5e-5)


def test_mcnemar_without_discordant_items_is_one():
    assert statistics.mcnemar(0, 0) == 1.0


def test_paired_t_worked_example():
    run = [1.0] * 10 + [0.0] * 3 + [1.0] * 87
    baseline = [0.0] * 10 + [1.0] * 3 + [1.0] * 87
    found = statistics.paired_means(run, baseline)
    assert found.difference == pytest.approx(0.07)
    assert found.error == pytest.approx(0.0356, abs=6e-5)
    assert found.ci95 == pytest.approx((-0.0005, 0.1405), abs=6e-5)
    assert found.p_t == pytest.approx(0.0517, abs=6e-5)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(np.array(run) - np.array(baseline)).pvalue)


def test_paired_means_of_equal_runs_and_of_a_constant_shift():
    assert statistics.paired_means([1.0, 2.0], [1.0, 2.0]).p_t == 1.0
    shifted = statistics.paired_means([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert (shifted.difference, shifted.error, shifted.p_t) == (1.0, 0.0, 0.0)


def test_paired_means_refuses_unpaired_runs():
    with pytest.raises(ValueError, match="got 3 and 2 scores"):
        statistics.paired_means([1.0, 2.0, 3.0], [1.0, 2.0])


def test_ratio_of_sums_worked_example():
    """CHAIRi over captions 2/4, 0/3, 1/5, 0/0: 3/12 = .25 with interval [0, .50]."""
    found = ratio_of_sums([2, 0, 1, 0], [4, 3, 5, 0], ["1", "2", "3", "4"])
    assert found.value == 0.25
    assert found.ci95 == pytest.approx((0.0, 0.5))
    # a draw is empty when it takes the fourth caption four times: 10,000 / 256 = 39 expected
    assert 15 <= found.empty_draws <= 70


def test_undefined_ratio_has_neither_value_nor_interval():
    assert ratio_of_sums([0, 0], [0, 0], ["a", "b"], draws=50) == statistics.Estimate(None, None, 2, 50)


def test_one_cluster_has_no_interval():
    assert ratio_of_sums([1, 0], [1, 1], ["a", "a"], draws=50) == statistics.Estimate(0.5, None, 2)


def test_no_items_at_all():
    assert ratio_of_sums([], [], []).value is None
    assert statistics.median([], []).value is None


def test_clusters_widen_the_interval():
    """Ten copies of each item add no information: the clustered interval must not shrink."""
    rng = random.Random(0)
    hits = [float(rng.random() < 0.5) for _ in range(60)]
    once = ratio_of_sums(hits, [1.0] * 60, [str(i) for i in range(60)])
    copied = [hit for hit in hits for _ in range(10)]
    clustered = ratio_of_sums(copied, [1.0] * 600, [str(i) for i in range(60) for _ in range(10)])
    as_if_independent = ratio_of_sums(copied, [1.0] * 600, [str(i) for i in range(600)])
    width = lambda found: found.ci95[1] - found.ci95[0]  # noqa: E731
    assert width(clustered) == pytest.approx(width(once), rel=0.05)
    assert width(as_if_independent) < 0.5 * width(clustered)


def test_draws_equal_a_plain_loop():
    """The matrix product over cluster counts equals summing the drawn clusters one by one."""
    rng = np.random.default_rng(3)
    columns = {"a": rng.random(30), "b": rng.random(30)}
    groups = [f"g{i % 7}" for i in range(30)]
    found = statistics.resample(columns, groups, draws=40, seed=5)
    names = sorted(set(groups))
    drawn = np.random.default_rng(5).integers(0, 7, (40, 7))
    for column, values in columns.items():
        sums = {name: sum(v for v, g in zip(values, groups, strict=True) if g == name) for name in names}
        expected = [sum(sums[names[k]] for k in draw) for draw in drawn]
        np.testing.assert_allclose(found.draws[column], expected)


def test_order_of_items_does_not_change_the_interval():
    above, below, groups = [2, 0, 1, 3, 1], [4, 3, 5, 3, 2], list("abcab")
    order = [3, 1, 4, 0, 2]
    shuffled = [[column[i] for i in order] for column in (above, below, groups)]
    assert ratio_of_sums(above, below, groups, draws=500) == ratio_of_sums(*shuffled, draws=500)


def test_paired_difference_uses_the_same_draws():
    """Two runs that differ by a constant on every item have an interval of width zero, however noisy each is."""
    rng = random.Random(1)
    first = [rng.random() for _ in range(50)]
    columns = {"a": [x + 0.1 for x in first], "b": first, "n": [1.0] * 50}
    found, p = statistics.resample(columns, [str(i) for i in range(50)], draws=400).difference(
        ("a", "b"), ("n", "n"), n=50
    )
    assert found.value == pytest.approx(0.1)
    assert found.ci95 == pytest.approx((0.1, 0.1))
    assert p < 0.01
    same, p = statistics.resample(columns, [str(i) for i in range(50)], draws=400).difference(
        ("a", "a"), ("n", "n"), n=50
    )
    assert (same.value, p) == (0.0, 1.0)


def test_median_and_its_interval():
    values = [0.0, 0.1, 0.2, 0.3, 10.0]
    found = statistics.median(values, [str(i) for i in range(5)], draws=2000)
    assert found.value == 0.2
    assert found.ci95 is not None
    assert found.ci95[0] == 0.0
    assert found.ci95[1] == 10.0
    assert statistics.median([1.0, 2.0], ["a", "a"]).ci95 is None


def test_holm_worked_by_hand():
    """Sorted .01 .02 .04: .01*3 = .03, .02*2 = .04, .04*1 = .04."""
    assert statistics.holm({"x": 0.04, "y": 0.01, "z": 0.02}) == pytest.approx({"x": 0.04, "y": 0.03, "z": 0.04})
    assert statistics.holm({"x": 0.9, "y": 0.8}) == {"x": 1.0, "y": 1.0}


def test_3000_items_take_less_than_a_second():
    rng = np.random.default_rng(0)
    hits = (rng.random(3000) < 0.86).astype(float)
    ratio_of_sums([1.0, 0.0], [1.0, 1.0], ["a", "b"], draws=10)
    start = time.process_time()
    found = ratio_of_sums(hits, np.ones(3000), [f"image{i // 6}" for i in range(3000)])
    assert time.process_time() - start < 1.0
    assert found.ci95 is not None
    assert (found.ci95[1] - found.ci95[0]) / 2 == pytest.approx(0.012, abs=0.002)


def test_weighted_kappa_is_agreement_over_that_of_chance():
    """Worked by the table: rows and columns are grades, weights their squared differences, chance the product of the margins."""
    first, second = [0, 1, 2, 4, 4, 3], [0, 2, 2, 4, 3, 0]
    seen = np.zeros((5, 5))
    for pair in zip(first, second, strict=True):
        seen[pair] += 1 / len(first)
    chance = np.outer(seen.sum(axis=1), seen.sum(axis=0))
    weights = np.subtract.outer(np.arange(5), np.arange(5)) ** 2
    expected = 1 - (weights * seen).sum() / (weights * chance).sum()
    assert statistics.weighted_kappa(first, second, grades=5) == pytest.approx(expected)
    assert statistics.weighted_kappa([0, 4], [0, 4], grades=5) == 1
    assert statistics.weighted_kappa([0, 4], [4, 0], grades=5) == -1
    assert statistics.weighted_kappa([0, 0, 4, 4], [0, 4, 0, 4], grades=5) == 0
    assert statistics.weighted_kappa([], [], grades=5) is None
    assert statistics.weighted_kappa([3, 3], [3, 3], grades=5) is None
    with pytest.raises(ValueError, match="2 and 1 grades: give both grades of each thing"):
        statistics.weighted_kappa([1, 2], [1], grades=5)
    with pytest.raises(ValueError, match="grade 5 is not between 0 and 4"):
        statistics.weighted_kappa([5], [1], grades=5)

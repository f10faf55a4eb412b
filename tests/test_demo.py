"""The demo's sentence is true, also when the result is bad."""

import copy

import pytest

from prefalign import bundled

demo = bundled.load_stage("demo")


def estimate(value, low, high):
    return {"value": value, "ci95": [low, high]}


@pytest.fixture
def results():
    runs = {name: {metric: estimate(0.2, 0.1, 0.3) for metric in demo.METRICS} for name in demo.RUNS}
    differences = {name: {metric: estimate(-0.1, -0.15, -0.05) for metric in demo.METRICS}
                   for name in ("difference", "difference_sft")}  # fmt: skip
    runs["aligned"]["chair_i"] = estimate(0.1, 0.05, 0.15)
    differences["difference"]["recall_clear"] = estimate(-0.01, -0.02, 0.0)
    return {**runs, **differences}


def test_better(results):
    said = demo.verdict(results)
    assert said.startswith("The aligned model invents less: CHAIRi 0.200 -> 0.100")
    assert "50% lower than the base" in said
    assert "kept within 2 points (-0.010)" in said
    assert "CHAIRi 0.200, above DPO" in said


def test_worse(results):
    results["difference"]["chair_i"] = estimate(0.1, 0.05, 0.15)
    assert demo.verdict(results).startswith("The aligned model invents MORE")


def test_unclear(results):
    results["difference"]["chair_i"] = estimate(-0.01, -0.03, 0.01)
    assert demo.verdict(results).startswith("No difference in invention can be shown")


def test_lost_recall_is_said(results):
    results["difference"]["recall_clear"] = estimate(-0.05, -0.08, -0.02)
    assert "LOST by more than 2 points (-0.050)" in demo.verdict(results)


def test_control_that_wins_is_said(results):
    results["sft_control"]["chair_i"] = estimate(0.05, 0.01, 0.1)
    assert "CHAIRi 0.050, below DPO" in demo.verdict(results)


def test_silence_is_not_called_better(results):
    silent = copy.deepcopy(results)
    silent["aligned"]["chair_i"] = {"value": None, "ci95": None}
    assert demo.verdict(silent) == "Invention cannot be compared: one of the models mentions no object at all."
    assert " - " in demo.table(silent)


@pytest.mark.parametrize(("run", "metric"), [("sft_control", "chair_i"), ("difference", "recall_clear")])
def test_a_missing_figure_does_not_end_the_demo(results, run, metric):
    results[run][metric] = demo.only_estimate({}, metric)
    assert demo.verdict(results).startswith("Invention cannot be compared")


def test_table_has_every_metric_and_run(results):
    shown = demo.table(results)
    for name in (*demo.METRICS, *demo.RUNS.values()):
        assert name in shown
    assert "0.100 [0.050, 0.150]" in shown
    assert "-0.100 [-0.150, -0.050]" in shown

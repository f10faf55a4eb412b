"""The benchmark of a training step compares equal work: on every kind of batch our loss and gradients are the baseline's."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import preference_step

        yield preference_step


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny(case):
    """A case with few small layers, words and pixels; rows, views and sides stay."""
    size = (112, 56) if case.family == "qwen" else (28, 28)
    return replace(case, size=size, vocabulary=96, layers=1, tower_layers=4 if case.family == "qwen" else 2)


@pytest.mark.parametrize(
    ("name", "lora", "checkpointing"),
    [("576", True, True), ("1280", False, False), ("mdpo", False, True), ("mdpo", True, False), ("k4", True, False)],
)  # fmt: skip
def test_all_sides_do_the_same_work(benchmark, name, lora, checkpointing):
    found = benchmark.measure(tiny(benchmark.CASES[name]), lora=lora, checkpointing=checkpointing, rounds=1)
    assert list(found) == ["trl", "trlc", "cached", "online"]
    assert abs(found["trl"].loss - math.log(2) * len(benchmark.CASES[name].losses)) > 1e-4
    for side in ("trlc", "cached", "online"):
        loss, gradients = benchmark.differences(found[side], found["trl"])
        assert loss < 2e-5, side
        assert gradients < 2e-5, side
    assert found["cached"].flops < found["online"].flops < found["trlc"].flops < found["trl"].flops
    assert min(min(out.peak, *out.cpu, *out.wall) for out in found.values()) > 0


def test_rows_are_named_as_the_contract_says(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.CASES, "64", tiny(benchmark.CASES["64"]))
    file = tmp_path / "step.json"
    arguments = ["--json", str(file), "--cases", "64", "--modes", "lora", "--checkpointing", "nockpt", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["preference_step.py", *arguments])
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert set(rows) == {
        f"step/lora/64/nockpt/{ours}/{theirs}/{what}"
        for ours in ("cached", "online")
        for theirs in ("vs_trl", "vs_trlc")
        for what in ("time", "memory")
    }
    assert rows["step/lora/64/nockpt/cached/vs_trlc/time"]["goal"] == 2.1
    assert all(row.keys() == {"name", "value", "unit", "baseline", "goal"} for row in rows.values())
    shown = capsys.readouterr()
    assert "| lora/64/nockpt/cached/vs_trl |" in shown.out
    assert left.value.code == (1 if "its floor" in shown.err or "its ceiling" in shown.err else 0)


@pytest.mark.parametrize(
    ("name", "value", "goal", "expected"),
    [
        ("step/a/time", 2.0, 2.1, ["below its floor: step/a/time 2.000, floor 2.1"]),
        ("step/a/time", 2.1, 2.1, []),
        ("step/a/time", 0.5, None, []),
        ("step/a/memory", 0.7, 0.65, ["above its ceiling: step/a/memory 0.700, ceiling 0.65"]),
        ("step/a/memory", 0.6, 0.65, []),
        ("step/a/memory", 2.0, None, []),
    ],
)
def test_goals_that_are_missed(benchmark, name, value, goal, expected):
    assert benchmark.missed([{"name": name, "value": value, "goal": goal}]) == expected


def test_no_comparison_proves_nothing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import prove

    monkeypatch.setattr(prove, "RESULTS", tmp_path / "prove.md")
    (tmp_path / "none.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["prove.py", "--table", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="nothing was compared"):
        prove.main()
    assert not (tmp_path / "prove.md").exists()


def test_ratios_say_who_is_better(benchmark):
    """Theirs takes 3 s and 10 bytes, ours 1 s and 4 bytes; ours does half the operations at two thirds of the rate."""
    gradients = {"weight": torch.tensor([1.0, -2.0])}
    theirs = benchmark.Measured(2.0, gradients, 10, 6_000_000_000, [3.0, 9.0, 3.0], [3.0, 3.0, 3.0])
    ours = benchmark.Measured(2.0, gradients, 4, 3_000_000_000, [1.0, 1.0, 0.5], [1.0, 1.0, 1.0])
    rows, lines = benchmark.compare({"trlc": theirs, "cached": ours, "online": ours}, "full/576/nockpt")
    values = {row["name"]: row["value"] for row in rows}
    assert values["step/full/576/nockpt/cached/vs_trlc/time"] == 3.0
    assert values["step/full/576/nockpt/cached/vs_trlc/memory"] == 0.4
    assert "2.00 (+50%: 2 against our 3 GFLOP/s)" in lines[0]


def test_differences_are_relative_to_the_largest_gradient(benchmark):
    theirs = benchmark.Measured(2.0, {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([0.0])})
    ours = benchmark.Measured(2.1, {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([0.4])})
    assert benchmark.differences(ours, theirs) == pytest.approx((0.05, 0.1))
    with pytest.raises(AssertionError, match="b"):
        benchmark.differences(benchmark.Measured(2.0, {"a": ours.gradients["a"]}), theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "577"], "no case called '577'; there are 576,"),
        (["--shape", "llava7b"], "--device cuda and --shape belong together"),
        (["--device", "cuda"], "--device cuda and --shape belong together"),
        (["--device", "cuda", "--shape", "qwen7b"], "sees no CUDA device"),
    ],
)
def test_what_cannot_run_is_refused(benchmark, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["preference_step.py", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in capsys.readouterr().err


def test_a_larger_gpu_holds_more_layers(benchmark):
    """80 GB hold all of LLaVA-1.5-7B three times with adapters, and 24 bytes of each parameter for some 10 layers of 202 M."""
    shape = benchmark.SHAPES["llava7b"]
    assert benchmark.layers_that_fit(shape, 80e9, lora=True) == 32
    assert 8 <= benchmark.layers_that_fit(shape, 80e9, lora=False) <= 11
    assert benchmark.layers_that_fit(shape, 141e9, lora=False) > benchmark.layers_that_fit(shape, 80e9, lora=False)
    assert benchmark.layers_that_fit(benchmark.SHAPES["qwen7b"], 8e9, lora=False) == 0


@pytest.mark.parametrize("shape", ["llava7b", "qwen7b"])
def test_the_shapes_are_those_of_the_real_models(benchmark, shape):
    """LLaVA-1.5-7B has 7.06 G parameters, Qwen2.5-VL-7B 8.29 G; counted on the meta device."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(benchmark.Workbench(benchmark.SHAPES[shape]).config())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx({"llava7b": 7.06e9, "qwen7b": 8.29e9}[shape], rel=0.005)

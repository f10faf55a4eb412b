"""The benchmark of a PPO iteration compares equal work, and its counts hold on every machine."""

import json
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
        import ppo_step

        yield ppo_step


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny(case, **batch):
    """A case with few small layers, words, pixels and tokens; sides and roles stay."""
    size = (112, 56) if case.batch.family == "qwen" else (56, 56)
    small = {"size": size, "vocabulary": 96, "layers": 2, "tower_layers": 2, "shape": "toy", **batch}
    return replace(case, batch=replace(case.batch, **small), new_tokens=2, rank=4)


def test_quick_run_writes_every_row_and_reaches_what_is_counted(benchmark, tmp_path, monkeypatch, capsys):
    """Four answers to one prompt: measured sides agree (else it stops); ratios by count only, time is not looked at."""
    monkeypatch.setitem(
        benchmark.CASES, "576x4", tiny(benchmark.CASES["576x4"], size=(112, 112), layers=1, tower_layers=4)
    )
    file = tmp_path / "ppo.json"
    arguments = ["--quick", "--json", str(file), "--cases", "576x4", "--counted", ""]
    monkeypatch.setattr(sys, "argv", ["ppo_step.py", *arguments])
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    shown = capsys.readouterr()
    rows = {entry["name"]: entry for entry in json.loads(file.read_text())}
    assert left.value.code == (1 if "its floor" in shown.err or "its ceiling" in shown.err else 0), shown
    whole = [f"{part}_of_{side}" if part == "tower" else f"{part}_vs_{side}"
             for part in ("iteration", "tower") for side in benchmark.BASELINES]  # fmt: skip
    flops = {f"ppo/576x4/{part}/flops" for part in (*benchmark.PARTS, *whole)}
    times = {f"ppo/576x4/{part}/time" for part in (*benchmark.PARTS, *whole[:2])}
    assert set(rows) == flops | times | {"ppo/576x4/models/memory"}
    assert all(entry.keys() == {"name", "value", "unit", "baseline", "goal"} for entry in rows.values())
    assert all(entry["value"] > 0 for entry in rows.values())
    assert rows["ppo/576x4/iteration_vs_reencoding/time"]["goal"] == 1.5
    assert rows["ppo/576x4/models/memory"]["goal"] == 0.45
    assert rows["ppo/576x4/models/memory"]["value"] < 0.45
    assert rows["ppo/576x4/iteration_vs_reencoding/flops"]["value"] > 1.1
    assert rows["ppo/576x4/iteration_vs_repeating/flops"]["value"] > 1.5
    assert "| 576x4/iteration |" in shown.out


def test_counts_are_those_of_an_iteration_that_is_computed(benchmark, tmp_path):
    """Two short models without weights tell what a longer one with weights takes, by part; so do the pictures."""
    case = tiny(benchmark.SHAPES["qwen7b"], layers=4, tower_layers=3)
    counted = benchmark.count(case)
    bench = benchmark.PPOBench(case)
    shared = bench.side("shared", tmp_path)
    sides = {
        "ours": shared,
        "reencoding": replace(shared, reencodes=True),
        "repeating": bench.side("repeating", tmp_path),
    }
    encoded = {}
    for side, run in sides.items():
        run.meter.counting = True
        run.trainer.roles.activation_checkpointing_enable()
        benchmark.iterate(run)
        assert run.meter.flops == counted[side].parts, side
        encoded[side] = run.meter.pictures.total() / case.answers
    assert encoded == {"ours": 1, "reencoding": 7, "repeating": 7}
    assert counted["ours"].total < counted["reencoding"].total < counted["repeating"].total
    assert (
        0
        < counted["ours"].tower / counted["ours"].total
        < counted["reencoding"].tower / counted["reencoding"].total
        < 1
    )


def test_four_models_are_four_and_compute_the_same(benchmark):
    case = tiny(benchmark.CASES["576"])
    one, weights, ours = benchmark.peak(case, "shared")
    four, more, theirs = benchmark.peak(case, "four")
    assert max(benchmark.apart(ours, theirs).values()) < 1e-5
    assert ours.gradients[0].any() or ours.gradients[1].any()
    base = sum(p.numel() * 4 for p in benchmark.PPOBench(case).base().parameters())
    assert more - weights == pytest.approx(3 * base, rel=0.02)  # the adapters are the same
    assert weights < one < four
    assert four > more


def test_another_adapter_is_noticed(benchmark, tmp_path):
    """What says that two sides agree can also say that they do not."""
    case = tiny(benchmark.CASES["576"])
    bench = benchmark.PPOBench(case)
    ours = benchmark.outcome(bench.side("shared", tmp_path))
    side = bench.side("four", tmp_path)
    for name, parameter in side.trainer.roles.value.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(2)
    theirs = benchmark.outcome(side)
    found = benchmark.apart(ours, theirs)
    assert found["values"] > 1e-4 > found["logps"]
    with pytest.raises(SystemExit, match="the two do not compute the same and their times mean nothing"):
        benchmark.check_equal("four models", ours, theirs, 1e-4)
    theirs.tokens[0][0] += 1
    with pytest.raises(AssertionError, match="drew different answers"):
        benchmark.apart(ours, theirs)


def test_pictures_decide_the_outcome(benchmark, tmp_path):
    """Swapping the pictures of the two prompts moves reward, log-probs and value of each answer, and the loss."""
    bench = benchmark.PPOBench(tiny(benchmark.CASES["576"]))
    before = benchmark.outcome(bench.side("shared", tmp_path))
    images = bench.prompts["images"]
    swapped = bench.prompts.remove_columns("images").add_column(
        "images", images[::-1], feature=bench.prompts.features["images"]
    )
    bench.__dict__["prompts"] = swapped
    after = benchmark.outcome(bench.side("shared", tmp_path))
    assert before.tokens == after.tokens  # random weights follow the noise, so each log-prob has its counterpart
    lengths = [len(tokens) for tokens in before.tokens]
    for name, values in before.passes.items():
        moved = (values - after.passes[name]).abs()
        each = moved if name == "scores" else torch.stack([part.max() for part in moved.split(lengths)])
        assert len(each) == len(lengths) == 2
        assert each.min() > 1e-5, name
    assert set(before.passes) == {"logps", "ref_logps", "values", "scores"}
    assert before.loss != after.loss


@pytest.mark.parametrize(
    ("name", "value", "goal", "expected"),
    [
        ("ppo/a/iteration_vs_repeating/time", 1.4, 1.5, ["below its floor: ppo/a/iteration_vs_repeating/time 1.400, floor 1.5"]),
        ("ppo/a/iteration_vs_repeating/time", 1.5, 1.5, []),
        ("ppo/a/models/memory", 0.5, 0.45, ["above its ceiling: ppo/a/models/memory 0.500, ceiling 0.45"]),
        ("ppo/a/models/memory", 0.4, 0.45, []),
        ("ppo/a/rollout/time", 0.4, None, []),
    ],
)  # fmt: skip
def test_goals_that_are_missed(benchmark, name, value, goal, expected):
    assert benchmark.missed([{"name": name, "value": value, "goal": goal}]) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "577"], "no case called '577'; there are 576, 576x4"),
        (["--counted", "llava8b"], "no case called 'llava8b'; there are llava7b,"),
        (["--shape", "llava7b"], "--device cuda and --shape belong together"),
        (["--device", "cuda", "--shape", "qwen7b"], "sees no CUDA device"),
    ],
)
def test_what_cannot_run_is_refused(benchmark, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["ppo_step.py", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in capsys.readouterr().err


def test_a_larger_gpu_holds_more_layers(benchmark):
    """Four LLaVA-1.5-7B are 56 GB and their adapters 4: 80 % of 141 GB hold them, of 24 GB a few layers."""
    shape = benchmark.SHAPES["llava7b"]
    assert benchmark.layers_that_fit(shape, 141e9) == 32
    assert 2 <= benchmark.layers_that_fit(shape, 24e9) < benchmark.layers_that_fit(shape, 80e9)
    assert benchmark.layers_that_fit(benchmark.SHAPES["qwen7b"], 8e9) == 0

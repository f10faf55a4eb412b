"""Operations of one step, counted: TRL's with its head on completion tokens only (TRLc) over ours with a cached reference."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from prefalign.training.metering import count_flops

FLOOR = 2.6


@pytest.fixture(scope="module")
def cases():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        import preference_cases

        yield preference_cases


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_step_takes_less_than_trls_operations_by_the_floor(cases, tmp_path, mode):
    """The whole toy model of `benchmarks/preference_step.py`, one pair, 576 image tokens; shapes only, nothing is multiplied."""
    bench = cases.Workbench(replace(cases.CASES["576"], pairs=1))
    counted = {}
    for side in ("trl", "cached"):
        trainer = bench.trainer(side, str(tmp_path / side), lora=mode == "lora", checkpointing=False)
        with cases.head_on_answers() if side == "trl" else nullcontext():
            counted[side] = count_flops(trainer.train, compute=False)  # one step
    ratio = counted["trl"] / counted["cached"]
    print(f"{mode}: TRLc {counted['trl'] / 1e9:.1f} GFLOP, ours {counted['cached'] / 1e9:.1f}, ratio {ratio:.3f}")
    assert ratio >= FLOOR

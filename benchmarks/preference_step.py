"""What a step of preference training costs, beside TRL's.

    python benchmarks/preference_step.py [--json FILE] [--cases 576,64] [--modes full,lora] [--rounds 7] [--pairs N] [--quick]
    python benchmarks/preference_step.py --device cuda --shape llava7b [--layers N] [--json FILE]

Two baselines: `trl`, TRL's `DPOTrainer` as it ships, and `trlc`, the same with its head on completion tokens only, as on CUDA:
the fair one on a CPU. Two of ours: reference log-probs from the cache, and online. A step is: take the rows, collate, forward,
backward, AdamW. All four run in one process on one thread, on the same rows and weights, in a new random order each round. Each
has taken one step inside `train()` before, so that gradient checkpointing is on where a row says `ckpt`.

`time` is the ratio of median CPU times (on CUDA: wall times), theirs / ours; `memory` that of the peaks of live tensors above
weights and optimizer state, ours / theirs (`prefalign.training.metering`). Printed beside: quartiles, the wall-time ratio, the
ratio of counted operations, and how far our loss and gradients are from TRL's in this run. Where a measured ratio is over 10 %
off the counted one, the rates say why: operations are bought at another price.

Cases: `576` image tokens, `64`, `1280` (M-RoPE), `3img` (three pictures of 576), `576v32k` (vocabulary 32,064), `mdpo` (three
views; against TRL with a third forward), `k4` (all 6 pairs of 4 ranked answers to one prompt). `--shape` takes the layers of
LLaVA-1.5-7B or Qwen2.5-VL-7B in bfloat16, as many as fit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from preference_cases import (
    ANSWER_WORDS,
    CASES,
    PROMPT_WORDS,
    SHAPES,
    SIDES,
    Case,
    Workbench,
    head_on_answers,
    start,
)

from prefalign.training.metering import LiveTensors, count_flops

GOALS = {
    "full/576/nockpt/cached/vs_trlc/time": 2.75,
    "lora/576/nockpt/cached/vs_trlc/time": 2.85,
    "full/576/ckpt/cached/vs_trlc/time": 3.2,
    "lora/576/ckpt/cached/vs_trlc/time": 3.3,
    "full/64/nockpt/cached/vs_trlc/time": 1.9,
    "lora/64/nockpt/cached/vs_trlc/time": 2.1,
    "full/576/nockpt/online/vs_trlc/time": 2.2,
    "lora/576/nockpt/online/vs_trlc/time": 2.2,
    "full/576/nockpt/cached/vs_trlc/memory": 0.65,
    "lora/576/nockpt/cached/vs_trlc/memory": 0.65,
    "full/576/ckpt/cached/vs_trlc/memory": 0.62,
    "lora/576/ckpt/cached/vs_trlc/memory": 0.62,
    "full/64/nockpt/cached/vs_trlc/memory": 0.85,
    "lora/64/nockpt/cached/vs_trlc/memory": 0.85,
}
"""Times are at least this, memory is at most this."""
CEILINGS = {"full/llava7b": 2.25, "lora/llava7b": 2.52, "full/qwen7b": 2.56, "lora/qwen7b": 2.86}
"""Counted at 7B with the cached reference and no checkpointing; the goal on a GPU is 85 % of it."""

Row = dict[str, Any]


@dataclass
class Measured:
    """What one side of a case cost.

    Attributes:
        loss: of the first step.
        gradients: of the first step, by parameter.
        peak: bytes above weights and optimizer state.
        flops: of one step.
        cpu: seconds of each round.
        wall: seconds of each round.
    """

    loss: float = 0.0
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    peak: int = 0
    flops: int = 0
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def step(trainer: Any, *, compact: bool = False) -> float:
    """Rows, batch, forward and backward, AdamW. Gradients are left for the caller.

    Args:
        trainer: TRL's or ours.
        compact: as TRLc.
    """
    with head_on_answers() if compact else contextlib.nullcontext():
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])
        loss = trainer.training_step(trainer.model, batch)
    trainer.optimizer.step()
    return float(loss)


def held(trainer: Any) -> list[torch.Tensor]:
    """Weights and buffers of policy and reference, and the optimizer's state."""
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    state = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    return tensors + [value for value in state if isinstance(value, torch.Tensor)]


def checkpointed_modules(model: torch.nn.Module) -> int:
    """How many modules recompute their activations."""
    return sum(bool(getattr(module, "gradient_checkpointing", False)) for module in model.modules())


def measure(case: Case, *, lora: bool, checkpointing: bool, rounds: int) -> dict[str, Measured]:
    """All sides of one case, by name of `SIDES`; on CUDA without `trlc`, which is what TRL does there."""
    on_cuda = case.shape != "toy"
    bench = Workbench(case, dtype=torch.bfloat16 if on_cuda else torch.float32)
    found = {side: Measured() for side in SIDES if not (on_cuda and side == "trlc")}
    trainers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for side in ("trl", "cached", "online"):
            trainers[side] = bench.trainer(side, f"{scratch}/{side}", lora=lora, checkpointing=checkpointing)
            start(trainers[side])
            flagged = checkpointed_modules(trainers[side].model)
            assert (flagged > 0) == checkpointing, f"{side}: {flagged} modules are checkpointed"
        trainers["trlc"] = trainers["trl"]
        for side, out in found.items():
            first(trainers[side], out, compact=side == "trlc")
        order = random.Random(0)
        for number in range(rounds):
            for side in order.sample(list(found), len(found)):
                timed(trainers[side], found[side], compact=side == "trlc")
            taken = ", ".join(f"{side} {(out.wall if on_cuda else out.cpu)[-1]:.2f}" for side, out in found.items())
            print(f"  round {number + 1}: {taken} s; load average {os.getloadavg()[0]:.1f}", flush=True)
        for side, out in found.items():  # last, since what is not computed may end in the weights
            compact = side == "trlc"
            out.flops = count_flops(functools.partial(step, trainers[side], compact=compact), compute=False)
            trainers[side].model.zero_grad()
    return found


def first(trainer: Any, out: Measured, *, compact: bool) -> None:
    """A step that is not timed: loss, gradients, and the peak above `held`.

    On CUDA the peak is what its allocator counts, scratch space of kernels included.
    """
    if next(trainer.model.parameters()).is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out.loss = step(trainer, compact=compact)
        out.peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveTensors(held(trainer)) as meter:
            out.loss = step(trainer, compact=compact)
        out.peak = meter.above_held
    named = trainer.model.named_parameters()
    out.gradients = {name: weight.grad.cpu() for name, weight in named if weight.grad is not None}
    trainer.model.zero_grad()


def timed(trainer: Any, out: Measured, *, compact: bool) -> None:
    """One step by the clocks."""
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    step(trainer, compact=compact)  # its loss is read, which waits for a GPU; AdamW's end is waited for here
    if next(trainer.model.parameters()).is_cuda:
        torch.cuda.synchronize()
    out.cpu.append(time.process_time() - cpu)
    out.wall.append(time.perf_counter() - wall)
    trainer.model.zero_grad()


def differences(ours: Measured, theirs: Measured) -> tuple[float, float]:
    """Relative difference of the losses; largest difference of any gradient entry over the largest entry of all.

    Raises:
        AssertionError: the two do not train the same tensors.
    """
    assert ours.gradients.keys() == theirs.gradients.keys(), sorted(ours.gradients.keys() ^ theirs.gradients.keys())
    largest = max(float(gradient.abs().max()) for gradient in theirs.gradients.values())
    apart = max(float((ours.gradients[name] - gradient).abs().max()) for name, gradient in theirs.gradients.items())
    return abs(ours.loss - theirs.loss) / abs(theirs.loss), apart / largest


def compare(found: dict[str, Measured], name: str, *, on_cuda: bool = False) -> tuple[list[Row], list[str]]:
    """Rows of the result file and lines of the printed table, for one case.

    Args:
        found: what `measure` gave.
        name: `<full|lora>/<case>/<ckpt|nockpt>`.
        on_cuda: time is wall time.
    """
    rows, lines = [], []
    for ours in ("cached", "online"):
        for theirs in ("trl", "trlc"):
            if theirs not in found:
                continue
            mine, other = found[ours], found[theirs]
            key = f"{name}/{ours}/vs_{theirs}"
            by_cpu, by_wall = (statistics.median(getattr(other, clock)) / statistics.median(getattr(mine, clock))
                               for clock in ("cpu", "wall"))  # fmt: skip
            measured, counted = by_wall if on_cuda else by_cpu, other.flops / mine.flops
            goal = GOALS.get(f"{key}/time")
            if on_cuda and ours == "cached" and "nockpt" in name:
                goal = 0.85 * CEILINGS[name.removesuffix("/nockpt")]
            rows.append(_row(f"{key}/time", measured, "x of their time", goal))
            rows.append(_row(f"{key}/memory", mine.peak / other.peak, "of their peak", GOALS.get(f"{key}/memory")))
            loss, gradient = differences(mine, other)
            lines.append(
                f"| {key} | {_spread(other, on_cuda)} | {_spread(mine, on_cuda)} | **{measured:.2f}** | {by_wall:.2f} | "
                f"{counted:.2f}{_gap(measured, counted, mine, other, on_cuda)} | {other.peak / 1e6:.0f} | "
                f"{mine.peak / 1e6:.0f} | **{mine.peak / other.peak:.2f}** | {loss:.0e} | {gradient:.0e} |"
            )
    return rows, lines


HEADER = (
    "| step | their s (quartiles) | our s (quartiles) | time | by wall | counted | their MB | our MB | memory | loss apart | "
    "gradients apart |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def missed(rows: list[Row]) -> list[str]:
    """A line for each row that does not reach its goal: a time below its floor, or memory above its ceiling."""
    lines = []
    for row in rows:
        bound, wrong, beyond = ("floor", "below", row["value"] < (row["goal"] or 0))
        if row["name"].endswith("/memory"):
            bound, wrong, beyond = ("ceiling", "above", row["value"] > (row["goal"] or math.inf))
        if beyond:
            lines.append(f"{wrong} its {bound}: {row['name']} {row['value']:.3f}, {bound} {row['goal']}")
    return lines


def _row(name: str, value: float, unit: str, goal: float | None) -> Row:
    return {"name": f"step/{name}", "value": value, "unit": unit, "baseline": 1.0, "goal": goal}


def _spread(side: Measured, on_cuda: bool) -> str:
    times = side.wall if on_cuda else side.cpu
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _gap(measured: float, counted: float, mine: Measured, other: Measured, on_cuda: bool) -> str:
    if abs(measured / counted - 1) <= 0.1:
        return ""
    rates = [side.flops / statistics.median(side.wall if on_cuda else side.cpu) / 1e9 for side in (other, mine)]
    return f" ({measured / counted - 1:+.0%}: {rates[0]:.0f} against our {rates[1]:.0f} GFLOP/s)"


def layers_that_fit(case: Case, memory: float, *, lora: bool) -> int:
    """Decoder layers with which TRL's trainer and our two stand side by side in 80 % of a device's memory, no checkpointing.

    In bfloat16, full training keeps 22 bytes of each parameter (three policies, two references, three pairs of AdamW's states)
    and one gradient of 2; adapters leave the three policies' 6. What a layer saves for backward is about 34 bytes for each entry
    of TRL's hidden states.

    Args:
        case: of a 7B shape.
        memory: of the device, in bytes.
        lora: an adapter instead of all weights.
    """
    config = Workbench(case).config()
    text, vision = config.text_config, config.vision_config
    width, shared = text.hidden_size, text.num_key_value_heads / text.num_attention_heads
    each = 6 if lora else 24
    layer = width * width * (2 + 2 * shared) + 3 * width * text.intermediate_size
    picture = 1280 if case.family == "qwen" else 576
    tokens = 2 * case.pairs * (picture + PROMPT_WORDS + ANSWER_WORDS[1])
    scratch = 4 * 3 * 4096 * 32768  # of TRL's head
    rest = each * 2 * text.vocab_size * width + 5 * 2 * 12 * case.tower_layers * vision.hidden_size**2
    room = 0.8 * memory - rest - scratch
    return max(0, min(case.layers, int(room / (each * layer + 34 * width * tokens))))


def fitting(case: Case, *, lora: bool) -> int:
    """`layers_that_fit` on the device at hand.

    Raises:
        SystemExit: not one.
    """
    layers = layers_that_fit(case, torch.cuda.get_device_properties(0).total_memory, lora=lora)
    if layers < 1:
        raise SystemExit(
            f"not one decoder layer of this shape fits {torch.cuda.get_device_name()} beside embeddings and vision tower. Take a "
            "larger GPU, or set --layers and see how far it gets."
        )
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", default=",".join(CASES), help="of " + ", ".join(CASES))
    parser.add_argument("--modes", default="full,lora")
    parser.add_argument("--checkpointing", default="nockpt,ckpt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, help="rows of a batch, instead of the case's own number")
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), help="layers of a 7B model, on cuda")
    parser.add_argument("--layers", type=int, help="decoder layers of `--shape`; by default as many as fit")
    chosen = parser.parse_args()
    if unknown := [name for name in chosen.cases.split(",") if name not in CASES]:
        parser.error(f"--cases: no case called {unknown[0]!r}; there are {', '.join(CASES)}.")
    on_cuda = chosen.device == "cuda"
    if on_cuda != (chosen.shape is not None):
        parser.error("--device cuda and --shape belong together: toy models measure a CPU, 7B layers need a GPU.")
    if on_cuda and not torch.cuda.is_available():
        parser.error(
            f"--device cuda: this torch ({torch.__version__}) sees no CUDA device, and a step at 7B shape takes minutes "
            "on a CPU. Run on a machine with an NVIDIA GPU and a CUDA build of torch, or leave --device and --shape out."
        )
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")
    cases = {name: CASES[name] for name in chosen.cases.split(",")}
    if on_cuda:
        cases = {chosen.shape: SHAPES[chosen.shape]}
    rounds = 3 if chosen.quick else chosen.rounds
    rows: list[Row] = []
    lines: list[str] = []
    for case_name, whole in cases.items():
        for mode in chosen.modes.split(","):
            for checkpointing in chosen.checkpointing.split(","):
                name = f"{mode}/{case_name}/{checkpointing}"
                print(f"{name} (load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores)", flush=True)
                case = whole if chosen.pairs is None else replace(whole, pairs=chosen.pairs)
                if on_cuda:
                    case = replace(case, layers=chosen.layers or fitting(case, lora=mode == "lora"))
                    print(
                        f"  {torch.cuda.get_device_name()}: {case.layers} of {whole.layers} decoder layers", flush=True
                    )
                found = measure(case, lora=mode == "lora", checkpointing=checkpointing == "ckpt", rounds=rounds)
                new_rows, new_lines = compare(found, name, on_cuda=on_cuda)
                rows, lines = rows + new_rows, lines + new_lines
                print("\n".join(["", HEADER, *new_lines, ""]), flush=True)
                if chosen.json:
                    chosen.json.write_text(json.dumps(rows, indent=2) + "\n")
    print("\n".join([HEADER, *lines]))
    short = missed(rows)
    for line in short:
        print(line, file=sys.stderr)
    sys.exit(1 if short else 0)


if __name__ == "__main__":
    main()

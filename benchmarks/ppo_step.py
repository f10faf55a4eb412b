"""What an iteration of PPO costs, and what keeping picture features, sharing prompts and sharing one base save of it.

    python benchmarks/ppo_step.py [--json FILE] [--cases 576,576x4] [--counted llava7b,qwen7b,...] [--rounds 5] [--quick]
    python benchmarks/ppo_step.py --device cuda --shape llava7b [--layers N] [--json FILE]

An iteration is what `train_ppo` does with adapters and gradient checkpointing: draw the answers, score them with a reward
model on the same base, log-probs of policy and reference and values, then one update with AdamW. It is split into `rollout`,
`scoring`, `forwards` and `update`; encoding pictures once counts as `rollout`. Two baselines run the same
algorithm:

- `reencoding`: no picture features are kept, so every pass runs the vision tower; prompts are shared as in ours;
- `repeating`: `fast_path` off, in the rollout and the reward model too: every pass runs prompt and picture for each answer,
  as trainers do that pad rows. TRL's head then scores every position on a CPU, which it does not on CUDA; operations are
  counted so too.

All three run in one process on one thread, on the same prompts, weights and noise, in a new random order each round; they
draw the same tokens, or the benchmark stops (in bfloat16 it says so). `time` of a part is our median of CPU seconds (on CUDA:
wall), its baseline that of `repeating`; `time` of `iteration_vs_...` is theirs / ours, and `flops` the same in counted
operations. `tower_of_...` is the share of vision tower and projector in theirs. `reencoding` runs the tower 7 times and ours
once, so of a share s of its operations 6/7 are saved: at most 1.40 times at a third, 1.5 from 0.39.

`models/memory` is the peak of live tensors over an iteration, weights, gradients and optimizer state included: one base with
adapters for policy, value and reward and the reference without, over four models with the same adapters, all else the same.

Cases: `576` image tokens, two prompts with an answer each; `576x4`, one prompt with four. Shapes of 7B models (one prompt, one
answer or `x4`) are counted only, or measured with `--shape` on a GPU, in bfloat16 with as many decoder layers as fit.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from ppo_cases import CASES, PARTS, SHAPES, Kind, PPOBench, PPOCase, Side, iterate
from ppo_counts import Counted, count
from preference_cases import PROMPT_WORDS

from prefalign.training.metering import LiveTensors

TIME_GOAL, MEMORY_GOAL = 1.5, 0.45
"""At least this many times faster than a baseline at 576 image tokens; at most this share of four models' peak."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far results of two sides may be apart: log-probs and values in nats and units, losses and gradients relative."""

BASELINES = ("reencoding", "repeating")
Row = dict[str, Any]


@dataclass
class Outcome:
    """What an iteration came to.

    Attributes:
        tokens: of every answer.
        passes: log-probs of policy and reference, values, scores.
        loss: of the update.
        gradients: of all that trains, policy before value.
    """

    tokens: list[list[int]]
    passes: dict[str, torch.Tensor]
    loss: float
    gradients: list[torch.Tensor]


@dataclass
class Measured:
    """What one side of a case took.

    Attributes:
        outcome: of an iteration that was not timed.
        seconds: of each round by part, on the CPU; on CUDA by the wall.
    """

    outcome: Outcome
    seconds: list[dict[str, float]] = field(default_factory=list)

    def of(self, part: str) -> list[float]:
        """Seconds of a part, or of the whole `iteration`, by round."""
        return [sum(parts.values()) if part == "iteration" else parts[part] for parts in self.seconds]


def outcome(side: Side) -> Outcome:
    """Run an iteration and keep what it came to."""
    rollout, loss = iterate(side)
    roles = side.trainer.roles
    trained = [p for role in ("policy", "value") for _, p in roles.parameters_of(role)]
    gradients = [torch.zeros(p.shape) if p.grad is None else p.grad.float().cpu() for p in trained]
    roles.zero_grad()
    mask = rollout.mask
    passes = {name: getattr(rollout, name)[mask].float().cpu() for name in ("logps", "ref_logps", "values")}
    passes["scores"] = rollout.scores["total"]
    return Outcome([answer.tokens.tolist() for answer in rollout.answers], passes, float(loss), gradients)


def apart(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """How far two outcomes are apart.

    Returns:
        Largest differences of `logps`, `ref_logps`, `values` and `scores`, the relative one of `loss`, and that of `gradients`,
        over the largest entry of all.

    Raises:
        AssertionError: they drew other answers, so nothing can be compared.
    """
    assert ours.tokens == theirs.tokens, "the two sides drew different answers"
    found = {name: float((ours.passes[name] - values).abs().max()) for name, values in theirs.passes.items()}
    found["loss"] = abs(ours.loss - theirs.loss) / abs(theirs.loss)
    largest = max(float(gradient.abs().max()) for gradient in theirs.gradients)
    pairs = zip(ours.gradients, theirs.gradients, strict=True)
    found["gradients"] = max(float((mine - other).abs().max()) for mine, other in pairs) / largest
    return found


def start(side: Side) -> None:
    """Run an iteration inside `train()`, which turns checkpointing on as in any run and gives AdamW its state."""
    side.trainer.train()
    for model in (side.trainer.roles.policy, side.trainer.roles.value):
        flags = (
            [] if model is None else [getattr(module, "gradient_checkpointing", False) for module in model.modules()]
        )
        assert model is None or any(flags), "gradient checkpointing is off"


def measure(case: PPOCase, *, rounds: int, on_cuda: bool = False) -> dict[str, Measured]:
    """All three sides of a case."""
    bench = PPOBench(case, dtype=torch.bfloat16 if on_cuda else torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        shared = bench.side("shared", Path(scratch) / "shared")
        sides = {"ours": shared, "reencoding": replace(shared, reencodes=True),
                 "repeating": bench.side("repeating", Path(scratch) / "repeating")}  # fmt: skip
        for side in (shared, sides["repeating"]):
            start(side)
        found = {name: Measured(outcome(side)) for name, side in sides.items()}
        order = random.Random(0)
        for number in range(rounds):
            for name in order.sample(list(sides), len(sides)):
                side = sides[name]
                gc.collect()
                iterate(side)
                side.trainer.roles.zero_grad()
                found[name].seconds.append(dict(side.meter.wall if on_cuda else side.meter.cpu))
            taken = ", ".join(f"{name} {out.of('iteration')[-1]:.2f}" for name, out in found.items())
            print(f"  round {number + 1}: {taken} s; load average {os.getloadavg()[0]:.1f}", flush=True)
    return found


def peak(case: PPOCase, kind: Kind, *, on_cuda: bool = False) -> tuple[int, int, Outcome]:
    """Peak of an iteration, and what of it is weights and optimizer state, in bytes.

    On CUDA the peak is what its allocator counts, scratch space of kernels included.
    """
    bench = PPOBench(case, dtype=torch.bfloat16 if on_cuda else torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        side = bench.side(kind, Path(scratch))
        start(side)
        tensors = held(side)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
            found = outcome(side)
            return torch.cuda.max_memory_allocated(), LiveTensors(tensors).held, found
        with LiveTensors(tensors) as meter:
            found = outcome(side)
        return meter.peak, meter.held, found


def held(side: Side) -> list[torch.Tensor]:
    """Weights and buffers of all models and heads, and the optimizer's state."""
    modules = [*side.models, side.trainer.roles.value_head, side.reward.head]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    state = [value for entry in side.trainer.optimizer.state.values() for value in entry.values()]
    return tensors + [value for value in state if isinstance(value, torch.Tensor)]


def row(name: str, value: float, unit: str, baseline: float | None, goal: float | None = None) -> Row:
    """One row of the result file."""
    return {"name": f"ppo/{name}", "value": value, "unit": unit, "baseline": baseline, "goal": goal}


def counted_rows(name: str, counts: dict[str, Counted]) -> list[Row]:
    """Operations: of each part beside those of `repeating`, ratios of the iteration, and the tower's share."""
    ours = counts["ours"]
    rows = [
        row(f"{name}/{part}/flops", ours.parts[part], "operations", counts["repeating"].parts[part]) for part in PARTS
    ]
    for baseline in BASELINES:
        theirs = counts[baseline]
        rows.append(row(f"{name}/iteration_vs_{baseline}/flops", theirs.total / ours.total, "x of our operations", 1.0))
        rows.append(
            row(f"{name}/tower_of_{baseline}/flops", theirs.tower / theirs.total, "share of its operations", None)
        )
    return rows


def timed_rows(name: str, found: dict[str, Measured], goal: float | None) -> list[Row]:
    """Seconds of each part beside those of `repeating`, and ratios of the iteration."""
    medians = {side: {part: statistics.median(out.of(part)) for part in PARTS}
               for side, out in found.items()}  # fmt: skip
    rows = [row(f"{name}/{part}/time", medians["ours"][part], "s", medians["repeating"][part]) for part in PARTS]
    ours = statistics.median(found["ours"].of("iteration"))
    for baseline in BASELINES:
        ratio = statistics.median(found[baseline].of("iteration")) / ours
        rows.append(row(f"{name}/iteration_vs_{baseline}/time", ratio, "x of our time", 1.0, goal))
    return rows


def time_table(name: str, found: dict[str, Measured], counts: dict[str, Counted]) -> list[str]:
    """Lines of the printed table: seconds with quartiles and operations, by part and side, and the ratios over ours."""
    lines = []
    for part in (*PARTS, "iteration"):
        cells = [f"{name}/{part}"]
        values = {side: out.of(part) for side, out in found.items()}
        flops = {side: one.total if part == "iteration" else one.parts[part] for side, one in counts.items()}
        ours = statistics.median(values["ours"])
        for side in ("ours", *BASELINES):
            cells.append(f"{spread(values[side])} ({flops[side] / 1e9:.0f})")
        for side in BASELINES:
            cells.append(f"**{statistics.median(values[side]) / ours:.2f}** ({flops[side] / flops['ours']:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def spread(times: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return f"{middle:.2f} [{low:.2f}-{high:.2f}]"


TIME_HEADER = (
    "| part | our s (GFLOP) | reencoding s (GFLOP) | repeating s (GFLOP) | reencoding / ours (counted) | "
    "repeating / ours (counted) |\n|---|---|---|---|---|---|"
)


def check_equal(name: str, ours: Outcome, theirs: Outcome, tolerance: float) -> str:
    """A line that says how far the sides are apart.

    In 16 bits rounding decides a draw now and then, and what follows differs; then nothing is compared.

    Raises:
        SystemExit: further than the tolerance, so that the sides did not run the same algorithm.
    """
    if ours.tokens != theirs.tokens and tolerance == TOLERANCE[torch.bfloat16]:
        return f"  {name} drew other answers than ours, as rounding in 16 bits may have it: log-probs are not compared"
    found = apart(ours, theirs)
    line = f"  {name} from ours, largest differences: " + ", ".join(
        f"{key} {value:.0e}" for key, value in found.items()
    )
    if not all(value <= tolerance for value in found.values()):
        raise SystemExit(
            f"{line}: more than {tolerance}, so the two do not compute the same and their times mean nothing."
        )
    return line


def layers_that_fit(case: PPOCase, memory: float) -> int:
    """Decoder layers with which four models in bfloat16 with their adapters stand in 80 % of a device's memory.

    A layer takes 8 bytes of each parameter (four models), an adapter 4, and those of policy and value 12 more for gradient and
    AdamW's states. With checkpointing a layer keeps its input, and in the rollout its keys and values: about 8 bytes of each
    entry of the hidden states.

    Args:
        case: of a 7B shape.
        memory: of the device, in bytes.
    """
    config = PPOBench(case).bench.config()
    text, vision = config.text_config, config.vision_config
    width, inner = text.hidden_size, text.intermediate_size
    shared = text.num_key_value_heads / text.num_attention_heads
    layer = width * width * (2 + 2 * shared) + 3 * width * inner
    adapter = case.rank * (width * (6 + 2 * shared) + 3 * (width + inner))
    picture = 1280 if case.batch.family == "qwen" else 576
    tokens = case.answers * (picture + PROMPT_WORDS + case.new_tokens)
    each = 8 * layer + (4 * 3 + 2 * 12) * adapter + 8 * width * tokens
    rest = 8 * (2 * text.vocab_size * width + 12 * case.batch.tower_layers * vision.hidden_size**2)
    passing = 4 * 3 * 4096 * 32768 + 34 * tokens * (width + inner)
    return max(0, min(case.batch.layers, int((0.8 * memory - rest - passing) / each)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", default=",".join(CASES), help="of " + ", ".join(CASES))
    parser.add_argument("--counted", default=",".join(SHAPES), help="7B shapes to count, of " + ", ".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="3 rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), help="layers of a 7B model, on cuda")
    parser.add_argument("--layers", type=int, help="decoder layers of `--shape`; by default as many as fit")
    chosen = parser.parse_args()
    on_cuda = chosen.device == "cuda"
    for flag, known in (("cases", CASES), ("counted", SHAPES)):
        if unknown := [name for name in filter(None, getattr(chosen, flag).split(",")) if name not in known]:
            parser.error(f"--{flag}: no case called {unknown[0]!r}; there are {', '.join(known)}.")
    if on_cuda != (chosen.shape is not None):
        parser.error("--device cuda and --shape belong together: toy models measure a CPU, 7B layers need a GPU.")
    if on_cuda and not torch.cuda.is_available():
        parser.error(
            f"--device cuda: this torch ({torch.__version__}) sees no CUDA device, and an iteration at 7B shape takes minutes on "
            "a CPU. Run on a machine with an NVIDIA GPU and a CUDA build of torch, or leave --device and --shape out: the "
            "operations at 7B shapes are counted without."
        )
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("prefalign.online").setLevel(logging.ERROR)  # adapters have moved before the first update
    warnings.filterwarnings("ignore")
    cases = {name: CASES[name] for name in filter(None, chosen.cases.split(","))}
    if on_cuda:
        cases = {chosen.shape: on_device(SHAPES[chosen.shape], chosen.layers)}
    rows: list[Row] = []
    lines: list[str] = []

    def keep(new: list[Row]) -> None:
        rows.extend(new)
        if chosen.json:
            chosen.json.write_text(json.dumps(rows, indent=2) + "\n")

    tolerance = TOLERANCE[torch.bfloat16 if on_cuda else torch.float32]
    for name, case in cases.items():
        print(f"{name} (load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores)", flush=True)
        counts = count(case)
        found = measure(case, rounds=3 if chosen.quick else chosen.rounds, on_cuda=on_cuda)
        for side in BASELINES:
            print(check_equal(side, found["ours"].outcome, found[side].outcome, tolerance), flush=True)
        keep([*timed_rows(name, found, None if on_cuda else TIME_GOAL), *counted_rows(name, counts)])
        lines += time_table(name, found, counts)
        print("\n".join(["", TIME_HEADER, *lines, ""]), flush=True)
        del found
        gc.collect()
        one, weights, ours = peak(case, "shared", on_cuda=on_cuda)
        four, more, theirs = peak(case, "four", on_cuda=on_cuda)
        print(check_equal("four models", ours, theirs, tolerance))
        print(f"  one base: {one / 1e6:.0f} MB at most, {weights / 1e6:.0f} of them weights and optimizer state; "
              f"four models: {four / 1e6:.0f}, {more / 1e6:.0f}: **{one / four:.3f}**", flush=True)  # fmt: skip
        keep([row(f"{name}/models/memory", one / four, "of four models' peak", 1.0, MEMORY_GOAL)])
    for name in [] if on_cuda else filter(None, chosen.counted.split(",")):
        keep(counted_rows(name, count(SHAPES[name])))
        ratios = {entry["name"].split("/")[2]: entry["value"] for entry in rows if f"/{name}/" in entry["name"]}
        print(
            f"{name}, counted: " + ", ".join(f"{part} {ratios[part]:.3f}" for part in ratios if "_" in part), flush=True
        )
    short = missed(rows)
    for line in short:
        print(line, file=sys.stderr)
    sys.exit(1 if short else 0)


def on_device(case: PPOCase, layers: int | None) -> PPOCase:
    """A 7B shape with the layers asked for, or as many as fit.

    Raises:
        SystemExit: not one fits.
    """
    memory = torch.cuda.get_device_properties(0).total_memory
    fitting = layers or layers_that_fit(case, memory)
    if fitting < 1:
        raise SystemExit(
            f"not one decoder layer of this shape fits {torch.cuda.get_device_name()} four times beside embeddings and vision "
            "tower. Take a larger GPU, or set --layers and see how far it gets."
        )
    print(f"{torch.cuda.get_device_name()}: {fitting} of {case.batch.layers} decoder layers", flush=True)
    return replace(case, batch=replace(case.batch, layers=fitting))


def missed(rows: list[Row]) -> list[str]:
    """A line for each row that does not reach its goal: a time below its floor, or memory above its ceiling."""
    lines = []
    for entry in rows:
        value, goal = entry["value"], entry["goal"]
        if goal is None:
            continue
        if entry["name"].endswith("/memory") and value > goal:
            lines.append(f"above its ceiling: {entry['name']} {value:.3f}, ceiling {goal}")
        if entry["name"].endswith("/time") and value < goal:
            lines.append(f"below its floor: {entry['name']} {value:.3f}, floor {goal}")
    return lines


if __name__ == "__main__":
    main()

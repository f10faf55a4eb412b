"""What a preference training will need before it is started: memory per device, disk, time, cost; and what would fit.

The model is built from its config without weights, and the run's own training step is carried out on tensors without data
(`prefalign.training.dry_run`); division between devices is arithmetic (`prefalign.training.memory`). Rows of the pairs folder, or
of given sizes, go through the run's collator.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from prefalign import config
from prefalign.plan_table import duration, number, size
from prefalign.progress import progress_bar
from prefalign.training.largest import COUNTED, Fit, largest_batch, largest_picture
from prefalign.training.memory import CONTEXT, FRAGMENTATION, Need
from prefalign.training.plan_options import Options
from prefalign.training.planner import GIB, Planner, Setup


@dataclass
class TrainingPlan:
    """What a run needs.

    Attributes:
        model: name of the model.
        setup: how it is asked to train.
        options: what was asked.
        bf16: whether it computes in bfloat16.
        route: `split`, `mask` or `plain`: how prompts are shared; `reason` says why not.
        reason: see `route`.
        rows: pairs to train on.
        tokens: tokens of the longest row looked at and of the mean one, as they are run.
        image_tokens: of the longest row.
        sampled: rows looked at; 0: sizes were given.
        batch: pairs in a batch of one device.
        accumulation: batches in an optimizer step.
        parameters: all of them, and those that train.
        need: memory of one device by component, in bytes, on a batch of the longest rows.
        steps: optimizer steps.
        flops: floating point operations of the run, all devices together, with the reference's pass and evaluations.
        seconds: of the run; None where nothing says how fast a device is.
        cost: of all devices for this time, if a price was given.
        disk: bytes of `checkpoints`, `final model`, `reference cache`.
        eval_rows: held-out pairs.
        evaluations: how often they are measured.
        others: memory of one device for other setups, in bytes.
        fits: largest batch and picture, if the memory was given.
    """

    model: str
    setup: Setup
    options: Options
    bf16: bool
    route: str
    reason: str
    rows: int
    tokens: tuple[int, int]
    image_tokens: int
    sampled: int
    batch: int
    accumulation: int
    parameters: tuple[int, int]
    need: Need
    steps: int
    flops: float
    seconds: float | None
    cost: float | None
    disk: dict[str, float]
    eval_rows: int = 0
    evaluations: int = 0
    others: dict[Setup, float] = field(default_factory=dict)
    fits: list[Fit] = field(default_factory=list)


def plan(planner: Planner) -> TrainingPlan:
    """The plan of a run as its config says, without other setups and without what would fit."""
    setup, options, args = planner.setup, planner.options, planner.args
    counted = planner.count(setup, planner.longest(planner.batch))
    lengths = [planner.tokens(row).run for row in planner.rows]
    typical = _typical(planner, planner.rows)
    of_step = planner.batch * args.gradient_accumulation_steps * options.devices
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * planner.steps_of_epoch)
    flops = planner.count(setup, [typical]).flops
    total = flops * (steps * of_step if args.max_steps > 0 else planner.total * args.num_train_epochs)
    evaluations, kept_out = planner.evaluations(steps), None
    if planner.eval_rows:
        kept_out = _typical(planner, planner.eval_rows)
        total += evaluations * planner.count(setup, [kept_out]).forward * planner.eval_total
    if planner.compares and setup.reference == "cached":
        for row, number_of in ((typical, planner.total), (kept_out, planner.eval_total)):
            if row is not None:
                online = planner.count(replace(setup, reference="online"), [row]).forward
                total += (online - planner.count(setup, [row]).forward) * number_of
    seconds = None
    if options.tflops is not None:
        seconds = total / (options.devices * options.tflops * 1e12 * options.utilisation)
    route = planner.route()
    return TrainingPlan(
        model=planner.config.model.model_name_or_path,
        setup=setup,
        options=options,
        bf16=bool(args.bf16),
        route=route.layout,
        reason=route.reason,
        rows=planner.total,
        tokens=(max(lengths), round(sum(lengths) / len(lengths))),
        image_tokens=planner.tokens(planner.rows[-1]).pictures,
        sampled=len(planner.rows) if planner.config.pairs.exists() else 0,
        batch=planner.batch,
        accumulation=args.gradient_accumulation_steps,
        parameters=(
            round(counted.trainable_parameters + counted.frozen_parameters),
            round(counted.trainable_parameters),
        ),
        need=planner.need(setup),
        steps=steps,
        flops=total,
        seconds=seconds,
        cost=None if options.price is None or seconds is None else options.price * options.devices * seconds / 3600,
        disk=planner.disk(counted, steps),
        eval_rows=planner.eval_total,
        evaluations=evaluations,
    )


def _typical(planner: Planner, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row whose length is nearest to the mean."""
    mean = sum(planner.tokens(row).run for row in rows) / len(rows)
    return min(rows, key=lambda row: abs(planner.tokens(row).run - mean))


METHODS = {"full": "all weights", "lora": "LoRA", "qlora": "LoRA on 4 bits"}
SHARING = {"one": "one device", "ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def table(made: TrainingPlan) -> str:
    """A plan as text, at most 120 columns wide, unless the name of the model is longer."""
    blocks = [_head(made), _memory(made), _run(made)]
    blocks += [_others(made)] if made.others else []
    return "\n\n".join("\n".join(block) for block in [*blocks, _notes(made)] if block)


def _head(made: TrainingPlan) -> list[str]:
    setup, options = made.setup, made.options
    devices = "one device" if options.devices == 1 else f"{options.devices} devices"
    devices += "" if setup.profile == "one" else f", {SHARING[setup.profile]}"
    how = [METHODS[setup.method], devices, f"reference {setup.reference}"]
    how.append(f"checkpointing {'on' if setup.checkpointing else 'off'}")
    how.append("bfloat16" if made.bf16 else "float32")
    everything, trained = made.parameters
    longest, mean = made.tokens
    batch = f"{made.batch} in a batch"
    if made.accumulation > 1:
        batch += f", {made.accumulation} batches a step"
    if made.image_tokens:
        batch = f"{number(made.image_tokens)} of pictures; {batch}"
    return [
        made.model,
        ", ".join(how),
        f"{number(everything)} parameters, {number(trained)} of them train",
        f"{number(made.rows)} pairs, {number(longest)} tokens in the longest, {number(mean)} in the mean; {batch}",
    ]


def _memory(made: TrainingPlan) -> list[str]:
    parts = dataclasses.asdict(made.need)
    lines = ["memory of one device"]
    lines += [f"  {name:<14}{size(value):>10}  {_EXPLAINED[name]}" for name, value in parts.items() if value >= 1]
    lines.append(f"  {'total':<14}{size(made.need.total):>10}  {_verdict(made)}".rstrip())
    return lines


_EXPLAINED = {
    "weights": "of the policy, or this device's share",
    "gathered": "weights of others, while they are in use",
    "reference": "a second model",
    "optimizer": "its state, with its copy of weights",
    "gradients": "at the fullest moment of a step",
    "exchange": "buffers for gradients",
    "activations": "of the language model",
    "vision": "pictures, and what is made of them",
    "head": "logits, in chunks",
    "reserved": f"CUDA's own {CONTEXT / GIB:.0f} GiB, and {FRAGMENTATION - 1:.0%} for gaps (assumed)",
}


def _verdict(made: TrainingPlan) -> str:
    memory = made.options.memory
    if memory is None:
        return ""
    left = memory * GIB - made.need.total
    return f"of {memory:g} GiB: {'fits, ' + size(left) + ' left' if left >= 0 else 'does not fit, ' + size(-left) + ' too much'}"


def _run(made: TrainingPlan) -> list[str]:
    options = made.options
    cost = "" if made.cost is None else f", cost {made.cost:,.2f}"
    if made.seconds is None:
        time, speed = "not known", "; --tflops says how fast this CPU is"
    else:
        time, speed = (
            duration(made.seconds),
            f" at {options.tflops:g} TFLOP/s a device, {options.utilisation:.0%} of it reached",
        )
    lines = ["run", f"  {'time':<14}{time:>10}  {number(made.steps)} steps, {made.flops:.2e} operations{speed}{cost}"]
    if made.evaluations:
        times = "once" if made.evaluations == 1 else f"{number(made.evaluations)} times"
        lines.append(f"  {'held out':<14}{number(made.eval_rows):>10}  pairs, measured {times}")
    return lines + [f"  {name:<14}{size(value):>10}  on disk" for name, value in made.disk.items()]


def _others(made: TrainingPlan) -> list[str]:
    memory = made.options.memory
    columns = list(dict.fromkeys((other.reference, other.checkpointing) for other in made.others))
    names = [f"{reference}{'' if checkpointing else ', no ckpt'}" for reference, checkpointing in columns]
    lines = ["GiB of one device" + (f" (* more than {memory:g})" if memory else "") + "; ckpt: gradient checkpointing"]
    lines.append(" " * 28 + "".join(f"{name:>17}" for name in names))
    for method, profile in dict.fromkeys((other.method, other.profile) for other in made.others):
        line = f"  {METHODS[method]:<16}{SHARING[profile]:<10}"
        for reference, checkpointing in columns:
            others = made.others.get(Setup(method, profile, reference, checkpointing))
            if others is None:
                line += f"{'-':>16} "
                continue
            needed = others / GIB
            over = "*" if memory and needed > memory else " "
            line += f"{needed:>16.{1 if needed >= 10 else 2}f}{over}"
        lines.append(line.rstrip())
    return lines


def _notes(made: TrainingPlan) -> list[str]:
    setup, notes = made.setup, [_fit(made, fit) for fit in made.fits]
    if made.sampled and made.sampled < made.rows:
        notes.append(
            f"Seen: {made.sampled} of {number(made.rows)} pairs. A longer one takes more memory; --sample {made.rows} sees all."
        )
    if made.options.memory and made.need.total > made.options.memory * GIB:
        room = [other for other, needed in made.others.items() if needed <= made.options.memory * GIB]
        ways = [other for other in room if other.method == setup.method] or room
        if ways:
            notes.append(f"What fits: {'; '.join(map(_words, ways[:3]))}.")
        elif made.others:
            notes.append("Nothing here fits: take a smaller model, more devices, shorter rows or a smaller batch.")
    if setup.reference == "online" and made.need.reference:
        notes.append(f"`reference: cached` needs no second model: {size(made.need.reference)} less.")
    if setup.method != "qlora" and any(other.method == "qlora" for other in made.others):
        notes.append(
            "LoRA on 4 bits: `--model.load_in_4bit true`" + (" with `lora`." if setup.method == "full" else ".")
        )
    if made.reason:
        notes.append(f"Prompts are not shared, because {made.reason}.")
    if made.options.device == "cuda":
        notes.append("Counted from a step on tensors without data; what a GPU adds to it is assumed, not measured.")
    return notes


def _words(setup: Setup) -> str:
    checkpointing = "with" if setup.checkpointing else "without"
    return (
        f"{METHODS[setup.method]}, {SHARING[setup.profile]}, reference {setup.reference}, {checkpointing} checkpointing"
    )


def _fit(made: TrainingPlan, fit: Fit) -> str:
    memory = f"{made.options.memory:g} GiB"
    named = {"batch": "batch", "picture": "picture", "pictures": "number of pictures"}[fit.what]
    if fit.size == 0:
        return f"largest {named} in {memory}: none, the smallest takes {size(fit.need)}"
    sizes = {
        "batch": f"{'about ' if fit.size > 3 * COUNTED else ''}{fit.size} pairs a device",
        "picture": f"{fit.size} x {fit.size} pixels ({number(fit.tokens)} tokens a row)",
        "pictures": f"{fit.size} in a prompt ({number(fit.tokens)} tokens)",
    }
    why = {
        "memory": "",
        "context": "; a larger one leaves the model's context",
        "processor": "; the processor makes larger ones smaller",
        "search": "; more was not tried",
    }
    return f"largest {named} in {memory}: {sizes[fit.what]}, {size(fit.need)}{why[fit.limit]}"


def main(stage: ModuleType, base: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Print the plan of a training: prefalign plan train_preference --config FILE --section.field VALUE [options] [--json]

    The config is that of the run. Nothing is loaded but the model's config and processor; weights need not be there.

    Args:
        stage: the recipe.
        base: values of its config file.
        arguments: overrides and options.
    """
    import warnings

    # TRL 1.16 still calls transformers' older names
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    as_json = "--json" in arguments
    given = config.parse_overrides([argument for argument in arguments if argument != "--json"], stage.Config)
    known = {entry.name for entry in dataclasses.fields(Options)}
    options = config.build(Options, {name: given.pop(name) for name in known & given.keys()}, source="plan")
    planner = Planner(config.build(stage.Config, config.merge(base, given), source="config"), options)
    made = plan(planner)
    made.others = planner.alternatives(lambda setups: progress_bar(setups, desc="other ways", unit="way", leave=False))
    if options.memory is not None:
        made.fits = [largest_batch(planner), largest_picture(planner)]
    if not as_json:
        print(table(made))
        return
    plain = dataclasses.asdict(dataclasses.replace(made, others={}))
    plain["need"]["total"] = made.need.total
    plain["others"] = [{**dataclasses.asdict(other), "bytes": needed} for other, needed in made.others.items()]
    print(json.dumps(plain, indent=2))


def describe() -> str:
    """Help: what is printed and which options there are."""
    return f"{inspect.getdoc(main)}\n\n{inspect.getdoc(Options)}"

"""The verbs that look at a run before it is started: `plan` tells what it needs, `doctor` takes one batch through its checks."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from prefalign import bundled, config, execution


def plan_stages(arguments: Sequence[str]) -> None:
    """Print what stages cost: prefalign plan STAGE --config FILE --section.field VALUE [--rows 8] [--json] [--then STAGE ...]

    Each stage is run on its first rows (--rows) in a scratch folder, and what was counted is scaled to all of them. A stage after
    --then may read the output folder of one before it, which need not exist yet. For a training see
    `prefalign plan train_preference --help`.
    """
    if Path(arguments[0]).stem == "train_preference":
        _plan_training(arguments[0], arguments[1:])
        return
    if "--help" in arguments or "-h" in arguments:
        print(inspect.getdoc(plan_stages))
        return
    from prefalign import plan_table, planner

    rest = [argument for argument in arguments if argument != "--json"]
    rows = planner.SAMPLE
    if "--rows" in rest:
        place = rest.index("--rows")
        given = rest[place + 1 : place + 2]
        if not given or not given[0].isdigit():
            raise config.ConfigError(f"--rows {' '.join(given)}: give the number of rows to run, as in `--rows 8`.")
        rows = int(given[0])
        del rest[place : place + 2]
    stages: list[planner.Stage] = []
    while rest or not stages:
        end = rest.index("--then") if "--then" in rest else len(rest)
        name, *options = rest[:end] or [""]
        if not name or name.startswith("-"):
            raise config.ConfigError(
                f"plan needs a stage{f' before {name}' if name else ''}, as in `prefalign plan bdhs --config datagen/bdhs`."
            )
        rest = rest[end + 1 :]
        module = bundled.load_stage(name)
        _check_planned(name, module)
        shared_out, options = execution.take_options(options)
        if not shared_out.plain:
            said = "--shard and --executor are left out: the plan is of all rows, in one process."
            print(f"{Path(name).stem}: {said}", file=sys.stderr)
        resolved = bundled.resolve(name, module, options)
        if judged := getattr(resolved, "judged", None):
            raise config.ConfigError(
                f"{Path(name).stem}: there is nothing to plan with `judged`: answers and verdicts are taken from {judged}, no "
                f"model is asked. Start it: `prefalign run {name}` with the same arguments."
            )
        stages.append(planner.Stage(Path(name).stem, module, resolved))
    plans = planner.plan(stages, rows=rows)
    if "--json" in arguments:
        print(json.dumps([dataclasses.asdict(made) for made in plans], indent=2))
    else:
        print(plan_table.table(plans))


def _check_planned(name: str, stage: ModuleType) -> None:
    """Refuse recipes of which plan knows nothing."""
    from prefalign.sources import DataConfig

    if Path(name).stem == "train_preference":
        raise config.ConfigError(
            "train_preference is planned by itself, without --then: `prefalign plan train_preference`."
        )
    if Path(name).stem in ("train_reward_model", "train_ppo", "train_online"):
        raise config.ConfigError(
            f"plan has no estimate for {Path(name).stem}: it counts the passes of preference training, and this run makes others "
            "(a head in place of the vocabulary's, or answers drawn, judged and read by several models). Measure one batch on "
            f"the machine itself: `prefalign doctor {Path(name).stem}` with the run's arguments tells its time, and the "
            "most memory that a GPU held."
        )
    if typing.get_type_hints(stage.Config).get("data") is not DataConfig:
        raise config.ConfigError(
            f"plan tells what train_preference and stages that make pairs (`prefalign list`: those in datagen/) will need, and "
            f"was given {name!r}."
        )


def instead_of_a_dry_run(name: str, stage: ModuleType) -> str:
    """What to say of `--dry-run`, which `run` does not have: the verb that tries this stage's first rows."""
    from prefalign import doctor
    from prefalign.sources import DataConfig

    if Path(name).stem in doctor.STAGES:
        tried = (
            f"`prefalign doctor {name} ...` takes one batch of the first rows through every check and trains nothing"
        )
    elif typing.get_type_hints(stage.Config).get("data") is DataConfig:
        tried = (
            f"`prefalign plan {name} ...` runs the first rows in a scratch folder and tells what all of them will need"
        )
    else:
        return f"run has no --dry-run, and no other verb tries {name}. Its settings: `prefalign run {name} --help`."
    return f"run has no --dry-run. With the same arguments {tried}."


def _plan_training(name: str, arguments: Sequence[str]) -> None:
    from prefalign import training_plan

    if "--help" in arguments or "-h" in arguments:
        print(training_plan.describe())
        return
    chosen, rest = config.take_file(_of_a_training(name, arguments))
    training_plan.main(bundled.load_stage(name), config.read_yaml(bundled.find_config(chosen)) if chosen else {}, rest)


def examine_stage(arguments: Sequence[str]) -> int:
    """Check a training run before it starts: prefalign doctor RECIPE --config FILE --section.field VALUE [--rows 64] [--json OUT]

    Takes the arguments of `prefalign run`. Reads a sample of the rows (--rows), runs one batch of them forward and backward, and
    prints a table: check, verdict, what was seen, what to do. Nothing is written into the run's output folder. --json writes the
    same to a file. The exit status is 0 if nothing failed, else 1.
    """
    if "--help" in arguments or "-h" in arguments:
        print(inspect.getdoc(examine_stage))
        return 0
    name, *rest = arguments
    if name.startswith("-"):
        raise config.ConfigError(
            f"doctor needs a recipe before {name}, as in `prefalign doctor train_preference --config FILE`."
        )
    from prefalign import doctor

    if Path(name).stem not in doctor.STAGES:
        raise config.ConfigError(
            f"doctor examines {', '.join(doctor.STAGES)}, and was given {name!r}. What stages that make pairs will need is told "
            "by `prefalign plan`."
        )
    rows, rest = config.take_option(_of_a_training(name, rest), "--rows")
    target, rest = config.take_option(rest, "--json")
    if rows is not None and (not rows.isdigit() or int(rows) == 0):
        raise config.ConfigError(f"--rows {rows}: give the number of rows to read, as in `--rows 64`.")
    stage = bundled.load_stage(name)
    resolved = bundled.resolve(name, stage, rest)
    findings = doctor.examine(stage, resolved, rows=int(rows) if rows else doctor.SAMPLE)
    print(doctor.table(findings))
    if target:
        text = json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2)
        Path(target).write_text(text + "\n", encoding="utf-8")
    return int(any(finding.verdict == "fail" for finding in findings))


def _of_a_training(name: str, arguments: Sequence[str]) -> list[str]:
    """The arguments, which may not say how blocks are shared out."""
    options, rest = execution.take_options(arguments)
    if not options.plain:
        raise config.ConfigError(
            f"--shard and --executor share out the blocks of stages that make rows, and {Path(name).stem} is a training: leave "
            "them out. It is started on several devices with `torchrun` or `accelerate launch`."
        )
    return rest

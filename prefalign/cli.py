"""The `prefalign` command. Verbs are thin: each finds a stage or a library function and hands over."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import logging
import os
import shlex
import shutil
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import prefalign
from prefalign import bundled, config, execution, running
from prefalign.manifest import Manifest
from prefalign.shards import whole_shards

EPILOG = """\
typical use:
  prefalign demo --output runs/demo
  prefalign list
  prefalign plan bdhs --config configs/datagen/bdhs.yaml --data.path rows.jsonl --output.path runs/pairs
  prefalign run bdhs --config configs/datagen/bdhs.yaml --data.path rows.jsonl --output.path runs/pairs
  prefalign inspect runs/pairs
  prefalign doctor train_preference --config configs/recipes/train_preference_scenes.yaml --pairs runs/pairs
  prefalign publish runs/policy --to OWNER/NAME --dry-run
"""

_NO_NEWS = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "DeepSpeed": "Setting accelerator to CPU",
}
"""Loggers of packages that come with PEFT and accelerate, and what they say at each start whether or not anybody uses them."""


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of all verbs."""
    from prefalign import hub

    parser = argparse.ArgumentParser(
        prog="prefalign",
        description="Preference alignment for vision-language models: make pairs, train, measure, publish.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"prefalign {prefalign.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    verbs.add_parser("demo", help="pictures to aligned, measured, publishable model in minutes", add_help=False)
    verbs.add_parser("run", help="run a stage: prefalign run STAGE --config FILE --section.field VALUE", add_help=False)

    verbs.add_parser("plan", help="what a data stage or a training needs, before it is run: arguments of run, --json",
                     add_help=False)  # fmt: skip
    verbs.add_parser("doctor", help="one batch of a training run through every check: arguments of run, --rows, --json",
                     add_help=False)  # fmt: skip

    scenes = verbs.add_parser("scenes", help="the embedded world: build its model, print its figures, export rows")
    what = scenes.add_subparsers(dest="what", required=True, metavar="WHAT")
    build = what.add_parser("build", help="train the tiny base model from its seed and write its card")
    build.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    build.add_argument("--seed", type=int, default=0)
    figures = what.add_parser("figures", help="measure a scenes model (the shipped one by default)")
    figures.add_argument("--model", type=Path, default=None, help="checkpoint folder; the shipped base if left out")
    export = what.add_parser("export", help="write scenes rows that stages read")
    export.add_argument("--output", type=Path, required=True)
    export.add_argument("--split", help="follows from --regime if left out; without both: train_biased, as seen")
    export.add_argument("--kind", default="caption",
                        help="caption, description, yes_no, colour, count, place, object, vqa, mix or pair; "
                        "or twin: counterfactual pairs")  # fmt: skip
    export.add_argument("--regime", help="where answers come from: seen, fair or none; left out: any split has them")
    export.add_argument("--start", type=int, default=0)
    export.add_argument("--stop", type=int, default=512)
    export.add_argument("--seed", type=int, default=0, help="draws wording and questions, never the pictures")

    verbs.add_parser("list", help="bundled stages and configs")
    path = verbs.add_parser("path", help="print where a bundled stage or config is, or what it says of a setting")
    copy = verbs.add_parser("copy", help="copy one to edit it")
    for entry in (path, copy):
        entry.add_argument("name", help="as in `prefalign list`")
    path.add_argument("setting", nargs="?", help="of a config, as in model.dtype")
    copy.add_argument("target", type=Path, nargs="?", default=Path("."), help="folder or new file name")

    inspect_verb = verbs.add_parser("inspect", help="HTML report of a folder of pairs")
    inspect_verb.add_argument("folder", type=Path)
    inspect_verb.add_argument("--output", type=Path, help="HTML file (default: FOLDER/report.html)")
    inspect_verb.add_argument("--limit", type=int, default=200, help="pairs shown one by one")

    hub.add_arguments(verbs.add_parser("publish", help="check a model or pair folder, write its card, upload it"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 1 after an error, 2 for wrong usage, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return _guarded(lambda: _dispatch(arguments), resumes=arguments[:1] in (["run"], ["demo"]))


def run_file(path: str) -> None:
    """What a stage does when its file is started directly: `python datagen/bdhs.py --config x.yaml`."""
    sys.exit(_guarded(lambda: run_stage(path, sys.argv[1:]), resumes=True))


def run_stage(name: str, arguments: Sequence[str], *, default_config: str | None = None) -> None:
    """Load a stage, resolve its config strictly, run it; `default_config` is read where no `--config` is given."""
    stage = bundled.load_stage(name)
    if "--help" in arguments or "-h" in arguments:
        print(running.describe(stage))
        return
    options, rest = execution.take_options(arguments)
    named, rest = _config_file(rest)
    chosen = named or default_config
    resolved = config.load(stage.Config, bundled.find(chosen) if chosen else None, rest)
    made = running.run(name, stage, resolved, options)
    if isinstance(made, Manifest):
        print(f"{made.stage}: {made.rows_in} rows in, {made.rows_out} rows out")
        folder = bundled.rows_folder(stage, resolved)
        if "rejected" in whole_shards(folder, made).columns:  # STIC's second stage writes conversations
            print(f"look at them with: prefalign inspect {shlex.quote(str(folder))}")


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
    from prefalign import planner

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
        chosen, overrides = _config_file(options)
        resolved = config.load(module.Config, bundled.find(chosen) if chosen else None, overrides)
        stages.append(planner.Stage(Path(name).stem, module, resolved))
    plans = planner.plan(stages, rows=rows)
    if "--json" in arguments:
        print(json.dumps([dataclasses.asdict(made) for made in plans], indent=2))
    else:
        print(planner.table(plans))


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


def _plan_training(name: str, arguments: Sequence[str]) -> None:
    from prefalign import training_plan

    if "--help" in arguments or "-h" in arguments:
        print(training_plan.describe())
        return
    chosen, rest = _config_file(_of_a_training(name, arguments))
    training_plan.main(bundled.load_stage(name), config.read_yaml(bundled.find(chosen)) if chosen else {}, rest)


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
    rows, rest = _option(_of_a_training(name, rest), "--rows")
    target, rest = _option(rest, "--json")
    if rows is not None and (not rows.isdigit() or int(rows) == 0):
        raise config.ConfigError(f"--rows {rows}: give the number of rows to read, as in `--rows 64`.")
    stage = bundled.load_stage(name)
    chosen, overrides = _config_file(rest)
    resolved = config.load(stage.Config, bundled.find(chosen) if chosen else None, overrides)
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


def _option(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of an option of a verb, and the other arguments."""
    rest = list(arguments)
    if flag not in rest:
        return None, rest
    place = rest.index(flag)
    value = rest[place + 1 : place + 2]
    if not value or value[0].startswith("--"):
        raise config.ConfigError(f"{flag} needs a value.")
    del rest[place : place + 2]
    return value[0], rest


def _config_file(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config FILE` or `--config=FILE`, and the other arguments."""
    named: list[str] = []
    rest: list[str] = []
    pending = list(arguments)
    while pending:
        flag, equals, value = pending.pop(0).partition("=")
        if flag != "--config":
            rest.append(flag + equals + value)
            continue
        if not equals and pending:
            value = pending.pop(0)
        if not value or value.startswith("--"):
            raise config.ConfigError("--config needs a file, as in `--config configs/datagen/bdhs.yaml`.")
        named.append(value)
    if len(named) > 1:
        raise config.ConfigError(f"--config is given {len(named)} times ({', '.join(named)}); only one can count.")
    return (named[0] if named else None), rest


def _dispatch(arguments: list[str]) -> int | None:
    if arguments[:1] == ["run"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        run_stage(arguments[1], arguments[2:])
        return None
    if arguments[:1] == ["plan"] and len(arguments) > 1:
        plan_stages(arguments[1:])
        return None
    if arguments[:1] == ["doctor"] and len(arguments) > 1:
        return examine_stage(arguments[1:])
    if arguments[:1] == ["demo"]:
        run_stage("demo", arguments[1:], default_config="recipes/demo")
        return None
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    match chosen.verb:
        case "run":
            parser.error("run needs a stage: prefalign run STAGE --config FILE. `prefalign list` names them.")
        case "plan":
            parser.error("plan needs a stage: prefalign plan STAGE --config FILE [--rows 8] [--json] [--then STAGE].")
        case "doctor":
            parser.error("doctor needs a recipe: prefalign doctor train_preference --config FILE [--rows 64].")
        case "scenes":
            _scenes(chosen)
        case "list":
            _list()
        case "path":
            file = bundled.find(chosen.name)
            print(config.stated(file, chosen.setting) if chosen.setting else file)
        case "copy":
            _copy(chosen.name, chosen.target)
        case "inspect":
            from prefalign.report.pairs import write_pair_report

            made = write_pair_report(chosen.folder, chosen.output or chosen.folder / "report.html", limit=chosen.limit)
            print(f"report: {made}, open it in a browser")
        case "publish":
            from prefalign import hub

            hub.main(chosen)
    return None


def _guarded(action: Any, *, resumes: bool) -> int:
    """Run an action, whose status this is; users get one readable message instead of a traceback (`PREFALIGN_TRACEBACK=1`)."""
    for name in _NO_NEWS:
        logging.getLogger(name).addFilter(_is_news)
    try:
        return action() or 0
    except KeyboardInterrupt:
        again = "; start the same command again to continue where it stopped" if resumes else ""
        print(f"\ninterrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("PREFALIGN_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        if not isinstance(error, config.ConfigError):
            print("(PREFALIGN_TRACEBACK=1 shows where it came from)", file=sys.stderr)
        return 1


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NO_NEWS[record.name])


def _scenes(chosen: argparse.Namespace) -> None:
    if chosen.what == "build":
        from prefalign.scenes.build import build

        build(chosen.output, seed=chosen.seed)
    elif chosen.what == "figures":
        from prefalign.scenes import base_checkpoint, measure

        measure.print_figures(measure.figures(chosen.model or base_checkpoint()))
    else:
        from prefalign.scenes.export import export

        manifest = export(chosen.output, split=chosen.split, kind=chosen.kind, regime=chosen.regime,
                          start=chosen.start, stop=chosen.stop, seed=chosen.seed)  # fmt: skip
        print(f"{manifest.rows_out} rows in {chosen.output}")


def _list() -> None:
    def first_line(path: Path) -> str:
        lines = path.read_text(encoding="utf-8").splitlines() if path.suffix != ".json" else []
        return next((line.strip(' #"') for line in lines if line.strip(' #"') and not line.startswith("#!")), "")

    known = {"stages": bundled.stages(), "configs": bundled.configs(), "profiles": bundled.profiles()}
    for title, found in known.items():
        print(f"{title}:")
        width = max(map(len, found), default=0)
        for name, path in found.items():
            print(f"  {name:<{width}}  {first_line(path)}")


def _copy(name: str, target: Path) -> None:
    source = bundled.find(name)
    destination = target / source.name if target.is_dir() else target
    if destination.exists():
        raise ValueError(f"{destination} is there already; copying would overwrite your changes. Give another name.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
    print(destination)


if __name__ == "__main__":
    sys.exit(main())

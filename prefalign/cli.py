"""The `prefalign` command. Verbs are thin: each finds a stage or a library function and hands over."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prefalign
from prefalign import bundled, config, execution, previews, running, stage_help
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
    for name, help_text in (("build", "train the tiny base model from its seed and write its card"),
                            ("labeller", "train the tiny model that says which claims are true (RLAIF-V)")):  # fmt: skip
        built = what.add_parser(name, help=help_text)
        built.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
        built.add_argument("--seed", type=int, default=0)
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

    inspect_verb = verbs.add_parser("inspect", help="HTML report of a folder of pairs, candidates, examples or prompts")
    inspect_verb.add_argument("folder", type=Path)
    inspect_verb.add_argument("--output", type=Path, help="HTML file (default: FOLDER/report.html)")
    inspect_verb.add_argument("--limit", type=int, default=200, help="rows shown one by one")

    hub.add_arguments(verbs.add_parser("publish", help="check a model or pair folder, write its card, upload it"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0, 1 after an error, 2 for wrong usage, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _dispatch(arguments), resumes=arguments[:1] in (["run"], ["demo"]))


def run_file(path: str) -> None:
    """What a stage does when its file is started directly: `python datagen/bdhs.py --config x.yaml`."""
    sys.exit(guarded(lambda: run_stage(path, sys.argv[1:]), resumes=True))


def run_stage(name: str, arguments: Sequence[str], *, default_config: str | None = None) -> None:
    """Load a stage, resolve its config strictly, run it; `default_config` is read where no `--config` is given."""
    stage = bundled.load_stage(name)
    if "--help" in arguments or "-h" in arguments:
        print(stage_help.describe(name, stage))
        return
    if any(word.partition("=")[0] == "--dry-run" for word in arguments):
        raise config.ConfigError(previews.instead_of_a_dry_run(name, stage))
    options, rest = execution.take_options(arguments)
    resolved = bundled.resolve(name, stage, rest, default_config=default_config)
    made = running.run(name, stage, resolved, options)
    if isinstance(made, Manifest):
        folder = bundled.rows_folder(stage, resolved)
        print(_became(made, folder))
        if whole_shards(folder, made).files:
            print(f"look at them with: prefalign inspect {shlex.quote(str(folder))}")
        if folder != resolved.output.path:  # one of several folders of rows (`quality_pairs`)
            others = (file.parent for file in sorted(resolved.output.path.glob("*/manifest.json")))
            print("beside them:", ", ".join(str(other) for other in others if other != folder) or "nothing")


def _became(made: Manifest, folder: Path) -> str:
    """What became of a stage's rows, as in `povid: 6 rows in, 3 rows out; dropped: 2 bad_json, 1 no_picture (2 failed: ...)`."""
    line = f"{made.stage}: {made.rows_in} rows in, {made.rows_out} rows out"
    if made.dropped:
        often = sorted(made.dropped.items(), key=lambda reason: (-reason[1], reason[0]))
        line += f"; dropped: {', '.join(f'{count} {reason}' for reason, count in often)}"
    if made.quarantined:
        line += f" ({made.quarantined} failed: {folder / 'quarantine'} says why)"
    return line


def _dispatch(arguments: list[str]) -> int | None:
    if arguments[:1] == ["run"] and len(arguments) > 1 and not arguments[1].startswith("-"):
        run_stage(arguments[1], arguments[2:])
        return None
    if arguments[:1] == ["plan"] and len(arguments) > 1:
        previews.plan_stages(arguments[1:])
        return None
    if arguments[:1] == ["doctor"] and len(arguments) > 1:
        return previews.examine_stage(arguments[1:])
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
            from prefalign.report.rows import write_report

            made = write_report(chosen.folder, chosen.output or chosen.folder / "report.html", limit=chosen.limit)
            print(f"report: {made}, open it in a browser")
        case "publish":
            from prefalign import hub

            hub.main(chosen)
    return None


def guarded(action: Any, *, resumes: bool) -> int:
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
    if chosen.what in ("build", "labeller"):
        from prefalign.scenes import build, labeller

        {"build": build, "labeller": labeller}[chosen.what].build(chosen.output, seed=chosen.seed)
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

"""Pictures -> preference pairs -> DPO -> measured hallucination -> report -> publishable checkpoint, in one command.

Runs on the embedded world `scenes` and its tiny model: BDHS pairs, DPO, and an SFT control that sees the same chosen answers
for the same number of updates. Everything is measured on pictures without the prior that the base model was trained under.

Needs: two CPU cores, no network. Start it again after an interruption: finished stages are skipped, the others resume.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefalign import bundled, config

METRICS = ("chair_i", "chair_s", "recall", "recall_clear", "objects_per_caption", "accuracy", "reliance")
RUNS = {"base": "base", "aligned": "DPO", "sft_control": "SFT control"}


@dataclass
class Config:
    """Settings of the demonstration.

    Attributes:
        output: folder of the run.
        seed: seed of data, generation and training.
        regime: where reference answers come from: `seen` (pictures the base was trained on, as in the papers) or `fair`.
        prompts: pictures to make pairs from.
        pairs: settings over `configs/datagen/bdhs_scenes.yaml`.
        training: settings over `configs/recipes/train_preference_scenes.yaml`.
        control: settings over `training` for the control.
        evaluation: settings over `configs/recipes/evaluate_scenes.yaml`.
    """

    output: Path = Path("runs/demo")
    seed: int = 0
    regime: Literal["seen", "fair"] = "seen"
    prompts: int = 768
    pairs: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    control: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


def main(demo: Config) -> dict[str, Any]:
    """Run all stages; returns the content of `results.json`."""
    from prefalign.scenes.export import export

    out = demo.output
    claim(demo)
    if (out / "publish" / "README.md").is_file():
        finished = json.loads((out / "results.json").read_text())
        show(finished, out)
        return finished

    step(
        "1/6 prompts: pictures the base model was trained on" if demo.regime == "seen" else "1/6 prompts: fair pictures"
    )
    split = {"seen": "train_biased", "fair": "train_fair"}[demo.regime]
    export(out / "prompts", split=split, kind="caption", regime=demo.regime, start=0, stop=demo.prompts, seed=demo.seed)

    step("2/6 pairs: BDHS, rejected answers from a model that can hardly see")
    run("bdhs", "datagen/bdhs_scenes", demo.pairs,
        {"data": {"path": out / "prompts"}, "output": {"path": out / "pairs"}, "seed": demo.seed})  # fmt: skip

    step("3/6 DPO")
    shared = {"pairs": out / "pairs", "seed": demo.seed}
    run("train_preference", "recipes/train_preference_scenes", demo.training, {**shared, "output": out / "aligned"})

    step("4/6 control: SFT on the chosen answers, same number of updates")
    control = config.merge(demo.training, demo.control)
    run("train_preference", "recipes/train_preference_scenes", control, {**shared, "output": out / "sft_control"})

    step("5/6 evaluation on fair test pictures")
    results: dict[str, Any] = {}
    for name in RUNS:
        folder = out / "evaluation" / name
        settings: dict[str, Any] = {"output": folder}
        if name != "base":
            settings["model"] = {"model_name_or_path": str(out / name)}
            settings["baseline"] = out / "evaluation" / "base"
        folder.mkdir(parents=True, exist_ok=True)
        with (out / "evaluation" / f"{name}.txt").open("w") as log, contextlib.redirect_stdout(log):
            run("evaluate_model", "recipes/evaluate_scenes", demo.evaluation, settings)
        measured = json.loads((folder / "results.json").read_text())["metrics"]
        results[name] = {metric: only_estimate(measured, metric) for metric in METRICS}
        print(
            f"{RUNS[name]}: CHAIRi {shown(results[name]['chair_i'])}, recall {shown(results[name]['recall'])}",
            flush=True,
        )
        if name != "base":
            key = "difference" if name == "aligned" else "difference_sft"
            results[key] = {metric: only_estimate(measured, f"difference.{metric}") for metric in METRICS}
    results["verdict"] = verdict(results)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    step("6/6 report and publishable folder")
    write_reports(demo, results)
    publish(demo)
    show(results, out)
    return results


def show(results: Mapping[str, Any], out: Path) -> None:
    """Print the table, the verdict and where things are."""
    print(table(results))
    print(f"\n{results['verdict']}\n\nreport: {out / 'report.html'}\nnumbers: {out / 'results.json'}")
    print(f"checkpoint ready to publish: {out / 'publish'}")


def step(text: str) -> None:
    print(f"\n== {text}", flush=True)


def claim(demo: Config) -> None:
    """Refuse a folder of a demo with other settings."""
    from prefalign.manifest import write_atomically

    file = demo.output / "demo.json"
    settings = {key: value for key, value in config.to_mapping(demo).items() if key != "output"}
    if file.is_file() and json.loads(file.read_text()) != settings:
        raise ValueError(
            f"{demo.output} holds a demo with other settings. Give another --output, or delete the folder: mixing two runs "
            "would make the table a lie."
        )
    write_atomically(file, json.dumps(settings, indent=2).encode())


def run(stage: str, base: str, settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Run a bundled stage with a bundled config under the demo's own settings."""
    module = bundled.load_stage(stage)
    values = config.merge(config.merge(config.read_yaml(bundled.find(base)), settings), fixed)
    module.main(config.build(module.Config, values, source=base))


def only_estimate(measured: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Value and interval of a metric; nulls where it was not measured (the reliance probe turned off, say)."""
    found = measured.get(metric, {})
    return {"value": found.get("value"), "ci95": found.get("ci95")}


def shown(estimate: Mapping[str, Any], *, sign: bool = False) -> str:
    """A value with its interval, or a dash where there is none (no object mentioned at all, say)."""
    if estimate["value"] is None or estimate["ci95"] is None:
        return "-"
    low, high = estimate["ci95"]
    return f"{estimate['value']:{'+' if sign else ''}.3f} [{low:.3f}, {high:.3f}]"


def verdict(results: Mapping[str, Any]) -> str:
    """One sentence that says what happened, whatever happened."""
    base, aligned, change = results["base"]["chair_i"], results["aligned"]["chair_i"], results["difference"]["chair_i"]
    clear, sft = results["difference"]["recall_clear"]["value"], results["sft_control"]["chair_i"]["value"]
    if None in (base["value"], aligned["value"], change["value"], change["ci95"], clear, sft):
        return "Invention cannot be compared: one of the models mentions no object at all."
    low, high = change["ci95"]
    numbers = (
        f"CHAIRi {base['value']:.3f} -> {aligned['value']:.3f} (difference {signed(change['value'])}, "
        f"95 % interval {signed(low)} to {signed(high)})"
    )
    if high < 0:
        lead = f"The aligned model invents less: {numbers}, {-change['value'] / base['value']:.0%} lower than the base"
    elif low > 0:
        lead = f"The aligned model invents MORE than the base: {numbers}"
    else:
        lead = f"No difference in invention can be shown: {numbers}"
    kept = "kept within 2 points" if clear >= -0.02 else "LOST by more than 2 points"
    beside = "below" if sft < aligned["value"] else "above" if sft > aligned["value"] else "equal to"
    return (
        f"{lead}; recall of clearly visible objects is {kept} ({signed(clear)}), total recall changes by "
        f"{signed(results['difference']['recall']['value'])}; the SFT control, on the same answers and updates, "
        f"stands at CHAIRi {sft:.3f}, {beside} DPO."
    )


def signed(value: float) -> str:
    return f"{value:+.3f}"


def table(results: Mapping[str, Any]) -> str:
    """The results as a text table: value and 95 % interval per run, and the paired difference to the base."""
    rows = [["", *RUNS.values(), "DPO - base", "SFT - base"]]
    for metric in METRICS:
        cells = [results[run][metric] for run in RUNS] + [
            results["difference"][metric],
            results["difference_sft"][metric],
        ]
        rows.append([metric, *(shown(cell, sign=i >= len(RUNS)) for i, cell in enumerate(cells))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n" + "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def write_reports(demo: Config, results: Mapping[str, Any]) -> None:
    from prefalign.report.pairs import write_pair_report
    from prefalign.report.runs import write_run_report

    out = demo.output
    write_pair_report(out / "pairs", out / "pairs.html")
    write_run_report(out / "report.html", results=results, runs={name: out / name for name in RUNS if name != "base"},
                     evaluations={name: out / "evaluation" / name for name in RUNS},
                     config=config.to_mapping(demo), pairs_report="pairs.html")  # fmt: skip


def publish(demo: Config) -> None:
    from prefalign import hub

    out = demo.output
    hub.publish_model(out / "aligned", "your-name/prefalign-demo", output=out / "publish", dry_run=True,
                      evaluation=out / "evaluation" / "aligned", baseline_evaluation=out / "evaluation" / "base",
                      pairs=out / "pairs")  # fmt: skip


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

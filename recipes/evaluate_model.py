"""Measure a vision-language model: what it invents, what it misses, what it answers, and whether it looks.

CHAIR (Rohrbach et al. 2018), POPE-style yes/no questions (Li et al. 2023), short answers, and the image-reliance probe (the
same questions under the true, a blank, a noised and another picture), on the embedded world or on your files in the benchmarks'
formats. Three steps, each leaving files: ask -> `predictions.jsonl`, score -> `items.jsonl`, sum up -> `results.json`.
Saved predictions are scored without a model; a `baseline` (folder of another evaluation) is compared item by item.

Needs: the model's own memory; no network, no judge. An interrupted run continues where it stopped. Several processes
(`torchrun --nproc_per_node N recipes/evaluate_model.py ...`) ask a share each and give the same results.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefalign.evals import Item, Prediction, Scored, asking, attributes, chair, reliance, scoring, summary, yesno
from prefalign.evals.asking import Asking
from prefalign.evals.files import FilesData, load_files
from prefalign.evals.processes import Share, on_own_device, this_share
from prefalign.evals.reading import read_json
from prefalign.manifest import write_atomically
from prefalign.models import ModelConfig
from prefalign.records import row_seed, user_message


@dataclass
class ScenesData:
    """Questions about pictures of the embedded world.

    Attributes:
        splits: which pictures; `test_fair` is free of the prior the base model was trained under.
        pictures: pictures per split; each gives one caption and one question of each kind (where it has one).
        start: index of the first picture within the split.
        evals: what to measure.
        prompt: one caption prompt for all; empty: the world's own wordings.
    """

    splits: list[str] = field(default_factory=lambda: ["test_fair"])
    pictures: int = 512
    start: int = 0
    evals: list[Literal["chair", "yesno", "attributes"]] = field(
        default_factory=lambda: ["chair", "yesno", "attributes"]
    )
    prompt: str = ""


@dataclass
class Probe:
    """The image-reliance probe over yes/no and short-answer items.

    Attributes:
        conditions: `blank` (mean colour), `noise`, `mismatched` (another item's picture), `none` (no picture slot); empty: off.
        items: most items probed (0: all); each condition asks them once more.
    """

    conditions: list[Literal["blank", "noise", "mismatched", "none"]] = field(
        default_factory=lambda: ["blank", "noise", "mismatched"]
    )
    items: int = 0


@dataclass
class Config:
    """Settings of an evaluation; give `scenes` or `files` or both, and `model` unless the replies are there already.

    Attributes:
        model: the model to ask.
        predictions: `predictions.jsonl` of another evaluation (or its folder) to score instead of asking a model.
        scenes: the embedded world.
        files: benchmarks from files.
        reliance: the image-reliance probe.
        asking: decoding (greedy unless given; `contrast`: M3ID), block size, `describe_first`: describe and respond (STIC), and
            `attributes`: what a model trained on SteerLM rows is asked for.
        baseline: folder of another evaluation of the same items, to compare with.
        output: folder of this evaluation.
        batch_size: rows in one forward pass.
        draws: bootstrap draws.
        seed: seed of noise, derangement and bootstrap.
    """

    model: ModelConfig | None = None
    predictions: Path | None = None
    scenes: ScenesData | None = None
    files: FilesData | None = None
    reliance: Probe = field(default_factory=Probe)
    asking: Asking = field(default_factory=Asking)
    baseline: Path | None = None
    output: Path = Path("runs/evaluation")
    batch_size: int = 16
    draws: int = 10_000
    seed: int = 0


def main(config: Config) -> dict[str, Any]:
    """Ask, score, sum up; returns the content of `results.json` (nothing in other processes than the first)."""
    check(config)
    items, vocabularies, given = load_items(config)
    variants = plan(items, config)
    if config.baseline is not None:
        check_same_settings(known_settings(config, variants), config.baseline)
    share = this_share()
    replies, settings = replies_for(config, variants, given, share)
    if not share.is_main:
        return {}
    scored = scoring.score_all(items, variants, replies, vocabularies)
    scoring.write_items(config.output / "items.jsonl", scored)
    results = sum_up(config, items, scored, settings)
    results["notes"] += leaked(replies)
    write_atomically(config.output / "results.json", (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
    show(results, config.output)
    return results


def check(config: Config) -> None:
    """Raise `ValueError` for settings that cannot work, before anything is loaded."""
    if config.scenes is None and config.files is None:
        raise ValueError("nothing to ask: give `scenes` (the embedded world) or `files` (your copies of benchmarks).")
    if config.model is not None and config.predictions is not None:
        raise ValueError("both `model` and `predictions` are given; replies come from one of them. Leave one out.")
    for name in ("items.jsonl", "results.json"):
        if config.baseline is not None and not (config.baseline / name).is_file():
            raise ValueError(
                f"baseline {config.baseline} holds no {name}; give the output folder of a finished evaluation."
            )


def load_items(config: Config) -> tuple[list[Item], dict[str, chair.Vocabulary], list[Prediction]]:
    """Items of all sections, the vocabulary of each caption item's id, and replies that the files bring along."""
    items: list[Item] = []
    given: list[Prediction] = []
    vocabularies: dict[str, chair.Vocabulary] = {}
    if config.scenes is not None:
        from prefalign.scenes.language import SYNONYMS

        found = scenes_items(config.scenes, config.seed)
        vocabularies |= dict.fromkeys((item.id for item in found if item.eval == "chair"), chair.vocabulary(SYNONYMS))
        items += found
    if config.files is not None:
        loaded = load_files(config.files, needs_pictures=config.predictions is None)
        if loaded.vocabulary is not None:
            vocabularies |= {item.id: loaded.vocabulary for item in loaded.items if item.eval == "chair"}
        items, given = items + loaded.items, loaded.replies
    return items, vocabularies, given


def scenes_items(data: ScenesData, seed: int) -> list[Item]:
    """Captions and questions about scenes, with their truth."""
    from prefalign.scenes.data import rows
    from prefalign.scenes.language import SYNONYMS
    from prefalign.scenes.world import COLOURS, PLACES

    choices = {"colour": tuple(COLOURS), "place": tuple(PLACES), "count": tuple(map(str, range(10)))}
    kinds = {"caption": "chair", "yes_no": "yesno", **dict.fromkeys(choices, "attributes")}
    items = []
    for split in data.splits:
        for kind, eval_name in kinds.items():
            if eval_name not in data.evals:
                continue
            for row in rows(kind, split, data.start, data.start + data.pictures, seed=seed):
                objects = row["facts"]["objects"]
                answer = row["answer"]
                label = (
                    yesno.robust(answer) if eval_name == "yesno" else attributes.parse(answer, choices.get(kind, ()))
                )
                items.append(
                    Item(
                        eval=eval_name,
                        id=row["id"],
                        group=row["facts"]["scene"],
                        images=row["images"],
                        messages=[user_message(data.prompt, images=1)]
                        if data.prompt and kind == "caption"
                        else row["messages"],
                        label=None if kind == "caption" else label,
                        answer=answer,
                        kind=kind,
                        choices=choices.get(kind, ()),
                        truth=frozenset(thing["shape"] for thing in objects) & frozenset(SYNONYMS),
                        clear=frozenset(thing["shape"] for thing in objects if thing["clear"]),
                    )
                )
    return items


def plan(items: Sequence[Item], config: Config) -> list[reliance.Variant]:
    """Every item as it is, then the probed ones under each condition."""
    short = [item for item in items if item.eval in summary.SHORT]
    probed = short if config.reliance.conditions else []
    if config.reliance.items:
        probed = sorted(probed, key=lambda item: row_seed(config.seed, f"{item.eval}/{item.id}"))[
            : config.reliance.items
        ]
    names = {(item.eval, item.id) for item in probed}
    asked = [reliance.Variant(item, gold_logprob=(item.eval, item.id) in names) for item in items]
    return asked + reliance.variants(probed, config.reliance.conditions, seed=config.seed)


def replies_for(
    config: Config, variants: Sequence[reliance.Variant], given: Sequence[Prediction], share: Share
) -> tuple[list[Prediction], dict[str, Any]]:
    """Replies from the model, from saved predictions, or from the benchmarks' answer files; and what decided them."""
    if config.predictions is not None:
        return asking.read_predictions(config.predictions), asking.read_settings(config.predictions)
    if config.model is None:
        if not given:
            raise ValueError("there is nobody to answer: give `model`, or `predictions`, or answer files in `files`.")
        return list(given), {}
    brought = {(reply.eval, reply.id) for reply in given}
    if brought:
        raise ValueError("both `model` and answer files are given; replies come from one of them. Leave one out.")
    from prefalign.engines.transformers import load_engine

    engine = load_engine(on_own_device(config.model, share), batch_size=config.batch_size)
    replies = asking.ask(engine, variants, config.output, config.asking, seed=config.seed, share=share)
    return replies, asking.read_settings(config.output)


def known_settings(config: Config, variants: Sequence[reliance.Variant]) -> dict[str, Any]:
    """What decides the replies as far as it is known before a model is loaded: all but its fingerprint."""
    settings: dict[str, Any] = {}
    if config.predictions is not None:
        settings = asking.read_settings(config.predictions)
    elif config.model is not None:
        settings = asking.settings("", variants, config.asking, seed=config.seed)
    return {**settings, **_reading(config)}


def _reading(config: Config) -> dict[str, Any]:
    """How replies are read, where a config can choose."""
    chosen = config.files.chair if config.files is not None else None
    return {"chair_parser": chosen.parser} if chosen is not None else {}


def sum_up(config: Config, items: Sequence[Item], scored: Sequence[Scored], settings: dict[str, Any]) -> dict[str, Any]:
    """Metrics, differences to the baseline, what went wrong, and what constant answers would score."""
    settings = {**settings, **_reading(config)}
    metrics = summary.aggregate(scored, draws=config.draws, seed=config.seed)
    counts = summary.counts(scored)
    notes = [
        f"{name}: {rates[f'{state}_rate']:.1%} {words}"
        for name, rates in counts.items()
        for state, words in (
            ("unparsed", "not understood (wrong)"),
            ("empty", "empty (no score)"),
            ("error", "failed (no score)"),
        )
        if rates[f"{state}_rate"]
    ]
    if config.baseline is not None:
        differences, regressions = summary.compare(
            scored, scoring.read_items(config.baseline / "items.jsonl"), draws=config.draws, seed=config.seed
        )
        metrics |= differences
        write_atomically(
            config.output / "regressions.jsonl", "".join(json.dumps(row) + "\n" for row in regressions).encode()
        )
        notes += other_decoding(settings, config.baseline)
        by_eval = Counter(row["eval"] for row in regressions)
        notes += [
            f"{count} {name} item(s) went from right to wrong (regressions.jsonl)" for name, count in by_eval.items()
        ]
    constant: dict[str, Any] = {}
    labels = [item.label for item in items if item.eval == "yesno" and item.label is not None]
    if labels:
        constant["yesno"] = yesno.constant_answers(labels)
    short = [item for item in items if item.eval == "attributes"]
    if short:
        constant["attribute_accuracy"] = attributes.constant_answers(short)
    return {
        "model": config.model.model_name_or_path
        if config.model is not None
        else str(config.predictions or "answer files"),
        "fingerprint": settings.get("fingerprint", ""),
        "settings": settings,
        "metrics": metrics,
        "counts": counts,
        "constant_answers": constant,
        "baseline": str(config.baseline) if config.baseline is not None else None,
        "notes": notes,
    }


def check_same_settings(settings: dict[str, Any], baseline: Path) -> None:
    """Raise unless the run in `baseline` was asked the same in the same way, as far as is known of answers made elsewhere."""
    before = read_json(baseline / "results.json")["settings"]
    shared = [key for key in settings if key in before and key != "fingerprint"]
    changed = [f"{key}: {before[key]} -> {settings[key]}" for key in shared if settings[key] != before[key]]
    if changed:
        raise ValueError(
            f"baseline {baseline} was asked or read differently ({'; '.join(changed)}), so a difference would not be the "
            "model's. Evaluate both with one config."
        )


def other_decoding(settings: dict[str, Any], baseline: Path) -> list[str]:
    """A note for each way of asking that only one of the two runs used: what decodes better is compared with what was trained."""
    before = read_json(baseline / "results.json")["settings"]
    return [
        f"only {'this run' if key in settings else 'the baseline'} used asking.{key} ({(settings | before)[key]}): the "
        "difference to the baseline is that of the decoding too"
        for key in ("contrast", "describe_first", "attributes")
        if (key in settings) != (key in before)
    ]


def leaked(replies: Sequence[Prediction]) -> list[str]:
    """A note on replies that lost a leaked attribute line, if any did."""
    count = sum(reply.unstripped is not None for reply in replies)
    known = f"attribute lines were taken out of {count} of {len(replies)} replies (`unstripped` in predictions.jsonl)"
    return [known] if count else []


def show(results: dict[str, Any], folder: Path) -> None:
    """The headline figures, notes, and where the rest is."""
    print(f"\n{results['model']}\n\n{summary.table(results['metrics'])}")
    for note in results["notes"]:
        print(f"note: {note}")
    more = "by kind, strict readings, normalised drops, flip rates, log-prob drops, constant answers"
    print(f"\n{folder / 'results.json'} has the rest: {more}")


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

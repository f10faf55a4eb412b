"""Grade rewards on pairs whose better answer is known: accuracy in and out of domain, and what it is owed to.

Every pair is scored as it is, without its facts, on another picture and on a blank one; the answers change places; a name of an
object that is not there is written into the chosen answer. A reward model gets its grade into its own folder: training with it
(`train_ppo`, `train_online`) refuses one that was not graded as it is used and on enough pairs, or whose accuracy is below the
floor on any set, unless forced.

Sources: arXiv 2407.02477 (accuracy outside the training set), arXiv 2309.14525 (with and without facts).
Needs: rewards, and folders of pairs. Writes `results.json`, `items.jsonl` (every pair) and `report.html`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from prefalign.records import Pair
    from prefalign.rewards.grading import Grade


@dataclass
class PairSet:
    """Pairs to grade on.

    Attributes:
        path: folder of pairs.
        domain: `in` if the reward was trained on pairs of this kind, else `out`.
        limit: use only the first pairs (0: all).
    """

    path: Path
    domain: Literal["in", "out"] = "in"
    limit: int = 0


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        rewards: what is graded: entries {name, weight, settings}, as in every run that uses rewards.
        sets: pairs to grade on, by name.
        output: folder of the results.
        term: the score that counts: `total`, or one term such as `reward_model/helpfulness`.
        floor: least accuracy on every set; a reward model below it is reported as unfit to train against.
        sentence: how the name of an object is written behind an answer.
        block_size: pairs scored together.
        seed: draws orders and names of objects.
    """

    rewards: list[dict[str, Any]]
    sets: dict[str, PairSet]
    output: Path
    term: str = "total"
    floor: float = 0.6
    sentence: str = " There is a {name}."
    block_size: int = 32
    seed: int = 0


def main(config: Config) -> dict[str, Any]:
    """Grade and report. Returns the content of `results.json`."""
    from prefalign.config import ConfigError, to_mapping
    from prefalign.report.grades import write_grades
    from prefalign.rewards import read_rewards
    from prefalign.rewards.grading import check_fit_for_rl, grade, write_grade

    if not config.sets:
        raise ConfigError(
            "sets: there are no pairs to grade on. Name a folder, such as sets: {held_out: {path: runs/pairs}}."
        )
    rewards = read_rewards(config.rewards)
    rewards.check()
    grades, items = {}, {}
    for name, pairs in config.sets.items():
        grades[name], items[name] = grade(
            read_pairs(pairs), rewards, term=config.term, sentence=config.sentence, block_size=config.block_size,
            seed=config.seed,
        )  # fmt: skip
    domains = {name: pairs.domain for name, pairs in config.sets.items()}
    results = {
        "sets": {name: {"domain": domains[name], **asdict(found)} for name, found in grades.items()},
        "config": to_mapping(config),
    }
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    with (config.output / "items.jsonl").open("w", encoding="utf-8") as lines:
        for name, rows in items.items():
            lines.writelines(json.dumps(without_nan({"set": name, **asdict(row)})) + "\n" for row in rows)
    problems = []
    models = [Path(entry["path"]) for entry in config.rewards if entry["name"] == "reward_model"]
    if len(config.rewards) == 1 and models:
        entry = config.rewards[0]
        write_grade(models[0], grades, domains, entry=entry, term=config.term)
        problems = check_fit_for_rl(models[0], entry=entry, floor=config.floor, force=True)
    write_grades(config.output, grades, domains, settings=to_mapping(config), problems=problems)
    print(table(grades))
    if models and len(config.rewards) == 1:
        print("\n".join(problems) or f"fit to train against: accuracy is {config.floor} or more on every set")
    elif models:
        print(
            "no reward model got a grade: this one is of all rewards together. Grade each reward model alone for that"
        )
    print(f"report: {config.output / 'report.html'}")
    return results


def read_pairs(pairs: PairSet) -> Iterator[Pair]:
    """Stream the pairs of a set, pictures still encoded."""
    from itertools import islice

    from prefalign.records import Pair
    from prefalign.store import read_records
    from prefalign.training.pairs import on_two_pictures, pairs_manifest

    pairs_manifest(pairs.path)
    if apart := sum(on_two_pictures(pairs.path)):
        raise ValueError(
            f"{apart} pairs of {pairs.path} reject an answer about `rejected_images`; a grade shows both answers with `images`, "
            "where it may be right. Take these pairs out."
        )
    return islice(read_records(pairs.path, Pair), pairs.limit or None)


def without_nan(value: Any) -> Any:
    """The same with null for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def table(grades: Mapping[str, Grade]) -> str:
    """The grades as lines of text."""
    metrics = list(next(iter(grades.values())).metrics)
    width = max(map(len, metrics))
    lines = [" " * width + "".join(f"{name:>22}" for name in grades)]
    for metric in metrics:
        cells = []
        for found in grades.values():
            estimate = found.metrics[metric]
            interval = f" [{estimate.ci95[0]:.2f}, {estimate.ci95[1]:.2f}]" if estimate.ci95 else ""
            cells.append("-" if estimate.value is None else f"{estimate.value:.3f}{interval}")
        lines.append(f"{metric:<{width}}" + "".join(f"{cell:>22}" for cell in cells))
    for name in ("pairs", "missing"):
        lines.append(f"{name:<{width}}" + "".join(f"{getattr(found, name):>22}" for found in grades.values()))
    return "\n".join(lines)


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

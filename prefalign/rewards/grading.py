"""How good a reward is, before anything is trained against it: pairs with a known better answer, with and without its sources.

Every pair is scored as it is, without its facts, with the picture of another row, and with a black picture; names of objects that
are not there are written into the chosen answer. A reward that tells answers apart by their length, by facts alone or by order
shows in these numbers before it shows in a policy.

Sources: accuracy outside the training set decides (arXiv 2407.02477, its table of reward models); facts in and out, length
control and blanked pictures: the recommendations in Fact-RLHF's and PPO's specifications.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefalign.config import ConfigError
from prefalign.evals.statistics import Estimate, resample
from prefalign.manifest import write_atomically
from prefalign.records import Pair, row_seed
from prefalign.rewards.reward import Reward
from prefalign.rewards.variants import VARIANTS, Graded, blocks, grade_block, logit_factor, scored_by

logger = logging.getLogger(__name__)

GRADE = "grade.json"
"""The grade of a reward model, in its own folder."""

NO_PART_OF_THE_USE = ("name", "label", "path", "batch_size", "device", "dtype")
"""What an entry of rewards says that does not change which answer wins."""

BINS = 5

LEAST_PAIRS = 30
"""Scored pairs that at least one set has to have: the 95 % interval of an accuracy of 0.6 is 0.35 wide even then."""


@dataclass
class Grade:
    """What was measured on one set of pairs.

    Attributes:
        pairs: pairs read.
        missing: pairs without a score for one of the answers.
        metrics: name to value with interval; see `METRICS`.
        calibration: (predicted chance that the first answer is better, observed share, pairs) in bins.
    """

    pairs: int
    missing: int
    metrics: dict[str, Estimate]
    calibration: list[tuple[float, float, int]] = field(default_factory=list)


METRICS = {
    "accuracy": "share of pairs whose chosen answer scores higher; a tie counts half",
    "accuracy_without_facts": "the same with the facts taken away",
    "accuracy_shuffled_picture": "the same on the picture of another row",
    "accuracy_blank_picture": "the same on a black picture",
    "accuracy_length_controlled": "mean of the accuracies where the chosen answer is the longer one and where it is the shorter",
    "length_correlation": "rank correlation of score and words over all answers",
    "swap_symmetry": "share of pairs with the same winner when the answers change places",
    "object_sensitivity": "share of chosen answers whose score suffers more from an absent object than from a true one",
    "calibration_error": "mean distance, in bins, of observed share and the chance by the raw score; not of a sum of scores",
}


def grade(
    pairs: Iterable[Pair],
    reward: Reward,
    *,
    term: str = "total",
    sentence: str = " There is a {name}.",
    block_size: int = 32,
    seed: int = 0,
) -> tuple[Grade, list[Graded]]:
    """Grade a reward on pairs whose better answer is known.

    Args:
        pairs: streamed; only numbers are kept.
        reward: what is graded.
        term: which of its scores; `total` of a weighted list.
        sentence: how an object is written behind an answer.
        block_size: pairs scored together; the picture of another row comes from the same block.
        seed: draws orders, other pictures and names of objects, by the pair's id.

    Returns:
        The grade and what it was made from, pair by pair.
    """
    rows: list[Graded] = []
    for block in blocks(pairs, block_size):
        rows += grade_block(
            block,
            lambda responses: scored_by(reward, responses, term),
            lambda response: logit_factor(reward, term, response),
            sentence,
            seed,
        )
    return summarise(rows, seed=seed), rows


def summarise(rows: Sequence[Graded], *, seed: int = 0) -> Grade:
    """The metrics of graded pairs, with 95 % intervals over pictures where they are shares."""
    from scipy import stats

    scored = [row for row in rows if not math.isnan(row.margins["own"])]
    metrics = {}
    for variant in VARIANTS:
        name = "accuracy" if variant == "own" else f"accuracy_{variant}"
        known = [row for row in scored if not math.isnan(row.margins[variant])]
        metrics[name] = _share([_right(row.margins[variant]) for row in known], known, seed)
    sides = [
        [row for row in scored if row.lengths[0] > row.lengths[1]],
        [row for row in scored if row.lengths[0] < row.lengths[1]],
    ]
    means = [sum(_right(row.margins["own"]) for row in side) / len(side) if side else None for side in sides]
    both = None if None in means else sum(m for m in means if m is not None) / 2
    metrics["accuracy_length_controlled"] = Estimate(both, None, sum(map(len, sides)))
    scores = [score for row in scored for score in row.scores]
    lengths = [length for row in scored for length in row.lengths]
    varied = len(set(scores)) > 1 and len(set(lengths)) > 1
    correlation = float(stats.spearmanr(scores, lengths).statistic) if varied else None
    metrics["length_correlation"] = Estimate(correlation, None, len(scores))
    known = [row for row in scored if not math.isnan(row.swapped)]
    same = [float(_sign(row.margins["own"]) == _sign(row.swapped)) for row in known]
    metrics["swap_symmetry"] = _share(same, known, seed)
    known = [row for row in scored if not math.isnan(row.noticed)]
    metrics["object_sensitivity"] = _share([_right(row.noticed) for row in known], known, seed)
    known = [row for row in scored if not math.isnan(row.logit)]
    bins = _calibration(known, seed)
    error = sum(abs(said - seen) * n for said, seen, n in bins) / len(known) if known else None
    metrics["calibration_error"] = Estimate(error, None, len(known))
    return Grade(len(rows), len(rows) - len(scored), metrics, bins)


def write_grade(
    folder: Path,
    grades: Mapping[str, Grade],
    domains: Mapping[str, str],
    *,
    entry: Mapping[str, Any] | None = None,
    term: str = "total",
) -> None:
    """Put a grade into a reward model's folder, tied to its weights and its use, where training with it looks for it.

    Args:
        folder: the reward model.
        grades: by name of the set of pairs.
        domains: `in` or `out` of the reward model's domain, by set.
        entry: the reward as it was listed (`weight`, and settings of `LearnedReward`); None: listed by its name alone.
        term: the score that was graded.
    """
    kept = {name: value for name, value in (entry or {}).items() if name not in NO_PART_OF_THE_USE}
    content = {
        "weights": weights_digest(folder),
        "reward": kept,
        "term": term,
        "sets": {name: {"domain": domains[name], **asdict(found)} for name, found in grades.items()},
    }
    write_atomically(folder / GRADE, json.dumps(content, indent=2, allow_nan=False).encode())


def check_fit_for_rl(
    folder: Path, *, entry: Mapping[str, Any] | None = None, floor: float = 0.6, force: bool = False
) -> list[str]:
    """Refuse a reward model that was not graded as it is used, or whose accuracy is below a floor on any set it was graded on.

    Args:
        folder: the reward model.
        entry: the reward as the run lists it; `facts`, `weights`, the signs of `weight` and, of a sum of several
            attributes, `normalise` have to be those of the grade.
        floor: least accuracy; a policy that is trained against a worse one learns its mistakes.
        force: go on all the same.

    Returns:
        What is wrong with it, to be logged; empty for a fit one.

    Raises:
        ConfigError: there is something wrong with it and `force` is not set, or there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"reward model {folder}: there is no such folder. Name the output of `prefalign run train_reward_model`."
        )
    problems = _problems(folder, entry or {}, floor)
    if problems and not force:
        raise ConfigError(
            f"reward model {folder}: {'; '.join(problems)}. A policy trained against it learns its mistakes. Train a better one, "
            "or set force_reward to true and watch the alarms."
        )
    return problems


def check_rewards(entries: Sequence[Mapping[str, Any]], *, floor: float, force: bool) -> None:
    """Check every reward model that a run is to be trained against; what is wrong and forced is logged.

    Args:
        entries: a run's `rewards`, or its `annotator` as a list of one; lists of rewards inside an entry are looked into.
        floor: see `check_fit_for_rl`.
        force: see `check_fit_for_rl`.

    Raises:
        ConfigError: one is unfit, and not forced.
    """
    for entry in entries:
        if entry.get("name") == "reward_model" and "path" in entry:
            folder = Path(entry["path"])
            for problem in check_fit_for_rl(folder, entry=entry, floor=floor, force=force):
                logger.warning("Reward model %s: %s. Going on, as force_reward is set.", folder, problem)
        check_rewards(entry.get("rewards") or [], floor=floor, force=force)


def weights_digest(folder: Path) -> str:
    """SHA-256 over the weights and the settings of a reward model's folder, 16 hex digits."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "reward_model.json"]):
        with file.open("rb") as stream:
            digest.update(file.name.encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def _used(folder: Path, entry: Mapping[str, Any], term: str = "total") -> dict[str, Any]:
    """How a list uses a reward model, as far as it decides which answer wins.

    Returns:
        By term 1 or -1, the weights inside, the facts; and where several attributes are added up whether each is normalised
        first, as that decides how much each of them counts.
    """
    weights, weight = entry.get("weights"), entry.get("weight", 1.0)
    if term != "total":
        signs = {term.rpartition("/")[2]: 1}
    elif isinstance(weight, Mapping):
        signs = {name: _sign(value) for name, value in weight.items() if value}
    else:
        note = json.loads((folder / "reward_model.json").read_text(encoding="utf-8"))
        signs = dict.fromkeys(["reward"] if weights is not None else note["attributes"], _sign(weight))
    added = [value for value in (signs if weights is None else weights).values() if value]
    normalise = entry.get("normalise", True) if len(added) > 1 else None
    return {"signs of weight": signs, "weights": weights, "facts": entry.get("facts", True), "normalise": normalise}


def _problems(folder: Path, entry: Mapping[str, Any], floor: float) -> list[str]:
    file = folder / GRADE
    command = "prefalign run grade_reward_model"
    if not file.is_file():
        return [f"it was never graded (no {GRADE}; `{command}` writes one)"]
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["weights"] != weights_digest(folder):
        return [f"its {GRADE} is of other weights (`{command}` grades it anew)"]
    if "reward" not in found:
        return [f"its {GRADE} does not say how the model was used (`{command}` grades it anew)"]
    graded, used = _used(folder, found["reward"], found["term"]), _used(folder, entry)
    problems = [
        f"it was graded with {name} {graded[name]} and is used with {used[name]} (`{command}` with that entry grades it so)"
        for name in graded
        if graded[name] != used[name]
    ]
    most = max((measured["metrics"]["accuracy"]["n"] for measured in found["sets"].values()), default=0)
    if most < LEAST_PAIRS:
        problems.append(
            f"it was graded on {most} scored pairs, fewer than the {LEAST_PAIRS} that tell an accuracy from chance"
        )
    for name, measured in found["sets"].items():
        value = measured["metrics"]["accuracy"]["value"]
        if value is None or not value >= floor:
            shown = "unknown" if value is None else f"{value:.3f}"
            problems.append(
                f"its accuracy on {name!r} ({measured['domain']} of domain) is {shown}, below the floor of {floor}"
            )
    return problems


def _share(values: Sequence[float], rows: Sequence[Graded], seed: int) -> Estimate:
    drawn = resample({"value": values, "one": [1.0] * len(values)}, [row.picture for row in rows], seed=seed)
    return drawn.ratio("value", "one", n=len(values))


def _right(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _calibration(rows: Sequence[Graded], seed: int) -> list[tuple[float, float, int]]:
    """Bins of equal width over the predicted chance that the first answer is better, the two in an order drawn by id."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        first = row_seed(seed, row.id) % 2 == 0
        margin = row.logit if first else -row.logit
        chance = 1 / (1 + math.exp(-max(-60.0, min(60.0, margin))))
        bins.setdefault(min(int(chance * BINS), BINS - 1), []).append((chance, float(first)))
    return [
        (sum(said for said, _ in found) / len(found), sum(seen for _, seen in found) / len(found), len(found))
        for _, found in sorted(bins.items())
    ]

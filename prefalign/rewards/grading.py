"""How good a reward is, before anything is trained against it: pairs with a known better answer, with and without its sources.

Every pair is scored as it is, without its facts, with the picture of another row, and with a black picture; names of objects that
are not there are written into the chosen answer. A reward that tells answers apart by their length, by facts alone or by order
shows in these numbers before it shows in a policy.

Sources: accuracy outside the training set decides (arXiv 2407.02477, its table of reward models); facts in and out, length
control and blanked pictures: the recommendations in Fact-RLHF's and PPO's specifications.

Legend of shapes: `N` pairs of a block.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign.config import ConfigError
from prefalign.corruption import blank
from prefalign.evals.statistics import Estimate, resample
from prefalign.images import encode_png, open_image, sha256
from prefalign.manifest import write_atomically
from prefalign.records import Pair, message_text, row_seed
from prefalign.rewards.reward import Response, Reward

if TYPE_CHECKING:
    from prefalign.images import EncodedImage
    from prefalign.records import Message

logger = logging.getLogger(__name__)

GRADE = "grade.json"
"""The grade of a reward model, in its own folder."""

VARIANTS = ("own", "without_facts", "shuffled_picture", "blank_picture")
BINS = 5


@dataclass(frozen=True)
class Graded:
    """One pair as a reward sees it; NaN: no score, or nothing to compare.

    Attributes:
        id: the pair's.
        picture: what pairs are grouped by in intervals.
        scores: score of the chosen and of the rejected answer.
        lengths: words of the chosen and of the rejected answer.
        margins: by variant (`VARIANTS`), score of the chosen answer minus that of the rejected one.
        swapped: the margin with the two answers handed over in the other order.
        noticed: score of the chosen answer with a true object added minus that with an absent one added.
    """

    id: str
    picture: str
    scores: tuple[float, float]
    lengths: tuple[int, int]
    margins: dict[str, float]
    swapped: float
    noticed: float


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
    "calibration_error": "mean distance of predicted chance and observed share, in bins",
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
    for block in _blocks(pairs, block_size):
        rows += _grade_block(block, lambda responses: _scored(reward, responses, term), sentence, seed)
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
    bins = _calibration(scored, seed)
    error = sum(abs(said - seen) * n for said, seen, n in bins) / len(scored) if scored else None
    metrics["calibration_error"] = Estimate(error, None, len(scored))
    return Grade(len(rows), len(rows) - len(scored), metrics, bins)


def write_grade(folder: Path, grades: Mapping[str, Grade], domains: Mapping[str, str]) -> None:
    """Put a grade into a reward model's folder, tied to its weights, where training with it looks for it."""
    content = {
        "weights": weights_digest(folder),
        "sets": {name: {"domain": domains[name], **asdict(found)} for name, found in grades.items()},
    }
    write_atomically(folder / GRADE, json.dumps(content, indent=2, allow_nan=False).encode())


def check_fit_for_rl(folder: Path, *, floor: float = 0.6, force: bool = False) -> list[str]:
    """Refuse a reward model that was not graded, or whose accuracy is below a floor on any set it was graded on.

    Args:
        folder: the reward model.
        floor: least accuracy; a policy that is trained against a worse one learns its mistakes.
        force: go on all the same.

    Returns:
        What is wrong with it, to be logged; empty for a fit one.

    Raises:
        ConfigError: there is something wrong with it and `force` is not set.
    """
    problems = _problems(folder, floor)
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
            for problem in check_fit_for_rl(folder, floor=floor, force=force):
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


def _problems(folder: Path, floor: float) -> list[str]:
    file = folder / GRADE
    command = "prefalign run grade_reward_model"
    if not file.is_file():
        return [f"it was never graded (no {GRADE}; `{command}` writes one)"]
    found = json.loads(file.read_text(encoding="utf-8"))
    if found["weights"] != weights_digest(folder):
        return [f"its {GRADE} is of other weights (`{command}` grades it anew)"]
    problems = []
    for name, measured in found["sets"].items():
        value = measured["metrics"]["accuracy"]["value"]
        if value is None or not value >= floor:
            shown = "unknown" if value is None else f"{value:.3f}"
            problems.append(
                f"its accuracy on {name!r} ({measured['domain']} of domain) is {shown}, below the floor of {floor}"
            )
    return problems


def _grade_block(
    block: Sequence[Pair], scored: Callable[[list[Response]], list[float]], sentence: str, seed: int
) -> list[Graded]:
    digests = ["".join(sha256(image) for image in pair.images) for pair in block]
    chosen = [_response(pair, pair.chosen) for pair in block]
    rejected = [_response(pair, pair.rejected) for pair in block]
    scores = (scored(chosen), scored(rejected))
    together = scored([side for pair in zip(rejected, chosen, strict=True) for side in pair])
    swapped = [after - before for before, after in zip(together[::2], together[1::2], strict=True)]
    margins = {"own": [good - bad for good, bad in zip(*scores, strict=True)]}
    others = _partners(block, digests)
    variants: dict[str, Callable[[int, Response], Response | None]] = {
        "without_facts": lambda row, response: replace(response, facts={}) if response.facts else None,
        "shuffled_picture": lambda row, response: (
            None if others[row] is None else replace(response, images=block[others[row]].images)  # type: ignore[index]
        ),
        "blank_picture": lambda row, response: (
            replace(response, images=[_blanked(image) for image in block[row].images]) if block[row].images else None
        ),
    }
    for name, change in variants.items():
        margins[name] = _compared(scored, [(change(r, chosen[r]), change(r, rejected[r])) for r in range(len(block))])
    noticed = _compared(
        scored,
        [_with_objects(pair, response, block, sentence, seed) for pair, response in zip(block, chosen, strict=True)],
    )
    return [
        Graded(
            id=pair.id,
            picture=digests[row],
            scores=(scores[0][row], scores[1][row]),
            lengths=(len(chosen[row].text.split()), len(rejected[row].text.split())),
            margins={name: values[row] for name, values in margins.items()},
            swapped=swapped[row],
            noticed=noticed[row],
        )
        for row, pair in enumerate(block)
    ]


def _compared(
    scored: Callable[[list[Response]], list[float]], sides: Sequence[tuple[Response | None, Response | None]]
) -> list[float]:
    """Score of the first minus that of the second; NaN where there is nothing to compare."""
    known = [row for row, (first, second) in enumerate(sides) if first is not None and second is not None]
    values = scored([side for row in known for side in sides[row] if side is not None]) if known else []
    found = [math.nan] * len(sides)
    for number, row in enumerate(known):
        found[row] = values[2 * number] - values[2 * number + 1]
    return found


def _response(pair: Pair, answer: Sequence[Message]) -> Response:
    return Response(pair.id, pair.images, pair.prompt, message_text(answer), answer=pair.answer, facts=pair.facts)


def _partners(block: Sequence[Pair], digests: Sequence[str]) -> list[int | None]:
    """For each row the next row of the block with as many pictures, and others; None: there is none."""
    partners: list[int | None] = []
    for row, pair in enumerate(block):
        later = [(row + step) % len(block) for step in range(1, len(block))]
        fitting = (other for other in later if pair.images and len(block[other].images) == len(pair.images))
        partners.append(next((other for other in fitting if digests[other] != digests[row]), None))
    return partners


def _with_objects(
    pair: Pair, chosen: Response, block: Sequence[Pair], sentence: str, seed: int
) -> tuple[Response | None, Response | None]:
    """The chosen answer with an object that is there written behind it, and with one that is not."""
    import random

    present = _object_names(pair)
    absent = sorted({name for other in block for name in _object_names(other)} - set(present))
    if not present or not absent:
        return None, None
    rng = random.Random(row_seed(seed, pair.id))
    names = (rng.choice(present), rng.choice(absent))
    true, false = (replace(chosen, text=chosen.text + sentence.format(name=name)) for name in names)
    return true, false


def _object_names(pair: Pair) -> list[str]:
    things = pair.facts.get("objects") or []
    return sorted({thing["name"] if isinstance(thing, Mapping) else str(thing) for thing in things})


def _blanked(image: EncodedImage) -> EncodedImage:
    return encode_png(blank(open_image(image), colour="black"))


def _scored(reward: Reward, responses: list[Response], term: str) -> list[float]:
    scores = reward.score(responses)
    if term not in scores:
        raise ConfigError(f"term: the rewards give {', '.join(scores)}, and none called {term!r}. Name one of these.")
    return [float(value) for value in scores[term].tolist()]


def _blocks(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    block: list[Pair] = []
    for pair in pairs:
        block.append(pair)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


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
        margin = row.margins["own"] if first else -row.margins["own"]
        chance = 1 / (1 + math.exp(-max(-60.0, min(60.0, margin))))
        bins.setdefault(min(int(chance * BINS), BINS - 1), []).append((chance, float(first)))
    return [
        (sum(said for said, _ in found) / len(found), sum(seen for _, seen in found) / len(found), len(found))
        for _, found in sorted(bins.items())
    ]

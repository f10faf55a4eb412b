"""What a round says of itself: how its pairs came about, what training saw of them, how far the policy moved, and warnings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefalign.manifest import read_manifest
from prefalign.records import Pair, message_text
from prefalign.store import read_records

NO_PAIRS = "no_pairs.json"
"""File of a round in which no prompt that was drawn online gave a usable pair: how many there were, and why."""
GAP_SHARE = 0.15
"""Mean length of the chosen answers over the rejected ones, less 1, from which a length bias is suspected."""
EASY, CHANCE = 0.95, 0.55
"""Reward accuracies of pairs that teach nothing any more, and of pairs that cannot be told apart."""
LESS_SAID = 0.05
"""Fall of recall from which fewer inventions may only be shorter answers."""
INCONSISTENT = 0.7
"""Share of pairs on which a judge should agree with itself in both orders."""


def round_metrics(folder: Path, policy: Path, *, number: int, divergence: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a round whose policy is trained.

    Args:
        folder: folder of the round.
        policy: folder of its policy.
        number: its number.
        divergence: KL of the policy after the round to the reference.

    Returns:
        `annotated` prompts with `order_consistency` and `tie_rate` (None where there is nothing to count), `dropped` by reason,
        `pairs` by source, `share_online`, `length_gap` (mean characters of chosen less rejected) and `length_ratio` by source,
        `rewards` by source (accuracy and margin, each row before its own update), `kl`, `check`, and
        `evaluation`, which is empty until it is measured.
    """
    pairs = list(_briefly(folder / "mixed"))
    counts = {
        source: sum(pair["source"] == source for pair in pairs) for source in sorted({p["source"] for p in pairs})
    }
    check = folder / "check.json"
    return {
        "round": number,
        **_annotation(folder),
        "pairs": counts,
        "share_online": sum(pair["online"] for pair in pairs) / len(pairs),
        "length_gap": {source: _mean([p["gap"] for p in pairs if p["source"] == source]) for source in counts},
        "length_ratio": {
            source: sum(p["chosen"] for p in pairs if p["source"] == source)
            / max(sum(p["rejected"] for p in pairs if p["source"] == source), 1)
            for source in counts
        },
        "rewards": _rewards(policy, list(counts)),
        "kl": divergence.get("kl"),
        "kl_per_token": divergence.get("kl_per_token"),
        "check": json.loads(check.read_text(encoding="utf-8")) if check.is_file() else {},
        "evaluation": {},
    }


def _briefly(mixed: Path) -> Any:
    for pair in read_records(mixed, Pair):
        chosen, rejected = len(message_text(pair.chosen)), len(message_text(pair.rejected))
        yield {"source": pair.meta["source"], "online": bool(pair.meta["source"] != "offline"), "chosen": chosen,
               "rejected": rejected, "gap": chosen - rejected}  # fmt: skip


def _annotation(folder: Path) -> dict[str, Any]:
    """Counts of the annotator's verdicts, from the manifest of the pairs."""
    manifest = read_manifest(folder / "pairs")
    if manifest is None:
        note = folder / NO_PAIRS
        lost = json.loads(note.read_text(encoding="utf-8"))["prompts"] if note.is_file() else 0
        dropped = {"no_usable_pair": lost} if lost else {}
        return {"annotated": 0, "dropped": dropped, "order_consistency": None, "tie_rate": None}
    # a prompt that took its offline pair was not asked, and is not lost
    dropped = {reason: count for reason, count in manifest.dropped.items() if reason != "drawn_offline"}
    verdicts = ("tie", "small_gap", "order_disagrees", "no_verdict", "cycle")
    annotated = manifest.rows_used + sum(dropped.get(reason, 0) for reason in verdicts)
    votes = [len(pair.meta.get("votes") or ()) == 2 for pair in read_records(folder / "pairs", Pair)]
    judged = any(votes)
    agreed = manifest.rows_used + dropped.get("tie", 0) + dropped.get("cycle", 0)
    disagreed = dropped.get("order_disagrees", 0)
    return {
        "annotated": annotated,
        "dropped": dropped,
        "order_consistency": agreed / (agreed + disagreed) if judged else None,
        "tie_rate": (dropped.get("tie", 0) + dropped.get("small_gap", 0)) / annotated if annotated else None,
    }


def _rewards(policy: Path, sources: Sequence[str]) -> dict[str, dict[str, float]]:
    """Means over the round of what the trainer logged for each source, weighted by nothing: steps count alike."""
    state = json.loads((policy / "trainer_state.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, float]] = {}
    for source in sources:
        for kind in ("accuracies", "margins"):
            name = f"rewards/{kind}_{source}"
            values = [entry[name] for entry in state["log_history"] if name in entry]
            if values:
                found.setdefault(source, {})[kind] = _mean(values)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def warnings_of(rounds: Sequence[Mapping[str, Any]], before: Mapping[str, Any] | None = None) -> list[str]:
    """Signs of failure, in words.

    Args:
        rounds: metrics of the rounds so far.
        before: the evaluation of the model that the run started from, if there is one.
    """
    found = []
    ratios = [r["length_ratio"]["online"] for r in rounds if "online" in r["length_ratio"]]
    if ratios and all(ratio > 1 + GAP_SHARE for ratio in ratios):
        found.append(
            f"in every round the online chosen answers are longer than the rejected ones (by {min(ratios) - 1:.0%} or more): the "
            "annotator may prefer length. Compare answers of equal length, or give the rewards a length term."
        )
    for measured in rounds:
        recall = (before or {}).get("recall"), measured["evaluation"].get("recall")
        if None not in recall and recall[0] - recall[1] > LESS_SAID:
            found.append(
                f"round {measured['round']}: recall is {recall[1]:.3f} and was {recall[0]:.3f} before the run: answers say "
                "less, and what is not said cannot be invented. Raise trainer.beta or the weight of recall in the rewards, or "
                "lower p_offline."
            )
        rewards = {source: values.get("accuracies") for source, values in measured["rewards"].items()}
        offline, online = rewards.get("offline"), rewards.get("online")
        if offline is not None and online is not None and offline > EASY and online < CHANCE:
            found.append(
                f"round {measured['round']}: reward accuracy is {offline:.2f} on offline pairs and {online:.2f} on online ones: "
                "the offline pairs are too easy to teach anything. Lower p_offline, or make harder pairs."
            )
        consistency = measured["order_consistency"]
        if consistency is not None and consistency < INCONSISTENT:
            found.append(
                f"round {measured['round']}: the judge agrees with itself in both orders on {consistency:.0%} of the pairs only: "
                "it follows the order, not the answers. Take a stronger judge."
            )
        gap = measured["check"].get("largest")
        if gap is not None and measured["check"]["mean"] > 0.05:
            found.append(
                f"round {measured['round']}: engine and trainer differ by {measured['check']['mean']:.2g} nats per token on "
                f"average (largest {gap:.2g}): the answers come from a slightly different policy. Give both one precision."
            )
    return found


COLUMNS = ("round", "pairs", "online", "dropped", "order", "ties", "length gap", "acc. offline", "acc. online", "KL")


def table(results: Mapping[str, Any]) -> str:
    """The rounds as a text table, with the evaluation's main numbers where there is one, and the warnings below."""
    measured = [results["before"], *(r["evaluation"] for r in results["rounds"])]
    shown = [name for name in ("chair_i", "recall", "accuracy") if any(name in one for one in measured)]
    rows = [[*COLUMNS, *shown]]
    if results["before"]:
        rows.append(["0", *["-"] * (len(COLUMNS) - 1), *(_number(results["before"][name]) for name in shown)])
    for r in results["rounds"]:
        accuracy = {source: values.get("accuracies") for source, values in r["rewards"].items()}
        rows.append([
            str(r["round"]), str(sum(r["pairs"].values())), _number(r["share_online"]), str(sum(r["dropped"].values())),
            _number(r["order_consistency"]), _number(r["tie_rate"]), _number(r["length_gap"].get("online")),
            _number(accuracy.get("offline")), _number(accuracy.get("online")), _number(r["kl"]),
            *(_number(r["evaluation"].get(name)) for name in shown),
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, *(f"WARNING: {text}" for text in results["warnings"])])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

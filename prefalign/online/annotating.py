"""Second arrow of a round: which of a prompt's answers is better, by a judge in both orders or by scores and a margin."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prefalign import stages, store
from prefalign.config import ConfigError
from prefalign.online.sampling import Draw, near_identical, usable
from prefalign.records import Candidates, Pair, Prompt, canonical_json
from prefalign.rewards import Comparator, Response, Verdict, read_comparator, read_rewards
from prefalign.sources import DataConfig, fingerprint
from prefalign.store import Dropped, Failed, Outcome, OutputConfig, read_records

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prefalign.manifest import Manifest
    from prefalign.rewards import Combined

ANNOTATE = "annotate_online"
METHOD = "online_dpo"


@dataclass
class Preference:
    """Which answer of a group is the best and which the worst.

    Attributes:
        chosen: number of the best answer; None: no preference, and `reason` says why.
        rejected: number of the worst.
        reason: `tie`, `order_disagrees`, `no_verdict`, `cycle`, `no_score`, `small_gap`, `near_identical`, or `judge_failed`: it
            did not reply, and `words` says why.
        gap: difference of their scores; None for a judge.
        votes: what a judge said of (chosen, rejected) in that order and in the swapped one, in terms of that order.
        confidence: the judge's.
        scores: per answer its scores by term.
        words: the judge's reason.
    """

    chosen: int | None = None
    rejected: int | None = None
    reason: str = ""
    gap: float | None = None
    votes: tuple[str | None, ...] = ()
    confidence: float | None = None
    scores: list[dict[str, float]] = field(default_factory=list)
    words: str = ""


class Annotator(Protocol):
    """Says which answer of each group is best and which is worst."""

    @property
    def version(self) -> str:
        """What is stored with every pair: model, prompt or settings."""
        ...

    def prefer(self, groups: Sequence[Sequence[Response]]) -> list[Preference]:
        """One preference for each group of answers to one prompt, in order."""
        ...


@dataclass
class ByScore:
    """Best against worst by the total of weighted rewards.

    Attributes:
        rewards: from `read_rewards`.
        margin: least difference of totals; a smaller one is dropped. At 0 equal totals are still dropped.
        version: what is stored with every pair.
    """

    rewards: Combined
    margin: float = 0.0
    version: str = ""

    def prefer(self, groups: Sequence[Sequence[Response]]) -> list[Preference]:
        """All answers of all groups are scored in one call; a group is compared among the answers that have a score."""
        flat = [response for group in groups for response in group]
        terms = self.rewards.score(flat) if flat else {}
        rows = [{name: float(values[number]) for name, values in terms.items()} for number in range(len(flat))]
        found, at = [], 0
        for group in groups:
            failed = next(
                (self.rewards.failures[n] for n in range(at, at + len(group)) if n in self.rewards.failures), None
            )
            found.append(self._one(rows[at : at + len(group)]) if failed is None
                         else Preference(reason="judge_failed", words=failed))  # fmt: skip
            at += len(group)
        return found

    def _one(self, scores: list[dict[str, float]]) -> Preference:
        known = [number for number, row in enumerate(scores) if not math.isnan(row["total"])]
        # a number that is missing cannot be written as JSON
        kept = [{name: value for name, value in row.items() if not math.isnan(value)} for row in scores]
        if len(known) < 2:
            return Preference(reason="no_score", scores=kept)
        best, worst = max(known, key=lambda n: scores[n]["total"]), min(known, key=lambda n: scores[n]["total"])
        gap = scores[best]["total"] - scores[worst]["total"]
        if gap == 0:
            return Preference(reason="tie", gap=0.0, scores=kept)
        if gap < self.margin:
            return Preference(reason="small_gap", gap=gap, scores=kept)
        return Preference(best, worst, gap=gap, scores=kept)


@dataclass
class ByJudge:
    """Every two answers of a group by a pairwise judge; the one that wins most often against the one that wins least often.

    The judge is asked in both orders, if it does not do that by itself (`Verdict.votes`), and a preference counts where both
    agree. Of more than two answers the best must have beaten the worst directly; where several win as often, the first two of
    them for which that holds are taken. Verdicts that run in a circle give no pair (`cycle`).

    Attributes:
        comparator: the judge.
    """

    comparator: Comparator

    @property
    def version(self) -> str:
        """The judge's model and prompt version."""
        return self.comparator.version

    def prefer(self, groups: Sequence[Sequence[Response]]) -> list[Preference]:
        """One call for the first order of all pairs, and one for the second where the judge left it out."""
        places = [
            (number, first, second)
            for number, group in enumerate(groups)
            for first, second in itertools.combinations(range(len(group)), 2)
        ]
        verdicts = self._both_orders([(groups[number][a], groups[number][b]) for number, a, b in places])
        by_group: list[dict[tuple[int, int], Verdict]] = [{} for _ in groups]
        for (number, first, second), verdict in zip(places, verdicts, strict=True):
            by_group[number][first, second] = verdict
        return [_tournament(len(group), found) for group, found in zip(groups, by_group, strict=True)]

    def _both_orders(self, pairs: list[tuple[Response, Response]]) -> list[Verdict]:
        verdicts = self.comparator.compare(pairs) if pairs else []
        once = [number for number, verdict in enumerate(verdicts) if len(verdict.votes) < 2]
        swapped = self.comparator.compare([(pairs[n][1], pairs[n][0]) for n in once]) if once else []
        for number, other in zip(once, swapped, strict=True):
            one = verdicts[number]
            votes = (one.winner, _turned(other.winner))
            winner = one.winner if votes[0] == votes[1] else None
            error = one.error if one.error is not None else other.error
            verdicts[number] = Verdict(winner, one.confidence, one.reason, votes, error)
        return verdicts


def _turned(winner: str | None) -> str | None:
    return {"first": "second", "second": "first"}.get(str(winner), winner)


def _tournament(count: int, verdicts: Mapping[tuple[int, int], Verdict]) -> Preference:
    failed = next((verdict.error for verdict in verdicts.values() if verdict.error is not None), None)
    if failed is not None:
        return Preference(reason="judge_failed", words=failed)
    wins = [0] * count  # less losses
    for (first, second), verdict in verdicts.items():
        if verdict.winner in ("first", "second"):
            wins[first if verdict.winner == "first" else second] += 1
            wins[second if verdict.winner == "first" else first] -= 1
    ends = [
        (best, worst)
        for best, worst in itertools.permutations(range(count), 2)
        if wins[best] == max(wins) and wins[worst] == min(wins)
    ]
    if max(wins) > min(wins):
        ends.sort(key=lambda pair: _between(verdicts, *pair).winner != "first")
    best, worst = ends[0]
    verdict = _between(verdicts, best, worst)
    found = Preference(votes=verdict.votes, confidence=verdict.confidence, words=verdict.reason)
    if verdict.winner == "first" and max(wins) > min(wins):
        found.chosen, found.rejected = best, worst
    elif verdict.winner in ("first", "second") or (
        max(wins) == min(wins) and any(one.winner in ("first", "second") for one in verdicts.values())
    ):
        found.reason = "cycle"
    elif verdict.winner == "tie":
        found.reason = "tie"
    else:
        found.reason = "no_verdict" if None in verdict.votes else "order_disagrees"
    return found


def _between(verdicts: Mapping[tuple[int, int], Verdict], one: int, other: int) -> Verdict:
    """The verdict on two answers, in terms of this order."""
    if one < other:
        return verdicts[one, other]
    verdict = verdicts[other, one]
    winner: Any = _turned(verdict.winner)
    return Verdict(winner, verdict.confidence, verdict.reason, tuple(_turned(vote) for vote in verdict.votes))


def read_annotator(
    annotator: Mapping[str, Any] | None, rewards: Sequence[Mapping[str, Any]], margin: float
) -> Annotator:
    """The annotator of a config: `annotator` (a pairwise judge) or `rewards` with a `margin`.

    Raises:
        ConfigError: both, neither, a negative margin, or a margin for a judge.
        ValueError: a model that judges cannot be had (`engines.loading.check_engine`).
        ServerError: no server answers that is to judge, it refuses the key, or has no such model.
    """
    if (annotator is None) == (not rewards):
        raise ConfigError(
            f"annotator: {'neither `annotator` nor `rewards` is given' if annotator is None else 'both are given'}, so nothing "
            "says which of two answers is better. Give `annotator` (a pairwise judge, such as {name: judge}) or a list of "
            "`rewards` (such as [{name: objects}]), not both."
        )
    if margin < 0 or not math.isfinite(margin):
        raise ConfigError(
            f"margin: {margin} is no least difference of two scores. Give 0 (any difference counts) or more."
        )
    if annotator is None:
        combined = read_rewards(rewards)
        combined.check()
        known = {entry.name: getattr(entry.reward, "version", None) for entry in combined.entries}
        versions = {name: str(version) for name, version in known.items() if version is not None}
        version = canonical_json({"rewards": stages.portable(rewards), "margin": margin, "versions": versions})
        return ByScore(combined, margin, version)
    if margin:
        raise ConfigError(
            f"margin: {margin} is a least difference of scores, and a pairwise judge gives none. Leave it out."
        )
    comparator = read_comparator(annotator)
    comparator.check()
    return ByJudge(comparator)


def annotate(
    prompts: Path,
    candidates: Path,
    annotator: Annotator,
    draw: Draw,
    *,
    output: OutputConfig,
) -> Manifest:
    """Pairs from candidates; prompts that were drawn offline, have no answers or gave no pair are counted by reason.

    Every pair's `meta` says its source, round, sampling settings, annotator version, votes, gap, and the two answers' scores,
    lengths and log-probs when they were drawn.

    Args:
        prompts: folder of the round's prompts.
        candidates: folder that `sampling.sample` wrote for them.
        annotator: from `read_annotator`.
        draw: that `sampling.sample` was given: a prompt without candidates is `drawn_offline`, or its answers failed
            (`generation_failed`; the quarantine of `candidates` says why).
        output: folder of the pairs.
    """
    known = {entry.id: entry.responses for entry in read_records(candidates, Candidates)}

    def prepare(prompt: Prompt) -> list[dict[str, Any]] | Dropped:
        if prompt.id not in known:
            return Dropped("drawn_offline" if draw.takes_offline(prompt.id) else "generation_failed")
        left, reason = usable(known[prompt.id])
        if reason is None and len(left) == 2 and near_identical(left[0]["text"], left[1]["text"]):
            reason = "near_identical"  # found before a judge is asked
        return left if reason is None else Dropped(reason)

    def work(rows: list[tuple[Prompt, list[dict[str, Any]]]]) -> list[Outcome]:
        groups = [[as_response(prompt, entry) for entry in drawn] for prompt, drawn in rows]
        outcomes: list[Outcome] = []
        for (prompt, drawn), found in zip(rows, annotator.prefer(groups), strict=True):
            pair = as_pair(prompt, drawn, found, annotator.version, seed=draw.seed, visit=draw.visit)
            outcomes.append([pair] if isinstance(pair, Pair) else pair)
        return outcomes

    return store.run_stage(
        ANNOTATE,
        DataConfig(prompts),
        lambda block: stages.in_order(block, prepare, work),
        output=output,
        record=Pair,
        settings={
            "annotator": annotator.version,
            "visit": draw.visit,
            "candidates": fingerprint(DataConfig(candidates)),
        },
        seed=draw.seed,
    )


def as_response(prompt: Prompt, entry: Mapping[str, Any]) -> Response:
    """A stored response as rewards and judges see it."""
    return Response(
        prompt.id, list(prompt.images), prompt.messages, entry["text"], prompt.answer, prompt.facts,
        finished=entry["finish_reason"] == "stop", tokens=entry["tokens"],
    )  # fmt: skip


def as_pair(
    prompt: Prompt,
    drawn: Sequence[Mapping[str, Any]],
    found: Preference,
    annotator: str,
    *,
    seed: int,
    visit: int,
) -> Pair | Dropped | Failed:
    """The pair of a preference, or why there is none."""
    if found.reason == "judge_failed":
        return Failed(found.reason, found.words)
    if found.chosen is None or found.rejected is None:
        return Dropped(found.reason)
    chosen, rejected = drawn[found.chosen], drawn[found.rejected]
    if near_identical(chosen["text"], rejected["text"]):
        return Dropped("near_identical")
    sides = {"chosen": chosen, "rejected": rejected}
    scores = {side: found.scores[number] for side, number in
              (("chosen", found.chosen), ("rejected", found.rejected))} if found.scores else {}  # fmt: skip
    return stages.make_pair(
        prompt, method=METHOD, chosen=chosen["text"], rejected=rejected["text"], margin=found.gap,
        settings={"annotator": annotator, "visit": visit, "sampling": chosen["settings"]}, seed=seed,
        model=chosen["generator"],
        meta={
            "source": "online", "online": True, "round": visit, "sampling": chosen["settings"], "annotator": annotator,
            "votes": list(found.votes), "confidence": found.confidence, "gap": found.gap, "scores": scores,
            "judge_reason": found.words,
            "logps_at_sampling": {side: entry["logp"] for side, entry in sides.items()},
            "tokens": {side: entry["tokens"] for side, entry in sides.items()},
        },
    )  # fmt: skip

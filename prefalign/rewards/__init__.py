"""Rewards: scalar reward models, judges, rules and functions behind one interface, in one literal table.

A run names them in a weighted list, as it names its losses. Every term is logged by itself; a response with a missing term has
no total (NaN), and who uses the total counts and drops it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefalign.config import ConfigError, build, nearest
from prefalign.rewards.reward import Comparator, Response, Reward, Verdict

if TYPE_CHECKING:
    import torch

REWARDS: dict[str, str] = {
    "reward_model": "prefalign.rewards.learned:LearnedReward",
    "judge": "prefalign.rewards.judged:JudgedAttributes",
    "claims": "prefalign.rewards.claims:Claims",
    "statements": "prefalign.rewards.statements:Statements",
    "implicit": "prefalign.rewards.implicit:Implicit",
    "objects": "prefalign.rewards.objects:Objects",
    "symbolic": "prefalign.rewards.symbolic:Symbolic",
    "missing_eos": "prefalign.rewards.shaping:MissingEos",
    "length": "prefalign.rewards.shaping:Length",
    "multiple_choice": "prefalign.rewards.shaping:MultipleChoice",
    "yes_no": "prefalign.rewards.shaping:YesNo",
    "function": "prefalign.rewards.function:Function",
}
"""Name in a config to `module:class`; a class is imported when a run names it."""

COMPARATORS: dict[str, str] = {
    "judge": "prefalign.rewards.judged:PairwiseJudge",
    "rewards": "prefalign.rewards.comparing:ByReward",
}
"""Pairwise judges, likewise."""

__all__ = [
    "COMPARATORS",
    "REWARDS",
    "Combined",
    "Comparator",
    "FactsError",
    "Response",
    "Reward",
    "Verdict",
    "Weighted",
    "as_trl_functions",
    "read_comparator",
    "read_rewards",
]


class FactsError(ValueError):
    """The facts of one row are not what a reward reads; other rows can be scored."""


@dataclass(frozen=True)
class Weighted:
    """One entry of a run's list of rewards.

    Attributes:
        name: name of the entry: the prefix of its terms.
        reward: the reward with its settings.
        weight: what each of its terms is multiplied by in the total, or a mapping by term (others count 0).
    """

    name: str
    reward: Reward
    weight: float | Mapping[str, float] = 1.0

    def weight_of(self, term: str) -> float:
        """The weight of one of its terms."""
        return self.weight if isinstance(self.weight, (int, float)) else self.weight.get(term, 0.0)


@dataclass
class Combined:
    """A weighted sum of rewards, itself a reward.

    Attributes:
        entries: what is added up.
        failures: of the last call of `score`, by place of the response, which reward was not answered, and why.
    """

    entries: Sequence[Weighted]
    failures: dict[int, str] = field(default_factory=dict, init=False)

    def check(self) -> None:
        """Let every reward that needs a model or a server look for it, before weights are read (`Reward.check`)."""
        for entry in self.entries:
            if (check := getattr(entry.reward, "check", None)) is not None:
                check()

    def versions(self) -> dict[str, str]:
        """What identifies each reward that has a `version` (weights, prompt), by its entry's name."""
        known = {entry.name: getattr(entry.reward, "version", None) for entry in self.entries}
        return {name: str(version) for name, version in known.items() if version}

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """Score responses.

        Returns:
            `<entry>/<term>` for every term as its reward gives it, and `total`, (N,) float32 each. `total` is NaN where a term
            with a weight is, unless a reward with the setting `replace` decides it alone (`shaping.MissingEos`).

        Raises:
            ValueError: an entry gives no term that has a weight, or lacks one that its weights name.
        """
        import torch

        found: dict[str, torch.Tensor] = {}
        total = torch.zeros(len(responses))
        replaced = torch.zeros(len(responses))
        self.failures = {}
        for entry in self.entries:
            terms = entry.reward.score(responses)
            for place, message in getattr(entry.reward, "failures", {}).items():
                self.failures.setdefault(place, f"{entry.name}: {message}")
            weights = {term: entry.weight_of(term) for term in terms}
            named = (
                [] if isinstance(entry.weight, (int, float)) else [term for term in entry.weight if term not in terms]
            )
            if named and responses:
                raise ValueError(_no_term(entry.name, named[0], list(terms)))
            if not any(weights.values()) and responses:
                raise ValueError(
                    f"reward {entry.name!r} gives {', '.join(terms)}, and its weight {entry.weight!r} counts none of them, so it "
                    "would be computed for nothing. Name one of these terms in `weight`, or leave the entry out."
                )
            for term, values in terms.items():
                values = values.float().cpu()
                found[f"{entry.name}/{term}"] = values
                if weights[term] and getattr(entry.reward, "replace", False):
                    replaced = replaced + weights[term] * values
                elif weights[term]:
                    total = total + weights[term] * values
        return {**found, "total": torch.where(replaced == 0, total, replaced)}


def read_rewards(entries: Sequence[Mapping[str, Any]]) -> Combined:
    """The weighted rewards of a config's `rewards` list.

    Args:
        entries: mappings with `name` (a key of `REWARDS`), optional `weight` (a number, or a mapping by term), optional `label`
            (the entry's name in logs, for one reward that is listed twice), and the reward's own settings.

    Raises:
        ConfigError: an empty list, an unknown name or setting (with the nearest known one), a bad value, a label twice, a weight
            of a term that the reward does not give, where its settings say which it gives (`Reward.terms`).
    """
    if not entries:
        raise ConfigError(
            "rewards: the list is empty, so no response is better than another. Name one, such as {name: objects}."
        )
    problems, found = [], []
    for number, entry in enumerate(entries):
        place = f"rewards.{number}"
        settings = dict(entry)
        name, weight = settings.pop("name", None), settings.pop("weight", 1.0)
        label = str(settings.pop("label", name))
        if name not in REWARDS:
            problems.append(f"{place}.name: no reward called {name!r}; {nearest(str(name), list(REWARDS))}")
            continue
        numbers = list(weight.values()) if isinstance(weight, Mapping) else [weight]
        bad = [w for w in numbers if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w)]
        if bad or not any(numbers):
            problems.append(
                f"{place}.weight: {weight!r} is no weight; give a number other than 0, or a mapping of term to number."
            )
            continue
        module, _, cls = REWARDS[name].partition(":")
        reward_class = getattr(importlib.import_module(module), cls)
        try:
            reward = build(reward_class, settings, source=place)
        except ConfigError as error:
            problems.append(str(error))
            continue
        known = getattr(reward, "terms", None) or ()
        unknown = [term for term in weight if known and term not in known] if isinstance(weight, Mapping) else []
        problems += [f"{place}.weight: {_no_term(name, term, known)}" for term in unknown]
        found.append(Weighted(label, reward, weight))
    labels = [entry.name for entry in found]
    problems += [
        f"rewards: {label!r} stands in the list {labels.count(label)} times; give each its own `label`."
        for label in sorted(set(labels))
        if labels.count(label) > 1
    ]
    if problems:
        raise ConfigError("\n  ".join(problems))
    return Combined(found)


def _no_term(name: str, term: str, known: Sequence[str]) -> str:
    return (
        f"reward {name!r} gives no term {term!r}, so its weight would count for nothing; {nearest(term, list(known))}"
    )


def read_comparator(entry: Mapping[str, Any]) -> Comparator:
    """The pairwise judge of a config's `annotator`.

    Args:
        entry: a mapping with `name` (a key of `COMPARATORS`) and the judge's own settings.

    Raises:
        ConfigError: an unknown name or setting, or a bad value.
    """
    settings = dict(entry)
    name = settings.pop("name", None)
    if name not in COMPARATORS:
        raise ConfigError(f"annotator.name: no annotator called {name!r}; {nearest(str(name), list(COMPARATORS))}")
    module, _, cls = COMPARATORS[name].partition(":")
    comparator: Comparator = build(getattr(importlib.import_module(module), cls), settings, source="annotator")
    return comparator


def as_trl_functions(rewards: Combined, *, end_token_ids: Collection[int] = ()) -> list[Any]:
    """The rewards as one function for TRL's GRPO, RLOO and online trainers (`reward_funcs`).

    TRL hands over `prompts`, `completions` and the data set's columns as lists of equal length; columns `image` or `images`,
    `answer` and `facts` (JSON text) are used where they are there. The function is called `total` in TRL's logs, and every term
    goes to its `log_metric` where the version of TRL gives one. A missing score is None, which TRL leaves out.

    Args:
        rewards: from `read_rewards`.
        end_token_ids: tokens that end a turn (`families.end_token_ids`): a completion whose last token is none of them ran into
            the length limit. TRL says it in no other way.

    Raises:
        ValueError: a reward looks at whether responses are finished, and no `end_token_ids` are given.
    """
    import json

    blind = [entry.name for entry in rewards.entries if getattr(entry.reward, "needs_finished", False)]
    if blind and not end_token_ids:
        raise ValueError(
            f"reward {blind[0]!r} needs to know which completions are finished, and TRL hands over their tokens only. Give "
            "`end_token_ids`, such as families.end_token_ids(processor, model.generation_config)."
        )

    from prefalign.records import message_text, normalise_messages

    def total(prompts: list[Any], completions: list[Any], log_metric: Any = None, **columns: Any) -> list[float | None]:
        count = len(prompts)
        single = columns.get("image") or [None] * count
        images = columns.get("images") or [[] if image is None else [image] for image in single]
        facts = columns.get("facts") or ["{}"] * count
        answers = columns.get("answer") or [None] * count
        ids = columns.get("id") or [str(number) for number in range(count)]
        drawn = columns.get("completion_ids") or [None] * count
        responses = [
            Response(
                id=ids[row],
                images=list(images[row] or []),
                messages=normalise_messages(prompts[row]),
                text=message_text(normalise_messages(completions[row])),
                answer=answers[row],
                facts=json.loads(facts[row]) if isinstance(facts[row], str) else dict(facts[row] or {}),
                finished=not end_token_ids or not drawn[row] or drawn[row][-1] in end_token_ids,
                tokens=None if drawn[row] is None else len(drawn[row]),
            )
            for row in range(count)
        ]
        scores = rewards.score(responses)
        if log_metric is not None:
            for name, values in scores.items():
                log_metric(name, float(values.nanmean()))
        return [None if math.isnan(value) else value for value in scores["total"].tolist()]

    return [total]

"""What is true of a row's picture, for linked questions about it: by its label, by measured shares, or by its objects."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefalign.english import NUMBERS, article, plural
from prefalign.records import Prompt, row_seed
from prefalign.rewards.phrases import Slots
from prefalign.rewards.rule_sets import RuleSet
from prefalign.store import Dropped, Failed

PRESENCE = frozenset({"exists", "absent", "count"})
_LARGEST_IN_WORDS = 12  # that the rules read, too


@dataclass(frozen=True)
class Case:
    """What is true of a picture.

    Attributes:
        label: what the case is called in figures.
        reference: the true category by variable.
        slots: words to fill in, by the category that is spoken of; "" for any other.
        number: how many there are of the thing that is asked for; None: nothing is counted.
        miscounted: words for a wrong number of what is there.
    """

    label: str
    reference: Mapping[str, str]
    slots: Mapping[str, Slots] = field(default_factory=lambda: {"": {}})
    number: int | None = None
    miscounted: Slots | None = None

    def words(self, category: str) -> Slots:
        """The words to fill in where this category is spoken of."""
        return self.slots.get(category, self.slots[""])


@dataclass
class Ratio:
    """A label by what was measured.

    Attributes:
        fact: name of the measured share among the facts.
        above: least share, not reached by it.
        label: the label above it.
    """

    fact: str
    above: float
    label: str


def _published_ratios() -> list[Ratio]:
    return [Ratio("myeloblast_share", 0.2, "AML"), Ratio("plasma_cell_share", 0.1, "MM")]


@dataclass
class LabelConfig:
    """Where labels come from, and what they stand for.

    Attributes:
        fact: name of the label among the facts.
        ratios: for rows without a label: the first share above its limit decides.
        otherwise: label of a row none of whose shares is.
        rows: category by variable, by label; empty: those of `bone_marrow`.
    """

    fact: str = "label"
    ratios: list[Ratio] = field(default_factory=_published_ratios)
    otherwise: str = "NORMAL"
    rows: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass
class ThingConfig:
    """Which things `presence` asks for.

    Attributes:
        names: names that may be asked for, in whatever case the facts have them; empty: those in the picture, so none that is
            absent.
        absent: share of the rows about a thing that is not there.
        plurals: of names whose plural `english.plural` does not know.
    """

    names: list[str] = field(default_factory=list)
    absent: float = 0.5
    plurals: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.absent <= 1:
            raise ValueError(
                f"things.absent is {self.absent}; it is a share of rows, so give a value from 0 to 1 (0.5)."
            )


def check_labels(known: RuleSet, rows: dict[str, Any], labels: LabelConfig) -> None:
    """Raise `ValueError` if a label stands for no row of the table, or a measured share leads to an unknown label."""
    if not rows:
        raise ValueError(
            "labels.rows is empty, and the rule set has no labels of its own. Say what each label stands for."
        )
    for label, row in rows.items():
        if set(row) != set(known.variables) or not known.agree(list(row.items())):
            raise ValueError(
                f"labels.rows.{label} is {dict(row)}, which is no row of the table, so its conversations would contradict the "
                "rules. Give one category for each of " + ", ".join(known.variables) + ", as a row has them."
            )
    led_to = [ratio.label for ratio in labels.ratios] + ([labels.otherwise] if labels.ratios else [])
    if strange := [label for label in led_to if label not in rows]:
        raise ValueError(
            f"labels.ratios leads to {strange[0]!r}, and the labels are {', '.join(rows)}. Name one of these, or set "
            "ratios to []."
        )


def labelled_case(prompt: Prompt, rows: Mapping[str, Any], labels: LabelConfig) -> Case | Dropped | Failed:
    """What a row's label, or its measured shares, say of its picture.

    Args:
        prompt: the row.
        rows: category by variable, by label.
        labels: where labels come from.

    Returns:
        The case; `no_label` without label and shares; `bad_share` or `unknown_label` for what cannot be right.
    """
    facts = prompt.facts
    label = facts.get(labels.fact)
    if label is None:
        shares: dict[str, Any] = {ratio.fact: facts.get(ratio.fact) for ratio in labels.ratios}
        if not shares or None in shares.values():
            return Dropped("no_label")
        if strange := [name for name, value in shares.items() if not _is_share(value)]:
            return Failed(
                "bad_share", f"facts.{strange[0]} is {shares[strange[0]]!r}; a measured share is from 0 to 1."
            )
        above = [ratio.label for ratio in labels.ratios if shares[ratio.fact] > ratio.above]
        label = above[0] if above else labels.otherwise
    if str(label) not in rows:
        return Failed("unknown_label", f"facts.{labels.fact} is {label!r}; the labels are {', '.join(rows)}.")
    return Case(str(label), rows[str(label)])


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def presence_case(prompt: Prompt, known: RuleSet, things: ThingConfig, *, seed: int) -> Case | Dropped:
    """Which thing a row is asked for, and whether it is among `facts["objects"]`.

    Args:
        prompt: the row.
        known: the rule set, about presence.
        things: which things are asked for.
        seed: with the row's id it draws the thing.

    Returns:
        The case, or `no_objects`.
    """
    objects = prompt.facts.get("objects")
    if not isinstance(objects, list):
        return Dropped("no_objects")
    names = [str(one.get("name") or one.get("shape") or "") if isinstance(one, dict) else str(one) for one in objects]
    rng = random.Random(row_seed(seed, f"{prompt.id}/thing"))
    asked = things.names or sorted({name for name in names if name})
    case = thing_case(names, asked, rng, absent=things.absent, plurals=things.plurals)
    if case is None:
        return Dropped("no_objects")
    return dataclasses.replace(case, reference={name: case.reference[name] for name in known.variables})


def thing_case(names: Iterable[str], asked: Sequence[str], rng: random.Random, *, absent: float = 0.5,
               plurals: Mapping[str, str] | None = None) -> Case | None:  # fmt: skip
    """A case of `presence`: one of the things in the picture, or one that is not. Case and blanks of names do not count.

    Args:
        names: of the things in the picture, one for each.
        asked: names that may be asked for.
        rng: draws the thing, and the number that a wrong answer says.
        absent: share of the cases about a thing that is not there.
        plurals: of names whose plural `english.plural` does not know.

    Returns:
        The case; None if there is nothing to ask for.
    """
    counts = Counter(map(_plain, names))
    spelled = {_plain(name): name for name in asked}
    there, gone = [name for name in spelled if counts[name]], [name for name in spelled if not counts[name]]
    pool = gone if (gone and rng.random() < absent) or not there else there
    if not pool:
        return None
    name = rng.choice(pool)
    thing, number = spelled[name], counts[name] or rng.randint(1, 3)
    present = "yes" if counts[name] else "no"
    reference = {
        "exists": present,
        "absent": "no" if counts[name] else "yes",
        "count": "some" if counts[name] else "none",
    }
    many, none = thing_slots(thing, number, plurals or {}), thing_slots(thing, 0, plurals or {})
    slots = {"": many, "some": many, "none": none}
    if not counts[name]:
        return Case(present, reference, slots, number=0)
    near = [other for other in range(max(1, number - 2), number + 3) if other != number]
    return Case(present, reference, slots, number, thing_slots(thing, rng.choice(near), plurals or {}))


def _plain(name: str) -> str:
    return " ".join(name.lower().split())


def thing_slots(thing: str, number: int, plurals: Mapping[str, str]) -> Slots:
    """The words for so many of a thing.

    Example:
        >>> thing_slots("box", 2, {})
        {'thing': 'box', 'a_thing': 'a box', 'things': 'boxes', 'so_many': 'are two boxes'}
    """
    many = plurals.get(thing) or plural(thing)
    said = "no" if not number else NUMBERS[number] if number <= _LARGEST_IN_WORDS else str(number)
    return {
        "thing": thing,
        "a_thing": f"{article(thing)} {thing}",
        "things": many,
        "so_many": f"is one {thing}" if number == 1 else f"are {said} {many}",
    }

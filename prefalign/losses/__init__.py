"""Preference terms: losses over views of a pair, in one literal table, and the weighted list that a run trains on.

A view is one (picture side, answer side) combination of a `Pair`. `text` is TRL's own loss on the two answers; all others are
pure functions of the views' log-probs (or logits), one file each; `bco` keeps a running mean besides. The total loss of a run
is the weighted sum of the means over rows of its terms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from prefalign.config import ConfigError, nearest
from prefalign.losses.anchor import Anchor
from prefalign.losses.bco import BCO
from prefalign.losses.cdpo import CDPO
from prefalign.losses.chip import CHiP
from prefalign.losses.ddpo import DDPO
from prefalign.losses.opa_dpo import OPADPO
from prefalign.losses.orpo import ORPO
from prefalign.losses.povid_noise import PovidNoise
from prefalign.losses.s_vco import SVCO
from prefalign.losses.simpo import SimPO
from prefalign.losses.stic import STIC
from prefalign.losses.term import VIEWS, Scores, Term, View
from prefalign.losses.text import Text
from prefalign.losses.tpo import TPO
from prefalign.losses.two_pictures import TwoPictures
from prefalign.losses.v_dpo import VDPO
from prefalign.losses.visual import Visual

TERMS: dict[str, type] = {
    "text": Text,
    "visual": Visual,
    "two_pictures": TwoPictures,
    "anchor": Anchor,
    "s_vco": SVCO,
    "povid_noise": PovidNoise,
    "ddpo": DDPO,
    "chip": CHiP,
    "v_dpo": VDPO,
    "opa_dpo": OPADPO,
    "tpo": TPO,
    "cdpo": CDPO,
    "bco": BCO,
    "stic": STIC,
    "simpo": SimPO,
    "orpo": ORPO,
}

__all__ = ["TERMS", "VIEWS", "Scores", "Term", "View", "Weighted", "read_losses", "views_of"]


@dataclass(frozen=True)
class Weighted:
    """One entry of a run's list of losses.

    Attributes:
        name: key in `TERMS`; the prefix of its metrics.
        term: the term with its settings.
        weight: what its mean over rows is multiplied by in the total.
    """

    name: str
    term: Any
    weight: float = 1.0


def read_losses(entries: Sequence[Mapping[str, Any]], *, beta: float) -> list[Weighted]:
    """The weighted terms of a config's `losses` list.

    Args:
        entries: mappings with `name`, optional `weight`, and the term's own settings.
        beta: `trainer.beta`, for terms whose entry gives no `beta` and that have no default of their own.

    Raises:
        ConfigError: an empty list, an unknown name or setting (with the nearest known one), a bad value, a name twice.

    Example:
        >>> [entry.weight for entry in read_losses([{"name": "text"}, {"name": "visual", "weight": 0.5}], beta=0.1)]
        [1.0, 0.5]
    """
    if not entries:
        raise ConfigError("losses: the list is empty, so there is nothing to train. The usual list is [{name: text}].")
    problems, found = [], []
    for number, entry in enumerate(entries):
        place = f"losses.{number}"
        if not isinstance(entry, Mapping):
            problems.append(f"{place}: {entry!r} is no entry; write {{name: {entry}}}.")
            continue
        settings = dict(entry)
        name, weight = settings.pop("name", None), settings.pop("weight", 1.0)
        if not isinstance(name, str) or name not in TERMS:
            problems.append(
                f"{place}.name: no preference term called {name!r}; {nearest(str(name), list(TERMS))} Methods of several terms, "
                "such as mDPO, are lists: see configs/recipes/train_preference_*.yaml."
            )
            continue
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            problems.append(
                f"{place}.weight: {weight!r} is no positive number; leave the entry out to train without it."
            )
            continue
        defaults = {field.name: field.default for field in dataclasses.fields(TERMS[name])}
        known = list(defaults)
        unknown = [key for key in settings if key not in known]
        problems += [
            f"{place}.{key}: unknown key (value {settings[key]!r}); {nearest(key, [*known, 'weight'])}"
            for key in unknown
        ]
        if unknown:
            continue
        if defaults.get("beta", 0) is None and settings.get("beta") is None:
            settings["beta"] = beta
        try:
            term: Any = TypeAdapter(TERMS[name]).validate_python(settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([place, *map(str, first["loc"])])
            got = f" (got {first['input']!r})" if first["loc"] else ""
            problems.append(f"{where}: {first['msg'].removeprefix('Value error, ')}{got}.")
            continue
        if not 0 < getattr(term, "beta", 1.0) < math.inf:
            problems.append(
                f"{place}.beta: {term.beta} is no scale of a reward: at 0 nothing has a gradient, and below it the rejected side "
                "is preferred. Give a positive number; 0.1 is usual."
            )
            continue
        found.append(Weighted(name, term, float(weight)))
    names = [entry.name for entry in found]
    problems += [
        f"losses: {name!r} stands in the list {names.count(name)} times; add their weights up in one entry."
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    if problems:
        raise ConfigError("\n  ".join(problems))
    return found


def views_of(losses: Sequence[Weighted]) -> tuple[str, ...]:
    """The views that a list of losses looks at, in the order of `VIEWS`."""
    wanted = {view for entry in losses for view in entry.term.views}
    return tuple(view for view in VIEWS if view in wanted)

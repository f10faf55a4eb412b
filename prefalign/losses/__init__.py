"""Preference terms: which combinations of picture and answer a loss compares, in one literal table.

A view is one (image side, answer side) combination of a `Pair`. TRL's preference losses compare two views, so a term
names its two views and TRL computes the loss on them: `-log sigmoid(beta * (d(first) - d(second)))` for `sigmoid`, where
d is the summed log-prob of the answer under the policy minus the same under the reference.

A run trains one term. A weighted sum of terms needs more than two views in a batch, which the trainer does not build
yet; give one name of `TERMS`.
"""

from __future__ import annotations

from prefalign.config import ConfigError, nearest
from prefalign.losses.term import VIEWS, Term, View
from prefalign.losses.text import TEXT
from prefalign.losses.visual import VISUAL

TERMS: dict[str, Term] = {
    "text": TEXT,
    "visual": VISUAL,
}

__all__ = ["TERMS", "VIEWS", "Term", "View", "find_term"]


def find_term(name: str) -> Term:
    """A term by name.

    Raises:
        ConfigError: for an unknown name, and for several names at once.
    """
    if name in TERMS:
        return TERMS[name]
    if any(mark in name for mark in "+,"):
        raise ConfigError(
            f"term: {name!r} asks for several terms; a run trains one, because a batch holds two views. Give one of "
            f"{', '.join(sorted(TERMS))}."
        )
    raise ConfigError(f"term: no preference term called {name!r}; {nearest(name, list(TERMS))}")

"""Whether the scores that a config names are scores that its rewards give: else all answers would count as ungraded."""

from __future__ import annotations

from collections.abc import Sequence

from prefalign.config import nearest
from prefalign.records import Candidates
from prefalign.rewards import Combined
from prefalign.store import Failed

Named = Sequence[tuple[str, str]]
"""Settings and the score that each names: ("quality", "judge/helpfulness")."""


def check_names(rewards: Combined, named: Named) -> None:
    """Raise `ValueError` if a score is named that none of the rewards gives, before anything is drawn.

    A reward whose settings do not say what it gives (`Reward.terms`) is left to `check_scores`.
    """
    given = {entry.name: getattr(entry.reward, "terms", None) for entry in rewards.entries}
    scores = ["total", *(f"{label}/{term}" for label, terms in given.items() for term in terms or ("...",))]
    open_labels = [label for label, terms in given.items() if not terms]
    for where, name in named:
        if name not in scores and name.partition("/")[0] not in open_labels:
            raise ValueError(
                f"{where} names the score {name!r}, which the rewards do not give: all answers would count as ungraded. "
                f"{nearest(name, scores)}"
            )


def check_scores(rows: Sequence[Candidates | Failed], named: Named) -> None:
    """Raise `ValueError` if a score that is named stands in none of these graded answers, not even as missing."""
    given = {
        name for row in rows if isinstance(row, Candidates) for response in row.responses for name in response["scores"]
    }
    for where, name in named:
        if given and name not in given:
            raise ValueError(
                f"{where} names the score {name!r}, and the rewards gave {', '.join(sorted(given))}: no answer would make a "
                f"pair or an example. Stopped at the first block; {nearest(name, sorted(given))}"
            )

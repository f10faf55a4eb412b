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
    """Raise `ValueError` if a score is named that none of the rewards can give, before anything is drawn. What terms there are is
    known of a judge; of other rewards `check_scores` looks at what they gave."""
    entries = {entry.name: entry.reward for entry in rewards.entries}
    for where, name in named:
        label, _, term = name.partition("/")
        if name == "total":
            continue
        if label not in entries:
            raise ValueError(
                f"{where} names the score {name!r}, and the rewards are {', '.join(entries)}: all answers would count as "
                f"ungraded. Scores are called REWARD/TERM, such as {next(iter(entries))}/..., or total."
            )
        terms: list[str] | None = getattr(entries[label], "attributes", None)
        if terms is not None and term not in terms:
            raise ValueError(
                f"{where} names the score {name!r}, and {label} does not grade {term!r}: all answers would count as ungraded. "
                f"{nearest(name, [f'{label}/{known}' for known in terms])}"
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

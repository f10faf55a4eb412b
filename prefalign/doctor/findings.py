"""What a check found, and how findings are shown."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH = 100
"""Widest line of the table."""


@dataclass
class Finding:
    """One line of the table.

    Attributes:
        check: what was looked at.
        verdict: `fail` is a run that would go wrong, `warn` one that may, `skip` a check that this run has no use for.
        seen: the values found.
        advice: what to do about it; empty where there is nothing to do.
    """

    check: str
    verdict: Literal["pass", "warn", "fail", "skip"]
    seen: str
    advice: str = ""


class NotExaminedError(Exception):
    """A check has nothing to look at in this run; the message says why."""


def judge(check: str, seen: str, *, fail: str = "", warn: str = "") -> Finding:
    """A finding from what is wrong, the worse first; with neither it passes."""
    return Finding(check, "fail" if fail else "warn" if warn else "pass", seen, fail or warn)


def table(findings: Sequence[Finding]) -> str:
    """Findings as text of at most `WIDTH` columns, advice beneath the line it belongs to, and the sum of the verdicts."""
    margin = max(len(finding.check) for finding in findings) + 2
    lines = []
    for finding in findings:
        head = f"{finding.check:<{margin}}{finding.verdict:<6}"
        lines += textwrap.wrap(finding.seen, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
        if finding.advice:
            first, rest = " " * len(head) + "-> ", " " * (len(head) + 3)
            lines += textwrap.wrap(finding.advice, WIDTH, initial_indent=first, subsequent_indent=rest)
    counts = Counter[str](finding.verdict for finding in findings)
    named = {"fail": "failed", "warn": "to look at", "pass": "passed", "skip": "not for this run"}
    return "\n".join([*lines, "", ", ".join(f"{counts[key]} {word}" for key, word in named.items() if counts[key])])


def some(names: Sequence[str]) -> str:
    """The first few of some names."""
    most = 3
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")

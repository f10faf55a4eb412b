"""Progress of what takes long: a bar on a terminal, elsewhere (a log file) a line of it each minute."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY = 60.0
"""Seconds between two lines where there is no terminal; what takes less time writes none."""


def progress_bar(*given: Any, **settings: Any) -> tqdm[Any]:
    """`tqdm.tqdm` with these arguments.

    Example:
        >>> sum(progress_bar(range(4), desc="numbers", unit="number"))
        6
    """
    from tqdm import tqdm

    if not sys.stderr.isatty():
        settings |= {"file": _Lines(), "mininterval": EVERY, "maxinterval": EVERY, "delay": EVERY}
    return tqdm(*given, **settings)


class _Lines:
    """A file in which what tqdm writes over itself becomes lines."""

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()

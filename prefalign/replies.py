"""Replies of a model kept in a file, under the digest of everything that decides them, so that a rerun asks for none twice.

The file is SQLite: a process that is killed loses nothing that was kept, and several may share it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path


class Replies:
    """Replies by key.

    Args:
        path: the file; it is made, with its folder, when the first reply is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def kept(self, keys: Iterable[str]) -> dict[str, str]:
        """Those replies of `keys` that the file holds.

        Raises:
            ValueError: if it is a file of another kind.
        """
        if not self.path.is_file():
            return {}
        with closing(self._open()) as base:
            rows = (
                (key, base.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()) for key in set(keys)
            )
            return {key: row[0] for key, row in rows if row is not None}

    def keep(self, replies: Mapping[str, str], source: str) -> None:
        """Add replies in one transaction; of two under one key the first stays.

        Args:
            replies: reply by key.
            source: which model gave them, for people who look into the file.
        """
        if not replies:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._open()) as base, base:
            base.executemany(
                "INSERT OR IGNORE INTO replies VALUES (?, ?, ?)",
                [(key, source, reply) for key, reply in replies.items()],
            )

    def _open(self) -> sqlite3.Connection:
        try:
            base = sqlite3.connect(self.path, timeout=60)
            base.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, source TEXT, reply TEXT)")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"cache {self.path.name!r} holds no replies of a model ({error}). Name another file, or delete it to ask again."
            ) from error
        return base

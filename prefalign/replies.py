"""Replies of a model kept in a file, under the digest of everything that decides them, so that a rerun asks for none twice.

The file is SQLite: a process that is killed loses nothing that was kept, and several on one machine may share it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

COLUMNS = ["key", "source", "reply"]
PATIENCE = 60.0
"""Seconds to wait for another process that writes."""


class RepliesError(RuntimeError):
    """The file cannot be read or written now. What it holds is whole, and the same command goes on when that is mended."""


class Replies:
    """Replies by key.

    Args:
        path: the file; it is made, with its folder, when the first reply is kept.

    Raises:
        ValueError: if it is a folder or a file of another kind.
        RepliesError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise ValueError(f"cache {path.name!r} is a folder. Name a file, such as {path.name}/replies.sqlite.")
        if path.exists():
            with self._opened() as base:
                base.execute("BEGIN IMMEDIATE")
                base.execute("ROLLBACK")
                self._has_table(base)
            return
        above = next(folder for folder in path.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise RepliesError(
                f"cache {path.name!r} cannot be made in {above}, which is no folder or cannot be written to. Name a file "
                "elsewhere, or mend that and start again."
            )

    def kept(self, keys: Iterable[str]) -> dict[str, str]:
        """Those replies of `keys` that the file holds.

        Raises:
            ValueError: if it is a file of another kind.
            RepliesError: if it cannot be read.
        """
        if not self.path.is_file():
            return {}
        with self._opened() as base:
            if not self._has_table(base):
                return {}
            rows = (
                (key, base.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()) for key in set(keys)
            )
            return {key: row[0] for key, row in rows if row is not None}

    def keep(self, replies: Mapping[str, str], source: str, *, over: Collection[str] = ()) -> None:
        """Add replies in one transaction; of two under one key the first stays.

        Args:
            replies: reply by key.
            source: which model gave them, for people who look into the file.
            over: those of the keys under which the last one stays.

        Raises:
            RepliesError: if they cannot be written; the file is as it was before.
        """
        if not replies:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened() as base, base:
            base.execute("BEGIN IMMEDIATE")
            base.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, source TEXT, reply TEXT)")
            base.executemany("DELETE FROM replies WHERE key = ?", [(key,) for key in over if key in replies])
            base.executemany(
                "INSERT OR IGNORE INTO replies VALUES (?, ?, ?)",
                [(key, source, reply) for key, reply in replies.items()],
            )

    def _has_table(self, base: sqlite3.Connection) -> bool:
        """Whether anything was kept yet."""
        columns = [row[0] for row in base.execute("SELECT name FROM pragma_table_info('replies')")]
        if columns and columns != COLUMNS:
            raise ValueError(
                f"cache {self.path.name!r} holds no replies of a model: its table `replies` has the columns "
                f"{', '.join(columns)}, and theirs has {', '.join(COLUMNS)}. Name another file."
            )
        return bool(columns)

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)) as base:
                yield base
        except sqlite3.Error as error:
            code = (
                getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            )  # extended codes say more in higher bits
            if code == sqlite3.SQLITE_NOTADB:
                raise ValueError(
                    f"cache {self.path.name!r} holds no replies of a model ({error}). Name another file."
                ) from error
            raise RepliesError(
                f"cache {self.path.name!r}: {error}. {_CAUSES.get(code, _UNKNOWN)} What was kept stays."
            ) from error


_CAUSES = {
    sqlite3.SQLITE_BUSY: f"Another process wrote to it for more than {PATIENCE:g} s. If none does, the file system may not know "
    "locks (NFS): name a file on a disk of this machine. Then start again.",
    sqlite3.SQLITE_FULL: "Make room on its disk, then start again.",
    sqlite3.SQLITE_IOERR: "Its disk is full or broken, or a limit on the size of files was reached. Mend that, then start again.",
    sqlite3.SQLITE_READONLY: "Make the file and its folder writable, then start again.",
    sqlite3.SQLITE_CANTOPEN: "Make the file and its folder readable and writable, then start again.",
    sqlite3.SQLITE_CORRUPT: "It is damaged; `sqlite3 FILE .recover` gets back what can be read. Move it away, or put the mended "
    "file in its place, then start again.",
}
_UNKNOWN = "Look whether its disk and folder are well, then start again."

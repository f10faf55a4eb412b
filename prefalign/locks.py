"""Locks on files, between processes of one machine or of several that share a file system.

A process that dies, however it dies, lets go of its locks. File systems that know no locks (`flock`) give every one at once.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_UNKNOWN = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)


@contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a file that no other process holds.

    Args:
        file: made if it is not there.
        wait: for a process that holds it.

    Yields:
        Whether it is held; always with `wait`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open_to_lock(file) as stream:
        if wait:
            _flock(stream, fcntl.LOCK_EX)
        try:
            yield wait or is_alone(stream)
        finally:
            _flock(stream, fcntl.LOCK_UN)  # a child that was forked meanwhile has the file open too


def open_to_lock(file: Path) -> IO[Any]:
    """The file, made if it is not there, opened so that NFS gives both kinds of locks on it."""
    return file.open("a+")


def is_alone(stream: IO[Any]) -> bool:
    """Whether no other process holds or shares an open file; if so, this one holds it from now on."""
    try:
        _flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def share(stream: IO[Any]) -> None:
    """Share an open file with other processes from now on; wait for one that holds it."""
    _flock(stream, fcntl.LOCK_SH)


def _flock(stream: IO[Any], operation: int) -> None:
    try:
        fcntl.flock(stream, operation)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise

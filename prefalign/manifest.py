"""What a stage says of its output: the manifest, and the files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prefalign.processors import OTHER_PROCESSOR, weights_of

LIBRARIES = ("torch", "transformers", "datasets", "pyarrow", "pillow", "trl", "peft", "accelerate")

_FULL_DISK = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
    "iostream error",
    "unexpected pos",
)
"""How safetensors and torch tell of a write that failed, without an errno."""


@dataclass
class Manifest:
    """What a stage did. `rows_in == rows_used + sum(dropped.values())`; a row used gives one or more rows out."""

    stage: str
    complete: bool
    schema_version: int
    code_version: str
    config: dict[str, Any]
    seed: int
    models: dict[str, str]
    libraries: dict[str, str]
    rows_in: int
    rows_used: int
    rows_out: int
    dropped: dict[str, int] = field(default_factory=dict)
    quarantined: int = 0


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished stage, or None."""
    file = folder / "manifest.json"
    return Manifest(**json.loads(file.read_text())) if file.is_file() else None


def refuse_data_file(path: Path, produce: str) -> None:
    """Check that what is given as the folder of a stage is no file of rows.

    Args:
        path: what is given.
        produce: what `import_published` would best make of such a file.

    Raises:
        ValueError: it is a file; says how it is imported.
    """
    if path.is_file():
        made = shlex.quote(f"runs/{path.stem}")
        raise ValueError(
            f"{path} is a data file, and the output folder of a stage is read here. Import it first: `prefalign run "
            f"import_published --data.path {shlex.quote(str(path))} --output.path {made} --produce {produce}` (pairs, candidates "
            f"or examples), then give {made}."
        )


def temporary(path: Path) -> Path:
    """The hidden name beside a file under which this process writes it first: others may be writing it too."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it either is there whole or is not there: temporary name, fsync, rename.

    Where another process has written this file and swept up (`folders.sweep`), that file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    with unfinished.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    try:
        os.replace(unfinished, path)
    except FileNotFoundError:
        if not path.exists():
            raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk is full: Python by errno, safetensors and torch in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(sign in str(error) for sign in _FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide numbers."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Lines such as `settings.beta: 0.1 -> 0.2` for every value that differs between two nested mappings."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        known = (
            isinstance(before, str) and isinstance(now, str) and weights_of(before) != before and weights_of(now) != now
        )
        same_weights = known and weights_of(before) == weights_of(now)
        yield f"{name}: {str(before)[:60]} -> {str(now)[:60]}{f' ({OTHER_PROCESSOR})' if same_weights else ''}"

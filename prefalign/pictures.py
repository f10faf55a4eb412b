"""The distinct pictures of a data set on disk, reached by number: distractors, neighbours and swaps come from here.

A pool is one file of encoded bytes, their offsets, and their SHA-256 digests; pictures that occur twice are kept once. It is
built by streaming the data, and memory then holds 8 bytes of order for each picture; the rest is mapped from disk. While it is
built, some 370 bytes for each are in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefalign import folders, sources
from prefalign.execution import SAMPLED
from prefalign.images import SYSTEM_ERRORS, EncodedImage, ImageError, open_image, sha256
from prefalign.manifest import temporary, write_atomically
from prefalign.progress import progress_bar
from prefalign.sources import BadRow, DataConfig

_BROKEN = (AttributeError, TypeError, KeyError, IndexError, ValueError, OSError, RecursionError)


class PicturePool:
    """Pictures by number, `pool[3]`, still encoded, in the order in which the data shows them first. Made by `build_pool`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self._bytes = np.memmap(folder / "pictures.bin", dtype=np.uint8, mode="r")
        self._digests = np.load(folder / "digests.npy", mmap_mode="r")
        self._order = np.argsort(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def __getitem__(self, number: int) -> EncodedImage:
        if not 0 <= number < len(self):
            raise IndexError(f"picture {number} of a pool of {len(self)}; numbers go from 0 to {len(self) - 1}.")
        start, end = self._offsets[number], self._offsets[number + 1]
        return {"bytes": self._bytes[start:end].tobytes(), "path": self.digest(number)[:16]}

    def digest(self, number: int) -> str:
        """Hex SHA-256 of a picture's bytes."""
        return self._digests[number].tobytes().ljust(32, b"\0").hex()

    def number_of(self, image: EncodedImage) -> int | None:
        """Number of a picture with the same bytes, or None."""
        wanted = np.array(bytes.fromhex(sha256(image)), dtype=self._digests.dtype)
        place = int(np.searchsorted(self._digests, wanted, sorter=self._order))
        if place < len(self) and self._digests[self._order[place]] == wanted:
            return int(self._order[place])
        return None

    @property
    def by_digest(self) -> np.ndarray:
        """Numbers of the pictures in the order of their digests, which the order of the rows does not change."""
        return self._order

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the digests in order: which pictures a pool holds, under which numbers."""
        return hashlib.sha256(np.ascontiguousarray(self._digests).tobytes()).hexdigest()[:16]


def build_pool(folder: Path, data: DataConfig) -> PicturePool:
    """The pool of all pictures of a data set that can be opened; a finished one of the same data is taken as it is.

    Args:
        folder: where the pool is kept.
        data: rows whose pictures go in; rows that cannot be read and pictures that cannot be opened are left out. Pictures that
            are exchanged under their old names after the pool was finished are not noticed.

    Raises:
        ValueError: if no picture could be read.
    """
    images = "" if data.images is None else hashlib.sha256(data.images.as_posix().encode()).hexdigest()
    wanted = {"data_sha256": sources.fingerprint(data), "images_folder_sha256": images, "limit": data.limit}
    done = folder / "pool.json"
    if done.is_file() and json.loads(done.read_text()) == wanted:
        return PicturePool(folder)
    folder.mkdir(parents=True, exist_ok=True)
    folders.sweep_up(folder)
    done.unlink(missing_ok=True)
    offsets, digests = [0], []
    seen: set[bytes] = set()
    unfinished = temporary(folder / "pictures.bin")  # a pool in use keeps its own files
    with unfinished.open("wb") as stream:
        rows = sources.read_rows(data)
        for row in progress_bar(rows, desc="picture pool", unit="row", leave=not SAMPLED.get()):
            for image in _pictures(row, data):
                digest = bytes.fromhex(sha256(image))
                if digest in seen:
                    continue
                seen.add(digest)
                try:
                    open_image(image)
                except ImageError:
                    continue
                stream.write(image["bytes"])
                offsets.append(offsets[-1] + len(image["bytes"]))
                digests.append(digest)
        stream.flush()
        os.fsync(stream.fileno())
    if not digests:
        raise ValueError(
            f"{data.path.name} holds no picture that can be opened, so there is nothing to draw other pictures from. Check the "
            "rows' picture paths and `data.images`."
        )
    if done.is_file() and json.loads(done.read_text()) == wanted:  # another process has built it meanwhile
        unfinished.unlink()
        return PicturePool(folder)
    os.replace(unfinished, folder / "pictures.bin")
    for name, values in (("offsets", np.array(offsets, dtype=np.int64)), ("digests", np.array(digests, dtype="S32"))):
        buffer = io.BytesIO()
        np.save(buffer, values)
        write_atomically(folder / f"{name}.npy", buffer.getvalue())
    write_atomically(done, json.dumps(wanted).encode())
    return PicturePool(folder)


def _pictures(row: Mapping[str, Any] | BadRow, data: DataConfig) -> list[EncodedImage]:
    try:
        return sources.pictures_of(row, data)
    except _BROKEN as error:  # a RecordError or an ImageError too: the stage itself says what is wrong with the row
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            raise
        return []

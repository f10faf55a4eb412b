"""The distinct pictures of a data set on disk, reached by number: distractors, neighbours and swaps come from here.

A pool is one file of encoded bytes, their offsets, and their SHA-256 digests; pictures that occur twice are kept once. It is
built by streaming the data, so memory holds 32 bytes of digest and 8 of offset for each picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefalign import sources
from prefalign.images import EncodedImage, ImageError, open_image, sha256
from prefalign.manifest import write_atomically
from prefalign.records import RecordError
from prefalign.sources import BadRow, DataConfig


class PicturePool:
    """Pictures by number, `pool[3]`, still encoded. Build one with `build_pool`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._offsets = np.load(folder / "offsets.npy")
        self._bytes = np.memmap(folder / "pictures.bin", dtype=np.uint8, mode="r")
        self.digests: list[str] = json.loads((folder / "digests.json").read_text())
        self._numbers = {digest: number for number, digest in enumerate(self.digests)}

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, number: int) -> EncodedImage:
        start, end = self._offsets[number], self._offsets[number + 1]
        return {"bytes": self._bytes[start:end].tobytes(), "path": f"{self.digests[number][:16]}"}

    def number_of(self, image: EncodedImage) -> int | None:
        """Number of a picture with the same bytes, or None."""
        return self._numbers.get(sha256(image))


def build_pool(folder: Path, data: DataConfig) -> PicturePool:
    """The pool of all pictures of a data set that can be opened; a finished one of the same data is taken as it is.

    Args:
        folder: where the pool is kept.
        data: rows whose pictures go in; rows that cannot be read and pictures that cannot be opened are left out.

    Raises:
        ValueError: if no picture could be read.
    """
    wanted = {"data_sha256": sources.fingerprint(data), "limit": data.limit}
    done = folder / "pool.json"
    if done.is_file() and json.loads(done.read_text()) == wanted:
        return PicturePool(folder)
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    offsets, digests = [0], []
    seen: set[str] = set()
    with (folder / "pictures.bin").open("wb") as stream:
        for row in tqdm(sources.read_rows(data), desc="picture pool", unit="row", disable=None):
            for image in _pictures(row, data):
                digest = sha256(image)
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
    if not digests:
        raise ValueError(
            f"{data.path} holds no picture that can be opened, so there is nothing to draw other pictures from."
        )
    with (folder / "offsets.npy").open("wb") as stream:
        np.save(stream, np.array(offsets, dtype=np.int64))
    write_atomically(folder / "digests.json", json.dumps(digests).encode())
    write_atomically(done, json.dumps(wanted).encode())
    return PicturePool(folder)


def _pictures(row: Mapping[str, Any] | BadRow, data: DataConfig) -> list[EncodedImage]:
    try:
        return sources.pictures_of(row, data)
    except (RecordError, ImageError):
        return []

"""The same picture twice: exact and perceptual duplicates, and pictures that belong to a benchmark.

Exact is the SHA-256 of the encoded bytes. Perceptual is pHash (`imagehash.phash`): 64 bits of the lowest frequencies of the
grey picture; two pictures are near when few bits differ. It survives re-encoding, resizing and mild colour changes, and is blind
to hue: it is for photographs. Pictures without low frequencies (one colour) all hash alike.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefalign.images import EncodedImage, ImageError, open_image, read_image, sha256
from prefalign.progress import progress_bar
from prefalign.records import canonical_json

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
NAME_COLUMNS = ("image", "images", "image_path", "file_name")
HASH_BITS = 64
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_PHASH = re.compile(r"[0-9a-fA-F]{16}")
_COCO = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})", re.IGNORECASE)
_BANDS, _FLIPS = 4, 1
_WITHIN_BANDS = _BANDS * (_FLIPS + 1) - 1  # so few differing bits leave one of four bands with at most one of them
_CHUNK = 1024

Names = Literal["none", "coco", "all"]
"""Which file names are compared: none, those of COCO by their number, or all by their stem."""


def perceptual_hash(image: Image.Image) -> int:
    """pHash of a decoded picture as a 64-bit number."""
    import imagehash

    return int(str(imagehash.phash(image)), 16)


def leaders(hashes: Sequence[int], max_distance: int) -> list[int]:
    """The first picture that each one is like: a picture is its own leader unless an earlier leader is within the distance.

    Likeness is to the leader itself, so a chain of small steps does not join two ends that differ.

    Args:
        hashes: N perceptual hashes, in the order in which the first is kept.
        max_distance: most bits that differ between like pictures, 0 to 16.

    Returns:
        N indices into `hashes`, none above its own place. The search is faiss' (a multi-index of four bands up to distance 7,
        exhaustive beyond).

    Raises:
        ValueError: for a distance that no photograph needs.
    """
    import numpy as np

    _check_distance(max_distance)
    distinct, first, inverse = np.unique(np.array(hashes, dtype=np.uint64), return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    found = list(range(len(order)))
    if max_distance:
        for number, near in enumerate(_near(distinct[order], distinct[order], max_distance)):
            found[number] = next((int(other) for other in near if other < number and found[other] == other), number)
    in_order = first[order]
    return [int(in_order[found[place[number]]]) for number in inverse]


def _check_distance(max_distance: int) -> None:
    if not 0 <= max_distance <= 16:
        raise ValueError(
            f"max_distance is {max_distance}: of the 64 bits of two perceptual hashes 0 to 16 differ for like pictures; more "
            "would call most pictures alike. Take 0 for equal hashes, 4 for pictures that were encoded again."
        )


def _near(hashes: np.ndarray, queries: np.ndarray, max_distance: int) -> Iterator[np.ndarray]:
    """Indices (ascending) of the hashes within a distance of each query; hashes and queries are uint64 (N,)."""
    import faiss
    import numpy as np

    index: Any
    if max_distance <= _WITHIN_BANDS:
        index = faiss.IndexBinaryMultiHash(HASH_BITS, _BANDS, HASH_BITS // _BANDS)
        index.nflip = _FLIPS
    else:
        index = faiss.IndexBinaryFlat(HASH_BITS)
    index.add(np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, HASH_BITS // 8))
    for start in range(0, len(queries), _CHUNK):
        part = np.ascontiguousarray(queries[start : start + _CHUNK]).view(np.uint8).reshape(-1, HASH_BITS // 8)
        limits, distances, found = index.range_search(part, max_distance + 1)
        for number in range(len(part)):
            inside = slice(int(limits[number]), int(limits[number + 1]))
            yield np.unique(found[inside][distances[inside] <= max_distance])


@dataclass
class PictureList:
    """What is known of a benchmark's pictures.

    Attributes:
        digests: SHA-256 of encoded pictures.
        hashes: perceptual hashes.
        names: names as `picture_name` gives them.
    """

    digests: set[str] = field(default_factory=set)
    hashes: set[int] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that is known, whatever the order and number of files it came from."""
        known = [sorted(self.digests), sorted(self.hashes), sorted(self.names)]
        return hashlib.sha256(canonical_json(known).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.digests) + len(self.hashes) + len(self.names)


def picture_name(name: str, names: Names) -> str | None:
    """What a picture's file name is compared by, or None.

    `coco` knows COCO's numbers in every release (`COCO_val2014_000000310196.jpg` and `000000310196.jpg` are one picture: the 2017
    release drew anew which pictures train) and nothing else; `all` also compares other stems in lower case.
    """
    stem = Path(name).stem
    known = _COCO.fullmatch(stem)
    if names == "none":
        return None
    if known is not None:
        return f"coco {known[1]}"
    return stem.lower() if names == "all" and stem else None


def read_picture_lists(files: Sequence[Path], *, names: Names = "coco", perceptual: bool = True) -> PictureList:
    """Read lists of benchmark pictures.

    Args:
        files: folders of pictures; `.txt` with one SHA-256 (64 hex digits), perceptual hash (16) or file name in a line; `.json`
            and `.jsonl` whose objects name pictures under `image`, `images`, `image_path` or `file_name` (POPE's questions,
            COCO's annotations). Pictures named there are hashed where they lie beside the list.
        names: which names are compared.
        perceptual: whether perceptual hashes are compared.

    Raises:
        ValueError: for a list that is not there or holds nothing to compare with.
    """
    known = PictureList()
    for file in files:
        found = _read_list(file, names, perceptual)
        if not len(found):
            raise ValueError(
                f"contamination list {str(file)!r} holds nothing to compare with (names: {names}), so the gate would stand open. "
                "Check what it holds; other names than COCO's need names: all."
            )
        known.digests |= found.digests
        known.hashes |= found.hashes
        known.names |= found.names
    return known


def _read_list(file: Path, names: Names, perceptual: bool) -> PictureList:
    found = PictureList()
    if file.is_dir():
        pictures = sorted(path for path in file.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        _add_pictures(found, pictures, names, perceptual, file.name)
    elif not file.is_file():
        raise ValueError(f"contamination list {str(file)!r} does not exist, so nothing could be compared with it. Give a "
                         "folder of pictures, or a .txt, .json or .jsonl list.")  # fmt: skip
    elif file.suffix in (".json", ".jsonl"):
        named = list(_named_pictures(file))
        found.names.update(filter(None, (picture_name(name, names) for name in named)))
        beside = sorted({file.parent / name for name in named if (file.parent / name).is_file()})
        _add_pictures(found, beside, names, perceptual, file.name)
    else:
        for line in file.read_text(encoding="utf-8").split("\n"):
            _add_line(found, line.strip(), names, perceptual)
    return found


def _add_line(known: PictureList, line: str, names: Names, perceptual: bool) -> None:
    if _SHA256.fullmatch(line):
        known.digests.add(line.lower())
    elif _PHASH.fullmatch(line):
        known.hashes.update([int(line, 16)] if perceptual else [])
    elif line and (name := picture_name(line, names)) is not None:
        known.names.add(name)


def _add_pictures(known: PictureList, files: Iterable[Path], names: Names, perceptual: bool, source: str) -> None:
    for path in progress_bar(list(files), desc=f"hashing {source}", unit="picture"):
        try:
            image = read_image(path)
            if perceptual:
                known.hashes.add(perceptual_hash(open_image(image)))
        except ImageError:
            continue
        known.digests.add(sha256(image))
        if (name := picture_name(path.name, names)) is not None:
            known.names.add(name)


def _named_pictures(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    try:
        rows = json.loads(text)
    except ValueError:  # one object in each line, as in .jsonl and in POPE's .json
        try:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise ValueError(
                f"contamination list {str(file)!r} is not complete JSON ({error}), so pictures would be missed. Fetch it again."
            ) from error
    yield from _names_in(rows)


def _names_in(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in NAME_COLUMNS and isinstance(item, str):
                yield item
            elif key in NAME_COLUMNS and isinstance(item, list) and all(isinstance(name, str) for name in item):
                yield from item
            else:
                yield from _names_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _names_in(item)


@dataclass(frozen=True)
class PictureKey:
    """What one picture is known by: SHA-256, perceptual hash (None: not asked for) and file name."""

    digest: str
    hash: int | None
    name: str | None


def picture_key(image: EncodedImage, *, perceptual: bool) -> PictureKey:
    """The key of an encoded picture.

    Raises:
        ImageError: for a picture that cannot be decoded (only where a perceptual hash is asked for).
    """
    found = perceptual_hash(open_image(image)) if perceptual else None
    return PictureKey(sha256(image), found, image["path"])


def listed(keys: Sequence[PictureKey], known: PictureList, *, names: Names, max_distance: int) -> list[bool]:
    """Whether each picture is one of the list: the same bytes, name, or a perceptual hash within the distance."""
    import numpy as np

    _check_distance(max_distance)
    found = [
        key.digest in known.digests or (key.name is not None and picture_name(key.name, names) in known.names)
        for key in keys
    ]
    asked = [number for number, key in enumerate(keys) if key.hash is not None and not found[number]]
    if known.hashes and asked:
        queries = np.array([keys[number].hash for number in asked], dtype=np.uint64)
        hashes = np.array(sorted(known.hashes), dtype=np.uint64)
        for number, near in zip(asked, _near(hashes, queries, max_distance), strict=True):
            found[number] = len(near) > 0
    return found

"""What is remembered of every row of a run: 64 bits of the SHA-256 of its id, so that millions of rows fit in memory.

Among a million rows two ids are confused once in 30 million runs. Of numbers only their `Spread` is remembered.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass


def hash_bits(text: str) -> int:
    """64 bits of a text's SHA-256, never 0."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "big") or 1


class SeenIds:
    """The ids of the rows met so far, each with what its row held: 32 bytes a row.

    Args:
        rows: how many ids will be added at most.
    """

    def __init__(self, rows: int):
        self._ids = array("Q", [0]) * (2 * rows + 1)
        self._contents = array("Q", [0]) * (2 * rows + 1)

    def holds(self, identity: str, content: str) -> bool | None:
        """Whether the id was met with this content (True) or another (False); None: it was not met."""
        place = self._place(hash_bits(identity))
        return self._contents[place] == hash_bits(content) if self._ids[place] else None

    def add(self, identity: str, content: str) -> None:
        """Note an id and the content of its row."""
        place = self._place(hash_bits(identity))
        self._ids[place], self._contents[place] = hash_bits(identity), hash_bits(content)

    def _place(self, bits: int) -> int:
        place = bits % len(self._ids)
        while self._ids[place] not in (0, bits):
            place = (place + 1) % len(self._ids)
        return place


class RepeatedIds:
    """The ids that several rows have: `"7" in repeated`. 8 bytes for each of them, and 24 for each row while it is made.

    Args:
        ids: the ids of all rows.

    Attributes:
        total: how many ids were given.
    """

    def __init__(self, ids: Iterable[str]):
        import numpy as np

        ordered = np.array(array("Q", map(hash_bits, ids)), dtype=np.uint64)
        ordered.sort()
        self.total = len(ordered)
        self._hashes = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, identity: object) -> bool:
        import numpy as np

        bits = np.uint64(hash_bits(str(identity)))
        place = int(np.searchsorted(self._hashes, bits))
        return place < len(self._hashes) and bool(self._hashes[place] == bits)


class Distinct:
    """Counts how many different things there are, which come one at a time: 8 to 16 bytes for each, 64 while they are sorted."""

    def __init__(self) -> None:
        import numpy as np

        self._known, self._new = np.empty(0, dtype=np.uint64), array("Q")

    def add(self, thing: str) -> None:
        """Count a thing, unless it has come before."""
        self._new.append(hash_bits(thing))
        if len(self._new) > max(4096, len(self._known)):
            self._sort()

    def __len__(self) -> int:
        self._sort()
        return len(self._known)

    def _sort(self) -> None:
        import numpy as np

        self._known = np.union1d(self._known, np.array(self._new, dtype=np.uint64))
        self._new = array("Q")


class Owners:
    """One id for each thing that several rows have in common, the same whatever the order of the rows: 16 bytes a thing.

    Args:
        rows: pairs of a thing (a picture's SHA-256) and the id of a row that has it.
    """

    def __init__(self, rows: Iterable[tuple[str, str]]):
        import numpy as np

        things, ids = array("Q"), array("Q")
        for thing, identity in rows:
            things.append(hash_bits(thing))
            ids.append(hash_bits(identity))
        known = np.array([things, ids], dtype=np.uint64)
        known = known[:, np.lexsort(known[::-1])]
        first = np.append(True, known[0, 1:] != known[0, :-1])[: known.shape[1]]
        self._things, self._ids = known[:, first]

    def __len__(self) -> int:
        return len(self._things)

    def owns(self, identity: str, thing: str) -> bool:
        """Whether the row of this id is the one that the thing belongs to."""
        import numpy as np

        bits = np.uint64(hash_bits(thing))
        place = int(np.searchsorted(self._things, bits))
        return place < len(self) and bool(self._things[place] == bits) and int(self._ids[place]) == hash_bits(identity)


@dataclass
class Spread:
    """Mean, least and greatest of numbers that come one at a time and are not kept."""

    count: int = 0
    total: float = 0
    least: float = math.inf
    greatest: float = -math.inf

    def add(self, number: float) -> None:
        """Count one number."""
        self.count += 1
        self.total += number
        self.least, self.greatest = min(self.least, number), max(self.greatest, number)

    @property
    def mean(self) -> float:
        """The sum by the count."""
        return self.total / self.count

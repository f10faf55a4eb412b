"""Nearest pictures of a pool: embedded once, kept on disk, searched by inner product of unit vectors.

Legend of shapes: `N` pictures of the pool, `D` values of an embedding, `Q` queries.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefalign.images import open_image
from prefalign.manifest import write_atomically
from prefalign.progress import progress_bar

if TYPE_CHECKING:
    from prefalign.embeddings import Embedder
    from prefalign.pictures import PicturePool

BLOCK = 1024
"""Pictures per shard of embeddings: what a kill costs."""
_DIGITS = 6


@dataclass
class RetrievalConfig:
    """Which pictures count as neighbours.

    Attributes:
        k: neighbours per picture, the published 10.
        floor: cosine similarity below which a picture is no neighbour; -1 takes all. What unrelated pictures reach depends on
            the embedder (0.91 on average with the feature `max` of the scenes model), so no one value fits all.
        ceiling: similarity from which a picture counts as the same one (a crop, a copy saved again) and is passed over.
    """

    k: int = 10
    floor: float = -1.0
    ceiling: float = 0.97

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}; at least 1 neighbour is needed (10 is published).")
        if not -1 <= self.floor < self.ceiling:
            raise ValueError(
                f"floor {self.floor} and ceiling {self.ceiling} are cosine similarities between which neighbours lie; no picture "
                "can. Give a floor of at least -1 and below the ceiling."
            )


@dataclass(frozen=True)
class Neighbour:
    """A picture of the pool, by number, and its cosine similarity to the query."""

    number: int
    similarity: float


class PictureIndex:
    """Neighbours among the pictures of a pool. Made by `build_index`; memory holds the (N, D) embeddings once."""

    def __init__(self, pool: PicturePool, shards: Sequence[Path]) -> None:
        import faiss

        self.pool = pool
        self._shards = [np.load(shard, mmap_mode="r") for shard in shards]
        self._index = faiss.IndexFlatIP(self._shards[0].shape[1])
        for shard in self._shards:
            self._index.add(np.ascontiguousarray(shard))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def vectors(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """(len(numbers), D) float32 embeddings of some pictures."""
        return np.stack([self._shards[number // BLOCK][number % BLOCK] for number in map(int, numbers)])

    def neighbours(
        self, queries: Sequence[int], config: RetrievalConfig, *, exclude: Sequence[Collection[int]] | None = None
    ) -> list[list[Neighbour]]:
        """The nearest pictures of some pictures of the pool, best first.

        A picture is never its own neighbour. Equal similarities (to six digits) are ordered by the pictures' digests, so
        neither the order of the pool nor the company of a query changes what is found.

        Args:
            queries: Q numbers of pictures.
            config: how many, and between which similarities.
            exclude: for each query, numbers that are passed over too (the other pictures of its row).

        Returns:
            For each query up to `config.k` neighbours; fewer where the pool has no more between floor and ceiling.
        """
        found: list[list[Neighbour]] = [[] for _ in queries]
        passed = [{query, *(exclude[place] if exclude else ())} for place, query in enumerate(queries)]
        waiting = list(range(len(queries)))
        width = config.k + 16
        while waiting:
            width = min(width, len(self))
            vectors = self.vectors([queries[place] for place in waiting])
            _, nearest = self._index.search(vectors, width)
            unfinished = []
            for place, vector, row in zip(waiting, vectors, nearest, strict=True):
                found[place], complete = self._select(vector, row, passed[place], config)
                if not complete and width < len(self):
                    unfinished.append(place)
            waiting, width = unfinished, 4 * width
        return found

    def _select(
        self, vector: np.ndarray, nearest: np.ndarray, passed: Collection[int], config: RetrievalConfig
    ) -> tuple[list[Neighbour], bool]:
        """The first `k` of some nearest pictures, and whether looking at more of the pool could not change them."""
        similarities = (self.vectors(nearest).astype(np.float64) @ vector.astype(np.float64)).round(_DIGITS)
        kept = [
            (-float(similarity), self.pool.digest(int(number)), int(number))
            for number, similarity in zip(nearest, similarities, strict=True)
            if config.floor <= similarity < config.ceiling and int(number) not in passed
        ]
        kept = sorted(kept)[: config.k]
        last = float(similarities.min())
        worst = -kept[-1][0] if kept else np.inf
        complete = last < config.floor or (len(kept) == config.k and last < worst - 2 * 10.0**-_DIGITS)
        return [Neighbour(number, -similarity) for similarity, _, number in kept], complete


def build_index(folder: Path, pool: PicturePool, embedder: Embedder) -> PictureIndex:
    """Embed every picture of a pool and index the vectors; what an earlier run has embedded is taken as it is.

    Args:
        folder: where the embeddings are kept: `00000.npy`, ... of shape (`BLOCK`, D), and what they were made from.
        pool: the pictures.
        embedder: makes their vectors.
    """
    wanted: dict[str, Any] = {
        "pool": pool.fingerprint,
        "embedder": embedder.fingerprint,
        "pictures": len(pool),
        "block": BLOCK,
    }
    claim = folder / "embeddings.json"
    if not claim.is_file() or json.loads(claim.read_text()) != wanted:
        for stale in folder.glob("*.npy"):
            stale.unlink()
        write_atomically(claim, json.dumps(wanted).encode())
    shards = []
    with progress_bar(total=len(pool), desc="embeddings", unit="picture") as bar:
        for start in range(0, len(pool), BLOCK):
            end = min(start + BLOCK, len(pool))
            shard = folder / f"{start // BLOCK:05d}.npy"
            if not shard.is_file():
                buffer = io.BytesIO()
                np.save(buffer, _embedded(pool, range(start, end), embedder))
                write_atomically(shard, buffer.getvalue())
            shards.append(shard)
            bar.update(end - start)
    return PictureIndex(pool, shards)


def _embedded(pool: PicturePool, numbers: range, embedder: Embedder) -> np.ndarray:
    """(len(numbers), D) vectors; decoded pictures of one batch at a time are in memory."""
    return np.concatenate(
        [
            embedder.embed([open_image(pool[number]) for number in numbers[start : start + embedder.batch_size]])
            for start in range(0, len(numbers), embedder.batch_size)
        ]
    )

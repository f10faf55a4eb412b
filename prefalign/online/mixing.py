"""Third arrow of a round: offline pairs of the prompts that drew them, and online pairs of the others, in one folder.

Mixed DPO (arXiv 2407.02477, section 3.3): a Bernoulli draw with probability p for each prompt that has an offline pair. The paper
draws per example and step; here per prompt and round, and a prompt whose online answers gave no usable pair sits the round out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prefalign.online.sampling import Draw
from prefalign.records import Pair, Prompt
from prefalign.sources import parquet_rows
from prefalign.store import OutputConfig, read_records, write_records

if TYPE_CHECKING:
    from prefalign.manifest import Manifest

MIX = "mix_pairs"


def prompts_of(pairs: Path) -> Iterator[Prompt]:
    """The prompts of a pairs folder, for runs that have no others; an id is the pair's."""
    for pair in read_records(pairs, Pair):
        yield Prompt(pair.id, pair.images, pair.prompt, pair.answer, pair.facts)


def offline_prompts(pairs: Path, prompts: set[str]) -> frozenset[str]:
    """Ids of the prompts that have a pair in an offline folder: pairs name the row they were made from, or have its id.

    Raises:
        ValueError: no pair belongs to any prompt, so nothing could be mixed.
    """
    found = set()
    for shard in sorted(pairs.glob("data/*.parquet")):
        for row in parquet_rows(shard, ["id", "meta"]):
            found |= {row["id"], json.loads(row["meta"]).get("parent")} & prompts
    if not found:
        raise ValueError(
            f"no pair of {pairs} belongs to any of the {len(prompts)} prompts (a pair's `meta.parent` or its id is a prompt's "
            "id), so nothing could be mixed. Make the pairs from these prompts, or leave `data` out: the pairs' own prompts are "
            "taken then."
        )
    return frozenset(found)


def mix(prompts: Path, online: Path | None, offline: Path | None, draw: Draw, *, output: Path) -> Manifest:
    """The pairs that a round trains on: offline ones in their own order, then online ones in theirs.

    With p 1 and prompts that all have a pair these are the rows of the offline folder, in order.

    Args:
        prompts: folder of the round's prompts.
        online: folder of the round's online pairs; None: no prompt was drawn online.
        offline: folder of the offline pairs.
        draw: which prompts take the offline pair.
        output: folder of the mixed pairs.
    """

    def rows() -> Iterator[Pair]:
        taking = {prompt.id for prompt in read_records(prompts, Prompt) if draw.takes_offline(prompt.id)}
        if offline is not None and taking:
            for pair in read_records(offline, Pair):
                if not taking.isdisjoint((pair.id, pair.meta.get("parent"))):
                    yield replace(pair, meta={**pair.meta, "source": "offline", "round": draw.visit})
        if online is not None:
            for pair in read_records(online, Pair):
                yield replace(pair, meta={"source": "online", **pair.meta, "online": True, "round": draw.visit})

    return write_records(
        MIX, rows(), output=OutputConfig(output), record=Pair,
        settings={"p_offline": draw.p_offline, "visit": draw.visit, "offline": offline is not None}, seed=draw.seed,
    )  # fmt: skip


def sources_of(pairs: Path) -> dict[str, str]:
    """Id of each pair of a mixed folder to its source."""
    return {
        row["id"]: json.loads(row["meta"])["source"]
        for shard in sorted(pairs.glob("data/*.parquet"))
        for row in parquet_rows(shard, ["id", "meta"])
    }

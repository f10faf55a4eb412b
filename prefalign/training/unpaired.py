"""Pairs as unpaired rows, one answer and a thumb each, for TRL's `KTOTrainer`, which takes vision-language models.

Source: KTO, arXiv 2402.01306. The loss is TRL's; nothing of it is rewritten here.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from prefalign.records import Pair
from prefalign.training.pairs import on_two_pictures, pairs_manifest

if TYPE_CHECKING:
    from datasets import Dataset


def load_unpaired(folder: Path, *, seed: int = 0) -> Dataset:
    """The answers of a pairs folder as rows of their own.

    KTO estimates a divergence by showing each prompt the answer of its neighbour in the batch, and so reads rows in order. The
    order given here is therefore random over pairs, chosen and rejected answers take turns, and the two answers of a pair are
    far apart: at least `rows / 2 - 2` rows, so no batch shows a prompt its own other answer. TRL's
    `unpair_preference_dataset` puts all chosen answers first. No picture is copied. Give `KTOConfig` a `max_length` of None:
    TRL's own, 1024, may cut image tokens.

    Args:
        folder: output of a stage that makes pairs.
        seed: of the order.

    Returns:
        Twice as many rows as there are pairs, with `id`, `images`, `prompt`, `completion` and `label` (True: the chosen answer).
        `rejected_images` is left out: both answers are shown with `images`.

    Raises:
        ValueError: the folder holds no finished pairs, or a single one, or pairs `on_two_pictures`.
    """
    from datasets import concatenate_datasets, load_dataset

    pairs_manifest(folder)
    if apart := sum(on_two_pictures(folder)):
        raise ValueError(
            f"{apart} pairs of {folder} reject an answer about `rejected_images`, and KTO's rows show both answers with "
            "`images`, where it may be right. Train on these pairs with train_preference and losses [{name: two_pictures}]."
        )
    columns = ["id", "images", "prompt", "chosen", "rejected"]
    features = Pair.features()
    pairs = load_dataset(
        "parquet",
        data_files=sorted(str(shard) for shard in folder.glob("data/*.parquet")),
        columns=columns,
        features=type(features)({name: features[name] for name in columns}),
        split="train",
    )
    count = len(pairs)
    if count < 2:
        raise ValueError(
            f"{folder} holds too few pairs ({count}): KTO shows a prompt the answer of another. Take 2 or more, dozens to learn."
        )
    sides = [
        pairs.remove_columns(other).rename_column(side, "completion").add_column("label", [side == "chosen"] * count)
        for side, other in (("chosen", "rejected"), ("rejected", "chosen"))
    ]
    order = list(range(count))
    random.Random(seed).shuffle(order)
    rejected = order[count // 2 :] + order[: count // 2]
    rows = [row for chosen, other in zip(order, rejected, strict=True) for row in (chosen, count + other)]
    return concatenate_datasets(sides).select(rows)

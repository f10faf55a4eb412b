"""Merge a LoRA adapter into its base and write a full model: weights, processor, chat template, licences, where it came from.

Papers: LoRA, arXiv 2106.09685; `scale` is Aya Vision's interpolation (arXiv 2505.08751) where the adapter was trained on the text
model's own weights. Several adapters are combined by PEFT.

Needs: the adapter, its base in 16 or 32 bits, memory and disk for the full model. The folder appears whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class Config:
    """One merge.

    Attributes:
        adapter: folder or Hub id of the adapter, or a list of several.
        output: folder of the full model.
        adapter_revision: branch, tag or commit of the adapter on the Hub.
        base: folder or Hub id of the base; None: the one that the adapter names.
        base_revision: of the base on the Hub.
        scale: multiplies what the adapter adds to the language model: 1 is the trained model, 0 the base. Other towers keep 1.
        weights: factor of each of several adapters; null: a mean.
        combination_type: PEFT's way to combine several: `cat` (exact), `svd` (exact up to the rank kept), `linear` (rough),
            `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`.
        density: share of values that the last four keep.
        dtype: `auto` (that of the base), `float32`, `bfloat16` or `float16`.
        device: where the merge is computed.
        seed: of what DARE drops.
    """

    adapter: str | list[str]
    output: Path
    adapter_revision: str | None = None
    base: str | None = None
    base_revision: str | None = None
    scale: float = 1.0
    weights: list[float] | None = None
    combination_type: Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "cat"
    density: float | None = None
    dtype: str = "auto"
    device: str = "cpu"
    seed: int = 0


def main(config: Config) -> Path:
    """Merge; returns the folder of the full model."""
    from prefalign.adapters import merge_adapters
    from prefalign.training.upkeep import plain_lines_without_a_terminal

    plain_lines_without_a_terminal()
    output = merge_adapters(
        [config.adapter] if isinstance(config.adapter, str) else config.adapter,
        config.output,
        revision=config.adapter_revision,
        base=config.base,
        base_revision=config.base_revision,
        weights=config.weights,
        combination_type=config.combination_type,
        density=config.density,
        scale=config.scale,
        dtype=config.dtype,
        device=config.device,
        seed=config.seed,
    )
    print(f"{output} is a full model; it loads wherever its base does")
    return output


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

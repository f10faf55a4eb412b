"""Merge a VLM's language model with the text model it came from, or VLMs of one architecture with each other. No training.

Papers: Aya Vision, arXiv 2505.08751 (`text_model`: vision-language tuning costs text skills, interpolation brings them back);
TIES, arXiv 2306.01708, and DARE, arXiv 2311.03099 (`base`: several tunings of one start, or one drawn back towards it).

Needs: checkpoints in 16 or 32 bits and disk for each result; tensors are read one at a time, so memory stays about one model. A
list of `alpha` writes one folder each, to be measured with evaluate_model; each appears whole or not at all.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class Config:
    """One merge, or a sweep over alpha.

    Attributes:
        models: folder or Hub id of the VLM, or a list of several; config, processor and dtype of the result are the first one's.
        output: folder of the merged model; of a sweep, the folder that holds `alpha-0.4` and the others.
        text_model: the text model that the VLM's language model started from: only the language model is merged, with this.
        base: the VLM that `models` were tuned from: all weights are merged, with this.
        alpha: 1 is the tuned model (or the combination of `models`), 0 is `text_model` or `base`; a list is a sweep.
        weights: factor of each of several models; null: a mean.
        method: `linear`, `ties`, `dare_linear` or `dare_ties`.
        density: share of values that the last three keep of each model's change.
        seed: of what DARE drops.
        revision: branch, tag or commit of the first model on the Hub.
        base_revision: of `base` on the Hub.
        text_revision: of `text_model` on the Hub.
    """

    models: str | list[str]
    output: Path
    text_model: str | None = None
    base: str | None = None
    alpha: float | list[float] = 1.0
    weights: list[float] | None = None
    method: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    density: float | None = None
    seed: int = 0
    revision: str | None = None
    base_revision: str | None = None
    text_revision: str | None = None


def main(config: Config) -> list[Path]:
    """Merge; returns the folders of the merged models, one for each alpha."""
    from prefalign.merging import Arithmetic, merge_llm, merge_vlms
    from prefalign.training.upkeep import plain_lines_without_a_terminal

    plain_lines_without_a_terminal()
    how = Arithmetic(config.method, config.density, config.seed)
    models = [config.models] if isinstance(config.models, str) else config.models
    _check(config, models)
    alphas = config.alpha if isinstance(config.alpha, list) else [config.alpha]
    made = []
    for alpha in alphas:
        output = config.output / f"alpha-{alpha:g}" if isinstance(config.alpha, list) else config.output
        if config.text_model is not None:
            merge_llm(models[0], config.text_model, output, alpha, revision=config.revision,
                      text_revision=config.text_revision, arithmetic=how)  # fmt: skip
        else:
            merge_vlms(models, output, base=config.base, weights=config.weights, alpha=alpha, revision=config.revision,
                       base_revision=config.base_revision, arithmetic=how)  # fmt: skip
        print(f"alpha {alpha:g}: {output}", flush=True)
        made.append(output)
    print("measure each on held-out text and on pictures before choosing, as in")
    print(f"  prefalign run evaluate_model --config CONFIG --model.model_name_or_path {shlex.quote(str(made[-1]))}")
    return made


def _check(config: Config, models: list[str]) -> None:
    if not models:
        raise ValueError("models: no model is named; there is nothing to merge.")
    for name in ("base", "text"):
        partner = "base" if name == "base" else "text_model"
        pinned = getattr(config, f"{name}_revision")
        if pinned is not None and getattr(config, partner) is None:
            raise ValueError(f"{name}_revision is {pinned!r} and there is no {partner}. Give both, or leave it out.")
    if config.text_model is not None and config.base is not None:
        raise ValueError(
            "text_model and base are both given: the first merges the language model only, the second all weights. Give one, and "
            "merge the result again for the other."
        )
    if config.text_model is not None and (len(models) > 1 or config.weights is not None):
        raise ValueError(
            f"text_model is merged with one VLM, and there are {len(models)} models and weights {config.weights}. Merge the VLMs "
            "with each other first, then the result with the text model by `alpha`."
        )
    if isinstance(config.alpha, list) and len(set(config.alpha)) < max(len(config.alpha), 1):
        raise ValueError(f"alpha: {config.alpha} names no value, or one twice; each gets a folder of its own.")


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

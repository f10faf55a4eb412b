"""Merge vision-language models with each other, or their language model with a text model, one tensor at a time.

    merged = start + alpha * (sum of weighted, thinned task vectors),    task vector = tuned - start

Papers: Aya Vision (arXiv 2505.08751: the language model only, towards the text model it came from), TIES (arXiv 2306.01708), DARE
(arXiv 2311.03099). The arithmetic of TIES and DARE is PEFT's (`peft.utils.merge_utils`), which is installed for training anyway;
mergekit would add its own table of tensor names, without a place for a text model inside a VLM.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefalign import families
from prefalign.checkpoints import ModelError
from prefalign.counterparts import (
    COMPUTED,
    EMBEDDING,
    HEAD,
    Partner,
    Tensors,
    check_reads_pictures,
    check_same_settings,
    read_config,
    reads_pictures,
    shared_rows,
)
from prefalign.merged_folders import (
    CODE,
    CONFIGS,
    LICENCES,
    PROCESSOR,
    Source,
    copy_files,
    find_model,
    is_made,
    whole_folder,
)
from prefalign.progress import progress_bar

if TYPE_CHECKING:
    import torch

METHODS = ("linear", "ties", "dare_linear", "dare_ties")


@dataclass(frozen=True)
class Arithmetic:
    """How task vectors become one.

    Attributes:
        method: `linear` adds them; `ties` keeps the largest of each and, where signs disagree, the side with more weight;
            `dare_linear` and `dare_ties` drop values at random and scale up the rest, before adding or before TIES' signs.
        density: share of values kept by the thinning methods, above 0 up to 1.
        seed: of what DARE drops; drawn per tensor from its name, so shards and order do not matter.
    """

    method: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    density: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is not known; use one of {', '.join(METHODS)}.")
        if self.method == "linear" and self.density is not None:
            raise ValueError(f"density {self.density} means nothing to `linear`, which keeps all values. Leave it out.")
        if self.method != "linear" and (self.density is None or not 0 < self.density <= 1):
            raise ValueError(
                f"method {self.method!r} keeps a share of the values, and density is {self.density}. Give `density` above 0, up "
                "to 1; 0.5 is a start."
            )

    def default_weights(self, count: int) -> list[float]:
        """A mean: PEFT's TIES divides by the number of models that agree, the plain sum does not."""
        return [1.0 if self.method.endswith("ties") else 1 / count] * count

    def combine(
        self,
        start: torch.Tensor,
        tuned: Sequence[torch.Tensor],
        weights: Sequence[float],
        name: str,
        *,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """One merged tensor, computed in float32.

        Args:
            start: the tensor that task vectors are measured from, any shape.
            tuned: the same tensor of each model.
            weights: factor of each task vector.
            name: the tensor's name, for DARE's draw.
            dtype: of the result; None: that of the first of `tuned`.

        Returns:
            A tensor of that shape and dtype; the first of `tuned` where all are equal or nothing is mixed in.
        """
        import torch
        from peft.utils import merge_utils

        first = tuned[0]
        dtype = dtype or first.dtype
        if all(tensor.dtype == start.dtype and torch.equal(start, tensor) for tensor in tuned):
            return first.to(dtype)
        if self.method == "linear" and len(tuned) == 1:
            return (
                first.to(dtype) if weights[0] == 1 else torch.lerp(start.float(), first.float(), weights[0]).to(dtype)
            )
        vectors = [tensor.float() - start.float() for tensor in tuned]
        factors = torch.tensor(weights, dtype=torch.float32)
        if self.method == "linear":
            change = merge_utils.task_arithmetic(vectors, factors)
        else:
            assert self.density is not None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(hashlib.sha256(f"{self.seed}|{name}".encode()).hexdigest()[:15], 16))
                change = getattr(merge_utils, self.method)(vectors, factors, self.density)
        return (start.float() + change).to(dtype)


def merge_llm(
    vlm: str,
    text_llm: str,
    output: Path,
    alpha: float,
    *,
    revision: str | None = None,
    text_revision: str | None = None,
    arithmetic: Arithmetic | None = None,
) -> Path:
    """Move the language model of a VLM towards the text model it was made from: alpha * VLM + (1 - alpha) * text model.

    Vision tower and projector are copied bit by bit. Rows of the vocabulary that only one of the two has (image tokens) stay the
    VLM's. Config, processor and chat template are the VLM's.

    Args:
        vlm: folder or Hub id of the VLM.
        text_llm: folder or Hub id of the very model that its language model started from.
        output: folder to write.
        alpha: 1 is the VLM, 0 the text model inside it; Aya Vision chose 0.4.
        revision: of the VLM on the Hub.
        text_revision: of the text model on the Hub.
        arithmetic: `linear` if None.

    Returns:
        `output`; finished before with the same settings, it is left as it is.

    Raises:
        ModelError: the two do not belong together (architecture, vocabulary, rotary settings), or a file is missing.
        ValueError: alpha is not from 0 to 1.
    """
    how = arithmetic or Arithmetic()
    sources = [find_model(vlm, revision), find_model(text_llm, text_revision)]
    model, text = (read_config(source) for source in sources)
    check_reads_pictures(sources[0], model)
    if reads_pictures(text):
        raise ModelError(
            f"{text_llm!r} reads pictures itself ({text.model_type}). Give it as `base` to merge two VLMs whole, or name the "
            "text model that the VLM was made from."
        )
    weights = _scaled([1.0], alpha)
    ours, theirs = (Tensors(source) for source in sources)
    scope = {name for name in ours.files if families.tower(name) == "language_model" and not name.endswith(COMPUTED)}
    check_same_settings(sources, model, text)
    partner = Partner(ours, theirs, scope, shared_rows(*sources))
    made = {"stage": "merge_llm", "alpha": alpha, **asdict(how), "sources": [source.record() for source in sources]}
    return _write(output, made, ours, scope, partner, [], weights, how)


def merge_vlms(
    models: Sequence[str],
    output: Path,
    *,
    base: str | None = None,
    weights: Sequence[float] | None = None,
    alpha: float = 1.0,
    revision: str | None = None,
    base_revision: str | None = None,
    arithmetic: Arithmetic | None = None,
) -> Path:
    """Merge VLMs of one architecture: base + alpha * sum of weighted task vectors, or their weighted mean if there is no base.

    Args:
        models: folders or Hub ids; config, processor and dtype are the first one's.
        output: folder to write.
        base: what all of them were tuned from (the SFT start of a DPO result).
        weights: factor of each model; a mean if None.
        alpha: scales all task vectors: 1 is the tuned model, 0 the base. Needs a base.
        revision: of the first model on the Hub.
        base_revision: of the base on the Hub.
        arithmetic: `linear` if None. The others need a base.

    Returns:
        `output`; finished before with the same settings, it is left as it is.

    Raises:
        ModelError: the models do not belong together, one is named twice, or a file is not what it should be.
        ValueError: no model is named; weights, alpha and base do not fit each other.
    """
    how = arithmetic or Arithmetic()
    if not models:
        raise ValueError("no model is named; there is nothing to merge. Give `models`.")
    weights = list(weights) if weights is not None else how.default_weights(len(models))
    if len(weights) != len(models):
        raise ValueError(f"{len(weights)} weights for {len(models)} models; give one for each.")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights {weights} are not all numbers to multiply with. Give finite ones.")
    if base is None:
        if len(models) < 2:
            raise ValueError(
                "one model alone has nothing to be merged with. Give more `models`, a `base` or a `text_model`."
            )
        if how.method != "linear" or alpha != 1:
            raise ValueError(
                f"method {how.method!r} with alpha {alpha} needs task vectors. Give as `base` the model that all were tuned from."
            )
        if not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"weights {weights} sum to {sum(weights):g}: without a `base` the merged model is their mean, and another sum "
                "scales the whole model. Make them sum to 1, or give a `base`."
            )
    sources = [find_model(name, revision if number == 0 else None) for number, name in enumerate(models)]
    sources += [find_model(base, base_revision)] if base is not None else []
    _check_distinct(sources, has_base=base is not None)
    configs = [read_config(source) for source in sources]
    for source, config in zip(sources, configs, strict=True):
        check_reads_pictures(source, config)
        check_same_settings([sources[0], source], configs[0], config)
    ours = Tensors(sources[0])
    scope = {name for name in ours.files if not name.endswith(COMPUTED)}
    partners = [Partner(ours, Tensors(source), scope, shared_rows(sources[0], source)) for source in sources[1:]]
    made = {"stage": "merge_vlms", "alpha": alpha, "weights": weights, **asdict(how),
            "base": base, "sources": [source.record() for source in sources]}  # fmt: skip
    if base is not None:
        return _write(output, made, ours, scope, partners.pop(), partners, _scaled(weights, alpha), how)
    # a mean, measured from the first model: what all have in common stays as it is to the last bit
    return _write(output, made, ours, scope, None, partners, weights[1:], how)


def _check_distinct(sources: Sequence[Source], *, has_base: bool) -> None:
    """Raise `ModelError` if a model is named twice, or the base is among the models; it comes last."""
    folders = [source.folder.resolve() for source in sources]
    for number, source in enumerate(sources):
        first = folders.index(folders[number])
        if first == number:
            continue
        if has_base and number == len(sources) - 1:
            raise ModelError(
                f"{sources[first].name!r} is among the models and is their base: its change from itself is nothing, and takes a "
                "share of the weights. Take it out of `models`; `alpha` draws the others towards the base."
            )
        raise ModelError(
            f"{source.name!r} is named twice in models (as {sources[first].name!r}). Give it once, with a larger weight."
        )


def _write(
    output: Path,
    made: Mapping[str, Any],
    ours: Tensors,
    scope: set[str],
    start: Partner | None,
    others: Sequence[Partner],
    weights: Sequence[float],
    how: Arithmetic,
) -> Path:
    """Write the merged checkpoint in the files of ours; at most one file's tensors are in memory."""
    from safetensors.torch import save_file

    if is_made(output, made):
        return output
    files: dict[str, list[str]] = {}
    for name, file in ours.files.items():
        files.setdefault(file, []).append(name)
    folder = ours.source.folder
    head = ours.ending(HEAD) if ours.ties_head() else None
    with (
        whole_folder(output, made, sum((folder / file).stat().st_size for file in files)) as partial,
        progress_bar(total=len(ours.files), desc=f"merging into {output.name}", unit="tensor") as progress,
    ):
        for file, names in files.items():
            shard = {}
            for name in names:
                own = ours.read(name)
                progress.update()
                if name not in scope or not own.is_floating_point():
                    shard[name] = own
                    continue
                tuned = [partner.read(name, own) for partner in others]
                drawn = ours.ending(EMBEDDING) if name == head else name
                assert drawn is not None
                shard[name] = (
                    how.combine(own, tuned, weights, drawn, dtype=own.dtype)
                    if start is None
                    else how.combine(start.read(name, own), [own, *tuned], weights, drawn, dtype=own.dtype)
                )
            save_file(shard, partial / file, metadata={"format": "pt"})
        copy_files(folder, partial, (*CONFIGS, *PROCESSOR, *LICENCES, *CODE, "*.safetensors.index.json"))
    return output


def _scaled(weights: Sequence[float], alpha: float) -> list[float]:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} is not from 0 (where the tuning started) to 1 (the tuned model).")
    return [alpha * weight for weight in weights]

"""Turn a LoRA adapter and its base into a full model: PEFT's merge, with the checks and files that make the folder usable.

Papers: LoRA, arXiv 2106.09685. An adapter scaled by a before merging gives W_text + a * s * BA: where it was trained on the text
model's own weights, that is Aya Vision's interpolation (arXiv 2505.08751) without a second model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefalign.checkpoints import ModelError, resolve
from prefalign.families import tower
from prefalign.merged_folders import (
    LICENCES,
    PROCESSOR,
    Source,
    copy_files,
    find_adapter,
    find_model,
    is_made,
    whole_folder,
)
from prefalign.models import ModelConfig, fingerprint, load_model

COMBINATIONS = ("linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_THINNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_RUN = ("prefalign_config.yaml", "*_manifest.json", "trainer_state.json", "rows.json", "base.json")
"""What a training run leaves beside its adapter; a model card is written from it."""


@contextmanager
def scaled_lora(model: Any, scale: float) -> Iterator[None]:
    """Multiply what the active adapter adds to the language model, and restore it afterwards.

    Args:
        model: a `PeftModel`. Layers of the vision tower and the projector keep factor 1.
        scale: 0 takes the adapter off the language model, 1 leaves it.

    Raises:
        ModelError: the adapter adds to the language model what does not scale with its factor.
    """
    from peft.tuners.lora import LoraLayer

    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and tower(name) == "language_model"
    ]
    if scale != 1:
        _check_scales(model, scale)
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scale_layer(scale)
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def merge_adapters(
    adapters: Sequence[str],
    output: Path,
    *,
    revision: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    weights: Sequence[float] | None = None,
    combination_type: str = "cat",
    density: float | None = None,
    scale: float = 1.0,
    dtype: str = "auto",
    device: str = "cpu",
    seed: int = 0,
) -> Path:
    """Merge one or several LoRA adapters into their base and write the full model with all that goes with it.

    Args:
        adapters: folders or Hub ids.
        output: folder to write: weights, config, generation config, processor, chat template, licences, `merge.json`.
        revision: of the adapters on the Hub.
        base: folder or Hub id of the base, if the adapter names one that is not here (or a quantised copy of it).
        base_revision: of the base on the Hub.
        weights: factor of each of several adapters; a mean if None.
        combination_type: PEFT's name: `cat` (exact), `svd` (exact up to the rank kept), `linear` (averages the factors, rough),
            `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`.
        density: share of values kept by the last four.
        scale: multiplies what the adapter adds to the language model; 1 is the trained model, 0 the base.
        dtype: `auto` (that of the base), `float32`, `bfloat16` or `float16`.
        device: where the merge is computed.
        seed: of what DARE drops.

    Returns:
        `output`; finished before with the same settings, it is left as it is.

    Raises:
        ModelError: an adapter, the base or the folder is not what it should be, or they do not belong together.
        ValueError: settings that do not fit each other.
    """
    import torch

    if not math.isfinite(scale):
        raise ValueError(
            f"scale {scale} is not a number to multiply with. Give 1 for the trained model, 0 for its base."
        )
    weights = _check_combination(adapters, weights, combination_type, density)
    found = [find_adapter(name, revision) for name in adapters]
    settings = [_settings(source) for source in found]
    start = _find_base(found, settings, base, base_revision)
    made = {
        "stage": "merge_adapter",
        "scale": scale,
        "weights": weights,
        "combination_type": combination_type if len(found) > 1 else None,
        "density": density,
        "dtype": dtype,
        "seed": seed,
        "base": start.record(),
        "adapters": [source.record() for source in found],
    }
    if is_made(output, made):
        return output
    others = {trained[1] for source in found if (trained := _trained_on(source))} - {dtype}
    prints = {
        other: fingerprint(load_model(ModelConfig(str(start.folder), dtype=other, device=device))) for other in others
    }
    model = load_model(ModelConfig(str(start.folder), dtype=dtype, device=device))
    prints[dtype] = start_print = fingerprint(model)
    for source in found:
        _check_trained_on(source, start, prints)
    stored = getattr(model.config, "dtype", None) if dtype == "auto" else None
    size = sum(parameter.numel() for parameter in model.parameters()) * (stored or model.dtype).itemsize
    peft_model = _with_adapters(model, found, settings, start)
    if len(found) > 1:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                names = [_name(number) for number in range(len(found))]
                combine = peft_model.base_model.add_weighted_adapter
                combine(names, weights, "merged", combination_type=combination_type, density=density)
        except (ValueError, TypeError) as error:
            raise ModelError(f"PEFT cannot combine these adapters by {combination_type!r}: {error}") from error
        peft_model.base_model.set_adapter("merged")
    with scaled_lora(peft_model, scale):
        try:
            merged = peft_model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"the merged weights are not finite, so an adapter is damaged: {error}") from error
    if stored is not None:
        merged = merged.to(stored)
    with whole_folder(
        output, {**made, "base_fingerprint": start_print, "fingerprint": fingerprint(merged)}, size
    ) as partial:
        merged.save_pretrained(partial)
        copy_files(start.folder, partial, (*PROCESSOR, *LICENCES))
        if len(found) == 1:
            copy_files(found[0].folder, partial, (*PROCESSOR, *_RUN))
    return output


def _check_combination(
    adapters: Sequence[str], weights: Sequence[float] | None, combination_type: str, density: float | None
) -> list[float]:
    count = len(adapters)
    if not count:
        raise ValueError("no adapter is named; there is nothing to merge.")
    if len(set(adapters)) < count:
        raise ValueError(f"an adapter is named twice in {', '.join(adapters)}; give it once, with a larger weight.")
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type {combination_type!r} is not known; PEFT's are {', '.join(COMBINATIONS)}.")
    if count == 1 and (weights is not None or density is not None):
        raise ValueError("`weights` and `density` combine several adapters, and there is one. `scale` makes it weaker.")
    if count > 1 and (combination_type in _THINNED) != (density is not None):
        needs = "needs" if density is None else "does not use"
        raise ValueError(f"combination_type {combination_type!r} {needs} `density`, the share of values that is kept.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density {density} is not a share of values; give one above 0, up to 1.")
    weights = list(weights) if weights is not None else [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} adapters; give one for each.")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights {weights} are not all numbers to multiply with. Give finite ones.")
    return weights


def _settings(source: Source) -> dict[str, Any]:
    settings = json.loads((source.folder / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("peft_type") != "LORA":
        raise ModelError(
            f"adapter {source.name!r} is of type {settings.get('peft_type')}, and this merges LoRA adapters. PEFT merges other "
            "types that allow it: `PeftModel.from_pretrained(model, folder).merge_and_unload()`."
        )
    return settings


def _find_base(
    adapters: Sequence[Source], settings: Sequence[dict[str, Any]], base: str | None, revision: str | None
) -> Source:
    named = [str(entry.get("base_model_name_or_path")) for entry in settings]
    if base is not None:
        return find_model(base, revision)
    if len(set(named)) > 1:
        raise ModelError(
            f"the adapters name different bases ({', '.join(sorted(set(named)))}), and what was learned on one means nothing on "
            "another. If these are the same model under several names, give it as `base`."
        )
    try:
        source, _, found = resolve(ModelConfig(str(adapters[0].folder)))
        return find_model(source, revision or found)
    except ModelError as error:
        raise ModelError(f"{error} (It is what adapter {adapters[0].name!r} names; `base` names another.)") from error


def _trained_on(adapter: Source) -> tuple[dict[str, Any], str] | None:
    """What a run of prefalign noted of its base, and the dtype it had there; None where the base's own weights are not noted."""
    import yaml

    note, config = adapter.folder / "base.json", adapter.folder / "prefalign_config.yaml"
    if not note.is_file() or not config.is_file():
        return None
    noted = json.loads(note.read_text(encoding="utf-8"))
    model = yaml.safe_load(config.read_text(encoding="utf-8")).get("model") or {}
    if model.get("load_in_4bit") or noted.get("changed"):
        return None
    return noted, model.get("dtype", "auto")


def _check_trained_on(adapter: Source, base: Source, found: Mapping[str, str]) -> None:
    """Check that the base is the one that a run started from.

    Args:
        adapter: the run's adapter.
        base: the base.
        found: dtype to the base's fingerprint when loaded in it.
    """
    trained = _trained_on(adapter)
    if trained is None:
        return
    noted, dtype = trained
    if noted["fingerprint"] != found[dtype]:
        raise ModelError(
            f"adapter {adapter.name!r} was trained on {noted['name']!r} with other weights than {base.name!r} has (fingerprint "
            f"{noted['fingerprint']}, here {found[dtype]}). Merged they would be a model that nobody trained. Name the right "
            "`base`."
        )


def _with_adapters(model: Any, found: Sequence[Source], settings: Sequence[dict[str, Any]], base: Source) -> Any:
    """The base with all adapters on it, each under its number."""
    from peft import PeftConfig, PeftModel

    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    wrapped = None
    for number, source in enumerate(found):
        if len(found) > 1 and (settings[number].get("modules_to_save") or settings[number].get("use_dora")):
            raise ModelError(
                f"adapter {source.name!r} holds whole modules or DoRA magnitudes, which cannot be combined with other adapters. "
                "Merge each adapter alone and average the models with merge_models."
            )
        folder = str(source.folder)
        try:
            if wrapped is None:
                wrapped = PeftModel(model, PeftConfig.from_pretrained(folder), _name(number))
            report = wrapped.load_adapter(folder, _name(number))
        except (RuntimeError, ValueError) as error:
            lines = str(error).strip().splitlines()
            raise _wrong_base(source, base, " ".join(line.strip() for line in lines[:2])) from error
        lost = [*report.missing_keys, *report.unexpected_keys]
        if lost:
            raise _wrong_base(source, base, f"{len(lost)} tensor(s) without a counterpart, such as {lost[0]}")
    assert wrapped is not None
    ends = (wrapped.get_base_model().get_output_embeddings(), wrapped.get_base_model().get_input_embeddings())
    if tied and any(type(module).__module__.startswith("peft.") for module in ends):
        raise ModelError(
            f"the adapter changes the embedding or the output head, and {base.name!r} uses one matrix for both: merged, a change "
            "of one would change the other. Keep the adapter unmerged, or train one that leaves both alone."
        )
    return wrapped


def _name(number: int) -> str:
    return f"source-{number:04}"  # PEFT looks for the name inside those of tensors: it must not be part of another


def _wrong_base(adapter: Source, base: Source, why: str) -> ModelError:
    return ModelError(
        f"adapter {adapter.name!r} does not fit {base.name!r}: {why}. Name the model that it was trained on as `base`."
    )


def _check_scales(model: Any, scale: float) -> None:
    for config in model.peft_config.values():
        if config.use_dora or config.modules_to_save or config.bias != "none":
            raise ModelError(
                f"scale {scale} scales what LoRA adds, and this adapter also replaces weights (DoRA, modules_to_save or bias). "
                "Merge it with scale 1, then mix the result with its base: `merge_models` with `alpha`."
            )

"""The folder of a reward model: everything that its scores depend on, and rows by which a loaded one proves itself.

adapter_model.safetensors, adapter_config.json    or the full model's files, if all weights were trained
reward_head.safetensors                           the head, float32
reward_model.json                                 base, attributes, prompt, score scale, tolerance of the self-test
golden.parquet                                    answers with their pictures, facts and scores
processor and tokenizer files
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file

from prefalign import families
from prefalign.checkpoints import resolve
from prefalign.config import build
from prefalign.images import EncodedImage, encode_png, read_image
from prefalign.manifest import write_atomically
from prefalign.models import ModelConfig, fingerprint, load_model, load_processor
from prefalign.records import canonical_json, normalise_messages
from prefalign.rewards.augmentation import RatingPrompt
from prefalign.rewards.rows import as_mapping
from prefalign.rewards.vlm import BaseModel, Calibration, Golden, RewardModel, Scale
from prefalign.training.checkpoints import restore_weights

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)

SCHEMA = 1
NOTE, HEAD, GOLDEN = "reward_model.json", "reward_head.safetensors", "golden.parquet"
TOLERANCE = {"float32": 0.02, "bfloat16": 0.1, "float16": 0.1}
"""How far a golden row's score may be off, in deviations of the scores: kernels and batches round differently."""


class RewardModelError(ValueError):
    """A reward model that cannot be used; the message says what to do."""


class OtherBaseError(RewardModelError):
    """A reward model whose adapter does not belong on the model that was to carry it."""


def _golden_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be kept of a row to score its answer again: pictures as encoded bytes, the rest as JSON."""
    return {
        "id": str(row.get("id")),
        "images": [_encoded(picture) for picture in row["images"]],
        "prompt": canonical_json(normalise_messages(row["prompt"])),
        "chosen": canonical_json(normalise_messages(row["chosen"])),
        "facts": canonical_json(as_mapping(row.get("facts"))),
    }


def _encoded(picture: Any) -> EncodedImage:
    if not isinstance(picture, Mapping):
        return encode_png(picture.convert("RGB"))
    if picture["bytes"] is None:
        return read_image(str(picture["path"]))
    return {"bytes": picture["bytes"], "path": None}


def save(model: RewardModel, folder: Path) -> None:
    """Write a reward model; `reward_model.json` is the last file.

    Raises:
        ValueError: it does not know its base, or shares a model with others.
    """
    if model.base is None:
        raise RewardModelError(
            "this reward model was built without `base`, so the folder could not say which weights it belongs to. Give "
            "RewardModel a `BaseModel`."
        )
    if model.adapter is not None:
        raise RewardModelError(
            f"this reward model is the adapter {model.adapter!r} on a model that others use; it was loaded from a folder, which "
            "holds it as it is."
        )
    folder.mkdir(parents=True, exist_ok=True)
    adapts = is_peft_model(model.model)
    model.model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    head = {name: tensor.detach().cpu().contiguous() for name, tensor in model.head.state_dict().items()}
    save_file(head, folder / HEAD, metadata={"format": "pt"})
    note: dict[str, Any] = {
        "schema": SCHEMA,
        "weights": "adapter" if adapts else "full",
        "base": asdict(model.base),
        "attributes": model.attributes,
        "prompt": asdict(model.rating),
        "scale": None,
        "self_test": None,
    }
    if (found := model.calibration) is not None:
        _write_golden(folder / GOLDEN, found.golden)
        note["scale"] = {"with_facts": asdict(found.with_facts), "without_facts": asdict(found.without_facts)}
        note["self_test"] = {"rows": len(found.golden), "tolerance": TOLERANCE[model.base.dtype]}
    write_atomically(folder / NOTE, json.dumps(note, indent=2).encode())


def _write_golden(file: Path, golden: list[Golden]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {**_golden_row(entry.row), "scores": entry.scores, "scores_without_facts": entry.scores_without_facts}
        for entry in golden
    ]
    pq.write_table(pa.Table.from_pylist(rows), file, compression="zstd")


def _read_golden(file: Path) -> list[Golden]:
    import pyarrow.parquet as pq

    found = []
    for row in pq.read_table(file).to_pylist():
        scores, without = row.pop("scores"), row.pop("scores_without_facts")
        row |= {key: json.loads(row[key]) for key in ("prompt", "chosen", "facts")}
        found.append(Golden(row, scores, without))
    return found


def restore(model: RewardModel, folder: Path) -> None:
    """Load the weights that `save` wrote into the same model."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    if is_peft_model(model.model):
        set_peft_model_state_dict(model.model, load_peft_weights(str(folder), device=str(model.device)))
    else:
        restore_weights(model.model, folder)
    model.head.load_state_dict(load_file(folder / HEAD, device=str(model.device)))


def read_note(folder: Path) -> dict[str, Any]:
    """`reward_model.json` of a finished reward model.

    Raises:
        RewardModelError: there is none, it is of another schema, or training has not ended.
    """
    file = folder / NOTE
    if not file.is_file():
        raise RewardModelError(
            f"{folder} is no reward model (no {NOTE}). Give the output folder of `prefalign run train_reward_model`."
        )
    note = json.loads(file.read_text(encoding="utf-8"))
    if note["schema"] != SCHEMA:
        raise RewardModelError(
            f"{folder} was written by another version of prefalign (schema {note['schema']}, here {SCHEMA}). Train it again, or "
            "use the version that wrote it."
        )
    if note["self_test"] is None:
        raise RewardModelError(
            f"{folder} is a checkpoint of a run that has not ended: it has no score scale and nothing to test it by. Start the "
            "run again with the same config and it goes on; to keep an early checkpoint set trainer.load_best_model_at_end."
        )
    return note


def load(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    onto: PeftModel | None = None,
    adapter_name: str = "reward",
    fast_path: Literal["auto", "off"] = "auto",
) -> RewardModel:
    """See `RewardModel.load`."""
    note = read_note(folder)
    if onto is not None:
        with _taken_off_again(onto, adapter_name, folder):
            return _load(folder, note, device, dtype, onto, adapter_name, fast_path)
    return _load(folder, note, device, dtype, onto, adapter_name, fast_path)


def _load(
    folder: Path,
    note: dict[str, Any],
    device: str,
    dtype: str,
    onto: PeftModel | None,
    adapter_name: str,
    fast_path: Literal["auto", "off"],
) -> RewardModel:
    base = BaseModel(**note["base"])
    wanted = ModelConfig(str(folder), device=device, dtype=base.dtype if dtype == "auto" else dtype)
    if onto is not None:
        if note["weights"] == "full":
            raise RewardModelError(
                f"{folder} is a reward model of which all weights were trained: it has no adapter that another model could "
                "carry. Load it by itself, or train it with `lora`."
            )
        model: Any = _attach(onto, folder, base, adapter_name)
    else:
        model = load_model(wanted) if note["weights"] == "full" else _adapted(folder, base, wanted)
    processor = load_processor(ModelConfig(str(folder)))
    scale = note["scale"]
    loaded = RewardModel(
        model,
        processor,
        base=base,
        attributes=note["attributes"],
        rating=build(RatingPrompt, note["prompt"], source=NOTE),
        fast_path=fast_path,
        adapter=adapter_name if onto is not None else None,
    )
    loaded.head.load_state_dict(load_file(folder / HEAD, device=str(loaded.device)))
    loaded.requires_grad_(False) if onto is None else loaded.head.requires_grad_(False)
    if onto is None:
        loaded.eval()
    loaded.calibration = Calibration(
        Scale(**scale["with_facts"]), Scale(**scale["without_facts"]), _read_golden(folder / GOLDEN)
    )
    self_test(loaded, folder, note["self_test"]["tolerance"])
    return loaded


@contextmanager
def _taken_off_again(onto: PeftModel, name: str, folder: Path) -> Iterator[None]:
    """Leave a model without the new adapter if it turns out not to belong there."""
    before = set(onto.peft_config)
    active, flags = onto.active_adapter, [(parameter, parameter.requires_grad) for parameter in onto.parameters()]
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        if name in onto.peft_config and name not in before:
            onto.set_adapter(active)
            onto.delete_adapter(name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        if isinstance(error, RewardModelError):
            raise
        raise OtherBaseError(
            f"the adapter in {folder} does not fit the model that is to carry it ({str(error).splitlines()[0]}): it was trained "
            "with other weights. Load it by itself, or train a reward model on this model."
        ) from error


def _adapted(folder: Path, base: BaseModel, wanted: ModelConfig) -> Any:
    """The base with the adapter of a folder on it, after a look at the base's weights."""
    from peft import PeftModel

    source, _, revision = resolve(wanted)
    model = load_model(
        replace(wanted, model_name_or_path=source, model_revision=revision, load_in_4bit=base.load_in_4bit)
    )
    _check_base(fingerprint(model), str(model.dtype), folder, base, source)
    return PeftModel.from_pretrained(model, str(folder)).eval()


def _attach(onto: PeftModel, folder: Path, base: BaseModel, name: str) -> PeftModel:
    """Load the adapter of a folder beside the others of a model."""
    if name in onto.peft_config:
        raise RewardModelError(
            f"the model has an adapter called {name!r} already. Give the reward model another `adapter_name`."
        )
    found = fingerprint(_Unadapted(onto))
    _check_base(found, str(families.core(onto).dtype), folder, base, "the model that is to carry it")
    active, flags = onto.active_adapter, [(parameter, parameter.requires_grad) for parameter in onto.parameters()]
    modes = [(module, module.training) for module in onto.modules()]
    onto.load_adapter(str(folder), name, is_trainable=False)
    onto.set_adapter(active)
    for module, mode in modes:
        module.training = mode
    for parameter in onto.parameters():
        parameter.requires_grad_(False)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return onto


class _Unadapted:
    """The tensors of a `PeftModel`'s base under the names that they had without adapters."""

    def __init__(self, model: PeftModel):
        self.model = model

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, torch.Tensor]:
        """Names and tensors, adapters left out."""
        return dict(self._named(keep_vars))

    def _named(self, keep_vars: bool) -> Iterator[tuple[str, torch.Tensor]]:
        adapters = tuple(f".{name}" for name in self.model.peft_config)
        for name, tensor in self.model.get_base_model().state_dict(keep_vars=keep_vars).items():
            own = "lora_" in name or any(f"{adapter}." in name or name.endswith(adapter) for adapter in adapters)
            if not own:
                yield name.replace(".base_layer.", "."), tensor


def _check_base(found: str, dtype: str, folder: Path, base: BaseModel, what: str) -> None:
    """Compare fingerprints; in another dtype the weights are rounded, and only the self-test can tell."""
    if dtype.removeprefix("torch.") == base.dtype and found != base.fingerprint:
        raise OtherBaseError(
            f"{folder} was trained on {base.name!r} with other weights than {what} has (fingerprint {base.fingerprint}, here "
            f"{found}); its scores would mean nothing. Use the weights that it was trained on, or train a reward model on these."
        )


def self_test(model: RewardModel, folder: Path, tolerance: float) -> None:
    """Score the golden rows and compare.

    Raises:
        RewardModelError: a score is further off than `tolerance` deviations.
    """
    assert model.base is not None
    found = model.calibration
    assert found is not None
    dtype = str(families.core(model.model).dtype).removeprefix("torch.")
    tolerance = max(tolerance, TOLERANCE.get(dtype, 0.1))
    rows = [entry.row for entry in found.golden]
    sides = ((True, found.with_facts, "scores"), (False, found.without_facts, "scores_without_facts"))
    for facts, scale, name in sides:
        now = model.score(rows, facts=facts)
        then = torch.tensor([getattr(entry, name) for entry in found.golden])
        off = (now - then).abs() / torch.tensor(scale.deviation)
        if not bool((off <= tolerance).all()):
            row, attribute = divmod(int(off.nan_to_num(nan=torch.inf).argmax()), off.shape[1])
            # on a model in another dtype fingerprints say nothing, so it may be another model
            kind = RewardModelError if model.adapter is None or model.base.dtype == dtype else OtherBaseError
            raise kind(
                f"the reward model in {folder} does not give the scores that it gave when it was saved: golden row "
                f"{rows[row]['id']}{'' if facts else ' without facts'} had {model.attributes[attribute]} "
                f"{then[row, attribute]:.4f} and has {now[row, attribute]:.4f}, {off[row, attribute]:.2f} deviations off where "
                f"{tolerance} are allowed. Head, adapter, base, processor or prompt are not those that were saved: copy the "
                "folder again, and use the base that it names."
            )

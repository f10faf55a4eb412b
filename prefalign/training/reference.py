"""Reference log-probs computed once and kept on disk: per token, float32, one entry per pair, found by what they depend on.

    folder/settings.json     what every number depends on: reference, dtype, route, processor, cut, negatives
    folder/part-*.arrow      entries: key, and per view one number for each token of the answer

A key hashes the row's texts and the bytes of its pictures, so shuffling, subsetting and appending rows keep what is there.
Another reference, precision, route or processor refuses the folder; so do losses on other pictures where `max_length` is set,
since the longest prompt of a row decides where its answers are cut. Since single tokens are kept, `ld_alpha`, norms and
token weights need no new pass. (TRL's own cache is keyed by data set and model alone and stores sums: with another `ld_alpha` it
returns the old ones.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from accelerate.utils import broadcast_object_list

from prefalign.losses import VIEWS
from prefalign.manifest import differences, write_atomically
from prefalign.processors import processor_fingerprint
from prefalign.progress import progress_bar
from prefalign.training.documents import digest_of, picture_bytes
from prefalign.training.scoring import run

if TYPE_CHECKING:
    from prefalign.training.preference import PreferenceTrainer

logger = logging.getLogger(__name__)

FORMAT = 1
SETTINGS_FILE = "settings.json"
ROWS_PER_PART = 256
_NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "quantization_config"}
TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.5}
"""Largest difference of one token's log-prob between the cache and a live pass that rounding explains."""


class StaleReference(ValueError):
    """A cache of another reference, precision or processor than this run's."""


@dataclass
class CacheReport:
    """What `cache_reference` did.

    Attributes:
        rows: rows of the run, held-out ones included.
        found: of these, entries that were there.
        computed: entries that were computed now.
        verified: rows computed once more and compared.
        largest_difference: of a token's log-prob in these rows.
    """

    rows: int = 0
    found: int = 0
    computed: int = 0
    verified: int = 0
    largest_difference: float = 0.0

    def __str__(self) -> str:
        return (
            f"reference log-probs: {self.found} of {self.rows} rows found, {self.computed} computed; {self.verified} verified, "
            f"largest difference {self.largest_difference:.2g}"
        )


@dataclass
class ReferenceCache:
    """Entries of a cache folder, read from memory-mapped files.

    Attributes:
        folder: the folder.
        views: the views that an entry must have.
    """

    folder: Path
    views: tuple[str, ...]
    _places: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    _parts: list[pa.RecordBatch] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.reload()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> dict[str, torch.Tensor]:
        """Per view the log-prob of each token of a row's answer, (A,) float32."""
        part, row = self._places[key]
        return {view: torch.tensor(self._parts[part].column(view)[row].as_py()) for view in self.views}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "views": self.views}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def reload(self) -> None:
        """Read which entries there are; a damaged part is passed over, and its rows count as missing."""
        self._places, self._parts = {}, []
        for file in sorted(self.folder.glob("part-*.arrow")):
            if file.name != _part_name(file.read_bytes()):
                logger.warning("%s is damaged; its rows are computed again.", file)
                continue
            with pa.memory_map(str(file)) as mapped:
                batch = pa.ipc.open_file(mapped).get_batch(0)
            if not set(self.views) <= set(batch.schema.names):
                continue
            for row, key in enumerate(batch.column("key").to_pylist()):
                self._places[key] = (len(self._parts), row)
            self._parts.append(batch)

    def write(self, entries: Sequence[tuple[str, Mapping[str, torch.Tensor]]]) -> None:
        """Add a part, under a name made of its bytes; it appears whole or not at all."""
        if not entries:
            return
        columns = {"key": pa.array([key for key, _ in entries])}
        for view in self.views:
            columns[view] = pa.array([values[view].tolist() for _, values in entries], pa.list_(pa.float32()))
        batch = pa.RecordBatch.from_pydict(columns)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        data = sink.getvalue().to_pybytes()
        write_atomically(self.folder / _part_name(data), data)


def _part_name(data: bytes) -> str:
    return f"part-{hashlib.sha256(data).hexdigest()[:16]}.arrow"


def row_key(row: Mapping[str, Any]) -> str:
    """Key of a row: its texts, and the bytes of its pictures."""
    texts = [row["prompt"], row["chosen"], row["rejected"]]
    sides = [digest_of([picture_bytes(p) for p in row.get(side) or []]) for side in ("images", "rejected_images")]
    # negatives made on the fly are drawn from the row's id
    content = json.dumps([texts, sides, row.get("id")], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def cache_settings(trainer: PreferenceTrainer, reference: str) -> dict[str, Any]:
    """What the log-probs of every row depend on.

    Args:
        trainer: the trainer.
        reference: fingerprint of the reference's weights (`models.fingerprint`, taken before training).
    """
    collator, args = trainer.data_collator, trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    quantised = getattr(model.config, "quantization_config", None)
    shape = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_OF_THE_MODEL}
    return {
        "format": FORMAT,
        "reference": reference,
        "config": hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
        "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else "none",
        "quantisation": json.loads(json.dumps(_plain(quantised), default=str)),
        "route": trainer.route.layout,
        "processor": processor_fingerprint(collator.processor),
        "max_length": _cut(collator.max_length, trainer.views),
        "negative": None if collator.negative is None else {**asdict(collator.negative), "seed": collator.seed},
    }


def cache_reference(
    trainer: PreferenceTrainer, folder: Path, *, reference: str, verify: int = 4, progress: bool = True
) -> CacheReport:
    """Make sure that a cache holds the reference's log-probs of all rows of a trainer, and let its collator use them.

    To be called before training, while the policy still is the reference. Interrupted, it goes on where it stopped. Several
    processes share the rows and write parts of their own.

    Args:
        trainer: a trainer with `reference="cached"`.
        folder: folder of the cache; several runs may share one.
        reference: fingerprint of the reference's weights.
        verify: how many random rows are computed again and compared.
        progress: show a bar.

    Raises:
        StaleReference: the folder belongs to another reference, or its numbers are not this reference's.
    """
    settings = cache_settings(trainer, reference)
    accelerator = trainer.accelerator
    if accelerator.is_main_process:
        _claim(folder, settings)
    accelerator.wait_for_everyone()
    _claim(folder, settings)
    cache = ReferenceCache(folder, tuple(trainer.views))
    datasets = [trainer.train_dataset, *([trainer.eval_dataset] if trainer.eval_dataset is not None else [])]
    report = CacheReport()
    model = _runnable(trainer)
    for dataset in datasets:
        keys = [row_key(row) for row in dataset]
        missing = list({key: number for number, key in enumerate(keys) if key not in cache}.values())
        missing = broadcast_object_list([missing])[0]  # another run may be writing into the folder at this moment
        report.rows += len(keys)
        report.found += len(keys) - len(missing)
        report.computed += len(missing)
        _compute(trainer, model, dataset, keys, missing, cache, progress=progress)
        accelerator.wait_for_everyone()
        cache.reload()
    rows = trainer.train_dataset
    chosen = random.Random(trainer.args.seed).sample(range(len(rows)), min(verify, len(rows)))
    report.verified = len(chosen)
    for number in chosen:
        row = rows[number]
        live = _live(trainer, model, [row])[0]
        for view, kept in cache[row_key(row)].items():
            apart = math.inf if len(kept) != len(live[view]) else (kept - live[view]).abs().max().item()
            report.largest_difference = max(report.largest_difference, math.inf if math.isnan(apart) else apart)
    allowed = TOLERANCE[settings["dtype"] if settings["autocast"] == "none" else settings["autocast"]]
    if report.largest_difference > allowed:
        raise StaleReference(
            f"the cached reference log-probs in {folder} are not those of this run's reference: in {report.verified} "
            f"random rows a token differs by up to {report.largest_difference:.3g}, where rounding explains {allowed}. "
            "Training against them would move the policy from the first step on. Delete the folder and start again; it "
            "is computed anew."
        )
    trainer.data_collator.cache = cache
    return report


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    file = folder / SETTINGS_FILE
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(settings, indent=2).encode())
        return
    changed = list(differences(json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(settings))))
    if changed:
        raise StaleReference(
            f"{folder} holds reference log-probs that were made otherwise ({'; '.join(changed)}), so they are not this "
            "run's. Give another `reference_folder`, or delete this one."
        )


def _compute(
    trainer: PreferenceTrainer,
    model: Any,
    dataset: Any,
    keys: Sequence[str],
    missing: Sequence[int],
    cache: ReferenceCache,
    *,
    progress: bool,
) -> None:
    size, processes = trainer.args.per_device_train_batch_size, trainer.accelerator.num_processes
    mine = list(missing[trainer.accelerator.process_index :: processes])
    rounds = -(-len(missing) // (size * processes))
    done: list[tuple[str, Mapping[str, torch.Tensor]]] = []
    bar = progress_bar(total=len(mine), desc="reference log-probs", unit="row", disable=not progress)
    for start in range(0, rounds * size, size):
        # a process that has run out takes part all the same: sharded weights are gathered by all together
        numbers = mine[start : start + size]
        rows = [dataset[number] for number in numbers or missing[:1]]
        live = _live(trainer, model, rows)
        done += zip((keys[number] for number in numbers), live, strict=False)
        bar.update(len(numbers))
        if len(done) >= ROWS_PER_PART:
            cache.write(done)
            done = []
    bar.close()
    cache.write(done)


def _live(trainer: PreferenceTrainer, model: Any, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Per row and view, the reference's log-prob of each token, on the CPU."""
    collator = trainer.data_collator
    cache, collator.cache = collator.cache, None
    try:
        batch = trainer._prepare_inputs(collator(rows))
    finally:
        collator.cache = cache
    values: list[dict[str, torch.Tensor]] = [{} for _ in rows]
    for part in batch.get("parts", [batch]):
        with torch.no_grad(), trainer.accelerator.autocast(), trainer.as_reference(model) as reference:
            flat = run(reference, part)["log_probs"].float().cpu()
        for view in trainer.views:
            lengths = part["answers"][VIEWS[view].answer]["mask"].sum(dim=1).tolist()
            index = part["index"][view].cpu()
            for row, tokens in zip(part.get("rows", range(len(rows))), flat[index].split(lengths), strict=True):
                values[row][view] = tokens
    return values


def _runnable(trainer: PreferenceTrainer) -> Any:
    """The model in a state to run before training has prepared it: under DeepSpeed, an engine that gathers sharded weights."""
    if not trainer.is_deepspeed_enabled:
        return trainer.model
    from trl.models import prepare_deepspeed

    return prepare_deepspeed(trainer.model, trainer.accelerator)


def _cut(max_length: int | None, views: Sequence[str]) -> dict[str, Any] | None:
    """What decides where answers end: they are left what the longest prompt of a row does not take."""
    sides = {VIEWS[view].images for view in views}
    # without pictures a prompt is never the longest
    return (
        None if max_length is None else {"tokens": max_length, "prompts with": sorted(side for side in sides if side)}
    )


def _plain(config: Any) -> Any:
    return config.to_dict() if hasattr(config, "to_dict") else config

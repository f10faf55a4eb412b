"""The card of a data set: columns, how its rows were made, what they hold, what is not known of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefalign.hub.model_card import counted, data_section, stage_docstring, template
from prefalign.hub.release_checks import refuse, scan_row
from prefalign.images import sha256
from prefalign.manifest import Manifest
from prefalign.records import ON_TWO_PICTURES, message_text, normalise_messages
from prefalign.seen import Distinct, Spread

IMPORTED = "import_published"
PREVIEW_ROWS = 3
PREVIEW_LETTERS = 300
COLUMNS = {
    "id": "identity of the row: a hash of method, parent row, settings, generator, seed and index",
    "images": "the picture(s) that both answers are about, as their original encoded bytes",
    "prompt": "conversation up to the question, one placeholder for each picture",
    "messages": "conversation, one placeholder for each picture",
    "chosen": "the preferred answer",
    "rejected": "the dispreferred answer",
    "responses": "JSON text: several answers with sampling settings and scores",
    "method": "the method that made the row",
    "rejected_images": "the other picture(s) of the pair; empty: none",
    "answer": "reference answer",
    "facts": "JSON text: what is known of the pictures",
    "margin": "by how much the chosen answer is better, in the scorer's units",
    "meta": "JSON text: provenance (generator, seed, settings, SHA-256 of the pictures, parent row, scores)",
}


@dataclass
class RowStatistics:
    """Counts over the rows of a data set, one row at a time; of a picture 8 to 16 bytes are kept, of a row nothing."""

    rows: int = 0
    pictures: Distinct = field(default_factory=Distinct)
    methods: Counter[str] = field(default_factory=Counter)
    generators: Counter[str] = field(default_factory=Counter)
    words: dict[str, Spread] = field(default_factory=lambda: {"chosen": Spread(), "rejected": Spread()})
    rejected_images: int = 0
    on_two_pictures: int = 0
    scenes: int = 0
    margins: Spread = field(default_factory=Spread)
    preview: list[str] = field(default_factory=list)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one Parquet row (pictures encoded)."""
        self.rows += 1
        for picture in [*(row.get("images") or []), *(row.get("rejected_images") or [])]:
            self.pictures.add(sha256(picture))
        self.rejected_images += bool(row.get("rejected_images"))
        if row.get("method"):
            self.methods[row["method"]] += 1
        meta = row.get("meta")
        meta = json.loads(meta) if isinstance(meta, str) else {}
        self.on_two_pictures += meta.get(ON_TWO_PICTURES) is True
        if isinstance(meta.get("generator"), str):
            self.generators[meta["generator"]] += 1
        facts = row.get("facts")
        self.scenes += _is_scene(json.loads(facts) if isinstance(facts, str) and facts else {})
        if row.get("margin") is not None:
            self.margins.add(row["margin"])
        for side, counts in self.words.items():
            if row.get(side):
                counts.add(len(message_text(normalise_messages(row[side])).split()))
        if len(self.preview) < PREVIEW_ROWS:
            self.preview.append(_shown(row))

    def as_table(self) -> dict[str, str]:
        """Name to text, for a card."""
        table = {"rows": f"{self.rows:,}", "distinct pictures": f"{len(self.pictures):,}"}
        if self.methods:
            table["rows by method"] = counted(self.methods)
        if self.generators:
            table["rows by generator"] = counted(self.generators)
        for side, counts in self.words.items():
            if counts.count:
                table[f"words in `{side}`"] = f"mean {counts.mean:.1f}, from {counts.least} to {counts.greatest}"
        if self.margins.count:
            margins = self.margins
            table["margin"] = f"mean {margins.mean:.3f}, from {margins.least:.3f} to {margins.greatest:.3f}"
        if self.rejected_images:
            table["rows with another picture"] = f"{self.rejected_images:,}"
        if self.on_two_pictures:
            table["rows whose `rejected` is about `rejected_images`, not `images`"] = f"{self.on_two_pictures:,}"
        return table


def read_rows(shards: Sequence[Path]) -> tuple[RowStatistics, dict[str, str]]:
    """Count all rows and look into each for secrets and paths."""
    import pyarrow.parquet as pq

    statistics, findings, schema = RowStatistics(), [], {}
    for shard in shards:
        file = pq.ParquetFile(shard)
        schema = {entry.name: _type_name(entry.name, str(entry.type)) for entry in file.schema_arrow}
        for batch in file.iter_batches(batch_size=32):
            for row in batch.to_pylist():
                statistics.add(row)
                findings += [f"{shard.name} row {row.get('id')}, {finding}" for finding in scan_row(row)]
    refuse(findings)
    return statistics, schema


def dataset_card(
    repo_id: str,
    *,
    manifest: Manifest,
    statistics: RowStatistics,
    schema: Mapping[str, str],
    size: int,
    license: str | None,
) -> str:
    """Write a data set card whose YAML makes `load_dataset` find the shards.

    Args:
        repo_id: OWNER/NAME on the Hub.
        manifest: the stage's manifest.
        statistics: counted over all rows.
        schema: column name to type.
        size: bytes of all shards.
        license: Hub licence id, or None if the publisher named none.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    is_pairs = "chosen" in schema and "rejected" in schema
    split = {"name": "train", "num_bytes": size, "num_examples": statistics.rows}
    data = DatasetCardData(
        license=license,
        task_categories=["image-text-to-text"],
        size_categories=[_size_category(statistics.rows)],
        tags=["prefalign", "preference" if is_pairs else "vlm", *(["dpo", "trl"] if is_pairs else []), manifest.stage],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
        dataset_info={"splits": [split], "download_size": size, "dataset_size": size},
    )
    kind = "Preference pairs: a prompt with picture(s), a chosen and a rejected answer" if is_pairs else "Rows"
    imported = manifest.stage == IMPORTED
    limitations = [
        f"The rows are published under `{license}`. That covers what prefalign made; the pictures keep the licence of "
        "their source, which prefalign does not know: check it before you use them."
        if license
        else "The publisher named no licence, neither for the rows nor for the pictures in them: ask before you use them.",
        "Which answer is better was decided by whoever published the source; their licence and limitations hold for these rows."
        if imported
        else "No person checked the rows one by one; which answer is better was decided by the method named above.",
        _contamination(manifest),
    ]
    if statistics.scenes:
        which = "All rows show" if statistics.scenes == statistics.rows else f"{statistics.scenes:,} rows show"
        limitations.append(
            f"{which} drawn pictures of the embedded world (prefalign's scenes of coloured shapes), which say "
            "nothing of photographs."
        )
    return str(
        DatasetCard.from_template(
            data,
            template_str=template("dataset_card.md.j2"),
            name=repo_id.split("/")[-1],
            repo_id=repo_id,
            what=f"{kind}, {_origin(manifest) if imported else 'made without human labels'} by the stage `{manifest.stage}` of "
            "prefalign.",
            is_pairs=is_pairs,
            first_text="chosen" if is_pairs else "messages",
            rejected_images=statistics.rejected_images,
            columns=[{"name": key, "type": kind, "what": COLUMNS.get(key, "")} for key, kind in schema.items()],
            provenance=data_section(vars(manifest))["facts"],
            about=stage_docstring(manifest.stage),
            settings=json.dumps(manifest.config, indent=2),
            statistics=statistics.as_table(),
            preview="\n\n".join(statistics.preview),
            limitations=limitations,
            versions={"prefalign": manifest.code_version, **manifest.libraries},
        )
    )


def _shown(row: Mapping[str, Any]) -> str:
    """A row's texts for a card, cut; pictures by their number."""
    lines = [f"{row.get('id')}: {len(row.get('images') or [])} picture(s)"]
    for column in ("prompt", "messages", "chosen", "rejected"):
        if row.get(column):
            lines.append(f"{column}: {_cut(message_text(normalise_messages(row[column])))}")
    if isinstance(row.get("responses"), str):
        for response in json.loads(row["responses"]):
            lines.append(f"response {json.dumps(response.get('scores') or {})}: {_cut(response['text'])}")
    return "\n".join(lines)


def _cut(text: str) -> str:
    text = " ".join(text.split()).replace("```", "` ` `")  # a fence would end the card's own
    return text if len(text) <= PREVIEW_LETTERS else f"{text[:PREVIEW_LETTERS]} ..."


def _origin(manifest: Manifest) -> str:
    """Where imported rows come from, for a card."""
    source = manifest.config.get("settings", {}).get("source") or {}
    where = (
        f" as `{source['repository']}` (commit `{source['commit'][:12]}`, split `{source['split']}`)" if source else ""
    )
    return f"published by others{where} and brought into this form"


def _contamination(manifest: Manifest) -> str:
    """What is known of benchmark pictures among the rows."""
    if _mentions(manifest.config.get("settings"), "contamination"):
        return (
            f"The pictures were compared with lists of benchmark pictures (`contamination` in the settings); "
            f"{manifest.dropped.get('benchmark_picture', 0):,} rows had one and went. Benchmarks on no list were not looked for."
        )
    return (
        "The pictures were not compared with those of benchmarks in this stage. POPE, CHAIR and others use COCO: "
        "compare before you evaluate on them (`prefalign run filter_pairs`, `filters.contamination`)."
    )


def _mentions(settings: Any, name: str) -> bool:
    """Whether nested settings hold a value of this name."""
    if isinstance(settings, Mapping):
        return bool(settings.get(name)) or any(_mentions(value, name) for value in settings.values())
    return isinstance(settings, list) and any(_mentions(value, name) for value in settings)


def _is_scene(facts: Any) -> bool:
    """Whether facts are those of a drawn scene (`scenes.language.facts`): its objects, one by one."""
    objects = (facts.get("objects") or []) if isinstance(facts, Mapping) and facts.get("world") == "scenes" else []
    return bool(objects) and all(isinstance(thing, Mapping) and "shape" in thing for thing in objects)


def _size_category(rows: int) -> str:
    """The Hub's name for so many rows, one of its list: `n<1K`, `1K<n<10K`, ..., `100B<n<1T`, `n>1T`."""
    names = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = next((place for place in range(len(names)) if rows < 1_000 * 10**place), len(names))
    if place in (0, len(names)):
        return f"n<{names[0]}" if place == 0 else f"n>{names[-1]}"
    return f"{names[place - 1]}<n<{names[place]}"


def _type_name(column: str, arrow: str) -> str:
    if column in ("images", "rejected_images"):
        return "list of images"
    if column in ("prompt", "messages", "chosen", "rejected"):
        return "list of messages"
    return "text" if arrow == "string" else arrow

"""Import published: preference data of others, from disk or from the Hub, as pairs, candidates or examples.

- `pairs`: rows with a chosen and a rejected answer. `meta["changed"]` has the spans in which the two differ, in characters: the
  segments that people corrected in RLHF-V, which DDPO and CHiP weigh more (they find the same ones in tokens).
- `candidates`: rows with several scored answers (VLFeedback's four), one thumb (TRL's unpaired rows), or two answers.
- `examples`: the answer to imitate (the chosen one), for SFT.

Layouts: `prefalign.sources.LAYOUTS`; each row's is told from its columns. No text is changed, but that marks of pictures become
blocks and the newline of LLaVA's files that parts the pictures from a question before or after them goes
(`sources.turns.marked_blocks`); mDPO's rendered prompts become turns. What has no field in our rows is kept in `meta["columns"]`
(candidates: `facts["columns"]`).

Sources: RLHF-V (arXiv 2312.00849), RLAIF-V (2405.17220), POVID (2402.11411), STIC (2405.19716), MIA-DPO (2410.17637), mDPO
(2406.11839), S-VCO's MVC (2502.13928), LLaVA-RLHF (2309.14525), VLFeedback (2312.10665), and the formats of TRL, LLaMA-Factory,
ms-swift, EasyR1. Needs: no model.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefalign import sources, stages, store
from prefalign.images import sha256
from prefalign.manifest import Manifest
from prefalign.records import (
    ON_TWO_PICTURES,
    Candidates,
    Example,
    Pair,
    Prompt,
    assistant_message,
    message_text,
    record_id,
)
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig

METHOD = "import_published"
FIGURES = "import.json"
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: the published set: a file, a folder, or OWNER/NAME on the Hub.
        output: folder of what is made.
        produce: what is made of each row.
        min_block: words in a row that two answers share; shorter stretches count as changed.
    """

    data: DataConfig
    output: OutputConfig
    produce: Literal["pairs", "candidates", "examples"] = "pairs"
    min_block: int = 3

    def __post_init__(self) -> None:
        if self.min_block < 1:
            raise ValueError(
                f"min_block is {self.min_block}; a stretch of equal words has at least 1 word (3 is the published)."
            )


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    sources.files_of(config.data)
    settings = row_settings(config)
    given, made = {"pairs": (Pair, Pair), "candidates": (Candidates, Candidates), "examples": (Prompt, Example)}[
        config.produce
    ]
    manifest = store.run_stage(
        METHOD,
        config.data,
        lambda block: [outcome(row, settings) for row in block],
        output=config.output,
        record=made,
        settings=settings,
        seed=0,
        reads=given,
    )
    folder = config.output.path
    found = stages.write_figures(folder, FIGURES, lambda: figures(folder, manifest))
    columns = found.pop("columns_of_rows_without_picture", [])
    stages.say_figures(METHOD, found)
    if bare := found.get("without_picture"):
        beside = f"; columns that were not read: {', '.join(columns)}" if columns else ""
        stages.say(f"{bare} of {manifest.rows_out} rows have no picture{beside}")
    return manifest


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows, and which set of the Hub was read."""
    spans = {"min_block": config.min_block} if config.produce == "pairs" else {}
    return {
        "produce": config.produce,
        "layout": config.data.layout,
        **spans,
        "source": sources.provenance(config.data),
    }


def outcome(row: Pair | Candidates | Prompt, settings: dict[str, Any]) -> Outcome:
    """What one published row gives, or why it gives nothing."""
    shown = [*row.images, *getattr(row, "rejected_images", ())]
    if isinstance(failed := stages.opened(shown), Failed):
        return failed
    identity = record_id(method=METHOD, parent=f"{row.id}:{sources.content_digest(row)}", settings=settings, model="",
                         seed=0)  # fmt: skip
    known = {"parent": row.id, "settings": settings, "images_sha256": [sha256(image) for image in row.images]}
    if isinstance(row, Pair):
        return [_pair(row, identity, known, settings["min_block"])]
    if isinstance(row, Candidates):
        return [
            Candidates(identity, row.images, row.messages, row.responses, row.answer, {**row.facts, "imported": known})
        ]
    if row.answer is None or not row.answer.strip():
        return Dropped("no_reference")
    columns = {"columns": row.facts["columns"]} if "columns" in row.facts else {}
    return [Example(identity, row.images, [*row.messages, assistant_message(row.answer)], {**known, **columns})]


def _pair(row: Pair, identity: str, known: dict[str, Any], min_block: int) -> Pair:
    layout = row.meta.get("layout", "prefalign")
    other: dict[str, Any] = {}
    if row.rejected_images:
        other["rejected_images_sha256"] = [sha256(image) for image in row.rejected_images]
    meta = {
        **row.meta,
        **known,
        **other,
        "layout": layout,
        "changed": changed_characters(message_text(row.chosen), message_text(row.rejected), min_block),
    }
    return Pair(
        id=identity,
        images=row.images,
        prompt=row.prompt,
        chosen=row.chosen,
        rejected=row.rejected,
        method=layout if row.method == "imported" else row.method,
        rejected_images=row.rejected_images,
        answer=row.answer,
        facts=row.facts,
        margin=row.margin,
        meta=meta,
    )


def changed_characters(chosen: str, rejected: str, min_block: int = 3) -> dict[str, list[list[int]]]:
    """The spans in which two answers differ, by the rule of the loss (`losses.changed`) on words and marks.

    Args:
        chosen: preferred answer.
        rejected: the other answer.
        min_block: stretches of fewer equal words count as changed.

    Returns:
        `chosen` and `rejected`: `[start, stop]` in characters, equally many; a pure insertion or deletion is no span.

    Example:
        >>> changed_characters("there is a red cat on the mat", "there is a blue cat on the mat")
        {'chosen': [[11, 14]], 'rejected': [[11, 15]]}
    """
    from prefalign.losses.changed import changed_spans

    words = {side: list(_WORD.finditer(text)) for side, text in (("chosen", chosen), ("rejected", rejected))}
    numbers: dict[str, int] = {}
    ids = {side: [numbers.setdefault(word[0], len(numbers)) for word in found] for side, found in words.items()}
    spans = changed_spans(ids["chosen"], ids["rejected"], min_block=min_block)
    return {
        side: [[words[side][span.start].start(), words[side][span.stop - 1].end()] for span in each]
        for side, each in (("chosen", [one for one, _ in spans]), ("rejected", [other for _, other in spans]))
    }


def figures(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What was made, by layout, rows without a picture, and how much of the two answers of a pair differs."""
    produce = manifest.config["settings"]["produce"]
    found: dict[str, Any] = {"rows_in": manifest.rows_in, "rows_out": manifest.rows_out, "dropped": manifest.dropped}
    layouts: Counter[str] = Counter()
    unread: set[str] = set()
    bare = spans = pictures = apart = 0
    for row in stages.columns_of(folder, "facts" if produce == "candidates" else "meta"):
        notes = row["facts"] if produce == "candidates" else row["meta"]
        if not (notes["imported"] if produce == "candidates" else notes)["images_sha256"]:
            bare += 1
            unread.update(name for name, value in notes.get("columns", {}).items() if value is not None)
        if produce != "pairs":
            continue
        layouts[row["meta"]["layout"]] += 1
        spans += len(row["meta"]["changed"]["chosen"])
        pictures += "rejected_images_sha256" in row["meta"]
        apart += row["meta"].get(ON_TWO_PICTURES) is True
    if bare:
        found |= {"without_picture": bare, "columns_of_rows_without_picture": sorted(unread)}
    if produce != "pairs":
        return found
    return {
        **found,
        "layouts": dict(sorted(layouts.items())),
        "changed_spans_per_pair": round(spans / manifest.rows_out, 2) if manifest.rows_out else 0.0,
        "with_rejected_images": pictures,
        "two_answers_on_two_pictures": apart,
    }

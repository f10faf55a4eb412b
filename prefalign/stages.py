"""What the stages have in common: opening a row's pictures, outcomes in order, pairs and examples with their provenance."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefalign import records, sources
from prefalign.execution import SAMPLED
from prefalign.images import EncodedImage, ImageError, open_image, sha256
from prefalign.manifest import write_atomically
from prefalign.records import Candidates, Example, Message, Pair, Prompt
from prefalign.store import Dropped, Failed, Outcome

if TYPE_CHECKING:
    from PIL import Image

_ELSEWHERE = ("engine", "vllm", "server", "batch_size", "device", "cache")

Given = TypeVar("Given", Prompt, Pair, Candidates)
Prepared = TypeVar("Prepared")


def in_order(
    block: Sequence[Given],
    prepare: Callable[[Given], Prepared | Dropped | Failed],
    work: Callable[[list[tuple[Given, Prepared]]], Sequence[Outcome]],
) -> list[Outcome]:
    """One outcome for each row of a block: what cannot be prepared is settled at once, the others are worked on together.

    Args:
        block: rows as `store.run_stage` hands them over.
        prepare: a row made ready (its pictures opened), or why it cannot be used.
        work: takes the rows that can be used with what `prepare` made of them, gives one outcome each, in order.
    """
    outcomes: dict[int, Outcome] = {}
    ready: list[tuple[int, tuple[Given, Prepared]]] = []
    for index, row in enumerate(block):
        found = prepare(row)
        if isinstance(found, (Dropped, Failed)):
            outcomes[index] = found
        else:
            ready.append((index, (row, found)))
    made = work([entry for _, entry in ready]) if ready else []
    for (index, _), outcome in zip(ready, made, strict=True):
        outcomes[index] = outcome
    return [outcomes[index] for index in range(len(block))]


def opened(images: Sequence[EncodedImage]) -> list[Image.Image] | Failed:
    """Decoded RGB pictures, or the failure of the first that cannot be used."""
    try:
        return [open_image(image) for image in images]
    except ImageError as error:
        return Failed(error.reason, str(error))


def usable(prompt: Prompt, *, answer: bool = True) -> list[Image.Image] | Dropped | Failed:
    """The decoded pictures of a prompt, or why it cannot be used: no reference answer (if one is needed) or no picture."""
    if answer and (prompt.answer is None or not prompt.answer.strip()):
        return Dropped("no_reference")
    if not prompt.images:
        return Dropped("no_picture")
    return opened(prompt.images)


def make_pair(
    parent: Prompt,
    *,
    method: str,
    chosen: str,
    rejected: str,
    settings: Mapping[str, Any],
    seed: int,
    model: str = "",
    meta: Mapping[str, Any] | None = None,
    images: Sequence[EncodedImage] | None = None,
    prompt: Sequence[Message] | None = None,
    rejected_images: Sequence[EncodedImage] = (),
    margin: float | None = None,
    index: int = 0,
) -> Pair:
    """A pair made from a prompt, with its id and provenance.

    Args:
        parent: the row it was made from.
        method: the stage's name.
        chosen: text of the preferred answer.
        rejected: text of the other.
        settings: the settings that change rows; part of the id and noted in `meta`.
        seed: seed of the stage.
        model: fingerprint of the model that decides rows.
        meta: what else is known of this pair.
        images: pictures that both answers are conditioned on; the parent's if left out.
        prompt: conversation up to the user turn; the parent's if left out.
        rejected_images: the other picture(s) of the pair.
        margin: by how much chosen is better, in the scorer's units.
        index: number of the pair among those made from this row.
    """
    images = list(parent.images if images is None else images)
    known = {
        "parent": parent.id,
        "generator": model,
        "seed": seed,
        "settings": dict(settings),
        "images_sha256": [sha256(image) for image in images],
        **(meta or {}),
    }
    return Pair(
        id=records.record_id(method=method, parent=parent.id, settings=settings, model=model, seed=seed, index=index),
        images=images,
        prompt=list(parent.messages if prompt is None else prompt),
        chosen=[records.assistant_message(chosen)],
        rejected=[records.assistant_message(rejected)],
        method=method,
        rejected_images=list(rejected_images),
        answer=parent.answer,
        facts=parent.facts,
        margin=margin,
        meta=known,
    )


def make_example(
    parent: Prompt | Candidates,
    *,
    method: str,
    messages: Sequence[Message],
    settings: Mapping[str, Any],
    seed: int,
    model: str = "",
    meta: Mapping[str, Any] | None = None,
    index: int = 0,
) -> Example:
    """A conversation to imitate made from a row, with its id and provenance.

    Args:
        parent: the row it was made from, whose pictures it has.
        method: the stage's name.
        messages: the conversation, its last turn the answer.
        settings: the settings that change rows; part of the id and noted in `meta`.
        seed: seed of the stage.
        model: fingerprint of the model that decides rows.
        meta: what else is known of this example.
        index: number of the example among those made from this row.
    """
    known = {
        "method": method,
        "parent": parent.id,
        "generator": model,
        "seed": seed,
        "settings": dict(settings),
        "images_sha256": [sha256(image) for image in parent.images],
        **(meta or {}),
    }
    identity = records.record_id(
        method=method, parent=parent.id, settings=settings, model=model, seed=seed, index=index
    )
    return Example(identity, list(parent.images), list(messages), known)


def columns_of(folder: Path, *columns: str) -> Iterator[dict[str, Any]]:
    """These columns of every row that a stage has written, JSON text read, without its pictures."""
    for shard in sorted(folder.glob("data/*.parquet")):
        for row in sources.parquet_rows(shard, columns):
            yield {
                name: json.loads(value) if name in ("responses", "meta", "facts") else value
                for name, value in row.items()
            }


def write_figures(folder: Path, name: str, figures: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of a finished stage's rows, in a JSON file beside its manifest; made once, and read from there after."""
    file = folder / name
    if not file.is_file():
        write_atomically(file, json.dumps(figures(), indent=2).encode())
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def say(line: str) -> None:
    """Print what a finished stage gave as a line on stderr; nothing of a sample that is run for a plan."""
    if not SAMPLED.get():
        print(line, file=sys.stderr)


def say_figures(stage: str, found: Mapping[str, Any]) -> None:
    """`say` the figures of a finished stage."""
    say(f"{stage}: " + ", ".join(f"{name} {value}" for name, value in found.items()))


def portable(value: Any) -> Any:
    """Settings of rewards as they decide rows, on any machine: no engine, batch size, device or cache, of an absolute path its
    last part.

    Weights are told apart by the version that their reward gives.
    """
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items() if key not in _ELSEWHERE}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

"""Put items to an engine and keep every reply: `predictions.jsonl`, written block by block, resumable after any stop."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign.describing import DescribeFirst, describe, with_description
from prefalign.engines import Completion, Contrast, Engine, Request, Sampling, require
from prefalign.evals import Prediction
from prefalign.evals.processes import ALONE, Share
from prefalign.evals.reading import read_jsonl
from prefalign.evals.reliance import Variant
from prefalign.images import ImageError, sha256
from prefalign.manifest import differences, library_versions, write_atomically
from prefalign.pairing import AskedAttributes
from prefalign.progress import progress_bar
from prefalign.records import canonical_json, message_text

PREDICTIONS = "predictions.jsonl"
SETTINGS = "settings.json"


@dataclass
class Asking:
    """How replies are drawn; greedy unless a temperature is given.

    Attributes:
        max_new_tokens: longest caption.
        short_answer_tokens: longest answer to any other question.
        temperature: 0 is greedy.
        top_p: draw from the likeliest tokens that together have this probability; 1 cuts nothing.
        top_k: draw from so many of the likeliest tokens; 0 cuts nothing.
        block_size: items per block; a block is written at once, so it is what an interruption can cost.
        noise_step: step of the diffusion schedule for the condition `noise` (500 of 1000, as POVID).
        pictures: how many pictures are copied into the folder, for people to look at.
        contrast: decode against the model's own answer without the picture (M3ID), which needs no training; None: plainly.
        short_answer_offset: what counts as `contrast.offset` for short answers, about the length of a question (as published).
        describe_first: let the model describe the pictures it is shown and put that before each question (STIC's describe and
            respond); None: ask plainly. It costs one description per question.
        attributes: what a model trained on SteerLM rows is asked for with every question, and whether lines that leak into its
            replies are taken out before they are scored; None: the question as it is.
    """

    max_new_tokens: int = 512
    short_answer_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    block_size: int = 64
    noise_step: int = 500
    pictures: int = 64
    contrast: Contrast | None = None
    short_answer_offset: int = 10
    describe_first: DescribeFirst | None = None
    attributes: AskedAttributes | None = None


def ask(
    engine: Engine,
    variants: Sequence[Variant],
    folder: Path,
    asking: Asking,
    *,
    seed: int = 0,
    share: Share = ALONE,
) -> list[Prediction]:
    """Replies to all variants, in order; those already in `folder` under the same settings are not drawn again.

    Blocks lie at fixed positions of `variants`, so that a run that was killed and started again makes the same batches, and
    with them the same rounding, in one process or several. Replies that failed are tried again when the run is started again.
    Of several processes, each asks every n-th block, and the first one gets all replies; the others get none.

    Raises:
        ValueError: if the folder holds replies made with other settings, or two variants share an id.
    """
    if any(variant.gold_logprob for variant in variants):
        require(engine, ["logprobs"], "the image-reliance probe")
    if asking.contrast is not None:
        require(engine, ["contrast"], "`asking.contrast`")
    keys = [(variant.eval, variant.id) for variant in variants]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(
            f"id {twice[1]!r} is there twice in {twice[0]}; replies are joined on ids. Make them distinct."
        )
    blocks = list(_blocks(variants, asking))
    if share.is_main:
        _claim(folder, settings(engine.fingerprint, variants, asking, seed=seed))
        _join(folder, keys)
        _keep_pictures(blocks, folder, asking.pictures)
    share.wait()
    done = {(reply.eval, reply.id): reply for reply in _finished(folder / PREDICTIONS)}
    file = folder / (PREDICTIONS if share.is_main else f"{PREDICTIONS}.part{share.index}")
    own = blocks[share.index :: share.count]
    with file.open("ab") as stream:
        for block in progress_bar(own, desc="ask", unit="block", disable=not share.is_main):
            waiting = [variant for variant in block if (variant.eval, variant.id) not in done]
            if not waiting:
                continue
            replies = list(_ask_block(engine, waiting, asking, seed))
            done |= {(reply.eval, reply.id): reply for reply in replies}
            stream.write(_lines(replies))
            stream.flush()
            os.fsync(stream.fileno())
    share.wait()
    if not share.is_main:
        return []
    parts = _parts(folder)
    done |= {(reply.eval, reply.id): reply for file in parts if file.stat().st_size for reply in read_predictions(file)}
    replies = [done[key] for key in keys]
    _write(folder / PREDICTIONS, replies)
    for file in parts:
        file.unlink()
    return replies


def _parts(folder: Path) -> list[Path]:
    """What processes other than the first have written and the first has not joined yet."""
    return sorted(folder.glob(f"{PREDICTIONS}.part*"))


def _join(folder: Path, keys: Sequence[tuple[str, str]]) -> None:
    """Put all finished replies of an interrupted run into one file, in order."""
    parts = _parts(folder)
    done = {(reply.eval, reply.id): reply for file in [folder / PREDICTIONS, *parts] for reply in _finished(file)}
    _write(folder / PREDICTIONS, [done[key] for key in keys if key in done])
    for file in parts:
        file.unlink()


def settings(fingerprint: str, variants: Sequence[Variant], asking: Asking, *, seed: int) -> dict[str, Any]:
    """Everything that decides the replies: model, questions, pictures, decoding."""
    digest = hashlib.sha256()
    hashes: dict[int, str] = {}
    for variant in variants:
        for image in variant.item.images:
            if id(image) not in hashes:
                hashes[id(image)] = sha256(image)
        asked = [
            variant.eval,
            variant.id,
            variant.item.messages,
            [hashes[id(image)] for image in variant.item.images],
            variant.item.answer,
            variant.donor and variant.donor.id,
        ]
        digest.update(canonical_json(asked).encode())
    unused = {"pictures", "block_size", *(["short_answer_offset"] if asking.contrast is None else [])}
    decides = {
        key: value for key, value in dataclasses.asdict(asking).items() if key not in unused and value is not None
    }
    return {
        "fingerprint": fingerprint,
        "asked": digest.hexdigest()[:16],
        "items": len(variants),
        "seed": seed,
        **decides,
    }


def read_predictions(path: Path) -> list[Prediction]:
    """Replies from `predictions.jsonl`, or from the folder that holds it.

    Raises:
        ValueError: if there is none, or a line is cut off or not a reply.
    """
    file = path / PREDICTIONS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no replies at {file}. Give the output folder of an evaluation, or its {PREDICTIONS}.")
    return [_reply(row) for _, row in read_jsonl(file, required=("eval", "id", "group", "prompt", "text"))]


def read_settings(path: Path) -> dict[str, Any]:
    """Settings that lie beside saved replies; empty if there are none."""
    file = (path if path.is_dir() else path.parent) / SETTINGS
    return json.loads(file.read_text(encoding="utf-8"))["settings"] if file.is_file() else {}


def _ask_block(engine: Engine, block: Sequence[Variant], asking: Asking, seed: int) -> Iterator[Prediction]:
    asked: dict[int, Request] = {}
    failures: dict[int, str] = {}
    told = asking.attributes
    for number, variant in enumerate(block):
        try:
            pictures = variant.pictures(seed=seed, noise_step=asking.noise_step)
        except ImageError as error:
            failures[number] = str(error)
            continue
        messages = variant.messages() if told is None else told.asked(variant.messages())
        asked[number] = Request(id=variant.id, messages=messages, images=pictures, seed=seed)
    if asking.describe_first is not None:
        failures |= _describe_first(engine, asked, asking.describe_first, seed)
    sampling = _sampling(asking, caption=block[0].item.eval == "chair")
    answered = [number for number in asked if number not in failures]
    requests = [asked[number] for number in answered]
    completions = dict(zip(answered, engine.generate(requests, sampling), strict=True))
    scored = [position for position, number in enumerate(answered) if block[number].gold_logprob]
    golds = [block[answered[position]].item.answer or block[answered[position]].item.label or "" for position in scored]
    logprobs = engine.logprobs([requests[position] for position in scored], golds) if scored else []
    sums = {
        answered[position]: (float(values.sum()), len(values))
        for position, values in zip(scored, logprobs, strict=True)
    }
    for number, variant in enumerate(block):
        said = completions.get(number) or Completion(variant.id, "", finish_reason="error", error=failures.get(number))
        logp, tokens = sums.get(number, (math.nan, 0))
        text = said.text if told is None else told.stripped(said.text)
        yield Prediction(
            eval=variant.eval,
            id=variant.id,
            group=variant.item.group,
            prompt=message_text(asked[number].messages if number in asked else variant.item.messages),
            text=text,
            picture=_picture(variant),
            condition=variant.condition,
            shown=variant.donor.id if variant.donor else "",
            n_tokens=len(said.token_ids),
            finish_reason=said.finish_reason,
            error=said.error,
            logp=None if math.isnan(logp) else logp,
            logp_tokens=None if math.isnan(logp) else tokens,
            unstripped=said.text if text != said.text else None,
        )


def _sampling(asking: Asking, *, caption: bool) -> Sampling:
    contrast = asking.contrast
    if contrast is not None and not caption:
        contrast = dataclasses.replace(contrast, offset=asking.short_answer_offset)
    return Sampling(
        max_new_tokens=asking.max_new_tokens if caption else asking.short_answer_tokens,
        temperature=asking.temperature,
        top_p=asking.top_p,
        top_k=asking.top_k,
        contrast=contrast,
    )


def _describe_first(engine: Engine, asked: Mapping[int, Request], first: DescribeFirst, seed: int) -> dict[int, str]:
    """Put descriptions of the pictures shown into the requests that show any; gives why some have none."""
    rows = {number: (request.id, request.images) for number, request in asked.items() if request.images}
    said = describe(engine, list(rows.values()), first.prompts, first.sampling, seed=seed)
    failures = {}
    for number, description in zip(rows, said, strict=True):
        if description.error is not None:
            failures[number] = description.error
        else:
            asked[number].messages = with_description(asked[number].messages, description.text, first.template)
    return failures


def _picture(variant: Variant) -> str:
    """Name of the copy of the item's first picture, of which the first `asking.pictures` are made."""
    if not variant.item.images:
        return ""
    image = variant.item.images[0]
    return f"pictures/{sha256(image)[:16]}{Path(image['path'] or 'picture').suffix or '.png'}"


def _keep_pictures(blocks: Sequence[Sequence[Variant]], folder: Path, most: int) -> None:
    there = {f"pictures/{file.name}" for file in (folder / "pictures").glob("*")}
    for variant in (variant for block in blocks for variant in block):
        if len(there) >= most:
            return
        name = _picture(variant)
        if name and name not in there:
            write_atomically(folder / name, variant.item.images[0]["bytes"])
            there.add(name)


def _blocks(variants: Sequence[Variant], asking: Asking) -> Iterator[list[Variant]]:
    """Blocks of captions and blocks of short answers, in order."""
    for captions in (True, False):
        rows = [variant for variant in variants if (variant.item.eval == "chair") == captions]
        for start in range(0, len(rows), asking.block_size):
            yield rows[start : start + asking.block_size]


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    before = read_settings(folder)
    if before and before != identity:
        changed = "; ".join(differences(before, identity))
        raise ValueError(
            f"{folder} holds replies made with other settings ({changed}). Mixing them would compare two things at once: give "
            "another `output`, or delete the folder."
        )
    content = {"settings": dict(identity), "libraries": library_versions()}
    write_atomically(folder / SETTINGS, json.dumps(content, indent=2).encode())


def _finished(file: Path) -> Iterator[Prediction]:
    """Whole lines of an interrupted run, without those that failed."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            reply = _reply(json.loads(line))
        except (json.JSONDecodeError, TypeError, AttributeError):
            continue
        if reply.error is None and reply.finish_reason != "error":
            yield reply


def _reply(row: Mapping[str, Any]) -> Prediction:
    """Unknown keys are left out, so that a file with more columns can be scored."""
    names = {entry.name for entry in dataclasses.fields(Prediction)}
    return Prediction(**{key: value for key, value in row.items() if key in names})


def _write(file: Path, replies: Sequence[Prediction]) -> None:
    write_atomically(file, _lines(replies))


def _lines(replies: Sequence[Prediction]) -> bytes:
    rows = [dataclasses.asdict(reply) for reply in replies]
    for row in rows:
        if row["unstripped"] is None:
            del row["unstripped"]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

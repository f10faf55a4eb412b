"""Filter pairs: drop what teaches nothing or the wrong thing, count every reason, leave the rest as it is.

`prefalign.filtering` lists the filters, their order and the words they are counted under; each is off unless its section is
given.

The verifier (`text_only`, `weak_evidence`, `claims_not_worse`) never sees facts: log-probs with and without the picture and
replies to questions about it are all it has (`prefalign.evidence`). Of several pictures it is shown the target alone, where the
stage that made the pair names one.

Sources: length balance and claims put as questions after RLAIF-V (arXiv 2405.17220; there an LLM writes the questions);
"preferred without the picture" after mDPO's language-only preference (arXiv 2406.11839). The evidence margin is ours.

How: the first pass measures every pair without a model, the second scores what is left block by block, then all decisions are
taken at once from numbers in memory. Both passes are kept in `survey/` of the output, so a killed run goes on where it was.

Needs: pairs (a stage's folder, TRL's or RLAIF-V's columns); a model for `reliance`, `evidence` and `claims` only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefalign import sources, stages, store
from prefalign.duplicates import PictureList, listed, picture_key, read_picture_lists
from prefalign.engines import Engine
from prefalign.engines.config import EngineConfig
from prefalign.evidence import Judged, Without, judge, on_target, unsupported_claims
from prefalign.filtering import Filters, Measured, decide, decide_unscored, summary
from prefalign.images import ImageError
from prefalign.manifest import Manifest, write_atomically
from prefalign.records import Pair, RecordError, canonical_json, message_text
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.surveys import Survey
from prefalign.text import normalised, same_answer

if TYPE_CHECKING:
    from PIL import Image

METHOD = "filter_pairs"


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: pairs.
        output: folder of pairs.
        filters: which filters are asked, and their settings.
        model: the verifier, normally the model that will be trained; only for `reliance`, `evidence`, `claims`.
        without: what stands for no usable picture.
        batch_size: sequences per forward pass.
        seed: with a pair's id it decides the noise of `without: noise`.
    """

    data: DataConfig
    output: OutputConfig
    filters: Filters
    model: EngineConfig | None = None
    without: Without = "blank"
    batch_size: int = 16
    seed: int = 0


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    sources.files_of(config.data)
    engine = load_verifier(config)
    gate = config.filters.contamination
    known = PictureList()
    if gate is not None:
        known = read_picture_lists(gate.lists, names=gate.names, perceptual=gate.max_distance >= 0)
    decisions = functools.cache(lambda: decide_all(config, engine, known))
    return store.run_stage(
        METHOD,
        config.data,
        lambda block: [outcome(pair, *decisions()[pair.id]) for pair in block],
        output=config.output,
        record=Pair,
        settings=row_settings(config, known),
        seed=config.seed,
        models={"verifier": engine.fingerprint} if engine is not None else {},
        reads=Pair,
    )


def load_verifier(config: Config) -> Engine | None:
    """The engine that a config asks for, or None.

    Raises:
        ValueError: if a filter needs a model and none is named.
    """
    if not config.filters.score:
        return None
    if config.model is None:
        raise ValueError(
            "filters.reliance, filters.evidence and filters.claims score pairs with a model, and no model is named. Set "
            "model.model_name_or_path, or leave these sections out."
        )
    from prefalign.engines.loading import load_engine

    needs = ["logprobs", *(["image_mask"] if config.without == "hidden" else [])]
    return load_engine(config.model, batch_size=config.batch_size, needs=needs, stage=METHOD)


def row_settings(config: Config, known: PictureList) -> dict[str, Any]:
    """The settings that change rows; lists of pictures by their content."""
    settings = {name: value for name, value in dataclasses.asdict(config.filters).items() if value is not None}
    if "contamination" in settings:
        settings["contamination"]["lists"] = known.fingerprint
    return {**settings, **({"without": config.without} if config.filters.score else {})}


def outcome(pair: Pair, found: Measured, reason: str | None) -> Outcome:
    """The pair with what was measured, or why it goes."""
    if found.verdict is not None and found.verdict[1] is not None:
        return Failed(found.verdict[0], found.verdict[1])
    if reason is not None:
        return Dropped(reason)
    values = {"similarity": found.similarity, "length_difference": found.difference, "text_preference": found.text_preference,
              "evidence_margin": found.evidence, "claims_margin": found.claims}  # fmt: skip
    return [dataclasses.replace(pair, meta={**pair.meta, "filters": values})]


def decide_all(config: Config, engine: Engine | None, known: PictureList) -> dict[str, tuple[Measured, str | None]]:
    """Measure all pairs, score what is left of them, decide. Gives each pair's id its measures and its reason to go, if any.

    Raises:
        ValueError: for benchmark pictures, where they stop the run.
    """
    total, repeated = sources.survey(config.data)
    survey = Survey(METHOD, config.data, config.output, Pair, total, repeated)
    rows = measure(config, known, survey)
    reasons = decide_unscored(rows, config.filters)
    overlap = [row.id for row, reason in zip(rows, reasons, strict=True) if reason == "benchmark_picture"]
    if overlap and config.filters.contamination is not None and config.filters.contamination.on_overlap == "stop":
        raise ValueError(
            f"{len(overlap)} of {len(rows)} pairs show a benchmark picture (first: {', '.join(overlap[:3])}); trained on them, "
            "the benchmark's figure says nothing. Take them out of the data, or set filters.contamination.on_overlap to drop."
        )
    if engine is not None:
        left = {row.id for row, reason in zip(rows, reasons, strict=True) if reason is None and row.verdict is None}
        score(rows, left, config, engine, survey)
    reasons = decide(rows, config.filters, reasons)
    write_atomically(config.output.path / "filters.json", json.dumps(summary(rows, reasons), indent=2).encode())
    return {row.id: (row, reason) for row, reason in zip(rows, reasons, strict=True)}


def measure(config: Config, known: PictureList, survey: Survey) -> list[Measured]:
    """Every pair measured without a model, in input order; of one id the first."""
    seen: set[str] = set()
    rows = []
    for block in survey("rows", lambda pairs: _measure_block(pairs, config, known)):
        for values in block:
            if values["id"] not in seen:
                seen.add(values["id"])
                values["pictures"] = [tuple(picture) for picture in values["pictures"]]
                rows.append(Measured(**values))
    return rows


def _measure_block(pairs: list[Pair], config: Config, known: PictureList) -> list[dict[str, Any]]:
    from rapidfuzz.fuzz import ratio

    gate, perceptual = config.filters.contamination, config.filters.perceptual
    unit = config.filters.length.unit if config.filters.length is not None else "words"
    rows, keys, owners = [], [], []
    for number, pair in enumerate(pairs):
        row = Measured(pair.id, margin=pair.margin)
        chosen, rejected = message_text(pair.chosen), message_text(pair.rejected)
        if not _one_text(pair):
            row.similarity = round(ratio(normalised(chosen), normalised(rejected)) / 100, 4)
        lengths = [len(text.split() if unit == "words" else text) for text in (chosen, rejected)]
        row.difference, row.ratio = lengths[0] - lengths[1], max(lengths) / max(1, min(lengths))
        said = [pair.prompt, normalised(chosen), normalised(rejected)]
        row.text = hashlib.sha256(canonical_json(said).encode()).hexdigest()[:16]
        try:
            pair.check()
            shown = [picture_key(image, perceptual=perceptual) for image in (*pair.images, *pair.rejected_images)]
        except ImageError as error:
            row.verdict = (error.reason, str(error))
        except RecordError as error:
            row.verdict = (error.reason, None)
        else:
            row.pictures, row.images = [(key.digest[:16], key.hash) for key in shown], len(pair.images)
            keys += shown
            owners += [number] * len(shown)
        rows.append(row)
    if gate is not None:
        for number, found in zip(
            owners, listed(keys, known, names=gate.names, max_distance=max(0, gate.max_distance)), strict=True
        ):
            rows[number].benchmark |= found
    return [dataclasses.asdict(row) for row in rows]


def score(rows: list[Measured], left: set[str], config: Config, engine: Engine, survey: Survey) -> None:
    """Fill in the verifier's numbers of the pairs named in `left`, block by block."""
    by_id = {row.id: row for row in rows}
    waiting = set(left)

    def work(pairs: list[Pair]) -> list[dict[str, Any]]:
        fresh = {pair.id: pair for pair in pairs if pair.id in waiting}
        return _score_block(list(fresh.values()), config, engine)

    for block in survey("scores", work):
        for values in block:
            waiting.discard(values["id"])
            row = by_id[values["id"]]
            row.text_preference, row.evidence = values["text_preference"], values["evidence"]
            row.claims = values["claims"]
            row.verdict = row.verdict or (tuple(values["verdict"]) if values["verdict"] else None)


def _score_block(pairs: list[Pair], config: Config, engine: Engine) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    ready: list[tuple[Pair, list[Image.Image], list[Image.Image]]] = []
    for pair in map(on_target, pairs):
        images, others = stages.opened(pair.images), stages.opened(pair.rejected_images)
        if isinstance(images, Failed) or isinstance(others, Failed):
            failed = images if isinstance(images, Failed) else others
            assert isinstance(failed, Failed)
            found.append(_scores(pair, verdict=(failed.reason, failed.message)))
        elif not images:
            found.append(_scores(pair, verdict=("no_picture", None)))
        elif pair.on_two_pictures:  # the verifier reads both answers on `images`
            found.append(_scores(pair, verdict=("two_pictures", None)))
        else:
            ready.append((pair, images, others))
    reliance, evidence, claims = config.filters.reliance, config.filters.evidence, config.filters.claims
    judged: list[Judged | None] = [None] * len(ready)
    if reliance is not None or evidence is not None:
        judged = [*judge(engine, ready, without=config.without, seed=config.seed)]
    counted: list[tuple[float, float] | None] = [(0.0, 0.0)] * len(ready)
    if claims is not None:
        counted = unsupported_claims(engine, [(pair, images) for pair, images, _ in ready], claims)
    for (pair, _, _), values, counts in zip(ready, judged, counted, strict=True):
        if counts is None or (values is not None and not values.complete):
            message = (
                f"pair {pair.id} cannot be put to the verifier: a text holds the model's image mark, or prompt and answer are "
                "longer than its context. Shorten or drop it, or take another verifier."
            )
            found.append(_scores(pair, verdict=("not_scored", message)))
            continue
        scores = _scores(pair)
        if values is not None:
            preference = values.text_preference(reliance.average if reliance is not None else "token")
            scores["text_preference"] = None if preference is None else round(preference, 4)
            scores["evidence"] = round(
                values.evidence_margin(evidence.prior_weight if evidence is not None else 1.0), 4
            )
        if claims is not None and not _one_text(pair):
            scores["claims"] = round(counts[1] - counts[0], 4)
        found.append(scores)
    return found


def _scores(pair: Pair, verdict: tuple[str, str | None] | None = None) -> dict[str, Any]:
    return {"id": pair.id, "verdict": verdict, "text_preference": None, "evidence": None, "claims": None}


def _one_text(pair: Pair) -> bool:
    """Whether a pair is one of pictures: the same text on two of them."""
    return bool(pair.rejected_images) and same_answer(message_text(pair.chosen), message_text(pair.rejected))


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

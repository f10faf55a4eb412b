"""Re-Align: the rejected answer is the true one with its content filled in again from a similar picture, which comes along.

1. The words of the chosen answer that say what the picture holds are masked. 2. The most similar other pictures of the data are
found. 3. From the nearest on, the generator fills the gaps while it looks at the neighbour; the first completion that is less
similar to the chosen answer than a threshold is the rejected answer, and its neighbour the rejected picture. Both answers are
conditioned on the row's own picture; rDPO pairs the chosen one with the neighbour too (`rejected_images`).

Paper: Xing, Li, Wang et al., "Re-Align: Aligning Vision Language Models via Retrieval-Augmented Direct Preference Optimization",
arXiv 2502.13146, sections 3.1, 4.1 and appendix A. No code for this part was released.

Departures: the paper's algorithm 1 accepts a completion when its similarity is at least the threshold, and stores the k-th
picture; both contradict section 3.1 and are not offered. The generator is the model to be aligned (the paper is of two minds).
Short answers are accepted when they differ, since their similarity says little. The default similarity is `lexical`, which counts
words, in place of the paper's sentence embedder, so the same threshold means something else. Near-duplicates of the picture are
passed over, and a floor on picture similarity can be set. Gaps are filled by forced starts (`spans`), which every model can do,
or by request (`instruct`). Of a row with several pictures the first one is the query and is exchanged; the others stay.

Needs: rows with pictures (and reference answers, unless `chosen: engine`); a generator that can be given the start of its answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefalign import sources, stages, store
from prefalign.embeddings import EmbedderConfig
from prefalign.engines import Engine, Request, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.filling import Completed, fill_by_request, fill_gaps, unusable
from prefalign.gaps import Span, masked_text
from prefalign.guided import Item
from prefalign.images import open_image, sha256
from prefalign.manifest import Manifest
from prefalign.masking import EngineMasker, Masker, MaskingConfig, RuleMasker
from prefalign.pictures import build_pool
from prefalign.records import Pair, Prompt
from prefalign.retrieval import Neighbour, PictureIndex, RetrievalConfig, build_index
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import Similarity, load_similarity, same_answer

if TYPE_CHECKING:
    from PIL import Image

METHOD = "re_align"


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        model: the generator, normally the model that will be trained; it fills the gaps.
        data: rows with pictures and reference answers; their pictures are the pool of neighbours.
        output: folder of pairs; the pool and its embeddings are kept in `pool/` there.
        chosen: `reference` takes the row's answer (published: a stronger model's); `engine` has the generator answer.
        masking: what is masked and how.
        masker: the model that masks, for `masking.masker: engine`; None: the generator.
        chosen_sampling: how the generator's answers are drawn, for `chosen: engine`.
        mask_sampling: how a model's masks are drawn, for `masking.masker: engine`.
        embedder: what pictures are compared by.
        retrieval: which pictures count as neighbours.
        completion: `spans` forces the words that stay and lets the generator write on at each gap, one call per gap and rank;
            `instruct` shows it the masked answer and asks for all of it, one call per rank.
        max_edits: share of the unmasked words that a completion by `instruct` may have changed; they are put back.
        threshold: tau, a completion less similar to the chosen answer than this is accepted.
        short_words: answers of up to so many words are accepted when they differ at all.
        similarity: `lexical`, or a sentence-transformers model such as the published `all-mpnet-base-v2`. It counts by its name
            alone, without a fingerprint: new weights under an old name are not noticed when a folder is taken up again.
        sampling: how completions are drawn; `max_new_tokens` bounds a gap (`spans`) or the answer (`instruct`).
        batch_size: sequences per forward pass.
        seed: with a row's id it decides all draws.
    """

    model: EngineConfig
    data: DataConfig
    output: OutputConfig
    chosen: Literal["reference", "engine"] = "reference"
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    masker: EngineConfig | None = None
    chosen_sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=512, temperature=0.0))
    mask_sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=512, temperature=0.0))
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    completion: Literal["spans", "instruct"] = "spans"
    max_edits: float = 0.1
    threshold: float = 0.95
    short_words: int = 3
    similarity: str = "lexical"
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=64))
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold {self.threshold} is the cosine similarity below which a completion is accepted; outside (0, 1] "
                "all or none would be. Give 0.95, as published."
            )
        if not 0 <= self.max_edits < 1:
            raise ValueError(
                f"max_edits {self.max_edits} is the share of unmasked words that a completion may change: give a value from 0 "
                "to below 1 (0.1)."
            )


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.embeddings import check_embedder, load_embedder
    from prefalign.engines.loading import check_engine, load_engine

    sources.files_of(config.data)
    check_embedder(config.embedder)
    if config.masking.masker == "engine" and config.masker is not None:
        check_engine(config.masker, stage="Re-Align")
    similarity = load_similarity(config.similarity)
    needs = ["sample", *(["prefix"] if config.completion == "spans" else [])]
    engine = load_engine(config.model, batch_size=config.batch_size, needs=needs, stage="Re-Align")
    embedder = load_embedder(config.embedder, engine)
    masker: Masker = RuleMasker(config.masking)
    if config.masking.masker == "engine":
        other = engine if config.masker is None else load_engine(config.masker, batch_size=config.batch_size)
        masker = EngineMasker(other, config.mask_sampling, config.masking, seed=config.seed)
    models = {"generator": engine.fingerprint, "embedder": embedder.fingerprint, "masker": masker.fingerprint}

    @functools.cache
    def index() -> PictureIndex:
        pool = build_pool(config.output.path / "pool", config.data)
        return build_index(config.output.path / "pool" / "embeddings", pool, embedder)

    return store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, Tools(engine, masker, similarity, index, models), config),
        output=config.output,
        record=Pair,
        settings=row_settings(config),
        seed=config.seed,
        models=models,
    )


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows: of those that only one way of masking or filling reads, the ones that are read."""
    names = ["chosen", "masking", "retrieval", "completion", "threshold", "short_words", "similarity", "sampling"]
    names += ["chosen_sampling"] * (config.chosen == "engine")
    names += ["mask_sampling"] * (config.masking.masker == "engine")
    names += ["max_edits"] * (config.completion == "instruct")
    every = dataclasses.asdict(config)
    unread = ["words", "vocabulary"] if config.masking.masker == "engine" else []
    unread += ["vocabulary"] * (config.masking.words == "general")
    every["masking"] = {name: value for name, value in every["masking"].items() if name not in unread}
    return {name: every[name] for name in names}


@dataclass
class Tools:
    """What `process` works with; `models` are their fingerprints by name, `index` is built when first asked for."""

    engine: Engine
    masker: Masker
    similarity: Similarity
    index: Callable[[], PictureIndex]
    models: dict[str, str]


@dataclass
class Attempt:
    """A row on its way.

    Attributes:
        item: question, own pictures and chosen answer.
        spans: what of the answer is masked.
        neighbours: pictures to look at, nearest first.
        rank: number of the neighbour tried last, from 1.
        completed: the answer filled in at that rank.
        similarity: of that to the chosen answer.
        reason: why there is no pair (so far); None as long as there may be one.
        message: what belongs to the reason where the row has failed.
    """

    prompt: Prompt
    item: Item
    spans: list[Span] = field(default_factory=list)
    neighbours: list[Neighbour] = field(default_factory=list)
    rank: int = 0
    completed: Completed = field(default_factory=Completed)
    similarity: float = 1.0
    reason: str | None = None
    message: str | None = None


def process(block: list[Prompt], tools: Tools, config: Config) -> list[Outcome]:
    """One outcome for each prompt of a block; at each step all rows still open go to the engine together."""

    def work(rows: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        attempts = [
            Attempt(prompt, Item(prompt.id, prompt.messages, images, str(prompt.answer))) for prompt, images in rows
        ]
        if config.chosen == "engine":
            _answer(attempts, tools.engine, config)
        _mask(_open(attempts), tools.masker)
        _find_neighbours(_open(attempts), tools.index(), config.retrieval)
        _try_neighbours(_open(attempts), tools, config)
        return [_outcome(attempt, tools, config) for attempt in attempts]

    return stages.in_order(block, lambda prompt: stages.usable(prompt, answer=config.chosen == "reference"), work)


def _open(attempts: Sequence[Attempt]) -> list[Attempt]:
    return [attempt for attempt in attempts if attempt.reason is None]


def _answer(attempts: list[Attempt], engine: Engine, config: Config) -> None:
    """The generator's own answers to the rows' pictures as chosen ones."""
    requests = [
        Request(f"{attempt.item.id}/chosen", attempt.item.messages, attempt.item.images, seed=config.seed)
        for attempt in attempts
    ]
    for attempt, completion in zip(attempts, engine.generate(requests, config.chosen_sampling), strict=True):
        attempt.item.answer = completion.text.strip()
        if completion.error is not None:
            attempt.reason, attempt.message = "generation_failed", completion.error
        elif completion.finish_reason == "length":
            attempt.reason = "chosen_cut_off"
        elif not attempt.item.answer:
            attempt.reason = "empty_chosen"


def _mask(attempts: list[Attempt], masker: Masker) -> None:
    for attempt, masked in zip(attempts, masker.mask([attempt.item for attempt in attempts]), strict=True):
        attempt.spans, attempt.reason = masked.spans, masked.refused
        if masked.refused == "masker_failed":
            attempt.message = masked.message


def _find_neighbours(attempts: list[Attempt], index: PictureIndex, config: RetrievalConfig) -> None:
    """The neighbours of each row's first picture, none of the row's own among them."""
    queries: list[tuple[Attempt, list[int]]] = []
    for attempt in attempts:
        numbers = [index.pool.number_of(image) for image in attempt.prompt.images]
        known = [number for number in numbers if number is not None]
        if len(known) == len(numbers):
            queries.append((attempt, known))
        else:
            attempt.reason = "picture_not_in_pool"
            attempt.message = (
                "a picture of this row is not in the pool of the data's pictures, so it was exchanged after the pool was built "
                "and neighbours would be those of the old one. Start anew with another `output.path`."
            )
    found = index.neighbours([own[0] for _, own in queries], config, exclude=[own for _, own in queries])
    for (attempt, _), neighbours in zip(queries, found, strict=True):
        attempt.neighbours = neighbours
        attempt.reason = None if neighbours else "no_neighbour"


def _try_neighbours(attempts: list[Attempt], tools: Tools, config: Config) -> None:
    """Section 3.1: from the nearest neighbour on, until a completion is accepted. `reason` is what the last one failed by."""
    waiting = attempts
    for rank in range(1, config.retrieval.k + 1):
        waiting = [attempt for attempt in waiting if rank <= len(attempt.neighbours)]
        items = []
        for attempt in waiting:
            attempt.rank = rank
            picture = open_image(tools.index().pool[attempt.neighbours[rank - 1].number])
            shown = [picture, *attempt.item.images[1:]]
            items.append(dataclasses.replace(attempt.item, id=f"{attempt.item.id}/{rank}", images=shown))
        completed = _complete(items, [attempt.spans for attempt in waiting], tools.engine, config)
        similarities = (
            tools.similarity([item.answer for item in items], [one.text for one in completed]) if items else []
        )
        for attempt, one, similarity in zip(waiting, completed, similarities, strict=True):
            attempt.completed, attempt.similarity, attempt.message = one, similarity, one.message
            attempt.reason = one.refused or _refusal(attempt, config)
        waiting = [attempt for attempt in waiting if attempt.reason is not None]


def _complete(items: list[Item], spans: list[list[Span]], engine: Engine, config: Config) -> list[Completed]:
    if config.completion == "spans":
        return fill_gaps(engine, items, spans, config.sampling, seed=config.seed)
    return fill_by_request(engine, items, spans, config.sampling, marker=config.masking.marker,
                           max_edits=config.max_edits, seed=config.seed)  # fmt: skip


def _refusal(attempt: Attempt, config: Config) -> str | None:
    """Why a completion is not accepted: what no answer may be, the same answer, or one too similar; None if it is."""
    answer, text = attempt.item.answer, attempt.completed.text
    if (reason := unusable(text, answer, config.masking.marker)) is not None:
        return reason
    if same_answer(answer, text):
        return "identical_answers"
    short = len(answer.split()) <= config.short_words
    return None if short or attempt.similarity < config.threshold else "too_similar"


def _outcome(attempt: Attempt, tools: Tools, config: Config) -> Outcome:
    if attempt.reason is not None:
        return Failed(attempt.reason, attempt.message) if attempt.message else Dropped(attempt.reason)
    neighbour = attempt.neighbours[attempt.rank - 1]
    picture = tools.index().pool[neighbour.number]
    meta = {
        "retrieval_rank": attempt.rank,
        "image_similarity": neighbour.similarity,
        "neighbour_sha256": sha256(picture),
        "masked_response": masked_text(attempt.item.answer, attempt.spans, config.masking.marker),
        "masking_level": config.masking.level,
        "fills": attempt.completed.fills,
        "fills_cut": attempt.completed.cut,
        "text_similarity": round(attempt.similarity, 6),
        "embedder": tools.models["embedder"],
        "masker": tools.models["masker"],
    }
    return [
        stages.make_pair(attempt.prompt, method=METHOD, chosen=attempt.item.answer, rejected=attempt.completed.text,
                         settings={**row_settings(config), "models": tools.models}, seed=config.seed,
                         model=tools.models["generator"], meta=meta,
                         rejected_images=[picture, *attempt.prompt.images[1:]])
    ]  # fmt: skip


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

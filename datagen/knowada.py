"""KnowAda: captions that say no more than the model to be trained knows of their pictures.

Questions are written about each dense caption and put to the model; what it answers wrongly nearly every time is unknown to it
and is taken out of the caption. `produce: examples` writes the adapted captions for SFT. `produce: pairs` (not in the paper)
prefers them to a caption of the model's own that says something false, or for a small share to the caption as it was.

Paper: Yanuka, Ben-Kish, Bitton, Szpektor, Giryes, "Bridging the Visual Gap: Fine-Tuning Multimodal Models with Knowledge-Adapted
Captions", NAACL 2025, arXiv 2411.09018. Code: moranyanuka/KnowAda.
Differs from the released code: a grade that cannot be read is missing, not wrong; a request that fails fails its own row;
rewrites are checked and refused rather than replaced by another picture's; no generic question stands in for none.

Needs: rows with pictures and dense captions as their answers; the model to be trained, which samples; `annotator: engine` needs
an LLM, `annotator: rules` (embedded world) none.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefalign import knowledge, sources, stages, store
from prefalign.contradictions import Chosen, Rejected, RejectedConfig, rejected_captions
from prefalign.engines import Engine, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.knowledge import Annotator, Captioned, Probe, Probing, Reply
from prefalign.manifest import Manifest
from prefalign.records import Example, Pair, Prompt, assistant_message
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig

if TYPE_CHECKING:
    from PIL import Image

METHOD = "knowada"
FIGURES = "knowledge.json"


@dataclass
class ProbeSampling(Sampling):
    """How answers to probing questions are drawn, as in the released config."""

    max_new_tokens: int = 100
    temperature: float = 0.4


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        model: the model to be trained, whose knowledge is probed.
        data: rows with pictures and captions.
        output: folder of examples or of pairs.
        annotator: `engine`: an LLM writes questions, judges answers and rewrites captions; `rules`: the embedded world's.
        llm: the LLM; where it equals `model` it is loaded once.
        cache: file that keeps the LLM's judgements by caption, question and answer.
        max_new_tokens: longest reply of the LLM but for judgements.
        produce: `examples` or `pairs`.
        num_generations: answers to each question.
        sampling: how they are drawn.
        threshold: wrong answers of `num_generations` from which a question is unknown; lower removes more.
        least_judged: judged answers that a question needs; with fewer it is neither known nor unknown, and stays.
        least_words: share of its words that a caption has to keep.
        allowed_words: words that a rewrite may add, such as "something"; the LLM is told them.
        rejected: rejected answers (`pairs`).
        batch_size: sequences per forward pass.
        seed: with a row's id it decides every draw.
    """

    model: EngineConfig
    data: DataConfig
    output: OutputConfig
    annotator: Literal["engine", "rules"] = "engine"
    llm: EngineConfig | None = None
    cache: Path | None = None
    max_new_tokens: int = 1024
    produce: Literal["examples", "pairs"] = "examples"
    num_generations: int = 10
    sampling: ProbeSampling = field(default_factory=ProbeSampling)
    threshold: int = 8
    least_judged: int = 5
    least_words: float = 0.3
    allowed_words: list[str] = field(default_factory=lambda: ["object", "something", "someone", "thing"])
    rejected: RejectedConfig = field(default_factory=RejectedConfig)
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.annotator == "engine" and self.llm is None:
            raise ValueError(
                "annotator is `engine`, and no LLM is named to write questions and judge answers. Set llm.model_name_or_path "
                "(and llm.engine for a server), or annotator to `rules` for the embedded world."
            )
        if not 1 <= self.threshold <= self.num_generations:
            raise ValueError(
                f"threshold is {self.threshold} of {self.num_generations} answers, so every question would be unknown or none. "
                "Give 1 up to num_generations (8 of 10, as released)."
            )
        if not 1 <= self.least_judged <= self.num_generations:
            raise ValueError(
                f"least_judged is {self.least_judged} of {self.num_generations} answers; give 1 up to num_generations (5)."
            )
        if self.num_generations > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"sampling.temperature is 0, so all {self.num_generations} answers to a question would be the same greedy one. "
                "Raise it (0.4, as released), or set num_generations, threshold and least_judged to 1."
            )
        if not 0 <= self.least_words < 1:
            raise ValueError(f"least_words is {self.least_words}; it is a share of a caption's words below 1 (0.3).")


@dataclass
class Adapted:
    """A row on its way: its questions and their probes, the caption it got, and `outcome` if it came to an end before that."""

    prompt: Prompt
    images: list[Image.Image]
    questions: list[str] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    caption: str = ""
    outcome: Dropped | Failed | None = None

    @property
    def captioned(self) -> Captioned:
        """The caption as the row has it."""
        return Captioned(self.prompt.id, str(self.prompt.answer).strip(), self.prompt.facts)

    @property
    def unknown(self) -> list[str]:
        """The questions that the model cannot answer."""
        return [probe.question for probe in self.probes if probe.unknown]


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.engines.loading import check_engine, load_engine

    sources.files_of(config.data)
    if config.annotator == "engine" and config.llm is not None:
        check_engine(config.llm, stage=METHOD)
    engine = load_engine(config.model, batch_size=config.batch_size, needs=["sample"], stage=METHOD)
    annotator = load_annotator(config, engine)
    manifest = store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, engine, annotator, config),
        output=config.output,
        record=Pair if config.produce == "pairs" else Example,
        settings=row_settings(config),
        seed=config.seed,
        models={"generator": engine.fingerprint, "annotator": annotator.fingerprint},
    )
    found = stages.write_figures(config.output.path, FIGURES, lambda: figures(config.output.path))
    stages.say_figures(METHOD, found)
    return manifest


def load_annotator(config: Config, engine: Engine) -> Annotator:
    """The annotator that a config asks for; `engine` itself where the LLM is the model that is probed."""
    if config.annotator == "rules" or config.llm is None:
        from prefalign.scenes.probing import SceneAnnotator

        return SceneAnnotator()
    from prefalign.caption_annotator import EngineAnnotator

    if config.llm != config.model:
        from prefalign.engines.loading import load_engine

        engine = load_engine(config.llm, batch_size=config.batch_size, stage=METHOD)
    return EngineAnnotator(engine, cache=config.cache, max_new_tokens=config.max_new_tokens,
                           allowed_words=config.allowed_words, seed=config.seed)  # fmt: skip


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows."""
    names = ["annotator", "produce", "num_generations", "sampling", "threshold", "least_judged", "least_words",
             "allowed_words"]  # fmt: skip
    names += ["max_new_tokens"] if config.annotator == "engine" else []
    names += ["rejected"] if config.produce == "pairs" else []
    known = dataclasses.asdict(config)
    return {name: known[name] for name in names}


def process(block: list[Prompt], engine: Engine, annotator: Annotator, config: Config) -> list[Outcome]:
    """One outcome for each row of a block; each step asks for all rows together."""

    def work(given: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        rows = [Adapted(prompt, images) for prompt, images in given]
        write_questions(rows, annotator)
        probe(rows, engine, annotator, config)
        adapt(rows, annotator, config)
        rejected = reject(rows, engine, annotator, config) if config.produce == "pairs" else {}
        return [_outcome(row, rejected.get(row.prompt.id), engine, annotator, config) for row in rows]

    return stages.in_order(block, stages.usable, work)


def write_questions(rows: Sequence[Adapted], annotator: Annotator) -> None:
    """Have questions written about each caption."""
    for row, found in zip(rows, annotator.questions([row.captioned for row in rows]), strict=True):
        if isinstance(found, Reply):
            row.outcome = _ended(found)
        elif not found:
            row.outcome = Dropped("no_questions")
        else:
            row.questions = found


def probe(rows: Sequence[Adapted], engine: Engine, annotator: Annotator, config: Config) -> None:
    """Tell what the model does not know."""
    how = Probing(config.num_generations, config.sampling, config.threshold, config.least_judged)
    open_rows = [row for row in rows if row.outcome is None]
    asked = [(row.captioned, row.images, row.questions) for row in open_rows]
    probed = knowledge.probe(engine, annotator, asked, how, seed=config.seed)
    for row, found in zip(open_rows, probed, strict=True):
        if isinstance(found, Reply):
            row.outcome = _ended(found)
            continue
        row.probes = found
        if all(one.unknown is None for one in row.probes):
            row.outcome = Failed("unjudged", _too_few(row.probes, config.least_judged))


def _too_few(probes: Sequence[Probe], least: int) -> str:
    answers = [answer for one in probes for answer in one.answers]
    missing = sum(score is None for one in probes for score in one.scores)
    return (
        f"no question has {least} answers with a grade: of {len(answers)} answers {missing} have no readable one. Does the LLM "
        "reply with 1, 2 or 3?"
    )


def adapt(rows: Sequence[Adapted], annotator: Annotator, config: Config) -> None:
    """Take what is unknown out of the captions, and check what came of it; without anything unknown a caption stays."""
    open_rows = [row for row in rows if row.outcome is None]
    for row in open_rows:
        row.caption = row.captioned.caption
    changed = [row for row in open_rows if row.unknown]
    for row, reply in zip(changed, annotator.rewrite([(row.captioned, row.unknown) for row in changed]), strict=True):
        row.caption = reply.text.strip()
        problem = knowledge.rewrite_problem(
            row.captioned.caption, row.caption, least_words=config.least_words, allowed=config.allowed_words
        )
        row.outcome = _ended(reply) if reply.refused else Dropped(problem) if problem else None
    checked = [row for row in changed if row.outcome is None]
    asked = [(row.caption, question) for row in checked for question in row.unknown]
    verdicts = iter(annotator.answerable(asked) if asked else [])
    for row in checked:
        found = [next(verdicts) for _ in row.unknown]
        if True in found:
            row.outcome = Dropped("still_answerable")
        elif lost := next((one for one in found if isinstance(one, Reply)), None):
            row.outcome = _ended(lost)
        elif None in found:
            row.outcome = Failed(
                "unchecked_rewrite", "whether the rewrite still answers a question got neither yes nor no."
            )


def reject(
    rows: Sequence[Adapted], engine: Engine, annotator: Annotator, config: Config
) -> dict[str, Rejected | Reply | None]:
    """What is rejected beside the adapted captions, by row id."""
    open_rows = [row for row in rows if row.outcome is None]
    chosen = [Chosen(row.captioned, row.caption, row.prompt.messages, row.images) for row in open_rows]
    found = rejected_captions(chosen, engine, annotator, config.rejected, seed=config.seed)
    return {row.prompt.id: one for row, one in zip(open_rows, found, strict=True)}


def _ended(reply: Reply) -> Dropped | Failed:
    if reply.refused == "generation_failed":
        return Failed(reply.refused, reply.message)
    return Dropped(str(reply.refused))


def _outcome(
    row: Adapted, rejected: Rejected | Reply | None, engine: Engine, annotator: Annotator, config: Config
) -> Outcome:
    if row.outcome is not None:
        return row.outcome
    if isinstance(rejected, Reply):
        return _ended(rejected)
    settings, both = row_settings(config), f"{engine.fingerprint}+{annotator.fingerprint}"
    meta = {"generator": engine.fingerprint, "annotator": annotator.fingerprint, "caption": row.captioned.caption,
            "changed": bool(row.unknown), "probes": [dataclasses.asdict(one) for one in row.probes]}  # fmt: skip
    if config.produce == "examples":
        messages = [*row.prompt.messages, assistant_message(row.caption)]
        return [stages.make_example(row.prompt, method=METHOD, messages=messages, settings=settings, seed=config.seed,
                                    model=both, meta=meta)]  # fmt: skip
    if rejected is None:
        return Dropped("no_rejected")
    told = {"rejected_kind": rejected.kind, "contradicted": rejected.contradicted, "statements": rejected.statements}
    return [
        stages.make_pair(row.prompt, method=METHOD, chosen=row.caption, rejected=rejected.text, settings=settings,
                         seed=config.seed, model=both, meta={"method": METHOD, **meta, **told})
    ]  # fmt: skip


def figures(folder: Path) -> dict[str, Any]:
    """What the kept rows' probes found: captions changed, questions unknown and undecided, grades missing."""
    metas = [row["meta"] for row in stages.columns_of(folder, "meta")]
    probes = [one for meta in metas for one in meta["probes"]]
    scores = [score for one in probes for score in one["scores"]]
    return {
        "rows": len(metas),
        "changed": round(statistics.fmean(meta["changed"] for meta in metas), 4),
        "questions": round(len(probes) / len(metas), 2),
        "unknown": round(statistics.fmean(one["unknown"] is True for one in probes), 4),
        "undecided": round(statistics.fmean(one["unknown"] is None for one in probes), 4),
        "missing_scores": round(statistics.fmean(score is None for score in scores), 4),
    }


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

"""KnowAda: captions that say no more than the model to be trained knows of their pictures.

Questions are written about each dense caption and put to the model; what it answers wrongly nearly every time is unknown to it
and is taken out of the caption. `produce: examples` writes the adapted captions for SFT. `produce: pairs` (not in the paper)
prefers them to a caption of the model's own that says something false, or for a small share to the caption as it was.

Paper: Yanuka, Ben-Kish, Bitton, Szpektor, Giryes, "Bridging the Visual Gap: Fine-Tuning Multimodal Models with Knowledge-Adapted
Captions", NAACL 2025, arXiv 2411.09018. Code: moranyanuka/KnowAda.
Differs from the released code: what cannot be read or generated is missing, not wrong, and stays with its own question and
picture; rewrites are checked and refused rather than replaced by another picture's; no generic question stands in for none.

Needs: rows with pictures and dense captions as their answers; the model to be trained, which samples; `annotator: engine` needs
an LLM, `annotator: rules` (embedded world) none.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefalign import knowledge, sources, stages, store
from prefalign.engines import Completion, Engine, Request, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.knowledge import Annotator, Captioned, Probe, Probing, Reply
from prefalign.manifest import Manifest
from prefalign.records import Example, Pair, Prompt, assistant_message, row_seed
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import same_answer

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
class RejectedConfig:
    """Where rejected answers come from (`pairs`); not in the paper.

    Attributes:
        original_share: share of rows whose rejected answer is the caption before it was adapted. That is true, so it teaches
            caution and not correctness: keep it small. Rows whose caption did not change, or not in that length, take the other.
        num_generations: captions of its own that the model is asked for otherwise; the most contradicted one is rejected.
        length_ratio: words of rejected over chosen, least and most; further apart, DPO learns length.
        sampling: how its own captions are drawn.
    """

    original_share: float = 0.1
    num_generations: int = 4
    length_ratio: tuple[float, float] = (0.67, 1.5)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not 0 <= self.original_share <= 1:
            raise ValueError(f"original_share is {self.original_share}; it is a share of rows from 0 to 1 (0.1).")
        if self.num_generations < 1:
            raise ValueError(f"rejected.num_generations is {self.num_generations}; give 1 or more (4).")
        least, most = self.length_ratio
        if not 0 < least <= 1 <= most:
            raise ValueError(
                f"length_ratio is {list(self.length_ratio)}, and captions of equal length are outside of it. Give a least ratio "
                "up to 1 and a most from 1 on ([0.67, 1.5])."
            )


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
        allowed_words: words that a rewrite may add, such as "something".
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
    from prefalign.engines.loading import load_engine

    sources.files_of(config.data)
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
    print(f"{METHOD}: " + ", ".join(f"{name} {value}" for name, value in found.items()), file=sys.stderr)
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
    return EngineAnnotator(engine, cache=config.cache, max_new_tokens=config.max_new_tokens, seed=config.seed)


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
    scores = [score for one in probes for score in one.scores]
    failed = answers.count(None)
    return (
        f"no question has {least} answers with a grade: of {len(answers)} answers {failed} could not be generated, and "
        f"{scores.count(None) - failed} others have no readable grade. Is the LLM reachable, and does it reply with 1, 2 or 3?"
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


def _ended(reply: Reply) -> Dropped | Failed:
    if reply.refused == "generation_failed":
        return Failed(reply.refused, reply.message)
    return Dropped(str(reply.refused))


@dataclass(frozen=True)
class Rejected:
    """A rejected answer: `own` caption of the model or the `original`, and how many of its statements are contradicted."""

    text: str
    kind: Literal["own", "original"]
    contradicted: int = 0
    statements: int = 0


def reject(
    rows: Sequence[Adapted], engine: Engine, annotator: Annotator, config: Config
) -> dict[str, Rejected | Failed]:
    """A rejected answer by row id, or the failure that left a row without one."""
    rules = config.rejected
    found: dict[str, Rejected] = {}
    failed: dict[str, Failed] = {}
    others = []
    for row in rows:
        if row.outcome is not None:
            continue
        original = row.captioned.caption
        drawn = random.Random(row_seed(config.seed, f"{row.prompt.id}/rejected")).random() < rules.original_share
        if drawn and not same_answer(original, row.caption) and _matched(row.caption, original, rules):
            found[row.prompt.id] = Rejected(original, "original")
        else:
            others.append(row)
    requests = [
        Request(f"{row.prompt.id}/own/{number}", row.prompt.messages, row.images, seed=config.seed)
        for row in others
        for number in range(rules.num_generations)
    ]
    said = iter(engine.generate(requests, rules.sampling) if requests else [])
    candidates = []
    for row in others:
        own = [next(said) for _ in range(rules.num_generations)]
        candidates += [(row, text) for text in _own(row, own, rules)]
        for completion in own:
            if completion.finish_reason == "error":
                failed[row.prompt.id] = Failed("generation_failed", f"a caption of its own: {completion.error}")
    labelled = annotator.statements([(row.captioned, text) for row, text in candidates]) if candidates else []
    for (row, text), labels in zip(candidates, labelled, strict=True):
        if isinstance(labels, Reply):
            if labels.refused == "generation_failed":
                failed[row.prompt.id] = Failed(labels.refused, f"the statements of a caption: {labels.message}")
            continue
        one = Rejected(text, "own", labels.count("contradicted"), len(labels))
        if one.contradicted > (found[row.prompt.id].contradicted if row.prompt.id in found else 0):
            found[row.prompt.id] = one
    return {**failed, **found}


def _own(row: Adapted, said: Sequence[Completion], rules: RejectedConfig) -> list[str]:
    """The finished captions among a model's own that have the chosen one's length, each once."""
    texts = [completion.text.strip() for completion in said if completion.finish_reason == "stop"]
    return [text for text in dict.fromkeys(texts) if text and _matched(row.caption, text, rules)]


def _matched(chosen: str, rejected: str, rules: RejectedConfig) -> bool:
    least, most = rules.length_ratio
    return least <= len(rejected.split()) / len(chosen.split()) <= most


def _outcome(
    row: Adapted, rejected: Rejected | Failed | None, engine: Engine, annotator: Annotator, config: Config
) -> Outcome:
    if row.outcome is not None:
        return row.outcome
    if isinstance(rejected, Failed):
        return rejected
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

"""MPA: questions that a large model answers and the model to be trained does not, written about pictures without labels.

A pseudo annotator writes a question and a short answer about each picture; the large and the small model answer it; it is kept
where the large one agrees with the annotation and the small one does not. `produce: examples` writes question and answer for SFT.
`produce: pairs` (not in the paper) prefers the annotation to the small model's wrong answer; the question is then stored with the
request for a short answer that the small model saw.

Paper: "When Big Models Train Small Ones: Label-Free Model Parity Alignment for Efficient Visual Question Answering using Small
VLMs", EMNLP 2025, arXiv 2509.16633. Code: vl2g/MPA, `scripts/PA/PA.py`, `scripts/PI/PI.py`.
Differs from the released code: answers are compared token by token, and annotations that refuse or are long are dropped
(`matching: released` repeats its rule); a blank stands before the request for a short answer; the question keeps its mark; all
batches are run, not the first alone; ids are unique; rows are not split (there 85:15 into train and validation).

Needs: rows with pictures, whose own questions are not used; the small model, and a large one for `annotator: engine`;
`annotator: rules` takes questions and truth from the facts of the embedded world.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefalign import parity, sources, stages, store
from prefalign.engines import Completion, Engine, Request, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.manifest import Manifest
from prefalign.parity import matches, released_match, with_request, words_of
from prefalign.records import Example, Pair, Prompt, assistant_message, row_seed, user_message
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import same_answer

if TYPE_CHECKING:
    from PIL import Image

METHOD = "mpa"
FIGURES = "parity.json"


@dataclass
class ShortSampling(Sampling):
    """How questions and answers are drawn: greedy, at most 128 tokens as in the released code."""

    max_new_tokens: int = 128
    temperature: float = 0.0


@dataclass
class VoteConfig:
    """How often the large model is asked.

    Attributes:
        num_generations: its answers; 1: one, drawn as `sampling` says.
        agreement: share of them that has to match the annotation; where those that could not be generated might decide, the row
            fails.
        temperature: how several are drawn.
    """

    num_generations: int = 1
    agreement: float = 0.6
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if self.num_generations < 1:
            raise ValueError(f"vote.num_generations is {self.num_generations}; the large model answers 1 time or more.")
        if not 0 < self.agreement <= 1:
            raise ValueError(f"vote.agreement is {self.agreement}; it is a share of answers above 0 and up to 1 (0.6).")
        if self.num_generations > 1 and self.temperature <= 0:
            raise ValueError(
                f"vote.temperature is {self.temperature}, so {self.num_generations} answers would be the same greedy one and no "
                "vote. Raise it (0.7), or set vote.num_generations to 1."
            )


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        model: the small model, which will be trained.
        data: rows with pictures.
        output: folder of examples or of pairs.
        annotator: `engine`: the large model writes questions and answers; `rules`: the facts of the embedded world do, and the
            truth stands for the large model.
        large: the large model.
        task: what questions are about (`parity.TASK_PROMPTS`).
        prompt: words of your own instead of the task's; the form of the reply is added.
        short_request: what is appended to a question, after a blank, when the models answer it.
        produce: `examples` or `pairs`.
        matching: `tokens`: the annotation is among an answer's words; `exact`: it is the answer; `released`: it is a substring of
            the answer, both without white space and marks. The small model knows what any of the first and the last finds;
            with `released` and examples the last alone decides, and neither tolerance nor length counts.
        numeric_tolerance: relative difference up to which two numbers are the same; 0.05 is usual for charts.
        max_answer_words: words and numbers of the longest answer: a longer annotation is dropped, a longer answer of the large
            model confirms nothing (but for `released`), and one of the small model makes no pair; null: any length.
        vote: how often the large model is asked.
        sampling: how annotations and answers are drawn.
        batch_size: sequences per forward pass.
        seed: with a row's id it decides every draw.
    """

    model: EngineConfig
    data: DataConfig
    output: OutputConfig
    annotator: Literal["engine", "rules"] = "engine"
    large: EngineConfig | None = None
    task: Literal["text", "chart", "knowledge", "general"] = "general"
    prompt: str | None = None
    short_request: str = "Answer with a single word or a short phrase."
    produce: Literal["examples", "pairs"] = "examples"
    matching: Literal["tokens", "exact", "released"] = "tokens"
    numeric_tolerance: float = 0.0
    max_answer_words: int | None = 10
    vote: VoteConfig = field(default_factory=VoteConfig)
    sampling: ShortSampling = field(default_factory=ShortSampling)
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.annotator == "engine" and self.large is None:
            raise ValueError(
                "annotator is `engine`, and no large model is named to write and answer questions. Set large.model_name_or_path, "
                "or annotator to `rules` for the embedded world."
            )
        if self.annotator == "engine" and self.large == self.model:
            raise ValueError(
                f"model and large are both {self.model.model_name_or_path!r}, so there is no gap between them and no row would "
                "be kept. Name a larger model as `large`."
            )
        if not 0 <= self.numeric_tolerance < 1:
            raise ValueError(
                f"numeric_tolerance is {self.numeric_tolerance}; it is a share of the number, from 0 (exact) to below 1 (0.05)."
            )
        if self.max_answer_words is not None and self.max_answer_words < 1:
            raise ValueError(
                f"max_answer_words is {self.max_answer_words}, so no answer would be short enough. Give 1 or more, or null."
            )


@dataclass
class Asked:
    """A row on its way: the pseudo question and answer, what the models answered, and `outcome` if it came to an end before."""

    prompt: Prompt
    images: list[Image.Image]
    question: str = ""
    answer: str = ""
    large: list[str] = field(default_factory=list)
    small: str = ""
    outcome: Dropped | Failed | None = None


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.engines.loading import check_engine, load_engine

    sources.files_of(config.data)
    wanted = config.large if config.annotator == "engine" else None
    if wanted is not None:
        check_engine(wanted, needs=["sample"], stage=METHOD)
    small = load_engine(config.model, batch_size=config.batch_size, needs=["sample"], stage=METHOD)
    large: Engine | None = None
    if wanted is not None:
        large = load_engine(wanted, batch_size=config.batch_size, needs=["sample"], stage=METHOD)
    manifest = store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, small, large, config),
        output=config.output,
        record=Pair if config.produce == "pairs" else Example,
        settings=row_settings(config),
        seed=config.seed,
        models=models_of(small, large),
    )
    found = stages.write_figures(config.output.path, FIGURES, lambda: figures(manifest))
    stages.say_figures(METHOD, found)
    return manifest


def models_of(small: Engine, large: Engine | None) -> dict[str, str]:
    """Fingerprints of the small model and of whoever stands for the large one."""
    return {"small": small.fingerprint, "large": large.fingerprint if large is not None else "scenes-truth-1"}


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows."""
    names = ["annotator", "short_request", "produce", "matching", "numeric_tolerance", "max_answer_words", "sampling"]
    names += ["task", "prompt", "vote"] if config.annotator == "engine" else []
    known = dataclasses.asdict(config)
    return {name: known[name] for name in names}


def process(block: list[Prompt], small: Engine, large: Engine | None, config: Config) -> list[Outcome]:
    """One outcome for each row of a block; each step asks for all rows together."""

    def work(given: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        rows = [Asked(prompt, images) for prompt, images in given]
        if large is None:
            from_facts(rows, config)
        else:
            annotate(rows, large, config)
            ask_large(rows, large, config)
        ask_small(rows, small, config)
        return [_outcome(row, models_of(small, large), config) for row in rows]

    return stages.in_order(block, lambda prompt: stages.usable(prompt, answer=False), work)


def from_facts(rows: Sequence[Asked], config: Config) -> None:
    """Questions and true answers from the facts of the embedded world; the truth is what the large model says, too."""
    from prefalign.scenes.probing import short_question

    for row in rows:
        asked = short_question(row.prompt.facts, row_seed(config.seed, row.prompt.id))
        if asked is None:
            row.outcome = Dropped("no_facts")
        else:
            row.question, row.answer, row.large = asked.text, asked.answer, [asked.answer]


def annotate(rows: Sequence[Asked], large: Engine, config: Config) -> None:
    """Have the large model write one question and its short answer about each picture."""
    wanted = f"{config.prompt or parity.TASK_PROMPTS[config.task]}\n{parity.FORM}"
    requests = [
        Request(f"{row.prompt.id}/annotation", [user_message(wanted, len(row.images))], row.images, seed=config.seed)
        for row in rows
    ]
    for row, completion in zip(rows, large.generate(requests, config.sampling), strict=True):
        found = parity.read_annotation(completion.text)
        if completion.finish_reason == "error":
            row.outcome = Failed("generation_failed", str(completion.error))
        elif completion.finish_reason == "length":
            row.outcome = Dropped("cut_off")
        elif found is None:
            row.outcome = Dropped("unreadable_annotation")
        else:
            row.question, row.answer = found
            row.outcome = _unfit(row.answer, config)


def _unfit(answer: str, config: Config) -> Dropped | None:
    if not words_of(answer):
        return Dropped("no_answer")
    if _as_published(config):
        return None
    if parity.is_refusal(answer, read=True):
        return Dropped("no_answer")
    too_long = config.max_answer_words is not None and words_of(answer) > config.max_answer_words
    return Dropped("long_answer") if too_long else None


def ask_large(rows: Sequence[Asked], large: Engine, config: Config) -> None:
    """Have the large model answer, once or several times, and drop what it does not confirm."""
    count, sampling = config.vote.num_generations, config.sampling
    if count > 1:
        sampling = dataclasses.replace(sampling, temperature=config.vote.temperature)
    open_rows = [row for row in rows if row.outcome is None]
    requests = [_request(row, f"large/{number}", config) for row in open_rows for number in range(count)]
    said = iter(large.generate(requests, sampling) if requests else [])
    for row in open_rows:
        answers: list[Completion] = [next(said) for _ in range(count)]
        row.large = [answer.text.strip() for answer in answers if answer.finish_reason != "error"]
        lost = [str(answer.error) for answer in answers if answer.finish_reason == "error"]
        agreeing = sum(_same(row.answer, text, config) for text in row.large)
        needed = round(config.vote.agreement * count, 9)
        if agreeing + len(lost) < needed:
            row.outcome = Dropped("large_disagrees")
        elif agreeing < needed:
            row.outcome = Failed("generation_failed", lost[0])


def ask_small(rows: Sequence[Asked], small: Engine, config: Config) -> None:
    """Have the small model answer, and drop what it knows."""
    open_rows = [row for row in rows if row.outcome is None]
    requests = [_request(row, "small", config) for row in open_rows]
    said = small.generate(requests, config.sampling) if requests else []
    for row, answer in zip(open_rows, said, strict=True):
        row.small = answer.text.strip()
        if answer.finish_reason == "error":
            row.outcome = Failed("generation_failed", str(answer.error))
        elif _knows(row, config):
            row.outcome = Dropped("small_knows")
        elif parity.undecided(row.answer, row.small) and not _as_published(config):
            row.outcome = Dropped("unreadable_number")
        elif config.produce == "pairs":
            row.outcome = _unfit_rejected(row, config)


def _request(row: Asked, who: str, config: Config) -> Request:
    asked = user_message(with_request(row.question, config.short_request), len(row.images))
    return Request(f"{row.prompt.id}/{who}", [asked], row.images, seed=config.seed)


def _same(wanted: str, said: str, config: Config) -> bool:
    if config.matching == "released":
        return released_match(wanted, said)
    return matches(wanted, said, tolerance=config.numeric_tolerance, most_words=config.max_answer_words,
                   whole=config.matching == "exact")  # fmt: skip


def _knows(row: Asked, config: Config) -> bool:
    """Whether the small model's answer may be right: one that is cannot be rejected, so what either match finds counts."""
    equal = released_match(row.answer, row.small) and released_match(row.small, row.answer)
    if config.matching == "exact":
        return equal or _same(row.answer, row.small, config)
    by_tokens = matches(row.answer, row.small, tolerance=config.numeric_tolerance)
    return (by_tokens and not _as_published(config)) or released_match(row.answer, row.small)


def _as_published(config: Config) -> bool:
    return config.matching == "released" and config.produce == "examples"


def _unfit_rejected(row: Asked, config: Config) -> Dropped | None:
    """Why a small model's answer cannot be rejected: it is empty, declines, is a whole speech, or (part of) what is chosen."""
    if not words_of(row.small):
        return Dropped("small_empty")
    if parity.is_refusal(row.small):
        return Dropped("small_refuses")
    if same_answer(row.small, row.answer) or parity.tokens(row.small) == parity.tokens(row.answer):
        return Dropped("small_equal")
    parts = [] if config.matching == "exact" else [row.answer, *parity.choices(row.answer)]
    if any(matches(row.small, part, tolerance=config.numeric_tolerance) for part in parts):
        return Dropped("small_part")
    too_long = config.max_answer_words is not None and words_of(row.small) > config.max_answer_words
    return Dropped("long_small_answer") if too_long else None


def _outcome(row: Asked, models: dict[str, str], config: Config) -> Outcome:
    if row.outcome is not None:
        return row.outcome
    settings, both = row_settings(config), "+".join(models.values())
    known = {"method": METHOD, "generator": models["large"], "small": models["small"],
             "task": config.task if config.annotator == "engine" else "scenes", "pseudo_answer": row.answer,
             "large_answers": row.large, "small_answer": row.small}  # fmt: skip
    if config.produce == "examples":
        said = [user_message(row.question, len(row.images)), assistant_message(row.answer)]
        return [
            stages.make_example(
                row.prompt, method=METHOD, messages=said, settings=settings, seed=config.seed, model=both, meta=known
            )
        ]
    made = stages.make_pair(row.prompt, method=METHOD, chosen=row.answer, rejected=row.small, settings=settings,
                            seed=config.seed, model=both, meta=known,
                            prompt=_request(row, "small", config).messages)  # fmt: skip
    return [dataclasses.replace(made, answer=row.answer)]


def figures(manifest: Manifest) -> dict[str, Any]:
    """Share of the pictures whose annotation was accepted, and by reason the shares of the others."""
    shares = {reason: round(count / manifest.rows_in, 4) for reason, count in manifest.dropped.items()}
    return {"rows": manifest.rows_out, "accepted": round(manifest.rows_used / manifest.rows_in, 4), **shares}


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

"""Curate instructions: keep the share of instruction data that rewards rate highest, said again in the model's own style.

- `curated`: a cascade. Each stage scores what the one before kept (by a question reward, an answer reward, or what the picture
  adds to the answers), and keeps a share of each type. What is left can be rewritten by the model, and checked (`style`).
- `baseline`: as many rows as a finished cascade kept of each type, at random or matched in length, to compare it with.
- `pairs`: comparisons that train the two reward models, from rated questions or answers and corrupted copies of them.

Source: Align2LLaVA, arXiv 2409.18541, and its released scripts (`prefalign.curation`, `prefalign.cascade` and
`prefalign.style_alignment` say how this differs); the score without a reward model is ViSA's, arXiv 2502.19917.

Needs: conversations with pictures, questions and answers; for `pairs` candidates with ratings in their `scores`. A model for
competing answers, information gain and style; what the rewards need.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefalign import cascade, cascade_table, curation, records, sources, stages, store
from prefalign.cascade import CascadeStage, Judges, Rated
from prefalign.curation import Baseline, BuilderConfig, Comparison
from prefalign.elsewhere import Elsewhere
from prefalign.engines import Engine, Request, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.evidence import Without
from prefalign.images import EncodedImage, sha256
from prefalign.manifest import Manifest, write_atomically
from prefalign.records import Candidates, Example, Pair, Prompt, row_seed
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.style_alignment import Rewritten, StyleConfig, Text, align_style
from prefalign.surveys import Survey

if TYPE_CHECKING:
    from PIL import Image

    from prefalign.rewards import Combined

METHOD = "curate_instructions"
QUESTION_PROMPT = "Ask a question about the picture."


@dataclass
class BaselineConfig:
    """What is drawn instead of chosen.

    Attributes:
        like: output folder of the cascade whose counts (and lengths) are matched, made of the same data.
        kind: `random`, or `length_matched`.
    """

    like: Path
    kind: Baseline = "random"


@dataclass
class AnswerSampling(Sampling):
    """How competing answers are drawn."""

    max_new_tokens: int = 512
    temperature: float = 0.7


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: conversations; for `pairs` candidates with ratings.
        output: folder of examples or of pairs.
        produce: `curated`, `baseline` or `pairs`.
        stages: the cascade, in order.
        stratify_by: key of a row's `facts` that names its type; rows without it are one type.
        question_prompt: what a question is rated as the answer to.
        model: writes competing answers and rewritings, and judges information gain.
        sampling: how competing answers are drawn.
        without: what stands for no usable picture (information gain).
        style: rewriting and its check; null: texts stay.
        baseline: what is drawn (`baseline`).
        rated: what the rated texts are (`pairs`).
        rating: name of the score that holds the rating (`pairs`).
        builder: how ratings become comparisons (`pairs`).
        batch_size: sequences per forward pass.
        seed: with a row's id it decides every draw.
    """

    data: DataConfig
    output: OutputConfig
    produce: Literal["curated", "baseline", "pairs"] = "curated"
    stages: list[CascadeStage] = field(default_factory=list)
    stratify_by: str = "type"
    question_prompt: str = QUESTION_PROMPT
    model: EngineConfig | None = None
    sampling: AnswerSampling = field(default_factory=AnswerSampling)
    without: Without = "blank"
    style: StyleConfig | None = None
    baseline: BaselineConfig | None = None
    rated: Literal["question", "answer"] = "answer"
    rating: str = "human"
    builder: BuilderConfig = field(default_factory=BuilderConfig)
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if self.produce == "curated" and (not names or len(set(names)) < len(names)):
            raise ValueError(f"stages are {names}: a cascade needs at least one, each with a name of its own.")
        if self.produce == "baseline" and self.baseline is None:
            raise ValueError(
                "produce is baseline, and nothing says like which cascade. Set baseline.like to its output folder."
            )
        if self.needs_model and self.model is None:
            raise ValueError(
                "style, num_generations and information_gain need a model, and none is named. Set model.model_name_or_path."
            )

    @property
    def needs_model(self) -> bool:
        """Whether a model writes or judges anything."""
        judged = self.produce == "curated" and any(stage.needs_model for stage in self.stages)
        return judged or (self.produce != "pairs" and self.style is not None)


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    sources.files_of(config.data)
    if config.produce == "pairs":
        return build_pairs(config)
    drawn: dict[str, Rated] = {}
    if config.produce == "baseline" and config.baseline is not None:
        drawn = cascade_table.baseline_like(config.baseline.like, config.baseline.kind, config.seed)
    rewards: dict[str, Combined] = {}
    if config.produce == "curated":
        from prefalign.rewards import read_rewards

        rewards = {stage.name: read_rewards(stage.rewards) for stage in config.stages if stage.rewards}
        for combined in rewards.values():
            combined.check()
    engine: Engine | None = None
    if config.model is not None and config.needs_model:
        from prefalign.engines.loading import load_engine

        engine = load_engine(config.model, batch_size=config.batch_size)
    table = functools.cache(lambda: drawn if config.produce == "baseline" else judge_all(config, rewards, engine))
    return store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, table(), engine, config),
        output=config.output,
        record=Example,
        settings=row_settings(config),
        seed=config.seed,
        models=models_of(rewards, engine, drawn),
    )


def models_of(rewards: Mapping[str, Combined], engine: Engine | None, drawn: Mapping[str, Rated]) -> dict[str, str]:
    """Fingerprint of the model, of a baseline's ids, and version of each reward that has one, by stage and label."""
    found = {} if engine is None else {"model": engine.fingerprint}
    if drawn:
        kept = sorted(name for name, row in drawn.items() if row.dropped is None)
        found["drawn"] = hashlib.sha256(records.canonical_json(kept).encode()).hexdigest()[:16]
    for stage, combined in rewards.items():
        found |= {f"{stage}/{label}": version for label, version in combined.versions().items()}
    return found


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows of what is produced."""
    known = dataclasses.asdict(config)
    if config.produce == "pairs":
        names = ["rated", "rating", "question_prompt", "builder"]
    elif config.produce == "baseline":
        names = ["style"]
        known["produce"] = f"baseline {config.baseline.kind}" if config.baseline is not None else "baseline"
    else:
        names = ["style", "stages", "stratify_by", "question_prompt", "sampling", "without"]
    return {name: stages.portable(known[name]) for name in ["produce", *names]}


def judge_all(config: Config, rewards: Mapping[str, Combined], engine: Engine | None) -> dict[str, Rated]:
    """The cascade over all rows; its score table goes to `cascade.json`."""
    total, repeated = sources.survey(config.data)
    survey = Survey(METHOD, config.data, config.output, Prompt, total, repeated)
    judges = Judges(rewards, engine, config.sampling, config.question_prompt, config.without, config.seed)
    table = cascade.run_cascade(survey, config.stages, judges, stratify_by=config.stratify_by)
    found = json.dumps(cascade_table.summary(table, config.stages), indent=1)
    write_atomically(config.output.path / cascade_table.TABLE, found.encode())
    return table


def process(block: list[Prompt], table: Mapping[str, Rated], engine: Engine | None, config: Config) -> list[Outcome]:
    """One outcome for each row of a block; all rewritings are asked for together."""

    def prepare(prompt: Prompt) -> list[Image.Image] | Dropped | Failed:
        row = table.get(prompt.id)
        if row is None:
            return Dropped("not_in_cascade")
        if row.failed is not None:
            return Failed(*row.failed)
        if row.dropped is not None:
            return Dropped(row.dropped)
        return stages.opened(prompt.images)

    def work(rows: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        if config.style is None or engine is None:
            return [_example(prompt, table[prompt.id], {}, {}, config) for prompt, _ in rows]
        styled, likelihoods = restyle(rows, table, engine, config.style, config.seed)
        return [_example(prompt, table[prompt.id], styled, likelihoods, config, engine) for prompt, _ in rows]

    return stages.in_order(block, prepare, work)


Key = tuple[str, int, str]
"""Row, `Turn.place`, and `question` or `answer`."""


def restyle(
    rows: Sequence[tuple[Prompt, list[Image.Image]]],
    table: Mapping[str, Rated],
    engine: Engine,
    config: StyleConfig,
    seed: int,
) -> tuple[dict[Key, Rewritten], dict[Key, tuple[float, float]]]:
    """What became of each text, and for answers that were rewritten the mean log-prob of a token before and after."""
    keys: list[Key] = []
    texts: list[Text] = []
    requests: dict[Key, Request] = {}
    for prompt, images in rows:
        for turn in curation.turns_of(prompt, table[prompt.id].answers):
            said = {"question": turn.question, "answer": turn.answer}
            for part in config.parts:
                if part == "question" and not curation.one_text(turn.context[-1]):
                    continue
                keys.append((prompt.id, turn.place, part))
                texts.append(Text(f"{prompt.id}/{turn.place}", part, said[part], images))
            requests[prompt.id, turn.place, "answer"] = Request(f"{prompt.id}/{turn.place}", turn.context, images)
    found = dict(zip(keys, align_style(engine, texts, config, seed=seed), strict=True))
    taken = [
        (key, text.text, found[key].text)
        for key, text in zip(keys, texts, strict=True)
        if key[2] == "answer" and found[key].verdict == "taken"
    ]
    asked = [requests[key] for key, *_ in taken for _ in range(2)]
    values = [float(tokens.mean()) for tokens in engine.logprobs(asked, [text for _, *both in taken for text in both])]
    return found, {key: (values[2 * place], values[2 * place + 1]) for place, (key, *_) in enumerate(taken)}


def _example(
    prompt: Prompt,
    row: Rated,
    styled: Mapping[Key, Rewritten],
    likelihoods: Mapping[Key, tuple[float, float]],
    config: Config,
    engine: Engine | None = None,
) -> Outcome:
    answers, questions = dict(row.answers), dict[int, str]()
    style = []
    for turn in curation.turns_of(prompt):
        verdicts: dict[str, Any] = {"turn": turn.place}
        for part, chosen in (("question", questions), ("answer", answers)):
            key = (prompt.id, turn.place, part)
            if key in styled:
                verdicts[part] = styled[key].verdict
                if styled[key].verdict == "taken":
                    chosen[turn.place] = styled[key].text
            if key in likelihoods:
                verdicts["logprobs"] = [round(value, 4) for value in likelihoods[key]]
        style.append(verdicts)
    settings = row_settings(config)
    model = "" if engine is None else engine.fingerprint
    meta = {
        "type": row.type,
        "scores": row.scores,
        "new_answers": sorted(row.answers),
        **({"style": style} if styled else {}),
    }
    messages = curation.conversation(prompt, questions, answers)
    return [
        stages.make_example(
            prompt, method=METHOD, messages=messages, settings=settings, seed=config.seed, model=model, meta=meta
        )
    ]


def build_pairs(config: Config) -> Manifest:
    """Comparisons of rated texts, and of texts with corrupted copies of themselves."""
    elsewhere = Elsewhere(METHOD, config.data, config.output)
    return store.run_stage(
        METHOD,
        config.data,
        lambda block: [compare(row, config, elsewhere) for row in block],
        output=config.output,
        record=Pair,
        settings=row_settings(config),
        seed=config.seed,
        reads=Candidates,
    )


def compare(row: Candidates, config: Config, elsewhere: Elsewhere) -> Outcome:
    """The comparisons of one group of rated texts; what is swapped in comes from `elsewhere`."""
    if not row.images:
        return Dropped("no_picture")
    rng = random.Random(row_seed(config.seed, f"{row.id}/comparisons"))
    own = [sha256(image) for image in row.images]
    ratings = [(response.get("scores") or {}).get(config.rating) for response in row.responses]
    if all(rating is None for rating in ratings):
        return Dropped("unrated")
    said = [response["text"] for response in row.responses]
    made: list[Pair] = []
    for comparison in curation.build_comparisons(
        said, ratings, rng, config.builder, lambda draw: elsewhere.text(own, draw)
    ):
        pictures = elsewhere.pictures(own, rng) if comparison.corruption == "swap_image" else []
        if pictures is not None:
            made.append(_pair(row, comparison, pictures, len(made), config))
    return made or Dropped("no_comparison")


def _pair(row: Candidates, comparison: Comparison, pictures: list[EncodedImage], index: int, config: Config) -> Pair:
    asked = None
    if config.rated == "question":
        asked = [records.user_message(config.question_prompt, len(row.images))]
    meta = {
        "rated": config.rated,
        "corruption": comparison.corruption,
        "better": comparison.better,
        "worse": comparison.worse,
    }
    return stages.make_pair(
        Prompt(row.id, row.images, row.messages, row.answer, row.facts),
        method=METHOD,
        chosen=row.responses[comparison.better]["text"],
        rejected=comparison.text,
        settings=row_settings(config),
        seed=config.seed,
        meta=meta,
        prompt=asked,
        rejected_images=pictures,
        margin=comparison.margin,
        index=index,
    )


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

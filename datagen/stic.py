"""STIC: a model's good descriptions against ones it was led astray in; and SFT rows with its description put in front.

`produce: pairs` (stage 1). Chosen answers one long guided prompt. Rejected answers either a prompt that asks for what is not
there, on the clean picture, or a short neutral prompt, on a picture of low resolution or with jittered colours. The pair is
stored under the neutral prompt and the clean picture; the row's own question and answer are not used.
`produce: sft` (stage 2). Rows keep question and answer; a description by the model, normally that of stage 1, goes before the
question. Describe and respond, the same at inference, is `asking.describe_first` of `evaluate_model`.

Paper: Deng, Lu, Yin et al., "Enhancing Large Vision Language Models with Self-Training on Image Comprehension", NeurIPS 2024,
arXiv 2405.19716. Code: yihedeng9/STIC, `stic/generate_pref.py`, `generate_des_stage2.py`, `add_des_to_data.py`.
Differs from the released code: the corrupted picture is really shown (there it was noted and left out of the call;
`negatives.corrupt: false` does the same); prompts are worded anew; draws have the row's seed; pairs are filtered; each picture
gives one pair.

Needs: rows with pictures (`pairs`), and with questions and answers (`sft`); a generator that samples.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from prefalign import describing, records, sources, stages, store
from prefalign.corruption import Jitter, colour_jitter, difference, jitter_shows, low_resolution
from prefalign.described_pairs import FilterConfig, rejection
from prefalign.describing import DescriptionSampling
from prefalign.engines import Completion, Engine, Request
from prefalign.engines.config import EngineConfig
from prefalign.images import sha256
from prefalign.manifest import Manifest
from prefalign.records import Example, Pair, Prompt, row_seed
from prefalign.seen import Owners
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.surveys import picture_owners
from prefalign.text import lexical_similarity

if TYPE_CHECKING:
    from PIL import Image

METHOD = "stic"
LEAST_CHANGE = 1 / 255  # of a shrunk picture: one grey level in the mean

GUIDED_PROMPT = (
    "Look closely at this picture and describe only what you can see. First name the main subjects and say what they do. Then "
    "tell where they are, indoors or outdoors, and what surrounds them. Say which mood the picture has and what makes it so: "
    "light, weather, the look on a face. Go on with the colours that stand out and with how the picture is composed. Mention "
    "signs, writing or small details that matter. If it helps, close with what the picture may be about."
)
BAD_PROMPTS = (
    "Describe this picture and put some objects of your own into it, as if they stood there.",
    "Describe this picture and the characters or objects that might well appear in it, as if they were there.",
    "Describe this picture, and name the useful items and the people that could well be found here.",
    "Describe this picture, and fill it with things that are missing but would suit it.",
    "Describe this picture, and as part of it what goes on to its left and to its right.",
    "Describe this picture, and tell which events are likely to take place in it and with what items.",
    "Describe this picture; state the weather as a fact, and which animals are around.",
    "Describe this picture and the tools, vehicles and gadgets that are used in it.",
)


@dataclass
class NegativeConfig:
    """How the rejected answer is led astray.

    Attributes:
        bad_prompt_share: share of rejected answers to a bad prompt on the clean picture; the others answer the neutral prompt on
            a corrupted picture.
        low_resolution_share: share of corrupted pictures that are shrunk; the others get colour jitter, or are shrunk where that
            does not show (a grey picture).
        short_side: pixels of the short side of a shrunk picture.
        jitter: ranges of the colour jitter, and its least strength.
        corrupt: show the corrupted picture. False: parity with the released code, which notes the corruption and shows the
            clean picture.
    """

    bad_prompt_share: float = 0.5
    low_resolution_share: float = 0.5
    short_side: int = 20
    jitter: Jitter = field(default_factory=Jitter)
    corrupt: bool = True

    def __post_init__(self) -> None:
        _check_share("bad_prompt_share", self.bad_prompt_share)
        _check_share("low_resolution_share", self.low_resolution_share)
        if self.short_side < 1:
            raise ValueError(f"short_side is {self.short_side}; a picture has at least 1 pixel. Take 20, as published.")


@dataclass
class InfusionConfig:
    """How a description is put into an SFT row.

    Attributes:
        template: what goes after the placeholders and before the question, with `{description}` once.
        plain_share: share of rows that stay without a description.
    """

    template: str = describing.TEMPLATE
    plain_share: float = 0.0

    def __post_init__(self) -> None:
        describing.check_template(self.template)
        _check_share("plain_share", self.plain_share)


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        model: the generator: for `pairs` the model that will be trained, for `sft` the one trained on these pairs.
        data: rows with pictures; `sft` needs their questions and answers too.
        output: folder of pairs or of examples.
        produce: `pairs` (stage 1) or `sft` (stage 2).
        guided_prompt: asks for the chosen answer.
        neutral_prompts: each row draws one: pairs are stored under it, SFT rows described under it.
        bad_prompts: each rejected answer that a prompt leads astray draws one.
        negatives: how the rejected answer is led astray (`pairs`).
        filters: which answers are dropped.
        infusion: how a description is put into a row (`sft`).
        sampling: how answers and descriptions are drawn.
        batch_size: sequences per forward pass.
        seed: with a row's id it decides prompts, negatives and answers.
    """

    model: EngineConfig
    data: DataConfig
    output: OutputConfig
    produce: Literal["pairs", "sft"] = "pairs"
    guided_prompt: str = GUIDED_PROMPT
    neutral_prompts: list[str] = field(default_factory=lambda: list(describing.NEUTRAL_PROMPTS))
    bad_prompts: list[str] = field(default_factory=lambda: list(BAD_PROMPTS))
    negatives: NegativeConfig = field(default_factory=NegativeConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    infusion: InfusionConfig = field(default_factory=InfusionConfig)
    sampling: DescriptionSampling = field(default_factory=DescriptionSampling)
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        describing.check_prompts("guided_prompt", [self.guided_prompt])
        describing.check_prompts("neutral_prompts", self.neutral_prompts)
        describing.check_prompts("bad_prompts", self.bad_prompts)


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.engines.loading import load_engine

    sources.files_of(config.data)
    engine = load_engine(config.model, batch_size=config.batch_size)
    owners = cache(lambda: picture_owners(config.data))
    pairs = config.produce == "pairs"
    return store.run_stage(
        METHOD,
        config.data,
        lambda block: make_pairs(block, engine, config, owners) if pairs else infuse(block, engine, config),
        output=config.output,
        record=Pair if pairs else Example,
        settings=row_settings(config),
        seed=config.seed,
        models={"generator": engine.fingerprint},
    )


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows of what is produced."""
    known = dataclasses.asdict(config)
    shared = {name: known[name] for name in ("produce", "neutral_prompts", "sampling")}
    if config.produce == "sft":
        return {**shared, "infusion": known["infusion"], "cut_off": config.filters.cut_off}
    return {**shared, **{name: known[name] for name in ("guided_prompt", "bad_prompts", "negatives", "filters")}}


@dataclass
class Task:
    """What a row's pair is made of: the prompt it is stored under, and what the rejected answer is asked and shown."""

    neutral: str
    asked: str
    clean: Image.Image
    shown: Image.Image
    meta: dict[str, Any]


def make_pairs(block: list[Prompt], engine: Engine, config: Config, owners: Callable[[], Owners]) -> list[Outcome]:
    """One outcome for each prompt of a block; both answers to all prompts are drawn together.

    Args:
        block: prompts, of which only the pictures are used.
        engine: the generator.
        config: settings.
        owners: gives `picture_owners` of the data.
    """

    def prepare(prompt: Prompt) -> Task | Dropped | Failed:
        if len(prompt.images) > 1:
            return Dropped("several_pictures")
        if prompt.images and not owners().owns(prompt.id, sha256(prompt.images[0])):
            return Dropped("duplicate_picture")
        images = stages.usable(prompt, answer=False)
        return task_of(prompt.id, images[0], config) if isinstance(images, list) else images

    def work(rows: list[tuple[Prompt, Task]]) -> list[Outcome]:
        requests = []
        for prompt, task in rows:
            sides = {"chosen": (config.guided_prompt, task.clean), "rejected": (task.asked, task.shown)}
            for side, (asked, image) in sides.items():
                turn = records.user_message(asked, images=1)
                requests.append(Request(f"{prompt.id}/{side}", [turn], [image], seed=config.seed))
        said = describing.clean_completions(engine, engine.generate(requests, config.sampling))
        return [
            _pair(prompt, task, chosen, rejected, engine.fingerprint, config)
            for (prompt, task), chosen, rejected in zip(rows, said[::2], said[1::2], strict=True)
        ]

    return stages.in_order(block, prepare, work)


def task_of(row: str, image: Image.Image, config: Config) -> Task | Dropped:
    """Draw a row's neutral prompt and the kind of its negative, and corrupt the picture if that is its kind.

    Returns:
        The task, or `unchanged`: shrunk, the picture shows what it showed (a flat one).
    """
    negatives = config.negatives
    rng = random.Random(row_seed(config.seed, f"{row}/negative"))
    neutral, bad = rng.choice(config.neutral_prompts), rng.choice(config.bad_prompts)
    by_prompt, by_size = rng.random() < negatives.bad_prompt_share, rng.random() < negatives.low_resolution_share
    if by_prompt:
        return Task(neutral, bad, image, image, {"negative_kind": "bad_prompt"})
    if not by_size:
        brightness, hue = negatives.jitter.factors(row_seed(config.seed, f"{row}/jitter"))
        shown = colour_jitter(image, brightness=brightness, hue=hue)
        if jitter_shows(image, shown):
            meta = {"negative_kind": "colour_jitter", "brightness": round(brightness, 6), "hue": round(hue, 6)}
            return _on_corrupted(neutral, image, shown, meta, config)
    shown = low_resolution(image, short_side=negatives.short_side)
    if difference(image, shown) < LEAST_CHANGE:
        return Dropped("unchanged")
    meta = {"negative_kind": "low_resolution", "instead_of_jitter": not by_size}
    return _on_corrupted(neutral, image, shown, meta, config)


def _on_corrupted(neutral: str, image: Image.Image, shown: Image.Image, meta: dict[str, Any], config: Config) -> Task:
    corrupt = config.negatives.corrupt
    return Task(neutral, neutral, image, shown if corrupt else image, {**meta, "corrupted": corrupt})


def _pair(
    prompt: Prompt, task: Task, chosen: Completion, rejected: Completion, generator: str, config: Config
) -> Outcome:
    error = chosen.error or rejected.error
    if error is not None:
        return Failed("generation_failed", error)
    similarity = lexical_similarity([chosen.text], [rejected.text])[0]
    reason = rejection(chosen, rejected, similarity, config.filters)
    if reason is not None:
        return Dropped(reason)
    meta = {
        **task.meta,
        "chosen_prompt": config.guided_prompt,
        "rejected_prompt": task.asked,
        "chosen_tokens": chosen.length,
        "rejected_tokens": rejected.length,
        "similarity": round(similarity, 6),
    }
    parent = dataclasses.replace(prompt, messages=[records.user_message(task.neutral, images=1)], answer=None)
    return [
        stages.make_pair(parent, method=METHOD, chosen=chosen.text, rejected=rejected.text, settings=row_settings(config),
                         seed=config.seed, model=generator, meta=meta)
    ]  # fmt: skip


def infuse(block: list[Prompt], engine: Engine, config: Config) -> list[Outcome]:
    """One outcome for each row of a block: an `Example` with the model's description before the question."""

    def work(rows: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        share = config.infusion.plain_share
        plain = [random.Random(row_seed(config.seed, f"{row.id}/plain")).random() < share for row, _ in rows]
        asked = [(row.id, images) for (row, images), stays in zip(rows, plain, strict=True) if not stays]
        said = iter(describing.describe(engine, asked, config.neutral_prompts, config.sampling, seed=config.seed))
        descriptions = [None if stays else next(said) for stays in plain]
        return [
            _example(row, description, engine.fingerprint, config)
            for (row, _), description in zip(rows, descriptions, strict=True)
        ]

    return stages.in_order(block, stages.usable, work)


def _example(prompt: Prompt, description: Completion | None, generator: str, config: Config) -> Outcome:
    settings = row_settings(config)
    messages = prompt.messages
    meta: dict[str, Any] = {"described": description is not None}
    if description is not None:
        if description.error is not None:
            return Failed("generation_failed", description.error)
        if not description.text:
            return Dropped("empty_description")
        if config.filters.cut_off and description.finish_reason == "length":
            return Dropped("cut_off")
        messages = describing.with_description(messages, description.text, config.infusion.template)
        meta["description"] = description.text
        meta["description_prompt"] = describing.drawn_prompt(config.neutral_prompts, config.seed, prompt.id)
        meta["description_tokens"] = description.length
    messages = [*messages, records.assistant_message(str(prompt.answer))]
    return [
        stages.make_example(
            prompt, method=METHOD, messages=messages, settings=settings, seed=config.seed, model=generator, meta=meta
        )
    ]


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is {share}; it is a share of rows, so give a value from 0 to 1.")


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

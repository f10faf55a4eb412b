"""M3ID: chosen answers decoded against the model's own blind answer, rejected ones finished blind.

Chosen is decoded with the picture's pull amplified at every token (`sampling.contrast`). Rejected keeps the first sentence of the
model's ordinary answer, so that it stays on topic, and goes on with the picture taken away: what follows is the prior's. Both are
conditioned on the picture in training. No reference answer, no labels, no other model.

Paper: Favero, Zancato, Trager, Choudhary, Perera, Achille, Swaminathan and Soatto, "Multi-Modal Hallucination Control by Visual
Information Grounding", CVPR 2024, arXiv 2403.14003. The authors released no code.
Not stated there, so settings here: whether the first sentence is part of the rejected string, what becomes of an answer that has
one sentence only, at what temperature the continuation is drawn. Added: blind answers that say so, are empty, cut off or equal
to the chosen one are drawn again, then dropped; both lengths are noted, since what is finished blind tends to ramble.

Needs: rows with pictures; a generator that decodes with and without them (the transformers engine).
The same decoding at inference: `prefalign run evaluate_model --asking.contrast.decay 0.02`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from prefalign import records, sources, stages, store
from prefalign.engines import Completion, Contrast, Engine, ImageMask, Request, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.manifest import Manifest
from prefalign.records import Pair, Prompt
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import normalised, same_answer

if TYPE_CHECKING:
    from PIL import Image

METHOD = "m3id"

SAYS_IT_IS_BLIND = (
    "i see no image", "i see no picture", "there is no image attached", "there is no image provided", "no image was",
    "no image is attached", "no image is provided", "no images were", "no picture was", "no picture is attached",
    "no picture is provided", "i cannot see", "i can't see", "i can not see", "i am unable to see", "i'm unable to see",
    "i am unable to view", "i'm unable to view", "i cannot view", "i can't view", "i am not able to see", "i'm not able to see",
    "i don't see any image", "i don't see any images", "i don't see any picture", "i don't see any pictures",
    "i don't see an image", "i don't see a picture", "i do not see an image", "i do not see a picture", "i do not see any image",
    "access to the image", "access to the picture", "access to any image", "access to images", "you haven't provided",
    "you have not provided", "you didn't provide", "you did not provide", "was not attached", "wasn't attached",
    "image you mentioned", "picture you mentioned", "provide the image", "provide an image", "provide the picture",
    "provide a picture", "please upload", "please attach", "upload the image", "upload an image", "attach the image",
    "attach an image", "share the image", "share the picture", "i am a text-based", "i'm a text-based", "as a text-based",
    "as an ai", "as a language model",
)  # fmt: skip


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        model: the generator, normally the model that will be trained.
        data: rows with pictures; reference answers are not used.
        output: folder of pairs.
        sampling: how chosen answers are decoded; `contrast` is the method. The ordinary answer is decoded alike without it.
        rejected: how blind continuations are drawn. Their picture is taken away as `sampling.contrast.without` says.
        first_sentence: `keep`: rejected is the first sentence and its continuation; `drop`: the continuation alone.
        one_sentence: an ordinary answer of one sentence leaves nothing to continue: `drop` the row, or `restart` from the
            question alone, the whole rejected answer blind.
        refusals: phrases by which a blind answer gives itself away.
        draws: most draws of a continuation until one can be used.
        batch_size: sequences per forward pass.
        seed: with a row's id it decides every draw.
    """

    model: EngineConfig
    data: DataConfig
    output: OutputConfig
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.0, contrast=Contrast()))
    rejected: Sampling = field(default_factory=Sampling)
    first_sentence: Literal["keep", "drop"] = "keep"
    one_sentence: Literal["drop", "restart"] = "drop"
    refusals: list[str] = field(default_factory=lambda: list(SAYS_IT_IS_BLIND))
    draws: int = 5
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sampling.contrast is None:
            raise ValueError(
                "sampling.contrast is null, so chosen answers would be the model's ordinary ones. It is the method: give "
                "`--sampling.contrast.decay 0.02`, as published."
            )
        if self.rejected.contrast is not None:
            raise ValueError(
                "rejected.contrast is given, but a rejected answer is drawn without the picture, so there is nothing to decode "
                "against. Leave it out."
            )
        if self.sampling.attention_layer is not None:
            raise ValueError(
                "sampling.attention_layer is given, which is measured while plain answers are generated, not contrasted ones. "
                "Leave it out."
            )
        if self.rejected.temperature == 0 and self.draws > 1:
            raise ValueError(
                f"rejected.temperature 0 draws the same continuation each time, so draws {self.draws} would be one draw "
                "repeated. Give a temperature above 0 (1.0), or draws 1."
            )
        if self.draws < 1:
            raise ValueError(f"draws {self.draws}: at least 1 draw is needed to make a rejected answer (5).")


@dataclass
class Draft:
    """A row on its way to a pair: its pictures, the chosen answer, the forced start of the rejected one, the last draw."""

    prompt: Prompt
    images: list[Image.Image]
    chosen: Completion
    start: str = ""
    rejected: str = ""
    draw: int = 0
    outcome: Dropped | Failed | None = None


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.engines.loading import load_engine

    sources.files_of(config.data)
    engine = load_engine(
        config.model, batch_size=config.batch_size, needs=["sample", "prefix", "contrast"], stage=METHOD
    )
    return store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, engine, config),
        output=config.output,
        record=Pair,
        settings=row_settings(config),
        seed=config.seed,
        models={"generator": engine.fingerprint},
    )


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows."""
    return {
        "sampling": dataclasses.asdict(config.sampling),
        "rejected": dataclasses.asdict(config.rejected),
        "first_sentence": config.first_sentence,
        "one_sentence": config.one_sentence,
        "refusals": sorted(config.refusals),
        "draws": config.draws,
    }


def process(block: list[Prompt], engine: Engine, config: Config) -> list[Outcome]:
    """One outcome for each prompt of a block: all chosen answers together, all first sentences, then round by round the rest."""

    def work(rows: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        requests = [Request(f"{row.id}/chosen", row.messages, images, seed=config.seed) for row, images in rows]
        answers = engine.generate(requests, config.sampling)
        drafts = [Draft(row, images, chosen) for (row, images), chosen in zip(rows, answers, strict=True)]
        for draft in drafts:
            draft.outcome = unusable(draft.chosen, "chosen")
        add_starts([draft for draft in drafts if draft.outcome is None], engine, config)
        waiting = [draft for draft in drafts if draft.outcome is None]
        for number in range(1, config.draws + 1):
            waiting = draw_blind(waiting, number, engine, config)
        return [draft.outcome or pair(draft, engine.fingerprint, config) for draft in drafts]

    return stages.in_order(block, lambda row: stages.usable(row, answer=False), work)


def add_starts(drafts: Sequence[Draft], engine: Engine, config: Config) -> None:
    """Give each draft the first sentence of the model's ordinary answer; only that sentence is generated."""
    plain = replace(config.sampling, contrast=None)
    requests = [
        Request(f"{draft.prompt.id}/ordinary", draft.prompt.messages, draft.images, seed=config.seed, stop_at_sentence=True)
        for draft in drafts
    ]  # fmt: skip
    for draft, answer in zip(drafts, engine.generate(requests, plain) if requests else [], strict=True):
        if answer.finish_reason == "sentence":
            draft.start = answer.text
        elif answer.finish_reason == "stop" and answer.text.strip():
            draft.outcome = None if config.one_sentence == "restart" else Dropped("one_sentence")
        else:
            draft.outcome = unusable(answer, "ordinary")


def draw_blind(drafts: Sequence[Draft], number: int, engine: Engine, config: Config) -> list[Draft]:
    """Draw what the model says next without the picture; returns the drafts whose answer cannot be used, with the reason why."""
    requests = [blind_request(draft, f"{draft.prompt.id}/rejected/{number}", config) for draft in drafts]
    waiting = []
    for draft, answer in zip(drafts, engine.generate(requests, config.rejected) if requests else [], strict=True):
        draft.draw = number
        draft.rejected = (draft.start + answer.text if config.first_sentence == "keep" else answer.text).strip()
        draft.outcome = unusable(answer, "rejected")
        if draft.outcome is None and says_it_is_blind(answer.text, config.refusals):
            draft.outcome = Dropped("refusal")
        if draft.outcome is None and same_answer(draft.rejected, draft.chosen.text):
            draft.outcome = Dropped("identical_answers")
        if isinstance(draft.outcome, Dropped):
            waiting.append(draft)
    return waiting


def blind_request(draft: Draft, name: str, config: Config) -> Request:
    """The question without its pictures, the answer begun; where the model needs a picture, with all its tokens hidden."""
    assert draft.chosen.contrast is not None
    if draft.chosen.contrast.without == "removed":
        return Request(name, records.without_images(draft.prompt.messages), [], prefix=draft.start, seed=config.seed)
    return Request(name, draft.prompt.messages, draft.images, prefix=draft.start, seed=config.seed,
                   image_mask=ImageMask(1.0, config.seed))  # fmt: skip


def unusable(answer: Completion, side: str) -> Dropped | Failed | None:
    """Why an answer cannot be part of a pair, or None."""
    if answer.error is not None:
        return Failed("generation_failed", answer.error)
    if answer.finish_reason == "length":
        return Dropped(f"cut_off_{side}")
    return None if answer.text.strip() else Dropped(f"empty_{side}")


def says_it_is_blind(text: str, phrases: Sequence[str]) -> bool:
    """Whether a text holds one of the phrases, whatever its case, quotes and dashes."""
    words = f" {normalised(text)} "
    return any(f" {normalised(phrase)} " in words for phrase in phrases)


def pair(draft: Draft, generator: str, config: Config) -> list[Pair]:
    """The pair of a draft whose rejected answer can be used."""
    chosen, contrast = draft.chosen.text.strip(), draft.chosen.contrast
    assert contrast is not None
    meta = {
        "without": contrast.without,
        "active_share": round(contrast.active, 3),
        "dependence": round(contrast.dependence, 3),
        "start": draft.start,
        "draw": draft.draw,
        "words": {"chosen": len(chosen.split()), "rejected": len(draft.rejected.split())},
    }
    return [
        stages.make_pair(draft.prompt, method=METHOD, chosen=chosen, rejected=draft.rejected, settings=row_settings(config),
                         seed=config.seed, model=generator, meta=meta)
    ]  # fmt: skip


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

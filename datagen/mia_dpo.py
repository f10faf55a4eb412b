"""MIA-DPO: questions about one picture among several; rejected is what the model says while it looks at the others.

A single-picture row becomes a sequence of pictures, a labelled grid, or a picture laid into another; the question names the
picture it is about. The model answers greedily, and its answer is kept as rejected if little of its attention goes to that
picture, in one decoder layer. Chosen is the reference answer.

Paper: Liu, Zang, Dong et al., "MIA-DPO: Multi-Image Augmented Direct Preference Optimization", arXiv 2410.17637; code at a85c51a.
Differs from the released code: cells are mapped to tokens through the real processor, labels counted with their cell and margins
and padding with none (`selection.cells: even` cuts the token map evenly, as released); canvases are padded to squares, so that no
processor crops a cell away; distractors never have the target's bytes; noise on what the model sees is off by default and clamped
(`noise.wrap` as released); "differs from the reference" leaves case and punctuation out; length ratio and edit distance, which
the README names and the code lacks, are checked; answers cut off at the limit are dropped.

Needs: rows with one picture and a reference answer, several distinct pictures in the data; the transformers engine.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefalign import collage, records, sources, stages, store
from prefalign.collage import Box, Layouts, Wording
from prefalign.engines import Completion, Engine, ImageAttention, Request, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.images import EncodedImage, encode_png, open_image, sha256
from prefalign.manifest import Manifest
from prefalign.records import Message, Pair, Prompt
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import same_answer

if TYPE_CHECKING:
    from PIL import Image

    from prefalign.grounding import Grounding
    from prefalign.pictures import PicturePool

METHOD = "mia_dpo"
_BOX = re.compile(r"\[\s*\d*\.?\d+(?:\s*,\s*\d*\.?\d+){3}\s*\]")
_SHORT = 5


@dataclass
class Noise:
    """Gaussian noise on what the model sees; stored pictures stay clean. Standard deviations in levels of 255; 0: none.

    Attributes:
        grid: on the target's cell.
        pic_in_pic: on the whole canvas.
        wrap: let bytes wrap around, as released.
    """

    grid: float = 0.0
    pic_in_pic: float = 0.0
    wrap: bool = False


@dataclass
class Selection:
    """Which answers are kept as rejected.

    Attributes:
        layer: decoder layer whose attention is read, 0-based, negative from the end; None: the middle one.
        cells: `pixels` maps cells to image tokens through the processor, `even` cuts a square token map, as released.
        sequence: number of pictures to the largest share of attention on the target.
        grid: the same; the share must lie below.
        pic_in_pic: the same.
        most_answer_characters: rows whose reference answer is longer are skipped.
        least_perplexity: answers the model was surer of are dropped.
        most_length_ratio: words of the longer answer over words of the shorter.
        most_length_ratio_short: the same where both have fewer than five words.
        least_edit_distance: normalised edit distance of the two answers, in characters.
    """

    layer: int | None = None
    cells: Literal["pixels", "even"] = "pixels"
    sequence: dict[int, float] = field(default_factory=lambda: {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6})
    grid: dict[int, float] = field(default_factory=lambda: {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3})
    pic_in_pic: float = 0.8
    most_answer_characters: int = 511
    least_perplexity: float = 1.1
    most_length_ratio: float = 3.0
    most_length_ratio_short: float = 10.0
    least_edit_distance: float = 0.1


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        model: the model that will be trained.
        data: rows with one picture and a reference answer; their pictures are the distractors too.
        output: folder of pairs.
        layouts: which layouts are made.
        wording: how questions name their picture.
        noise: noise on what the model sees.
        selection: which answers are kept.
        max_new_tokens: limit of an answer; answers are greedy.
        batch_size: sequences per forward pass.
        seed: with a row's id it decides layout, distractors, places, wording and noise.
    """

    model: EngineConfig
    data: DataConfig
    output: OutputConfig
    layouts: Layouts = field(default_factory=Layouts)
    wording: Wording = field(default_factory=Wording)
    noise: Noise = field(default_factory=Noise)
    selection: Selection = field(default_factory=Selection)
    max_new_tokens: int = 512
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("sequence", "grid"):
            shares, thresholds = getattr(self.layouts, f"{name}_sizes"), getattr(self.selection, name)
            missing = sorted(count for count, share in shares.items() if share > 0 and count not in thresholds)
            if missing and getattr(self.layouts, name) > 0:
                raise ValueError(
                    f"selection.{name} has no threshold for {missing} pictures, which layouts.{name}_sizes draws. Give one."
                )


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.engines.loading import load_engine
    from prefalign.engines.transformers import TransformersEngine
    from prefalign.grounding import Grounding
    from prefalign.pictures import build_pool

    sources.files_of(config.data)
    engine = load_engine(config.model, batch_size=config.batch_size, needs=["attention"], stage=METHOD)
    assert isinstance(engine, TransformersEngine)
    grounding = Grounding(engine.model, engine.processor)
    pool = functools.cache(lambda: build_pool(config.output.path / "pool", config.data))
    return store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, engine, grounding, pool(), config),
        output=config.output,
        record=Pair,
        settings=row_settings(config),
        seed=config.seed,
        models={"generator": engine.fingerprint},
    )


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows."""
    parts = {name: dataclasses.asdict(getattr(config, name)) for name in ("layouts", "wording", "noise", "selection")}
    settings: dict[str, Any] = json.loads(records.canonical_json({**parts, "max_new_tokens": config.max_new_tokens}))
    return settings


@dataclass
class Task:
    """A row among its distractors: what is stored, what the model sees, and where the target is.

    Attributes:
        prompt: the row, its answer that of the question asked.
        layout: `sequence`, `grid` or `pic_in_pic`.
        count: number of pictures.
        target: number of the target among them.
        images: what is stored, encoded.
        shown: what the model sees, decoded.
        messages: the question, with its placeholders.
        regions: of a composed picture, where each part lies.
        companions: SHA-256 of the distractors.
        noise: standard deviation of the noise on what is shown.
    """

    prompt: Prompt
    layout: str
    count: int
    target: int
    images: list[EncodedImage]
    shown: list[Image.Image]
    messages: list[Message]
    regions: list[Box]
    companions: list[str]
    noise: float = 0.0


def process(
    block: list[Prompt], engine: Engine, grounding: Grounding, pool: PicturePool, config: Config
) -> list[Outcome]:
    """One outcome for each prompt of a block; each step asks the engine about all rows that are still in."""
    limits = config.selection

    def work(rows: list[tuple[Prompt, Task]]) -> list[Outcome]:
        tasks = [task for _, task in rows]
        requests = [Request(task.prompt.id, task.messages, task.shown, seed=config.seed) for task in tasks]
        layer: int | Literal["middle"] = "middle" if limits.layer is None else limits.layer
        greedy = Sampling(max_new_tokens=config.max_new_tokens, temperature=0, attention_layer=layer)
        answers = engine.generate(requests, greedy)
        outcomes: dict[int, Outcome] = {}
        measured: dict[int, dict[str, Any]] = {}
        for index, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
            if (problem := text_problem(answer, str(task.prompt.answer), limits)) is not None:
                outcomes[index] = problem
                continue
            found = answer.attention
            assert found is not None, "the engine measures what Sampling.attention_layer asks for"
            if found.error is not None:
                outcomes[index] = Failed("attention_failed", found.error)
            elif math.isnan(share := target_share(task, found, grounding, limits)):
                outcomes[index] = Dropped("no_attention_to_pictures")
            elif on_target(task, share, limits):
                outcomes[index] = Dropped("attention_on_target")
            else:
                measured[index] = {"attention_ratio": round(share, 4), "layer": found.layer}

        left = sorted(measured)
        scores = engine.logprobs([requests[i] for i in left], [answers[i] for i in left])
        for index, values in zip(left, scores, strict=True):
            perplexity = math.exp(-float(values.double().mean()))
            if math.isnan(perplexity):
                outcomes[index] = Failed("perplexity_failed", "the answer spells a mark that stands for a picture, so the "
                                         "model cannot be asked how sure it was of it.")  # fmt: skip
            elif perplexity <= limits.least_perplexity:
                outcomes[index] = Dropped("too_certain")
            else:
                measured[index]["perplexity"] = round(perplexity, 4)
                outcomes[index] = [_pair(tasks[index], answers[index], measured[index], engine.fingerprint, config)]
        return [outcomes[index] for index in range(len(tasks))]

    return stages.in_order(block, lambda prompt: prepare(prompt, grounding, pool, config), work)


def prepare(prompt: Prompt, grounding: Grounding, pool: PicturePool, config: Config) -> Task | Dropped | Failed:
    """The row with a layout, distractors and the phrase drawn for it, or why it cannot be used."""
    images = stages.usable(prompt)
    if not isinstance(images, list):
        return images
    if len(images) != 1:
        return Dropped("not_one_picture")
    system = [message for message in prompt.messages if message["role"] == "system"]
    turns = [message for message in prompt.messages if message["role"] != "system"]
    if records.placeholder_count(turns[:1]) != 1:
        return Dropped("picture_not_in_first_turn")
    # of a longer conversation the first question counts, as published
    prompt = dataclasses.replace(prompt, answer=records.message_text(turns[1:2]) or prompt.answer)
    question, answer = records.message_text(turns[:1]).strip(), str(prompt.answer)
    if len(answer) > config.selection.most_answer_characters:
        return Dropped("long_answer")
    rng = random.Random(records.row_seed(config.seed, f"{prompt.id}/layout"))
    layout, count = config.layouts.draw(rng)
    if layout != "sequence" and _BOX.search(f"{question}\n{answer}"):
        return Dropped("names_a_box")
    target = rng.randrange(count) if layout != "pic_in_pic" else 1
    text = config.wording.question(layout, target, question, rng)
    others = _companions(pool, sha256(prompt.images[0]), count - 1, rng)
    if others is None:
        return Dropped("too_few_pictures")
    encoded = [*others[:target], prompt.images[0], *others[target:]]
    pictures = [images[0] if number == target else open_image(image) for number, image in enumerate(encoded)]
    companions = [sha256(image) for image in others]
    if layout == "sequence":
        messages = [*system, config.wording.turn(text, count)]
        return Task(prompt, layout, count, target, encoded, pictures, messages, [], companions)

    style = config.layouts.style
    made = collage.grid(pictures, style) if layout == "grid" else collage.inset(*pictures, square=style.square)
    task = Task(prompt, layout, count, target, [encode_png(made.image, f"{layout}.png")], [made.image],
                [*system, records.user_message(text, 1)], made.regions, companions)  # fmt: skip
    if config.selection.cells == "pixels" and not _all_shown(task, grounding):
        return Dropped("cell_cropped_away")
    task.noise = config.noise.grid if layout == "grid" else config.noise.pic_in_pic
    if task.noise > 0:
        box = made.cells[target] if layout == "grid" else (0, 0, *made.image.size)
        seed = records.row_seed(config.seed, f"{prompt.id}/noise")
        task.shown = [collage.noised(made.image, box, std=task.noise, seed=seed, wrap=config.noise.wrap)]
    return task


def _companions(pool: PicturePool, own: str, count: int, rng: random.Random) -> list[EncodedImage] | None:
    """Distinct pictures other than the row's own, drawn whatever the order of the data; None if there are too few."""
    if len(pool) <= count:
        return None
    found: list[int] = []
    while len(found) < count:
        number = int(pool.by_digest[rng.randrange(len(pool))])
        if number not in found and pool.digest(number) != own:
            found.append(number)
    return [pool[number] for number in found]


def text_problem(completion: Completion, gold: str, limits: Selection) -> Dropped | Failed | None:
    """Why an answer cannot be the rejected one, as far as its text says."""
    from rapidfuzz.distance import Levenshtein

    answer = completion.text.strip()
    if completion.error is not None:
        return Failed("generation_failed", completion.error)
    if completion.finish_reason == "length":
        return Dropped("cut_off")
    if not answer:
        return Dropped("empty_answer")
    if same_answer(answer, gold):
        return Dropped("same_as_reference")
    words = sorted((len(answer.split()), len(gold.split())))
    if words[1] > words[0] * (limits.most_length_ratio_short if words[1] < _SHORT else limits.most_length_ratio):
        return Dropped("length_ratio")
    if Levenshtein.normalized_distance(answer, gold) < limits.least_edit_distance:
        return Dropped("near_reference")
    return None


def target_share(task: Task, found: ImageAttention, grounding: Grounding, limits: Selection) -> float:
    """Share of the target in the answer's attention to the pictures, by layout; NaN if the pictures get none."""
    from prefalign.grounding import cell_share, even_centre, even_split, sequence_share

    weights = found.weights.numpy()
    if task.layout == "sequence":
        return sequence_share(weights, found.image.numpy(), task.target)
    if limits.cells == "pixels":
        cells = _cells(task, grounding)
    elif task.layout == "grid":
        cells = even_split(len(weights), *collage.GRIDS[task.count])
    else:
        cells = even_centre(len(weights))
    return cell_share(weights, cells, task.target if task.layout == "grid" else 0)


def _cells(task: Task, grounding: Grounding) -> Any:
    from prefalign.grounding import tokens_in

    return tokens_in(grounding.centres(task.shown[0].size), task.regions)


def _all_shown(task: Task, grounding: Grounding) -> bool:
    """Whether each part that the share is about has a token: every cell of a grid, the inset of a picture in a picture."""
    parts = range(len(task.regions)) if task.layout == "grid" else (0,)
    return set(parts) <= set(_cells(task, grounding))


def on_target(task: Task, share: float, limits: Selection) -> bool:
    """Whether so much attention goes to the target that the answer is no example of looking elsewhere."""
    if task.layout == "sequence":
        return share > limits.sequence[task.count]
    return share >= (limits.grid[task.count] if task.layout == "grid" else limits.pic_in_pic)


def _pair(task: Task, answer: Completion, measured: dict[str, Any], generator: str, config: Config) -> Pair:
    meta = {
        "layout": task.layout,
        "n_images": task.count,
        "target_index": task.target + 1,
        "companions": task.companions,
        "noise_std": task.noise,
        **measured,
    }
    return stages.make_pair(task.prompt, method=METHOD, chosen=str(task.prompt.answer), rejected=answer.text.strip(),
                            settings=row_settings(config), seed=config.seed, model=generator, meta=meta, images=task.images,
                            prompt=task.messages)  # fmt: skip


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

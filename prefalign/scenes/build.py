"""Train the tiny base VLM of the embedded world from a seed, on two CPU cores, and write it with its card.

What it learns from is true: captions that may leave things out, long descriptions, and questions with complete answers, of
pictures in which shapes keep company. Some rows hide all or many image tokens (zeros in the attention mask, positions
unshifted) and some have no picture, so that the model stays fluent when it is blind. Loss falls on answers only.
"""

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from prefalign.progress import progress_bar
from prefalign.scenes import language, measure, vision
from prefalign.scenes.data import BASE_PICTURES, pair_turns
from prefalign.scenes.model import IMAGE, IMAGE_TOKENS, processor, save, untrained
from prefalign.scenes.world import draw, scene

STEPS = 1100
CAPTIONS, CONVERSATIONS = 25, 11  # rows a step: captions and descriptions, and conversations of questions
TURNS = 6  # questions a conversation
PEAK_LR = 2e-3
WARM_UP = 60
HIDDEN, PARTLY_HIDDEN, NO_PICTURE = 0.14, 0.10, 0.08  # shares of rows; the rest see their whole picture
PAIRS = 0.08  # share of the conversations that are about two pictures
IGNORE = -100


@dataclass(frozen=True)
class Row:
    """One training row: `ids` and `labels` (T,), which pictures it shows, and which positions are hidden from attention."""

    ids: list[int]
    labels: list[int]
    pictures: list[int]
    hidden: list[int]


def encode(words: PreTrainedTokenizerFast, turns: list[tuple[str, str]], images: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation, exactly as the chat template and the processor would write it.

    `turns` are (question, answer) pairs; `images` pictures come before the first question. Labels are the answers' tokens.
    """
    ids, labels = [words.bos_token_id], [IGNORE]
    for number, (asked, answer) in enumerate(turns):
        shown = (IMAGE * IMAGE_TOKENS + "\n") * images if number == 0 else ""
        prompt = words(f"USER: {shown}{asked} ASSISTANT:", add_special_tokens=False).input_ids
        said = [*words(f" {answer}", add_special_tokens=False).input_ids, words.eos_token_id]
        ids += prompt + said
        labels += [IGNORE] * len(prompt) + said
    return ids, labels


def training_row(words: PreTrainedTokenizerFast, rng: random.Random, asks: bool, pictures: int) -> Row:
    """Draw one row: a conversation of questions (`asks`) or a caption or description, seen, hidden or without picture."""
    number = rng.randrange(pictures)
    picture = scene("train_biased", number)
    draw_number = rng.randrange(1_000_000)
    shown = [number]
    if asks and rng.random() < PAIRS:
        shown.append(rng.randrange(pictures))
        turns = pair_turns(picture, scene("train_biased", shown[1]), rng)[:4]
    elif asks:
        asked = language.questions(picture, draw_number)[:TURNS]
        turns = [(question.text, question.answer) for question in asked]
    elif rng.random() < 0.7:
        turns = [(rng.choice(language.CAPTION_PROMPTS), language.caption(picture, draw_number))]
    else:
        turns = [(rng.choice(language.DESCRIPTION_PROMPTS), language.description(picture, draw_number))]
    fate = rng.random()
    if fate < NO_PICTURE:
        return Row(*encode(words, turns, 0), pictures=[], hidden=[])
    ids, labels = encode(words, turns, len(shown))
    share = 0.0
    if fate < NO_PICTURE + HIDDEN:
        share = 1.0
    elif fate < NO_PICTURE + HIDDEN + PARTLY_HIDDEN:
        share = rng.uniform(0.3, 0.95)
    image = words.convert_tokens_to_ids(IMAGE)
    hidden = [at for at, token in enumerate(ids) if token == image and rng.random() < share]
    return Row(ids, labels, shown, hidden)


def batch(rows: list[Row], pixels: np.ndarray, pad: int) -> dict[str, torch.Tensor]:
    """Rows as tensors, padded on the right: ids, labels and mask (B, T), pixels (images, 3, 60, 60) from -1 to 1."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORE)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        labels[at, : len(row.ids)] = torch.tensor(row.labels)
        mask[at, : len(row.ids)] = 1
        mask[at, row.hidden] = 0
    shown = torch.from_numpy(pixels[[number for row in rows for number in row.pictures]])
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "position_ids": torch.arange(length).expand(len(rows), length),
        "pixel_values": shown.permute(0, 3, 1, 2).float() / 127.5 - 1.0,
    }


def loss_of(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the answers' tokens, and how many there are."""
    labels = inputs["labels"][:, 1:]
    given = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = model.model(**given, use_cache=False).last_hidden_state[:, :-1]
    kept = labels != IGNORE
    logits = model.lm_head(hidden[kept])
    return torch.nn.functional.cross_entropy(logits.float(), labels[kept], reduction="sum"), int(kept.sum())


def rate(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, held for three fifths, then a cosine down to a fiftieth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    done = max(0.0, (step / steps - 0.6) / 0.4)
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * done))


def optimizers_for(model: LlavaForConditionalGeneration) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers, AdamW for embeddings, head and everything that is not a matrix."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        inner = weight.dim() == 2 and not any(part in name for part in ("embed", "lm_head", "position"))
        (matrices if inner else others).append(weight)
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    maker: LlavaProcessor,
    *,
    seed: int = 0,
    steps: int = STEPS,
    vision_steps: int = vision.STEPS,
    pictures: int = BASE_PICTURES,
    watch: int = 0,
) -> LlavaForConditionalGeneration:
    """Train from random weights. `watch` prints quick figures on 128 fair validation pictures every so many steps."""
    words = maker.tokenizer
    model = untrained(words, seed).train()
    pixels = np.stack(
        [np.asarray(draw(scene("train_biased", at))) for at in progress_bar(range(pictures), desc="pictures")]
    )
    vision.warm_up(model, words, pixels, seed=seed, steps=vision_steps)
    optimizers = optimizers_for(model)
    rng = random.Random(f"scenes base {seed}")
    bar = progress_bar(range(steps), desc="training")
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * rate(step, steps)
        kinds = [[training_row(words, rng, asks, pictures) for _ in range(number)]
                 for asks, number in ((False, CAPTIONS), (True, CONVERSATIONS))]  # fmt: skip
        total, tokens = 0.0, 0
        for rows in kinds:
            inputs = batch(rows, pixels, words.pad_token_id)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss, number = loss_of(model, inputs)
            (loss / number * len(rows) / (CAPTIONS + CONVERSATIONS)).backward()
            total, tokens = total + loss.item(), tokens + number
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{total / tokens:.3f}")
        if watch and (step + 1) % watch == 0:
            model.eval()
            quick = measure.half(model, maker, "val_fair", 128)
            model.train()
            bar.write(
                f"step {step + 1} loss {total / tokens:.3f} " + json.dumps({k: round(v, 3) for k, v in quick.items()})
            )
    return model.eval()


def build(
    output: str | Path,
    seed: int = 0,
    steps: int = STEPS,
    *,
    vision_steps: int = vision.STEPS,
    pictures: int = BASE_PICTURES,
    sample: int = measure.SAMPLE,
    watch: int = 0,
) -> dict:
    """Train the base, save it to `output`, measure what was saved, write its card (README.md), and return the figures."""
    if steps < 1:
        raise ValueError(
            f"steps={steps}: the base needs at least one training step; leave it out for the usual {STEPS}"
        )
    folder = Path(output)
    began = time.monotonic()
    maker = processor()
    save(train(maker, seed=seed, steps=steps, vision_steps=vision_steps, pictures=pictures, watch=watch), maker, folder)
    minutes = (time.monotonic() - began) / 60
    figures = measure.figures(folder, sample=sample)
    (folder / "README.md").write_text(card(figures, seed=seed, steps=steps, pictures=pictures, minutes=minutes))
    return figures


def card(figures: dict, *, seed: int, steps: int, pictures: int, minutes: float) -> str:
    """The model card: what the base is, what it measures, how to rebuild it."""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, synthetic, hallucination, prefalign]
---
# The tiny base VLM of prefalign's embedded world

LLaVA architecture, {figures["parameters"]:,} parameters in {figures["dtype"]}, {figures["bytes"] / 1e6:.1f} MB.
It describes 60x60 pictures of coloured shapes and answers questions about them, and it hallucinates for the reason real
models do: in its training pictures shapes keep company, two objects in five are faint, and captions that say more than can
be seen teach it to guess. Nothing it was trained on is false.

It is a test object for alignment methods. It knows nothing of the world outside `prefalign.scenes`.

## Figures

Greedy answers, {figures["sample"]} pictures of each split, from the saved weights (`prefalign scenes figures` prints them):

{measure.table(figures)}

## Training

Vision tower and projector first learned for {vision.STEPS} steps to name what stands at each place, in the word embeddings
of the untrained language model (`vision.py`). Then {steps} steps of {CAPTIONS} captions and {CONVERSATIONS} conversations on
{pictures:,} pictures of `train_biased`, seed {seed}: Muon for inner matrices and AdamW for the rest at {PEAK_LR}, warm-up and
cosine, bfloat16 autocast, loss on answers only; weights saved in float16. {HIDDEN:.0%} of the rows hide every image token,
{PARTLY_HIDDEN:.0%} many of them, {NO_PICTURE:.0%} have no picture. It took {minutes:.0f} minutes on two CPU cores.

Rebuild: `prefalign scenes build --output DIR --seed {seed}`.

## Prompts it knows

- captions: {_quoted(language.CAPTION_PROMPTS)}
- descriptions: {_quoted(language.DESCRIPTION_PROMPTS)}
- questions: "Is there a star in the picture?", "Is the star red?", "What colour is the star?", "How many stars are there?"
  (each also with "{language.SHORT}" behind it), "Where is the star?", "Tell me where the star is.", "What is at the top left?"
- about two pictures: "Which picture shows a star?", "What is at the top left in the first picture?",
  "Describe the first picture."
"""


def _quoted(prompts: tuple[str, ...]) -> str:
    return ", ".join(f'"{prompt}"' for prompt in prompts)

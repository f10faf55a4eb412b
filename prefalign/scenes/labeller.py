"""A labeller for the embedded world: a small VLM that answers whether a claim about a picture is true, and nothing else.

RLAIF-V's labeller is a stronger model than the one whose claims it judges. The base says yes to nearly every claim, so this is
another model, made in a minute and a half on one CPU core from pictures of `train_fair` from 40,000 on, which nothing else uses:

1. `learn_to_see`: the upper half of the base's vision tower and a projector learn to write into each image token what stands at
   its place. Each shape, colour, size and place has a number of its own in the embeddings (`kinds`), the same one for words and
   for image tokens, so that the words "large red circle" are like the image token of one.
2. `untrained`: a language model of two layers, one for each of the two looks that answer a question:

       Is there a large red circle at the top left? ASSISTANT:
       `_gather_words`      ":" looks at the words of the claim, and adds them up;
       `_find_in_picture`   ":" looks for an image token like that sum, and finds it (yes), or else looks at "<s>" (no).

   These two looks are written into its attention. Random weights have to find both at once, since neither is of use alone:
   after 100 steps they still said yes to every claim.
3. `learn_to_answer`: projector and language model learn to say yes or no of claims (`claims.draw_claims`); so they learn how
   much alike is enough, and what to make of a picture that leaves doubt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from prefalign.progress import progress_bar
from prefalign.scenes import base_checkpoint, measure, vision
from prefalign.scenes.claims import Claim, draw_claims
from prefalign.scenes.language import SYNONYMS
from prefalign.scenes.model import HEADS, IMAGE, IMAGE_TOKENS, WIDTH, config, save
from prefalign.scenes.world import COLOURS, PLACES, SHAPES, SIZES, Scene, draw, scene, split_named

SPLIT, START, PICTURES = "train_fair", 40_000, 5_000
SEEING, STEPS = 320, 250  # steps of seeing, then of answering
ROWS, CLAIMS = 16, 8  # pictures a step, claims about each
FALSE_WEIGHT = 4.0  # a drawn claim is false half of the time, one of the base's own four times in five
LAYERS = 2
UPPER = 2  # layers of the vision tower that learn, of four
ROPE_THETA = 1e12  # the turns that are used are slow: where a token stands hardly matters
FAST = 8  # of the 32 turns of a head, those that are too fast to be used

SHAPE, COLOUR, SIZE, PLACE = 0, 9, 15, 17  # where in the embeddings each kind begins; the ninth shape is "nothing"
WORD, ASKS, FIRST, YES, NO, PICTURE = range(26, 32)
SEEN = slice(0, 26)
PEAK_LR = 3e-4
SHARPNESS = 4.0
IGNORE = -100


def kinds() -> list[tuple[int, tuple[str, ...]]]:
    """Where the numbers of each kind begin, and the names of its values."""
    return [(SHAPE, SHAPES), (COLOUR, tuple(COLOURS)), (SIZE, tuple(SIZES)), (PLACE, PLACES)]


def untrained(words: Any, seed: int = 0) -> LlavaForConditionalGeneration:
    """The model with the base's vision tower and the two looks in its attention, in float32. The tower's lower half is fixed.

    Args:
        words: the base's tokenizer.
        seed: draws all that is not set.
    """
    known = config(words)
    known.text_config.num_hidden_layers = LAYERS
    known.text_config.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(known)
    language_model = model.model.language_model
    for name, weight in language_model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.02 if "gate" in name or "up" in name else 0.005)
    base = AutoModelForImageTextToText.from_pretrained(base_checkpoint(), dtype=torch.float32)
    model.model.vision_tower.load_state_dict(base.model.vision_tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    _upper(model).requires_grad_(True)
    with torch.no_grad():
        _name_words(language_model.embed_tokens.weight, words)
        gather, find = (layer.self_attn for layer in language_model.layers)
        _gather_words(gather)
        _find_in_picture(find)
        model.lm_head.weight.normal_(std=0.02)
        yes, no = answer_ids(words)
        model.lm_head.weight[yes, YES] = model.lm_head.weight[no, NO] = 1.0
    return model


def answer_ids(words: Any) -> tuple[int, int]:
    """The tokens that an answer begins with: yes, no."""
    yes, no = (words(f" {word}", add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    return yes, no


def _name_words(table: torch.Tensor, words: Any) -> None:
    def row(word: str) -> torch.Tensor:
        (token,) = words(word, add_special_tokens=False).input_ids
        return table[token]

    for begin, names in kinds():
        for number, name in enumerate(names):
            for word in SYNONYMS.get(name, [name]):
                row(f" {word}")[[begin + number, WORD]] = 1.0
    row(":")[ASKS] = 1.0
    table[words.bos_token_id, FIRST] = 1.0


def _free() -> torch.Tensor:
    """Numbers of a head that turn slowly."""
    half = WIDTH // HEADS // 2
    return torch.cat([torch.arange(FAST, half), torch.arange(half + FAST, 2 * half)])


def _gather_words(attention: Any) -> None:
    """The last token attends to the words of the claim, and adds what they are about."""
    at = int(_free()[0])
    attention.q_proj.weight[at, ASKS] = attention.k_proj.weight[at, WORD] = 1.2
    for number in range(SEEN.stop):
        attention.v_proj.weight[number, number] = 1.0
        attention.o_proj.weight[number, number] = 0.5


def _find_in_picture(attention: Any) -> None:
    """The last token attends to image tokens that are like the claim, or to the first token."""
    slots = _free()
    for number in range(SEEN.stop):
        attention.q_proj.weight[slots[number], number] = attention.k_proj.weight[slots[number], number] = 1.0
    sink = slots[SEEN.stop]
    attention.q_proj.weight[sink, ASKS] = attention.k_proj.weight[sink, FIRST] = 0.9
    attention.k_proj.weight[sink, ASKS] = -6.0  # not to itself, which is most like what it asks
    attention.v_proj.weight[0, PICTURE] = attention.v_proj.weight[1, FIRST] = 1.0
    attention.o_proj.weight[YES, 0] = attention.o_proj.weight[NO, 1] = 1.0


def seen_truth(picture: Scene) -> torch.Tensor:
    """What the image tokens should say, (IMAGE_TOKENS, 4): numbers of shape, colour, size and place within their kinds."""
    there = torch.tensor([[*what, place] for place, what in enumerate(vision.labels(picture))])
    return there[vision.token_places()]


def _upper(model: LlavaForConditionalGeneration) -> torch.nn.ModuleList:
    """The tower's layers that learn."""
    return model.model.vision_tower.encoder.layers[-UPPER:]


@torch.no_grad()
def lower_half(model: LlavaForConditionalGeneration, pixels: np.ndarray) -> torch.Tensor:
    """What the tower's lower half gives for pictures (B, 60, 60, 3): (B, 1 + IMAGE_TOKENS, WIDTH)."""
    parts = []
    for start in range(0, len(pixels), 128):
        images = torch.from_numpy(pixels[start : start + 128]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        parts.append(model.model.vision_tower(images, output_hidden_states=True).hidden_states[-1 - UPPER])
    return torch.cat(parts)


def upper_half(model: LlavaForConditionalGeneration, given: torch.Tensor) -> torch.Tensor:
    """What the whole tower gives, (B, IMAGE_TOKENS, WIDTH), of `lower_half` (B, 1 + IMAGE_TOKENS, WIDTH)."""
    for layer in _upper(model):
        given = layer(given, attention_mask=None)
    return given[:, 1:]


def learn_to_see(model: LlavaForConditionalGeneration, given: torch.Tensor, truth: torch.Tensor, steps: int) -> None:
    """Train the tower's upper half and the projector to say what is at the place of each image token.

    Args:
        model: both are changed.
        given: `lower_half` of the pictures, (pictures, 1 + IMAGE_TOKENS, WIDTH).
        truth: `seen_truth` of the pictures, (pictures, IMAGE_TOKENS, 4).
        steps: updates of 64 pictures.
    """
    projector = model.model.multi_modal_projector
    rates = {_upper(model): 1e-3, projector: 4e-3}
    groups = [{"params": list(part.parameters())} for part in rates]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [*rates.values()], total_steps=steps + 1, pct_start=0.1)
    ends = [*(begin for begin, _ in kinds()[1:]), SEEN.stop]
    rest = torch.zeros(WIDTH - SEEN.stop)
    rest[PICTURE - SEEN.stop] = 1.0
    for _ in progress_bar(range(steps), desc="seeing"):
        chosen = torch.randint(0, len(given), (64,))
        said = projector(upper_half(model, given[chosen]))
        parts = [
            cross_entropy(
                SHARPNESS * said[..., begin:end].flatten(0, 1), truth[chosen, :, at].flatten(), ignore_index=IGNORE
            )
            for at, ((begin, _), end) in enumerate(zip(kinds(), ends, strict=True))
        ]
        loss = torch.stack(parts).sum() + (said[..., SEEN.stop :] - rest).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class Asked:
    """Claims about one picture in one sequence, each of which sees the picture and itself: all (T,), or (T, T)."""

    ids: list[int]
    labels: list[int]
    positions: list[int]
    block: list[int]


def ask(words: Any, claims: list[Claim]) -> Asked:
    """The prompts of claims, as the chat template writes each; the picture stands once. Labels are at the last tokens."""
    yes, no = answer_ids(words)
    start = words(f"USER: {IMAGE * IMAGE_TOKENS}\n", add_special_tokens=False).input_ids
    ids = [words.bos_token_id, *start]
    labels, positions, block = [IGNORE] * len(ids), [*range(len(ids))], [0] * len(ids)
    first = len(ids)
    for number, claim in enumerate(claims, 1):
        prompt = words(f"{claim.question} ASSISTANT:", add_special_tokens=False).input_ids
        ids += prompt
        labels += [IGNORE] * (len(prompt) - 1) + [yes if claim.true else no]
        positions += range(first, first + len(prompt))
        block += [number] * len(prompt)
    return Asked(ids, labels, positions, block)


def loss_of(
    model: LlavaForConditionalGeneration, rows: list[Asked], seen: torch.Tensor, words: Any, false_weight: float = 1.0
) -> torch.Tensor:
    """Mean cross-entropy of yes and no over all claims.

    Args:
        model: the labeller.
        rows: claims about B pictures.
        seen: what the tower gives for these, (B, IMAGE_TOKENS, WIDTH).
        words: the tokenizer.
        false_weight: how many times a false claim counts.
    """
    length = max(len(row.ids) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([getattr(row, name) + [value] * (length - len(row.ids)) for row in rows])

    ids, labels, block = padded("ids", words.pad_token_id), padded("labels", IGNORE), padded("block", -1)
    visible = ((block[:, None] == 0) | (block[:, :, None] == block[:, None])) & torch.ones(length, length).tril().bool()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    table = model.get_input_embeddings()(ids)
    image = (ids == model.config.image_token_id)[..., None].expand_as(table)
    table = table.masked_scatter(image, model.model.multi_modal_projector(seen))
    hidden = model.model.language_model(
        inputs_embeds=table, attention_mask=mask, position_ids=padded("positions", 0), use_cache=False
    ).last_hidden_state
    asked = labels != IGNORE
    weight = torch.ones(model.config.text_config.vocab_size)
    weight[answer_ids(words)[1]] = false_weight
    return cross_entropy(model.lm_head(hidden[asked]), labels[asked], weight)


def learn_to_answer(
    model: LlavaForConditionalGeneration, words: Any, scenes: list[Scene], seen: torch.Tensor, *, steps: int, seed: int
) -> None:
    """Train projector and language model on claims about pictures for which the tower gives `seen`."""
    parts = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
    weights = [weight for part in parts for weight in part.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps + 1, pct_start=0.1)
    rng = random.Random(f"scenes labeller {seed}")
    bar = progress_bar(range(steps), desc="claims")
    for step in bar:
        chosen = [rng.randrange(len(scenes)) for _ in range(ROWS)]
        rows = [ask(words, draw_claims(scenes[at], rng, CLAIMS)) for at in chosen]
        loss = loss_of(model, rows, seen[chosen], words, FALSE_WEIGHT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def train(
    *, seed: int = 0, steps: int = STEPS, seeing: int = SEEING, pictures: int = PICTURES
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Train a labeller from the base's vision tower. Returns model and processor."""
    maker = AutoProcessor.from_pretrained(base_checkpoint(), backend="pil")
    model = untrained(maker.tokenizer, seed)
    scenes = [scene(SPLIT, START + at) for at in range(pictures)]
    given = lower_half(model, np.stack([np.asarray(draw(one)) for one in progress_bar(scenes, desc="pictures")]))
    learn_to_see(model, given, torch.stack([seen_truth(one) for one in scenes]), seeing)
    with torch.no_grad():
        seen = torch.cat([upper_half(model, some) for some in given.split(128)])
    learn_to_answer(model, maker.tokenizer, scenes, seen, steps=steps, seed=seed)
    return model.eval(), maker


@torch.inference_mode()
def accuracy(folder: str | Path, *, split: str = "val_fair", sample: int = 128, swapped: bool = False) -> float:
    """Share of claims about held-out pictures that a saved labeller answers rightly, by its first token; four a picture.

    Args:
        folder: the checkpoint.
        split: whose first pictures are asked about.
        sample: how many.
        swapped: show the picture of another scene: one half is what a labeller gets that does not look.
    """
    maker = AutoProcessor.from_pretrained(folder, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    yes, no = answer_ids(maker.tokenizer)
    right = []
    for at in range(sample):
        claims = draw_claims(scene(split, at), random.Random(f"labeller accuracy {split} {at}"), 4)
        picture = draw(scene(split, (at + 1) % sample if swapped else at))
        prompts = [
            maker.apply_chat_template(measure.chat(claim.question), tokenize=False, add_generation_prompt=True)
            for claim in claims
        ]
        inputs = maker(images=[[picture]] * len(claims), text=prompts, padding=True, return_tensors="pt")
        logits = model(**inputs).logits[:, -1]
        right += [bool(one[yes] > one[no]) == claim.true for one, claim in zip(logits, claims, strict=True)]
    return sum(right) / len(right)


def build(
    output: str | Path,
    seed: int = 0,
    *,
    steps: int = STEPS,
    seeing: int = SEEING,
    pictures: int = PICTURES,
    sample: int = 128,
) -> dict[str, float]:
    """Train a labeller, save it to `output` with its card (README.md), and return what `accuracy` says of it.

    Raises:
        ValueError: if there are fewer than 64 pictures, or more than the split has.
    """  # fmt: skip
    if not 64 <= pictures <= split_named(SPLIT).size - START:
        raise ValueError(
            f"pictures={pictures}: the labeller learns from 64 pictures of {SPLIT} at least, and from {START} on there are "
            f"{split_named(SPLIT).size - START}. Leave it out for the usual {PICTURES}."
        )
    folder = Path(output)
    model, maker = train(seed=seed, steps=steps, seeing=seeing, pictures=pictures)
    save(model, maker, folder)
    found = {name: accuracy(folder, sample=sample, swapped=name == "swapped") for name in ("accuracy", "swapped")}
    (folder / "README.md").write_text(
        "# A labeller for the claims of prefalign's embedded world\n\n"
        f'Answers "{draw_claims(scene("val_fair", 0), random.Random(0), 1)[0].question}" with yes or no as its first token, '
        f"and nothing else. Right on {found['accuracy']:.3f} of {4 * sample} claims about pictures of val_fair, half of which "
        f"are true; on {found['swapped']:.3f} when the picture is another one. In doubt it says no: false claims counted "
        f"{FALSE_WEIGHT:g} times as much. Lower half of the base's vision tower; the rest "
        f"was trained on {pictures:,} pictures of {SPLIT} from {START:,} on, seed {seed}.\n\n"
        f"Rebuild: `prefalign scenes labeller --output DIR --seed {seed}`.\n"
    )
    return found

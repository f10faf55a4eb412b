"""Teach the vision tower and the projector to see before the language model learns to look, as pretrained encoders do.

Image tokens learn to point, in the language model's own space of words, to the place they lie in and to the shape, colour and
size of what stands there ("nothing" for an empty place). The words do not move. Grounding then comes in a few hundred steps.
"""

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from prefalign.progress import progress_bar
from prefalign.scenes.model import PATCH, WIDTH, WORD_SIZE
from prefalign.scenes.world import COLOURS, PIXELS, PLACES, SHAPES, SIZES, Scene, scene

STEPS = 900
BATCH = 96
PEAK_LR = 1.5e-3
GRID = PIXELS // PATCH
WORDS = (("Nothing",), SHAPES, COLOURS, SIZES, PLACES)
IGNORE = -100
SHARPNESS = 16.0


def labels(picture: Scene) -> list[list[int]]:
    """What stands at each of the nine places: rows of (shape, colour, size) numbers; nothing there has no colour and size."""
    out = [[len(SHAPES), IGNORE, IGNORE] for _ in PLACES]
    for thing in picture.objects:
        out[PLACES.index(thing.place)] = [
            SHAPES.index(thing.shape),
            list(COLOURS).index(thing.colour),
            list(SIZES).index(thing.size),
        ]
    return out


def token_places() -> torch.Tensor:
    """The number of the place, 0 to 8, that each of the picture's tokens lies in, row by row: (GRID * GRID,)."""
    lines = torch.arange(GRID) * 3 // GRID
    return (3 * lines[:, None] + lines).flatten()


def see(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Image tokens as the language model gets them, (B, GRID * GRID, WIDTH), of pixels (B, 3, 60, 60) from -1 to 1."""
    return model.model.multi_modal_projector(model.model.vision_tower(pixels).last_hidden_state[:, 1:])


def directions(
    model: LlavaForConditionalGeneration, words: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Word directions, scaled to unit variance: of the nine places (9, WIDTH), and of shapes with "nothing", colours, sizes."""
    table = model.model.language_model.embed_tokens.weight.detach() / WORD_SIZE

    def of(names: tuple[str, ...]) -> torch.Tensor:
        return table[[words(f" {name}", add_special_tokens=False).input_ids[0] for name in names]].clone()

    return of(PLACES), [of((*SHAPES, "Nothing")), of(tuple(COLOURS)), of(tuple(SIZES))]


def read(tokens: torch.Tensor, what: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of shape, colour and size at each place, each (B, 9, options), from image tokens (B, GRID * GRID, WIDTH)."""
    grid = tokens.float().transpose(1, 2).reshape(len(tokens), WIDTH, GRID, GRID)
    there = adaptive_avg_pool2d(grid, 3).flatten(2).transpose(1, 2)
    return [there @ options.T / SHARPNESS for options in what]


def warm_up(
    model: LlavaForConditionalGeneration,
    words: PreTrainedTokenizerFast,
    pixels: np.ndarray,
    *,
    seed: int = 0,
    steps: int = STEPS,
) -> None:
    """Train vision tower and projector in place on `pixels` (pictures, 60, 60, 3) uint8 of `train_biased`."""
    torch.manual_seed(seed)
    places, what = directions(model, words)
    truth = torch.tensor([labels(scene("train_biased", at)) for at in range(len(pixels))])
    weights = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps + 1, pct_start=0.15)
    rng = np.random.default_rng(seed)
    where = token_places().repeat(BATCH)
    bar = progress_bar(range(steps), desc="vision")
    for step in bar:
        chosen = rng.integers(0, len(pixels), BATCH)
        images = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = see(model, images)
        tokens = tokens.float()
        parts = [
            cross_entropy(logits.flatten(0, 1), truth[chosen, :, at].flatten(), ignore_index=IGNORE)
            for at, logits in enumerate(read(tokens, what))
        ]
        parts.append(cross_entropy((tokens @ places.T / SHARPNESS).flatten(0, 1), where))
        loss = torch.stack(parts).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")

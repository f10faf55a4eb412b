"""Teach the vision tower to see before the language model learns to look, as pretrained vision encoders do.

A linear head reads, from the image tokens under each of the nine places, which shape stands there, in which colour and size.
Each token also learns to carry its place, in nine fixed directions: without that, where a token is makes up a twentieth of
its variance, and the language model needs a thousand steps to find the token that a question is about. The head is trained
on the same pictures as the base and then thrown away.
"""

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, normalize
from tqdm.auto import tqdm
from transformers import LlavaForConditionalGeneration

from prefalign.scenes.model import PATCH, WIDTH
from prefalign.scenes.world import COLOURS, PIXELS, PLACES, SHAPES, SIZES, Scene, scene

STEPS = 700
BATCH = 96
PEAK_LR = 1.5e-3
GRID = PIXELS // PATCH
OPTIONS = (len(SHAPES) + 1, len(COLOURS), len(SIZES))  # the last shape is "nothing"
IGNORE = -100
SHARPNESS = 8.0


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
    """Image tokens (B, GRID * GRID, WIDTH) of pixels (B, 3, 60, 60) from -1 to 1."""
    return model.model.vision_tower(pixels).last_hidden_state[:, 1:]


def read(head: torch.nn.Linear, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Logits of shape, colour and size, each (B, 9, options), from image tokens (B, GRID * GRID, WIDTH)."""
    grid = tokens.transpose(1, 2).reshape(len(tokens), WIDTH, GRID, GRID)
    logits = head(adaptive_avg_pool2d(grid, 3).flatten(2).transpose(1, 2))
    return list(logits.float().split(OPTIONS, dim=-1))


def warm_up(
    model: LlavaForConditionalGeneration, pixels: np.ndarray, *, seed: int = 0, steps: int = STEPS
) -> torch.nn.Linear:
    """Train the vision tower in place on `pixels` (pictures, 60, 60, 3) uint8 of `train_biased`; returns the head."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(WIDTH, sum(OPTIONS))
    directions = torch.linalg.qr(torch.randn(WIDTH, len(PLACES))).Q
    places = token_places()
    truth = torch.tensor([labels(scene("train_biased", at)) for at in range(len(pixels))])
    weights = [*model.model.vision_tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps + 1, pct_start=0.15)
    rng = np.random.default_rng(seed)
    bar = tqdm(range(steps), desc="vision")
    for step in bar:
        chosen = rng.integers(0, len(pixels), BATCH)
        images = torch.from_numpy(pixels[chosen]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = see(model, images)
            told = read(head, tokens)
        parts = [
            cross_entropy(logits.flatten(0, 1), truth[chosen, :, at].flatten(), ignore_index=IGNORE)
            for at, logits in enumerate(told)
        ]
        placed = SHARPNESS * normalize(tokens.float(), dim=-1) @ directions
        parts.append(cross_entropy(placed.flatten(0, 1), places.repeat(BATCH)))
        loss = torch.stack(parts).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    return head

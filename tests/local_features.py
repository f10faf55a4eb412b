"""Where tokens look, found the slow way: the real vision tower without attention, and pictures with one spot changed."""

import re

import numpy as np
import torch
from PIL import Image

from prefalign import families

_PICTURES = ("pixel_values", "image_sizes", "pixel_attention_mask", "image_grid_thw", "batch_num_images")


def without_vision_attention(model):
    """Zero what attention adds in the vision tower, so that each feature depends on its own patches only."""
    zeroed = 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if families.tower(name) != "language_model" and re.search(
                r"att\w*\.(out_proj|o_proj|proj|projection_layer)\.", name
            ):
                weight.zero_()
                zeroed += 1
    assert zeroed >= 2
    return model.eval()


def features(model, processor, image: Image.Image) -> torch.Tensor:
    """(N, C) what goes into the prompt for a picture."""
    text = families.render(processor, [{"role": "user", "content": [{"type": "image"}]}])
    batch = processor(text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt")
    given = {name: batch[name] for name in _PICTURES if name in batch}
    with torch.no_grad():
        found = model.get_image_features(**given, return_dict=True).pooler_output
    parts = [found] if torch.is_tensor(found) else list(found)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def changed_tokens(model, processor, size: tuple[int, int], spot: tuple[float, float]) -> np.ndarray:
    """(N,) bool: tokens whose feature moves when the pixels around a place become white."""
    width, height = size
    reach = max(1.0, 0.02 * width), max(1.0, 0.02 * height)
    y, x = np.mgrid[0:height, 0:width]
    inside = (abs(x + 0.5 - spot[0]) <= reach[0]) & (abs(y + 0.5 - spot[1]) <= reach[1])
    assert inside.any()
    plain = np.random.default_rng(0).integers(0, 200, (height, width, 3), dtype=np.uint8)
    marked = plain.copy()
    marked[inside] = 255
    before, after = (features(model, processor, Image.fromarray(values)) for values in (plain, marked))
    return (before - after).abs().amax(1).numpy() > 1e-5

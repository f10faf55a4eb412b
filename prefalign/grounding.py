"""Which part of a picture each image token shows, and how much of an answer's attention goes to a part.

Families cut a picture into tokens in many ways: centre crops, tiles and a global view, merged patches, line ends, padding. So
three pictures (black, white, and one whose colours say where a pixel is) go through the real processor, and where the padding
lies and what each patch shows is read off the processed pixels.

Legend of shapes: `N` image tokens of one picture, in prompt order.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from prefalign import families
from prefalign.collage import Box

if TYPE_CHECKING:
    import torch
    from PIL import Image

LEAST_SHOWN = 0.5


class Grounding:
    """Where in a picture its image tokens look, for one model and processor; each size of picture is worked out once.

    Args:
        model: the model (a `PeftModel` is fine); its weights are not used.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any):
        self.model = families.core(model)
        self.processor = processor
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def centres(self, size: tuple[int, int]) -> np.ndarray:
        """The place that each image token of a picture shows when it is the only one of its prompt.

        Args:
            size: (width, height) in pixels.

        Returns:
            (N, 2) float32: x and y in pixels of the picture, the mean over what the token shows of it; NaN for tokens that show
            none of it (line ends) or mostly padding.

        Raises:
            ValueError: if the family's tokens do not follow from the processed pixels in a way known here.
        """
        if size not in self._known:
            self._known[size] = self._centres(size)
        return self._known[size]

    def _centres(self, size: tuple[int, int]) -> np.ndarray:
        import torch

        batches = [self._processed(picture) for picture in _test_pictures(size)]
        black, white, places = (batch["pixel_values"].float() for batch in batches)
        count = int(families.image_token_mask(batches[0]["input_ids"], self.model.config).sum())
        # sums, not coordinates, go through pooling and interpolation, which are linear; padding is the same in black and white
        shown = white - black
        along = places - black
        full = shown.max()
        sums = self._tokens({**batches[0], "pixel_values": along}, {**batches[0], "pixel_values": shown})
        if sums is None or sums.shape[0] != count:
            raise ValueError(
                f"the {count} image tokens of a {self.model.config.model_type} for a picture of {size[0]} x {size[1]} pixels do "
                f"not follow from its processed pixels {tuple(black.shape)} in a way that is known here, so it cannot be said "
                "which of them show a cell. Use sequences of pictures instead of composed ones."
            )
        centres = sums[:, :2] / sums[:, 2:] * torch.tensor(size)
        centres[(sums[:, 2:] < LEAST_SHOWN * full).any(1)] = float("nan")
        return centres.numpy()

    def _processed(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        text = families.render(self.processor, [{"role": "user", "content": [{"type": "image"}]}])
        batch = self.processor(text=[text], images=[[picture]], add_special_tokens=False, return_tensors="pt")
        return dict(batch)

    def _tokens(self, along: dict[str, torch.Tensor], shown: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """(N, 4): for each token the mean over its pixels of x and y times what is shown, and of what is shown, twice."""
        import torch

        vision = self.model.config.vision_config
        pixels = torch.cat([_red_green(along), _red_green(shown)], dim=1)
        if "image_grid_thw" in along:
            # patches come in the order in which neighbours are merged
            return pixels.mean(-1).view(-1, vision.spatial_merge_size**2, 4).mean(1)
        patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
        patches = torch.nn.functional.avg_pool2d(pixels, patch)
        inner = self.model.model
        if hasattr(inner, "pack_image_features"):
            tiles = patches.flatten(2).transpose(1, 2)
            given = {
                "image_features": [tiles],
                "image_sizes": along["image_sizes"],
                "image_newline": torch.zeros(4),
                "vision_feature_select_strategy": "default",
                "vision_aspect_ratio": getattr(self.model.config, "vision_aspect_ratio", None),
            }
            wanted = inspect.signature(inner.pack_image_features).parameters
            packed, _ = inner.pack_image_features(**{name: value for name, value in given.items() if name in wanted})
            return packed[0]
        count = int(families.image_token_mask(along["input_ids"], self.model.config).sum())
        merged = math.isqrt(patches.shape[0] * patches.shape[2] * patches.shape[3] // max(count, 1))
        if merged == 0 or patches.shape[2] % merged or patches.shape[3] % merged:
            return None
        return torch.nn.functional.avg_pool2d(patches, merged).flatten(2).transpose(1, 2).reshape(-1, 4)


def _red_green(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first two channels: (tiles, 2, height, width), or (patches, 2, pixels) where the processor cut patches itself."""
    values = batch["pixel_values"]
    if "image_grid_thw" in batch:
        return values.view(values.shape[0], 3, -1)[:, :2]
    return values.reshape(-1, *values.shape[-3:])[:, :2]


def _test_pictures(size: tuple[int, int]) -> list[Image.Image]:
    """Black, white, and a picture whose red grows with x and whose green grows with y."""
    from PIL import Image

    width, height = size
    values = np.full((height, width, 3), 255, dtype=np.uint8)
    values[:, :, 0] = np.rint((np.arange(width) + 0.5) / width * 255)[None]
    values[:, :, 1] = np.rint((np.arange(height) + 0.5) / height * 255)[:, None]
    return [Image.new("RGB", size, "black"), Image.new("RGB", size, "white"), Image.fromarray(values)]


def tokens_in(centres: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """The box that each token looks at.

    Args:
        centres: (N, 2) of `Grounding.centres`.
        boxes: rectangles; where several hold a centre, the first counts.

    Returns:
        (N,) int64 number of a box; -1 for tokens in none.
    """
    found = np.full(len(centres), -1, dtype=np.int64)
    x, y = centres[:, 0], centres[:, 1]
    for number in reversed(range(len(boxes))):
        left, top, right, bottom = boxes[number]
        found[(x >= left) & (x < right) & (y >= top) & (y < bottom)] = number
    return found


def even_split(count: int, rows: int, columns: int) -> np.ndarray:
    """The released code's cells of a grid: the square token map cut evenly, whatever the canvas holds there.

    Args:
        count: tokens of the picture, a square number (576 is 24 x 24).
        rows: rows of the grid; what is left over goes to the first ones.
        columns: columns of the grid.

    Returns:
        (count,) int64 number of the cell, row by row.

    Raises:
        ValueError: if the tokens are no square map.

    Source: MIA-DPO, `make_data_ping.py` at a85c51a. It ignores margins and padding.
    """
    side = _side(count)
    down, across = (np.repeat(np.arange(parts), _shares(side, parts)) for parts in (rows, columns))
    return (down[:, None] * columns + across[None]).reshape(-1)


def even_centre(count: int) -> np.ndarray:
    """The released code's cells of a pic-in-pic: 0 for the central two thirds of the square token map (16 of 24), 1 around it.

    Raises:
        ValueError: if the tokens are no square map.

    Source: MIA-DPO, `make_data_pip.py` at a85c51a. The inset's real share of the canvas is up to 70 %, and less if it is oblong.
    """
    side = _side(count)
    inner = side * 2 // 3
    start = (side - inner) // 2
    cells = np.ones((side, side), dtype=np.int64)
    cells[start : start + inner, start : start + inner] = 0
    return cells.reshape(-1)


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _side(count: int) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(
            f"cells: even needs a square map of image tokens, and this picture has {count}: the released code was written for "
            "the 576 of LLaVA-1.5. Use cells: pixels, which asks the processor."
        )
    return side


def sequence_share(weights: np.ndarray, image: np.ndarray, target: int) -> float:
    """Share of the target among several pictures: its mean weight over the sum of the mean weights of all.

    Args:
        weights: (N,) attention to each image token.
        image: (N,) number of the picture that each token belongs to.
        target: number of the target picture.

    Returns:
        A value in [0, 1], 1 / n by chance; NaN if no picture gets attention (a sliding window may hide all of them).

    Source: MIA-DPO, arXiv 2410.17637, `make_data_duotu.py` at a85c51a.
    """
    means = [float(weights[image == number].mean()) for number in range(int(image.max()) + 1)]
    return _ratio(means[target], math.fsum(means))


def cell_share(weights: np.ndarray, cells: np.ndarray, target: int) -> float:
    """Share of one cell in the attention to all cells; tokens in none (margins, padding, line ends) count for nothing.

    Args:
        weights: (N,) attention to each image token.
        cells: (N,) number of the cell of each token, -1 for none.
        target: number of the target cell.

    Returns:
        A value in [0, 1]; NaN if no cell gets attention.

    Source: MIA-DPO, arXiv 2410.17637. The released code cuts the token map evenly (`even_split`), margins and padding included.
    """
    total = math.fsum(weights[cells >= 0].tolist())
    return _ratio(math.fsum(weights[cells == target].tolist()), total)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan

"""The other picture of a pair, made from its own: one description of how, for what is stored and what is made in training.

The stage `image_contrast` and the trainer's collator both go through `negatives`, so both show the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from prefalign.corruption import blank, blur, crop, crop_box, diffusion_noise, mask_pixels, noise_factors
from prefalign.records import row_seed

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class Negative:
    """How the other picture of a pair is made from its own; always of the same size, so it takes as many image tokens.

    Attributes:
        kind: `crop` enlarges a small part (mDPO), `diffusion` adds noise (POVID, CHiP), `blur`, `mask` blackens pixels (OPA-DPO),
            `blank` leaves one colour (V-DPO), `swap` takes another picture of the data, stretched to the same size.
        which: `all` pictures of a prompt, or the `first` only; the others then stay as they are.
        area: of `crop`, smallest and largest share of the area.
        aspect: of `crop`, smallest and largest width over height.
        least_side: of `crop`, shortest side in pixels.
        step: of `diffusion`, step of the schedule (`noise_factors`).
        space: of `diffusion`, `native` or `preprocessed` (`diffusion_noise`).
        sigma: of `blur`, standard deviation as a share of the longer side.
        share: of `mask`, share of the pixels.
        block: of `mask`, side of a block as a share of the longer side; 0: single pixels.
        colour: of `blank`, `black`, `white` or the picture's `mean`.
    """

    kind: Literal["crop", "diffusion", "blur", "mask", "blank", "swap"] = "crop"
    which: Literal["all", "first"] = "all"
    area: list[float] = field(default_factory=lambda: [0.01, 0.2])
    aspect: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    least_side: int = 28
    step: int = 500
    space: Literal["native", "preprocessed"] = "native"
    sigma: float = 0.03
    share: float = 0.3
    block: float = 0.0
    colour: Literal["black", "white", "mean"] = "black"

    def __post_init__(self) -> None:
        if len(self.area) != 2 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(
                f"area is {self.area}; give the smallest and the largest share of the picture, as in [0.01, 0.2] (mDPO's)."
            )
        if len(self.aspect) != 2 or not 0 < self.aspect[0] <= self.aspect[1] < math.inf:
            raise ValueError(
                f"aspect is {self.aspect}; give the smallest and the largest width over height, as in [0.75, 1.333]."
            )
        if self.least_side < 1:
            raise ValueError(f"least_side is {self.least_side}; a crop has a side of 1 pixel or more (28 is usual).")
        if not 0 < self.sigma < math.inf:
            raise ValueError(
                f"sigma is {self.sigma}, which is no width of a blur; give a share of the longer side such as 0.03."
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}; mask a share of the pixels above 0 and up to 1, such as 0.3.")
        if not 0 <= self.block <= 1:
            raise ValueError(f"block is {self.block}; give a share of the longer side from 0 (single pixels) to 1.")
        noise_factors(self.step)

    def settings(self) -> dict[str, object]:
        """The settings that this kind looks at."""
        looks_at = {"crop": ("area", "aspect", "least_side"), "diffusion": ("step", "space"), "blur": ("sigma",),
                    "mask": ("share", "block"), "blank": ("colour",), "swap": ()}  # fmt: skip
        return {name: getattr(self, name) for name in ("kind", "which", *looks_at[self.kind])}

    def numbers(self, pictures: int) -> range:
        """Which of a prompt's pictures are changed, by number."""
        return range(min(pictures, 1) if self.which == "first" else pictures)


def negative_seed(seed: int, identity: str, number: int) -> int:
    """Seed of the negative of a row's picture: of the row's id and the picture's place, so a rerun draws the same."""
    return row_seed(seed, f"{identity}/negative/{number}")


def spoil(image: Image.Image, negative: Negative, *, seed: int, other: Image.Image | None = None) -> Image.Image:
    """The negative of one picture, RGB, of the same size.

    Args:
        image: RGB picture.
        negative: what is done to it.
        seed: seed of the draw (`negative_seed`).
        other: the picture that `swap` shows instead.

    Raises:
        ValueError: if `swap` is given no other picture.
    """
    match negative.kind:
        case "crop":
            box = crop_box(
                image.size, seed=seed, area=negative.area, aspect=negative.aspect, least_side=negative.least_side
            )
            return crop(image, box)
        case "diffusion":
            return diffusion_noise(image, seed=seed, step=negative.step, space=negative.space)
        case "blur":
            return blur(image, sigma=negative.sigma)
        case "mask":
            return mask_pixels(image, seed=seed, share=negative.share, block=negative.block)
        case "blank":
            return blank(image, colour=negative.colour)
        case "swap":
            if other is None:
                raise ValueError(
                    "negative kind 'swap' shows another picture of the data, and none was given. Make such pairs with "
                    "`prefalign run image_contrast`, or take a kind that needs this picture only, such as crop."
                )
            return other.convert("RGB").resize(image.size)


def negatives(
    images: Sequence[Image.Image],
    negative: Negative,
    *,
    seed: int,
    identity: str,
    others: Sequence[Image.Image] = (),
) -> list[Image.Image]:
    """The other pictures of a row, one for each of its own; those that `negative.which` leaves out stay as they are.

    Args:
        images: the row's decoded pictures.
        negative: what is done to them.
        seed: seed of the stage or the run.
        identity: id of the row.
        others: for `swap`, one other picture for each that is changed.
    """
    made = list(images)
    for number in negative.numbers(len(made)):
        other = others[number] if others else None
        made[number] = spoil(images[number], negative, seed=negative_seed(seed, identity, number), other=other)
    return made

"""What is asked of a plan beside the run's config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from prefalign.config import ConfigError
from prefalign.training.memory import Profile

SIZES = {"pictures": 1, "picture_side": 672, "prompt_tokens": 60, "answer_tokens": 150}
"""Of rows that are not there yet, where nothing else is said."""
TFLOPS = 312.0
"""Peak of an A100 for 16 bits, in TFLOP/s: what a GPU is taken for, where nothing else is said."""


@dataclass
class Options:
    """What is asked of a plan beside the run's config.

    Attributes:
        devices: how many take part.
        profile: how they share the model: `one`, `ddp`, `zero2`, `zero3` or `fsdp2`; by default what `trainer.deepspeed` or
            `trainer.fsdp` asks for, else `one` for one device and `ddp` for several.
        device: type of device that is planned for. On `cuda`, `trainer.bf16` is true where the config does not say.
        memory: GiB of one device. Given, it is said what fits, and how large a batch and a picture can be.
        tflops: peak of one device in TFLOP/s for the type of number in use; by default 312, an A100's for 16 bits, and on `cpu`
            not known: time and cost are left out.
        utilisation: share of the peak that is reached.
        price: of one device for an hour.
        sample: rows of the pairs that are looked at, evenly spread.
        rows: number of pairs, where there is no folder yet; this and what follows cannot be said of pairs that are there.
        pictures: pictures in a prompt; by default 1.
        picture_side: width and height of a picture in pixels; by default 672.
        prompt_tokens: tokens of a prompt without its pictures; by default 60.
        answer_tokens: tokens of an answer; by default 150.
    """

    devices: int = 1
    profile: Profile | None = None
    device: Literal["cuda", "cpu"] = "cuda"
    memory: float | None = None
    tflops: float | None = None
    utilisation: float = 0.4
    price: float | None = None
    sample: int = 32
    rows: int | None = None
    pictures: int | None = None
    picture_side: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "memory", "tflops", "utilisation", "sample", "rows", "picture_side", "answer_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"--{name} {value}: a plan needs a number above 0.")
        if self.price is not None and self.price < 0:
            raise ConfigError(f"--price {self.price}: give what one device costs for an hour, as in `--price 2.5`.")
        if self.tflops is None and self.device == "cuda":
            self.tflops = TFLOPS
        if self.profile == "one" and self.devices > 1:
            raise ConfigError(
                f"--profile one runs on one device, and --devices says {self.devices}. Choose ddp, zero2, zero3 or fsdp2."
            )

    def shared_as(self, asked: Profile | None) -> Options:
        """These options with a profile.

        Args:
            asked: what the run's config asks for; None: nothing.

        Raises:
            ConfigError: they say another profile than the config.
        """
        if asked is not None and self.profile not in (None, asked):
            raise ConfigError(
                f"--profile {self.profile}, and the config's own trainer.deepspeed or trainer.fsdp asks for {asked}, which would "
                "run. Leave --profile out, or take the config's out too: --trainer.deepspeed null --trainer.fsdp null."
            )
        return replace(self, profile=self.profile or asked or ("one" if self.devices == 1 else "ddp"))

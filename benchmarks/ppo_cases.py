"""Models of random weights, prompts and PPO trainers for `ppo_step.py`: the same weights, prompts and noise on every side.

Toy models and 7B shapes are those of `preference_cases.py`; adapters and value head have moved away from their start, as in the
middle of a run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import transformers as T
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from preference_cases import SHAPES as PREFERENCE_SHAPES
from preference_cases import Case, Workbench
from transformers.trainer_callback import PrinterCallback
from trl.trainer.utils import add_fused_lm_head

from prefalign import families
from prefalign.online import ppo
from prefalign.online.arguments import PPOConfig
from prefalign.online.ppo import PPOTrainer
from prefalign.online.roles import FIELDS, VALUE, Roles
from prefalign.online.rollout import Rollout
from prefalign.rewards import Combined, Weighted
from prefalign.rewards.augmentation import RatingPrompt
from prefalign.rewards.learned import LearnedReward
from prefalign.rewards.vlm import RewardModel
from prefalign.training.forward import share
from prefalign.training.lora import LANGUAGE_LINEAR
from prefalign.training.metering import count_flops

PARTS = ("rollout", "scoring", "forwards", "update")
RATING = RatingPrompt(
    ask=" ".join(f"w{number}" for number in range(60)), opening=" ".join(f"w{number}" for number in range(60, 72))
)
"""As many words as the usual one has."""

Kind = Literal["shared", "repeating", "four"]


@dataclass(frozen=True)
class PPOCase:
    """One iteration.

    Attributes:
        batch: model and prompts (`pairs` is their number).
        generations: answers to each prompt.
        new_tokens: of each answer, unless it ends by itself.
        rank: of the adapters.
    """

    batch: Case
    generations: int = 1
    new_tokens: int = 64
    rank: int = 16

    @property
    def answers(self) -> int:
        """Answers of the iteration, which are one minibatch."""
        return self.batch.pairs * self.generations


TOY = Case(layers=4, tower_layers=7)  # about a third of the operations of an iteration that encodes in every pass
CASES = {"576": PPOCase(TOY), "576x4": PPOCase(replace(TOY, pairs=1), generations=4)}
SHAPES = {
    f"{name}{suffix}": PPOCase(batch, generations=generations, rank=64)
    for name, batch in PREFERENCE_SHAPES.items()
    for suffix, generations in (("", 1), ("x4", 4))
}


@dataclass
class Meter:
    """What the parts of an iteration take, by part.

    Attributes:
        counting: count operations instead of reading clocks.
        compute: False: only shapes are right, nothing is multiplied.
        cpu: seconds.
        wall: seconds.
        flops: operations.
        pictures: pictures that passed the vision tower.
    """

    counting: bool = False
    compute: bool = True
    cpu: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    wall: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)
    part: str = ""

    def run(self, part: str, call: Callable[[], Any]) -> Any:
        """Call something that is a part of the iteration, or a piece of one."""
        self.part = part
        if self.counting:
            results: list[Any] = []
            self.flops[part] += count_flops(lambda: results.append(call()), compute=self.compute)
            return results[0]
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.cpu[part] += time.process_time() - cpu
        self.wall[part] += time.perf_counter() - wall
        return result

    def clear(self) -> None:
        """Begin an iteration."""
        self.cpu.clear()
        self.wall.clear()
        self.flops.clear()
        self.pictures.clear()

    def watch(self, model: Any) -> None:
        """Count the pictures that a model encodes."""
        backbone = families.core(model).model
        encode = backbone.get_image_features

        @functools.wraps(encode)
        def encode_counted(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(encode).bind(*args, **kwargs).arguments
            grids = given.get("image_grid_thw")
            self.pictures[self.part] += len(given["pixel_values"] if grids is None else grids)
            return encode(*args, **kwargs)

        backbone.get_image_features = encode_counted

    @contextlib.contextmanager
    def on_begin(self) -> Iterator[None]:
        """Measure what a trainer calls between the start of an iteration and its first update."""
        places: list[tuple[Any, str, str]] = [
            (ppo, "draw", "rollout"),
            (Combined, "score", "scoring"),
            (PPOTrainer, "_run_through", "forwards"),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(patch.object(owner, name, self._measured(getattr(owner, name), part)))
            yield

    def _measured(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.run(part, functools.partial(call, *args, **kwargs))


class FourModels(Roles):
    """Policy, reference and value as models of their own, each with the adapter that it has on a shared base.

    Args:
        model: policy, a `PeftModel`.
        value: a `PeftModel` with the value adapter.
        reference: the base without an adapter.
        layout: as of `Roles`.
        temperature: as of `Roles`.
        settings: what else a trainer gives to `Roles`; not used.
    """

    def __init__(
        self, model: Any, *, value: Any, reference: Any, layout: str, temperature: float = 1.0, **settings: Any
    ):
        torch.nn.Module.__init__(self)
        self.adapts = False  # no adapter is switched
        self.policy, self.value, self.reference = model, value, reference.requires_grad_(False)
        core = families.core(model)
        width = core.config.get_text_config().hidden_size
        self.value_head = torch.nn.Linear(width, 1, dtype=torch.float32, device=core.device)
        for role in (model, value, reference):
            if role is not value:
                add_fused_lm_head(families.core(role), temperature=temperature, outputs=FIELDS)
            share(role, layout)
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.parameters()]


@dataclass
class Side:
    """A trainer and how its passes are run.

    Attributes:
        trainer: ready for `iterate`.
        models: every model of the run, its reward model's too.
        reward: of the run.
        meter: of this side.
        reencodes: every pass encodes its pictures.
    """

    trainer: PPOTrainer
    models: list[Any]
    reward: RewardModel
    meter: Meter
    reencodes: bool = False


@dataclass
class PPOBench:
    """Prompts and trainers of one case.

    Args:
        case: which.
        dtype: of the bases; adapters that train are float32.
        weightless: bases whose weights take no memory and are all 0, to count operations with.
    """

    case: PPOCase
    dtype: torch.dtype = torch.float32
    weightless: bool = False

    @functools.cached_property
    def bench(self) -> Workbench:
        """Configuration, processor and rows."""
        return Workbench(self.case.batch, dtype=self.dtype)

    @functools.cached_property
    def prompts(self) -> Dataset:
        """Rows as `load_prompts` gives them."""
        rows = self.bench.rows.select_columns(["id", "images", "prompt"]).rename_column("prompt", "messages")
        return rows.add_column("facts", ["{}"] * len(rows))

    def base(self) -> Any:
        """A new base, always of the same weights."""
        if not self.weightless:
            return self.bench.model()
        classes = {"llava": T.LlavaForConditionalGeneration, "qwen": T.Qwen2_5_VLForConditionalGeneration}
        with torch.device("meta"):
            model = classes[self.case.batch.family]._from_config(self.bench.config(), attn_implementation="sdpa")
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(weight.shape)))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
        return model

    def lora(self) -> LoraConfig:
        """An adapter on the language model's linear layers."""
        return LoraConfig(r=self.case.rank, lora_alpha=2 * self.case.rank, target_modules=LANGUAGE_LINEAR)

    def side(self, kind: Kind, output: Path) -> Side:
        """A trainer that has made no step.

        Args:
            kind: `shared`, as the recipe makes it; `repeating`, with `fast_path` off in rollout, reward model and trainer, so
                that prompts and pictures are run for each answer in each pass; `four`, as `shared` with a base for each role.
            output: folder of the run.
        """
        torch.manual_seed(0)
        fast_path: Literal["auto", "off"] = "off" if kind == "repeating" else "auto"
        policy = get_peft_model(self.base(), self.lora())
        models = [policy]
        roles: Any = Roles
        if kind == "four":
            value, reward_base = (get_peft_model(self.base(), self.lora()) for _ in range(2))
            reference = self.base()
            models += [reference, value, reward_base]
            roles = functools.partial(FourModels, value=value, reference=reference)
        else:
            policy.add_adapter("reward", self.lora())
            reward_base = policy
        adapter = "default" if kind == "four" else "reward"
        learned = LearnedReward(Path(), normalise=False, batch_size=self.case.answers)
        learned.model = RewardModel(
            reward_base, self.bench.processor, rating=RATING, fast_path=fast_path, adapter=adapter
        )
        if kind == "four":
            reward_base.requires_grad_(False)
        with patch.object(ppo, "Roles", roles):
            trainer = PPOTrainer(
                policy,
                args=self.arguments(output),
                train_dataset=self.prompts,
                processing_class=self.bench.processor,
                rewards=Combined([Weighted("learned", learned)]),
                reward_adapter=None if kind == "four" else "reward",
                fast_path=fast_path,
            )
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer()
        trainer.engine.shares = trainer.engine.shares and kind != "repeating"
        move(trainer.roles, models)
        meter = Meter()
        for model in models:
            meter.watch(model)
        return Side(trainer, models, learned.model, meter, reencodes=kind == "repeating")

    def arguments(self, output: Path) -> PPOConfig:
        """One minibatch, one pass, a learning rate of 0: every iteration of a side starts from the same weights."""
        on_cpu = self.weightless or self.case.batch.shape == "toy"
        return PPOConfig(
            output_dir=str(output), learning_rate=0.0, max_steps=1, num_generations=self.case.generations,
            per_device_train_batch_size=self.case.answers, max_new_tokens=self.case.new_tokens, blank_picture_probe=0,
            normalise_rewards=False,
            gradient_checkpointing=True, use_cpu=on_cpu, bf16=False, dataloader_pin_memory=False, report_to="none",
            save_strategy="no", logging_strategy="no", log_rollouts=False, disable_tqdm=True,
        )  # fmt: skip


def move(roles: Roles, models: list[Any]) -> None:
    """Give adapters and value head weights of their own, drawn from the names that they have on a shared base."""
    named = [(name, p) for model in models[:1] for name, p in model.named_parameters() if "lora_" in name]
    if len(models) > 1:
        _, _, value, reward = models
        for model, role in ((value, VALUE), (reward, "reward")):
            named += [(n.replace(".default.", f".{role}."), p) for n, p in model.named_parameters() if "lora_" in n]
    for name, parameter in [*named, *roles.value_head.named_parameters(prefix="value_head")]:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(0.02 * noise)


def iterate(side: Side) -> tuple[Rollout, torch.Tensor]:
    """One iteration: rollout, scores, forward passes, update with AdamW. Gradients are left for the caller.

    The rollout is drawn before its first visit instead of in it, so that what the visits themselves take can be told.

    Returns:
        The rollout, and the loss.
    """
    trainer, meter = side.trainer, side.meter
    meter.clear()
    trainer.keeps_features = not side.reencodes
    trainer._audited |= not meter.compute  # where nothing is multiplied every gradient is 0
    rows = list(range(len(trainer.train_dataset)))
    with meter.on_begin():
        trainer._begin(rows)
    rollout = trainer.rollout
    assert rollout is not None

    def update() -> torch.Tensor:
        with patch.object(trainer, "_begin", lambda rows: None):
            loss = trainer.training_step(trainer.model, {"rows": torch.tensor(rows)})
        if meter.compute:
            trainer.optimizer.step()
        return loss

    return rollout, meter.run("update", update)

"""The planner of a preference training: its own step on tensors without data, for any way of training that is asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from prefalign import families
from prefalign.checkpoints import check_family, resolve
from prefalign.config import ConfigError
from prefalign.losses import read_losses, views_of
from prefalign.models import freeze, load_processor
from prefalign.training.arguments import check_precision, training_arguments
from prefalign.training.checkpoints import most_checkpoints
from prefalign.training.checks import needs_reference
from prefalign.training.documents import PromptTooLong, Reader
from prefalign.training.dry_run import Counted, count_step
from prefalign.training.lora import LoraSettings, check_quantised, check_targets, check_trainable
from prefalign.training.memory import CASTING, Need, Profile, optimizer_bytes, share_out
from prefalign.training.pairs import check_negative
from prefalign.training.plan_options import SIZES, Options
from prefalign.training.preference_run import check_held_out, read_inputs, trainer_settings
from prefalign.training.profiles import SHARED_OUT, SHARING, check_sharing
from prefalign.training.routes import Route, find_route
from prefalign.training.sized_rows import RowSize, RowTokens, again, measure, sized_rows

if TYPE_CHECKING:
    from datasets import Dataset

Reference = Literal["cached", "online"]
Method = Literal["full", "lora", "qlora"]
GIB = 1 << 30
ALONE: dict[str, Any] = dict.fromkeys((*SHARING, "tf32")) | {"use_cpu": True, "torch_compile": False}
"""Fields of `trainer` as they are in this process, whatever machine is planned for."""


@dataclass(frozen=True)
class Setup:
    """One way to train.

    Attributes:
        method: all weights, an adapter, or an adapter on weights in 4 bits.
        profile: how devices share the model.
        reference: `cached` or `online`; online is the policy without its adapter, or for `full` a second model.
        checkpointing: gradient checkpointing.
    """

    method: Method
    profile: Profile
    reference: Reference
    checkpointing: bool


class Planner:
    """Counts of one run's config, each made once.

    Args:
        config: config of the recipe `train_preference`.
        options: what is asked.

    Raises:
        ConfigError: settings that cannot be.
        ModelError: there is no such model, or it has no processor.
        ValueError: the pairs cannot be trained on.

    Attributes:
        rows: pairs that stand for all, shortest first.
        total: how many there are of all.
        eval_rows: held-out pairs that stand for all of them, shortest first; none if there are none yet.
        eval_total: how many there are of these.
    """

    def __init__(self, config: Any, options: Options):
        from transformers import AutoConfig

        self.config, self.options = config, options.shared_as(check_sharing(config))
        self.settings = {"bf16": options.device == "cuda", **config.trainer}
        self.args = self._arguments(Path("plan"))
        check_held_out(self.args, config.eval_pairs)
        self.losses = read_losses(config.losses, beta=self.args.beta)
        self.views = views_of(self.losses)
        source, _, revision = resolve(config.model)
        check_family(source, replace(config.model, model_revision=revision))
        self.model_config = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=config.model.trust_remote_code
        )
        self.quantised = self._quantised()
        self.processor = load_processor(config.model)
        self.sixteen = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        self.image_token = families.image_token_ids(self.model_config)[0]
        self.counts: dict[Any, Counted] = {}
        self.measured: dict[str, RowTokens] = {}
        self._check_trains()
        self.eval_rows: list[dict[str, Any]] = []
        self.eval_total = 0
        self.rows, self.total = self._rows()

    @property
    def compares(self) -> bool:
        """Whether any loss reads a reference."""
        return needs_reference(self.losses, self.args.loss_type)

    @property
    def setup(self) -> Setup:
        """The way of training that the config asks for."""
        method: Method = "full" if self.config.lora is None else "qlora" if self.quantised else "lora"
        reference: Reference = self.config.reference if self.compares else "cached"
        assert self.options.profile is not None
        return Setup(method, self.options.profile, reference, bool(self.args.gradient_checkpointing))

    @property
    def batch(self) -> int:
        """Pairs in a batch of one device."""
        return int(self.args.per_device_train_batch_size)

    @property
    def steps_of_epoch(self) -> int:
        """Optimizer steps of a pass over the pairs."""
        return math.ceil(self.total / (self.batch * self.args.gradient_accumulation_steps * self.options.devices))

    def longest(self, number: int) -> list[dict[str, Any]]:
        """As many rows as are asked for, the longest; repeated under other names if there are not so many."""
        rows = []
        for place in range(number):
            turn, back = divmod(place, len(self.rows))
            row = self.rows[-1 - back]
            rows.append(row if turn == 0 else again(row, turn))
        return rows

    def count(self, setup: Setup, rows: Sequence[Mapping[str, Any]]) -> Counted:
        """A step of one process on some rows."""
        adapts, casts = setup.method != "full", setup.profile in CASTING and self.sixteen is not None
        key = (adapts, casts, setup.reference, setup.checkpointing, tuple(row["id"] for row in rows))
        if key not in self.counts:
            lora = (self.config.lora or LoraSettings()) if adapts else None
            # one step on one batch: nothing is held out
            changes = {
                "gradient_checkpointing": setup.checkpointing,
                "eval_strategy": "no",
                "load_best_model_at_end": False,
            }
            self.counts[key] = count_step(
                self.model_config,
                rows,
                self.processor,
                arguments=lambda folder: self._arguments(
                    folder, **changes, **({"bf16": False, "fp16": False} if casts else {})
                ),
                dtype=self._dtype(adapts),
                frozen=() if adapts else self.config.freeze,
                cast=self.sixteen if casts else None,
                target=self.options.device,
                attention=self.config.model.attn_implementation,
                losses=self.losses,
                **{
                    **trainer_settings(self.config),
                    "peft_config": lora.to_peft() if lora else None,
                    "reference": setup.reference,
                    "tokens_per_pass": None if setup.profile in CASTING else self.config.tokens_per_pass,
                },
            )
        return self.counts[key]

    def need(self, setup: Setup, rows: Sequence[Mapping[str, Any]] | None = None) -> Need:
        """Memory of one device, on the longest rows if none are given."""
        counted = self.count(setup, self.longest(self.batch) if rows is None else rows)
        casts = setup.profile in CASTING and self.sixteen is not None
        width = 2 if casts else self._dtype(setup.method != "full").itemsize
        trained = counted.trainable / max(1.0, counted.trainable_parameters)
        kept = optimizer_bytes(self.args, torch.float32 if trained > 3 else torch.bfloat16)
        return share_out(
            counted,
            setup.profile,
            devices=self.options.devices,
            optimizer=kept,
            width=width,
            quantised=setup.method == "qlora",
            target=self.options.device,
        )

    def route(self) -> Route:
        """How the run shares prompts."""
        return find_route(self._empty_model(), self.config.fast_path)

    def evaluations(self, steps: int) -> int:
        """How often held-out pairs are measured in so many optimizer steps, the end included."""
        if not self.eval_rows:
            return 0
        args, often = self.args, 0
        if args.eval_strategy == "epoch":
            often = math.ceil(steps / self.steps_of_epoch)
        elif args.eval_strategy == "steps":
            every = args.eval_steps if args.eval_steps >= 1 else math.ceil(args.eval_steps * steps)
            often = int(steps // every)
        return 1 + often + bool(args.eval_on_start)

    def alternatives(self, progress: Callable[[list[Setup]], Iterable[Setup]] = list) -> dict[Setup, float]:
        """Memory of one device in bytes, for every method, profile, reference and checkpointing on and off that can be run.

        Args:
            progress: given the list of what is planned for, gives it back one by one.
        """
        profiles: tuple[Profile, ...] = ("one",) if self.options.devices == 1 else ("ddp", "zero2", "zero3", "fsdp2")
        profiles = tuple(dict.fromkeys((*profiles, self.setup.profile)))
        references: tuple[Reference, ...] = ("cached", "online") if self.compares else ("cached",)
        methods: tuple[Method, ...] = ("full", "lora", "qlora")
        if self._stored_in_4_bits():
            methods = ("qlora",)
        setups = [
            Setup(method, profile, reference, checkpointing)
            for method in methods
            for profile in profiles
            if method != "qlora" or profile not in SHARED_OUT
            for reference in references
            for checkpointing in (True, False)
        ]
        found = {}
        for setup in progress(setups):
            try:
                found[setup] = self.need(setup).total
            except ConfigError:  # the trainer would refuse it, as a cache for losses that read logits
                continue
        return found

    def tokens(self, row: Mapping[str, Any]) -> RowTokens:
        """Tokens of a row as the trainer runs it."""
        if row["id"] not in self.measured:
            end = families.missing_end(self.processor)
            reader = Reader(self.processor, self.views, end, self.config.negative, self.config.seed)
            self.measured[row["id"]] = measure(reader, row, self.image_token, self.args.max_length)
        return self.measured[row["id"]]

    def sized(self, size: RowSize, number: int) -> list[dict[str, Any]]:
        """So many rows of one size."""
        return sized_rows(self.processor, self.views, size, number, self.image_token)

    @property
    def memory(self) -> float:
        """Bytes of one device.

        Raises:
            ConfigError: it was not given.
        """
        if self.options.memory is None:
            raise ConfigError("--memory is needed to say what fits: GiB of one device, as in `--memory 80`.")
        return self.options.memory * GIB

    def _rows(self) -> tuple[list[dict[str, Any]], int]:
        """Rows that stand for all, shortest first, and how many there are of all; held-out ones are set aside."""
        from datasets import Dataset

        options, folder = self.options, self.config.pairs
        if not folder.exists():
            if options.rows is None:
                raise ConfigError(
                    f"there are no pairs at {folder}, so nothing says how long rows are. Make them first, or say what they will "
                    "be: --rows 10000, and if need be --pictures 1 --picture_side 672 --prompt_tokens 60 --answer_tokens 150."
                )
            given = {name: getattr(options, name) for name in SIZES}
            sizes = SIZES | {name: value for name, value in given.items() if value is not None}
            size = RowSize(sizes["prompt_tokens"], sizes["answer_tokens"], sizes["pictures"], sizes["picture_side"])
            if self.config.negative is not None:
                check_negative(Dataset.from_list([{"rejected_images": []}]), self.views, folder, self.config.negative)
            return self.sized(size, 1), options.rows
        if said := [f"--{name}" for name in ("rows", *SIZES) if getattr(options, name) is not None]:
            raise ConfigError(
                f"{', '.join(said)} would say what the rows will be, and {folder} is there and holds them. Leave out what the "
                "folder says itself, or name a folder that is not there yet."
            )
        inputs = read_inputs(self.config, output=Path("plan"), trainer={**self.settings, **ALONE})
        if inputs.eval_pairs is not None:
            self.eval_rows, self.eval_total = self._sampled(inputs.eval_pairs)
        return self._sampled(inputs.pairs)

    def _sampled(self, dataset: Dataset) -> tuple[list[dict[str, Any]], int]:
        number = min(self.options.sample, len(dataset))
        fitting = []
        for place in range(number):
            row = dataset[place * len(dataset) // number]
            try:
                self.tokens(row)
            except PromptTooLong:
                continue
            fitting.append(row)
        if not fitting:
            raise ValueError(
                f"no prompt of the {number} rows looked at fits max_length {self.args.max_length}. Raise it, or leave it out."
            )
        total = round(len(dataset) * len(fitting) / number)
        return sorted(fitting, key=lambda row: self.tokens(row).run), total

    def _arguments(self, folder: Path, **changes: Any) -> Any:
        """TRL's arguments for this process, whatever machine is planned for."""
        return training_arguments({**self.settings, **ALONE, **changes}, output=folder, seed=self.config.seed)

    def _empty_model(self) -> Any:
        """The whole model without weights."""
        from transformers import AutoModelForImageTextToText

        attention = self.config.model.attn_implementation
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(self.model_config, attn_implementation=attention)

    def _check_trains(self) -> None:
        """Something trains, and nothing in a tower that is meant to stay as it is, as the run demands."""
        from peft import get_peft_model

        model, lora = self._empty_model(), self.config.lora
        if lora is None:
            freeze(model, self.config.freeze)
        else:
            check_targets(model, lora)
            model = get_peft_model(model, lora.to_peft())
        check_trainable(model, self.config.freeze)

    def _stored_in_4_bits(self) -> bool:
        stored = getattr(self.model_config, "quantization_config", None)
        if stored is None:
            return False
        if not (stored.get("load_in_4bit") or stored.get("bits") == 4):
            raise ConfigError(
                f"{self.config.model.model_name_or_path} is quantised ({stored.get('quant_method', 'unknown method')}), and not "
                "to 4 bits: a plan knows weights of 4, 16 and 32 bits only. Plan for the model that it was made from."
            )
        return True

    def _quantised(self) -> bool:
        """Whether the language model's weights are in 4 bits, as stored or because the config says so."""
        if not (self._stored_in_4_bits() or self.config.model.load_in_4bit):
            return False
        check_quantised(replace(self.config.model, load_in_4bit=True), self.config.lora, self.args)
        if self.options.profile in SHARED_OUT:
            raise ConfigError(
                f"--profile {self.options.profile} shares out the weights, and those of 4 bits stay whole in every process here. "
                "Plan with --profile ddp or zero2, or set model.load_in_4bit to false."
            )
        return True

    def _dtype(self, adapts: bool) -> torch.dtype:
        """Of the weights as the recipe loads them."""
        name = self.config.model.dtype
        if name != "auto":
            dtype: torch.dtype = getattr(torch, name)
            check_precision(dtype, self.args)
            return dtype
        stored = getattr(self.model_config, "dtype", None) or self.model_config.get_text_config().dtype
        if not adapts or stored is None or (self.options.device == "cpu" and stored == torch.float16):
            return torch.float32
        # a run would not begin with the other 16 bits (`arguments.check_precision`)
        return self.sixteen or stored if stored in (torch.float16, torch.bfloat16) else stored

    def disk(self, counted: Counted, steps: int) -> dict[str, float]:
        """Bytes of what a run keeps: an adapter is saved alone."""
        adapts = self.config.lora is not None
        model = counted.trainable if adapts else counted.trainable + counted.frozen
        kept = optimizer_bytes(self.args, torch.float32) * counted.trainable_parameters
        disk = {
            "checkpoints": most_checkpoints(self.args, steps, steps / self.steps_of_epoch)
            * (model + (0 if self.args.save_only_model else kept)),
            "final model": model,
        }
        if self.setup.reference == "cached" and self.compares:
            kept_rows = ((self.total, self.rows), (self.eval_total, self.eval_rows))
            disk["reference cache"] = sum(
                total * 4 * sum(self.tokens(row).scored for row in rows) / len(rows)
                for total, rows in kept_rows
                if rows
            )
        return disk

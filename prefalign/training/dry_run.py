"""A training step without weights: the real trainer on fake tensors, to count what the step would hold and compute.

Weights and all that is computed from them are torch's fake tensors, which have shapes and no data; token ids, masks, positions
and pictures are real, so that what depends on their values (grids, who sees whom) comes out as in the run. What runs is
`PreferenceTrainer.training_step` with the run's settings: shared prompts, checkpointing, autocast with its copies of weights, the
head in chunks. A meter follows every tensor.

The layers of a language model are alike, so two short models, one a layer longer than the other, tell what each further layer
adds. The peak falls either where the backward pass turns round at the top layer, or at the bottom layer, when all gradients are
there; both grow linearly with the layers, so both are extrapolated and the larger one counts.

On a GPU TRL's head is a fused kernel on answers only, and has no tables beside the logits of a chunk; it is counted so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from prefalign import families
from prefalign.losses import VIEWS
from prefalign.models import freeze
from prefalign.training.fake_meter import FakeMeter, Moment, kernels_of, marked
from prefalign.training.frozen import NoInputHooks
from prefalign.training.preference import PreferenceTrainer

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass
class Counted:
    """What a step of one process takes, if nothing is shared out. Bytes, unless said otherwise.

    Attributes:
        trainable: weights that train.
        frozen: weights and buffers that do not, without those of the reference.
        reference: weights of a reference model of its own; what it shares with the policy is not in it.
        trainable_parameters: how many numbers train.
        frozen_parameters: how many do not.
        linear_parameters: of the frozen ones, those in the linear layers of the language model's blocks.
        block_parameters: numbers in one block of the language model, the adapter's included.
        matrix_parameters: numbers in the largest matrix of a block.
        gradients: gradients of all that trains.
        layers: blocks of the language model.
        top: the forward pass, and the backward pass down through the top layer.
        bottom: the end of the backward pass, from the bottom layer on.
        flops: floating point operations on one batch, with checkpointing's second forward pass and an online reference.
        forward: those of the first forward pass alone, an online reference's included: what evaluation takes.
    """

    trainable: float = 0
    frozen: float = 0
    reference: float = 0
    trainable_parameters: float = 0
    frozen_parameters: float = 0
    linear_parameters: float = 0
    block_parameters: float = 0
    matrix_parameters: float = 0
    gradients: float = 0
    layers: float = 0
    top: Moment = field(default_factory=Moment)
    bottom: Moment = field(default_factory=Moment)
    flops: float = 0
    forward: float = 0

    @property
    def peak(self) -> Moment:
        """The fuller of the two moments."""
        return max(self.top, self.bottom, key=lambda moment: moment.held)

    @property
    def weights(self) -> float:
        """Weights of policy and reference."""
        return self.trainable + self.frozen + self.reference


def count_step(
    config: Any,
    rows: Sequence[Mapping[str, Any]],
    processor: ProcessorMixin,
    *,
    arguments: Callable[[Path], Any],
    dtype: torch.dtype,
    frozen: Sequence[str] = (),
    cast: torch.dtype | None = None,
    target: Literal["cuda", "cpu"] = "cuda",
    attention: str | None = None,
    whole: bool = False,
    **settings: Any,
) -> Counted:
    """Count a training step on a batch.

    Args:
        config: transformers config of the model.
        rows: the batch, rows as `pairs.load_pairs` gives them.
        processor: the model's processor.
        arguments: TRL's arguments for a scratch folder; with `use_cpu`, whatever the target is.
        dtype: of the loaded weights.
        frozen: towers that stay as they are.
        cast: what all weights are turned into before training, as DeepSpeed and FSDP do with 16 bits; not together with autocast.
        target: type of the device whose kernels are meant.
        attention: `attn_implementation`.
        whole: run all layers instead of two short models.
        settings: further arguments of `PreferenceTrainer`.

    Returns:
        Counts of the step; with gradient accumulation, of one on top of the gradients of another.
    """
    layers = config.get_text_config().num_hidden_layers
    vision = getattr(config, "vision_config", None)
    few = max(2, 1 + len(getattr(vision, "deepstack_visual_indexes", None) or []))

    def count(number: int) -> Counted:
        step = _Step(_with_layers(config, number), dtype, frozen, cast, target, attention)
        return step.count(rows, processor, arguments, settings)

    if whole or layers <= few + 1:
        return count(layers)
    return _further(count(few), count(few + 1), layers - few)


def _with_layers(config: Any, number: int) -> Any:
    config = deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = number
    for name in ("layer_types", "no_rope_layers"):
        if getattr(text, name, None):
            setattr(text, name, list(getattr(text, name))[:number])
    return config


def _further(one: Any, two: Any, steps: int) -> Any:
    """Where `one` gets to after so many of the steps that lead from it to `two`."""
    if isinstance(one, Mapping):
        return {name: _further(one[name], two[name], steps) for name in one}
    if isinstance(one, (Moment, Counted)):
        names = [entry.name for entry in fields(one)]
        return type(one)(**{name: _further(getattr(one, name), getattr(two, name), steps) for name in names})
    return one + (two - one) * steps


class _Step:
    """One model without data and one training step on it."""

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        frozen: Sequence[str],
        cast: torch.dtype | None,
        target: str,
        attention: str | None,
    ):
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
        # as of a model that is spread over devices: neither transformers nor accelerate moves it
        model.hf_device_map = {"weights": "meta", "buffers": "meta"}
        self.model = model.eval()
        self.frozen = frozen
        self.cast = cast
        self.target = target

    def count(self, rows: Sequence[Mapping[str, Any]], processor: Any, arguments: Any, settings: Any) -> Counted:
        from datasets import Dataset
        from transformers.initialization import no_init_weights

        if settings.get("peft_config") is None:
            freeze(self.model, self.frozen)
        with tempfile.TemporaryDirectory(prefix="prefalign-plan-") as scratch:
            with no_init_weights():
                trainer = PreferenceTrainer(
                    self.model,
                    args=arguments(Path(scratch)),
                    train_dataset=Dataset.from_list([{"images": []}]),
                    processing_class=processor,
                    **settings,
                )
            return self._run(trainer, rows)

    def _run(self, trainer: PreferenceTrainer, rows: Sequence[Mapping[str, Any]]) -> Counted:
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        policy, reference = trainer.model, trainer.ref_model
        made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for module in (policy, reference):
            if module is not None:
                _make_fake(module if self.cast is None else module.to(self.cast), fake, made)
        batch = trainer.data_collator(rows)
        if trainer.needs_reference and trainer.reference == "cached":
            for part in batch.get("parts", [batch]):
                masks = {view: part["answers"][VIEWS[view].answer]["mask"] for view in trainer.views}
                part["reference"] = {view: torch.zeros(mask.shape) for view, mask in masks.items()}
        if trainer.args.gradient_checkpointing:
            policy.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
            NoInputHooks(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)
        counted, held = _weights(policy, reference)
        meter = FakeMeter(fake, held)
        _watch(policy, reference, meter)
        steps = trainer.current_gradient_accumulation_steps = min(2, trainer.args.gradient_accumulation_steps)
        prepared = trainer.accelerator.prepare_model(policy)
        trainer.compute_loss = _counted_forward(trainer.compute_loss, meter, counted)

        with kernels_of(self.target, meter), meter:
            for _ in range(steps):
                meter.restart()
                counted.forward = 0
                trainer.training_step(prepared, dict(batch))
        counted.flops = meter.flops
        counted.gradients = sum(p.grad.untyped_storage().nbytes() for p in policy.parameters() if p.grad is not None)
        counted.top, counted.bottom = meter.top, meter.bottom
        return counted


def _counted_forward(compute: Callable[..., Any], meter: FakeMeter, counted: Counted) -> Callable[..., Any]:
    def compute_counted(*args: Any, **kwargs: Any) -> Any:
        before = meter.flops
        result = compute(*args, **kwargs)
        counted.forward += meter.flops - before
        return result

    return compute_counted


def _make_fake(
    module: torch.nn.Module, fake: FakeTensorMode, made: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Replace what is on the meta device by fake tensors of the CPU; what two names or models share stays shared."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                if id(tensor) not in made:
                    twin: torch.Tensor = FakeTensor(fake, tensor.detach(), torch.device("cpu"))
                    if isinstance(tensor, torch.nn.Parameter):
                        twin = torch.nn.Parameter(twin, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = tensor, twin  # the first is kept, so that its id stays its own
                tensors[name] = made[id(tensor)][1]  # type: ignore[assignment]


def _weights(policy: Any, reference: Any) -> tuple[Counted, list[torch.Tensor]]:
    """Sizes of weights and buffers, each once, and these tensors."""
    counted = Counted()
    seen: dict[int, torch.Tensor] = {}
    for name, tensor in [*policy.named_parameters(), *policy.named_buffers()]:
        seen[id(tensor)] = tensor
        size = tensor.untyped_storage().nbytes()
        if tensor.requires_grad:
            counted.trainable += size
            counted.trainable_parameters += tensor.numel()
            continue
        counted.frozen += size
        counted.frozen_parameters += tensor.numel()
        if tensor.ndim == 2 and ".layers." in name and families.tower(name) == "language_model":
            counted.linear_parameters += tensor.numel()
    if reference is not None:
        for tensor in [*reference.parameters(), *reference.buffers()]:
            if id(tensor) not in seen:
                seen[id(tensor)] = tensor
                counted.reference += tensor.untyped_storage().nbytes()
    block = [parameter.numel() for parameter in families.core(policy).get_decoder().layers[0].parameters()]
    counted.layers = len(families.core(policy).get_decoder().layers)
    counted.block_parameters, counted.matrix_parameters = sum(block), max(block)
    return counted, list(seen.values())


def _watch(policy: Any, reference: Any, meter: FakeMeter) -> None:
    """Tell a meter which tensors are gradients, what the vision side makes, and where the backward pass is."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(meter.is_gradient)
    for model in (policy, reference):
        if model is None:
            continue
        base = families.core(model)
        base.model.get_image_features = marked(base.model.get_image_features, meter, "vision")
        base.lm_head.forward = marked(base.lm_head.forward, meter, "head")
    layers = families.core(policy).get_decoder().layers
    layers[-2].register_forward_hook(meter.ends_top)
    layers[0].register_forward_hook(meter.begins_bottom)

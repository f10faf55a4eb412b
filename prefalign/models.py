"""Load a vision-language model and its processor, tell what it is made of, and freeze parts of it."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign import families, quantised
from prefalign.checkpoints import ModelError, check_family, check_processor, check_weights, has_processor, resolve

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass
class ModelConfig:
    """Which model, and how it is loaded.

    Attributes:
        model_name_or_path: folder or Hub id of a model or of an adapter (which names its base), or `scenes` for the tiny model
            that ships with the package.
        model_revision: branch, tag or commit on the Hub.
        adapter: folder or Hub id of a PEFT adapter to put on the model.
        dtype: `auto` (that of the checkpoint), `float32`, `bfloat16` or `float16`.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`; None: transformers' choice.
        device: `auto` (first GPU, else CPU), `cpu`, `cuda`, `cuda:1`, ...
        trust_remote_code: run Python code that comes with the checkpoint.
        load_in_4bit: keep the linear layers of the language model in 4 bits and compute in `dtype`, for LoRA on a small GPU
            (QLoRA, arXiv 2305.14314); needs `prefalign[qlora]`.
        processor: options of the image processor by transformers' names (`min_pixels` and `max_pixels` of Qwen-VL, `size`); None:
            the checkpoint's. What is trained keeps them; give stages that measure a model those that it is trained with.
    """

    model_name_or_path: str
    model_revision: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    processor: dict[str, Any] | None = None


def load_model(config: ModelConfig) -> Any:
    """Load a model for inference: safetensors only, on its device, in eval mode.

    Returns:
        A transformers model, or a `PeftModel` if there is an adapter.

    Raises:
        ModelError: naming the folder, file, family or setting that is wrong.
    """
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging as transformers_logging

    source, adapter, revision = resolve(config)
    config = replace(config, model_revision=revision)
    check_family(source, config)
    check_weights(source)
    device = _device(config.device)
    dtype = _dtype(config.dtype)
    in_4_bits: dict[str, Any] = {}
    if config.load_in_4bit:
        dtype = _dtype(quantised.computing_dtype(source, revision, config.dtype, device))
        place = torch.cuda.current_device() if device == torch.device("cuda") else device  # accelerate wants a number
        in_4_bits = {"quantization_config": quantised.in_4_bits(dtype), "device_map": {"": place}}
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            source,
            revision=config.model_revision,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **in_4_bits,
        )
    except OSError as error:
        raise ModelError(f"the weights of {source!r} could not be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights of {source!r} lack {len(missing)} tensor(s) that a {type(model).__name__} has "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); they would be random. Use a complete checkpoint."
        )
    _forget_unused_renamings(model)
    if config.load_in_4bit:
        quantised.keep_differentiable(model)
    if dtype == "auto" and device.type == "cpu" and model.dtype == torch.float16:
        logger.info("%s is stored in float16, which a CPU computes badly; loaded in float32.", source)
        model = model.float()
    if adapter is not None:
        model = _with_adapter(model, adapter)
    model = model.to(device).eval()
    if families.family(families.core(model).config) not in families.TESTED:
        logger.warning("%s: family %r is not among those tested.", source, families.core(model).config.model_type)
    return model


def load_processor(config: ModelConfig) -> Any:
    """Load the processor of a model.

    A chat template that leaves out the begin-of-sequence token which the tokenizer adds by itself (LLaVA-1.5) gets it, so that
    generation, scoring and TRL, which tokenises rendered text as it is, see one prompt.

    Raises:
        ModelError: if files of the processor are missing, or `config.processor` has an option that it would not read.
    """
    from transformers import AutoProcessor

    source, adapter, revision = resolve(config)
    check_family(source, replace(config, model_revision=revision))
    check_processor(source, adapter)
    if adapter is not None and has_processor(Path(adapter)):
        source, revision = adapter, None
    try:
        processor = AutoProcessor.from_pretrained(
            source, revision=revision, trust_remote_code=config.trust_remote_code, **(config.processor or {})
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"the processor of {source!r} could not be loaded: {error}") from error
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise ModelError(
                f"the processor of {source!r} is a {type(processor).__name__} without {part}; it cannot prepare pictures. "
                "Add the checkpoint's `preprocessor_config.json` and `processor_config.json`."
            )
    _check_options(config.processor or {}, processor.image_processor)
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    _begin_with_bos(processor)
    return processor


def _check_options(options: Mapping[str, Any], image_processor: Any) -> None:
    """Refuse options that transformers would pass over in silence."""
    known = sorted(image_processor.valid_kwargs.__annotations__)
    for name in options:
        if name not in known:
            raise ModelError(
                f"processor.{name}: a {type(image_processor).__name__} has no such option, and pictures would be prepared "
                f"without it. It has {', '.join(known)}; use these, or leave it out."
            )


def fingerprint(model: Any) -> str:
    """Content hash of a model: name, dtype, shape and bytes of every tensor, adapter included.

    A tensor counts in the narrowest float type that holds its values exactly, so a float16 checkpoint has one fingerprint
    whether it is loaded in float16 on a GPU or in float32 on a CPU. Under DeepSpeed ZeRO-3, where a process holds a part of
    each tensor, all processes have to ask together.

    Returns:
        16 hex digits; equal weights give equal digits whatever file or folder they came from.
    """

    import torch

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        if hasattr(tensor, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([tensor]):
                return digest((name, tensor.detach()))
        tensor = _narrowest(tensor.detach())
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        head = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
        return hashlib.sha256(head + hashlib.sha256(raw.data).digest()).digest()

    tensors = sorted(model.state_dict(keep_vars=True).items(), key=lambda item: item[0])
    # gathered one by one, in the same order everywhere
    in_parts = any(hasattr(tensor, "ds_id") for _, tensor in tensors)
    with ThreadPoolExecutor(1 if in_parts else min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(digest, tensors)
        return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def parameter_table(model: Any) -> list[dict[str, Any]]:
    """Parameters by tower.

    Returns:
        One `{"tower", "parameters", "trainable"}` for each of vision, projector and language model, and their total.
    """
    counts = {name: [0, 0] for name in (*families.TOWERS, "total")}
    for name, parameter in model.named_parameters():
        for tower in (families.tower(name), "total"):
            counts[tower][0] += _size(parameter)
            counts[tower][1] += _size(parameter) if parameter.requires_grad else 0
    return [{"tower": name, "parameters": both[0], "trainable": both[1]} for name, both in counts.items()]


def check_towers(towers: Sequence[str]) -> None:
    """Check names of towers, which needs no model.

    Raises:
        ModelError: there is no tower of that name.
    """
    for name in towers:
        if name not in families.TOWERS:
            raise ModelError(f"no tower called {name!r} to freeze; there are {', '.join(families.TOWERS)}.")


def freeze(model: Any, towers: Sequence[str]) -> int:
    """Stop the gradient of whole towers.

    Args:
        model: the model, changed in place.
        towers: names among `families.TOWERS`.

    Returns:
        Number of parameters frozen.

    Raises:
        ModelError: for an unknown tower, or one that the model does not have.
    """
    frozen = dict.fromkeys(towers, 0)
    check_towers(towers)
    for name, parameter in model.named_parameters():
        if families.tower(name) in frozen:
            parameter.requires_grad_(False)
            frozen[families.tower(name)] += _size(parameter)
    for name, count in frozen.items():
        if not count:
            raise ModelError(f"a {type(families.core(model)).__name__} has no {name} to freeze; leave it out.")
    return sum(frozen.values())


def _forget_unused_renamings(model: Any) -> None:
    """Keep the names under which a checkpoint was read for saving it again, and no others.

    Under DeepSpeed ZeRO-3 transformers 5.23 remembers every renaming that it knows for a family, legacy ones too, and would
    save `language_model.model.model.layers...`, which no other program reads.
    """
    from transformers.core_model_loading import WeightRenaming

    known = getattr(model, "_weight_conversions", None)
    if known is not None:
        model._weight_conversions = [
            entry for entry in known if not isinstance(entry, WeightRenaming) or entry.was_used()
        ]


def _size(parameter: torch.nn.Parameter) -> int:
    """Elements of a whole parameter: a process holds none itself under DeepSpeed ZeRO-3, and a byte holds two of 4 bits."""
    packed = getattr(parameter, "quant_state", None)
    if packed is not None:
        return int(packed.shape.numel())
    return getattr(parameter, "ds_numel", parameter.numel())


def _narrowest(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if tensor.dtype in (torch.float32, torch.bfloat16):
        for dtype in (torch.float16, torch.bfloat16):
            narrow = tensor.to(dtype)
            if torch.equal(narrow.to(tensor.dtype), tensor):
                return narrow
    return tensor


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is not one that torch knows; use auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name!r} was asked for and torch sees no GPU. Use `auto` or `cpu`.")
    return device


def _dtype(name: str) -> Any:
    import torch

    known = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelError(f"dtype {name!r} is not known; use one of {', '.join(known)}.")
    return known[name]


def _with_adapter(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(
            f"adapter {adapter!r} needs peft, which is not installed. Run `pip install prefalign[train]`."
        ) from error
    if Path(adapter).is_dir():
        check_weights(adapter)
    return PeftModel.from_pretrained(model, adapter)


def _begin_with_bos(processor: Any) -> None:
    tokenizer = processor.tokenizer
    template = getattr(processor, "chat_template", None)
    if not isinstance(template, str) or tokenizer.bos_token is None or families.rewrites_prompt(processor):
        return
    adds = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    question = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    if adds and not families.render(processor, question).startswith(tokenizer.bos_token):
        processor.chat_template = tokenizer.chat_template = "{{ bos_token }}" + template

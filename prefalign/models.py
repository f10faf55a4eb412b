"""Load a vision-language model and its processor, tell what it is made of, and freeze parts of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefalign import families

logger = logging.getLogger(__name__)

SCENES = "scenes"
_HUB_TIMEOUT = 15.0


@dataclass
class ModelConfig:
    """Which model, and how it is loaded.

    Attributes:
        model_name_or_path: folder, Hub id, or `scenes` for the tiny model that ships with the package.
        model_revision: branch, tag or commit on the Hub.
        adapter: folder or Hub id of a PEFT adapter to put on the model.
        dtype: `auto` (that of the checkpoint), `float32`, `bfloat16` or `float16`.
        attn_implementation: `sdpa`, `eager`, `flash_attention_2`; None: transformers' choice.
        device: `auto` (first GPU, else CPU), `cpu`, `cuda`, `cuda:1`, ...
        trust_remote_code: run Python code that comes with the checkpoint.
    """

    model_name_or_path: str
    model_revision: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False


class ModelError(ValueError):
    """A checkpoint that cannot be used; the message says what to do."""


def load_model(config: ModelConfig) -> Any:
    """Load a model for inference: safetensors only, on its device, in eval mode.

    Returns:
        A transformers model, or a `PeftModel` if there is an adapter.

    Raises:
        ModelError: naming the folder, file, family or setting that is wrong.
    """
    from transformers import AutoModelForImageTextToText

    source, adapter = _resolve(config)
    _check_family(source, config)
    _check_weights(source)
    device = _device(config.device)
    dtype = _dtype(config.dtype)
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            source,
            revision=config.model_revision,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except OSError as error:
        raise ModelError(f"the weights of {source!r} could not be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights of {source!r} lack {len(missing)} tensor(s) that a {type(model).__name__} has ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); they would be random. Use the checkpoint's own model class or a complete one."
        )
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
        ModelError: if files of the processor are missing.
    """
    from transformers import AutoProcessor

    source, adapter = _resolve(config)
    if adapter is not None and _has_processor(Path(adapter)):
        source = adapter
    elif not adapter:
        _check_family(source, config)
    folder = Path(source)
    if folder.is_dir() and not _has_processor(folder):
        raise ModelError(
            f"folder {source!r} has no processor ({_missing_processor(folder)}), so pictures and text cannot be prepared. Save it there with "
            "`processor.save_pretrained(folder)`, or copy these files from the model it was trained from."
        )
    try:
        processor = AutoProcessor.from_pretrained(
            source, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"the processor of {source!r} could not be loaded: {error}") from error
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise ModelError(
                f"the processor of {source!r} is a {type(processor).__name__} without {part}; it cannot prepare pictures. "
                "Add the checkpoint's `preprocessor_config.json` and `processor_config.json`."
            )
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    _begin_with_bos(processor)
    return processor


def fingerprint(model: Any) -> str:
    """Content hash of a model: name, dtype, shape and bytes of every tensor, adapter included.

    Returns:
        16 hex digits; equal weights give equal digits whatever file or folder they came from.
    """

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        head = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
        return hashlib.sha256(head + hashlib.sha256(raw.data).digest()).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(digest, sorted(model.state_dict().items()))
        return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def parameter_table(model: Any) -> list[dict[str, Any]]:
    """Parameters by tower.

    Returns:
        One `{"tower", "parameters", "trainable"}` for each of vision, projector and language model, and their total.
    """
    rows = {name: {"tower": name, "parameters": 0, "trainable": 0} for name in (*families.TOWERS, "total")}
    for name, parameter in model.named_parameters():
        for row in (rows[families.tower(name)], rows["total"]):
            row["parameters"] += parameter.numel()
            row["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return list(rows.values())


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
    for name in towers:
        if name not in families.TOWERS:
            raise ModelError(f"no tower called {name!r} to freeze; there are {', '.join(families.TOWERS)}.")
    for name, parameter in model.named_parameters():
        if families.tower(name) in frozen:
            parameter.requires_grad_(False)
            frozen[families.tower(name)] += parameter.numel()
    for name, count in frozen.items():
        if not count:
            raise ModelError(f"a {type(families.core(model)).__name__} has no {name} to freeze; leave it out.")
    return sum(frozen.values())


def _resolve(config: ModelConfig) -> tuple[str, str | None]:
    """Source of the base model (folder or Hub id that can be reached) and of the adapter."""
    source, adapter = config.model_name_or_path, config.adapter
    if source == SCENES:
        base = Path(__file__).parent / "scenes" / "base"
        if not (base / "config.json").is_file():
            raise ModelError("the tiny model of `scenes` is not in this installation. Reinstall prefalign, or rebuild the model.")
        source = str(base)
    _check_source(source, config.model_revision, "config.json", "adapter_config.json")
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if not (folder / "adapter_config.json").is_file():
            inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"folder {source!r} has no config.json (it holds: {inside}), so it is not a model. Name the folder that `save_pretrained` wrote, "
                "such as a run's output folder or one of its checkpoint-N folders."
            )
        if adapter is not None:
            raise ModelError(f"folder {source!r} is an adapter, and adapter {adapter!r} was given too. Name the base model and one adapter.")
        source, adapter = _adapter_base(folder), source
        _check_source(source, None, "config.json")
    if adapter is not None:
        _check_source(adapter, None, "adapter_config.json")
        if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
            raise ModelError(f"folder {adapter!r} has no adapter_config.json, so it is not a PEFT adapter. Give it as the model instead.")
    return source, adapter


def _adapter_base(folder: Path) -> str:
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"adapter {str(folder)!r} does not say which model it belongs to. Name the model and give the folder as `adapter`.")
    if base == SCENES or (not Path(base).exists() and Path(base).parts[-3:] == ("prefalign", "scenes", "base")):
        return str(Path(__file__).parent / "scenes" / "base")
    return str(base)


def _check_source(source: str, revision: str | None, *names: str) -> None:
    """Raise unless `source` is a folder or a Hub id whose file can be had, without waiting on a dead network."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers, get_session

    path = Path(source).expanduser()
    if path.is_dir():
        return
    if path.is_file():
        raise ModelError(f"{source!r} is a file; name the folder that holds it and config.json.")
    parts = source.split("/")
    if path.is_absolute() or source[:1] in (".", "~") or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir()):
        raise ModelError(f"there is no folder {source!r}. Check the path; a model on the Hub is named `owner/name`.")
    if any(isinstance(try_to_load_from_cache(source, name, revision=revision), str) for name in names):
        return
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{source!r} is neither a folder here nor in the local cache of the Hub, and HF_HUB_OFFLINE is set. Name an existing folder, or unset it "
            f"and download the model once (`hf download {source}`)."
        )
    status = 0
    try:
        for name in names:
            url = hf_hub_url(source, name, revision=revision)
            status = get_session().head(url, headers=build_hf_headers(), timeout=_HUB_TIMEOUT, follow_redirects=True).status_code
            if status == 200:
                return
    except Exception as error:
        raise ModelError(
            f"{source!r} is not a folder here, and the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}). Name an existing "
            "folder, or connect and try again."
        ) from error
    raise ModelError(
        f"{source!r} is not a folder here, and the Hub at {constants.ENDPOINT} answers {status} for its {' or '.join(names)}"
        f"{f' at revision {revision!r}' if revision else ''}. Check the name; for a gated or private model set HF_TOKEN."
    )


def _check_family(source: str, config: ModelConfig) -> None:
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        values, _ = PreTrainedConfig.get_config_dict(source, revision=config.model_revision)
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"config.json of {source!r} could not be read: {error}") from error
    if config.trust_remote_code and "auto_map" in values:
        return
    model_type = values.get("model_type")
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        classes = ", ".join(values.get("architectures") or []) or "no class named"
        own_code = " It comes with code of its own: set trust_remote_code to run it." if "auto_map" in values else ""
        raise ModelError(
            f"{source!r} is of model_type {model_type!r} ({classes}), which is not a vision-language model that transformers knows.{own_code} "
            f"Families known to work: {', '.join(families.TESTED.values())}."
        )


def _check_weights(source: str) -> None:
    from safetensors import SafetensorError, safe_open

    folder = Path(source)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = f"only {', '.join(others[:3])}, which are not read since loading them can run code" if others else "none"
        raise ModelError(
            f"folder {source!r} has no weights in safetensors form ({found}). Save the model again with `model.save_pretrained(folder)`."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file.name} in {source!r} is damaged ({error}; {file.stat().st_size:,} bytes). Copy or download it again; a Git LFS pointer "
                "needs `git lfs pull`."
            ) from error


def _missing_processor(folder: Path) -> str:
    words = [name for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model") if (folder / name).is_file()]
    pictures = [name for name in ("processor_config.json", "preprocessor_config.json") if (folder / name).is_file()]
    lacking = ["tokenizer.json"] * (not words) + ["processor_config.json or preprocessor_config.json"] * (not pictures)
    return "missing: " + " and ".join(lacking) if lacking else ""


def _has_processor(folder: Path) -> bool:
    return folder.is_dir() and not _missing_processor(folder)


def _device(name: str) -> torch.device:
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
    known = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelError(f"dtype {name!r} is not known; use one of {', '.join(known)}.")
    return known[name]


def _with_adapter(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(f"adapter {adapter!r} needs peft, which is not installed. Run `pip install prefalign[train]`.") from error
    if Path(adapter).is_dir():
        _check_weights(adapter)
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

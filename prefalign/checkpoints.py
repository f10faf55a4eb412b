"""Find a checkpoint and say what is wrong with it, before anything heavy is loaded and without waiting on a dead network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prefalign import families

if TYPE_CHECKING:
    from prefalign.models import ModelConfig

SCENES = "scenes"
SCENES_BASE = Path(__file__).parent / "scenes" / "base"
_HUB_TIMEOUT = 15.0


class ModelError(ValueError):
    """A checkpoint that cannot be used; the message says what to do."""


def resolve(config: ModelConfig) -> tuple[str, str | None, str | None]:
    """Where the base model and its adapter are.

    Returns:
        Folder or Hub id of the base model, of the adapter if there is one, and the base's revision. A model that is an adapter,
        in a folder or on the Hub (it is then downloaded), names its base.

    Raises:
        ModelError: if there is no such folder, or the Hub does not have it or cannot be reached.
    """
    source, adapter = (_expand(name) if name else name for name in (config.model_name_or_path, config.adapter))
    assert source is not None
    if source == SCENES:
        if not (SCENES_BASE / "config.json").is_file():
            raise ModelError(
                "the tiny model of `scenes` is not in this installation. Reinstall prefalign, or rebuild the model."
            )
        source = str(SCENES_BASE)
    revision = config.model_revision
    found = _check_source(source, revision, "config.json", "adapter_config.json")
    folder = Path(source)
    if found == "adapter_config.json":
        folder = _download_adapter(source, revision)
    if folder.is_dir() and not (folder / "config.json").is_file():
        if not (folder / "adapter_config.json").is_file():
            inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"folder {source!r} has no config.json (it holds: {inside}), so it is not a model. Name the folder "
                "that `save_pretrained` wrote, such as a run's output folder or one of its checkpoint-N folders."
            )
        if adapter is not None:
            raise ModelError(
                f"{source!r} is an adapter, and adapter {adapter!r} was given too. Name the base model and one adapter."
            )
        (source, revision), adapter = _adapter_base(folder, source), str(folder)
        try:
            _check_source(source, revision, "config.json")
        except ModelError as error:
            raise ModelError(f"adapter {adapter!r} was trained on a model that is not found: {error}") from error
    if adapter is not None:
        _check_source(adapter, None, "adapter_config.json")
        if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
            raise ModelError(
                f"folder {adapter!r} has no adapter_config.json, so it is not a PEFT adapter. Give it as the model instead."
            )
    return source, adapter, revision


def _expand(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _adapter_base(folder: Path, name: str) -> tuple[str, str | None]:
    """The base that an adapter's folder names, and its revision; where the run noted the folder it was in, that folder."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"adapter {name!r} does not say which model it belongs to. Name the model and give it as `adapter`."
        )
    note = folder / "base.json"
    if not Path(base).expanduser().is_dir() and note.is_file():  # a relative name, seen from another working directory
        run = json.loads(note.read_text(encoding="utf-8"))
        if run.get("name") == base and run.get("local") and Path(run["local"]).is_dir():
            return str(run["local"]), None
    if base == SCENES or (not Path(base).exists() and Path(base).parts[-3:] == ("prefalign", "scenes", "base")):
        return str(SCENES_BASE), None
    return str(base), settings.get("revision")


def _download_adapter(source: str, revision: str | None) -> Path:
    """The folder of the Hub's cache that holds an adapter and, if the repository has one, its processor."""
    from huggingface_hub import constants, snapshot_download

    wanted = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns="checkpoint-*/*",
                local_files_only=constants.is_offline_mode(),
            )
        )
    except Exception as error:
        raise ModelError(
            f"adapter {source!r} could not be downloaded ({type(error).__name__}: {error}). Connect and try again, or name a "
            "folder that holds it."
        ) from error


def _check_source(source: str, revision: str | None, *names: str) -> str | None:
    """Raise unless `source` is a folder or a Hub id one of whose files can be had, without waiting on a dead network.

    Returns:
        The first of `names` that the Hub or its local cache has; None for a folder.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id

    path = Path(source)
    if path.is_dir():
        return None
    if path.is_file():
        raise ModelError(f"{source!r} is a file; name the folder that holds it and config.json.")
    parts = source.split("/")
    if path.is_absolute() or source.startswith(".") or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir()):
        raise ModelError(f"there is no folder {source!r}. Check the path; a model on the Hub is named `owner/name`.")
    try:
        validate_repo_id(source)
    except HFValidationError as error:
        raise ModelError(
            f"there is no folder {source!r}, and it is not the name of a model on the Hub (`owner/name`)."
        ) from error
    for name in names:
        if isinstance(try_to_load_from_cache(source, name, revision=revision), str):
            return name
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{source!r} is neither a folder here nor in the local cache of the Hub, and HF_HUB_OFFLINE is set. "
            f"Name an existing folder, or unset it and download the model once (`hf download {source}`)."
        )
    status = 0
    try:
        for name in names:
            url = hf_hub_url(source, name, revision=revision)
            answer = get_session().head(url, headers=build_hf_headers(), timeout=_HUB_TIMEOUT, follow_redirects=True)
            status = answer.status_code
            if status == 200:
                return name
    except Exception as error:
        raise ModelError(
            f"{source!r} is not a folder here, and the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}). "
            "Name an existing folder, or connect and try again."
        ) from error
    raise ModelError(
        f"{source!r} is not a folder here, and the Hub at {constants.ENDPOINT} answers {status} for its {' or '.join(names)}"
        f"{f' at revision {revision!r}' if revision else ''}. Check the name; for a gated or private model set HF_TOKEN."
    )


def check_model(config: ModelConfig) -> tuple[str, str | None]:
    """Find what would keep a model from being loaded, as far as it shows without reading weights.

    Returns:
        Folder or Hub id of the base model, and its revision.

    Raises:
        ModelError: nothing is there, or no vision-language model; weights or processor are missing or damaged.
    """
    source, adapter, revision = resolve(config)
    check_family(source, replace(config, model_revision=revision))
    for name in (source, adapter):
        if name is not None:
            check_weights(name)
    check_processor(source, adapter)
    return source, revision


def check_processor(source: str, adapter: str | None) -> None:
    """Raise `ModelError` if the folder of a model has no processor, and that of its adapter neither."""
    folder = Path(source)
    if folder.is_dir() and not has_processor(folder) and not (adapter is not None and has_processor(Path(adapter))):
        raise ModelError(
            f"folder {source!r} has no processor ({missing_processor(folder)}), so pictures and text cannot be prepared. Save it "
            "there with `processor.save_pretrained(folder)`, or copy these files from the model it was trained from."
        )


def check_family(source: str, config: ModelConfig) -> None:
    """Raise `ModelError` unless the config is that of a vision-language model."""
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
            f"{source!r} is of model_type {model_type!r} ({classes}), which is not a vision-language model that "
            f"transformers knows.{own_code} Families known to work: {', '.join(families.TESTED.values())}."
        )


def check_weights(source: str) -> None:
    """Raise `ModelError` if a folder has no safetensors, or damaged ones (their headers are read)."""
    from safetensors import SafetensorError, safe_open

    folder = Path(source)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        found = (
            f"only {', '.join(others[:3])}, which are not read since loading them can run code" if others else "none"
        )
        raise ModelError(
            f"folder {source!r} has no weights in safetensors form ({found}). Save the model again with "
            "`model.save_pretrained(folder)`."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file.name} in {source!r} is damaged ({error}; {file.stat().st_size:,} bytes). Copy or download it "
                "again; a Git LFS pointer needs `git lfs pull`."
            ) from error


def missing_processor(folder: Path) -> str:
    """What a folder lacks to hold a processor, in words; empty if nothing."""
    words = [
        name for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model") if (folder / name).is_file()
    ]
    pictures = [name for name in ("processor_config.json", "preprocessor_config.json") if (folder / name).is_file()]
    lacking = ["tokenizer.json"] * (not words) + ["processor_config.json or preprocessor_config.json"] * (not pictures)
    return "missing: " + " and ".join(lacking) if lacking else ""


def has_processor(folder: Path) -> bool:
    """Whether a folder holds the files of a processor."""
    return folder.is_dir() and not missing_processor(folder)

"""Make a clean folder of what belongs on the Hub: no optimizer, no pickles, no machine paths; know what was trained from."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from prefalign.checkpoints import SCENES, SCENES_BASE
from prefalign.hub.merges import read_merge, start_of
from prefalign.merged_folders import LICENCES, MERGE_FILE

MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "adapter_config.json", "adapter_model.safetensors", "processor_config.json", "preprocessor_config.json",
    "video_preprocessor_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "prefalign_config.yaml",
    "pairs_manifest.json", "data_manifest.json", MERGE_FILE, *LICENCES,
)  # fmt: skip
DATASET_FILES = ("data/*.parquet", "manifest.json", "config.json")
WITHOUT_PATHS = ("config.json", "generation_config.json", "adapter_config.json", "processor_config.json",
                 "preprocessor_config.json", "video_preprocessor_config.json", "tokenizer_config.json",
                 "pairs_manifest.json", "data_manifest.json", "manifest.json", MERGE_FILE, "prefalign_config.yaml")  # fmt: skip
BASE_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path", "model_name_or_path", "base", "name")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ABSOLUTE = re.compile(r"(?:~?/[^/\n]+/|[A-Za-z]:\\)[^\n]*")
Kind = Literal["full", "adapter", "dataset"]


class PublishError(ValueError):
    """Publishing stopped; the message says why and what to do."""


@dataclass(frozen=True)
class Base:
    """The model that an adapter or a full model was trained from.

    Attributes:
        label: for readers: Hub id, or honest words for a model that is not there.
        hub_id: its name on the Hub, or None.
        local: where it is, or was, on this machine; None if it came from the Hub.
        is_scenes: whether it is the model that ships with prefalign.
        recorded: how configs name it.
    """

    label: str
    hub_id: str | None = None
    local: Path | None = None
    is_scenes: bool = False
    recorded: str | None = None


def kind_of(folder: Path) -> Kind:
    """Tell full weights, an adapter and a data set apart by their files.

    Raises:
        PublishError: there is nothing to publish, only pickled weights, or both an adapter and full weights.
    """
    if not folder.is_dir():
        raise PublishError(f"no folder at {folder}. Give a training run's folder or a folder of pairs.")
    full, adapter = any(folder.glob("model*.safetensors")), (folder / "adapter_model.safetensors").is_file()
    if any(folder.glob("data/*.parquet")) or ((folder / "manifest.json").is_file() and not full and not adapter):
        return "dataset"
    if full and adapter:
        raise PublishError(f"{folder} holds an adapter and full weights; which one is meant? Move one elsewhere.")
    if not full and not adapter:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickles:
            raise PublishError(
                f"{folder} holds no safetensors, only pickle files ({', '.join(pickles)}), which run code when opened. "
                "Load the model and save it again: `model.save_pretrained(folder)` writes safetensors."
            )
        if (folder / "prefalign_config.yaml").is_file():
            raise PublishError(
                f"the run in {folder} has not saved its model. Start the same command again: it goes on where it stopped. Or "
                "publish one of its checkpoint-N folders."
            )
        if (folder / "pairs" / "manifest.json").is_file():
            raise PublishError(
                f"{folder} holds several folders of rows, and each is published by itself. Its pairs are in {folder / 'pairs'}: "
                "give that."
            )
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise PublishError(
            f"{folder} holds neither model weights (model.safetensors, adapter_model.safetensors) nor pairs "
            f"(data/*.parquet), but {found}. Give the folder that a run wrote."
        )
    return "adapter" if adapter else "full"


def resolve_base(folder: Path, kind: Kind, config: Mapping[str, Any], base_model: str | None) -> Base:
    """Find out what was trained from: `--base-model`, else the merge's note, the adapter's or the run's config.

    Raises:
        PublishError: an adapter's base is not on the Hub, so no one could load the adapter; or a base that is neither a folder
            nor the name of a model on the Hub.
    """
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        raise PublishError(f"--base-model {base_model!r} is not a model on the Hub. Write it as OWNER/NAME.")
    recorded = (
        (config.get("model") or {}).get("model_name_or_path") if isinstance(config.get("model"), Mapping) else None
    )
    merge = read_merge(folder) if kind == "full" else None
    if merge is not None:  # an adapter that was merged may have gone on from another one, which its run names
        recorded = start_of(merge)["name"]
    if kind == "adapter":
        recorded = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] or recorded
    if not recorded:
        return Base(base_model or "a base that was not recorded", hub_id=base_model)
    path = Path(recorded).expanduser()
    if recorded == SCENES or path.resolve() == SCENES_BASE.resolve() or path.parts[-3:] == SCENES_BASE.parts[-3:]:
        label = base_model or "the scenes base that ships with prefalign (`prefalign.scenes.base_checkpoint()`)"
        return Base(label, hub_id=base_model, local=SCENES_BASE, is_scenes=True)
    local = _local_base(recorded, folder)
    if merge is not None:  # a revision is noted for models of the Hub only
        local = (local or path) if start_of(merge)["revision"] is None else None
    if local is None:
        if base_model is None and not HUB_ID.fullmatch(recorded):
            raise PublishError(
                f"the base is recorded as {recorded!r}, which is no folder here and not the name of a model on the Hub "
                "(OWNER/NAME), so the card could not say what was trained. Name it with --base-model OWNER/NAME."
            )
        return Base(base_model or recorded, hub_id=base_model or recorded)
    if base_model is None and kind == "adapter":
        raise PublishError(
            f"the adapter's base is a folder of this machine ({local.name}), so no one else could load the adapter. Name "
            "the base on the Hub with --base-model OWNER/NAME, or publish full weights: "
            f"`prefalign run merge_adapter --adapter {folder} --output FOLDER`."
        )
    label = base_model or f"a local checkpoint called `{local.name}`, which is not on the Hub"
    return Base(label, hub_id=base_model, local=local, recorded=recorded)


def _local_base(recorded: str, folder: Path) -> Path | None:
    """The folder that a run's base is or was in, or None if it came from the Hub.

    The run itself knows (`base.json`). Without it a relative name such as `runs/sft` reads like OWNER/NAME: it is a folder if it,
    or the folder it would be in, lies in the working directory or anywhere above the run.
    """
    path, noted = Path(recorded).expanduser(), folder / "base.json"
    if noted.is_file():
        run = json.loads(noted.read_text(encoding="utf-8"))
        if run.get("name") == recorded:
            return Path(run["local"]) if run.get("local") else None
    if path.is_dir() or path.is_absolute() or ABSOLUTE.fullmatch(recorded):
        return path
    above = (Path.cwd(), *folder.resolve().parents[:-1])
    found = next((root / path for root in above if (root / path).is_dir()), None)
    if found is None and (
        recorded.startswith(".") or any(len(path.parts) > 1 and (root / path.parts[0]).is_dir() for root in above)
    ):
        return path
    return found


def stage(folder: Path, staged: Path, patterns: Sequence[str], base: Base, *, link: bool = False) -> list[str]:
    """Bring over the files that belong, machine paths taken out of their configs.

    Args:
        folder: a run's folder, or a finished stage's.
        staged: the folder to make.
        patterns: names that belong.
        base: what was trained from.
        link: take files that need no change by hard links, which take no room, where the file system has them. For a folder that
            is not kept: who writes into a linked file writes into the run's.

    Returns:
        What was left out.

    Raises:
        PublishError: a file is damaged, or there is no room for a copy of it.
    """
    staged.mkdir()
    left_out = set()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if not any(
            fnmatch.fnmatch(name.lower(), pattern) and name.count("/") == pattern.count("/") for pattern in patterns
        ):
            left_out.add(name if "/" not in name else name.split("/")[0] + "/")
            continue
        destination = staged / name
        destination.parent.mkdir(exist_ok=True)
        text = _portable_text(file, base) if name in WITHOUT_PATHS else None
        if text is None:
            _bring(file, destination, link)
        else:
            destination.write_text(text, encoding="utf-8")
    return sorted(left_out)


def _bring(file: Path, destination: Path, link: bool) -> None:
    """Link a file, or copy it where that cannot be done (another file system, one without links, somebody else's file)."""
    if link:
        with contextlib.suppress(OSError):
            os.link(file.resolve(), destination)
            return
    try:
        shutil.copyfile(file, destination)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PublishError(
            f"no room in {destination.parent} for a copy of {file.name} ({file.stat().st_size / 1e9:.1f} GB). Make room there, "
            "or move the folder to a file system that has it."
        ) from error


def _portable_text(file: Path, base: Base) -> str | None:
    """The file with machine paths taken out, or None if it has none (it is then copied byte by byte)."""
    text = file.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise PublishError(f"{file.name} is damaged ({error}), so the folder would not load. Save it again.") from error
    portable = without_paths(content, base)
    if portable == content:
        return None
    if file.suffix == ".yaml":
        return yaml.safe_dump(portable, sort_keys=False, allow_unicode=True)
    return json.dumps(portable, indent=2, ensure_ascii=False) + "\n"


def without_paths(value: Any, base: Base, key: str = "") -> Any:
    """Replace strings that are absolute paths by their last part, and a local base by its name on the Hub."""
    if isinstance(value, Mapping):
        return {without_paths(name, base): without_paths(item, base, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, base, key) for item in value]
    if not isinstance(value, str):
        return value
    is_base = base.local and (value == base.recorded or Path(value).expanduser().resolve() == base.local.resolve())
    if key in BASE_KEYS and is_base:
        return base.hub_id or ("scenes" if base.is_scenes else _last_part(value))
    return _last_part(value) if ABSOLUTE.fullmatch(value) else value


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]

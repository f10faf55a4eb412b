"""A folder that holds a merged model: the files that go with the weights, where they came from, and whole or not at all."""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign.checkpoints import ModelError, check_weights, resolve
from prefalign.manifest import is_full_disk, library_versions, write_atomically
from prefalign.models import ModelConfig

MERGE_FILE = "merge.json"
CONFIGS = ("config.json", "generation_config.json")
PROCESSOR = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "*processor_config.json", "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip
LICENCES = ("licen?e*", "notice*", "copying*", "*use_policy*", "*use-policy*")
CODE = ("*.py",)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "README.md", "base.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint that goes into a merge.

    Attributes:
        name: as the user gave it: folder or Hub id.
        folder: where its files are; for a model on the Hub, in the Hub's cache.
        revision: commit on the Hub; None for a folder.
    """

    name: str
    folder: Path
    revision: str | None = None

    def record(self) -> dict[str, Any]:
        """What tells this checkpoint from another under the same name, and the licence that its README names."""
        weights = weight_files(self.folder)
        record: dict[str, Any] = {"name": self.name, "revision": self.revision}
        record["bytes"] = sum(file.stat().st_size for file in weights)
        if self.revision is None:
            record["modified"] = max((file.stat().st_mtime_ns for file in weights), default=None)
        return {**record, "license": _licence(self.folder)}


def find_model(name: str, revision: str | None = None) -> Source:
    """A model's folder with safetensors; a model on the Hub is downloaded to the Hub's cache.

    Args:
        name: folder or Hub id, or `scenes`.
        revision: branch, tag or commit on the Hub.

    Raises:
        ModelError: there is no such model, or it is an adapter, is quantised or has no safetensors.
    """
    source, adapter, found = resolve(ModelConfig(name, model_revision=revision))
    if adapter is not None:
        raise ModelError(
            f"{name!r} is an adapter, and weights are merged with weights. Make a full model of it first: "
            f"`prefalign run merge_adapter --adapter {name} --output FOLDER`."
        )
    folder, commit = _download(source, found, (*_WEIGHTS, *CONFIGS, *_any_case((*PROCESSOR, *LICENCES, *CODE))))
    refuse_quantised(name, folder)
    check_weights(str(folder))
    if not weight_files(folder):
        raise ModelError(
            f"{name!r} has its weights in consolidated*.safetensors only, whose names are its maker's own and not transformers'. "
            "Name the repository or folder that has model.safetensors too."
        )
    return Source(name, folder, commit)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors that transformers reads: not the same weights once more under their maker's names (Mistral's)."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("consolidated"))


def find_adapter(name: str, revision: str | None = None) -> Source:
    """An adapter's folder; an adapter on the Hub is downloaded to the Hub's cache.

    Raises:
        ModelError: there is none, or it is a full model, or has no safetensors.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        if (path / "config.json").is_file():
            raise ModelError(f"{name!r} is a full model, not an adapter: there is nothing to merge into it.")
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        raise ModelError(
            f"folder {name!r} has no adapter_config.json (it holds: {inside}), so it is not an adapter. Name the folder that "
            "`save_pretrained` wrote, such as a run's output folder or one of its checkpoint-N folders."
        )
    wanted = ("adapter_config.json", "adapter_model.safetensors", *_any_case(PROCESSOR))
    folder, commit = _download(str(path) if path.is_dir() else name, revision, wanted)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{name!r} on the Hub has no adapter_config.json, so it is not an adapter.")
    check_weights(str(folder))
    return Source(name, folder, commit)


def refuse_quantised(name: str, folder: Path) -> None:
    """Raise `ModelError` if a model's config says that its weights are quantised."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if settings:
        how = settings.get("quant_method", "unknown method")
        raise ModelError(
            f"{name!r} holds quantised weights ({how}). What is merged into rounded weights and rounded again is partly lost. "
            "Merge into the 16-bit model that it was made from, then quantise the result."
        )


def copy_files(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files of a folder that match any pattern, whatever their case."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        name = file.relative_to(source).as_posix()
        if any(
            fnmatch.fnmatch(name.lower(), pattern) and name.count("/") == pattern.count("/") for pattern in patterns
        ):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / name)


def is_made(output: Path, made: Mapping[str, Any]) -> bool:
    """Whether a folder already holds this very merge.

    Args:
        output: the folder.
        made: settings and sources of the merge.

    Raises:
        ModelError: the folder holds something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    file = output / MERGE_FILE
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if {name: before.get(name) for name in made} == json.loads(json.dumps(made)):
            return True
        raise ModelError(f"{output} holds another merge (see its {MERGE_FILE}). Delete it, or give another `output`.")
    raise ModelError(f"{output} exists and is not empty. Delete it, or give another `output`.")


@contextmanager
def whole_folder(output: Path, made: Mapping[str, Any], size: int) -> Iterator[Path]:
    """A folder to write into that becomes `output` when all went well, and disappears when not.

    Args:
        output: the folder that is to be. It does not appear if anything goes wrong, an interrupt included.
        made: settings and sources, written to `merge.json` with the versions of libraries.
        size: bytes of the weights, asked of the disk before anything is written.

    Raises:
        ModelError: the disk is full, or the folder cannot be written.
    """
    output = output.absolute()
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(output.parent).free
        if free < size:
            raise ModelError(
                f"the merged model takes {size / 1e9:.1f} GB and the disk that holds {output} has {free / 1e9:.1f} GB free. "
                "Free some space, or give an `output` on another disk."
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        note = {**made, "libraries": library_versions()}
        write_atomically(partial / MERGE_FILE, (json.dumps(note, indent=2) + "\n").encode())
        _sync(partial)
        os.replace(partial, output)
    except BaseException as error:  # an interrupt too
        shutil.rmtree(partial, ignore_errors=True)
        if is_full_disk(error):
            raise ModelError(
                f"the disk that holds {output} became full before the merged model was written whole; nothing was left there. "
                "Free some space and start the same command again, or give an `output` on another disk."
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ModelError(f"{output} cannot be written: {error}. Give another `output`.") from error
        raise


def _sync(folder: Path) -> None:
    """Have the disk hold what was written before the folder gets its name."""
    for file in folder.rglob("*"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _any_case(patterns: Sequence[str]) -> list[str]:
    return [form for pattern in patterns for form in (pattern, pattern.upper())]


def _download(source: str, revision: str | None, patterns: Sequence[str]) -> tuple[Path, str | None]:
    """The folder itself, or that of the Hub's cache with the files wanted and its commit."""
    if Path(source).is_dir():
        return Path(source), None
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns="consolidated*.safetensors*",
                local_files_only=constants.is_offline_mode(),
            )
        )
    except Exception as error:
        raise ModelError(
            f"{source!r} is not a folder here and could not be downloaded ({type(error).__name__}: {error}). Check the name, "
            "or connect and try again."
        ) from error
    return folder, folder.name


def _licence(folder: Path) -> str | None:
    """The licence that a model's README names in its head."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = head and re.search(r"^license:[ \t]*(\S.*?)[ \t]*$", head.group(1), re.MULTILINE)
    return found.group(1) if found else None

"""The fingerprint of a checkpoint's weights, for engines that hold them where nobody can look: vLLM, servers, other machines.

Ids of rows depend on weights and processor and never on the engine, so this is `models.fingerprint` of the model as transformers
loads it; `processors.engine_fingerprint` joins it with the processor's.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from prefalign.checkpoints import resolve
from prefalign.models import ModelConfig, fingerprint, load_model


def checkpoint_fingerprint(config: ModelConfig) -> str:
    """What `models.fingerprint` says of a checkpoint, loading it on the CPU once.

    It is remembered in a file of the user's cache folder (`$XDG_CACHE_HOME/prefalign`, else `~/.cache/prefalign`) under the
    names, sizes and times of change of the checkpoint's files, or its commit on the Hub: asking again costs no loading. Where
    that folder cannot be written nothing is remembered.

    Args:
        config: model, adapter, revision and dtype; `device` and `attn_implementation` do not matter.

    Returns:
        16 hex digits.

    Raises:
        ModelError: what `models.load_model` raises.
    """
    config = replace(config, device="cpu", attn_implementation=None)
    note = cache_folder() / "fingerprints" / _key(config)
    if note.is_file():
        return note.read_text(encoding="ascii")
    found = fingerprint(load_model(config))
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        unfinished = note.with_name(f"{note.name}.{os.getpid()}")
        unfinished.write_text(found, encoding="ascii")
        unfinished.replace(note)
    except OSError:
        pass  # it is computed again next time
    return found


def cache_folder() -> Path:
    """Where this library keeps what it can compute again."""
    named = os.environ.get("XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "prefalign"


def _key(config: ModelConfig) -> str:
    """Digest of what decides the fingerprint. The names of tensors are transformers', so its version counts."""
    source, adapter, revision = resolve(config)
    parts = [_contents(source, revision, "config.json")]
    if adapter is not None:
        parts.append(_contents(adapter, None, "adapter_config.json"))
    decides = [config.dtype, config.load_in_4bit, config.trust_remote_code, version("transformers"), parts]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def _contents(source: str, revision: str | None, needed: str) -> list[str | tuple[str, int, int]]:
    """A folder and what is in it; of a Hub id the folder of its commit, which never changes."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        return [str(Path(hf_hub_download(source, needed, revision=revision)).parent)]
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return [
        str(folder.resolve()),
        *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files),
    ]

"""The folder of a training run: whose it is, whether it is finished, and where it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from prefalign.store import write_atomically
from prefalign.training.checkpoints import last_checkpoint

CONFIG_FILE = "prefalign_config.yaml"
PAIRS_FILE = "pairs_manifest.json"
RESULTS_FILE = "all_results.json"
FREE = ("output", "resume", "model.device")
"""Settings that may differ between the runs that share a folder."""


class RunError(RuntimeError):
    """A run cannot start in this folder; the message says what is there and how to go on."""


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has ended and saved everything."""
    return (folder / RESULTS_FILE).is_file()


def run_files(config: Mapping[str, Any], pairs_manifest: str) -> dict[str, str]:
    """What says where a model came from, by file name; it lies beside every saved model of the run."""
    return {CONFIG_FILE: yaml.safe_dump(dict(config), sort_keys=False), PAIRS_FILE: pairs_manifest}


def open_run(
    folder: Path,
    files: Mapping[str, str],
    *,
    resume: Literal["auto"] | bool = "auto",
    processes: int = 1,
    write: bool = True,
) -> Path | None:
    """Claim a folder for a run, or find where the same run stopped.

    Args:
        folder: folder of the run.
        files: `run_files` of this run: its resolved config and the manifest of its pairs; others are another run.
        resume: "auto" goes on from the last whole checkpoint if there is one, True demands one, False refuses one.
        processes: world size; a checkpoint holds a random state for each.
        write: whether this process writes (one per run).

    Returns:
        The checkpoint to go on from, or None to start at the beginning.

    Raises:
        RunError: the folder belongs to another config or other pairs, holds something else, or `resume` cannot be met.
    """
    file = folder / CONFIG_FILE
    if file.is_file():
        before, now = yaml.safe_load(file.read_text(encoding="utf-8")), yaml.safe_load(files[CONFIG_FILE])
        changed = [line for line in _differences(before, now) if line.split(":")[0] not in FREE]
        known = folder / PAIRS_FILE
        if known.is_file() and known.read_text(encoding="utf-8") != files[PAIRS_FILE]:
            changed.append("pairs: their manifest is another one now")
        if changed:
            raise RunError(
                f"{folder} holds a run with another config ({'; '.join(changed)}). Going on would mix two runs: give another "
                "`output`, or delete the folder."
            )
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run of prefalign. Give another `output`.")
    checkpoint = last_checkpoint(folder, processes=processes) if folder.is_dir() else None
    if resume is True and checkpoint is None:
        raise RunError(f"resume is true and {folder} holds no whole checkpoint. Set resume to auto to start anew.")
    if resume is False and checkpoint is not None:
        raise RunError(
            f"resume is false and {folder} holds {checkpoint.name}, which starting anew would overwrite. Delete the folder, give "
            "another `output`, or set resume to auto to go on."
        )
    if write and not file.is_file():
        for name, text in files.items():
            write_atomically(folder / name, text.encode())
    return checkpoint


def finish_run(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `all_results.json`, the last file of a run."""
    write_atomically(folder / RESULTS_FILE, json.dumps(dict(results), indent=4, sort_keys=True).encode())


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name}: {str(before)[:60]} -> {str(now)[:60]}"

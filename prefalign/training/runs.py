"""The folder of a training run: whose it is, whether it is finished, and where it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from prefalign.config import to_mapping
from prefalign.manifest import differences, is_full_disk, write_atomically
from prefalign.training.checkpoints import last_checkpoint, random_states

CONFIG_FILE = "prefalign_config.yaml"
MANIFEST = "_manifest.json"
BASE_FILE = "base.json"
RESULTS_FILE = "all_results.json"
FREE = ("output", "resume", "model.device", "reference_folder")
"""Settings that may differ between the runs that share a folder."""


class RunError(RuntimeError):
    """A run cannot start in this folder; the message says what is there and how to go on."""


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has ended and saved everything."""
    return (folder / RESULTS_FILE).is_file()


def run_files(
    config: Mapping[str, Any], manifest: str, eval_manifest: str | None = None, *, data: str = "pairs"
) -> dict[str, str]:
    """What says where a model came from, by file name; it lies beside every saved model of the run.

    Args:
        config: the run's config.
        manifest: text of the manifest of what is trained on.
        eval_manifest: the same of held-out rows; None: there are none.
        data: the setting that names the folder, `pairs` or `data`: the files are `pairs_manifest.json` and so on.
    """
    files = {CONFIG_FILE: yaml.safe_dump(dict(config), sort_keys=False), f"{data}{MANIFEST}": manifest}
    return files if eval_manifest is None else {**files, f"eval_{data}{MANIFEST}": eval_manifest}


def files_of(config: Any, *folders: Path, data: str = "pairs") -> dict[str, str]:
    """`run_files` of a run on finished folders.

    Args:
        config: the run's config.
        *folders: what is trained on, and what is held out, if anything is.
        data: the setting that names the first folder.
    """
    manifests = [(folder / "manifest.json").read_text(encoding="utf-8") for folder in folders]
    return run_files(to_mapping(config), *manifests, data=data)


def base_file(model_name_or_path: str, fingerprint: str, processor: str, *, changed: bool = False) -> dict[str, str]:
    """One more of these files: the weights that the run starts from, and the folder they were in (None: the Hub's).

    Args:
        model_name_or_path: of the run's config.
        fingerprint: of the policy before training.
        processor: `processors.processor_fingerprint` of what prepares its prompts.
        changed: the policy is not the base as it is stored: it brings an adapter, or is quantised.
    """
    folder = Path(model_name_or_path).expanduser()
    local = str(folder.resolve()) if folder.is_dir() else None
    note = {"name": model_name_or_path, "local": local, "fingerprint": fingerprint, "processor": processor,
            "changed": changed}  # fmt: skip
    return {BASE_FILE: json.dumps(note, indent=2)}


def open_run(
    folder: Path,
    files: Mapping[str, str],
    *,
    resume: Literal["auto"] | bool = "auto",
    processes: int = 1,
    free: Sequence[str] = (),
) -> Path | None:
    """Check that a folder is free for a run, or find where the same run stopped; nothing is written.

    Args:
        folder: folder of the run.
        files: `run_files` of this run: its config, the manifests of its pairs, its base; others are another run.
        resume: "auto" goes on from the last whole checkpoint if there is one, True demands one, False refuses one.
        processes: world size; a checkpoint holds a random state for each.
        free: settings that may differ beside `FREE`, with all below them: such as decide no weight.

    Returns:
        The checkpoint to go on from, or None to start at the beginning.

    Raises:
        RunError: the folder belongs to another config, base, other pairs or another number of processes, holds something
            else, or `resume` cannot be met.
    """
    file = folder / CONFIG_FILE
    if file.is_file():
        before, now = yaml.safe_load(file.read_text(encoding="utf-8")), yaml.safe_load(files[CONFIG_FILE])
        lines = [(line.split(":")[0], line) for line in differences(before, now)]
        below = tuple(f"{name}." for name in free)
        changed = [line for name, line in lines if name not in (*FREE, *free) and not name.startswith(below)]
        for name in (name for name in files if name.endswith(MANIFEST)):
            known = folder / name
            if known.is_file() and known.read_text(encoding="utf-8") != files[name]:
                changed.append(f"{name.removesuffix(MANIFEST)}: their manifest is another one now")
        known = folder / BASE_FILE
        if BASE_FILE in files and known.is_file():
            was, is_now = (json.loads(text) for text in (known.read_text(encoding="utf-8"), files[BASE_FILE]))
            if was["fingerprint"] != is_now["fingerprint"]:
                changed.append(
                    f"model: its weights are others now, fingerprint {was['fingerprint']} -> {is_now['fingerprint']}"
                )
            if was.get("processor", is_now["processor"]) != is_now["processor"]:
                changed.append(
                    "model: its chat template, tokenizer or image processor is another now, fingerprint of the processor "
                    f"{was['processor']} -> {is_now['processor']}"
                )
        if changed:
            raise RunError(
                f"{folder} holds a run with another config ({'; '.join(changed)}). Going on would mix two runs: give another "
                "`output`, or delete the folder."
            )
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise RunError(f"{folder} is not empty and holds no run of prefalign. Give another `output`.")
    checkpoint = last_checkpoint(folder, processes=processes) if folder.is_dir() else None
    of_others = last_checkpoint(folder) if folder.is_dir() and checkpoint is None else None
    if of_others is not None:
        raise RunError(
            f"{folder} holds {of_others.name} of a run on {_count(random_states(of_others))}, and this is {_count(processes)}: "
            "its optimizer and random states could not be restored, and starting anew would overwrite it. Start it as before, "
            "give another `output`, or delete the folder."
        )
    if resume is True and checkpoint is None:
        raise RunError(f"resume is true and {folder} holds no whole checkpoint. Set resume to auto to start anew.")
    if resume is False and checkpoint is not None:
        raise RunError(
            f"resume is false and {folder} holds {checkpoint.name}, which starting anew would overwrite. Delete the folder, give "
            "another `output`, or set resume to auto to go on."
        )
    return checkpoint


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


def claim_run(folder: Path, files: Mapping[str, str]) -> None:
    """Make a folder that `open_run` found free the run's own. One process does this, just before training.

    What is there stays; what is missing is written, so that a kill in between leaves no check of `open_run` out.
    """
    for name, text in files.items():
        if not (folder / name).is_file():
            write_atomically(folder / name, text.encode())


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Turn a full disk, as Python, safetensors and torch each report it, into a message that says how to go on.

    Raises:
        RunError: the disk that holds the run is full.
    """
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        kept = last_checkpoint(folder)
        raise RunError(
            f"the disk that holds {folder} is full, so a checkpoint or the model could not be saved whole. Free some space and "
            f"start the same command again: it goes on from {kept.name if kept else 'the beginning'}. `trainer.save_total_limit: "
            "1` keeps one checkpoint only, and a LoRA adapter takes far less than all weights."
        ) from error


def finish_run(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `all_results.json`, the last file of a run."""
    write_atomically(folder / RESULTS_FILE, json.dumps(dict(results), indent=4, sort_keys=True).encode())

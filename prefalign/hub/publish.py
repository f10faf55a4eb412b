"""Publish a model, an adapter or a folder of pairs on the Hugging Face Hub, with a card, after checks.

A clean folder is staged (only what belongs, safetensors only, no machine paths), loaded in a fresh process, described by
a card, scanned for secrets, and only then pushed through `huggingface_hub`. The token comes from `HF_TOKEN` or from
`hf auth login`, never from an argument.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prefalign.hub.dataset_card import dataset_card, read_rows
from prefalign.hub.merges import read_merge
from prefalign.hub.model_card import model_card
from prefalign.hub.release_checks import CheckError, in_fresh_process, refuse, scan_folder
from prefalign.hub.staging import (
    DATASET_FILES,
    MODEL_FILES,
    Base,
    Kind,
    PublishError,
    kind_of,
    resolve_base,
    stage,
    without_paths,
)
from prefalign.hub.upload import check_login, upload
from prefalign.images import encode_png, open_image
from prefalign.manifest import Manifest, read_manifest
from prefalign.processors import OTHER_PROCESSOR, weights_of
from prefalign.shards import whole_shards

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
SHARDS = ("data/*.parquet",)
PAIR_COLUMNS = ("id", "images", "prompt", "chosen", "rejected")
TALK_COLUMNS = ("id", "images", "messages")
MARK = "<!-- written by prefalign publish -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `prefalign publish`."""
    parser.add_argument("folder", type=Path, help="a training run's folder, or a folder of pairs")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="repository on the Hub")
    parser.add_argument("--dry-run", action="store_true", help="check and write the folder, upload nothing")
    parser.add_argument("--output", type=Path, help="where a dry run writes (default: FOLDER-publish)")
    parser.add_argument("--evaluation", type=Path, metavar="FOLDER", help="evaluation of this model, for the card")
    parser.add_argument("--baseline-evaluation", type=Path, metavar="FOLDER", help="the same evaluation of its base")
    parser.add_argument("--pairs", type=Path, metavar="FOLDER", help="the pairs or rows it was trained on")
    parser.add_argument(
        "--base-model", metavar="OWNER/NAME", help="the base on the Hub, if the config names a local one"
    )
    parser.add_argument("--method", help="how it was trained, in words (default: from the config)")
    parser.add_argument("--dataset", action="append", default=[], metavar="OWNER/NAME", help="training data on the Hub")
    parser.add_argument("--license", metavar="ID", help="licence id of the Hub, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="make the repository private")


def main(arguments: argparse.Namespace) -> None:
    """Run `prefalign publish`: tell models from pairs by what the folder holds."""
    common = {"dry_run": arguments.dry_run, "output": arguments.output, "private": arguments.private,
              "license": arguments.license}  # fmt: skip
    if kind_of(arguments.folder) == "dataset":
        given = [name for name in ("evaluation", "baseline_evaluation", "pairs", "base_model", "method", "dataset")
                 if getattr(arguments, name)]  # fmt: skip
        if given:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise PublishError(f"{arguments.folder} holds pairs; {flags} describe a model. Leave them out.")
        publish_dataset(arguments.folder, arguments.to, **common)
    else:
        publish_model(arguments.folder, arguments.to, evaluation=arguments.evaluation, pairs=arguments.pairs,
                      baseline_evaluation=arguments.baseline_evaluation, base_model=arguments.base_model,
                      method=arguments.method, datasets=arguments.dataset, **common)  # fmt: skip


def publish_model(
    folder: Path,
    repo_id: str,
    *,
    output: Path | None = None,
    dry_run: bool = False,
    private: bool = False,
    evaluation: Path | None = None,
    baseline_evaluation: Path | None = None,
    pairs: Path | None = None,
    base_model: str | None = None,
    license: str | None = None,
    method: str | None = None,
    datasets: Sequence[str] = (),
) -> Path | str:
    """Check, describe and push a model or an adapter with its processor.

    Args:
        folder: a training run's folder.
        repo_id: OWNER/NAME on the Hub.
        output: folder that a dry run writes; `FOLDER-publish` if None. A folder written by an earlier run is replaced.
        dry_run: do everything but the upload.
        private: make the repository private; an existing public one is refused.
        evaluation: folder with the `results.json` of this model.
        baseline_evaluation: folder with the `results.json` of its base.
        pairs: folder of the pairs or rows it was trained on; its first picture is the sample picture.
        base_model: the base's Hub id, if the config names a local folder.
        license: Hub licence id.
        method: how it was trained, in words; from the config if None.
        datasets: Hub ids of the training data.

    Returns:
        The folder that a dry run wrote, or the address of the commit.

    Raises:
        PublishError: wrong input, or the Hub refused.
        CheckError: the folder does not work, or holds secrets, paths or pickles.
    """
    kind = kind_of(folder)
    if kind == "dataset":
        raise PublishError(f"{folder} holds pairs, not a model. Use `publish_dataset`.")
    config = _read_yaml(folder / "prefalign_config.yaml")
    base = resolve_base(folder, kind, config, base_model)
    measured, before = _read_results(evaluation), _read_results(baseline_evaluation)
    if before and not measured:
        raise PublishError("--baseline-evaluation without --evaluation shows a model that is not published. Give both.")
    manifest = _data_manifest(folder, pairs)
    merge = read_merge(folder) if kind == "full" else None

    def describe(staged: Path) -> str:
        with tempfile.TemporaryDirectory() as scratch:
            checked = in_fresh_process(
                staged,
                base=_base_for_checks(base, kind),
                picture=_first_picture(pairs, Path(scratch)) if pairs else None,
            )
        print(f"checked in a fresh process: {_summary(checked)}")
        _check_same_weights(measured, checked)
        return model_card(
            repo_id,
            base=base,
            adapter=kind == "adapter",
            method=method,
            license=license,
            datasets=datasets,
            config=(staged / "prefalign_config.yaml").read_text(encoding="utf-8") if config else None,
            data=without_paths(manifest, base) if manifest else None,
            merge=without_paths(merge, base) if merge else None,
            trainer_state=_read_json(folder / "trainer_state.json"),
            rows=_read_json(folder / "rows.json"),
            evaluation=measured,
            baseline=before,
            checked=checked,
        )

    skip = ("model*.safetensors*", "config.json") if kind == "adapter" else ("adapter_*",)
    patterns = [name for name in MODEL_FILES if not any(fnmatch.fnmatch(name, pattern) for pattern in skip)]
    return _publish(folder, repo_id, patterns, base, describe, output=output, dry_run=dry_run, private=private,
                    repo_type="model", replace=WEIGHTS)  # fmt: skip


def publish_dataset(
    folder: Path,
    repo_id: str,
    *,
    output: Path | None = None,
    dry_run: bool = False,
    private: bool = False,
    license: str | None = None,
) -> Path | str:
    """Check, describe and push a stage's folder of rows; quarantined rows and progress files stay here.

    Args:
        folder: a finished stage's output folder.
        repo_id: OWNER/NAME on the Hub.
        output: folder that a dry run writes; `FOLDER-publish` if None.
        dry_run: do everything but the upload.
        private: make the repository private; an existing public one is refused.
        license: Hub licence id of the rows.

    Returns:
        The folder that a dry run wrote, or the address of the commit.

    Raises:
        PublishError: the folder is unfinished or its manifest does not add up, or the Hub refused.
        CheckError: the folder does not load, or its rows hold secrets or paths.
    """
    manifest = read_manifest(folder)
    if manifest is None or not manifest.complete:
        raise PublishError(
            f"{folder} has no manifest of a finished stage, so nothing says how its rows were made. Start the stage again "
            "with the same config: it resumes and writes manifest.json."
        )
    _check_columns(folder, manifest)

    def describe(staged: Path) -> str:
        shards = sorted(staged.glob("data/*.parquet"))
        statistics, schema = read_rows(shards)
        checked = in_fresh_process(staged)
        print(f"checked in a fresh process: {statistics.rows} rows, columns {', '.join(checked['columns'])}")
        portable = Manifest(**without_paths(vars(manifest), Base("unknown")))
        return dataset_card(repo_id, manifest=portable, statistics=statistics, schema=schema, license=license,
                            size=sum(shard.stat().st_size for shard in shards))  # fmt: skip

    return _publish(folder, repo_id, DATASET_FILES, Base("unknown"), describe, output=output, dry_run=dry_run,
                    private=private, repo_type="dataset", replace=SHARDS)  # fmt: skip


def _check_columns(folder: Path, manifest: Manifest) -> None:
    """Refuse shards that are damaged or lost, and rows that lack what makes them pairs or conversations."""
    try:
        present = whole_shards(folder, manifest).columns
    except ValueError as error:
        raise PublishError(str(error)) from error
    needed = PAIR_COLUMNS if {"prompt", "chosen", "rejected"} & set(present) else TALK_COLUMNS
    if lacking := [name for name in needed if name not in present]:
        raise PublishError(
            f"the rows of {folder} have no {', '.join(lacking)} (they have {', '.join(present)}), so no one could train on them. "
            f"Publish a folder as a stage wrote it: {' and '.join(needed)} belong together."
        )


def _publish(
    folder: Path,
    repo_id: str,
    patterns: Sequence[str],
    base: Base,
    describe: Callable[[Path], str],
    *,
    output: Path | None,
    dry_run: bool,
    private: bool,
    repo_type: str,
    replace: Sequence[str],
) -> Path | str:
    """Stage, check, write the card, scan; then move the folder into place or push it."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise PublishError(f"--to {repo_id!r} is not a repository. Write it as OWNER/NAME, as in `my-name/my-model`.")
    if output is not None and not dry_run:
        raise PublishError("--output is where a dry run writes; an upload leaves no folder. Add --dry-run, or drop it.")
    target = output or folder.resolve().with_name(f"{folder.resolve().name}-publish")
    if dry_run:
        _check_replaceable(target)
    else:
        check_login()
    with _scratch(_parent(target), elsewhere=not dry_run) as scratch:
        staged = Path(scratch) / "staged"
        left_out = stage(folder, staged, patterns, base, link=not dry_run)
        refuse(scan_folder(staged))
        (staged / "README.md").write_text(describe(staged), encoding="utf-8")
        refuse(scan_folder(staged))
        files = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
        print(f"{len(files)} files: {', '.join(files)}")
        if left_out:
            names = [f"{name} (the card stands in its place)" if name == "README.md" else name for name in left_out]
            print(f"left out: {', '.join(names)}")
        if dry_run:
            if target.exists():
                shutil.rmtree(target)
            staged.replace(target)
            print(f"dry run, nothing uploaded: {target}")
            return target
        address = upload(staged, repo_id, repo_type=repo_type, private=private, replace=replace)
    print(f"published: {address}")
    return address


def _check_replaceable(target: Path) -> None:
    card = target / "README.md"
    ours = card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
    if target.exists() and not ours and (not target.is_dir() or any(target.iterdir())):
        raise PublishError(f"{target} is there already and was not written by a dry run. Give another --output.")


def _scratch(parent: Path, *, elsewhere: bool) -> tempfile.TemporaryDirectory[str]:
    """A folder for a while beside the one to publish, where files can be linked; or where the system has such, if nothing can be
    written there."""
    prefix = ".prefalign-publish-"
    try:
        return tempfile.TemporaryDirectory(dir=parent, prefix=prefix)
    except OSError:
        if not elsewhere:
            raise
        return tempfile.TemporaryDirectory(prefix=prefix)


def _parent(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent


def _data_manifest(folder: Path, pairs: Path | None) -> dict[str, Any] | None:
    recorded = folder / ("data_manifest.json" if (folder / "data_manifest.json").is_file() else "pairs_manifest.json")
    given = pairs / "manifest.json" if pairs else None
    if given and not given.is_file():
        raise PublishError(f"--pairs {pairs} has no manifest.json; give the output folder of a finished stage.")
    manifests = [json.loads(file.read_text(encoding="utf-8")) for file in (recorded, given) if file and file.is_file()]
    if len(manifests) == 2 and manifests[0] != manifests[1]:
        raise PublishError(
            f"--pairs {pairs} is not what this model was trained on: its manifest differs from {recorded.name} in "
            f"{folder}. A card must not describe other data; give the right folder, or none."
        )
    return manifests[0] if manifests else None


def _read_results(evaluation: Path | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    file = evaluation / "results.json"
    if not file.is_file():
        raise PublishError(f"no results.json in {evaluation}; give the output folder of a finished evaluation.")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if not results.get("metrics"):
        raise PublishError(f"{file} holds no metrics; the evaluation did not finish. Run it again.")
    results["test_set"] = _test_set(evaluation / "items.jsonl", results)
    return results


def _test_set(items: Path, results: Mapping[str, Any]) -> str:
    """What was measured on, from the scored items: splits of the embedded world, or the kinds of items read from files."""
    if not items.is_file():
        return "pictures that the evaluation did not name"
    lines = items.read_text(encoding="utf-8").splitlines()
    groups = [str(json.loads(line).get("group")) for line in lines if line.strip()]
    matches = [re.fullmatch(r"scene-\d+-(\w+)-\d+", group) for group in groups]
    splits = ", ".join(sorted({match[1] for match in matches if match}))
    if splits and all(matches):
        return f"scenes {splits}"
    kinds = f"{', '.join(results.get('counts') or ['items'])} from files"
    return f"{kinds} and scenes {splits}" if splits else kinds


def _check_same_weights(evaluation: Mapping[str, Any] | None, checked: Mapping[str, Any]) -> None:
    """Refuse an evaluation of other weights or with another processor (one of saved answers has no fingerprint)."""
    found = (evaluation or {}).get("fingerprint")
    if not found or found == checked["fingerprint"]:
        return
    if weights_of(found) != weights_of(checked["fingerprint"]):
        raise PublishError(
            f"--evaluation is of other weights: its fingerprint is {found}, that of the folder {checked['fingerprint']}. A "
            "card must not show another model's numbers: evaluate this folder with `dtype: auto`, as it is checked here; weights "
            "rounded to another dtype are other weights and have another fingerprint."
        )
    raise PublishError(
        f"--evaluation is of {OTHER_PROCESSOR}: its fingerprint is {found}, that of the folder {checked['fingerprint']}. Users "
        "of the folder would not get these numbers: evaluate it as it is, without other options in `model.processor`."
    )


def _read_json(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _read_yaml(file: Path) -> dict[str, Any]:
    return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


def _first_picture(pairs: Path, scratch: Path) -> Path | None:
    import pyarrow.parquet as pq

    for shard in sorted(pairs.glob("data/*.parquet"))[:1]:
        row = next(pq.ParquetFile(shard).iter_batches(batch_size=1, columns=["images"])).to_pylist()[0]
        if row["images"]:
            file = scratch / "picture.png"
            file.write_bytes(encode_png(open_image(row["images"][0]))["bytes"])
            return file
    return None


def _base_for_checks(base: Base, kind: Kind) -> str | None:
    """A local base if it is still there; else, for an adapter, the one on the Hub."""
    if base.local is not None and base.local.is_dir():
        return str(base.local)
    return base.hub_id if kind == "adapter" else None


def _summary(checked: Mapping[str, Any]) -> str:
    effects = {"picture_effect": "picture", "adapter_effect": "adapter"}
    parts = [f"{word} moves the logits by {checked[name]:.2g}" for name, word in effects.items() if name in checked]
    return ", ".join([*parts, f"answer {checked['text'][:60]!r}"])


__all__ = ["CheckError", "PublishError", "add_arguments", "kind_of", "main", "publish_dataset", "publish_model"]

"""Data sets of the Hugging Face Hub, streamed at one commit: nothing is downloaded whole, pictures stay encoded."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from prefalign.images import SYSTEM_ERRORS, EncodedImage, ImageError, read_image
from prefalign.sources import parquet
from prefalign.sources.config import DataConfig

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PIECE = 2**16
FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".zip", ".gz")
_RECALLED: dict[tuple[str, str, str], tuple[str, str]] = {}


class HubError(ValueError):
    """A data set of the Hub that cannot be read; the message says why and what to do."""


def is_named(config: DataConfig) -> bool:
    """Whether `config.path` is the name of a data set on the Hub: OWNER/NAME, nothing of that name on this disk."""
    path = config.path
    return bool(NAME.fullmatch(path.as_posix())) and path.suffix not in FILES and not path.exists()


def check(config: DataConfig) -> None:
    """Look the data set and its split up, before any work starts.

    Raises:
        HubError: there is none, it may not be read, or the Hub cannot be asked; not where `recall` knows that nothing is left to
            read.
    """
    try:
        _present_commit(config)
    except HubError:
        if _recalled(config) is None:
            raise
        return
    _opened(config)


def recall(config: DataConfig, source: Mapping[str, str] | None, revision: str) -> None:
    """Note the commit that a finished folder was made from, should the Hub not tell the present one; None: forget it.

    Args:
        config: names the data set.
        source: `provenance` of the folder's rows.
        revision: branch or tag that was at that commit then.
    """
    rows = _rows(config)
    _RECALLED.pop(rows, None)
    if source is not None and (source["repository"], source["config"], source["split"]) == rows:
        _RECALLED[rows] = source["commit"], revision


def _recalled(config: DataConfig) -> str | None:
    """The commit of `recall`; None if other rows are asked for, or a branch or tag that may have been at any."""
    commit, revision = _RECALLED.get(_rows(config), (None, None))
    return commit if (config.revision or "main") in (revision, commit) else None


def _rows(config: DataConfig) -> tuple[str, str, str]:
    return config.path.as_posix(), config.config or "default", config.split or "train"


def provenance(config: DataConfig) -> dict[str, str]:
    """Which rows these are: `repository`, `commit`, `config` and `split` of a data set of the Hub; empty for files."""
    if not is_named(config):
        return {}
    repository, name, split = _rows(config)
    return {"repository": repository, "commit": commit_of(config), "config": name, "split": split}


def commit_of(config: DataConfig) -> str:
    """The commit that the data set's revision is at; asked once in a process, so that all passes read the same rows."""
    try:
        return _present_commit(config)
    except HubError:
        if (commit := _recalled(config)) is None:
            raise
        return commit


def deferred_rows(
    config: DataConfig, columns: Sequence[str] | None, first: int
) -> Iterator[Callable[[], Mapping[str, Any]]]:
    """Functions that read the rows of a split from one place on, pictures as encoded bytes (or as the address of a file in the
    repository). They may be called in order, and any left out.

    Of Parquet files, what is left out is not fetched but for the files' footers.

    Args:
        config: names the data set.
        columns: read only these. Of Parquet files nothing else is fetched; where they have none of them, their rows are counted.
        first: how many rows to leave out at the start.

    Raises:
        HubError: as `check`; or the connection broke for good, or a file is not what it says.
    """
    guard = functools.partial(_explaining, config)
    opened = _opened(config)
    if isinstance(opened, list):
        yield from itertools.islice(_of_parquet(config, opened, guard, columns), first, None)
        return
    tables = opened.skip(first).with_format("arrow").iter(parquet.BATCH)
    while True:
        with guard():
            table = next(tables, None)
        if table is None:
            return
        coded = parquet.json_columns(table.schema)
        for row in table.to_pylist():
            yield functools.partial(_named, parquet.with_json(row, coded), columns)


def _named(row: Mapping[str, Any], columns: Sequence[str] | None) -> Mapping[str, Any]:
    return row if columns is None else {name: row[name] for name in columns if name in row}


def _of_parquet(
    config: DataConfig,
    files: Sequence[str],
    guard: Callable[[], AbstractContextManager[None]],
    columns: Sequence[str] | None,
) -> Iterator[Callable[[], dict[str, Any]]]:
    from huggingface_hub import constants

    for file in files:
        with guard():
            footer = _footer(constants.ENDPOINT, file)
        # a few bytes of each row group: read them in small pieces, not with the five megabytes around them
        opened = functools.partial(_open, constants.ENDPOINT, file, None if columns is None else PIECE)
        yield from parquet.deferred_rows(footer, opened, guard, columns)


def _open(endpoint: str, file: str, piece: int | None) -> Any:
    from huggingface_hub import HfFileSystem

    return HfFileSystem(endpoint=endpoint).open(file, "rb", block_size=piece)


@functools.lru_cache(maxsize=4096)
def _footer(endpoint: str, file: str) -> Any:
    """The footer of a file at a commit: fetched once in a process."""
    import pyarrow.parquet as pq

    with _open(endpoint, file, PIECE) as stream:
        return pq.read_metadata(stream)


def read_picture(path: str, config: DataConfig) -> EncodedImage:
    """Fetch one picture that lies in the repository as a file of its own; what was fetched is kept in the Hub's cache.

    Args:
        path: in the repository, or the `hf://` address that streaming gives.
        config: names the data set.

    Raises:
        ImageError: `missing_image` if the repository has no such file.
        HubError: the Hub cannot be asked.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    repository, commit = config.path.as_posix(), commit_of(config)
    inside = re.sub(rf"^hf://datasets/{re.escape(repository)}(@[^/]+)?/", "", path)
    try:
        return read_image(hf_hub_download(repository, inside, repo_type="dataset", revision=commit))
    except (EntryNotFoundError, HFValidationError) as error:
        raise ImageError(
            "missing_image",
            f"picture {inside[:100]!r} is not in the data set {repository} on the Hub. Sets that name pictures of others (COCO) "
            "do not hold them: fetch those pictures, and say where they are with `data.images`.",
        ) from error
    except Exception as error:
        raise _explained(error, config) from error


def _present_commit(config: DataConfig) -> str:
    from huggingface_hub import constants

    return _commit(constants.ENDPOINT, config.path.as_posix(), config.revision)


@functools.cache
def _commit(endpoint: str, repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        found = HfApi(endpoint=endpoint).dataset_info(repository, revision=revision)
    except Exception as error:
        raise _explained(error, DataConfig(Path(repository), revision=revision)) from error
    return str(found.sha)


@contextmanager
def _explaining(config: DataConfig) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _explained(error, config) from error


def _opened(config: DataConfig) -> Any:
    """The addresses of the split's Parquet files, or a `datasets.IterableDataset` of what is stored otherwise."""
    from huggingface_hub import constants

    with _explaining(config):
        split = config.split or "train"
        return _split(constants.ENDPOINT, config.path.as_posix(), config.config, split, commit_of(config))


@functools.cache
def _split(endpoint: str, repository: str, name: str | None, split: str, commit: str) -> Any:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(repository, name, revision=commit)
    files = builder.config.data_files or {}
    parquet_only = bool(files) and all(file.endswith(".parquet") for each in files.values() for file in each)
    splits = files if parquet_only else builder.as_streaming_dataset()
    if split not in splits:
        raise HubError(
            f"the data set {repository} has no split {split!r}, only {', '.join(map(str, splits))}. Give one of them as "
            "`data.split`."
        )
    if parquet_only:
        _footer(endpoint, files[split][0])  # is it whole?
        return list(files[split])
    stream = splits[split]
    return stream.decode(False) if stream.features else stream


def _explained(error: Exception, config: DataConfig) -> HubError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        raise error
    if isinstance(error, HubError):
        return error
    name = config.path.as_posix()
    nothing = f"no data at {name} on this disk"
    if isinstance(error, OfflineModeIsEnabled) or constants.is_offline_mode():
        return HubError(f"{nothing}, and HF_HUB_OFFLINE is set, so no data set of that name can be streamed from the Hub. Set "
                          "`data.path` to a file or folder that is there, or unset HF_HUB_OFFLINE.")  # fmt: skip
    if isinstance(error, GatedRepoError):
        return HubError(f"the data set {name} is gated: its owner lets in who accepted the conditions on its page. Accept them, "
                          "then set HF_TOKEN or run `hf auth login`.")  # fmt: skip
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"the data set {name} has no revision {config.revision!r}. Give a branch, tag or commit of it as "
                          "`data.revision`, or leave it out.")  # fmt: skip
    if isinstance(error, RepositoryNotFoundError):
        return HubError(f"{nothing}, and the Hub has no data set of that name, or not for you. Check how it is written; for a "
                          "private one set HF_TOKEN. Set `data.path` to a file, a stage's output or OWNER/NAME.")  # fmt: skip
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return HubError(f"the Hub answered {error.response.status_code} for the data set {name}. If it is 429 or 5xx, wait and "
                          "start the same command again: finished blocks are kept.")  # fmt: skip
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("http"):
        return HubError(f"{nothing}, and the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__}). Check the "
                          "network and HF_ENDPOINT and start the same command again: finished blocks are kept.")  # fmt: skip
    if listed := re.search(r"Config name is missing\..*?available configs: (\[.*?\])", str(error), re.DOTALL):
        return HubError(f"the data set {name} has several configurations, {listed[1]}, and none is the default one. Give one of "
                        "them as `data.config`.")  # fmt: skip
    if config.config is not None and "BuilderConfig" in str(error):
        return HubError(f"the data set {name} has no configuration {config.config!r}: {str(error).splitlines()[0][:300]} Give "
                        "another `data.config`, or leave it out.")  # fmt: skip
    why = (str(error).strip().splitlines() or [""])[0][:200]
    return HubError(
        f"the data set {name} cannot be streamed ({type(error).__name__}: {why}). Download it (`hf download --repo-type "
        "dataset`) and give its file as `data.path`; lines of a JSONL file need not have equal columns there."
    )

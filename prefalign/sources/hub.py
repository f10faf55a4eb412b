"""Data sets of the Hugging Face Hub, streamed at one commit: nothing is downloaded whole, pictures stay encoded."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefalign.images import SYSTEM_ERRORS, EncodedImage, ImageError, read_image
from prefalign.sources.config import DataConfig

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PIECE = 2**16
FILES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow", ".zip", ".gz")


class HubError(ValueError):
    """A data set of the Hub that cannot be read; the message says why and what to do."""


def is_named(config: DataConfig) -> bool:
    """Whether `config.path` is the name of a data set on the Hub: OWNER/NAME, nothing of that name on this disk."""
    path = config.path
    return bool(NAME.fullmatch(path.as_posix())) and path.suffix not in FILES and not path.exists()


def check(config: DataConfig) -> None:
    """Look the data set and its split up, before any work starts.

    Raises:
        HubError: there is none, it may not be read, or the Hub cannot be asked.
    """
    _opened(config, None)


def provenance(config: DataConfig) -> dict[str, str]:
    """Which rows these are: `repository`, `commit`, `config` and `split` of a data set of the Hub; empty for files."""
    if not is_named(config):
        return {}
    return {
        "repository": config.path.as_posix(),
        "commit": commit_of(config),
        "config": config.config or "default",
        "split": config.split or "train",
    }


def commit_of(config: DataConfig) -> str:
    """The commit that the data set's revision is at; asked once in a process, so that all passes read the same rows."""
    from huggingface_hub import constants

    return _commit(constants.ENDPOINT, config.path.as_posix(), config.revision)


def rows(config: DataConfig, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any]]:
    """Stream the rows of a split in order, pictures as encoded bytes (or as the address of a file in the repository).

    Args:
        config: names the data set.
        columns: read only these. Of Parquet files nothing else is fetched; where they have none of them, their rows are counted.

    Raises:
        HubError: as `check`; or the connection broke for good, or a file is not what it says.
    """
    opened = _opened(config, columns)
    try:
        for row in opened:
            yield row if columns is None else {name: row[name] for name in columns if name in row}
    except Exception as error:
        raise _explained(error, config) from error


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


@functools.cache
def _commit(endpoint: str, repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        found = HfApi(endpoint=endpoint).dataset_info(repository, revision=revision)
    except Exception as error:
        raise _explained(error, DataConfig(Path(repository), revision=revision)) from error
    return str(found.sha)


def _opened(config: DataConfig, columns: Sequence[str] | None) -> Any:
    """The split as a `datasets.IterableDataset` that decodes no picture."""
    from huggingface_hub import constants

    wanted = None if columns is None else tuple(columns)
    try:
        return _stream(
            constants.ENDPOINT,
            config.path.as_posix(),
            config.config,
            config.split or "train",
            commit_of(config),
            wanted,
        )
    except Exception as error:
        raise _explained(error, config) from error


@functools.cache
def _stream(
    endpoint: str, repository: str, name: str | None, split: str, commit: str, columns: tuple[str, ...] | None
) -> Any:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(repository, name, revision=commit)
    splits = builder.as_streaming_dataset()
    if split not in splits:
        raise HubError(
            f"the data set {repository} has no split {split!r}, only {', '.join(map(str, splits))}. Give one of them as "
            "`data.split`."
        )
    stream = splits[split]
    if columns is not None and hasattr(builder.config, "columns") and stream.features:
        # a few bytes of each row group: read them in small pieces, not with the five megabytes around them
        builder = load_dataset_builder(repository, name, revision=commit, storage_options={"hf": {"block_size": PIECE}})
        builder.config.columns = _columns(stream.features, columns)
        stream = builder.as_streaming_dataset(split)
    return stream.decode(False) if stream.features else stream


def _columns(features: Mapping[str, Any], wanted: Sequence[str]) -> list[str]:
    """Those of the columns that there are; if none, the first that holds a single value, which counts the rows."""
    from datasets import Value

    present = [name for name in features if name in wanted]
    single = [name for name, kind in features.items() if isinstance(kind, Value)]
    return present or (single or list(features))[:1]


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
    if config.config is not None and "BuilderConfig" in str(error):
        return HubError(f"the data set {name} has no configuration {config.config!r}: {str(error).splitlines()[0][:300]} Give "
                        "another `data.config`, or leave it out.")  # fmt: skip
    why = (str(error).strip().splitlines() or [""])[0][:200]
    return HubError(
        f"the data set {name} cannot be streamed ({type(error).__name__}: {why}). Download it (`hf download --repo-type "
        "dataset`) and give its file as `data.path`; lines of a JSONL file need not have equal columns there."
    )

"""The shards of a finished stage's folder: each whole, and together as many rows as the manifest says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefalign.manifest import Manifest, read_manifest

_AGAIN = (
    "Copy it again from where it was made, or delete the folder and run the stage again (started on what is there, it finds its "
    "manifest and does nothing)."
)


@dataclass(frozen=True)
class Shards:
    """What the footers of a folder's shards say.

    Attributes:
        files: `data/*.parquet`, in order.
        rows: of all together.
        columns: those that every shard has.
    """

    files: list[Path]
    rows: int
    columns: list[str]


def read_shards(folder: Path) -> Shards:
    """Open the footer of every shard; no row is read.

    Raises:
        ValueError: names the first shard that is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files, rows, columns = sorted(folder.glob("data/*.parquet")), 0, None
    for file in files:
        try:
            footer = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(
                f"{file} is not a whole Parquet file ({error}; it has {file.stat().st_size:,} bytes), so its rows are lost. "
                f"{_AGAIN}"
            ) from error
        names = footer.schema.to_arrow_schema().names
        rows += footer.num_rows
        columns = names if columns is None else [name for name in columns if name in names]
    return Shards(files, rows, columns or [])


def whole_shards(folder: Path, manifest: Manifest) -> Shards:
    """The shards of a finished folder, if all rows are there that its manifest counts.

    Args:
        folder: output of a stage.
        manifest: of that folder.

    Raises:
        ValueError: shards are damaged, lost or added.
    """
    shards = read_shards(folder)
    if not shards.files and manifest.rows_out:
        raise ValueError(
            f"{folder} holds no shards (data/*.parquet), and its manifest.json says {manifest.rows_out} rows: they were left out "
            f"of a copy, or deleted. {_AGAIN}"
        )
    if shards.rows != manifest.rows_out:
        raise ValueError(
            f"the shards in {folder} hold {shards.rows} rows, but manifest.json says {manifest.rows_out}: a shard was lost or "
            f"added, so the manifest does not describe these rows. {_AGAIN}"
        )
    return shards


def check_shards(folder: Path) -> None:
    """See that the shards of a folder are whole if a stage has finished it; of other folders nothing is known.

    Raises:
        ValueError: as `whole_shards` does.
    """
    try:
        manifest = read_manifest(folder)
    except (TypeError, ValueError):  # a manifest.json of another program
        return
    if manifest is not None:
        whole_shards(folder, manifest)

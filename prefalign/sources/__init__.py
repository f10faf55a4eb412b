"""Rows from files and from the Hub in the layouts people have: ours and the published ones (`layouts.LAYOUTS`).

`files` streams raw rows, from disk or from the Hub (`hub`), and never opens a picture. `rows` turns one raw row into a record
and reads its pictures, so that one bad row costs one row; `layouts` has one reader for each published layout,
`llama_factory` reads what a `dataset_info.json` names.
"""

from prefalign.sources.config import BadRow, DataConfig
from prefalign.sources.files import (
    RowReader,
    files_of,
    fingerprint,
    parquet_rows,
    provenance,
    read_rows,
    recall,
    revision_name,
    survey,
)
from prefalign.sources.layouts import LAYOUTS
from prefalign.sources.rows import content_digest, legible, pictures_of, to_candidates, to_pair, to_prompt

__all__ = [
    "LAYOUTS",
    "BadRow",
    "DataConfig",
    "RowReader",
    "content_digest",
    "files_of",
    "fingerprint",
    "legible",
    "parquet_rows",
    "pictures_of",
    "provenance",
    "read_rows",
    "recall",
    "revision_name",
    "survey",
    "to_candidates",
    "to_pair",
    "to_prompt",
]

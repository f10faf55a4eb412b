"""Where rows come from: what a stage's `data` section says."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from prefalign.sources.layouts import AUTO, LAYOUTS

DESCRIPTIONS = "dataset_info.json"
_WITH_SPLIT = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)@(\w+)")


@dataclass
class DataConfig:
    """Where rows come from.

    Attributes:
        path: JSONL, JSON, Parquet, CSV or TSV file (tables with a header, `sources.tables`), a folder of Parquet shards that a
            stage wrote, or a data set of the Hub as OWNER/NAME, which is streamed; OWNER/NAME@SPLIT, as EasyR1 and verl write
            it, sets `split` too. What is on disk under that name is read instead. FOLDER/dataset_info.json@NAME is a
            data set as LLaMA-Factory's users describe it.
        images: folder that relative picture paths start from; the data file's own folder if empty, the repository for data
            sets of the Hub.
        limit: use only the first rows (0: all).
        split: of a data set of the Hub, `train` if empty; or of a folder whose files are named after their splits, as those of a
            data set that was downloaded (`train-00000-of-00002.parquet`, `test.jsonl`).
        config: configuration (subset) of a data set of the Hub; its default one if empty.
        revision: branch, tag or commit of a data set of the Hub; `main` if empty.
        layout: `auto` tells each row's layout from its columns; a name of `layouts.LAYOUTS` reads all rows as that one.
        fact_columns: columns that become facts of a row (labels, measurements).
        question: what is asked of rows that have no question of their own (a table of labels); None: they are bad rows.
    """

    path: Path
    images: Path | None = None
    limit: int = 0
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    layout: str = AUTO
    fact_columns: list[str] = field(default_factory=list)
    question: str | None = None

    def __post_init__(self) -> None:
        if (named := _WITH_SPLIT.fullmatch(self.path.as_posix())) and not (
            self.path.exists() or self.path.name.startswith(DESCRIPTIONS)
        ):
            if self.split not in (None, named[2]):
                raise ValueError(
                    f"path is {self.path}, which names the split {named[2]!r}, and split is {self.split!r}: only one can be "
                    "read. Leave one of them out."
                )
            self.path, self.split = Path(named[1]), named[2]
        if self.limit < 0:
            raise ValueError(f"limit is {self.limit}; give how many of the first rows to use, or 0 for all of them.")
        if self.layout != AUTO and self.layout not in LAYOUTS:
            raise ValueError(
                f"layout is {self.layout!r}, and no reader has that name, so no row could be read. Give {AUTO}, which tells it "
                f"from the columns, or one of {', '.join(LAYOUTS)}."
            )


@dataclass(frozen=True)
class BadRow:
    """A line that could not even be read as a row."""

    reason: str
    message: str

"""What a finished folder vouches for where the Hub cannot be asked (HF_HUB_OFFLINE is set in tests)."""

import json
from pathlib import Path

import pytest

from prefalign import folders
from prefalign.sources import DataConfig, provenance


def test_a_folder_vouches_for_the_rows_it_was_made_of_only(tmp_path):
    """In one process, without the Hub: the same repository's other splits, configurations and revisions are not known."""
    commit = "c" * 40
    source = {"repository": "tester/one", "commit": commit, "config": "easy", "split": "test"}

    def made(named, /, **asked):
        content = {"stage": "x", "source": source, **named}
        for name in ("config.json", "manifest.json"):
            (tmp_path / name).write_text(json.dumps(content))
        data = DataConfig(Path("tester/one"), **asked)
        folders.recall_source(tmp_path, data)
        return data

    rows = {"config": "easy", "split": "test"}
    assert provenance(made({}, **rows)) == provenance(made({}, **rows, revision=commit)) == source
    others = ({}, {"config": "easy"}, {"split": "test"}, {**rows, "revision": "v1"})
    for other in (*others, {**rows, "revision": "d" * 40}):
        made({}, **rows)  # stays known beside
        with pytest.raises(ValueError, match="no data at tester/one on this disk"):
            provenance(DataConfig(Path("tester/one"), **other))
        with pytest.raises(ValueError, match="no data at tester/one on this disk"):
            provenance(made({}, **other))
    tagged = {"revision": "v1"}
    assert (
        provenance(made(tagged, **rows, revision="v1")) == provenance(made(tagged, **rows, revision=commit)) == source
    )
    with pytest.raises(ValueError, match="no data at tester/one on this disk"):
        provenance(made(tagged, **rows))

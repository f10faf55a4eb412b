"""BDHS pairs of photographs on a family whose processor holds a video processor."""

import pytest
from test_own_data import ANSWERS, PHOTOGRAPHS, generate_pairs, photographs  # noqa: F401
from tiny_vlms import save_tiny

from prefalign.manifest import read_manifest
from prefalign.records import Pair
from prefalign.store import read_records

pytestmark = pytest.mark.families


def test_pairs_come_out_of_qwen2_5_vl(photographs, tmp_path):  # noqa: F811
    generate_pairs(save_tiny("qwen2_5_vl", tmp_path / "model"), photographs, tmp_path / "pairs")
    manifest = read_manifest(tmp_path / "pairs")
    assert manifest.rows_in == 8 == manifest.rows_used + sum(manifest.dropped.values())
    pairs = list(read_records(tmp_path / "pairs", Pair))
    assert len(pairs) >= 3
    for pair in pairs:
        assert pair.chosen[0]["content"][0]["text"] == ANSWERS[PHOTOGRAPHS.index(pair.meta["parent"])]

"""RLAIF-V's verdicts paired by another rule: the rows of a fresh run, and no model is asked."""

import json
import re

import pytest

from prefalign import bundled, execution
from prefalign.blocks import NoRows
from prefalign.claims import ClaimJudge
from prefalign.config import ConfigError
from prefalign.dividing import DivideConfig
from prefalign.images import encode_png
from prefalign.records import Candidates, Pair
from prefalign.store import OutputConfig, StoreError, read_records, write_records
from tests.rlaif_v_cases import CAT, DRAGON, SCENES, Absent, candidates, settings
from tests.tiny_vlms import picture

FIRST = {"min_gap": 1.0, "per_prompt": 2, "length_balance": "off", "least_kept": 0.1}
DRAGONS = [DRAGON, "Two dragons fly. ", "One dragon reads a long book about the old days. "]


@pytest.fixture
def stage(monkeypatch):
    """The stage, whose labeller `stage.server` is; `stage.loaded` counts how often models were loaded."""
    stage = bundled.load_stage("rlaif_v")
    stage.server, stage.loaded = Absent({"dragon": {"No": 0.9}}), []

    def load(config):
        stage.loaded.append(config)
        return stage.Models(None, ClaimJudge(stage.server, None, DivideConfig(by="rules")))

    monkeypatch.setattr(stage, "load", load)
    return stage


@pytest.fixture
def rows(tmp_path):
    """Seven rows whose answers have from none to three dragons, good ones of four to ten words."""
    made = []
    for number in range(7):
        good = CAT + "Then it " + " ".join("abcdefgh"[place] * 2 for place in range(number)) + " sleeps. "
        texts = [good, *("".join(DRAGONS[:count]) + f"Cat number {number}. " for count in range(1, 2 + number % 3))]
        made.append(candidates(texts, f"row{number}"))
    return write(tmp_path / "in", made)


def write(folder, rows):
    write_records("t", rows, output=OutputConfig(folder), record=Candidates, settings={}, seed=0)
    return folder


def run(stage, rows, folder, pairs=FIRST, **changes):
    known = {"model": None, "labeller": SCENES["model"], "divide": {"by": "rules"}, "pairs": pairs, **changes}
    manifest = stage.main(settings(stage, rows, folder, **known))
    return manifest, list(read_records(folder, Pair)), json.loads((folder / "claims.json").read_text())


@pytest.mark.parametrize(
    "rule",
    [
        {"min_gap": 2.0},
        {"min_gap": 3.0, "per_prompt": 1},
        {"per_prompt": 9},
        {"length_balance": "both", "least_kept": 0.0},
        {"min_gap": 2.0, "length_balance": "published", "least_kept": 0.5},
    ],
)
def test_another_rule_over_the_same_verdicts_gives_the_rows_of_a_fresh_run(stage, rows, tmp_path, rule):
    rule = {**FIRST, **rule}
    first = run(stage, rows, tmp_path / "first")
    fresh = run(stage, rows, tmp_path / "fresh", rule)
    assert fresh[1] != first[1]
    asked = len(stage.server.asked)
    stage.loaded.clear()
    assert run(stage, rows, tmp_path / "again", rule, judged=tmp_path / "first") == fresh
    assert run(stage, rows, tmp_path / "back", judged=tmp_path / "again") == first, (
        "its output serves as well as the first"
    )
    assert (len(stage.server.asked), stage.loaded) == (asked, [])


def test_shards_pair_anew_what_one_process_does(stage, rows, tmp_path):
    run(stage, rows, tmp_path / "first")
    rule = {**FIRST, "min_gap": 2.0, "length_balance": "both"}
    fresh = run(stage, rows, tmp_path / "fresh", rule)
    with execution.sharded(execution.Shard(0, 2)), pytest.raises(execution.LeftToOthers):
        run(stage, rows, tmp_path / "again", rule, judged=tmp_path / "first")
    with execution.sharded(execution.Shard(1, 2)):
        assert run(stage, rows, tmp_path / "again", rule, judged=tmp_path / "first") == fresh
    assert len(stage.loaded) == 2


def test_rows_that_had_failed_have_failed_by_any_rule(stage, rows, tmp_path):
    stage.server.down = "row2/"
    first = run(stage, rows, tmp_path / "first")
    assert first[0].dropped["generation_failed"] == 1
    rule = {**FIRST, "min_gap": 2.0}
    fresh = run(stage, rows, tmp_path / "fresh", rule)
    stage.server.down = ""
    asked = len(stage.server.asked)
    assert run(stage, rows, tmp_path / "again", rule, judged=tmp_path / "first") == fresh
    assert len(stage.server.asked) == asked


@pytest.mark.parametrize("where", ["same folder", "another"])
def test_a_gap_that_no_pair_has_costs_no_verdict(stage, rows, tmp_path, where):
    fresh = run(stage, rows, tmp_path / "fresh")
    with pytest.raises(NoRows, match=r"7 small_gap.* lower `pairs.min_gap`"):
        run(stage, rows, tmp_path / "out", {**FIRST, "min_gap": 9.0})
    asked = len(stage.server.asked)
    if where == "same folder":
        assert run(stage, rows, tmp_path / "out") == fresh
    else:
        assert run(stage, rows, tmp_path / "again", judged=tmp_path / "out") == fresh
    assert len(stage.server.asked) == asked


def test_a_run_killed_before_its_first_pair_may_go_on_by_another_rule(stage, rows, tmp_path, monkeypatch):
    """The verdicts stay; the cut that was decided for the old rule does not."""
    rule = {**FIRST, "min_gap": 2.0, "length_balance": "both", "least_kept": 0.0}
    fresh = run(stage, rows, tmp_path / "fresh", rule)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "outcome", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(stage, rows, tmp_path / "out")
    before = json.loads((tmp_path / "out" / "survey" / "decided-claims.json").read_text())["decision"]
    asked = len(stage.server.asked)
    assert run(stage, rows, tmp_path / "out", rule) == fresh
    after = json.loads((tmp_path / "out" / "survey" / "decided-claims.json").read_text())["decision"]
    assert before["cut"] != after["cut"]
    assert len(stage.server.asked) == asked


def test_verdicts_of_other_rows_or_settings_are_refused(stage, rows, tmp_path):
    run(stage, rows, tmp_path / "first")
    other = [
        Candidates(row.id, [encode_png(picture(2), "a.png")], row.messages, row.responses)
        for row in read_records(rows, Candidates)
    ]
    cases = [
        ({"divide": {"by": "rules", "max_words": 5}}, "settings.divide.max_words: 2000 -> 5"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"pairs": {**FIRST, "unfinished": False}}, "settings.pairs.unfinished: True -> False"),
        ({"rows": write(tmp_path / "other", other)}, "data_sha256"),
    ]
    for number, (changes, named) in enumerate(cases):
        known = {"rows": rows, **changes}
        with pytest.raises(
            StoreError, match=rf"{re.escape(named)}.*Only pairs.min_gap, .* may differ: .* leave `judged` out"
        ):
            run(stage, folder=tmp_path / f"refused-{number}", judged=tmp_path / "first", **known)
    assert len(stage.loaded) == 1


def test_a_folder_without_all_verdicts_is_refused(stage, rows, tmp_path):
    run(stage, rows, tmp_path / "first")
    (tmp_path / "first" / "survey" / "claims-00001.json").unlink()
    with pytest.raises(
        StoreError, match=r"first has not judged all its rows \(block 1 is missing\).*Start that run again"
    ):
        run(stage, rows, tmp_path / "again", judged=tmp_path / "first")
    with pytest.raises(ValueError, match=r"judged is \S+/in, and that is no output of rlaif_v.*Give the folder"):
        run(stage, rows, tmp_path / "again", judged=rows)
    with pytest.raises(
        ConfigError, match=r"judged and output.path are both \S+/first, and a folder holds the pairs of one"
    ):
        run(stage, rows, tmp_path / "first", judged=tmp_path / "first")

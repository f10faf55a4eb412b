"""The benchmark's figures, worked by hand on one scene, and the benchmark itself on a few rows."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from prefalign.images import encode_png
from prefalign.records import Pair, assistant_message, user_message
from tests.launching import WARM

FILE = Path(__file__).parent.parent / "benchmarks" / "pair_truth.py"
spec = importlib.util.spec_from_file_location("pair_truth", FILE)
pair_truth = importlib.util.module_from_spec(spec)
sys.modules["pair_truth"] = pair_truth
spec.loader.exec_module(pair_truth)


def thing(shape, colour, size, place):
    return {"shape": shape, "colour": colour, "size": size, "place": place}


FACTS = {
    "objects": [thing("circle", "red", "large", "top left"), thing("star", "blue", "small", "right"),
                thing("star", "green", "small", "bottom")],
    "counts": {"circle": 1, "star": 2},
}  # fmt: skip
TRUE = "There is a large red circle at the top left. There is a small blue star on the right."


@pytest.mark.parametrize(
    ("text", "false", "named", "shapes_false", "shapes"),
    [
        (TRUE, 0, {0, 1}, 0, {"circle", "star"}),
        ("There is a large red square at the top left.", 1, set(), 1, set()),
        ("There is a large blue circle at the top left.", 1, set(), 0, {"circle"}),
        ("There is a small red circle at the top left.", 1, set(), 0, {"circle"}),
        ("There is a large red circle at the top.", 1, set(), 0, {"circle"}),
        ("There is a star.", 0, {1, 2}, 0, {"star"}),
        ("There are two stars in the picture.", 0, {1, 2}, 0, {"star"}),
        ("There are three stars in the picture.", 1, {1, 2}, 0, {"star"}),
        ("No, there is no star in the picture.", 1, set(), 1, set()),
        ("No, there is no heart in the picture.", 0, set(), 0, set()),
        ("A red disc at the top left and a heart on the left.", 1, {0}, 1, {"circle"}),
        ("I do not know.", 0, set(), 0, set()),
    ],
)
def test_what_a_text_tells(text, false, named, shapes_false, shapes):
    assert pair_truth.told(text, FACTS) == pair_truth.Told(false, frozenset(named))
    assert pair_truth.told(text, FACTS, shapes=True) == pair_truth.Told(shapes_false, frozenset(shapes))


@pytest.mark.parametrize(
    ("chosen", "rejected", "full", "shapes"),
    [
        (TRUE, TRUE + " There is a heart.", True, True),
        (TRUE, "There is a large red circle at the top left.", True, True),
        (TRUE, "There is a large red circle at the top left. There is a large blue star on the right.", True, False),
        (TRUE, TRUE, False, False),
        (TRUE, "There is a small blue star on the right. There is a large red circle at the top left.", False, False),
        (TRUE + " There is a heart.", TRUE, False, False),
        # one false mention each, chosen names two objects and rejected one
        (TRUE + " There is a heart.", "There is a large red circle at the top left. There is a heart.", True, True),
        # more false mentions are worse however many objects are named
        ("There is a star.", TRUE + " There is a heart.", True, True),
    ],
)
def test_worse_by_hand(chosen, rejected, full, shapes):
    assert pair_truth.worse(chosen, rejected, FACTS) is full
    assert pair_truth.worse(chosen, rejected, FACTS, shapes=True) is shapes


def test_edit_distance_by_hand():
    """ "a red cat" to "a red dog": 3 of 9 characters; case and stops do not count."""
    assert pair_truth.edit_distance("A red cat.", "a red dog") == pytest.approx(3 / 9)
    assert pair_truth.edit_distance("A cat.", "a cat") == 0


def pair(chosen, rejected, level=10, other_facts=None):
    one, other = Image.new("RGB", (4, 4), (10, 10, 10)), Image.new("RGB", (4, 4), (level, 10, 10))
    return Pair("p", [encode_png(one)], [user_message("What?", 1)], [assistant_message(chosen)], [assistant_message(rejected)],
                "test", rejected_images=[encode_png(other)], facts={**FACTS, "rejected": other_facts})  # fmt: skip


def values(rows):
    return {row["name"].removeprefix("truth/x/").removeprefix("truth/s_vco/"): row["value"] for row in rows}


def test_figures_of_a_text_stage():
    good, tie = pair(TRUE, TRUE + " There is a heart."), pair(TRUE, TRUE)
    attribute = pair("There is a star.", "There is a red star.")
    rows = pair_truth.score_texts("x", [good, tie, attribute, good], [good])
    assert values(rows) == {"pairs": 4, "worse_share": 0.75, "verified_pairs": 1, "verified_worse_share": 1.0,
                            "objects_worse_share": 0.5, "verified_objects_worse_share": 1.0,
                            "edit_distance": rows[-1]["value"]}  # fmt: skip
    verified = next(row for row in rows if row["name"] == "truth/x/verified_worse_share")
    assert (verified["baseline"], verified["goal"]) == (0.75, 0.95)
    assert values(pair_truth.score_texts("x", [good], []))["verified_worse_share"] is None


def test_figures_of_picture_stages():
    """One channel of three differs by 30 grey levels: a mean of 10. A pair whose pictures are one is not different."""
    heart = {"objects": [thing("heart", "red", "large", "top")], "counts": {"heart": 1}}
    both = pair("There is a star.", "There is a heart.", 40, heart)
    same = pair("There is a star.", "There is a circle.", 10, FACTS)
    rows = pair_truth.score_pictures("s_vco", [both, same])
    assert values(rows) | {"edit_distance": 0} == {"pairs": 2, "different_share": 0.5, "pixel_difference": 5.0,
                                                   "two_sided_share": 0.5, "edit_distance": 0}  # fmt: skip
    assert "two_sided_share" not in values(pair_truth.score_pictures("x", [both]))


def test_figures_of_short_answers():
    """Case and number words do not make an answer another one."""
    made = [pair("Red.", "Blue."), pair("Two.", "2"), pair("At the top.", ""), pair("Yes.", "No.")]
    assert values(pair_truth.score_short("x", made, 8)) == {
        "pairs": 4, "rejected_wrong_share": 0.75, "rejected_empty_share": 0.25}  # fmt: skip


def test_what_was_removed_is_told_from_what_stayed():
    """The picture's one clear star stays in the caption; a heart that is not in the picture (so never right) was removed."""
    from prefalign.scenes import language, world

    scene = next(
        one for one in world.scenes("train_fair", 0, 200) if len(one.objects) == 2 and all(t.clear for t in one.objects)
    )
    thing = scene.objects[0]
    stays, goes = f"What is {language.at(thing.place)}?", "What colour is the heart?"
    assert "heart" not in scene.shapes
    caption = f"There is a {thing.colour} {thing.shape} {language.at(thing.place)}."
    given = pair(caption, "There is a cross.")
    given.images = [{"bytes": world.png(scene), "path": "x.png"}]
    given.facts = language.facts(scene)
    given.meta = {
        "caption": f"{caption} There is a black heart.".replace("black", "green"),
        "probes": [{"question": stays}, {"question": goes}],
        "settings": {"num_generations": 4, "sampling": {"max_new_tokens": 12, "temperature": 0.4}, "threshold": 3,
                     "least_judged": 2},
    }  # fmt: skip
    rows = {row["name"]: row for row in pair_truth.score_knowledge("x", [given], 2)}
    removed, told = rows["truth/x/removed_wrong_share"], rows["truth/x/told_unknown_share"]
    assert removed["value"] > removed["baseline"]
    assert told["value"] <= told["baseline"]
    assert rows["truth/x/pairs"]["baseline"] == 2


def test_the_benchmark_runs_and_names_its_figures(tmp_path):
    file = tmp_path / "out.json"
    command = [
        str(WARM / "python"),
        str(FILE),
        "--stages",
        "povid,s_vco",
        "--rows",
        "8",
        "--start",
        "40",
        "--json",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())
    assert all(set(row) == {"name", "value", "unit", "baseline", "goal"} for row in rows)
    found = {row["name"]: row["value"] for row in rows}
    assert found["truth/povid/pairs"] == 8
    assert found["truth/povid/worse_share"] == 1.0
    assert found["truth/s_vco/two_sided_share"] == 1.0
    assert "truth/povid/verified_pairs" in done.stdout
    wrong = subprocess.run([*command[:2], "--stages", "gpt4"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert "unknown stage 'gpt4': known are bdhs, povid" in wrong.stderr

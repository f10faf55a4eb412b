"""MPA: when two short answers say the same, what is kept and what is dropped, and that the picture decides it."""

import dataclasses
import json
import shutil

import pytest
from PIL import Image

from prefalign import bundled, config, parity
from prefalign.engines import Completion
from prefalign.engines.transformers import load_engine
from prefalign.images import encode_png, sha256
from prefalign.models import ModelConfig
from prefalign.parity import matches, with_request
from prefalign.records import Example, Pair, Prompt, message_text, user_message
from prefalign.scenes import language
from prefalign.scenes.export import export
from prefalign.scenes.probing import short_question
from prefalign.store import Dropped, Failed, StoreError, read_records
from prefalign.text import same_answer

ROWS = 12
SCENES = config.read_yaml(bundled.find("datagen/mpa_scenes"))


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("mpa")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mpa") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=ROWS)
    return folder


@pytest.fixture(scope="module")
def prompts(rows):
    return list(read_records(rows, Prompt))


@pytest.fixture(scope="module")
def engine():
    return load_engine(ModelConfig("scenes", device="cpu"), batch_size=16)


def settings(stage, rows, folder, **changes):
    known = {"data": {"path": rows}, "output": {"path": folder, "block_size": 5}}
    return config.build(stage.Config, config.merge(config.merge(SCENES, known), changes))


@pytest.fixture(scope="module")
def finished(stage, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mpa") / "out"
    manifest = stage.main(settings(stage, rows, folder))
    return folder, manifest, list(read_records(folder, Example))


def test_a_blank_stands_before_the_request():
    assert with_request("What is it? ", "Be brief.") == "What is it? Be brief."
    assert with_request("What is it?", "") == "What is it?"


def test_questions_from_facts_have_short_true_answers(prompts):
    kinds = set()
    for prompt in prompts:
        for seed in range(6):
            asked = short_question(prompt.facts, seed)
            kinds.add(asked.kind)
            assert len(asked.answer.split()) <= 4
            if asked.kind == "count":
                assert str(prompt.facts["counts"].get(asked.shape, 0)) == asked.label
            elif asked.kind == "colour":
                assert asked.label in [
                    thing["colour"] for thing in prompt.facts["objects"] if thing["shape"] == asked.shape
                ]
            elif asked.kind == "place":
                assert asked.label in [
                    thing["place"] for thing in prompt.facts["objects"] if thing["shape"] == asked.shape
                ]
    assert kinds == set(language.KINDS)
    assert short_question({}, 0) is None


def test_examples_ask_what_the_small_model_gets_wrong(finished, prompts):
    folder, manifest, made = finished
    assert manifest.rows_in == ROWS == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.dropped == {"small_knows": ROWS - len(made)}
    assert 0 < len(made) < ROWS
    assert len({row.id for row in made}) == len(made)
    given = {prompt.id: prompt for prompt in prompts}
    for row in made:
        prompt, meta = given[row.meta["parent"]], row.meta
        assert row.images == prompt.images
        assert [turn["role"] for turn in row.messages] == ["user", "assistant"]
        assert message_text(row.messages[1:]) == meta["pseudo_answer"] == meta["large_answers"][0]
        assert not matches(meta["pseudo_answer"], meta["small_answer"])
        assert meta["images_sha256"] == [sha256(image) for image in prompt.images]
        assert (meta["generator"], meta["small"]) == ("scenes-truth-1", manifest.models["small"])
        assert meta["settings"]["matching"] == "exact"
    assert json.loads((folder / "parity.json").read_text()) == {
        "rows": len(made), "accepted": round(len(made) / ROWS, 4), "small_knows": round(1 - len(made) / ROWS, 4)}  # fmt: skip


def test_a_stopped_run_ends_with_the_same_rows(stage, rows, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    for name in ("manifest.json", "parity.json", "progress/00001.json", "data/train-00001.parquet"):
        (tmp_path / "out" / name).unlink()
    assert stage.main(settings(stage, rows, tmp_path / "out")) == finished[1]
    assert list(read_records(tmp_path / "out", Example)) == finished[2]


def test_the_picture_decides_what_the_small_model_knows(stage, engine, prompts, rows, tmp_path):
    known = settings(stage, rows, tmp_path)
    blank = encode_png(Image.new("RGB", (60, 60), (186, 186, 186)))
    blind = [dataclasses.replace(prompt, images=[blank]) for prompt in prompts]
    seen, unseen = (
        [outcome == Dropped("small_knows") for outcome in stage.process(block, engine, None, known)]
        for block in (prompts, blind)
    )
    assert sum(seen) > sum(unseen)


def test_pairs_reject_the_small_models_answer_to_the_same_prompt(stage, engine, prompts, rows, tmp_path):
    outcomes = stage.process(
        prompts, engine, None, settings(stage, rows, tmp_path, produce="pairs", short_request="Be brief.")
    )
    pairs = [row for outcome in outcomes if not isinstance(outcome, Dropped) for row in outcome]
    assert len(pairs) >= 3
    for pair in pairs:
        pair.check()
        assert isinstance(pair, Pair)
        assert message_text(pair.prompt).endswith(" Be brief.")
        assert pair.answer == message_text(pair.chosen)
        assert not same_answer(message_text(pair.chosen), message_text(pair.rejected))


def test_rows_without_facts_or_pictures_are_dropped(stage, engine, prompts, rows, tmp_path):
    bare = dataclasses.replace(prompts[0], facts={})
    alone = dataclasses.replace(prompts[0], images=[], messages=[user_message("Hi")])
    broken = dataclasses.replace(prompts[0], images=[{"bytes": b"no picture", "path": "x.png"}])
    outcomes = stage.process([bare, alone, broken], engine, None, settings(stage, rows, tmp_path))
    assert outcomes[:2] == [Dropped("no_facts"), Dropped("no_picture")]
    assert isinstance(outcomes[2], Failed)


class Script:
    """A model whose replies are written down by the end of a request's id."""

    capabilities = frozenset({"sample"})

    def __init__(self, name, **replies):
        self.fingerprint, self.replies, self.asked, self.samplings = name, replies, [], []

    def generate(self, requests, sampling):
        self.asked += requests
        self.samplings.append(sampling)
        return [self._reply(request) for request in requests]

    def _reply(self, request):
        row, _, what = request.id.partition("/")
        reply = self.replies.get(f"{row}_{what.replace('/', '_')}", self.replies.get(what.split("/")[0], ""))
        return (
            Completion(request.id, "", finish_reason="error", error="down")
            if reply is None
            else Completion(request.id, reply)
        )


def llm(stage, rows, folder, **changes):
    large = {"model_name_or_path": "large", "device": "cpu"}
    known = {"matching": "tokens", "short_request": "Answer briefly.", **changes}
    return settings(stage, rows, folder, annotator="engine", large=large, **known)


NOTE = "Question: What is written on the sign?\nAnswer: Red Car 2"


THREE = {"num_generations": 3, "agreement": 0.6}  # two of three have to agree


def one(stage, prompts, known, large, small):
    row = dataclasses.replace(prompts[0], id="row")
    return stage.process([row], Script("small", **small), Script("large", **{"annotation": NOTE, **large}), known)[0]


@pytest.mark.parametrize(
    ("changes", "large", "small", "outcome"),
    [
        ({}, {"large": "red car 2"}, {"small": "blue car"}, None),
        ({}, {"large": "It says red car 2."}, {"small": ""}, None),
        ({}, {"large": "red car 2"}, {"small": "Red car two"}, Dropped("small_knows")),
        ({}, {"large": "red car 20"}, {"small": "blue car"}, Dropped("large_disagrees")),
        ({"matching": "released"}, {"large": "red car 20"}, {"small": "blue car"}, None),
        ({"matching": "exact"}, {"large": "Red car 2."}, {"small": "red car 2 left"}, None),
        ({"matching": "exact"}, {"large": "red car 2 left"}, {"small": "x"}, Dropped("large_disagrees")),
        ({}, {"large": "redcar2"}, {"small": "blue car"}, Dropped("large_disagrees")),
        ({"max_answer_words": 5}, {"large": "I think that it says red car 2"}, {"small": "x"}, Dropped("large_disagrees")),
        ({"max_answer_words": 5}, {"large": "red car 2"}, {"small": "I think that it says red car 2"}, Dropped("small_knows")),
        ({"max_answer_words": 5}, {"large": "red car 2"}, {"small": "I think that it says blue car 3"}, None),
        ({}, {"large": "red car 2"}, {"small": "redcar2"}, Dropped("small_knows")),
        ({"matching": "released"}, {"large": "red car 2"}, {"small": "Red car two"}, None),
        ({"matching": "exact"}, {"large": "Red car 2"}, {"small": "redcar 2"}, Dropped("small_knows")),
        ({"max_answer_words": None}, {"large": "red car 2"}, {"small": "I think that it says red car 2"}, Dropped("small_knows")),
        ({"max_answer_words": 2}, {"large": "red car 2"}, {"small": "x"}, Dropped("long_answer")),
        ({}, {"annotation": "I see a sign."}, {}, Dropped("unreadable_annotation")),
        ({}, {"annotation": "Question: What?\nAnswer:"}, {}, Dropped("no_answer")),
        ({}, {"annotation": "Question: What?\nAnswer: It cannot be read."}, {}, Dropped("no_answer")),
        ({}, {"annotation": None}, {}, Failed("generation_failed", "down")),
        ({}, {"large": None}, {"small": "x"}, Failed("generation_failed", "down")),
        ({}, {"large": "red car 2"}, {"small": None}, Failed("generation_failed", "down")),
        ({"vote": THREE}, {"large": "red car 2", "row_large_1": None, "row_large_2": None}, {},
         Failed("generation_failed", "down")),
        ({"vote": THREE}, {"large": "red car 2", "row_large_0": "blue", "row_large_2": None}, {},
         Failed("generation_failed", "down")),
        ({"vote": THREE}, {"large": "red car 2", "row_large_1": None}, {"small": "blue car"}, None),
        ({"vote": THREE}, {"large": "blue", "row_large_1": None}, {}, Dropped("large_disagrees")),
        ({"produce": "pairs"}, {"large": "red car 2"}, {"small": "blue car"}, None),
        ({"produce": "pairs"}, {"large": "red car 2"}, {"small": " . "}, Dropped("small_empty")),
        ({"produce": "pairs"}, {"large": "red car 2"}, {"small": "I cannot tell."}, Dropped("small_refuses")),
        ({"produce": "pairs", "max_answer_words": 5}, {"large": "red car 2"}, {"small": "I think that it says blue car 3"},
         Dropped("long_small_answer")),
        ({"produce": "pairs", "matching": "released"}, {"large": "red car 2"}, {"small": "It is a red car two"},
         Dropped("small_knows")),
    ],
)  # fmt: skip
def test_what_is_kept_of_the_answers_of_two_models(stage, prompts, rows, tmp_path, changes, large, small, outcome):
    found = one(stage, prompts, llm(stage, rows, tmp_path, **changes), large, small)
    if outcome is not None:
        assert found == outcome
    else:
        (made,) = found
        assert made.meta["pseudo_answer"] == "Red Car 2"
        assert made.meta["small_answer"] == small["small"]


def test_both_models_get_the_question_with_the_request_and_the_annotator_its_task(stage, prompts, rows, tmp_path):
    large, small = Script("large", annotation=NOTE, large="red car 2"), Script("small", small="blue")
    known = llm(stage, rows, tmp_path, task="chart")
    ((made,),) = stage.process(prompts[:1], small, large, known)
    note, answer = large.asked
    assert parity.TASK_PROMPTS["chart"] in message_text(note.messages)
    assert (
        message_text(answer.messages)
        == message_text(small.asked[0].messages)
        == "What is written on the sign? Answer briefly."
    )
    assert message_text(made.messages[:1]) == "What is written on the sign?"
    assert [request.images[0].size for request in (note, answer, small.asked[0])] == [(60, 60)] * 3
    assert {sampling.temperature for sampling in [*large.samplings, *small.samplings]} == {0}
    assert (made.meta["generator"], made.meta["small"], made.meta["task"]) == ("large", "small", "chart")


RIGHT = [
    ("5%", "5 percent"), ("$5", "5 dollars"), ("St. John's", "St Johns"), ("20", "twenty"), ("caf\u00e9", "It is a cafe."),
    ("colour", "color"), ("New York", "newyork"), ("42", "It says: forty-two"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "small"), [*RIGHT, *((other, one) for one, other in RIGHT)])
@pytest.mark.parametrize("matching", ["tokens", "released"])
def test_a_right_answer_in_other_words_is_never_rejected(stage, prompts, rows, tmp_path, answer, small, matching):
    known = llm(stage, rows, tmp_path, produce="pairs", matching=matching)
    found = one(
        stage, prompts, known, {"annotation": f"Question: What? Answer: {answer}", "large": answer}, {"small": small}
    )
    assert found in (Dropped("small_knows"), Dropped("small_equal"), Dropped("small_part"))


@pytest.mark.parametrize("produce", ["examples", "pairs"])
@pytest.mark.parametrize(
    ("answer", "large", "small", "outcome"),
    [
        ("150", "150", "one hundred and fifty", "small_knows"),
        ("-5", "-5", "minus 5", "small_knows"),
        ("100", "one hundred fifty", "7", "large_disagrees"),
        ("5", "minus 5", "7", "large_disagrees"),
        ("2", "1/2", "7", "large_disagrees"),
        ("0.5", "0.5", "1/2", "unreadable_number"),
        ("24", "24", "two dozen", "unreadable_number"),
        ("24", "24", "25", None),
    ],
)
def test_numbers_confirm_and_reject_whole(stage, prompts, rows, tmp_path, answer, large, small, outcome, produce):
    known = llm(stage, rows, tmp_path, produce=produce)
    said = {"annotation": f"Question: How many?\nAnswer: {answer}", "large": large}
    found = one(stage, prompts, known, said, {"small": small})
    assert found == Dropped(outcome) if outcome else isinstance(found, list)


LONG = "these are more than ten words that stand upon one long sign"


@pytest.mark.parametrize(
    ("answer", "large", "tokens"),
    [
        ("Unknown Soldier", "Unknown Soldier", None),
        ("No Answer Road", "It says No Answer Road.", None),
        ("unknown", "unknown", "no_answer"),
        ("not visible", "It is not visible.", "no_answer"),
        (LONG, LONG, "long_answer"),
        ("red", f"red, {LONG}", "large_disagrees"),
        ("red", "Nothing is red", "large_disagrees"),
    ],
)
def test_the_authors_rule_keeps_what_theirs_keeps_and_ours_drops_refusals(
    stage, prompts, rows, tmp_path, answer, large, tokens
):
    """Theirs: the annotation is a substring of the large model's answer, and none of the small one's."""
    said = {"annotation": f"Question: What?\nAnswer: {answer}", "large": large}
    for changes, dropped in (
        ({}, tokens),
        ({"matching": "released"}, None),
        ({"matching": "released", "produce": "pairs"}, tokens if tokens != "large_disagrees" else None),
    ):
        found = one(stage, prompts, llm(stage, rows, tmp_path, **changes), said, {"small": "stop"})
        if dropped:
            assert found == Dropped(dropped)
        else:
            assert found[0].meta["pseudo_answer"] == answer


@pytest.mark.parametrize("answer", ["blue/red", "blue or red"])
def test_one_of_what_the_annotation_offers_is_not_rejected(stage, prompts, rows, tmp_path, answer):
    known = llm(stage, rows, tmp_path, produce="pairs")
    said = {"annotation": f"Question: What?\nAnswer: {answer}", "large": answer}
    assert one(stage, prompts, known, said, {"small": "Blue"}) == Dropped("small_part")
    assert isinstance(one(stage, prompts, known, said, {"small": "green"}), list)


def test_several_answers_of_the_large_model_vote(stage, prompts, rows, tmp_path):
    known = llm(stage, rows, tmp_path, vote={"num_generations": 3, "agreement": 0.6})
    two_of_three = {"large": "red car 2", "row_large_1": "blue"}
    assert not isinstance(one(stage, prompts, known, two_of_three, {"small": "blue"}), Dropped)
    one_of_three = {**two_of_three, "row_large_2": "green"}
    assert one(stage, prompts, known, one_of_three, {"small": "blue"}) == Dropped("large_disagrees")


def test_a_failed_row_moves_no_other(stage, prompts, rows, tmp_path):
    names = ["a", "b", "c"]
    block = [dataclasses.replace(prompt, id=name) for prompt, name in zip(prompts, names, strict=False)]
    large = Script("large", a_annotation="Question: 1?\nAnswer: x", b_annotation=None, c_annotation="Question: 3?\nAnswer: z",
                   a_large_0="x", c_large_0="z")  # fmt: skip
    outcomes = stage.process(block, Script("small", a_small="q", c_small="r"), large, llm(stage, rows, tmp_path))
    assert outcomes[1] == Failed("generation_failed", "down")
    assert [
        (message_text(row.messages[:1]), row.meta["pseudo_answer"], row.meta["small_answer"])
        for (row,) in outcomes[::2]
    ] == [("1?", "x", "q"), ("3?", "z", "r")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotator": "engine"}, "annotator is `engine`, and no large model is named"),
        ({"annotator": "engine", "large": SCENES["model"]}, "model and large are both 'scenes', so there is no gap"),
        ({"numeric_tolerance": 1}, "numeric_tolerance is 1.0; it is a share of the number"),
        ({"max_answer_words": 0}, "max_answer_words is 0, so no answer would be short enough"),
        ({"vote": {"num_generations": 0}}, "vote.num_generations is 0; the large model answers 1 time or more"),
        ({"vote": {"agreement": 0}}, "vote.agreement is 0.0; it is a share of answers above 0"),
        (
            {"vote": {"num_generations": 3, "temperature": 0}},
            "vote.temperature is 0.0, so 3 answers would be the same greedy one",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(stage, rows, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(stage, rows, tmp_path, **changes)


def test_a_real_model_is_asked_as_annotator(stage, rows, tmp_path):
    """The tiny model sees the picture, but cannot write a question: that is said, and nothing is made up for it."""
    large = {**SCENES["model"], "dtype": "float32"}
    known = settings(stage, rows, tmp_path / "out", annotator="engine", large=large, data={"limit": 2})
    with pytest.raises(StoreError, match="mpa made no row out of 2: 2 unreadable_annotation"):
        stage.main(known)


@pytest.mark.parametrize("name", ["mpa", "mpa_scenes"])
def test_configs_run(stage, name, rows, tmp_path):
    changes = {"model": {"model_name_or_path": "scenes", "dtype": "auto", "device": "cpu", "processor": None},
               "annotator": "rules",
               "data": {"path": rows, "images": None}, "output": {"path": tmp_path / "out"}, "short_request": "",
               "sampling": {"max_new_tokens": 24}}  # fmt: skip
    values = config.merge(config.read_yaml(bundled.find(f"datagen/{name}")), changes)
    manifest = stage.main(config.build(stage.Config, values))
    assert manifest.rows_in == ROWS == manifest.rows_used + sum(manifest.dropped.values())

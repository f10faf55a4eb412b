"""What is said is true, can be read back, and comes from the right pictures."""

import json
from collections import Counter

import pytest

from prefalign.scenes import data, language, world
from prefalign.scenes.language import Mention, parse, sentence_parses, sentences
from prefalign.scenes.world import SHAPES


@pytest.fixture(scope="module")
def pictures():
    return list(world.scenes("train_biased", 0, 120)) + list(world.scenes("test_fair", 0, 80))


def holds(mention: Mention, picture: world.Scene) -> bool:
    fits = any(
        thing.shape == mention.shape
        and mention.colour in (None, thing.colour)
        and mention.size in (None, thing.size)
        and mention.place in (None, thing.place)
        for thing in picture.objects
    )
    return fits != mention.negated


def test_every_caption_description_and_answer_is_true_and_parses(pictures):
    for picture in pictures:
        said = [language.caption(picture, number) for number in range(4)] + [language.description(picture)]
        said += [question.answer for question in language.questions(picture)]
        for text in said:
            assert all(map(sentence_parses, sentences(text))), text
            assert all(holds(mention, picture) for mention in parse(text)), (text, picture)


def test_relations_in_descriptions_are_true(pictures):
    told = 0
    for picture in pictures:
        where = {thing.shape: thing for thing in picture.objects}
        for sentence in sentences(language.description(picture)):
            for word, right in {
                "above": lambda a, b: a.row < b.row,
                "below": lambda a, b: a.row > b.row,
                "to the left of": lambda a, b: a.column < b.column,
                "to the right of": lambda a, b: a.column > b.column,
            }.items():
                if f" {word} the " in sentence:
                    one, other = (where[mention.shape] for mention in parse(sentence))
                    assert right(one, other), sentence
                    told += 1
    assert told > 100


def test_answers_have_the_labels_the_scene_gives(pictures):
    for picture in pictures:
        places = {thing.place: thing.shape for thing in picture.objects}
        for question in language.questions(picture):
            if question.kind == "count":
                assert question.label == str(picture.count(question.shape))
                words = language.NUMBERS[int(question.label)], "no" if question.label == "0" else "one"
                assert any(word in question.answer.lower().rstrip(".").split() for word in words)
            elif question.kind == "object":
                where = question.text.removesuffix("?").split(" the ", 1)[1]
                assert question.label == places.get(where, "nothing")
            elif question.kind in ("colour", "place"):
                (thing,) = [thing for thing in picture.objects if thing.shape == question.shape]
                assert question.label == getattr(thing, question.kind)
            elif "in the picture" in question.text or "Does" in question.text:
                assert question.label == ("yes" if question.shape in picture.shapes else "no")
            if question.kind == "yes_no":
                assert question.answer.lower().startswith(question.label)


def test_existence_questions_are_balanced(pictures):
    asked = [
        q for p in pictures for q in language.questions(p) if q.kind == "yes_no" and not q.text.startswith("Is the ")
    ]
    share = sum(question.label == "yes" for question in asked) / len(asked)
    assert 0.48 < share < 0.55


def test_clear_objects_are_mentioned_95_percent_of_the_time_and_faint_ones_half():
    said, there = Counter(), Counter()
    for picture in world.scenes("train_biased", 0, 600):
        spoken = parse(language.caption(picture, style="there"))
        for thing in picture.objects:
            there[thing.clear] += 1
            said[thing.clear] += any(
                (m.shape, m.colour, m.place) == (thing.shape, thing.colour, thing.place) for m in spoken
            )
    assert said[True] / there[True] == pytest.approx(0.95, abs=0.03)
    assert said[False] / there[False] == pytest.approx(0.50, abs=0.05)


def test_captions_come_in_several_phrasings():
    picture = world.scene("train_biased", 0)
    assert len({language.caption(picture, number) for number in range(40)}) > 12
    assert language.caption(picture, 3) == language.caption(picture, 3)
    assert language.caption(picture, style="place").startswith(("At the ", "In the ", "On the "))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There is a large red circle at the top left.", ("circle", "red", "large", "top left", False)),
        ("At the bottom there is an orange star.", ("star", "orange", None, "bottom", False)),
        ("A small blue box is in the centre.", ("square", "blue", "small", "centre", False)),
        ("No, there is no ring in the picture.", ("ring", None, None, None, True)),
        ("Yes, the heart is green.", ("heart", "green", None, None, False)),
        ("There are two pluses in the picture.", ("cross", None, None, None, False)),
        ("The diamond is on the right.", ("diamond", None, None, "right", False)),
    ],
)
def test_parse_reads_one_mention(text, expected):
    (mention,) = parse(text)
    assert (mention.shape, mention.colour, mention.size, mention.place, mention.negated) == expected
    assert sentence_parses(text)


def test_parse_keeps_things_apart_and_spans_their_words():
    text = "The picture shows a red circle at the top, a small star on the left and a blue ring in the centre."
    mentions = parse(text)
    assert [(m.shape, m.place) for m in mentions] == [("circle", "top"), ("star", "left"), ("ring", "centre")]
    assert [text[m.start : m.end] for m in mentions] == ["red circle", "small star", "blue ring"]
    left = parse("The star is to the left of the ring.")
    assert [(m.shape, m.place) for m in left] == [("star", None), ("ring", None)]


@pytest.mark.parametrize(
    "sentence",
    [
        "There is large red circle at the top.",
        "there is a red circle at the top.",
        "A red dog is at the top.",
        "At the top there",
        "",
    ],
)
def test_what_the_world_cannot_say_does_not_parse(sentence):
    assert not sentence_parses(sentence)


def test_every_form_of_every_shape_is_read():
    for shape, words in language.SYNONYMS.items():
        assert {parse(f"Some {word} there.")[0].shape for word in words} == {shape}


def test_facts_are_json_and_complete():
    picture = world.scene("test_fair", 1)
    facts = json.loads(json.dumps(language.facts(picture)))
    assert Counter(thing["shape"] for thing in facts["objects"]) == Counter(thing.shape for thing in picture.objects)
    assert {thing["place"]: thing["clear"] for thing in facts["objects"]} == {t.place: t.clear for t in picture.objects}
    assert len(facts["captions"]) == 3


def test_rows_have_the_shape_stages_read():
    (row,) = data.rows("caption", "val_fair", 3, 4)
    assert set(row) == {"id", "images", "messages", "answer", "facts"}
    assert row["images"][0]["bytes"] == world.png(world.scene("val_fair", 3))
    (turn,) = row["messages"]
    assert turn["role"] == "user"
    assert [block["type"] for block in turn["content"]] == ["image", "text"]
    assert row["facts"]["scene"] == "scene-0-val_fair-000003"


@pytest.mark.parametrize("kind", data.KINDS)
def test_every_kind_of_row_is_true_unique_and_repeatable(kind):
    made = list(data.rows(kind, "train_fair", 0, 40))
    assert len(made) >= 30
    assert len({row["id"] for row in made}) == len(made)
    assert made == list(data.rows(kind, "train_fair", 0, 40))
    assert list(data.rows(kind, "train_fair", 20, 40)) == [row for row in made if row["id"].split("-")[3] >= "000020"]
    for row in made:
        assert all(map(sentence_parses, sentences(row["answer"])))
        known = row["facts"].get("pictures", [row["facts"]])
        assert len(row["images"]) == len(known) == (2 if kind == "pair" else 1)
        shapes = {shape for facts in known for shape in facts["shapes"]}
        assert all(mention.negated or mention.shape in shapes for mention in parse(row["answer"])), row["answer"]


def test_the_row_seed_draws_words_and_never_the_picture():
    first, second = (next(data.rows("mix", "val_fair", 0, 1, seed=seed)) for seed in (0, 1))
    assert first["images"] == second["images"]
    assert first["id"] != second["id"]


def test_yes_no_rows_are_balanced():
    said = [row["answer"].startswith("Yes") for row in data.rows("yes_no", "val_fair", 0, 200)]
    assert 0.4 < sum(said) / len(said) < 0.6


def test_regimes_take_their_references_from_the_right_pictures():
    seen, fair, none = (next(data.rows("caption", regime=regime, stop=1)) for regime in ("seen", "fair", "none"))
    assert seen["facts"]["scene"] == "scene-0-train_biased-000000"
    assert fair["facts"]["scene"] == "scene-0-train_fair-000000"
    assert seen["answer"]
    assert fair["answer"]
    assert (none["answer"], none["facts"]) == (None, {})
    assert none["images"] == fair["images"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "poem", "split": "val_fair"}, "unknown kind of row 'poem': the kinds are caption, description"),
        ({"kind": "caption", "split": "val"}, "unknown split 'val': the embedded world has"),
        ({"kind": "caption"}, "neither split nor regime is given"),
        ({"kind": "caption", "regime": "all"}, "unknown regime 'all': supervision is one of seen, fair, none"),
        (
            {"kind": "caption", "split": "test_fair", "regime": "fair"},
            "regime 'fair' takes its references from 'train_fair'",
        ),
        ({"kind": "caption", "regime": "seen", "world_seed": 1}, "world_seed=1 with regime 'seen': the base has seen"),
        ({"kind": "caption", "regime": "seen", "stop": 24_001}, r"0 to 24000 \(the pictures the base has seen\)"),
        ({"kind": "caption", "split": "val_fair", "start": 5, "stop": 4}, "rows 5 to 4 are outside 'val_fair'"),
    ],
)
def test_row_errors_say_what_is_wrong_and_come_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.rows(**arguments)


def test_language_errors_say_what_is_wrong():
    picture = world.scene("val_fair", 0)
    with pytest.raises(ValueError, match="unknown caption style 'haiku': captions are written as there, subject"):
        language.caption(picture, style="haiku")
    with pytest.raises(ValueError, match="unknown shape 'cube': the world has circle"):
        language.probe(picture, "cube")


def test_probes_ask_the_plain_question():
    picture = world.scene("val_fair", 0)
    asked = [language.probe(picture, shape) for shape in SHAPES]
    assert {q.shape for q in asked if q.label == "yes"} == picture.shapes
    assert asked[0].text == "Is there a circle in the picture? Answer with one word."
    assert language.probe(picture, sorted(picture.shapes)[0], short=False).answer.startswith("Yes, there is a")

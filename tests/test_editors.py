"""Editors: rules that know the scenes' words, by hand and by the world's own parser; what engines are asked and refused for."""

import pytest

from prefalign.editors import EditItem, EngineEditor, changes, cleaned, edit_prompt, judged
from prefalign.engines import Completion, Sampling
from prefalign.engines.transformers import load_engine
from prefalign.models import ModelConfig
from prefalign.records import message_text, user_message
from prefalign.rule_editor import KINDS, RuleEditor, Vocabulary
from prefalign.scenes import language, world
from tests.tiny_vlms import picture

CIRCLE = {"objects": [{"shape": "circle", "colour": "red", "size": "large", "place": "top left"}]}


def edit(answer, kind, *, facts=CIRCLE, name="row", seed=0, injections=1):
    editor = RuleEditor(Vocabulary(), kinds=[kind] if kind else KINDS, injections=injections, seed=seed)
    return editor.edit([EditItem(name, [user_message("What?", 1)], [], answer, facts)])[0]


def every(answer, kind, **more):
    return {edit(answer, kind, name=str(number), **more).text for number in range(150)}


def test_vocabulary_is_that_of_the_scenes():
    words = Vocabulary()
    assert set(words.objects) == set(world.SHAPES)
    assert {name: others[0] for name, others in words.companions.items()} == world.COMPANIONS
    assert words.attributes == {"colour": list(world.COLOURS), "size": list(world.SIZES)}
    assert list(words.objects) == list(world.SHAPES) == list(words.companions)
    assert {name: [name, *others] for name, others in words.objects.items()} == {
        shape: names[::2] for shape, names in language.SYNONYMS.items()
    }
    assert all(len(others) == 1 for others in words.companions.values())
    assert words.places == [language.at(place) for place in world.PLACES]
    assert tuple(words.numbers) == language.NUMBERS
    for one, other in words.opposites.items():
        assert words.opposites[other] == one
        assert language.sentence_parses(f"The circle is {one} the star.")


def test_wrong_colour_or_size():
    texts = every("A large red circle.", "attribute")
    assert texts == {f"A large {c} circle." for c in ("green", "blue", "yellow", "purple", "orange")} | {
        "A small red circle."
    }
    assert every("Red.", "attribute") == {"Green.", "Blue.", "Yellow.", "Purple.", "Orange."}
    assert "An orange circle." in every("A red circle.", "attribute")


def test_attributes_that_another_object_of_the_name_has_are_not_mistakes():
    two = {"objects": [*CIRCLE["objects"], {**CIRCLE["objects"][0], "colour": "blue", "size": "small", "place": "top"}]}
    assert every("A large red circle.", "attribute", facts=two) == {
        f"A large {colour} circle." for colour in ("green", "yellow", "purple", "orange")
    }


def test_absent_companion_in_the_same_phrasing():
    for opening in ("There is a large red circle at the top left.", "I can see a large red circle at the top left."):
        result = edit(opening, "object")
        first, added = result.text.split(". ")
        assert first + "." == opening
        (mention,) = language.parse(added)
        assert mention.shape == "square"
        assert mention.place != "top left"
        assert None not in (mention.size, mention.colour)
        assert language.sentence_parses(added)
        assert result.injected == [{"type": "object", "removed": "", "added": added, "start": len(first) + 2}]
    turned = edit("At the top left there is a red circle.", "object").text.split(". ")[1]
    assert language.sentence_parses(turned)
    assert language.parse(turned)[0].size is None


def test_objects_that_are_there_are_never_injected():
    crowd = {"objects": [{"shape": shape} for shape in world.SHAPES if shape != "heart"]}
    texts = every("There is a red circle at the top.", "object", facts=crowd)
    assert {language.parse(text)[1].shape for text in texts} == {"heart"}
    full = {"objects": [{"shape": shape} for shape in world.SHAPES]}
    assert edit("There is a red circle at the top.", "object", facts=full).refused == "nothing_to_edit"


def test_answer_that_is_an_object_alone_names_another():
    assert edit("A large red circle.", "object").text == "A large red square."


def test_a_wrong_place_is_one_that_the_answer_does_not_name():
    """Two things at one place would give the edit away without the picture."""
    texts = every("On the left there is a red ring. At the top there is a red star.", "place", facts={})
    places = [[mention.place for mention in language.parse(text)] for text in texts]
    assert len(places) == 14
    assert all(one != other for one, other in places)


def test_wrong_place_relation_and_count():
    assert every("The circle is at the top left.", "place") == {
        f"The circle is {language.at(place)}." for place in world.PLACES if place != "top left"
    }
    assert edit("The circle is to the left of the star.", "relation").text == "The circle is to the right of the star."
    assert edit("The circle is below the star.", "relation").text == "The circle is above the star."
    assert every("There is one circle in the picture.", "count") == {
        f"There are {number} circles in the picture." for number in ("two", "three", "four", "five")
    }
    assert "There is one cross in the picture." in every("There are no crosses in the picture.", "count")
    assert every("Two.", "count") == {f"{word.capitalize()}." for word in language.NUMBERS if word != "two"}


def test_existence():
    assert edit("Yes.", "existence").text == "No."
    assert edit("no", "existence").text == "yes"
    assert edit("Yes, there is a circle at the top left.", "existence").text == "No, there is no circle in the picture."
    assert language.sentence_parses(edit("No, there is no star in the picture.", "existence").text)
    assert edit("Yes, the circle is red.", "existence").refused == "nothing_to_edit"


def test_answers_without_a_known_word_are_refused():
    assert edit("A bus waits in the rain.", "object").refused == "nothing_to_edit"
    assert edit("Nothing.", None).refused == "nothing_to_edit"


def test_rules_are_seeded_by_row():
    caption = "There is a large red circle at the top left. There is a small blue star at the bottom."
    assert edit(caption, None) == edit(caption, None)
    assert len(every(caption, None)) > 20
    assert len({edit(caption, None, seed=seed).text for seed in range(5)}) > 1


@pytest.mark.parametrize("injections", [1, 2])
def test_every_edited_caption_is_fluent_and_false(injections):
    """Read back by the world's own parser: each sentence can be said, and something said is not so."""
    for scene in world.scenes("train_biased", 0, 60):
        facts = language.facts(scene)
        true = {(o["shape"], o["colour"], o["size"], o["place"]) for o in facts["objects"]}
        for number in range(2):
            caption = language.caption(scene, number)
            kinds = ("object", "attribute", "place")
            editor = RuleEditor(Vocabulary(), kinds=kinds, injections=injections)
            (result,) = editor.edit([EditItem(f"{scene.id}/{number}", [], [], caption, facts)])
            assert result.refused is None
            assert all(language.sentence_parses(sentence) for sentence in language.sentences(result.text)), result.text
            said = [(m.shape, m.colour, m.size, m.place) for m in language.parse(result.text)]
            false = [
                one
                for one in said
                if not any(all(a in (None, b) for a, b in zip(one, fact, strict=True)) for fact in true)
            ]
            # a list is one sentence, which takes one mistake
            assert len(false) == min(injections, len(language.sentences(caption))), (caption, result.text)
            for entry in result.injected:
                assert result.text[entry["start"] :].startswith(entry["added"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"objects": {"cat": []}, "companions": {"cat": ["dog"]}}, "companions name dog, and objects has cat"),
        ({"objects": {}, "companions": {}}, "objects has nothing"),
        ({"objects": {"Cat": []}, "companions": {}}, "'Cat' has capitals"),
    ],
)
def test_vocabularies_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(**words)


def test_rules_refuse_settings_that_make_no_mistake():
    with pytest.raises(
        ValueError, match=r"kinds \['colour'\]: an editor makes mistakes of the types object, attribute"
    ):
        RuleEditor(Vocabulary(), kinds=["colour"])
    with pytest.raises(ValueError, match="injections 0: an edited answer needs at least 1 mistake"):
        RuleEditor(Vocabulary(), injections=0)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  A cat. ", "A cat."),
        ('"A cat."', "A cat."),
        ("New answer: A cat.", "A cat."),
        ("Answer: A cat.", "A cat."),
        ("Sure, here is the rewritten text:\nA cat.", "A cat."),
        ("```text\nA cat.\n```", "A cat."),
        ('"A cat" and "a dog"', '"A cat" and "a dog"'),
        ("The answer: a cat is there.", "The answer: a cat is there."),
    ],
)
def test_cleaned(raw, clean):
    assert cleaned(raw) == clean


@pytest.mark.parametrize(
    ("edited", "refused"),
    [
        ("", "empty"),
        ("New answer:", "empty"),
        ("a cat sits", "unchanged"),
        ("A cat sits on a [hallucinated] sofa.", "telltale"),
        ("A dog sits (changed).", "telltale"),
        ("A dog, which is not in the picture, sits.", "telltale"),
        ("I'm sorry, but I can't help.", "telltale"),
        ("A dog sits.", None),
    ],
)
def test_judged(edited, refused):
    assert judged("A cat sits.", edited, "captioning").refused == refused


def test_words_of_the_answer_itself_are_no_telltale():
    assert judged("A <b>cat</b> sits [1].", "A <b>dog</b> sits [1].", "captioning").refused is None


def test_changes_by_hand():
    # 0123456789012345678901
    # A blue cat sits there.
    assert changes("A red cat sits.", "A blue cat sits there.", "captioning") == [
        {"type": "captioning", "removed": "red ", "added": "blue ", "start": 2},
        {"type": "captioning", "removed": "", "added": "there", "start": 16},
    ]


class Told:
    """An engine that answers as told and keeps what it was asked."""

    capabilities = frozenset({"sample"})
    fingerprint = "told"

    def __init__(self, *completions):
        self.completions = completions
        self.requests = []

    def generate(self, requests, sampling):
        self.requests = list(requests)
        return [Completion(r.id, **c) for r, c in zip(requests, self.completions, strict=True)]


def item(question, answer="A cat sits.", name="row", seed=0):
    return EditItem(name, [user_message(question, 1)], [picture(seed)], answer)


def test_prompt_families_follow_the_question():
    engine = Told(*[{"text": "A dog sits."}] * 3)
    edits = EngineEditor(engine, Sampling()).edit(
        [item("Describe the picture."), item("Why is it there?"), item("What might happen next?")]
    )
    assert [one.kind for one in edits] == ["captioning", "reasoning", "reasoning"]
    texts = [message_text(request.messages) for request in engine.requests]
    assert texts[0] == edit_prompt(item("Describe the picture."), "captioning")
    assert texts[0].endswith("Question: Describe the picture.\nCorrect answer: A cat sits.\nNew answer:")
    assert "exactly one thing" in texts[1]
    assert "exactly one thing" not in texts[0]
    assert all(len(request.images) == 1 for request in engine.requests)
    assert engine.requests[0].messages[0]["content"][0] == {"type": "image"}


def test_an_llm_gets_no_picture():
    engine = Told({"text": "A dog sits."})
    EngineEditor(engine, Sampling(), pictures=False, family="captioning").edit([item("Why?")])
    assert engine.requests[0].images == []
    assert [block["type"] for block in engine.requests[0].messages[0]["content"]] == ["text"]


def test_cut_off_and_failed_answers_are_refused():
    engine = Told(
        {"text": "A dog si", "finish_reason": "length"}, {"text": "", "finish_reason": "error", "error": "too long"}
    )
    cut, failed = EngineEditor(engine, Sampling()).edit([item("What?"), item("What?")])
    assert (cut.refused, failed.refused, failed.message) == ("cut_off", "generation_failed", "too long")


def test_words_added_at_the_end_begin_at_the_words():
    """The last word of the answer is no mistake, nor is the blank after it."""
    assert changes("A cat sits", "A cat sits down \n", "x") == [
        {"type": "x", "removed": "", "added": "down \n", "start": 11}
    ]
    assert changes("A cat. It sits.", "A cat.  It sits. ", "x") == []


def test_engine_that_cannot_write_is_refused():
    engine = Told()
    engine.capabilities = frozenset()
    with pytest.raises(ValueError, match="POVID needs sample"):
        EngineEditor(engine, Sampling())


def test_the_vlm_editor_sees_the_picture(tiny_llava):
    """Another picture changes what a real model writes; an editor without pictures writes the same."""
    engine = load_engine(ModelConfig(str(tiny_llava), device="cpu"))

    def written(seed, **more):
        editor = EngineEditor(engine, Sampling(max_new_tokens=48), **more)
        items = [item("What is it?", name=str(number), seed=seed) for number in range(8)]
        return [(edit.text, edit.message) for edit in editor.edit(items)]

    assert written(0) == written(0) != written(1)
    assert written(0, pictures=False) == written(1, pictures=False)

"""Style alignment: what a rewriting may change, what the verifier decides, that originals stay where either says no."""

import pytest

from prefalign.engines import Completion, Sampling
from prefalign.engines.transformers import load_engine
from prefalign.models import ModelConfig
from prefalign.style_alignment import StyleConfig, Text, align_style, changed_facts, names_of, numbers_of
from tests.tiny_vlms import picture


def test_numbers_are_the_same_in_digits_and_words():
    assert numbers_of("There are two dogs and 1,250 cats, 3.5 m apart.") == {"2", "1250", "3.5"}
    assert numbers_of("Twenty-one stones.") == {"20", "1"}
    assert numbers_of("Someone often attends.") == set()


def test_names_stand_inside_sentences():
    assert names_of("The man from Paris met Ann. She wore Anna's hat; I saw it.") == {"paris", "ann", "anna's"}
    assert names_of("Paris is large.") == set()


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("Two dogs play in Paris.", "In Paris, 2 dogs are playing.", None),
        ("Two dogs play.", "Three dogs play.", "numbers"),
        ("Two dogs play.", "Dogs play.", "numbers"),
        ("Dogs play.", "Four dogs play.", "numbers"),
        ("The dogs play in Paris.", "The dogs play in Rome.", "names"),
        ("The dogs play in Paris.", "The dogs play.", "names"),
        ("The dogs play.", "The dogs play in Rome.", "names"),
        ("Paris is where the dogs play.", "The dogs play in Paris.", None),
        ("The cat sleeps.", "A cat is asleep.", None),
    ],
)
def test_changed_numbers_and_names_show(before, after, found):
    assert changed_facts(before, after) == found


class Scripted:
    """Answers from a list of rules: a piece of the question, and what is said to it."""

    fingerprint, capabilities = "scripted", frozenset({"sample"})

    def __init__(self, rules):
        self.rules, self.asked = rules, []

    def generate(self, requests, sampling):
        self.asked.append([request.messages[0]["content"][-1]["text"] for request in requests])
        self.images = [request.images for request in requests]
        return [self._say(request) for request in requests]

    def _say(self, request):
        text = request.messages[0]["content"][-1]["text"]
        said = next(said for piece, said in self.rules if piece in text)
        if isinstance(said, Completion):
            return said
        return Completion(request.id, said)


RULES = [
    ("say the same as the first", "Yes."),
    ("One dog.", "A single dog: one."),
    ("Two dogs.", "Three dogs."),
    ("Three cats.", "I cannot"),
    ("Blank.", " "),
    ("Same.", "same"),
    ("Long.", Completion("x", "on and on", finish_reason="length")),
    ("Broken.", Completion("x", "", finish_reason="error", error="too long")),
]


def texts(*said, part="answer"):
    return [Text(f"row-{number}", part, text, []) for number, text in enumerate(said)]


def test_originals_stay_where_the_rewriting_cannot_be_trusted():
    engine = Scripted(RULES)
    given = texts("One dog.", "Two dogs.", "Blank.", "Same.", "Long.", "Broken.")
    made = align_style(engine, given, StyleConfig())
    assert [one.verdict for one in made] == ["taken", "numbers", "empty", "unchanged", "cut_off", "failed"]
    assert made[0].text == "A single dog: one."
    assert [one.text for one in made[1:]] == [text.text for text in given[1:]]
    assert [len(call) for call in engine.asked] == [6, 1]  # all rewritings at once; only what is left is verified
    assert "One dog." in engine.asked[1][0]
    assert "A single dog: one." in engine.asked[1][0]
    assert align_style(engine, [], StyleConfig()) == []


REPLIES = {"yes": True, "Yes, it does.": True, "No.": False, "Yesterday": False, "": False, "The same. Yes": False}


@pytest.mark.parametrize(("reply", "taken"), REPLIES.items())
def test_the_verifier_has_to_say_yes(reply, taken):
    engine = Scripted([("say the same as the first", reply), ("A dog.", "A hound.")])
    [made] = align_style(engine, texts("A dog."), StyleConfig())
    assert (made.verdict, made.text) == (("taken", "A hound.") if taken else ("refused", "A dog."))


def test_prompts_name_what_is_rewritten_and_pictures_are_shown_on_request():
    engine = Scripted([("say the same as the first", "yes"), ("?", "What animal?")])
    shown = [Text("a", "question", "Which animal?", [picture(0)])]
    align_style(engine, shown, StyleConfig())
    assert "Say this question again" in engine.asked[0][0]
    assert engine.images == [[]]
    align_style(engine, shown, StyleConfig(pictures=True))
    assert engine.images == [[shown[0].images[0]]]
    align_style(
        engine,
        shown,
        StyleConfig(rewrite="Again ({part}): {text}", verify="{before}|{after} say the same as the first"),
    )
    assert engine.asked[-2:] == [
        ["Again (question): Which animal?"],
        ["Which animal?|What animal? say the same as the first"],
    ]


def test_a_model_that_cannot_rewrite_changes_nothing_silently():
    """The tiny scenes model answers anything with captions: every one of its rewritings is refused or differs in nothing."""
    engine = load_engine(ModelConfig("scenes", device="cpu"), batch_size=8)
    given = texts("There is a large red circle at the top left.", "There are three stars.")
    made = align_style(engine, given, StyleConfig(sampling=Sampling(max_new_tokens=24, temperature=0.0)))
    assert [one.text for one in made] == [text.text for text in given]
    assert all(one.verdict != "taken" for one in made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewrite": "Again."}, r"style.rewrite has no \{text\}, so the model would not see what it is about"),
        ({"verify": "{before}?"}, r"style.verify has no \{after\}"),
        ({"rewrite": "{text} {tone}"}, r"style.rewrite cannot be filled in \(KeyError\('tone'\)\)"),
        ({"parts": []}, "style.parts is empty, so nothing would be rewritten"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StyleConfig(**changes)

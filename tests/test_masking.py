"""What of an answer is masked, by rules and by a model, and how texts are laid over one another."""

import pytest

from prefalign.engines import Completion, Sampling
from prefalign.gaps import align, filled, masked_text
from prefalign.guided import Item
from prefalign.masking import EngineMasker, MaskingConfig, RuleMasker, mask_prompt
from prefalign.records import user_message

M = "[MASK]"


def item(answer, number=0):
    return Item(f"row{number}", [user_message("What is it?", 1)], [], answer)


def masked(answer, **settings):
    (found,) = RuleMasker(MaskingConfig("rules", **settings)).mask([item(answer)])
    assert (found.refused is None) == bool(found.spans)
    return masked_text(answer, found.spans, M) if found.spans else found.refused


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("There is a large red circle at the top left.", "There is [MASK]."),
        ("A small blue star is in the centre.", "[MASK] is [MASK]."),
        ("At the top there is an orange ring.", "[MASK] there is [MASK]."),
        (
            "The picture shows a red disc on the left, two plus and a box.",
            "The picture shows [MASK], [MASK] and [MASK].",
        ),
        ("The circle is to the left of the star.", "The [MASK] is [MASK] the [MASK]."),
        ("There are three circles in the picture.", "There are [MASK] in the picture."),
        ("No, there is no star in the picture.", "[MASK], there is [MASK] in the picture."),
        ("Red.", "[MASK]."),
        ("Yes", "[MASK]"),
        ("Nothing.", "[MASK]."),
        ("At the top right of it lies a hoop.", "[MASK] of it lies [MASK]."),
        ("A starfish and crossing boxes.", "A starfish and crossing [MASK]."),
        ("It is nice here.", "nothing_to_mask"),
    ],
)
def test_rules_mask_the_words_of_a_vocabulary(answer, expected):
    assert masked(answer, words="vocabulary") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The man is riding a small brown horse on the beach.", "The [MASK] is riding [MASK] on the [MASK]."),
        (
            "There are 2 cats under the table, and the sofa is red.",
            "There are [MASK] the [MASK], and the [MASK] is [MASK].",
        ),
        ("Yes, her hat is black.", "[MASK], her [MASK] is [MASK]."),
        ("No one is there.", "[MASK] is there."),
        ("In the image there is a dog.", "In the image there is [MASK]."),
        ("A bowl, three cups.\n\nThe kitchen is bright.", "[MASK], [MASK].\n\nThe [MASK] is bright."),
        ("The big old dark wooden barn door.", "The [MASK] barn door."),
        ("Cars are parked.", "nothing_to_mask"),
        ("They ran 3.5 miles and left at 10:30.", "They ran [MASK] and left at [MASK]."),
        ("There are 1,000 birds.", "There are [MASK]."),
        ("The U.S. flag is here.", "The [MASK] is here."),
        ("He lives in the U.S. The end.", "He lives in the [MASK]. The [MASK]."),
        ("It has 3.5. The end", "It has [MASK]. The [MASK]"),
    ],
)
def test_general_rules_mask_phrases_numbers_colours_and_relations(answer, expected):
    assert masked(answer) == expected


def test_sentences_are_masked_whole_and_keep_their_ending():
    answer = "There is a red circle at the top. It is 3.5 m nice! A star is here?\nAll of it."
    assert masked(answer, words="vocabulary", level="sentence") == "[MASK]. It is 3.5 m nice! [MASK]?\nAll of it."
    assert masked("Yes. It is a ring", words="vocabulary", level="sentence") == "[MASK]. [MASK]"


def test_an_answer_that_holds_the_marker_is_refused():
    for answer in ("A [MASK] circle.", "a [ mask ] circle", "a <mask> circle"):
        assert masked(answer, words="vocabulary") == "marker_in_answer"
    assert masked("A masked circle wears a mask.", words="vocabulary") == "A masked [MASK] wears a mask."
    assert masked("A [MASK] circle.", words="vocabulary", marker="___") == "A [MASK] [MASK]."
    assert masked("A ___ circle.", words="vocabulary", marker="___") == "marker_in_answer"


def test_filling_gives_the_answer_or_the_start_before_the_next_gap():
    answer, spans = "A cat on the mat.", [(0, 5), (13, 16)]
    assert filled(answer, spans, []) == ""
    assert filled(answer, spans, ["Two dogs"]) == "Two dogs on the "
    assert filled(answer, spans, ["Two dogs", "rug"]) == "Two dogs on the rug."
    assert filled(answer, [], []) == answer


@pytest.mark.parametrize(
    ("template", "text", "edits", "parts"),
    [
        ("There is [MASK] on [MASK].", "There is a cat on the mat.", 0, ["a cat", "the mat"]),
        ("there IS [MASK].", "There is a cat.", 0, ["a cat"]),
        ("[MASK] and [MASK]", "a and b and c", 0, ["a and b", "c"]),
        ("[MASK], a [MASK].", "Yes, a 3.5 m pole.", 0, ["Yes", "3.5 m pole"]),
        ("The [MASK] is red.", "The cat was red.", 1, ["cat"]),  # is -> was
        ("The [MASK] is very red.", "The cat is red.", 1, ["cat"]),  # very is missing
        ("The [MASK] is red.", "The cat is red today.", 1, ["cat"]),  # today is too much
        ("[MASK] sits.", "A cat sits", 1, ["A cat"]),  # the full stop is missing
        ("No marks.", "No marks.", 0, []),
        ("At [MASK] the [MASK].", "At 10:30 a.m. the 3.5-inch screen.", 0, ["10:30 a.m.", "3.5-inch screen"]),
        ("[MASK].[MASK] m", "3.5 m", 2, ["3.5", "m"]),  # a number is not cut in two
        ("One [MASK].\n[MASK].", "One cat.\nTwo dogs.", 0, ["cat", "Two dogs"]),
    ],
)
def test_a_text_is_laid_over_a_masked_one_at_the_fewest_edits(template, text, edits, parts):
    found, spans = align(template, text, M)
    assert (found, [text[start:end] for start, end in spans]) == (edits, parts)


def test_a_text_with_fewer_words_than_gaps_cannot_be_laid_over():
    edits, spans = align("[MASK] [MASK] is [MASK]", "a", M)
    assert edits > 3
    assert spans == []
    assert align("[MASK]", "", M)[1] == []


class Scripted:
    """An engine that answers as it is told, and keeps what it was asked."""

    capabilities = frozenset({"sample", "prefix"})
    fingerprint = "scripted"

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.samplings = []

    def generate(self, requests, sampling):
        self.samplings.append(sampling)
        self.asked.append(list(requests))
        given = [self.answers.pop(0) for _ in requests]
        return [
            one if isinstance(one, Completion) else Completion(request.id, one)
            for request, one in zip(requests, given, strict=True)
        ]


def by_engine(*pairs, **settings):
    engine = Scripted(*[given for _, given in pairs if given is not None])
    masker = EngineMasker(engine, Sampling(temperature=0), MaskingConfig("engine", **settings), seed=3)
    return engine, masker.mask([item(answer, number) for number, (answer, _) in enumerate(pairs)])


def test_a_model_masks_where_its_copy_has_markers():
    answer = "A man in a grey coat waits. The street is empty."
    engine, (one, two, three) = by_engine(
        (answer, "Copy: [MASK] in [MASK] waits. The [MASK] is [MASK]."),
        ("Two.", '"[MASK]."'),
        (answer, "[MASK] [MASK] waits.  The street is\nempty."),
    )
    assert masked_text(answer, one.spans, M) == "[MASK] in [MASK] waits. The [MASK] is [MASK]."
    assert masked_text("Two.", two.spans, M) == "[MASK]."
    assert three.refused == "masker_rewrote"  # a line break that the answer does not have
    assert len(engine.asked) == 1  # all in one call
    request = engine.asked[0][0]
    assert (request.id, request.seed, request.images) == ("row0/mask", 3, [])
    assert request.messages[0]["content"][0]["text"] == mask_prompt(item(answer), M)
    assert f"Question: What is it?\nAnswer: {answer}\nCopy:" in mask_prompt(item(answer), M)
    assert "{marker}" not in mask_prompt(item(answer), "___")
    assert "There is ___ with ___" in mask_prompt(item(answer), "___")


def test_what_a_model_may_not_do_is_refused():
    answer = "A man in a grey coat waits."
    _, found = by_engine(
        (answer, "A woman in [MASK] waits."),
        (answer, "A man in a grey coat waits."),
        (answer, Completion("x", "[MASK] in", finish_reason="length")),
        (answer, Completion("x", "", finish_reason="error", error="too long")),
        ("A [MASK] waits.", None),
        (answer, "[MASK] in a [MASK] waits."),
    )
    assert [one.refused for one in found] == [
        "masker_rewrote", "nothing_to_mask", "masker_cut_off", "masker_failed", "marker_in_answer", None
    ]  # fmt: skip
    assert "1 word(s) outside the marks differ: 'A woman" in found[0].message
    assert "the masker marked nothing: 'A man" in found[1].message
    assert found[2].message == "...[MASK] in"
    assert found[3].message == "too long"
    assert "choose another `masking.marker` ('A [MASK] waits.')" in found[4].message
    _, (whole,) = by_engine((answer, "A man in a [MASK] waits."), level="sentence")
    assert whole.spans == [(0, len(answer) - 1)]


@pytest.mark.parametrize("marker", ["", " [MASK]", "a b"])
def test_a_marker_is_one_word(marker):
    with pytest.raises(ValueError, match="stands in answers for what is masked: give a word without blanks"):
        MaskingConfig(marker=marker)


def test_an_engine_must_sample():
    engine = Scripted()
    engine.capabilities = frozenset()
    with pytest.raises(ValueError, match="masking needs sample"):
        EngineMasker(engine, Sampling(), MaskingConfig())

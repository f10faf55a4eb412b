"""KnowAda's worked values: when something is unknown, how replies are read, what a rewrite may do, and the rules of scenes."""

import pytest

from prefalign import caption_annotator
from prefalign.caption_annotator import (
    marker_of,
    read_labels,
    read_questions,
    read_rewrite,
    read_score,
    read_yes_no,
    rewrite_prompt,
)
from prefalign.contradictions import Chosen, Rejected, RejectedConfig, rejected_captions
from prefalign.engines import Completion
from prefalign.knowledge import Captioned, Reply, is_unknown, rewrite_problem
from prefalign.records import user_message
from prefalign.scenes import language, world
from prefalign.scenes.probing import SceneAnnotator
from prefalign.scenes.twins import true_of

RULES = SceneAnnotator()
CAT = "A grey cat sleeps on a blue towel. Three pots stand on the sill."


def grades(wrong, right, missing=0):
    return [1] * wrong + [3] * right + [None] * missing


@pytest.mark.parametrize(
    ("scores", "threshold", "unknown"),
    [
        (grades(7, 3), 8, False),
        (grades(8, 2), 8, True),
        (grades(9, 1), 8, True),
        (grades(7, 3), 7, True),
        (grades(9, 1), 10, False),
        ([2] * 3 + grades(7, 0), 8, False),  # nearly right is not wrong
        (grades(7, 2, missing=1), 8, False),  # 7 of 9 are less than 8 of 10
        (grades(7, 1, missing=2), 8, True),  # 7 of 8 are more
        (grades(0, 5, missing=5), 8, False),  # the released code counts 5 missing as wrong; 8 missing made it unknown
        (grades(0, 4, missing=6), 8, None),
        (grades(4, 0, missing=6), 8, None),
        ([None] * 10, 8, None),
    ],
)
def test_unknown_by_hand(scores, threshold, unknown):
    assert is_unknown(scores, threshold=threshold, least_judged=5) is unknown


@pytest.mark.parametrize(
    ("reply", "score"),
    [("3", 3), (" Grade: 2.", 2), ("1 (wrong; 3 would be right)", 1), ("3/3", 3), ("1.0", 1), ("3.00", 3),
     ("-1", None), ("10", None), ("2.5", None), ("1.5", None),
     ("0", None), ("wrong", None), ("", None)],
)  # fmt: skip
def test_the_first_number_of_a_judgement_counts(reply, score):
    assert read_score(reply) == score


def test_questions_are_lines_with_their_marker():
    reply = """Sure, here they are. What else?
1. Question: What animal sleeps?
Question: 2) What colour is the towel?
**Question 3:** How many pots are there?
- Question: what animal  sleeps?
Question: Name the animal.
Is this a question?"""
    assert read_questions(reply) == ["What animal sleeps?", "What colour is the towel?", "How many pots are there?"]
    assert read_questions("What animal sleeps?") == []


def test_a_rewrite_is_found_though_the_caption_holds_the_marker():
    assert read_rewrite("- 'blue' goes.\nNEW CAPTION: A cat.\nIt sleeps.", "NEW CAPTION") == "A cat.\nIt sleeps."
    assert read_rewrite("A cat.", "NEW CAPTION") is None
    assert read_rewrite("NEW CAPTION: A cat.\nNEW CAPTION: A dog.", "NEW CAPTION") is None
    sign = "A sign reads NEW CAPTION: and more."
    assert marker_of(sign) == "NEW CAPTION 2"
    assert "NEW CAPTION 2: " in rewrite_prompt(sign, ["What does it read?"])
    assert read_rewrite(f"Nothing goes.\nNEW CAPTION 2: {sign}", "NEW CAPTION 2") == sign


def test_labels_and_answers_are_read_by_line():
    reply = "1. Entailed: a cat.\n**Contradicted**: a dog.\n\n- **neutral:** it is calm.\n---\nTotals: 5 Entailed"
    assert read_labels(reply) == ["entailed", "contradicted", "neutral"]
    assert read_labels(f"**Statements:**\n{reply}\nEntailed: 5\nContradicted: 1.") == read_labels(reply)
    assert read_labels(f"{reply}\n**Entailed**: 5, contradicted: 1; Neutral: 0.") == read_labels(reply)
    assert read_labels("Entailed: 2 cats, neutral: 1 dog.") == ["entailed"]
    assert [read_yes_no(text) for text in ("Yes.", "no, it is not", "Perhaps yes", "")] == [True, False, None, None]


@pytest.mark.parametrize(
    "line",
    ["Wrong: a dog", "Contradicted - a pot", "[Contradicted]: a cup", "Contradicted (adds): x", "Contradicted:", "a dog",
     "And more:"],
)  # fmt: skip
def test_a_line_without_a_label_makes_a_reply_unreadable(line):
    """Else a statement that could not be read would be left out, and the shares of the others would be better."""
    assert read_labels(f"Entailed: a cat.\n{line}") == []
    assert read_labels(f"Here they are:\n{line}\nEntailed: a cat.") == []
    assert read_labels("Here they are:\nEntailed: a cat.") == ["entailed"]


@pytest.mark.parametrize(
    ("rewritten", "problem"),
    [
        ("A grey cat sleeps on a towel. Pots stand on the sill.", None),
        ("A grey cat sleeps on a towel. Some pots stand on it.", None),
        ("A cat sleeps. A pot is on the sill.", None),  # singular of a word that is there
        ("A grey cat sleeps on something. Pots stand on the sill.", None),
        ("", "empty_rewrite"),
        (" ... ", "empty_rewrite"),
        ("a grey cat sleeps on a blue towel, three pots stand on the sill", "unchanged_rewrite"),
        ("A grey cat sleeps.", "short_rewrite"),  # 4 of 14 words
        ("The grey cat sleeps there.", None),  # 5 of 14
        ("A grey dog sleeps on a towel.", "new_words"),
        ("A grey cat sleeps, not on a towel.", "new_words"),
        ("A grey cat sleeps behind a towel.", "new_words"),
    ],
)
def test_checks_of_a_rewrite(rewritten, problem):
    assert rewrite_problem(CAT, rewritten, least_words=0.3, allowed=["something"]) == problem


@pytest.mark.parametrize(
    ("caption", "rewritten", "problem"),
    [
        ("A cat is sitting on a red mat.", "A cat sits on a mat.", None),
        ("A cat sits on a red mat.", "A cat is sitting on a mat.", None),
        ("A man rides a red bicycle.", "A man riding a bicycle.", None),
        ("A woman is lying there in red.", "A woman lies there.", None),
        ("A child carries a red bag.", "A child carrying a bag.", None),
        ("Men stand by a red wall.", "A man stands by a wall.", None),
        ("Leaves cover the red roof.", "A leaf covers the roof.", None),
        ("Two buses and three red glasses.", "A bus and a glass.", None),
        ("A dog stopped at a red gate.", "A dog stops at a gate.", None),
        ("A man in a red cap.", "A man in a cape.", "new_words"),
        ("A man with a red plan.", "A man with a plane.", "new_words"),
        ("A red bird sees the grass.", "A bird and its seed.", "new_words"),
        ("A red car stands there.", "A car stings there.", "new_words"),
        ("A red king stands there.", "A ring stands there.", "new_words"),
    ],
)
def test_another_form_of_a_word_is_not_new(caption, rewritten, problem):
    assert rewrite_problem(caption, rewritten, least_words=0.3) == problem


def test_the_llm_is_told_which_words_it_may_add():
    told = rewrite_prompt(CAT, ["What sleeps?"], ["something", "someone"])
    assert "put one of these words in its place: something, someone." in told
    assert "more general one" in told
    assert "in its place" not in rewrite_prompt(CAT, ["What sleeps?"])
    assert (
        rewrite_problem("A grey cat sleeps.", "An animal sleeps.", least_words=0, allowed=["something"]) == "new_words"
    )


@pytest.mark.parametrize("shot", caption_annotator._REWRITE_SHOTS)
def test_the_examples_of_rewrites_would_pass_the_check(shot):
    caption, _, _, rewritten = shot
    assert rewrite_problem(caption, rewritten, least_words=0.3) is None


CAPTION = "There is a small red star at the top. There is a large blue ring on the left."
FACTS = {"counts": {"star": 1, "ring": 2}}


def test_questions_about_a_scenes_caption_have_one_answer():
    """The picture has two rings, so only what is at its place can be asked about the one that is told of."""
    assert RULES.questions([Captioned("x", CAPTION, FACTS)]) == [
        ["Is there a star in the picture?", "What colour is the star?", "Where is the star?", "What is at the top?",
         "Is there a ring in the picture?", "What is on the left?"]
    ]  # fmt: skip
    assert RULES.questions([Captioned("x", "The picture shows some coloured shapes.", FACTS)]) == [[]]


@pytest.mark.parametrize(
    ("question", "answer", "score"),
    [
        ("Is there a star in the picture?", "Yes, there is a star on the right.", 3),
        ("Is there a star in the picture?", "No, there is no star in the picture.", 1),
        ("What colour is the star?", "The star is red.", 3),
        ("What colour is the star?", "Red or blue.", 1),
        ("What colour is the star?", "It is hidden.", 1),
        ("Where is the star?", "At the top.", 3),
        ("Where is the star?", "At the top left.", 2),
        ("Where is the star?", "At the bottom.", 1),
        ("What is at the top?", "A small red star.", 3),
        ("What is at the top?", "A large red star.", 2),
        ("What is at the top?", "A small blue star.", 1),
        ("What is at the top?", "A small red ring.", 1),
        ("What is at the top?", "Nothing.", 1),
        ("Is there a heart in the picture?", "No.", None),  # the caption does not say
        ("Who is there?", "Me.", None),
    ],
)
def test_judging_by_the_caption(question, answer, score):
    assert RULES.judge([(CAPTION, question, answer)]) == [score]


@pytest.mark.parametrize(
    ("caption", "unknown", "left"),
    [
        (CAPTION, ["Is there a star in the picture?"], "There is a large blue ring on the left."),
        (CAPTION, ["What colour is the star?"], "There is a small star at the top. There is a large blue ring on the left."),
        (CAPTION, ["Where is the star?"], "There is a small red star. There is a large blue ring on the left."),
        (CAPTION, ["What is at the top?"], "There is a small red star. There is a large blue ring on the left."),
        (CAPTION, ["What is at the top?", "Where is the star?"], "There is a large blue ring on the left."),
        ("An orange star is at the top.", ["What colour is the star?"], "A star is at the top."),
        ("At the top there is a red star.", ["Where is the star?"], "There is a red star."),
        ("The picture shows a red star at the top, a blue ring on the left and a heart on the right.",
         ["Where is the ring?", "Is there a heart in the picture?"], "The picture shows a red star at the top and a blue ring."),
        ("There is a star at the top. There is a ring on the left. The star is above the ring.", ["Where is the star?"],
         "There is a star. There is a ring on the left."),
        ("There is a star at the top. There is a star on the left.", ["What is at the top?"], "There is a star on the left."),
        ("There is a star at the top.", ["Is there a star in the picture?"], ""),
    ],
)  # fmt: skip
def test_what_is_taken_out_by_hand(caption, unknown, left):
    (reply,) = RULES.rewrite([(Captioned("x", caption, FACTS), unknown)])
    assert reply.text == left
    assert RULES.answerable([(left, question) for question in unknown]) == [False] * len(unknown)


def test_whatever_is_unknown_the_rest_stays_true_and_can_be_asked():
    for number, picture in enumerate(world.scenes("train_fair", 100, 160)):
        for caption in (language.caption(picture, number), language.description(picture, number)):
            item = Captioned(picture.id, caption, language.facts(picture))
            (questions,) = RULES.questions([item])
            unknown = [question for place, question in enumerate(questions) if (place + number) % 3 == 0]
            (reply,) = RULES.rewrite([(item, unknown)])
            assert not any(RULES.answerable([(reply.text, question) for question in unknown])), (caption, unknown)
            assert true_of(reply.text, item.facts)
            assert rewrite_problem(caption, reply.text, least_words=0) in (None, "empty_rewrite")


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_caption_is_only_rejected_where_all_of_them_have_labels(lost):
    """The second one contradicts more; without its labels the first would be taken, and without the first's it may be wrong."""
    said = ["A dog sleeps on a red towel.", "A dog runs over a red lawn."]

    class Model:
        capabilities, fingerprint = frozenset({"sample"}), "model"

        def generate(self, requests, sampling):
            return [Completion(request.id, text) for request, text in zip(requests, said, strict=True)]

    class Labeller(SceneAnnotator):
        def statements(self, items):
            labels = [["contradicted", "entailed"], ["contradicted"] * 2]
            down = Reply(refused="generation_failed", message="HTTP 503")
            return [down if place == lost else labels[place] for place, _ in enumerate(items)]

    row = Chosen(Captioned("row", CAT), "A cat sleeps on a towel.", [user_message("Describe it.")], [])
    wanted = RejectedConfig(original_share=0, num_generations=2)
    (found,) = rejected_captions([row], Model(), Labeller(), wanted, seed=0)
    if lost is None:
        assert found == Rejected(said[1], "own", 2, 2)
    else:
        assert found == Reply(refused="generation_failed", message="the statements of a caption: HTTP 503")

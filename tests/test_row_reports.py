"""`prefalign inspect` on rows that are no pairs: every response, turn and score is on the page, beside its own picture."""

import numpy as np
import pytest

from prefalign import cli
from prefalign.records import Candidates, Example, Pair, Prompt, assistant_message, user_message
from prefalign.report.rows import write_report
from prefalign.store import OutputConfig, write_records
from tests.report_page import Page, assert_self_contained, picture, pixels

ATTACK = "<script>alert('x')</script> <img src=x onerror=alert(1)>"


def response(text, **more):
    return {"text": text, "finish_reason": "stop", **more}


def candidates(number, *responses, colour="red", **more):
    asked = [user_message("What is it?", images=1)]
    return Candidates(f"c{number}", [picture(colour)], asked, list(responses), **more)


def example(number, *turns, colour="red", **meta):
    asked, *rest = turns
    speakers = (assistant_message, user_message)
    messages = [user_message(asked, images=1), *(speakers[place % 2](text) for place, text in enumerate(rest))]
    return Example(f"e{number}", [picture(colour)], messages, meta)


def folder_of(rows, folder):
    write_records("sampled", rows, output=OutputConfig(folder), record=type(rows[0]), settings={"k": 4}, seed=3)
    return folder


def page_of(rows, tmp_path, **fields):
    html = write_report(folder_of(rows, tmp_path / "rows"), tmp_path / "r.html", **fields).read_text()
    page = Page(html)
    assert_self_contained(page, html)
    return page


def test_candidates_show_each_response_with_its_scores_and_how_it_ended(tmp_path):
    graded = response("a red cat", scores={"judge/correctness": 4.0, "judge/verbosity": None, "total": -2.5})
    rows = [
        candidates(0, graded, response("a cat that", finish_reason="length"), answer="a cat"),
        candidates(1, response("two dogs", scores={"judge/correctness": 1.0, "total": 2.0}), response("a dog")),
    ]
    page = page_of(rows, tmp_path)
    assert "2 prompts with 4 responses made by sampled from 2 rows; seed 3." in page.words
    assert "Response 1 3 words \u00b7 stop a red cat correctness 4 verbosity missing total \u22122.5" in page.words
    assert "Response 2 3 words \u00b7 length a cat that Reference answer: a cat" in page.words
    assert "How responses ended stop 3 length 1" in page.words
    assert "judge/correctness 2.5 1 to 4 2 judge/verbosity none none 4 total \u22120.25 \u22122.5 to 2 2" in page.words
    assert [card["data-flags"] for card in page.all("article")] == ["unfinished|score missing", "score missing"]


def test_examples_show_the_turns_of_the_conversation(tmp_path):
    rows = [
        example(0, "What is it?", "a red cat", "And now?", "it sits still here", scores={"quality": 9.0}),
        example(1, "Which colour?", "blue", colour="blue"),
    ]
    page = page_of(rows, tmp_path)
    assert "2 examples made by sampled from 2 rows" in page.words
    said = "Prompt What is it? Assistant 3 words a red cat User 2 words And now? Assistant 4 words it sits still here quality 9"
    assert said in page.words
    assert "Answers 3 1.5 a row Median words 3 of an answer" in page.words
    assert [pixels(image["src"]).mean(axis=(0, 1)).argmax() for image in page.all("img")] == [0, 2]  # red, blue


def test_each_card_shows_its_own_picture(tmp_path):
    def shown(name, colours):
        rows = [candidates(place, response("a"), colour=colour) for place, colour in enumerate(colours)]
        return [pixels(image["src"]) for image in page_of(rows, tmp_path / name).all("img")]

    one, other = shown("one", ["red", "blue"]), shown("other", ["blue", "red"])
    assert np.abs(one[0] - other[1]).max() == 0
    assert np.abs(one[0] - other[0]).max() > 200


def test_prompts_show_the_question_and_its_reference(tmp_path):
    rows = [Prompt("p", [], [user_message("How many?")], answer="three cats", facts={"objects": ["cat"]})]
    page = page_of(rows, tmp_path)
    assert "1 prompt made by sampled from 1 row" in page.words
    assert "Prompt How many? Reference answer: three cats" in page.words
    assert "facts.objects cat" in page.words
    card = page.all("article")[0]
    assert (card["data-flags"], card["data-words"]) == ("no picture", "2")


@pytest.mark.parametrize(
    ("row", "flag"),
    [
        (candidates(0, response("a cat"), response(" ")), "empty"),
        (candidates(0, response("A cat!"), response("a  cat")), "one answer"),
        (candidates(0, response("a cat"), response("a", finished=False)), "unfinished"),
        (example(0, "What is it?"), "no answer"),
        (Example("e", [{"bytes": b"x", "path": None}], [user_message("?", 1), assistant_message("a")]), "unreadable picture"),
    ],
)  # fmt: skip
def test_flags(tmp_path, row, flag):
    page = page_of([row], tmp_path)
    assert page.all("article")[0]["data-flags"] == flag
    assert "Flagged 1 100.0 % of the rows" in page.words
    assert any(option["value"] == flag for option in page.all("option"))


def test_many_responses_fold_away_and_hostile_text_is_shown(tmp_path):
    said = [response(f"answer {place}", scores={ATTACK: 1.0}) for place in range(7)]
    page = page_of([candidates(0, *said, response(ATTACK, finish_reason=ATTACK))], tmp_path)
    assert "2 more Response 7" in page.words
    assert len(page.all("script")) == 1
    assert page.words.count(ATTACK) == 4  # the last text, its end on the card and in the count, the name of the score


def test_a_sample_is_even_and_finds_flagged_rows(tmp_path):
    rows = [candidates(place, response("" if place == 33 else "a cat")) for place in range(101)]
    page = page_of(rows, tmp_path, limit=10)
    assert [int(card["data-number"]) for card in page.all("article")] == [1, 15, 30, 34, 44, 58, 72, 87, 101]
    assert "9 of 101, evenly spaced, and 1 of them chosen because they are flagged" in page.words
    with pytest.raises(ValueError, match="limit is 0; a report shows at least one row"):
        write_report(tmp_path / "rows", tmp_path / "r.html", limit=0)


def test_inspect_tells_the_kinds_of_rows_apart(tmp_path, capsys):
    pair = Pair("p", [], [user_message("?")], [assistant_message("a")], [assistant_message("b")], "bdhs")
    rows = {"Preference pairs": pair, "Candidates": candidates(0, response("a")), "Examples": example(0, "?", "a"),
            "Prompts": Prompt("q", [], [user_message("?")])}  # fmt: skip
    for number, (title, row) in enumerate(rows.items()):
        folder = folder_of([row], tmp_path / str(number))
        assert cli.main(["inspect", str(folder)]) == 0
        assert capsys.readouterr().out == f"report: {folder}/report.html, open it in a browser\n"
        assert Page((folder / "report.html").read_text()).words.startswith(f"{number} {title} {number} ")
    assert cli.main(["inspect", str(tmp_path)]) == 1
    inside = ", ".join(str(tmp_path / str(number)) for number in range(len(rows)))
    assert (
        f"{tmp_path} holds several folders of rows, and a report is of one of them. Give one: {inside}."
        in capsys.readouterr().err
    )


def test_rows_of_no_known_kind_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = folder_of([example(0, "?", "a")], tmp_path / "rows")
    pq.write_table(pa.table({"id": ["1"], "score": [2]}), next(folder.glob("data/*.parquet")))
    with pytest.raises(ValueError, match=r"are no pairs, candidates, examples or prompts \(they have id, score\)"):
        write_report(folder, tmp_path / "r.html")

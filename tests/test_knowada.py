"""KnowAda, the stage: what is kept of each row, what an LLM may not do, and that the picture decides what is known."""

import dataclasses
import json
import re
import shutil

import pytest

from prefalign import bundled, config, knowledge
from prefalign.caption_annotator import EngineAnnotator, question_prompt, rewrite_prompt
from prefalign.engines import Completion, Sampling
from prefalign.engines.transformers import load_engine
from prefalign.images import sha256
from prefalign.knowledge import Captioned, Probing
from prefalign.models import ModelConfig
from prefalign.records import Example, Pair, Prompt, message_text
from prefalign.scenes.export import export
from prefalign.scenes.probing import SceneAnnotator
from prefalign.scenes.twins import true_of
from prefalign.stages import opened
from prefalign.store import Dropped, Failed, StoreError, read_records

ROWS = 6
SCENES = config.read_yaml(bundled.find("datagen/knowada_scenes"))
FEW = {"num_generations": 4, "threshold": 3, "least_judged": 2}
RULES = SceneAnnotator()
CAT = "A grey cat sleeps on a blue towel. Three pots stand on the sill."
CAPTION = "There is a small red star at the top. There is a large blue ring on the left."
FACTS = {"counts": {"star": 1, "ring": 2}}


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("knowada")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("knowada") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=ROWS)
    return folder


@pytest.fixture(scope="module")
def prompts(rows):
    return list(read_records(rows, Prompt))


@pytest.fixture(scope="module")
def engine():
    return load_engine(ModelConfig("scenes", device="cpu"), batch_size=64)


def settings(stage, rows, folder, **changes):
    known = {"data": {"path": rows}, "output": {"path": folder, "block_size": 4}, **FEW}
    return config.build(stage.Config, config.merge(config.merge(SCENES, known), changes))


@pytest.fixture(scope="module")
def finished(stage, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("knowada") / "out"
    manifest = stage.main(settings(stage, rows, folder))
    return folder, manifest, list(read_records(folder, Example))


def probing(**changes):
    return dataclasses.replace(Probing(4, Sampling(max_new_tokens=24, temperature=0.4), 3, 2), **changes)


def test_a_failed_generation_fails_its_row_and_leaves_the_others_where_they_are(engine, prompts):
    """The engine refuses the second question about the first picture: its other answers alone might decide otherwise."""
    items = [Captioned(prompt.id, prompt.answer, prompt.facts) for prompt in prompts[:2]]
    first, second = RULES.questions(items)
    images = [opened(prompt.images) for prompt in prompts[:2]]

    def probed(*asked):
        return knowledge.probe(engine, RULES, list(zip(items, images, asked, strict=True)), probing(), seed=0)

    failed, other = probed([first[0], "What is <image>?", *first[2:]], second)
    assert failed.refused == "generation_failed"
    assert "an answer to a question: request " in failed.message
    assert other == probed(first, second)[1]
    assert all(len(one.scores) == 4 and None not in one.scores for one in other)


def test_an_empty_answer_is_wrong_and_equal_ones_are_judged_once(engine, prompts):
    class Silent:
        capabilities, fingerprint = frozenset({"sample"}), "silent"

        def generate(self, requests, sampling):
            said = ["", "Yes.", "Yes.", " "]
            return [Completion(request.id, said[int(request.id[-1])]) for request in requests]

    class Counting(SceneAnnotator):
        asked: list = []  # noqa: RUF012

        def judge(self, items):
            self.asked += items
            return super().judge(items)

    item = Captioned("x", CAPTION, FACTS)
    (found,) = knowledge.probe(
        Silent(), Counting(), [(item, [], ["Is there a star in the picture?"])], probing(), seed=0
    )
    assert (found[0].scores, found[0].unknown) == ([1, 3, 3, 1], False)
    assert Counting.asked == [(CAPTION, "Is there a star in the picture?", "Yes.")]


def test_examples_hold_captions_without_what_is_unknown(finished, prompts):
    folder, manifest, made = finished
    assert manifest.rows_in == ROWS == manifest.rows_used + sum(manifest.dropped.values())
    assert len(made) >= 3
    given = {prompt.id: prompt for prompt in prompts}
    for row in made:
        prompt, meta = given[row.meta["parent"]], row.meta
        caption = message_text(row.messages[-1:])
        assert row.messages[:-1] == prompt.messages
        assert row.images == prompt.images
        assert meta["images_sha256"] == [sha256(image) for image in prompt.images]
        assert meta["caption"] == prompt.answer
        unknown = [one["question"] for one in meta["probes"] if one["unknown"]]
        assert meta["changed"] is bool(unknown) is (caption != prompt.answer)
        assert not any(RULES.answerable([(caption, question) for question in unknown]))
        assert true_of(caption, prompt.facts)
        for one in meta["probes"]:
            assert one["unknown"] is (sum(score == 1 for score in one["scores"]) >= 3)
            assert one["scores"] == RULES.judge([(prompt.answer, one["question"], answer) for answer in one["answers"]])
        assert meta["generator"] == manifest.models["generator"] != ""
        assert (meta["annotator"], meta["settings"]["threshold"]) == ("scenes-rules-1", 3)
        assert meta["settings"]["sampling"]["temperature"] == 0.4
    assert manifest.config["settings"]["threshold"] == 3
    found = json.loads((folder / "knowledge.json").read_text())
    probes = [one for row in made for one in row.meta["probes"]]
    assert found["rows"] == len(made)
    assert found["unknown"] == pytest.approx(sum(one["unknown"] for one in probes) / len(probes), abs=1e-4)
    assert found["undecided"] == found["missing_scores"] == 0


def test_a_stopped_run_ends_with_the_same_rows(stage, rows, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    for name in ("manifest.json", "knowledge.json", "progress/00001.json", "data/train-00001.parquet"):
        (tmp_path / "out" / name).unlink()
    assert stage.main(settings(stage, rows, tmp_path / "out")) == finished[1]
    assert list(read_records(tmp_path / "out", Example)) == finished[2]


def test_the_picture_decides_what_is_unknown(engine, prompts):
    """One caption, two pictures: more of it is unknown of the wrong one."""
    unknown = []
    for shift in (0, 1):
        asked = []
        for place, prompt in enumerate(prompts):
            item = Captioned(prompt.id, prompt.answer, prompt.facts)
            other = prompts[(place + shift) % ROWS]
            asked.append((item, opened(other.images), RULES.questions([item])[0]))
        unknown.append([one.unknown for row in knowledge.probe(engine, RULES, asked, probing(), seed=0) for one in row])
    assert unknown[0] != unknown[1]
    assert sum(unknown[1]) > sum(unknown[0])


def test_pairs_prefer_adapted_captions_to_contradicted_ones_of_equal_length(stage, engine, prompts, rows, tmp_path):
    known = settings(stage, rows, tmp_path, produce="pairs", rejected={"original_share": 0, "num_generations": 6})
    outcomes = stage.process(prompts, engine, RULES, known)
    pairs = [row for outcome in outcomes if not isinstance(outcome, Dropped) for row in outcome]
    assert len(pairs) >= 2
    for pair in pairs:
        pair.check()
        chosen, rejected = message_text(pair.chosen), message_text(pair.rejected)
        assert pair.meta["rejected_kind"] == "own"
        assert pair.meta["contradicted"] >= 1
        assert true_of(chosen, pair.facts)
        assert not true_of(rejected, pair.facts)
        assert 0.67 <= len(rejected.split()) / len(chosen.split()) <= 1.5
    # the original where it is asked for and of that length
    known = settings(stage, rows, tmp_path, produce="pairs", rejected={"original_share": 1, "length_ratio": [0.1, 10]})
    pairs = [
        row
        for outcome in stage.process(prompts, engine, RULES, known)
        for row in ([] if isinstance(outcome, Dropped) else outcome)
    ]
    changed = [pair for pair in pairs if pair.meta["changed"]]
    assert changed
    assert all(message_text(pair.rejected) == pair.meta["caption"] for pair in changed)
    assert {pair.meta["rejected_kind"] for pair in changed} == {"original"}
    assert isinstance(pairs[0], Pair)


class Script:
    """An LLM whose replies are written down: by row for questions and rewrites, by a function for judgements."""

    capabilities, fingerprint = frozenset({"sample"}), "script"

    def __init__(self, replies, grade=lambda text: "1", answerable="no"):
        self.replies, self.grade, self.answerable, self.asked = replies, grade, answerable, []

    def generate(self, requests, sampling):
        self.asked += requests
        return [self._reply(request) for request in requests]

    def _reply(self, request):
        text = message_text(request.messages)
        assert not request.images
        if text.endswith("Grade:"):
            reply = self.grade(text)
        elif text.endswith("Reply:"):
            reply = self.answerable
        else:
            reply = self.replies[request.id]
        return reply if isinstance(reply, Completion) else Completion(request.id, reply)


def llm_rows(prompts, count):
    return [dataclasses.replace(prompt, id=f"row{number}", answer=CAT) for number, prompt in enumerate(prompts[:count])]


ASKED = "Question: What colour is the towel?\nQuestion: What animal sleeps?"
GOOD = "'blue' goes.\nNEW CAPTION: A grey cat sleeps on a towel. Three pots stand on the sill."


def test_an_llm_asks_judges_and_rewrites_each_row_by_itself(stage, engine, prompts, rows, tmp_path):
    """Questions, rewrites and failures stay with their rows; a failed rewrite does not get another row's text."""
    failed = Completion("", "", finish_reason="error", error="the server is down")
    script = Script(
        {
            "row0/questions": ASKED, "row0/rewrite": GOOD,
            "row1/questions": ASKED, "row1/rewrite": failed,
            "row2/questions": "I see no question.",
            "row3/questions": ASKED, "row3/rewrite": "A cat.",
            "row4/questions": failed,
            "row5/questions": ASKED, "row5/rewrite": Completion("", GOOD, finish_reason="length"),
        },
        grade=lambda text: "1" if "towel?" in text else "3",
    )  # fmt: skip
    known = settings(stage, rows, tmp_path)
    outcomes = stage.process(llm_rows(prompts, 6), engine, EngineAnnotator(script, allowed_words=["thing"]), known)
    (made,) = outcomes[0]
    assert message_text(made.messages[-1:]) == "A grey cat sleeps on a towel. Three pots stand on the sill."
    assert [(one["question"], one["scores"], one["unknown"]) for one in made.meta["probes"]] == [
        ("What colour is the towel?", [1, 1, 1, 1], True), ("What animal sleeps?", [3, 3, 3, 3], False)]  # fmt: skip
    assert outcomes[1:] == [
        Failed("generation_failed", "the server is down"), Dropped("no_questions"), Dropped("unreadable"),
        Failed("generation_failed", "the server is down"), Dropped("cut_off")]  # fmt: skip
    rewrite = next(message_text(one.messages) for one in script.asked if one.id == "row0/rewrite")
    assert "put one of these words in its place: thing." in rewrite
    assert rewrite.endswith(f"Caption: {CAT}\nQuestions:\n1. What colour is the towel?")


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ({"answerable": "Yes"}, Dropped("still_answerable")),
        (
            {"answerable": "I cannot say"},
            Failed("unchecked_rewrite", "whether the rewrite still answers a question got neither yes nor no."),
        ),
        (
            {"grade": lambda text: "-1"},
            Failed(
                "unjudged",
                "no question has 2 answers with a grade: of 8 answers 8 have no readable one. Does the LLM reply with 1, 2 or 3?",
            ),
        ),
        ({"rewrite": "NEW CAPTION: A grey cat sleeps on a red towel."}, Dropped("new_words")),
        ({"rewrite": "NEW CAPTION:"}, Dropped("empty_rewrite")),
        ({"rewrite": f"NEW CAPTION: {CAT}"}, Dropped("unchanged_rewrite")),
    ],
)
def test_what_an_llm_may_not_do(stage, engine, prompts, rows, tmp_path, script, outcome):
    replies = {"row0/questions": ASKED, "row0/rewrite": script.pop("rewrite", GOOD)}
    annotator = EngineAnnotator(Script(replies, **script))
    assert stage.process(llm_rows(prompts, 1), engine, annotator, settings(stage, rows, tmp_path)) == [outcome]


DOWN = Completion("", "", finish_reason="error", error="HTTP 503")


def test_a_judgement_that_could_not_be_asked_for_is_no_missing_grade(stage, engine, prompts, rows, tmp_path):
    """The other question has its grades, so the row would be decided without what the server did not say."""
    other = "Question: What animal sleeps?\nQuestion: What stands on the sill?"
    replies = {"row0/questions": ASKED, "row0/rewrite": GOOD, "row1/questions": other}
    known = settings(stage, rows, tmp_path)

    def outcomes(**script):
        return stage.process(llm_rows(prompts, 2), engine, EngineAnnotator(Script(replies, **script)), known)

    failed, (made,) = outcomes(grade=lambda text: DOWN if "towel?" in text else "3")
    assert failed == Failed("generation_failed", "the grade of an answer: HTTP 503")
    assert [one["scores"] for one in made.meta["probes"]] == [[3] * 4] * 2
    unchecked, again = outcomes(grade=lambda text: "1" if "towel?" in text else "3", answerable=DOWN)
    assert unchecked == Failed("generation_failed", "the check of a rewrite: HTTP 503")
    assert again == [made]


def test_a_caption_that_is_known_stays_and_no_rewrite_is_asked_for(stage, engine, prompts, rows, tmp_path):
    script = Script({"row0/questions": ASKED}, grade=lambda text: "3")
    ((made,),) = stage.process(llm_rows(prompts, 1), engine, EngineAnnotator(script), settings(stage, rows, tmp_path))
    assert message_text(made.messages[-1:]) == CAT
    assert made.meta["changed"] is False


class Captioner:
    """A model that answers every question wrongly, and says of its own captions what it is told; None: it fails."""

    capabilities, fingerprint = frozenset({"sample"}), "captioner"

    def __init__(self, captions):
        self.captions = captions

    def generate(self, requests, sampling):
        return [self._said(request.id) for request in requests]

    def _said(self, name):
        if "/own/" not in name:
            return Completion(name, "Green.")
        text = self.captions[int(name[-1]) % len(self.captions)]
        return (
            Completion(name, "", finish_reason="error", error="it is down") if text is None else Completion(name, text)
        )


FALSE = "A black dog runs over a green lawn. Two cups stand on it."


@pytest.mark.parametrize(
    ("captions", "statements", "outcome"),
    [
        ([None], "", Failed("generation_failed", "a caption of its own: it is down")),
        ([FALSE], "Contradicted: a dog.", None),
        ([None, FALSE], "Contradicted: a dog.", Failed("generation_failed", "a caption of its own: it is down")),
        ([FALSE, None], "Entailed: a dog.", Failed("generation_failed", "a caption of its own: it is down")),
        ([FALSE], None, Failed("generation_failed", "the statements of a caption: the server is down")),
        ([FALSE], "Entailed: a dog.", Dropped("no_rejected")),
        ([FALSE], "Nothing to read", Dropped("no_rejected")),
    ],
)
def test_a_rejected_answer_that_could_not_be_generated_is_a_failure(
    stage, prompts, rows, tmp_path, captions, statements, outcome
):
    """Which caption of a row is the most contradicted is unknown then, so it is neither dropped for good nor taken."""

    class Judging(EngineAnnotator):
        def statements(self, items):
            reply = (
                Completion("", "", finish_reason="error", error="the server is down")
                if statements is None
                else statements
            )
            self.engine.replies |= {f"{item.id}/statements/{place}": reply for place, (item, _) in enumerate(items)}
            return super().statements(items)

    annotator = Judging(
        Script({"row0/questions": ASKED, "row0/rewrite": GOOD}, grade=lambda text: "1" if "towel?" in text else "3")
    )
    known = settings(stage, rows, tmp_path, produce="pairs", rejected={"original_share": 0, "num_generations": 2})
    (found,) = stage.process(llm_rows(prompts, 1), Captioner(captions), annotator, known)
    if outcome is not None:
        assert found == outcome
    else:
        assert message_text(found[0].rejected) == FALSE


def test_judgements_are_kept_by_caption_question_and_answer(tmp_path):
    items = [(CAT, "What sleeps?", "A cat."), (CAT, "What sleeps?", "A dog."), (CAT, "What sleeps?", "A cat."),
             ("A dog sleeps.", "What sleeps?", "A cat.")]  # fmt: skip

    def grade(text):
        return "3" if ("cat sleeps" in text) is ("Answer: A cat." in text) else "1"

    first = EngineAnnotator(Script({}, grade), cache=tmp_path / "judgements.sqlite")
    assert first.judge(items) == [3, 1, 3, 1]
    assert first.judging.counts["asked"] == 3
    again = EngineAnnotator(Script({}, lambda text: "2"), cache=tmp_path / "judgements.sqlite")
    assert again.judge(items) == [3, 1, 3, 1]
    assert (again.judging.counts["asked"], again.engine.asked) == (0, [])


def test_prompts_hold_caption_question_and_answer_and_nothing_unfilled():
    script = Script({}, lambda text: "3")
    EngineAnnotator(script).judge([("A {red} cat.", "What {colour}?", "None")])
    asked = message_text(script.asked[0].messages)
    assert asked.endswith("Caption: A {red} cat.\n\nQuestion: What {colour}?\n\nAnswer: None\n\nGrade:")
    for prompt in (question_prompt(CAT), rewrite_prompt(CAT, ["What?"])):
        assert CAT in prompt
        assert not re.search(r"\{\w+\}", prompt)


def test_statements_are_counted_from_their_labels():
    replies = {"x/statements/0": "Entailed: a cat.\nContradicted: a dog.", "x/statements/1": "None of them."}
    found = EngineAnnotator(Script(replies)).statements(
        [(Captioned("x", CAT), "A cat. A dog."), (Captioned("x", CAT), "Hm.")]
    )
    assert found[0] == ["entailed", "contradicted"]
    assert found[1].refused == "unreadable"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotator": "engine"}, "annotator is `engine`, and no LLM is named to write questions"),
        ({"threshold": 5}, "threshold is 5 of 4 answers, so every question would be unknown or none"),
        ({"least_judged": 0}, "least_judged is 0 of 4 answers; give 1 up to num_generations"),
        (
            {"sampling": {"temperature": 0}},
            "temperature is 0, so all 4 answers to a question would be the same greedy one",
        ),
        ({"least_words": 1.0}, "least_words is 1.0; it is a share of a caption's words below 1"),
        ({"rejected": {"original_share": 2}}, "original_share is 2.0; it is a share of rows from 0 to 1"),
        ({"rejected": {"num_generations": 0}}, "rejected.num_generations is 0; give 1 or more"),
        (
            {"rejected": {"length_ratio": [1.2, 2]}},
            r"length_ratio is \[1.2, 2.0\], and captions of equal length are outside",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(stage, rows, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(stage, rows, tmp_path, **changes)


def test_the_probed_model_is_loaded_once_if_it_annotates_too(stage, engine, rows, tmp_path):
    known = settings(stage, rows, tmp_path, annotator="engine", llm=SCENES["model"])
    made = stage.load_annotator(known, engine)
    assert made.engine is engine
    assert made.allowed_words == known.allowed_words == ["object", "something", "someone", "thing"]
    other = settings(stage, rows, tmp_path, annotator="engine", llm={**SCENES["model"], "dtype": "float32"})
    assert stage.load_annotator(other, engine).engine is not engine


def test_a_real_model_is_asked_as_annotator(stage, rows, tmp_path):
    """The tiny model takes text alone, but cannot write questions: that is said, and nothing is made up for it."""
    known = settings(
        stage, rows, tmp_path / "out", annotator="engine", llm=SCENES["model"], data={"limit": 1}, max_new_tokens=8
    )
    with pytest.raises(StoreError, match="knowada made no row out of 1: 1 no_questions"):
        stage.main(known)


@pytest.mark.parametrize("name", ["knowada", "knowada_scenes"])
def test_configs_run(stage, name, rows, tmp_path):
    changes = {"model": {"model_name_or_path": "scenes", "dtype": "auto", "device": "cpu"}, "annotator": "rules",
               "data": {"path": rows, "images": None, "limit": 2}, "output": {"path": tmp_path / "out"},
               "sampling": {"max_new_tokens": 24}, "least_words": 0.0, **FEW}  # fmt: skip
    values = config.merge(config.read_yaml(bundled.find(f"datagen/{name}")), changes)
    manifest = stage.main(config.build(stage.Config, values))
    assert manifest.rows_in == 2 == manifest.rows_used + sum(manifest.dropped.values())

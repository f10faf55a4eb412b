"""Quality pairs on the embedded world: answers graded once, the gap rule, exports of the same grades, the judge's agreement."""

import dataclasses
import json
import re
import shutil
from collections import Counter

import pytest

from prefalign import bundled, config, running, selecting
from prefalign.engines import Completion
from prefalign.engines.transformers import load_engine
from prefalign.execution import Options, Shard
from prefalign.images import encode_png, open_image
from prefalign.judge import RUBRIC
from prefalign.manifest import read_manifest
from prefalign.models import ModelConfig
from prefalign.records import Candidates, Example, Pair, Prompt, message_text, user_message
from prefalign.rewards import Response, read_rewards, second_grades
from prefalign.scenes.export import export
from prefalign.scenes.grades import five, grades
from prefalign.store import Dropped, Failed, StoreError, read_records
from tests.graders import FIVE, ROWS, Grader, settings
from tests.tiny_vlms import picture

TEXTS = ("A grey cat sleeps on a red mat.", "There is a cat.", "I see two dogs that play with a ball.", "Nothing.")


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("quality_pairs")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=ROWS)
    return folder


@pytest.fixture(scope="module")
def engine():
    return load_engine(ModelConfig("scenes", device="cpu"), batch_size=32)


@pytest.fixture(scope="module")
def graded(stage, rows, tmp_path_factory):
    """A run with a fickle judge: folder, manifest, judge."""
    folder = tmp_path_factory.mktemp("quality") / "out"
    grader = Grader(list(read_records(rows, Prompt)), fickle=True)
    return folder, stage.main(settings(stage, rows, folder, grader)), grader


def test_every_answer_is_graded_once_and_a_share_of_them_twice(graded, rows):
    folder, manifest, grader = graded
    made = list(read_records(folder / "answers", Candidates))
    prompts = list(read_records(rows, Prompt))
    assert manifest.rows_in == ROWS == manifest.rows_out == len(made)
    assert manifest.models["judge"].startswith("grader/grades-")
    answers = [response for row in made for response in row.responses]
    assert len(answers) == 4 * ROWS
    again = [response for response in answers if "regraded" in response]
    assert 0 < len(again) < len(answers)
    # equal answers to one prompt are one question
    once = {(row.id, response["text"]) for row in made for response in row.responses}
    twice = {(row.id, response["text"]) for row in made for response in row.responses if "regraded" in response}
    assert len(grader.requests) == len(once) + len(twice)
    for row, prompt in zip(made, prompts, strict=True):
        assert (row.images, row.messages, row.facts) == (prompt.images, prompt.messages, prompt.facts)
        for response in row.responses:
            assert all(response["scores"][name] in (0, 1, 2, 3, 4) for name in FIVE)
            assert set(response.get("regraded", FIVE)) == set(FIVE)
    kept = (folder / "judge.sqlite").read_bytes()
    assert b'"helpfulness": ' in kept  # replies as they were given


def test_pairs_best_answers_and_steerlm_rows_are_made_of_the_same_grades(graded):
    folder, _, grader = graded
    asked = len(grader.requests)
    made = {row.id: row for row in read_records(folder / "answers", Candidates)}
    quality = {name: [sum(r["scores"][term] for term in FIVE[:3]) for r in row.responses] for name, row in made.items()}
    pairs, best, steer = (list(read_records(folder / name, kind)) for name, kind in
                          (("pairs", Pair), ("best", Example), ("steerlm", Example)))  # fmt: skip
    assert len(pairs) == sum(max(values) - min(values) >= 2 for values in quality.values()) > 0
    for pair in pairs:
        values = quality[pair.meta["parent"]]
        assert pair.method == "quality_pairs"
        assert pair.meta["chosen_index"] == values.index(max(values))
        assert values[pair.meta["rejected_index"]] <= max(values) - 2
        assert pair.margin == max(values) - values[pair.meta["rejected_index"]]
        assert pair.images == made[pair.meta["parent"]].images
    assert [example.meta["quality"] for example in best] == [max(values) for values in quality.values()]
    for example in steer:
        scores = made[example.meta["parent"]].responses[example.meta["index"]]["scores"]
        line = ",".join(f"{name.split('/')[1]}:{scores[name]:.0f}" for name in FIVE)
        assert example.meta["attributes"] in (None, f"<attributes>{line}</attributes>")
    assert len(grader.requests) == asked


def test_a_finished_run_asks_nothing_and_an_export_can_be_added(stage, rows, graded, tmp_path, capsys):
    shutil.copytree(graded[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "steerlm")
    quiet = Grader([])
    assert stage.main(settings(stage, rows, tmp_path / "out", quiet)) == graded[1]
    assert quiet.requests == []
    assert list(read_records(tmp_path / "out" / "steerlm", Example)) == list(
        read_records(graded[0] / "steerlm", Example)
    )
    assert (tmp_path / "out" / "quality.json").read_bytes() == (graded[0] / "quality.json").read_bytes()
    assert "quality_pairs/pairs: {'rows': " in capsys.readouterr().err
    with pytest.raises(StoreError, match=r"settings.pairs.min_gap: 2.0 -> 3.0"):
        stage.main(settings(stage, rows, tmp_path / "out", quiet, pairs={"min_gap": 3.0}))


def test_a_stopped_run_ends_with_the_same_rows(stage, rows, graded, tmp_path):
    shutil.copytree(graded[0], tmp_path / "out")
    for name in ("pairs", "best", "steerlm"):
        shutil.rmtree(tmp_path / "out" / name)
    for name in ("quality.json", "judge.sqlite", *(f"answers/{name}" for name in
                 ("manifest.json", "progress/00001.json", "data/train-00001.parquet"))):  # fmt: skip
        (tmp_path / "out" / name).unlink()
    grader = Grader(list(read_records(rows, Prompt)), fickle=True)
    assert stage.main(settings(stage, rows, tmp_path / "out", grader)) == graded[1]
    assert 0 < len(grader.requests) < len(graded[2].requests)
    for name, kind in (("answers", Candidates), ("pairs", Pair), ("best", Example), ("steerlm", Example)):
        assert list(read_records(tmp_path / "out" / name, kind)) == list(read_records(graded[0] / name, kind))
    assert (tmp_path / "out" / "quality.json").read_bytes() == (graded[0] / "quality.json").read_bytes()


def test_processes_that_share_a_folder_share_no_file_of_replies(stage, rows, tmp_path):
    grader = Grader(list(read_records(rows, Prompt)))
    known = settings(stage, rows, tmp_path / "out", grader, sampling={"max_new_tokens": 8}, exports=[])
    for number in (1, 0):
        running.run("quality_pairs", stage, known, Options(Shard(number, 2)))
    assert read_manifest(tmp_path / "out" / "answers").rows_out == ROWS
    assert not list((tmp_path / "out").glob("*.sqlite*"))
    named = [{**known.rewards[0], "cache": str(tmp_path / "mine.sqlite")}]
    once = dataclasses.replace(known, rewards=named, output=dataclasses.replace(known.output, path=tmp_path / "named"))
    running.run("quality_pairs", stage, once, Options(Shard(0, 2)))
    assert (tmp_path / "mine.sqlite").is_file()


def test_figures_say_what_was_dropped_and_how_far_the_judge_agrees_with_itself(graded):
    folder = graded[0]
    found = json.loads((folder / "quality.json").read_text())
    manifest = read_manifest(folder / "pairs")
    assert found["pairs"]["dropped"] == manifest.dropped
    assert found["pairs"]["rows"] + sum(manifest.dropped.values()) == ROWS
    assert found["policies"]["random"]["margin"] == found["pairs"]["margin"]
    assert found["policies"]["worst"]["margin"] >= found["policies"]["random"]["margin"]
    assert found["policies"]["nearest"]["margin"] <= found["policies"]["random"]["margin"]
    twice = [r for row in read_records(folder / "answers", Candidates) for r in row.responses if "regraded" in r]
    assert set(found["agreement"]) == set(FIVE)
    for name, figures in found["agreement"].items():
        assert figures["answers"] == len(twice)
        assert figures["missing"] == 0
        assert figures["equal"] == round(sum(r["scores"][name] == r["regraded"][name] for r in twice) / len(twice), 4)
    assert min(figures["equal"] for figures in found["agreement"].values()) < 1  # it is fickle


def scored(qualities, texts=TEXTS):
    """Answers whose three grades add up to these qualities; None: not graded."""

    def parts(value):
        return [min(4, max(0, value - 4 * place)) for place in range(3)]

    answers = [
        {"text": text, "finish_reason": "stop", "scores": dict.fromkeys(FIVE)
         if quality is None else {**dict.fromkeys(FIVE, 2), **dict(zip(FIVE, parts(quality), strict=False))}}
        for quality, text in zip(qualities, texts, strict=False)
    ]  # fmt: skip
    return Candidates("row", [encode_png(picture(0), "0.png")], [user_message("What is it?", 1)], answers)


def test_the_published_rule_on_worked_grades(stage):
    """[12, 11, 10, 4]: chosen 12, rejected 10 or 4, as often; [9, 8, 8, 8]: none; a group of 3: none."""
    published = config.read_yaml(bundled.find("datagen/quality_pairs"))
    known = config.build(stage.Config, published)
    rules = stage.rules_of(known, "pairs")

    def drawn(seed):
        [pair] = selecting.outcome(scored((12, 11, 10, 4)), dataclasses.replace(rules, seed=seed))
        assert message_text(pair.chosen) == TEXTS[0]
        return pair.meta["rejected_index"]

    counts = Counter(drawn(seed) for seed in range(100))
    assert set(counts) == {2, 3}
    assert 30 <= counts[2] <= 70
    assert selecting.outcome(scored((9, 8, 8, 8)), rules) == Dropped("small_gap")
    assert selecting.outcome(scored((12, 10, 4)), rules) == Dropped("group_size")
    assert selecting.outcome(scored((12, 10, 4, None)), rules) == Dropped("group_size")
    [pair] = selecting.outcome(scored((4, 9, 11, 11)), rules)
    assert message_text(pair.chosen) == TEXTS[2]  # the first on ties
    best = stage.rules_of(known, "best")
    assert [one.meta["quality"] for one in selecting.outcome(scored((12, 11, 10, 4)), best)] == [12]
    assert selecting.outcome(scored((11, 11, 10, 4)), best) == Dropped("low_quality")
    line = "<attributes>helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2</attributes>"
    steer = selecting.outcome(scored((12, 11, 10, 4)), stage.rules_of(known, "steerlm"))
    assert len(steer) == 4
    assert steer[0].meta["attributes"] in (line, None)


FACTS = {
    "objects": [{"shape": "circle", "colour": "red", "size": "large", "place": "top left"},
                {"shape": "star", "colour": "blue", "size": "small", "place": "right"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There is a large red circle at the top left. There is a small blue star on the right.", (4, 4, 4, 4, 2)),
        ("There is a large red circle at the top left.", (2, 4, 4, 4, 1)),
        ("There is a large red circle at the top left. There is a small green star on the right.", (2, 3, 4, 4, 2)),
        ("There is a heart on the right.", (0, 3, 4, 1, 1)),
        (
            " ".join(f"There is a {shape} on the right." for shape in ("heart", "ring", "cross", "disc", "box")),
            (0, 0, 4, 1, 4),
        ),
        ("It is a sunny day. There is a small blue star on the right.", (2, 4, 2, 4, 1)),
        ("A red circle is at the top left. A red circle is at the top left.", (2, 4, 2, 3, 2)),
        ("Hello.", (0, 0, 0, 0, 0)),
    ],
)
def test_grades_by_the_truth_of_a_scene(text, expected):
    assert tuple(grades(text, FACTS).values()) == expected
    given = five([Response("", [], [], text, facts=FACTS), Response("", [], [], text)])
    assert list(given.values()) == [[grade, None] for grade in expected]


def test_a_grade_between_two_is_the_higher_one():
    shapes = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
    facts = {"objects": [{"shape": s, "colour": "red", "size": "large", "place": "top"} for s in shapes]}
    said = [f"There is a {shape} at the top." for shape in shapes]
    found = [grades(" ".join(said[:count]), facts)["helpfulness"] for count in range(1, 9)]
    assert found == [1, 1, 2, 2, 3, 3, 4, 4]  # 4 times 1/8, 2/8, ...


def test_on_scenes_rejected_captions_are_worse_by_the_truth(stage, rows, tmp_path):
    stage.main(settings(stage, rows, tmp_path / "out"))
    pairs = list(read_records(tmp_path / "out" / "pairs", Pair))
    assert len(pairs) >= 4
    for pair in pairs:
        sides = [grades(message_text(side), pair.facts) for side in (pair.chosen, pair.rejected)]
        assert pair.margin == sum(sides[0][name] - sides[1][name] for name in list(RUBRIC)[:3]) >= 2


def test_the_judge_sees_the_picture(stage, engine, rows, tmp_path):
    """The same answers on another picture are graded as that picture shows: what is true of one is false of the other."""
    one, other = list(read_records(rows, Prompt))[:2]
    grader = Grader([one, other])
    known = settings(stage, rows, tmp_path, grader, regrade=0.0)
    rewards = read_rewards(known.rewards)
    from prefalign.rewards import stored

    [[row]] = stage.process([one], engine, rewards, None, known)
    grades = [[r["scores"]["judge/correctness"] for r in row.responses]]
    [swapped] = stored.score_rows([(row, [open_image(other.images[0])])], rewards)
    grades.append([r["scores"]["judge/correctness"] for r in swapped.responses])
    assert grades[0] != grades[1]
    assert sum(grades[0]) > sum(grades[1])
    drawn = stage.process([dataclasses.replace(one, images=other.images)], engine, rewards, None, known)[0][0]
    assert [r["text"] for r in drawn.responses] != [r["text"] for r in row.responses]  # and so does the generator


def test_what_the_judge_does_not_say_is_missing_and_never_a_default(stage, engine, rows, tmp_path):
    prompt = next(iter(read_records(rows, Prompt)))
    first = settings(stage, rows, tmp_path, Grader([prompt]), regrade=0.0)
    [[row]] = stage.process([prompt], engine, read_rewards(first.rewards), None, first)
    mute = Grader([prompt], mute=(row.responses[1]["text"],))
    known = settings(stage, rows, tmp_path, mute, regrade=1.0)
    rewards = read_rewards(known.rewards)
    [[again]] = stage.process([prompt], engine, rewards, second_grades.asked_again(rewards), known)
    assert again.responses[1]["scores"] == dict.fromkeys((*FIVE, "total"))
    assert again.responses[1]["regraded"] == dict.fromkeys(FIVE)
    asked = [message_text(request.messages) for request in mute.requests]
    assert sum(f"Answer to grade:\n{row.responses[1]['text']}\n" in text for text in asked) == 6  # three times, twice
    assert selecting.outcome(again, stage.rules_of(known, "pairs")) == Dropped("group_size")


def test_second_grades_that_no_judge_gave_are_missing_and_the_first_ones_count(stage, engine, rows, tmp_path):
    prompt = next(iter(read_records(rows, Prompt)))

    class Tired(Grader):
        def generate(self, requests, sampling):
            if not self.requests:
                return super().generate(requests, sampling)
            return [Completion(request.id, "", finish_reason="error", error="HTTP 503") for request in requests]

    known = settings(stage, rows, tmp_path, Tired([prompt]), regrade=1.0)
    rewards = read_rewards(known.rewards)
    [[row]] = stage.process([prompt], engine, rewards, second_grades.asked_again(rewards), known)
    assert all(None not in response["scores"].values() for response in row.responses)
    assert [response["regraded"] for response in row.responses] == [dict.fromkeys(FIVE)] * len(row.responses)


def test_the_second_question_asks_in_another_order(stage, engine, rows, tmp_path):
    prompt = next(iter(read_records(rows, Prompt)))
    grader = Grader([prompt])
    known = settings(stage, rows, tmp_path, grader, regrade=1.0, num_generations=1, pairs={"group_size": None})
    rewards = read_rewards(known.rewards)
    stage.process([prompt], engine, rewards, second_grades.asked_again(rewards), known)
    orders = [re.findall(r'"(\w+)": <0-4>', message_text(request.messages)) for request in grader.requests]
    assert len(orders) == 2
    assert orders[0] == orders[1][::-1]


@pytest.mark.parametrize("told", [False, True])
def test_a_judge_can_be_told_what_is_known(stage, engine, rows, tmp_path, told):
    prompt = next(iter(read_records(rows, Prompt)))
    grader = Grader([prompt])
    known = settings(stage, rows, tmp_path, grader, regrade=0.0)
    rewards = read_rewards([{**known.rewards[0], "facts": told}])
    stage.process([prompt], engine, rewards, None, known)
    assert all((prompt.facts["captions"][0] in message_text(one.messages)) is told for one in grader.requests)


def test_rows_that_cannot_be_shown_fail_alone(stage, engine, rows, tmp_path):
    row = next(iter(read_records(rows, Prompt)))
    broken = dataclasses.replace(row, id="broken", images=[{"bytes": b"no picture", "path": "x.png"}])
    marked = dataclasses.replace(row, id="marked", messages=[user_message("Is <image> here?", 1)])
    known = settings(stage, rows, tmp_path, Grader([row]), regrade=0.5)
    rewards = read_rewards(known.rewards)
    outcomes = stage.process([broken, row, marked], engine, rewards, second_grades.asked_again(rewards), known)
    assert isinstance(outcomes[0], Failed)
    assert outcomes[2].reason == "generation_failed"
    assert len(outcomes[1][0].responses) == 4


def test_an_export_that_nothing_qualifies_for_is_left_out(stage, rows, tmp_path, capsys):
    known = settings(
        stage, rows, tmp_path / "out", best={"min_quality": 13}, exports=["best", "steerlm"], data={"limit": 2}
    )
    stage.main(known)
    assert not (tmp_path / "out" / "best").exists()
    assert "no answer qualifies for best (2 low_quality)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "quality.json").read_text())["best"] == {"rows": 0, "drop_rate": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_generations": 0}, "num_generations is 0; give 1 or more"),
        ({"sampling": {"temperature": 0}}, "would be the same greedy one"),
        ({"num_generations": 3}, "pairs.group_size is 4 and num_generations 3: no prompt would have so many"),
        ({"regrade": 2}, "regrade is 2.0; it is a share of the answers"),
        ({"quality": dict.fromkeys(FIVE[:3], 0)}, "quality weighs no score"),
        ({"steerlm": {"attributes": []}}, "steerlm.attributes is empty"),
    ],
)
def test_settings_that_make_no_sense_are_refused(stage, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(stage, **changes)


def test_names_and_second_grades_that_no_reward_gives_are_refused(stage, rows, tmp_path):
    with pytest.raises(ValueError, match="regrade asks for second grades, and judge would say the same again"):
        stage.main(settings(stage, rows, tmp_path, regrade=0.1))
    with pytest.raises(ValueError, match="quality names the score 'judges/total', which the rewards do not give"):
        stage.main(settings(stage, rows, tmp_path, quality={"judges/total": 1.0}))
    grader = Grader(list(read_records(rows, Prompt)))
    with pytest.raises(
        ValueError,
        match="quality names the score 'judge/helpfullness', which the rewards do not give.*did you mean 'judge/helpfulness'",
    ):
        stage.main(settings(stage, rows, tmp_path, grader, quality={"judge/helpfullness": 1.0}))
    with pytest.raises(
        ValueError, match="steerlm.attributes names the score 'judge/tone', which the rewards do not give: all answers"
    ):
        stage.main(settings(stage, rows, tmp_path, grader, steerlm={"attributes": ["judge/tone"]}))
    assert grader.requests == []
    assert not list(tmp_path.glob("*/progress/*"))
    one = read_rewards([{"name": "judge", "engine": Grader([]), "attributes": ["correctness"]}])
    with pytest.raises(
        ValueError, match="the judge grades correctness alone, so it would be asked the same question again"
    ):
        second_grades.asked_again(one)


@pytest.mark.parametrize(("reward", "term"), [({"name": "objects"}, "invented"), ({"name": "symbolic"}, "correct")])
def test_rules_grade_as_well_and_their_names_are_looked_at_before_anything_is_drawn(
    stage, rows, tmp_path, reward, term
):
    known = {"rewards": [reward], "regrade": 0.0, "exports": [], "data": {"limit": 1}}
    label = reward["name"]
    right = settings(stage, rows, tmp_path / "out", **known)
    right = dataclasses.replace(right, quality={f"{label}/{term}": 1.0, "total": 1.0})
    wrong = dataclasses.replace(right, quality={f"{label}/{term[:-1]}": 1.0})
    with pytest.raises(ValueError, match=rf"do not give: all answers would .*did you mean '{label}/{term}'"):
        stage.main(wrong)
    assert not (tmp_path / "out").exists()
    assert stage.main(right).rows_out == 1


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"quality": {"judge/helpfullness": 1.0}}, "quality"),
        ({"steerlm": {"attributes": ["judge/helpfullness"]}}, "steerlm.attributes"),
    ],
)
def test_a_score_that_a_function_does_not_give_stops_the_first_block(stage, rows, tmp_path, changes, where):
    """What a function returns is not known before it is called; then one block is enough to see it."""
    with pytest.raises(
        ValueError,
        match=rf"{where} names the score 'judge/helpfullness', and the rewards gave judge/coherence, .*, total: no answer would "
        "make a pair.*Stopped at the first block.*judge/helpfulness",
    ):
        stage.main(settings(stage, rows, tmp_path / "out", **changes))
    assert not list(tmp_path.glob("out/answers/progress/*"))
    assert (
        stage.main(settings(stage, rows, tmp_path / "out", data={"limit": 2})).rows_out == 2
    )  # the folder is not spoilt

"""Clinical rules: a label table over pictures and scenes rules, orders, hints, wrong answers, and what the rules say of them."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter

import pytest

from prefalign import bundled, config, responses
from prefalign.engines import Sampling
from prefalign.engines.transformers import load_engine
from prefalign.images import encode_png, open_image, sha256
from prefalign.models import ModelConfig
from prefalign.online.conversations import linked
from prefalign.records import Example, Pair, Prompt, message_text, placeholder_count, user_message
from prefalign.rewards import Response, stored
from prefalign.rewards.cases import Case
from prefalign.rewards.dialogues import Speaker
from prefalign.rewards.phrases import BANKS, LABELS, HintPhrases
from prefalign.rewards.rule_sets import RULE_SETS
from prefalign.rewards.symbolic import Symbolic
from prefalign.scenes.export import export
from prefalign.scenes.twins import true_of
from prefalign.store import Dropped, Failed, StoreError, read_records
from tests.tiny_vlms import picture

NAMES = ("quality", "analysis", "abnormality", "cells", "diagnosis")
PUBLISHED = config.read_yaml(bundled.find("datagen/clinical_rules"))
SCENES = config.read_yaml(bundled.find("datagen/clinical_rules_scenes"))
MARROW = RULE_SETS["bone_marrow"]
LABELLED = ("AML", "MM", "NORMAL", "BLOOD", "CLOT", "AML")


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("clinical_rules")


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """A folder of pictures and a table of labels; the last two rows have measured shares, and nothing."""
    folder = tmp_path_factory.mktemp("marrow")
    rows = [{"image": f"{number}.png", "label": label} for number, label in enumerate(LABELLED)]
    rows.append({"image": "6.png", "myeloblast_share": 0.05, "plasma_cell_share": 0.4})
    rows.append({"image": "7.png"})
    for number in range(len(rows)):
        picture(number).save(folder / f"{number}.png")
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules") / "rows"
    export(folder, split="train_biased", kind="caption", start=0, stop=40)
    return folder


def marrow(stage, patches, folder, **changes):
    known = {"data": {"path": patches / "labels.jsonl", "images": patches}, "output": {"path": folder, "block_size": 3}}
    return config.build(stage.Config, config.merge(config.merge(PUBLISHED, known), changes))


def presence(stage, rows="rows", folder="out", **changes):
    known = {"data": {"path": rows}, "output": {"path": folder, "block_size": 16}}
    return config.build(stage.Config, config.merge(config.merge(SCENES, known), changes))


def speaker(split="train"):
    return Speaker(MARROW, BANKS["bone_marrow"], HintPhrases(), split)


def case(label):
    return Case(label, LABELS["bone_marrow"][label])


def test_conversations_about_a_labelled_folder(stage, patches, tmp_path, capsys):
    manifest = stage.main(marrow(stage, patches, tmp_path / "out"))
    made = list(read_records(tmp_path / "out", Example))
    assert manifest.dropped == {"no_label": 1}
    assert (manifest.rows_used, manifest.rows_out) == (7, 35)
    whole = made[4::5]
    assert [example.meta["case"] for example in whole] == [*LABELLED, "MM"]
    for number, example in enumerate(whole):
        rules = example.meta["rules"]
        assert example.meta["images_sha256"] == [sha256(example.images[0])]
        assert example.images[0]["bytes"] == (patches / f"{number}.png").read_bytes()
        assert sorted(rules["asked"]) == sorted(NAMES)
        assert [turn["role"] for turn in example.messages] == ["user", "assistant"] * 5
        assert [placeholder_count([turn]) for turn in example.messages] == [1] + [0] * 9
        assert [message_text([turn]) for turn in example.messages[::2]] == rules["questions"]
        for name, turn in zip(rules["asked"], example.messages[1::2], strict=True):
            assert MARROW.parse(name, message_text([turn]), {}) == rules["reference"][name]
        assert rules["reference"] == LABELS["bone_marrow"][example.meta["case"]]
        for turns, part in enumerate(made[5 * number : 5 * number + 5], 1):  # each answer is the last one of a row
            part.check()
            assert part.messages == example.messages[: 2 * turns]
            assert part.meta["rules"]["asked"] == rules["asked"][:turns]
            assert part.images == example.images
    assert len({example.id for example in made}) == 35
    assert len({tuple(example.meta["rules"]["asked"]) for example in whole}) > 3
    found = json.loads((tmp_path / "out" / "conversations.json").read_text())
    assert found["cases"] == {"AML": 10, "BLOOD": 5, "CLOT": 5, "MM": 10, "NORMAL": 5}
    assert found["hints"] == {"none": 35}
    assert "clinical_rules: rows 35" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "label"),
    [
        ({"myeloblast_share": 0.21, "plasma_cell_share": 0.5}, "AML"),
        ({"myeloblast_share": 0.2, "plasma_cell_share": 0.11}, "MM"),
        ({"myeloblast_share": 0.2, "plasma_cell_share": 0.1}, "NORMAL"),
        ({"myeloblast_share": 0, "plasma_cell_share": 0}, "NORMAL"),
        ({"myeloblast_share": 0.9, "plasma_cell_share": 0, "label": "CLOT"}, "CLOT"),
        ({"myeloblast_share": 0.9}, Dropped("no_label")),
        ({}, Dropped("no_label")),
    ],
)
def test_labels_by_measured_shares(stage, patches, tmp_path, facts, label):
    row = Prompt("row", [encode_png(picture(0), "0.png")], [user_message("-", 1)], facts=facts)
    found = stage.case_of(row, MARROW, marrow(stage, patches, tmp_path))
    assert (found.label if isinstance(found, Case) else found) == label


def test_labels_and_shares_that_cannot_be_are_set_aside(stage, patches, tmp_path):
    known = marrow(stage, patches, tmp_path)
    row = Prompt("row", [encode_png(picture(0), "0.png")], [user_message("-", 1)], facts={"label": "ALL"})
    found = stage.case_of(row, MARROW, known)
    assert found == Failed("unknown_label", "facts.label is 'ALL'; the labels are NORMAL, AML, MM, BLOOD, CLOT.")
    shares = dataclasses.replace(row, facts={"myeloblast_share": 21, "plasma_cell_share": 0})
    assert stage.case_of(shares, MARROW, known).message == (
        "facts.myeloblast_share is 21; a measured share is from 0 to 1."
    )


def test_a_variable_that_is_always_the_same_gets_no_wrong_hint(stage, patches, tmp_path):
    own = {"device": {"x_ray": ["x-ray"]}, "finding": {"ok": ["healthy"], "ill": ["ill"]}}
    table = [{"device": "x_ray", "finding": "ok"}, {"device": "x_ray", "finding": "ill"}]
    said = {name: {category: found[0] for category, found in categories.items()} for name, categories in own.items()}
    phrases = {
        name: {"questions": [f"What {name}?"], "test_questions": [f"Which {name}?"],
               "answers": {category: [f"It is {word}."] for category, word in words.items()},
               "claims": {category: f"it is {word}" for category, word in words.items()}}
        for name, words in said.items()
    }  # fmt: skip
    labels = {"rows": {"AML": table[0], "MM": table[1]}, "ratios": []}
    known = {
        "rule_set": "chest",
        "rule_sets": {"chest": {"variables": own, "rows": table}},
        "phrases": phrases,
        "labels": labels,
    }
    for wrong, hints in ((1.0, {None}), (0.0, {"x_ray"})):
        folder = tmp_path / str(wrong)
        hinted = {"hints": {"share": 1.0, "wrong": wrong}, "output": {"path": folder, "max_quarantine": 3}}
        stage.main(marrow(stage, patches, folder, **config.merge(known, hinted)))
        rules = [row.meta["rules"] for row in read_records(folder, Example) if len(row.meta["rules"]["asked"]) == 2]
        assert {found["hints"].get("device") for found in rules} == hints
        assert {found["hints"]["finding"] != found["reference"]["finding"] for found in rules} == {bool(wrong)}


def test_pairs_give_in_fit_or_contradict(stage, patches, tmp_path):
    manifest = stage.main(marrow(stage, patches, tmp_path / "out", produce="pairs"))
    made = list(read_records(tmp_path / "out", Pair))
    assert Counter(pair.meta["kind"] for pair in made) == {"hint": 7, "consistent": 7, "inconsistent": 7}
    assert manifest.rows_out == len(made) == len({pair.id for pair in made})
    for pair in made:
        pair.check()
        rules, last, said = pair.facts["rules"], pair.meta["variable"], pair.meta["said"]
        earlier = [(name, rules["reference"][name]) for name in rules["asked"][:-1]]
        assert rules["asked"][-1] == last
        assert MARROW.parse(last, message_text(pair.chosen), {}) == rules["reference"][last] != said
        assert MARROW.parse(last, message_text(pair.rejected), {}) == said
        fits = MARROW.agree([*earlier, (last, said)])
        if pair.meta["kind"] == "hint":
            assert rules["hints"] == {last: said}
            assert BANKS["bone_marrow"][last].claims[said] in message_text(pair.prompt[-1:])
            assert message_text(pair.chosen).endswith(tuple(HintPhrases().refuse))
            assert message_text(pair.rejected).endswith(tuple(HintPhrases().agree))
        else:
            assert earlier
            assert fits == (pair.meta["kind"] == "consistent")
            assert rules["hints"] == {}
        # right against wrong is 1, and what no row holds costs the pair of answers too
        adjacent = MARROW.agree([*earlier[-1:], (last, said)]) if earlier else True
        assert pair.margin == (1 if adjacent else 2)


def test_a_wrong_answer_that_fits_about_scenes_is_a_wrong_number(stage, scenes, tmp_path):
    """Of presence each answer settles the others, except how many there are of what is there."""
    stage.main(presence(stage, scenes, tmp_path / "out", kinds=["consistent"], things={"absent": 0.5}))
    pairs = list(read_records(tmp_path / "out", Pair))
    assert 10 <= len(pairs) <= 30
    for pair in pairs:
        assert (pair.meta["case"], pair.meta["variable"], pair.meta["said"]) == ("yes", "count", "some")
        assert true_of(message_text(pair.chosen), pair.facts)
        assert not true_of(message_text(pair.rejected), pair.facts)
        assert RULE_SETS["presence"].parse("count", message_text(pair.rejected), {}) == "some"
        assert pair.margin == 1
    row = next(iter(read_records(scenes, Prompt)))
    known = presence(stage, scenes, tmp_path, kinds=["consistent"], things={"absent": 1.0})
    words = Speaker(RULE_SETS["presence"], BANKS["presence"], HintPhrases())
    assert stage.outcome(row, words, Symbolic(), known) == Dropped("no_wrong_answer")


def test_words_of_ones_own_that_say_no_number_are_no_wrong_number(stage, scenes, tmp_path):
    """ "There is at least one star." is true of two."""
    count = BANKS["presence"]["count"]
    vague = dataclasses.replace(
        count, answers={**count.answers, "some": ["There are some {things}.", "There {so_many} in the picture."]}
    )
    known = presence(stage, scenes, tmp_path, kinds=["consistent"], things={"absent": 0.0})
    words = Speaker(RULE_SETS["presence"], {**BANKS["presence"], "count": vague}, HintPhrases())
    for row in read_records(scenes, Prompt):
        made = stage.outcome(row, words, Symbolic(), known)
        if isinstance(made, list):
            assert RULE_SETS["presence"].miscounts("count", message_text(made[0].rejected), made[0].facts["rules"])


def test_counts_and_exclusions_of_scenes_are_true(stage, scenes, tmp_path):
    stage.main(presence(stage, scenes, tmp_path / "out", produce="prompts", hints={"share": 0.5}))
    made = list(read_records(tmp_path / "out", Prompt))
    assert len(made) == 40
    assert 10 <= sum(row.facts["case"] == "no" for row in made) <= 30
    parents = list(read_records(scenes, Prompt))
    for row, parent in zip(made, parents, strict=True):
        rules, counts = row.facts["rules"], parent.facts["counts"]
        assert row.images == parent.images
        assert row.facts["objects"] == parent.facts["objects"]
        told = " ".join(rules["reference_answers"].values())
        [thing] = [shape for shape in SCENES["things"]["names"] if f" {shape}" in told]
        there = counts.get(thing, 0)
        assert rules["number"] == there
        assert rules["reference"] == (
            {"exists": "yes", "absent": "no", "count": "some"} if there
            else {"exists": "no", "absent": "yes", "count": "none"}
        )  # fmt: skip
        number = ["no", "one", "two", "three", "four", "five"][there]
        assert f"{number} {thing}" in rules["reference_answers"]["count"]
        assert message_text(row.messages) == rules["questions"][0]
        assert row.answer == rules["reference_answers"][rules["asked"][0]]
        assert placeholder_count(row.messages) == 1


def test_names_of_things_are_the_same_in_any_case(stage, tmp_path):
    """Else the rows would say that what is there is not."""
    row = Prompt(
        "row", [encode_png(picture(0), "0.png")], [user_message("-", 1)], facts={"objects": ["Dog", " traffic  Light"]}
    )
    for number in range(12):
        known = presence(stage, folder=tmp_path, things={"names": ["dog", "Traffic light"], "absent": 0.5}, seed=number)
        case = stage.case_of(row, RULE_SETS["presence"], known)
        assert (case.label, case.words("some")["so_many"]) in (
            ("yes", "is one dog"), ("yes", "is one Traffic light"))  # fmt: skip
    own = presence(stage, folder=tmp_path, things={"names": []})
    many = dataclasses.replace(row, facts={"objects": ["Dog", "dog", {"name": "DOG"}]})
    assert stage.case_of(many, RULE_SETS["presence"], own).words("some")["so_many"].startswith("are three ")


@pytest.mark.parametrize("fact", ["biopsy", ["a", "b"]])
def test_a_fact_called_kind_is_no_kind_of_wrong_answer(stage, patches, tmp_path, fact):
    rows = [{**json.loads(line), "kind": fact} for line in (patches / "labels.jsonl").read_text().splitlines()]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for produce, kinds in (("prompts", {}), ("pairs", {"hint": 7})):
        changes = {"data": {"path": tmp_path / "labels.jsonl", "fact_columns": ["label", "kind", "myeloblast_share",
                                                                               "plasma_cell_share"]}}  # fmt: skip
        stage.main(marrow(stage, patches, tmp_path / produce, produce=produce, kinds=["hint"], **changes))
        found = json.loads((tmp_path / produce / "conversations.json").read_text())
        assert found.get("kinds", {}) == kinds


def test_prompts_are_what_trainers_of_conversations_read(stage, patches, tmp_path):
    known = marrow(stage, patches, tmp_path / "out", produce="prompts", split="test", hints={"share": 0.5})
    stage.main(known)
    rows = list(read_records(tmp_path / "out", Prompt))
    held = []
    for row in rows:
        plan = linked(row.to_row(), row.id, permute=True, seed=3)
        rules = plan.facts["rules"]
        assert sorted(rules["questions"]) == sorted(row.facts["rules"]["questions"])
        assert placeholder_count(plan.messages) == 1
        said = [rules["reference_answers"][name] for name in rules["asked"]]
        asked = responses.history(plan.messages, rules["questions"], said[:-1])
        held.append(Response(row.id, [], asked, said[-1], facts=plan.facts))
    found = Symbolic().accuracy(held)
    hinted = [turn for one in held for turn in Symbolic().turns(one)]
    assert {turn.hinted for turn in hinted} == {"none", "correct", "wrong"}
    assert found["misled"] == 0
    assert {value for name, value in found.items() if name not in ("misled", "no_match")} == {1}
    assert Symbolic().score(held)["correct"].tolist() == [5.0] * 7


@pytest.fixture(scope="module")
def engine():
    return load_engine(ModelConfig("scenes", device="cpu"), batch_size=40)


SPOKEN = {
    "exists": {
        "questions": ["Is there {a_thing} in the picture?"], "test_questions": ["Can you see {a_thing} in the picture?"],
        "answers": {"yes": ["Yes, there is {a_thing} in the picture."], "no": ["No, there is no {thing} in the picture."]},
        "claims": {"yes": "there is {a_thing}", "no": "there is no {thing}"},
    },
    "count": {
        "questions": ["How many {things} are there?"], "test_questions": ["How many {things} do you see?"],
        "answers": {"some": ["There {so_many} in the picture."], "none": ["There {so_many} in the picture."]},
        "claims": {"some": "there {so_many}", "none": "there {so_many}"},
    },
}  # fmt: skip


def test_the_picture_decides_what_the_rules_say_of_a_model(stage, scenes, engine, tmp_path):
    """Conversations of the tiny model, with their own pictures and with those of other rows: other answers, other scores.

    Not better ones: the base answers such questions no better than chance, and training on these rows is what they are for.
    """
    known = presence(stage, scenes, tmp_path / "out", produce="prompts", rule_set="existence_count", phrases=SPOKEN,
                     hints={"share": 0.0})  # fmt: skip
    stage.main(known)
    rows = list(read_records(tmp_path / "out", Prompt))
    assert {tuple(sorted(row.facts["rules"]["asked"])) for row in rows} == {("count", "exists")}

    def scores(pictures):
        shown = [(row, [open_image(image)]) for row, image in zip(rows, pictures, strict=True)]
        held = responses.converse(shown, engine, Sampling(max_new_tokens=16, temperature=0), num_generations=1,
                                  method="t", seed=0)  # fmt: skip
        return Symbolic().score([one for row in held for one in stored.as_responses(row, [])])["correct"].tolist()

    own = [row.images[0] for row in rows]
    true, swapped = scores(own), scores(own[1:] + own[:1])
    assert true == scores(own)
    assert sum(one != other for one, other in zip(true, swapped, strict=True)) >= 5


def test_a_stopped_run_ends_with_the_same_rows(stage, patches, tmp_path):
    known = marrow(stage, patches, tmp_path / "out", hints={"share": 0.3})
    manifest = stage.main(known)
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    for name in ("manifest.json", "conversations.json", "progress/00001.json", "data/train-00001.parquet"):
        (tmp_path / "cut" / name).unlink()
    again = marrow(stage, patches, tmp_path / "cut", hints={"share": 0.3})
    assert stage.main(again) == manifest
    assert list(read_records(tmp_path / "cut", Example)) == list(read_records(tmp_path / "out", Example))
    assert (tmp_path / "cut" / "conversations.json").read_bytes() == (
        tmp_path / "out" / "conversations.json"
    ).read_bytes()
    with pytest.raises(
        StoreError, match=r"fact_columns: \['label', 'myeloblast_share', 'plasma_cell_share'\] -> \['label'\]"
    ):
        stage.main(marrow(stage, patches, tmp_path / "cut", hints={"share": 0.3}, data={"fact_columns": ["label"]}))


def test_rows_draw_by_their_id_and_the_seed(stage, patches, tmp_path):
    words = speaker()
    rows = [
        Prompt(str(n), [encode_png(picture(n), "0.png")], [user_message("-", 1)], facts={"label": "AML"})
        for n in range(8)
    ]

    def made(seed, order=1):
        known = marrow(stage, patches, tmp_path, seed=seed)
        return {row.id: stage.outcome(row, words, Symbolic(), known)[0].messages for row in rows[::order]}

    assert made(0) == made(0, -1) != made(1)
    assert len({json.dumps(messages) for messages in made(0).values()}) == 8


def test_a_name_that_the_rules_misread_is_set_aside(stage, tmp_path):
    """Of "no one way signs" the rules cannot tell whether it is none or one."""
    row = Prompt("row", [encode_png(picture(0), "0.png")], [user_message("-", 1)], facts={"objects": ["one way sign"]})
    known = presence(stage, things={"names": [], "absent": 0.0})
    words = Speaker(RULE_SETS["presence"], BANKS["presence"], HintPhrases())
    many = dataclasses.replace(row, facts={"objects": ["one way sign"] * 2})
    found = stage.outcome(many, words, Symbolic(), known)
    assert isinstance(found, Failed)
    assert found.reason == "bad_reference"
    assert "is read as no match, so the reward would call a right answer wrong" in found.message
    assert stage.outcome(dataclasses.replace(row, facts={}), words, Symbolic(), known) == Dropped("no_objects")
    assert stage.outcome(dataclasses.replace(row, facts={"objects": []}), words, Symbolic(), known) == Dropped(
        "no_objects"
    )
    blank = dataclasses.replace(row, images=[], messages=[user_message("-")])
    assert stage.outcome(blank, words, Symbolic(), known) == Dropped("no_picture")


def words(variable, **changes):
    return {"phrases": {variable: dataclasses.asdict(dataclasses.replace(BANKS["bone_marrow"][variable], **changes))}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (words("diagnosis", answers={**BANKS["bone_marrow"]["diagnosis"].answers, "AML": ["it is a leukemia."]}),
         "phrases.diagnosis.answers.AML: 'It is a leukemia.' is read as no match, so the reward would call a right answer"),
        (words("cells", answers={**BANKS["bone_marrow"]["cells"].answers, "none": ["no plasma cells, but myeloblasts."]}),
         "is read as myeloblasts, so the reward"),
        (words("quality", test_questions=["Judge the quality of this patch."]), "quality of this patch.' is in both banks"),
        (words("quality", questions=["How good?", "How good?"]), "phrases.quality.questions is empty or holds a phrasing twice"),
        (words("quality", claims={"good": "it is fine"}), "phrases.quality has no answer or no claim for 'bad'"),
        (words("quality", questions=["How good is {a_thing}?"]), "'a_thing' in braces is not known; known are none"),
        ({"hint_phrases": {"questions": ["{claim}?"]}}, "hints.questions: '{claim}?' lacks {claim} or {question}"),
        ({"hints": {"share": 2}}, "hints.share is 2.0; it is a share"),
        ({"produce": "pairs", "kinds": []}, "kinds is empty, so there would be no wrong answer"),
        ({"rule_set": "bone_marow"}, "rule_set is 'bone_marow'; did you mean 'bone_marrow'"),
        ({"rule_set": "count_list"}, "rule_set 'count_list' has no table whose rows answer all of its questions"),
        ({"labels": {"otherwise": "FINE"}}, "labels.ratios leads to 'FINE', and the labels are NORMAL, AML"),
        ({"labels": {"rows": {"NORMAL": {"quality": "good"}}}}, "labels.rows.NORMAL is {'quality': 'good'}, which is no row"),
        ({"rule_set": "sides"}, "labels.rows is empty, and the rule set has no labels of its own"),
        ({"rule_set": "sides", "labels": {"ratios": [], "rows": {"L": {"there": "left", "back": "right"}}}},
         "phrases has no words for 'there', which the rules ask for"),
        ({"rule_set": "presence", "things": {"plurals": {"ox": "oxen"}}}, "things.plurals has 'ox', which is none"),
        ({"rule_set": "presence", "things": {"absent": -1}}, "things.absent is -1.0; it is a share of rows"),
    ],
)  # fmt: skip
def test_settings_and_words_that_do_not_fit_the_rules_are_refused(stage, patches, tmp_path, changes, message):
    with pytest.raises(ValueError) as refused:
        marrow(stage, patches, tmp_path, **changes)
    assert message in str(refused.value)


def test_a_table_of_ones_own(stage, patches, tmp_path):
    """The same rule set writes the data and rewards it."""
    own = {"size": {"large": ["large", "big"], "small": ["small"]}, "grade": {"high": ["high"], "low": ["low"]}}
    sets = {
        "tumour": {"variables": own, "rows": [{"size": "large", "grade": "high"}, {"size": "small", "grade": "low"}]}
    }
    phrases = {
        name: {"questions": [f"What {name}?"], "test_questions": [f"Which {name}?"],
               "answers": {category: [f"the {name} is {category}."] for category in categories},
               "claims": {category: f"it is {category}" for category in categories}}
        for name, categories in own.items()
    }  # fmt: skip
    labels = {"rows": {"AML": sets["tumour"]["rows"][0], "MM": sets["tumour"]["rows"][1]}, "ratios": []}
    known = marrow(stage, patches, tmp_path / "out", rule_set="tumour", rule_sets=sets, phrases=phrases, labels=labels,
                   produce="prompts", output={"max_quarantine": 3})  # fmt: skip
    manifest = stage.main(known)
    assert manifest.dropped == {"no_label": 2, "unknown_label": 3}
    rows = list(read_records(tmp_path / "out", Prompt))
    assert {row.facts["rules"]["set"] for row in rows} == {"tumour"}
    answers = {category for row in rows for category in row.facts["rules"]["reference"].items()}
    assert answers == set(itertools.chain(*(row.items() for row in sets["tumour"]["rows"])))

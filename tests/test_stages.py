"""What the stages that make pairs share: order, reasons, ids and provenance."""

import pytest

from prefalign import bundled, config, records, stages
from prefalign.images import sha256
from prefalign.records import Prompt, message_text, user_message
from prefalign.store import Dropped, Failed
from tests.tiny_vlms import picture

PNG = {"bytes": b"", "path": "a.png"}


def encoded(seed=0):
    from prefalign.images import encode_png

    return encode_png(picture(seed), "a.png")


def prompt(name="row", answer="A cat.", images=None):
    images = [encoded()] if images is None else images
    return Prompt(name, images, [user_message("What is it?", len(images))], answer, {"objects": ["cat"]})


def test_outcomes_keep_the_order_of_the_block_and_work_sees_only_what_is_ready():
    seen = []

    def prepare(row):
        return {"b": Dropped("no"), "d": Failed("broken", "why")}.get(row.id, row.id.upper())

    def work(ready):
        seen.append([(row.id, made) for row, made in ready])
        return [[made] for _, made in ready]

    outcomes = stages.in_order([prompt(name) for name in "abcde"], prepare, work)
    assert outcomes == [["A"], Dropped("no"), ["C"], Failed("broken", "why"), ["E"]]
    assert seen == [[("a", "A"), ("c", "C"), ("e", "E")]]


def test_nothing_ready_means_no_work():
    assert stages.in_order([prompt()], lambda row: Dropped("no"), lambda ready: pytest.fail("called")) == [
        Dropped("no")
    ]


def test_usable():
    (opened,) = stages.usable(prompt())
    assert opened.mode == "RGB"
    assert stages.usable(prompt(answer=" ")) == Dropped("no_reference")
    assert stages.usable(prompt(answer=None)) == Dropped("no_reference")
    assert len(stages.usable(prompt(answer=None), answer=False)) == 1
    assert stages.usable(prompt(images=[])) == Dropped("no_picture")
    failed = stages.usable(prompt(images=[encoded(), PNG]))
    assert isinstance(failed, Failed)
    assert failed.reason == "empty_image"


def test_a_pair_carries_where_it_comes_from():
    parent = prompt()
    other = encoded(1)
    made = stages.make_pair(parent, method="m", chosen="yes", rejected="no", settings={"k": 1}, seed=3, model="f",
                            meta={"rank": 2}, rejected_images=[other], margin=0.5)  # fmt: skip
    made.check()
    assert made.id == records.record_id(method="m", parent="row", settings={"k": 1}, model="f", seed=3)
    assert made.meta == {"parent": "row", "generator": "f", "seed": 3, "settings": {"k": 1}, "rank": 2,
                         "images_sha256": [sha256(parent.images[0])]}  # fmt: skip
    assert (message_text(made.chosen), message_text(made.rejected)) == ("yes", "no")
    assert made.images == parent.images
    assert made.rejected_images == [other]
    assert (made.answer, made.facts, made.margin) == ("A cat.", {"objects": ["cat"]}, 0.5)


def test_an_example_carries_where_it_comes_from():
    parent, said = prompt(), [user_message("What?", 1), records.assistant_message("A cat.")]
    made = stages.make_example(
        parent, method="m", messages=said, settings={"k": 1}, seed=3, model="f", meta={"rank": 2}, index=1
    )
    made.check()
    assert made.id == records.record_id(method="m", parent="row", settings={"k": 1}, model="f", seed=3, index=1)
    assert made.meta == {"method": "m", "parent": "row", "generator": "f", "seed": 3, "settings": {"k": 1}, "rank": 2,
                         "images_sha256": [sha256(parent.images[0])]}  # fmt: skip
    assert (made.images, made.messages) == (parent.images, said)


def test_settings_seed_and_model_change_the_id_of_a_pair():
    known = {"method": "m", "chosen": "yes", "rejected": "no", "settings": {}, "seed": 0}
    changes = [{}, {"settings": {"k": 1}}, {"seed": 1}, {"model": "other"}, {"method": "n"}]
    assert len({stages.make_pair(prompt(), **{**known, **change}).id for change in changes}) == len(changes)
    assert stages.make_pair(prompt(), **{**known, "rejected": "maybe"}).id == stages.make_pair(prompt(), **known).id


def test_other_pictures_and_turns_replace_the_parents():
    canvas, turns = encoded(2), [user_message("In image 2, what is it?", 1)]
    made = stages.make_pair(
        prompt(), method="m", chosen="a", rejected="b", settings={}, seed=0, images=[canvas], prompt=turns
    )
    assert (made.images, made.prompt) == ([canvas], turns)
    assert made.meta["images_sha256"] == [sha256(canvas)]


@pytest.mark.parametrize("name", ["bdhs", "povid", "m3id", "re_align", "mia_dpo", "stic", "s_vco"])
def test_a_typo_in_the_data_path_is_told_before_anything_is_loaded(name, tmp_path):
    """The models named here do not exist either, which is what loading one first would say."""
    stage, none = bundled.load_stage(name), str(tmp_path / "none")
    values = config.read_yaml(bundled.find(f"datagen/{name}_scenes"))
    model = (
        {"filter": {"semantic": {"model_name_or_path": none}}}
        if name == "s_vco"
        else {"model": {"model_name_or_path": none}}
    )
    editor = {"editor": "engine"} if name == "povid" else {}
    values = config.merge(values, {"data": {"path": str(tmp_path / "rows.jsonl")}, **model, **editor})
    with pytest.raises(ValueError, match=r"no data at .*rows\.jsonl"):
        stage.main(config.build(stage.Config, values))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="none"):
        stage.main(config.build(stage.Config, values))

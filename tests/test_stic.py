"""STIC stage 1 on the embedded world: what pairs hold, that corruption and pictures matter, what is dropped and why."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from prefalign import bundled, config
from prefalign.corruption import colour_jitter, low_resolution
from prefalign.described_pairs import ANNOUNCED
from prefalign.describing import NEUTRAL_PROMPTS
from prefalign.engines import Completion, Sampling
from prefalign.engines.transformers import load_engine
from prefalign.images import encode_png, open_image, sha256
from prefalign.manifest import read_manifest
from prefalign.models import ModelConfig
from prefalign.records import Pair, Prompt, message_text, user_message
from prefalign.scenes import world
from prefalign.scenes.export import export
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, OutputConfig, StoreError, read_records, write_records
from tests.tiny_vlms import picture

ROWS = 12
SCENES = config.read_yaml(bundled.find("datagen/stic_scenes"))


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("stic")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stic") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=ROWS)
    return folder


@pytest.fixture(scope="module")
def engine():
    return load_engine(ModelConfig("scenes", device="cpu"), batch_size=8)


def settings(stage, rows, folder, **changes):
    known = {"data": {"path": rows}, "output": {"path": folder, "block_size": 5}, "batch_size": 8}
    return config.build(stage.Config, config.merge(config.merge(SCENES, known), changes))


def run(stage, rows, folder, **changes):
    manifest = stage.main(settings(stage, rows, folder, **changes))
    return manifest, {row.meta["parent"]: row for row in read_records(folder, Pair)}


def keep_all(**changes):
    """No filter that looks at lengths or likeness, so that nearly every row gives a pair."""
    return {"filters": {"length_ratio": None, "similarity": 1.1}, **changes}


def said(pairs):
    return {name: (message_text(pair.chosen), message_text(pair.rejected)) for name, pair in pairs.items()}


def prompts_of(folder):
    return list(read_records(folder, Prompt))


class Watched:
    """A real engine that notes what it was asked."""

    def __init__(self, engine):
        self.engine, self.fingerprint, self.capabilities, self.calls = (
            engine,
            engine.fingerprint,
            engine.capabilities,
            [],
        )

    def generate(self, requests, sampling):
        self.calls.append(list(requests))
        return self.engine.generate(requests, sampling)


@pytest.fixture(scope="module")
def finished(stage, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stic") / "pairs"
    manifest, pairs = run(stage, rows, folder, **keep_all())
    return folder, manifest, pairs


def test_pairs_hold_what_the_method_says(finished, rows):
    _, manifest, pairs = finished
    assert manifest.rows_in == ROWS == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out == len(pairs) >= 9
    given = {prompt.id: prompt for prompt in prompts_of(rows)}
    kinds = Counter()
    for name, pair in pairs.items():
        pair.check()
        meta = pair.meta
        assert pair.images == given[name].images  # the clean picture, for both answers
        assert pair.rejected_images == []
        assert pair.method == "stic"
        assert pair.answer is None  # the row's is to another question
        assert pair.facts == given[name].facts
        neutral = message_text(pair.prompt)
        assert neutral in SCENES["neutral_prompts"]
        assert meta["chosen_prompt"] == SCENES["guided_prompt"]
        bad = meta["negative_kind"] == "bad_prompt"
        assert meta["rejected_prompt"] in SCENES["bad_prompts"] if bad else meta["rejected_prompt"] == neutral
        assert ("corrupted" in meta) != bad
        assert meta["chosen_tokens"] > 4 < meta["rejected_tokens"]
        assert meta["generator"] == manifest.models["generator"] != ""
        assert meta["settings"]["sampling"]["temperature"] == 0.2
        kinds[meta["negative_kind"]] += 1
    assert set(kinds) == {"bad_prompt", "low_resolution", "colour_jitter"}


def test_both_answers_of_a_whole_block_are_asked_for_at_once(stage, engine, rows, tmp_path):
    watched, block = Watched(engine), prompts_of(rows)
    known = settings(stage, rows, tmp_path, **keep_all())
    outcomes = stage.make_pairs(block, watched, known, lambda: stage.picture_owners(known.data))
    assert [len(call) for call in watched.calls] == [2 * ROWS]
    asked = {request.id: request for request in watched.calls[0]}
    for prompt, outcome in zip(block, outcomes, strict=True):
        good, bad = asked[f"{prompt.id}/chosen"], asked[f"{prompt.id}/rejected"]
        clean = open_image(prompt.images[0])
        assert good.messages == [user_message(SCENES["guided_prompt"], 1)]
        assert np.array_equal(good.images[0], clean)
        if isinstance(outcome, Dropped):
            continue
        meta = outcome[0].meta
        shown = {
            "bad_prompt": lambda meta, clean: clean,
            "low_resolution": lambda meta, clean: low_resolution(clean, short_side=20),
            "colour_jitter": lambda meta, clean: colour_jitter(clean, brightness=meta["brightness"], hue=meta["hue"]),
        }[meta["negative_kind"]](meta, clean)
        assert np.array_equal(bad.images[0], shown)
        assert np.array_equal(shown, clean) == (meta["negative_kind"] == "bad_prompt")
        assert message_text(bad.messages) == meta["rejected_prompt"]


def test_the_corrupted_picture_is_really_shown(stage, finished, rows, tmp_path):
    """With the released bug (`corrupt: false`) only the rejected answers of corrupted rows change."""
    manifest, clean = run(stage, rows, tmp_path / "clean", **keep_all(negatives={"corrupt": False}))
    pairs = finished[2]
    assert manifest.rows_in == manifest.rows_used + sum(manifest.dropped.values())
    changed = Counter()
    for name in set(pairs) & set(clean):
        assert message_text(pairs[name].chosen) == message_text(clean[name].chosen)
        kind = clean[name].meta["negative_kind"]
        assert kind == pairs[name].meta["negative_kind"]
        changed[kind] += message_text(pairs[name].rejected) != message_text(clean[name].rejected)
        if kind != "bad_prompt":
            assert (pairs[name].meta["corrupted"], clean[name].meta["corrupted"]) == (True, False)
    assert changed["bad_prompt"] == 0
    assert changed["low_resolution"] > 0 < changed["colour_jitter"]


def test_another_picture_changes_both_answers(stage, finished, rows, tmp_path):
    """Every row shows the next row's picture: ids, prompts and kinds stay, the answers follow the picture."""
    block = prompts_of(rows)
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    lines = []
    for number, prompt in enumerate(block):
        (swapped / f"{number}.png").write_bytes(block[(number + 1) % ROWS].images[0]["bytes"])
        lines.append({"id": prompt.id, "image": f"{number}.png", "question": "What?"})
    (swapped / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, others = run(stage, swapped / "rows.jsonl", tmp_path / "pairs", **keep_all())
    both = set(others) & set(finished[2])
    assert len(both) >= 8
    before, after = said(finished[2]), said(others)
    assert all(others[name].meta["negative_kind"] == finished[2][name].meta["negative_kind"] for name in both)
    assert all(others[name].prompt == finished[2][name].prompt for name in both)
    assert all(before[name][0] != after[name][0] and before[name][1] != after[name][1] for name in both)


def test_neither_batch_size_nor_order_changes_a_row(stage, finished, rows, tmp_path):
    _, one = run(stage, rows, tmp_path / "one", **keep_all(batch_size=1))
    assert {name: pair.to_row() for name, pair in one.items()} == {n: p.to_row() for n, p in finished[2].items()}
    turned = tmp_path / "turned"
    turned.mkdir()
    lines = []
    for prompt in prompts_of(rows)[::-1]:
        (turned / f"{prompt.id}.png").write_bytes(prompt.images[0]["bytes"])
        lines.append({"id": prompt.id, "image": f"{prompt.id}.png", "question": "What?"})
    (turned / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, pairs = run(stage, turned / "rows.jsonl", tmp_path / "pairs", **keep_all())
    assert said(pairs) == said(finished[2])
    assert {pair.id for pair in pairs.values()} == {pair.id for pair in finished[2].values()}


def test_resume_gives_the_same_rows(stage, finished, rows, tmp_path):
    folder, _, pairs = finished
    shutil.copytree(folder, tmp_path / "pairs")
    for name in ("manifest.json", "progress/00001.json", "data/train-00001.parquet"):
        (tmp_path / "pairs" / name).unlink()
    manifest, again = run(stage, rows, tmp_path / "pairs", **keep_all())
    assert {name: pair.to_row() for name, pair in again.items()} == {n: p.to_row() for n, p in pairs.items()}
    assert manifest == read_manifest(folder)


def test_another_config_refuses_the_folder(stage, finished, rows):
    with pytest.raises(StoreError, match=r"another config \(settings.negatives.corrupt: True -> False\)"):
        run(stage, rows, finished[0], **keep_all(negatives={"corrupt": False}))
    with pytest.raises(StoreError, match="another config"):
        run(stage, rows, finished[0], **keep_all(seed=1))


@pytest.mark.parametrize(
    ("shares", "kinds"),
    [
        ((1.0, 0.5), {"bad_prompt"}),
        ((0.0, 1.0), {"low_resolution"}),
        ((0.0, 0.0), {"colour_jitter"}),
    ],
)
def test_shares_decide_the_kind(stage, shares, kinds):
    negatives = {"bad_prompt_share": shares[0], "low_resolution_share": shares[1]}
    known = settings(stage, "rows", "out", negatives=negatives)
    shown = world.draw(world.scene("train_fair", 0))
    assert {stage.task_of(f"row{number}", shown, known).meta["negative_kind"] for number in range(40)} == kinds


def test_halves_of_halves(stage):
    """Probabilities 1/2, 1/4 and 1/4 over 400 rows: 200, 100 and 100, standard deviations 10, 8.7 and 8.7."""
    known = settings(stage, "rows", "out")
    shown = world.draw(world.scene("train_fair", 0))
    kinds = Counter(stage.task_of(f"row{number}", shown, known).meta["negative_kind"] for number in range(400))
    assert abs(kinds["bad_prompt"] - 200) < 40
    assert abs(kinds["low_resolution"] - 100) < 35
    assert abs(kinds["colour_jitter"] - 100) < 35


def test_a_grey_picture_is_shrunk_instead(stage):
    known = settings(stage, "rows", "out", negatives={"bad_prompt_share": 0.0, "low_resolution_share": 0.0})
    grey = picture(0).convert("L").convert("RGB")
    for number in range(10):
        task = stage.task_of(f"row{number}", grey, known)
        assert task.meta == {"negative_kind": "low_resolution", "instead_of_jitter": True, "corrupted": True}
        assert np.array_equal(task.shown, low_resolution(grey, short_side=20))


def test_a_flat_picture_is_not_kept_as_a_corrupted_one(stage, engine, rows, tmp_path):
    """Shrunk, one colour is that colour, and one grey pixel of another level is 1 / (48 * 40) levels in the mean."""
    known = settings(
        stage, rows, tmp_path, negatives={"bad_prompt_share": 0.0, "low_resolution_share": 1.0}, **keep_all()
    )
    flat = Image.new("RGB", (48, 40), (90, 90, 90))
    assert stage.task_of("row", flat, known) == Dropped("unchanged")
    flat.putpixel((3, 3), (91, 91, 91))
    assert stage.task_of("row", flat, known) == Dropped("unchanged")
    by_prompt = settings(stage, rows, tmp_path, negatives={"bad_prompt_share": 1.0})
    assert stage.task_of("row", flat, by_prompt).meta == {"negative_kind": "bad_prompt"}
    prompts = prompts_of(rows)[:2]
    prompts[0].images = [encode_png(flat)]
    write_records("own", prompts, output=OutputConfig(tmp_path / "flat"), record=Prompt, settings={}, seed=0)
    watched = Watched(engine)
    outcomes = stage.make_pairs(prompts, watched, known, lambda: stage.picture_owners(DataConfig(tmp_path / "flat")))
    assert outcomes[0] == Dropped("unchanged")
    assert {request.id.split("/")[0] for request in watched.calls[0]} == {prompts[1].id}


def test_colours_are_jittered_only_where_they_may_be_shown(stage, monkeypatch):
    """All of these rows are shrunk, so none is jittered before."""
    known = settings(stage, "rows", "out", negatives={"bad_prompt_share": 0.0, "low_resolution_share": 1.0})
    monkeypatch.setattr(stage, "colour_jitter", lambda *args, **kwargs: pytest.fail("jittered"))
    shown = world.draw(world.scene("train_fair", 0))
    assert {stage.task_of(f"row{n}", shown, known).meta["negative_kind"] for n in range(5)} == {"low_resolution"}


def completion(text, tokens=10, finish_reason="stop"):
    return Completion("x", text, token_ids=[1] * tokens, finish_reason=finish_reason)


@pytest.mark.parametrize(
    ("chosen", "rejected", "similarity", "reason"),
    [
        (completion("A cat."), completion("A dog."), 0.5, None),
        (completion(""), completion("A dog."), 0.0, "empty_chosen"),
        (completion("A cat."), completion(""), 0.0, "empty_rejected"),
        (completion("A cat", finish_reason="length"), completion("A dog."), 0.5, "cut_off"),
        (completion("A cat."), completion("A dog", finish_reason="length"), 0.5, "cut_off"),
        (completion("A  cat."), completion("a cat"), 1.0, "identical_answers"),
        (completion("A cat."), completion("A cat, a cat."), 0.97, "near_identical"),
        (completion("A cat."), completion("A cat, a cat."), 0.969, None),
        (completion("A cat."), completion("A dog could be added."), 0.2, "announced_fiction"),
        (completion("A cat."), completion("IMAGINE a dog."), 0.2, "announced_fiction"),
        (completion("Imagine a cat."), completion("A man of imagination."), 0.2, None),
        (completion("A cat.", 10), completion("A dog.", 20), 0.5, None),  # 2.0
        (completion("A cat.", 10), completion("A dog.", 21), 0.5, "length_ratio"),  # 2.1
        (completion("A cat.", 10), completion("A dog.", 5), 0.5, None),  # 0.5
        (completion("A cat.", 10), completion("A dog.", 4), 0.5, "length_ratio"),  # 0.4
    ],
)
def test_filters(stage, chosen, rejected, similarity, reason):
    assert stage.rejection(chosen, rejected, similarity, stage.FilterConfig()) == reason


def test_filters_can_be_turned_off(stage):
    off = stage.FilterConfig(length_ratio=None, announced=[], similarity=1.1, cut_off=False)
    assert stage.rejection(completion("A cat", 1, "length"), completion("Imagine a dog", 9, "length"), 1.0, off) is None
    assert stage.rejection(completion("A cat"), completion("a cat."), 1.0, off) == "identical_answers"


def test_every_bad_row_is_counted(stage, rows, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    given = prompts_of(rows)
    names = ["a.png", "b.png", "c.png"]
    for name, prompt in zip(names, given, strict=False):
        (folder / name).write_bytes(prompt.images[0]["bytes"])
    (folder / "cut.png").write_bytes(given[3].images[0]["bytes"][:200])
    lines = [
        {"id": "second", "image": "a.png", "question": "What else?"},
        {"id": "first", "image": "a.png", "question": "What?"},
        {"id": "b", "image": "b.png", "question": "What?", "answer": "A cat."},
        {"id": "c", "image": "c.png", "question": "What?"},
        {"id": "two", "images": ["a.png", "b.png"], "question": "<image><image> What?"},
        {"id": "text", "question": "What?"},
        {"id": "cut", "image": "cut.png", "question": "What?"},
        {"id": "gone", "image": "gone.png", "question": "What?"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest, pairs = run(stage, folder / "rows.jsonl", tmp_path / "pairs", **keep_all())
    assert manifest.rows_in == 8 == manifest.rows_used + sum(manifest.dropped.values())
    expected = {
        "several_pictures": 1,
        "duplicate_picture": 1,
        "no_picture": 1,
        "truncated_image": 1,
        "missing_image": 1,
    }
    assert {reason: manifest.dropped[reason] for reason in expected} == expected
    owner = {"first", "second"} & set(pairs)
    assert len(owner) == 1
    assert set(pairs) <= {*owner, "b", "c"}
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[::-1]))
    _, turned = run(stage, folder / "rows.jsonl", tmp_path / "turned", **keep_all())
    assert set(turned) == set(
        pairs
    )  # of the rows that show a picture the same one makes the pair, whatever their order


def test_a_refused_row_owns_no_picture(stage, rows, tmp_path):
    """Own rows (c, A), (c, B), (z, B): the second is refused for its id, so the third makes B's pair, whatever it is called."""
    given = prompts_of(rows)
    for name in "vwxyz":
        prompts = [replace(given[number], id=identity) for number, identity in ((0, "c"), (1, "c"), (1, name))]
        write_records("own", prompts, output=OutputConfig(tmp_path / name), record=Prompt, settings={}, seed=0)
        owners = stage.picture_owners(DataConfig(tmp_path / name))
        assert owners.owns("c", sha256(prompts[0].images[0]))
        assert owners.owns(name, sha256(prompts[1].images[0]))
    manifest, pairs = run(stage, tmp_path / "z", tmp_path / "pairs", **keep_all())
    assert manifest.dropped["conflicting_id"] == 1
    assert "duplicate_picture" not in manifest.dropped
    assert set(pairs) <= {"c", "z"}


def test_the_pass_over_the_pictures_shows_its_progress(stage, rows, monkeypatch):
    import tqdm

    shown = []
    monkeypatch.setattr(tqdm, "tqdm", lambda items, **known: shown.append((known["desc"], known["total"])) or items)
    stage.picture_owners(DataConfig(rows))
    assert shown == [("rows of each picture", ROWS)]


def test_a_refused_prompt_fails_its_row_alone(stage, engine, rows, tmp_path):
    known = settings(stage, rows, tmp_path, bad_prompts=["Show <image> again."], **keep_all())
    outcomes = stage.make_pairs(prompts_of(rows), engine, known, lambda: stage.picture_owners(known.data))
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    assert 0 < len(failed) < ROWS
    assert all(
        outcome.reason == "generation_failed" and "the text holds '<image>'" in outcome.message for outcome in failed
    )


def test_answers_that_do_not_end_are_counted(stage, rows, tmp_path):
    with pytest.raises(StoreError, match=f"stic made no row out of {ROWS}: {ROWS} cut_off"):
        run(stage, rows, tmp_path / "pairs", sampling={"max_new_tokens": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"negatives": {"bad_prompt_share": 1.5}},
            "bad_prompt_share is 1.5; it is a share of rows, so give a value from 0 to 1",
        ),
        ({"negatives": {"low_resolution_share": -1}}, "low_resolution_share is -1.0; it is a share"),
        ({"negatives": {"short_side": 0}}, "short_side is 0; a picture has at least 1 pixel"),
        ({"negatives": {"jitter": {"hue": [0.3, -0.3]}}}, "are ranges, lowest first"),
        ({"filters": {"length_ratio": [2.0, 0.5]}}, "is no range, so no pair would be kept. Take .0.5, 2., or null"),
        ({"filters": {"announced": ["imagine", " "]}}, "announced holds a blank word, which every answer has"),
        ({"infusion": {"template": "none"}}, "holds .description. 0 times"),
        ({"infusion": {"plain_share": 2}}, "plain_share is 2.0; it is a share"),
        ({"guided_prompt": " "}, "guided_prompt is .*a blank one asks nothing"),
        ({"neutral_prompts": []}, "neutral_prompts is .*Give at least one prompt"),
        ({"bad_prompts": [""]}, "bad_prompts is"),
    ],
)
def test_settings_that_cannot_work(stage, changes, message):
    with pytest.raises(config.ConfigError, match=message):
        settings(stage, "rows", "out", **changes)


def test_prompts_are_those_of_the_paper_in_number(stage):
    assert len(set(stage.BAD_PROMPTS)) == 8 == len(set(NEUTRAL_PROMPTS))
    assert not set(stage.BAD_PROMPTS) & set(NEUTRAL_PROMPTS)
    announced = re.compile("|".join(ANNOUNCED), re.IGNORECASE)
    assert not [
        asked for asked in stage.BAD_PROMPTS if announced.search(asked)
    ]  # a plain reply repeats words of its prompt
    order = ["main subjects", "indoors or outdoors", "mood", "light", "colours", "composed", "details", "may be about"]
    places = [stage.GUIDED_PROMPT.index(word) for word in order]
    assert places == sorted(places)


def test_configs_are_the_published_ones(stage):
    pairs, sft = (config.load(stage.Config, bundled.find(f"datagen/{name}")) for name in ("stic", "stic_sft"))
    assert (pairs.produce, sft.produce) == ("pairs", "sft")
    assert pairs.model.model_name_or_path == "llava-hf/llava-v1.6-mistral-7b-hf"
    negatives = pairs.negatives
    assert (negatives.bad_prompt_share, negatives.low_resolution_share, negatives.short_side) == (0.5, 0.5, 20)
    assert (negatives.jitter.brightness, negatives.jitter.hue, negatives.corrupt) == ((0.5, 1.5), (-0.3, 0.3), True)
    assert pairs.neutral_prompts == list(NEUTRAL_PROMPTS) == sft.neutral_prompts
    assert pairs.bad_prompts == list(stage.BAD_PROMPTS)
    for known in (pairs, sft):
        assert (known.sampling.temperature, known.sampling.top_p, known.sampling.max_new_tokens) == (0.2, 1.0, 1024)
    assert sft.infusion.plain_share == 0.0


def test_giving_one_setting_of_the_sampling_keeps_the_temperature(stage):
    known = config.build(stage.Config, {"model": {"model_name_or_path": "scenes"}, "data": {"path": "rows"},
                                        "output": {"path": "out"}, "sampling": {"max_new_tokens": 64}})  # fmt: skip
    assert known.sampling == stage.DescriptionSampling(64, 0.2)
    assert isinstance(known.sampling, Sampling)

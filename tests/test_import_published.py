"""The stage that imports published sets: what each row becomes, spans, quarantine, resume, and training on it."""

import json
import shutil

import pytest

from prefalign import bundled, config, running
from prefalign.checkpoints import SCENES_BASE
from prefalign.execution import Options
from prefalign.images import encode_png
from prefalign.losses.changed import changed_spans
from prefalign.manifest import read_manifest
from prefalign.records import Candidates, Example, Pair, message_text
from prefalign.scenes.export import export
from prefalign.sources import DataConfig
from prefalign.store import OutputConfig, StoreError, read_records
from tests.published_sets import BAD, GOOD, PAIRED, QUESTION, ROWS, pictures, said, talk, write
from tests.tiny_vlms import picture

stage = bundled.load_stage("import_published")
RED, BLUE = [[11, 18]], [[11, 20]]  # "red cup", "blue vase"


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path)


def run(folder, rows, *, output="out", layout="auto", record=Pair, **changes):
    block = changes.pop("block_size", 64)
    data = DataConfig(write(folder, rows, f"{output}.jsonl"), layout=layout)
    manifest = stage.main(stage.Config(data, OutputConfig(folder / output, block_size=block), **changes))
    return manifest, list(read_records(folder / output, record))


def test_every_paired_layout_at_once(folder):
    rows = [{"question_id": f"{name}-{n}", **row} for name in PAIRED for n, row in enumerate(ROWS[name])]
    manifest, pairs = run(folder, rows)
    assert (manifest.rows_in, manifest.rows_out, manifest.dropped) == (len(rows), len(rows), {})
    by_layout = {pair.meta["layout"]: pair for pair in reversed(pairs)}
    assert set(by_layout) == set(PAIRED)
    for name, pair in by_layout.items():
        assert pair.method == name
        assert (message_text(pair.chosen), message_text(pair.rejected)) == (GOOD, BAD)
        assert [GOOD[a:b] for a, b in pair.meta["changed"]["chosen"]] == ["red cup"]
        assert [BAD[a:b] for a, b in pair.meta["changed"]["rejected"]] == ["blue vase"]
    assert by_layout["rlhf_v"].meta["columns"]["origin_dataset"] == "vqav2"
    assert by_layout["rlhf_v"].meta["parent"] == "rlhf_v-0"
    found = json.loads((folder / "out" / "import.json").read_text())
    assert found["layouts"] == {name: len(ROWS[name]) for name in sorted(PAIRED)}
    assert found["with_rejected_images"] == 2  # mvc, ms_swift
    spans = sum(len(pair.meta["changed"]["chosen"]) for pair in pairs)
    assert found["changed_spans_per_pair"] == round(spans / len(pairs), 2)


def test_a_swapped_picture_is_another_row(folder):
    row = ROWS["rlaif_v"][0]
    _, [pair] = run(folder, [row])
    _, [other] = run(folder, [{**row, "image": "b.png"}], output="swapped")
    _, [again] = run(folder, [row], output="again")
    assert pair == again
    assert pair.images[0]["bytes"] != other.images[0]["bytes"]
    assert pair.meta["images_sha256"] != other.meta["images_sha256"]
    assert pair.id != other.id


@pytest.mark.parametrize(
    ("chosen", "rejected", "min_block", "spans"),
    [
        (GOOD, BAD, 3, (RED, BLUE)),
        (GOOD, GOOD, 3, ([], [])),
        ("a b c d e f", "a b c x d e f", 3, ([], [])),  # a pure insertion is no span
        ("one two", "three four five", 3, ([[0, 7]], [[0, 15]])),  # nothing in common: all of both
        ("Yes, a cat sits here now.", "Yes, a dog sits here now.", 3, ([[7, 10]], [[7, 10]])),
        # two equal words between two changes are too few: one span, or two where single words count
        ("a b c X d e Y f g h", "a b c P d e Q f g h", 3, ([[6, 13]], [[6, 13]])),
        ("a b c X d e Y f g h", "a b c P d e Q f g h", 1, ([[6, 7], [12, 13]], [[6, 7], [12, 13]])),
    ],
)
def test_spans_are_those_of_the_published_rule(chosen, rejected, min_block, spans):
    assert stage.changed_characters(chosen, rejected, min_block) == {"chosen": spans[0], "rejected": spans[1]}


def test_spans_are_the_tokens_that_ddpo_weighs():
    """On the embedded world a word is a token: the spans in characters cover the tokens that the loss finds, and no other."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SCENES_BASE / "tokenizer.json"))
    for chosen, rejected in (
        (
            "there is a red star at the top left and a blue ring",
            "there is a green circle at the top left and a blue ring",
        ),
        ("a large red star and a small ring at the top", "a small red star and a small heart at the top"),
    ):
        told = {text: tokenizer.encode(text, add_special_tokens=False) for text in (chosen, rejected)}
        ids = [told[text].ids for text in (chosen, rejected)]
        spans = changed_spans(*ids)
        found = stage.changed_characters(chosen, rejected)
        assert spans
        for side, text, each in (
            ("chosen", chosen, [a for a, _ in spans]),
            ("rejected", rejected, [b for _, b in spans]),
        ):
            offsets = told[text].offsets
            covered = [text[offsets[span.start][0] : offsets[span.stop - 1][1]].strip() for span in each]
            assert [text[start:stop] for start, stop in found[side]] == covered


def test_graded_and_unpaired_rows_become_candidates(folder):
    manifest, found = run(
        folder, [*ROWS["vlfeedback"], *ROWS["kto"], *ROWS["povid"]], produce="candidates", record=Candidates
    )
    assert manifest.rows_out == 4
    graded, up, down, two = found
    assert graded.responses[0]["scores"] == {
        "helpfulness": 5.0,
        "ethical_considerations": 5.0,
        "visual_faithfulness": 4.0,
    }
    assert graded.facts["columns"] == {"models": ["gpt4_v", "qwen_vl_chat"]}
    assert graded.facts["imported"]["parent"] == "llava-0"
    assert [row.responses[0]["scores"] for row in (up, down)] == [{"label": 1.0}, {"label": 0.0}]
    assert [answer["scores"]["preference"] for answer in two.responses] == [1.0, 0.0]


def test_graded_answers_become_pairs_in_select_responses(folder):
    """Silkie's pairs of VLFeedback: of two answers the one with the higher mean of the three grades; a missing grade, no pair."""
    completions = {**ROWS["vlfeedback"][0]["completions"]}
    grades = json.loads(json.dumps(completions["annotations"]).replace("N/A", "5"))
    rows = [
        ROWS["vlfeedback"][0],
        {**ROWS["vlfeedback"][0], "id": "1", "completions": {**completions, "annotations": grades}},
    ]
    run(folder, rows, produce="candidates", record=Candidates)
    select = bundled.load_stage("select_responses")
    third = 1 / 3
    quality = {"helpfulness": third, "ethical_considerations": third, "visual_faithfulness": third}
    rules = select.PairsConfig(min_gap=0.001, group_size=None)
    manifest = select.main(select.Config(DataConfig(folder / "out"), OutputConfig(folder / "pairs"), produce="ranked",
                                         quality=quality, pairs=rules))  # fmt: skip
    [pair] = read_records(folder / "pairs", Pair)
    assert (message_text(pair.chosen), message_text(pair.rejected)) == (GOOD, BAD)
    assert pair.margin == pytest.approx((5 + 5 + 4) / 3 - (2 + 5 + 1) / 3)
    assert manifest.dropped == {"group_size": 1}


def test_answers_to_imitate_become_examples(folder):
    llava = {
        "id": "9",
        "image": "a.png",
        "conversations": talk(f"<image>\n{QUESTION}", GOOD, "Which colour?", "Red."),
        "model": "x",
    }
    disliked = {"conversations": talk(QUESTION, BAD), "kto_tag": False}
    manifest, found = run(
        folder,
        [llava, *ROWS["kto"], *ROWS["povid"], {**ROWS["verl"][0], "id": "10"}, disliked],
        produce="examples",
        record=Example,
    )
    assert manifest.dropped == {"no_reference": 2}  # the answers with a thumb down
    assert [turn["role"] for turn in found[0].messages] == ["user", "assistant", "user", "assistant"]
    assert message_text(found[0].messages).endswith("Which colour?\nRed.")
    assert found[0].meta["columns"] == {"model": "x"}
    assert [message_text(row.messages[-1:]) for row in found[1:]] == [GOOD] * 3


def test_what_cannot_be_imported_is_counted_by_reason(folder):
    whole = encode_png(picture(0))["bytes"]
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    good = ROWS["trl"][0]
    rows = [
        good,
        {**good, "images": ["gone.png"]},
        {**good, "images": ["broken.png"]},
        {**good, "images": ["a.png", "b.png"]},
        {**good, "rejected": good["chosen"]},
        {"image": "a.png", "text": "hello"},
        {**ROWS["llava_rlhf"][0], "preference": 3},
        ROWS["vlfeedback"][0],
        ROWS["verl"][0],
        {**ROWS["ms_swift"][0], "margin": "much"},
    ]
    manifest, pairs = run(folder, rows)
    assert len(pairs) == 1
    assert manifest.dropped == {
        "missing_image": 1, "truncated_image": 1, "placeholder_mismatch": 1, "identical_answers": 1, "missing_column": 2,
        "bad_preference": 1, "not_a_pair": 1, "bad_margin": 1,
    }  # fmt: skip
    assert manifest.rows_in == len(rows) == manifest.rows_used + sum(manifest.dropped.values())
    messages = (folder / "out" / "quarantine" / "00000.jsonl").read_text()
    assert "'gone.png' is not in" in messages
    _, pairs = run(folder, [*ROWS["povid"], good], output="named", layout="povid")
    assert read_manifest(folder / "named").dropped == {"wrong_layout": 1}


def test_rows_of_another_kind_alone_stop_with_advice(folder):
    with pytest.raises(StoreError, match=r"made no row out of 1: 1 not_a_pair.*`produce: candidates`"):
        run(folder, ROWS["vlfeedback"])
    with pytest.raises(ValueError, match="min_block is 0; a stretch of equal words has at least 1 word"):
        run(folder, ROWS["trl"], min_block=0)


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
@pytest.mark.parametrize("content", ['{"name": "an app", "complete": true}', "[]", "{"])
def test_a_folder_of_somebody_else_is_left_alone(folder, name, content):
    (folder / "out").mkdir()
    (folder / "out" / name).write_text(content)
    made = stage.Config(DataConfig(write(folder, ROWS["trl"])), OutputConfig(folder / "out"))
    with pytest.raises(StoreError, match="out is not empty and holds no stage's output. Give another `output.path`"):
        running.run("import_published", stage, made, Options())
    assert [(file.name, file.read_text()) for file in (folder / "out").iterdir()] == [(name, content)]


def test_a_stopped_import_goes_on_and_another_reading_is_refused(folder):
    rows = [{**ROWS["rlaif_v"][0], "idx": str(n), "question": f"{QUESTION} {n}"} for n in range(5)]
    _, whole = run(folder, rows, block_size=2)
    out = folder / "stopped"
    run(folder, rows, block_size=2, output="stopped")
    for file in ("manifest.json", "import.json", "progress/00001.json"):
        (out / file).unlink()
    before = (out / "data" / "train-00000.parquet").stat().st_mtime_ns
    _, pairs = run(folder, rows, block_size=2, output="stopped")
    assert pairs == whole
    assert (out / "data" / "train-00000.parquet").stat().st_mtime_ns == before
    with pytest.raises(StoreError, match="holds rows made with another config.*data_sha256"):
        run(folder, rows, block_size=2, output="stopped", layout="rlaif_v")


@pytest.mark.parametrize("name", ["datagen/import_published", "datagen/import_published_scenes"])
def test_both_configs_read_twins(name, tmp_path):
    """Twins of the embedded world in TRL's columns: both pictures are kept, and the changed words are found."""
    export(tmp_path / "twins", kind="twin", regime="fair", start=0, stop=4)
    changes = {"data": {"path": tmp_path / "twins"}, "output": {"path": tmp_path / "out"}}
    values = config.merge(config.read_yaml(bundled.configs()[name]), changes)
    manifest = stage.main(config.build(stage.Config, values, source=name))
    assert manifest.rows_out == 4
    twins = list(read_records(tmp_path / "twins", Pair))
    for pair, twin in zip(read_records(tmp_path / "out", Pair), twins, strict=True):
        assert (pair.images, pair.rejected_images, pair.chosen) == (twin.images, twin.rejected_images, twin.chosen)
        assert (pair.method, pair.facts["world"], pair.meta["parent"]) == (twin.method, "scenes", twin.id)
        assert pair.meta["changed"]["chosen"]


def test_rows_without_a_picture_are_said(folder, capsys):
    """With the columns that were not read, where a picture's name may be; training on them says so too."""
    row = {"question": QUESTION, "chosen": GOOD, "rejected": BAD}
    rows = [{**row, "file": "a.png", "id": str(n), "source": None} for n in range(2)]
    for produce, record in (("pairs", Pair), ("candidates", Candidates), ("examples", Example)):
        run(folder, rows, output=produce, produce=produce, record=record)
        said_of_them = capsys.readouterr().err.splitlines()
        assert said_of_them[-1] == "2 of 2 rows have no picture; columns that were not read: file"
        found = json.loads((folder / produce / "import.json").read_text())
        assert (found["without_picture"], found["columns_of_rows_without_picture"]) == (2, ["file"])
    run(folder, [{**rows[0], "image": "a.png"}, row], output="mixed")
    assert capsys.readouterr().err.endswith("1 of 2 rows have no picture\n")
    run(folder, [{**rows[0], "image": "a.png"}], output="shown")
    assert "no picture" not in capsys.readouterr().err
    train_one_step(
        "train_preference_mdpo", folder / "pairs", folder / "policy", losses=[{"name": "text"}], negative=None
    )
    assert "2 pairs, none has a picture, so nothing visual is learned" in capsys.readouterr().out


def train_one_step(name, pairs, output, **changes):
    """A step on two pairs of the scenes model, by a bundled config."""
    recipe = bundled.load_stage("train_preference")
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": False,
               "logging_steps": 1}  # fmt: skip
    changes |= {"model": {"model_name_or_path": "scenes", "dtype": "auto", "device": "cpu"}, "pairs": pairs, "output": output,
                "trainer": trainer}  # fmt: skip
    values = config.merge(config.read_yaml(bundled.configs()[f"recipes/{name}"]), changes)
    recipe.main(config.build(recipe.Config, values, source=name))


def test_two_pictures_of_ms_swift_train_as_they_do_there(folder):
    """Its DPO on rows of `rejected_images` is the term `visual` for one answer on two pictures, `two_pictures` for all rows."""
    same, other = ROWS["ms_swift"][3], ROWS["ms_swift"][2]
    both = {**same, "rejected_images": ["b.png"]}
    talk_of = [said("user", "<image>Which colour?"), said("assistant", GOOD)]
    explicit = {**both, "messages": talk_of, "rejected_messages": talk_of}
    manifest, pairs = run(folder, [same, other, both, explicit])
    assert manifest.dropped == {}
    assert [[len(pair.images), len(pair.rejected_images)] for pair in pairs] == [[1, 0], [1, 1], [1, 1], [1, 1]]
    assert [message_text(pair.rejected) for pair in pairs] == [BAD, GOOD, BAD, GOOD]
    assert [pair.on_two_pictures for pair in pairs] == [False, False, True, False]
    assert json.loads((folder / "out" / "import.json").read_text())["two_answers_on_two_pictures"] == 1
    shown = [{**other, "messages": [said("user", f"<image>describe {n} ."), said("assistant", "there is a red star")]}
             for n in range(2)]  # fmt: skip
    run(folder, shown, output="shown")
    changes = {"losses": [{"name": "visual"}], "negative": None}
    train_one_step("train_preference_mdpo", folder / "shown", folder / "policy", **changes)
    history = json.loads((folder / "policy" / "trainer_state.json").read_text())["log_history"]
    [first] = [entry for entry in history if "loss" in entry]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert first["grad_norm"] > 0  # the pictures differ, so there is something to learn
    shutil.rmtree(folder / "policy")


def test_two_answers_on_two_pictures_of_ms_swift_train_with_their_own_loss(folder):
    """Beside rows with one picture and rows with one answer, as in a file of ms-swift's; any other text loss refuses the set."""
    talk_of = [said("user", "<image>describe the picture ."), said("assistant", "there is a red star")]
    row = {"messages": talk_of, "images": ["a.png"]}
    other = {"rejected_response": "there is a blue ring"}
    rows = [{**row, **other, "rejected_images": ["b.png"]}, {**row, **other}, {**row, "rejected_images": ["b.png"]}]
    manifest, _ = run(folder, rows)
    assert (manifest.rows_out, manifest.dropped) == (3, {})
    train_one_step("train_preference_two_pictures", folder / "out", folder / "policy")
    history = json.loads((folder / "policy" / "trainer_state.json").read_text())["log_history"]
    [first] = [entry for entry in history if "loss" in entry]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert first["grad_norm"] > 0
    shutil.rmtree(folder / "policy")
    with pytest.raises(
        ValueError, match="1 of the 3 pairs of .* reject an answer about `rejected_images`.*and ddpo would rej"
    ):
        train_one_step("train_preference_rlhf_v", folder / "out", folder / "policy")


def test_an_imported_set_trains_with_ddpo(folder):
    said = [{"question": "describe the picture .", "chosen": f"there is a red star {n}", "rejected": f"there is a blue ring {n}"}
            for n in range(2)]  # fmt: skip
    rows = [{"image": name, "idx": n, "text": json.dumps(said[n])} for n, name in enumerate(("a.png", "b.png"))]
    run(folder, rows)
    train_one_step("train_preference_rlhf_v", folder / "out", folder / "policy")
    [log] = [
        entry
        for entry in json.loads((folder / "policy" / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert log["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert 0 < log["ddpo/changed"] < 1
    shutil.rmtree(folder / "policy")

"""Re-Align: the rank loop worked by hand, and the stage end to end on scenes with the shipped model."""

import json
import shutil

import pytest
from PIL import Image

from prefalign import bundled, config
from prefalign.checkpoints import ModelError
from prefalign.engines import Completion
from prefalign.images import open_image, sha256
from prefalign.manifest import read_manifest
from prefalign.masking import RuleMasker
from prefalign.pictures import build_pool
from prefalign.records import Pair, Prompt, message_text, user_message
from prefalign.retrieval import build_index
from prefalign.scenes import language, world
from prefalign.scenes.export import export
from prefalign.store import Dropped, Failed, StoreError, read_records
from prefalign.text import lexical_similarity
from tests.test_masking import Scripted
from tests.test_retrieval import Compass

ROWS = 12


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("re_align")


# the rank loop, with recorded answers and pictures whose similarity is known


def plain(angle, number=0):
    """A picture whose vector has this direction (see `test_retrieval`)."""
    from prefalign.images import encode_png

    return encode_png(Image.new("RGB", (4, 4), (angle // 2, angle % 2, number)))


def settings(stage, tmp_path, **more):
    values = {
        "model": {"model_name_or_path": "scenes"},
        "data": {"path": tmp_path / "rows.jsonl"},
        "output": {"path": tmp_path / "out"},
        "masking": {"masker": "rules", "words": "vocabulary"},
        **more,
    }
    return config.build(stage.Config, values)


def work(stage, tmp_path, rows, answers, *, similarity=lexical_similarity, angles=(0, 30, 60, 90), **more):
    """Outcomes of one block whose pictures are at these angles, and the engine that gave the answers."""
    for number, angle in enumerate(angles):
        Image.new("RGB", (4, 4), (angle // 2, angle % 2, 0)).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"id": n, "image": f"{n}.png", "question": "?"}) + "\n" for n in range(len(angles))]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    built = settings(stage, tmp_path, **more)
    pool = build_pool(tmp_path / "pool", built.data)
    index = build_index(tmp_path / "vectors", pool, Compass())
    engine = Scripted(*answers)
    tools = stage.Tools(engine, RuleMasker(built.masking), similarity, lambda: index,
                        {"generator": "g", "embedder": "e", "masker": "m"})  # fmt: skip
    return stage.process(rows, tools, built), engine


def prompt(answer, *angles, name="row"):
    return Prompt(name, [plain(angle) for angle in angles], [user_message("What is it?", len(angles))], answer)


def test_the_first_neighbour_below_the_threshold_is_taken(stage, tmp_path):
    """Similarities 1, 0.95, 0.9499: rank 1 repeats the answer, rank 2 is at the threshold, rank 3 below it."""
    given = {"A red ring is there.": 1.0, "A red star is there.": 0.95, "A blue star is there.": 0.9499}

    def similarity(one, other):
        assert set(one) == {"A red ring is there."}
        return [given[text] for text in other]

    answers = [" red ring is there.", " red star is there.", " blue star is there."]
    ([pair],), engine = work(stage, tmp_path, [prompt("A red ring is there.", 0)], answers, similarity=similarity)
    assert message_text(pair.chosen) == pair.answer == "A red ring is there."
    assert message_text(pair.rejected) == "A blue star is there."
    assert [image["bytes"] for image in pair.images] == [plain(0)["bytes"]]
    assert [image["bytes"] for image in pair.rejected_images] == [plain(90)["bytes"]]
    meta = pair.meta
    assert (meta["retrieval_rank"], meta["image_similarity"], meta["text_similarity"]) == (3, 0.0, 0.9499)
    assert (meta["masked_response"], meta["masking_level"]) == ("[MASK] is there.", "segment")
    assert (meta["fills"], meta["fills_cut"]) == (["A blue star"], 0)
    assert (meta["generator"], meta["embedder"], meta["masker"]) == ("g", "e", "m")
    assert meta["neighbour_sha256"] == sha256(plain(90))
    seen = [request for call in engine.asked for request in call]
    assert [request.id for request in seen] == ["row/1/0", "row/2/0", "row/3/0"]
    shown = [request.images[0].getpixel((0, 0)) for request in seen]
    assert shown == [open_image(plain(angle)).getpixel((0, 0)) for angle in (30, 60, 90)]


def test_rows_still_open_are_worked_on_together_at_each_rank(stage, tmp_path):
    rows = [prompt("A red ring is there.", 0, name="a"), prompt("A blue ring is there.", 30, name="b")]
    answers = [" red ring is there.", " green star is there.", " blue star is there."]
    (first, second), engine = work(stage, tmp_path, rows, answers)
    assert [[request.id for request in call] for call in engine.asked] == [["a/1/0", "b/1/0"], ["a/2/0"]]
    assert (first[0].meta["retrieval_rank"], second[0].meta["retrieval_rank"]) == (2, 1)


def test_a_short_answer_is_taken_as_soon_as_it_differs(stage, tmp_path):
    """One word, so the similarity says nothing; case and punctuation make no difference."""
    ([pair],), _ = work(stage, tmp_path, [prompt("Red.", 0)], ["red.", "blue."], similarity=lambda one, other: [1.0])
    assert (message_text(pair.rejected), pair.meta["retrieval_rank"]) == ("blue.", 2)
    (long,), _ = work(stage, tmp_path, [prompt("Red.", 0)], ["blue."] * 3, short_words=0,
                      similarity=lambda one, other: [1.0])  # fmt: skip
    assert long == Dropped("too_similar")


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        ([" red ring is there."] * 3, Dropped("identical_answers")),
        ([" [MASK] is there."] * 3, Dropped("unfilled")),
        ([" unable to see is there."] * 3, Dropped("refusal")),
        ([" "] * 3, Dropped("empty_completion")),
        ([" "] * 2 + [" red ring is there."], Dropped("identical_answers")),
        ([Completion("x", "", finish_reason="error", error="too long")] * 3, Failed("generation_failed", "too long")),
    ],
)
def test_a_row_that_no_rank_serves_is_dropped_for_what_the_last_one_failed_by(answers, outcome, stage, tmp_path):
    (found,), engine = work(stage, tmp_path, [prompt("A red ring is there.", 0)], answers)
    assert found == outcome
    assert len(engine.asked) == 3


def test_no_more_ranks_than_k(stage, tmp_path):
    answers = [" red ring is there."] * 2
    (found,), engine = work(stage, tmp_path, [prompt("A red ring is there.", 0)], answers, retrieval={"k": 2})
    assert (found, len(engine.asked)) == (Dropped("identical_answers"), 2)


def test_near_duplicates_are_passed_over_and_strangers_are_no_neighbours(stage, tmp_path):
    row, answer = prompt("A red ring is there.", 0), [" blue star is there."]
    angles = (0, 10, 60, 200)
    ([pair],), _ = work(stage, tmp_path, [row], answer, angles=angles)
    assert (pair.meta["image_similarity"], pair.meta["retrieval_rank"]) == (0.5, 1)
    ([pair],), _ = work(stage, tmp_path, [row], answer, angles=angles, retrieval={"ceiling": 0.99})
    assert pair.meta["image_similarity"] == 0.984808
    (found,), engine = work(stage, tmp_path, [row], [], angles=angles, retrieval={"floor": 0.6})
    assert (found, engine.asked) == (Dropped("no_neighbour"), [])


def test_of_several_pictures_the_first_is_exchanged_and_none_of_the_row_is_its_neighbour(stage, tmp_path):
    row = prompt("A red ring is there.", 0, 30)
    ([pair],), engine = work(stage, tmp_path, [row], [" blue star is there."])
    assert [image["bytes"] for image in pair.images] == [plain(0)["bytes"], plain(30)["bytes"]]
    assert [image["bytes"] for image in pair.rejected_images] == [plain(60)["bytes"], plain(30)["bytes"]]
    assert [image.getpixel((0, 0)) for image in engine.asked[0][0].images] == [(30, 0, 0), (15, 0, 0)]


def test_a_picture_exchanged_after_the_pool_was_built_is_no_silent_loss(stage, tmp_path):
    (found,), _ = work(stage, tmp_path, [prompt("A red ring is there.", 44)], [])
    assert found.reason == "picture_not_in_pool"
    assert (
        "was exchanged after the pool was built and neighbours would be those of the old one. Start anew"
        in found.message
    )


def test_chosen_answers_may_be_the_generators(stage, tmp_path):
    rows = [
        prompt(None, 0, name="a"),
        prompt("A hoop.", 30, name="b"),
        prompt("", 60, name="c"),
        prompt("x", 90, name="d"),
    ]
    answers = [
        "A red ring is there.",
        Completion("b", "A red", finish_reason="length"),
        " ",
        Completion("d", "", finish_reason="error", error="too long"),
        " blue star is there.",
    ]
    ([pair], *others), engine = work(stage, tmp_path, rows, answers, chosen="engine")
    assert (message_text(pair.chosen), message_text(pair.rejected)) == ("A red ring is there.", "A blue star is there.")
    assert pair.answer is None
    assert others == [Dropped("chosen_cut_off"), Dropped("empty_chosen"), Failed("generation_failed", "too long")]
    assert [request.id for request in engine.asked[0]] == ["a/chosen", "b/chosen", "c/chosen", "d/chosen"]


def test_chosen_answers_are_drawn_as_chosen_sampling_says(stage, tmp_path):
    row, answers = prompt(None, 0), ["A red ring is there.", " blue star is there."]
    given = {
        "chosen_sampling": {"max_new_tokens": 7},
        "mask_sampling": {"max_new_tokens": 8},
        "sampling": {"max_new_tokens": 9},
    }
    _, engine = work(stage, tmp_path, [row], answers, chosen="engine", **given)
    assert [sampling.max_new_tokens for sampling in engine.samplings] == [7, 9]


@pytest.mark.parametrize(("words", "similarity", "taken"), [(40, 1 - 5 / 79, True), (60, 1 - 5 / 119, False)])
def test_a_small_change_of_a_long_answer_is_too_similar_for_lexical(words, similarity, taken, stage, tmp_path):
    """Two words of 40 different ones exchanged: 2 words and 3 pairs of 40 + 39 differ, cosine 1 - 5 / 79 = 0.937. Of 60 words:
    1 - 5 / 119 = 0.958."""
    rest = " ".join(f"w{number}" for number in range(words - 3))
    answer, other = f"a red ring {rest}", f"a blue star {rest}"
    assert lexical_similarity([answer], [other]) == pytest.approx([similarity])
    (found,), _ = work(stage, tmp_path, [prompt(answer, 0)], [f" blue star {rest}"], retrieval={"k": 1})
    assert (found != Dropped("too_similar")) == taken
    assert not taken or message_text(found[0].rejected) == other


def test_completion_by_request(stage, tmp_path):
    row = prompt("The picture shows a red ring at the top.", 0)
    answers = ["What a lovely day!", "The picture shows [MASK].", "The photo shows a blue star at the bottom."]
    ([pair],), engine = work(stage, tmp_path, [row], answers, completion="instruct", max_edits=0.25)
    assert message_text(pair.rejected) == "The picture shows a blue star at the bottom."
    assert pair.meta["retrieval_rank"] == 3
    assert "The picture shows [MASK]." in message_text(engine.asked[0][0].messages)


# end to end


def write_rows(folder, indices, *, answers=None, pictures=None):
    """Captions of scenes as LLaVA rows with picture files; `pictures` names other scenes to show in some rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in indices:
        scene = world.scene("train_biased", index)
        shown = world.scene("train_biased", (pictures or {}).get(index, index))
        (folder / f"{index}.png").write_bytes(world.png(shown))
        answer = (answers or {}).get(index, language.caption(scene))
        turns = [{"from": "human", "value": "<image>\nDescribe the picture."}, {"from": "gpt", "value": answer}]
        rows.append({"id": f"row{index}", "image": f"{index}.png", "conversations": turns})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(stage, rows, output, *, block_size=8, batch_size=16, max_quarantine=100, **more):
    values = config.merge(
        config.read_yaml(bundled.configs()["datagen/re_align_scenes"]),
        {
            "data": {"path": rows / "rows.jsonl", "images": None},
            "output": {"path": output, "block_size": block_size, "max_quarantine": max_quarantine},
            "retrieval": {"floor": -1.0, "k": 4},
            "batch_size": batch_size,
            **more,
        },
    )
    manifest = stage.main(config.build(stage.Config, values))
    return manifest, {pair.meta["parent"]: pair for pair in read_records(output, Pair)}


def rejected(pairs):
    return {name: (message_text(pair.rejected), pair.meta["neighbour_sha256"]) for name, pair in pairs.items()}


@pytest.fixture(scope="module")
def finished(stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("re_align")
    rows = write_rows(folder / "rows", range(ROWS))
    manifest, pairs = run(stage, rows, folder / "pairs")
    return rows, folder / "pairs", manifest, pairs


def false_details(text, scene):
    """Mentions of a text that no object of the scene fits."""
    return sum(
        not any(
            (thing.shape == mention.shape)
            and mention.colour in (None, thing.colour)
            and mention.size in (None, thing.size)
            and mention.place in (None, thing.place)
            for thing in scene.objects
        )
        for mention in language.parse(text)
        if not mention.negated
    )


def test_pairs_hold_what_the_method_says(finished):
    """Every rejected answer is false of its own picture, and speaks in the sentences of the chosen one."""
    rows, _, manifest, pairs = finished
    assert manifest.rows_in == ROWS == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out == len(pairs) >= ROWS - 1
    known = {
        sha256({"bytes": world.png(scene), "path": None}): scene for scene in world.scenes("train_biased", 0, ROWS)
    }
    for name, pair in pairs.items():
        index = int(name.removeprefix("row"))
        scene = world.scene("train_biased", index)
        pair.check()
        assert message_text(pair.chosen) == language.caption(scene)
        assert pair.images[0]["bytes"] == (rows / f"{index}.png").read_bytes()
        (other,) = pair.rejected_images
        neighbour = known[sha256(other)]
        assert neighbour.objects != scene.objects
        assert pair.meta["neighbour_sha256"] == sha256(other)
        assert 1 <= pair.meta["retrieval_rank"] <= 4
        assert -1 <= pair.meta["image_similarity"] < 0.9999
        assert pair.meta["text_similarity"] < 0.95
        assert pair.meta["settings"]["models"] == manifest.models
        assert set(manifest.models) == {"generator", "embedder", "masker"}
        assert "[MASK]" in pair.meta["masked_response"]
        assert "[MASK]" not in message_text(pair.rejected)
        assert len(language.sentences(message_text(pair.rejected))) == len(
            language.sentences(message_text(pair.chosen))
        )
        assert false_details(message_text(pair.chosen), scene) == 0
    worse = [
        false_details(message_text(pair.rejected), world.scene("train_biased", int(name[3:])))
        for name, pair in pairs.items()
    ]
    assert sum(count > 0 for count in worse) >= 0.9 * len(worse)


def test_batch_size_and_order_of_rows_change_no_row(stage, finished, tmp_path):
    _, small = run(stage, finished[0], tmp_path / "small", batch_size=3)
    rows = tmp_path / "rows"
    shutil.copytree(finished[0], rows)
    lines = (rows / "rows.jsonl").read_text().splitlines(keepends=True)
    (rows / "rows.jsonl").write_text("".join(lines[::-1]))
    _, turned = run(stage, rows, tmp_path / "turned", block_size=5)
    for pairs in (small, turned):
        assert rejected(pairs) == rejected(finished[3])
        assert {pair.id for pair in pairs.values()} == {pair.id for pair in finished[3].values()}


def test_resume_gives_the_same_rows_and_keeps_the_embeddings(stage, finished, tmp_path):
    rows, folder, _, pairs = finished
    shutil.copytree(folder, tmp_path / "pairs")
    (tmp_path / "pairs" / "manifest.json").unlink()
    (tmp_path / "pairs" / "progress" / "00001.json").unlink()
    (tmp_path / "pairs" / "data" / "train-00001.parquet").unlink()
    vectors = tmp_path / "pairs" / "pool" / "embeddings" / "00000.npy"
    written = vectors.stat().st_mtime_ns
    manifest, again = run(stage, rows, tmp_path / "pairs")
    assert {name: pair.to_row() for name, pair in again.items()} == {
        name: pair.to_row() for name, pair in pairs.items()
    }
    assert manifest == read_manifest(folder)
    assert vectors.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "change",
    [{"threshold": 0.9}, {"seed": 1}, {"embedder": {"feature": "max"}}, {"retrieval": {"k": 3}}, {"completion": "instruct"},
     {"masking": {"level": "sentence"}}],
)  # fmt: skip
def test_another_config_refuses_the_folder(change, stage, finished):
    with pytest.raises(StoreError, match="another config"):
        run(stage, finished[0], finished[1], **change)


def test_the_rows_picture_and_the_pools_pictures_matter(stage, finished, tmp_path):
    """Another picture in row 0 gives it another neighbour; another picture for its neighbour gives it another answer; rows
    whose own picture and neighbours are as they were keep theirs."""
    before = rejected(finished[3])
    known = {
        sha256({"bytes": world.png(scene), "path": None}): scene.index
        for scene in world.scenes("train_biased", 0, ROWS)
    }
    _, swapped = run(stage, write_rows(tmp_path / "own", range(ROWS), pictures={0: 40}), tmp_path / "a")
    assert rejected(swapped)["row0"][1] != before["row0"][1]
    assert rejected(swapped)["row0"][0] != before["row0"][0]
    near = known[before["row0"][1]]
    _, moved = run(stage, write_rows(tmp_path / "pool", range(ROWS), pictures={near: 41}), tmp_path / "b")
    assert rejected(moved)["row0"][0] != before["row0"][0]
    kept = [name for name in before if name in moved and rejected(moved)[name] == before[name]]
    assert kept


def test_sentence_level_and_seed_change_the_answers(stage, finished, tmp_path):
    _, sentences = run(stage, finished[0], tmp_path / "sentences", masking={"level": "sentence"})
    assert all(pair.meta["masked_response"].replace("[MASK].", "").strip() == "" for pair in sentences.values())
    _, seeded = run(stage, finished[0], tmp_path / "seeded", seed=1)
    for pairs in (sentences, seeded):
        assert rejected(pairs) != rejected(finished[3])
        assert not {pair.id for pair in pairs.values()} & {pair.id for pair in finished[3].values()}


def test_every_row_without_a_pair_is_counted(stage, tmp_path):
    rows = write_rows(tmp_path / "rows", range(4), answers={1: "It is nice.", 2: "A [MASK] circle."})
    whole = (rows / "0.png").read_bytes()
    (rows / "cut.png").write_bytes(whole[: len(whole) // 2])
    bad = [
        {"id": "silent", "image": "0.png", "question": "What?"},
        {"id": "text", "question": "What?", "answer": "A ring."},
        {"id": "cut", "image": "cut.png", "question": "What?", "answer": "A ring."},
        {"id": "mark", "image": "0.png", "question": "What?", "answer": "<image> is a ring. It sits."},
    ]
    with (rows / "rows.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in bad)
    manifest, pairs = run(stage, rows, tmp_path / "pairs")
    assert manifest.rows_in == 8 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.dropped == {"generation_failed": 1, "marker_in_answer": 1, "no_picture": 1, "no_reference": 1,
                                "nothing_to_mask": 1, "truncated_image": 1}  # fmt: skip
    assert set(pairs) == {"row0", "row3"}
    messages = " ".join(file.read_text() for file in (tmp_path / "pairs" / "quarantine").iterdir())
    assert "the text holds '<image>'" in messages


def test_pairs_of_a_stage_load_with_datasets(finished):
    from datasets import load_dataset

    rows = load_dataset(str(finished[1]), split="train")
    assert len(rows) == len(finished[3])
    assert len(rows[0]["rejected_images"]) == 1


def test_settings_that_make_no_sense_are_refused(stage, tmp_path):
    with pytest.raises(
        ValueError, match=r"threshold 0.0 is the cosine similarity below which a completion is accepted"
    ):
        settings(stage, tmp_path, threshold=0.0)
    with pytest.raises(ValueError, match="max_edits 1.0 is the share of unmasked words that a completion may change"):
        settings(stage, tmp_path, max_edits=1.0)
    rows = write_rows(tmp_path / "rows", range(2))
    with pytest.raises(ModelError, match="there is no folder"):
        run(stage, rows, tmp_path / "pairs", embedder={"model_name_or_path": str(tmp_path / "nowhere")})


def test_settings_that_are_not_read_change_no_row(stage, tmp_path):
    def of(**more):
        return stage.row_settings(settings(stage, tmp_path, **more))

    plain = of()
    assert set(plain["masking"]) == {"masker", "level", "words", "vocabulary", "marker"}
    assert of(max_edits=0.5, mask_sampling={"max_new_tokens": 9}, chosen_sampling={"max_new_tokens": 9}) == plain
    assert of(max_edits=0.5, completion="instruct") != of(completion="instruct")
    own, masks = {"chosen": "engine"}, {"masking": {"masker": "engine"}}
    for sampling, reader, other in (("chosen_sampling", own, masks), ("mask_sampling", masks, own)):
        assert of(**reader, **{sampling: {"max_new_tokens": 9}}) != of(**reader)
        assert of(**other, **{sampling: {"max_new_tokens": 9}}) == of(**other)
    assert set(of(masking={"masker": "rules", "words": "general"})["masking"]) == {"masker", "level", "words", "marker"}
    assert set(of(masking={"masker": "engine"})["masking"]) == {"masker", "level", "marker"}


def test_configs_are_the_published_ones(stage):
    built = config.load(stage.Config, bundled.find("datagen/re_align"))
    assert (built.threshold, built.retrieval.k, built.masking.level, built.masking.masker) == (
        0.95,
        10,
        "segment",
        "engine",
    )
    assert built.embedder.model_name_or_path == "openai/clip-vit-large-patch14"
    assert built.embedder.feature == "auto"
    assert built.chosen == "reference"
    assert built.retrieval.ceiling == 0.97
    assert built.model.model_name_or_path == "llava-hf/llava-1.5-7b-hf"
    assert built.similarity == "lexical"  # a departure, which the stage and the config name
    assert "The default similarity is `lexical`" in stage.__doc__
    assert "--similarity all-mpnet-base-v2" in bundled.find("datagen/re_align").read_text()
    scenes = config.load(stage.Config, bundled.find("datagen/re_align_scenes"))
    assert (scenes.threshold, scenes.retrieval.k) == (0.95, 10)


def test_a_folder_of_a_stage_is_read(stage, tmp_path):
    export(tmp_path / "prompts", split="train_biased", kind="caption", regime="seen", start=0, stop=4)
    values = config.merge(
        config.read_yaml(bundled.configs()["datagen/re_align_scenes"]),
        {"data": {"path": tmp_path / "prompts"}, "output": {"path": tmp_path / "out"}, "retrieval": {"floor": -1.0}},
    )
    manifest = stage.main(config.build(stage.Config, values))
    assert manifest.rows_out == 4

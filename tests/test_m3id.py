"""M3ID pairs: on scenes with the shipped model, and with scripted answers for every way a row can end."""

import json
import shutil
from collections import Counter

import pytest

from prefalign import bundled, config
from prefalign.engines import Completion, Contrast, Contrasted, ImageMask
from prefalign.evals import asking
from prefalign.images import encode_png, sha256
from prefalign.manifest import read_manifest
from prefalign.records import Pair, Prompt, message_text, placeholder_count, user_message
from prefalign.scenes import language, world
from prefalign.scenes.export import export
from prefalign.store import Dropped, Failed, StoreError, read_records
from prefalign.text import first_sentence, split_sentences
from tests.tiny_vlms import picture

ROWS = 12


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("m3id")


def settings(**changes):
    values = config.read_yaml(bundled.configs()["datagen/m3id_scenes"])
    return config.merge(values, {"output": {"block_size": 5}, **changes})


def run(stage, data, output, **changes):
    built = config.build(
        stage.Config, config.merge(settings(data={"path": data}), {"output": {"path": output}, **changes})
    )
    manifest = stage.main(built)
    return manifest, {pair.meta["parent"]: pair for pair in read_records(output, Pair)}


def texts(pairs):
    return {name: (message_text(pair.chosen), message_text(pair.rejected)) for name, pair in pairs.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts") / "prompts"
    export(folder, split="train_biased", kind="caption", regime="seen", start=0, stop=ROWS)
    return folder


@pytest.fixture(scope="module")
def finished(stage, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("m3id") / "pairs"
    return folder, *run(stage, data, folder)


class TestScenes:
    def test_pairs_hold_what_the_method_says(self, data, finished):
        _, manifest, pairs = finished
        assert manifest.rows_in == ROWS == manifest.rows_used + sum(manifest.dropped.values())
        assert manifest.rows_out == len(pairs) >= ROWS - 3
        prompts = {row.id: row for row in read_records(data, Prompt)}
        for name, pair in pairs.items():
            pair.check()
            chosen, rejected = texts({name: pair})[name]
            meta = pair.meta
            assert meta["start"] == first_sentence(rejected) != rejected
            assert pair.images == prompts[name].images
            assert pair.prompt == prompts[name].messages
            assert pair.rejected_images == []
            assert meta["generator"] == manifest.models["generator"] != ""
            assert meta["without"] == "hidden"
            assert 0 <= meta["active_share"] < 1
            assert 0 < meta["dependence"] < 1
            assert meta["words"] == {"chosen": len(chosen.split()), "rejected": len(rejected.split())}
            assert meta["settings"]["sampling"]["contrast"]["without"] == "hidden"
        assert sum(pair.meta["active_share"] > 0 for pair in pairs.values()) > len(pairs) / 2

    def test_what_follows_the_first_sentence_is_the_priors(self, finished):
        """Shape and colour of what is added after the first sentence are much more often right in chosen than in rejected."""
        true = Counter()
        for pair in finished[2].values():
            there = {(thing["shape"], thing["colour"]) for thing in pair.facts["objects"]}
            for side in ("chosen", "rejected"):
                rest = "".join(split_sentences(message_text(getattr(pair, side)))[1:])
                for said in language.parse(rest):
                    true[side, (said.shape, said.colour) in there] += 1
        share = {side: true[side, True] / (true[side, True] + true[side, False]) for side in ("chosen", "rejected")}
        assert share["chosen"] > 0.6
        assert share["rejected"] < 0.3

    def test_batch_size_changes_no_row(self, stage, data, finished, tmp_path):
        _, pairs = run(stage, data, tmp_path / "pairs", batch_size=3)
        assert texts(pairs) == texts(finished[2])
        assert {pair.id for pair in pairs.values()} == {pair.id for pair in finished[2].values()}

    def test_order_of_rows_changes_no_row(self, stage, data, finished, tmp_path):
        rows = [row.to_row() for row in read_records(data, Prompt)]
        (tmp_path / "rows").mkdir()
        lines = []
        for row in rows[::-1]:
            (tmp_path / "rows" / f"{row['id']}.png").write_bytes(row["images"][0]["bytes"])
            question = message_text(row["messages"])
            lines.append(json.dumps({"id": row["id"], "image": f"{row['id']}.png", "question": question}) + "\n")
        (tmp_path / "rows" / "rows.jsonl").write_text("".join(lines))
        _, pairs = run(stage, tmp_path / "rows" / "rows.jsonl", tmp_path / "pairs")
        assert texts(pairs) == texts(finished[2])

    def test_resume_gives_the_same_rows(self, stage, data, finished, tmp_path):
        folder, _, pairs = finished
        shutil.copytree(folder, tmp_path / "pairs")
        for name in ("manifest.json", "progress/00001.json", "data/train-00001.parquet"):
            (tmp_path / "pairs" / name).unlink()
        manifest, again = run(stage, data, tmp_path / "pairs")
        assert {name: pair.to_row() for name, pair in again.items()} == {
            name: pair.to_row() for name, pair in pairs.items()
        }
        assert manifest == read_manifest(folder)

    @pytest.mark.parametrize(
        "change",
        [{"sampling": {"contrast": {"decay": 0.03}}}, {"rejected": {"temperature": 0.9}}, {"draws": 4}, {"seed": 1},
         {"first_sentence": "drop"}, {"one_sentence": "restart"}, {"refusals": ["nothing"]}],
    )  # fmt: skip
    def test_another_config_refuses_the_folder(self, change, stage, data, finished):
        with pytest.raises(StoreError, match="another config"):
            run(stage, data, finished[0], **change)

    def test_another_picture_changes_chosen_and_the_start_but_not_the_blind_rest(self, stage, data, finished, tmp_path):
        """Pictures go to the next row; with one start for all, what follows it blind is the same whatever is shown."""
        rows = list(read_records(data, Prompt))
        shown = {rows[index].id: rows[index - 1].images for index in range(ROWS)}
        engine, given = self.engine(stage), config.build(stage.Config, settings(output={"path": tmp_path}))
        drafts = {}
        for swapped in (False, True):
            block = [Prompt(row.id, shown[row.id] if swapped else row.images, row.messages) for row in rows]
            made = stage.process(block, engine, given)
            drafts[swapped] = {
                row.id: outcome[0] for row, outcome in zip(rows, made, strict=True) if isinstance(outcome, list)
            }
        both = drafts[False].keys() & drafts[True].keys()
        assert len(both) >= ROWS - 4
        before, after = ({name: drafts[swapped][name] for name in both} for swapped in (False, True))
        changed = [name for name in both if texts(before)[name][0] != texts(after)[name][0]]
        assert len(changed) >= len(both) - 1
        starts = [name for name in both if before[name].meta["start"] != after[name].meta["start"]]
        assert len(starts) >= len(both) / 2
        waiting = [
            stage.Draft(row, [world.draw(world.scene("test_fair", number))],
                        Completion("c", "Chosen.", contrast=Contrasted("hidden", 0.5, 0.5)), "There is a red star at the top.")
            for number, row in enumerate([rows[0], rows[0]])
        ]  # fmt: skip
        said = []
        for number in range(1, 6):
            stage.draw_blind(waiting, number, engine, given)
            said.append({draft.rejected for draft in waiting})
        assert {len(texts) for texts in said} == {1}
        assert len(set.union(*said)) > 2

    @staticmethod
    def engine(stage):
        from prefalign.engines.transformers import load_engine
        from prefalign.models import ModelConfig

        return load_engine(ModelConfig("scenes", device="cpu"), batch_size=64)


class Scripted:
    """An engine that says what it is told, by the part of a request's id after the row's."""

    capabilities = frozenset({"sample", "prefix", "contrast"})
    fingerprint = "scripted"

    def __init__(self, script, *, without="removed"):
        self.script = script
        self.without = without
        self.asked = []

    def generate(self, requests, sampling):
        self.asked.append((list(requests), sampling))
        return [self._say(request, sampling) for request in requests]

    def _say(self, request, sampling):
        row, part = request.id.split("/", 1)
        said = self.script[row][part]
        text, reason = said if isinstance(said, tuple) else (said, "stop")
        noted = Contrasted(self.without, 0.25, 0.5) if sampling.contrast is not None and text else None
        error = "the processor refused it" if reason == "error" else None
        return Completion(request.id, text, list(range(len(text))), reason, error, noted)


USUAL = {"chosen": "A cat. It sleeps.", "ordinary": ("A cat.", "sentence"), "rejected/1": " A dog barks."}


def scripted(stage, scripts, *, without="removed", **changes):
    """Outcomes of one block of rows named by their scripts, and what the engine was asked."""
    engine = Scripted({name: USUAL | script for name, script in scripts.items()}, without=without)
    given = config.build(stage.Config, config.merge(settings(output={"path": "unused"}), changes))
    block = [Prompt(name, [encode_png(picture(1))], [user_message("What is it?", 1)]) for name in scripts]
    return dict(zip(scripts, stage.process(block, engine, given), strict=True)), engine


def rejected_of(outcome):
    assert isinstance(outcome, list), outcome
    return message_text(outcome[0].rejected)


class TestEveryWayARowEnds:
    def test_by_reason(self, stage):
        cut, silent = ("A cat", "length"), ("", "stop")
        scripts = {
            "good": {},
            "long_chosen": {"chosen": cut},
            "no_chosen": {"chosen": silent},
            "bad_chosen": {"chosen": ("", "error")},
            "one": {"ordinary": ("A cat.", "stop")},
            "endless": {"ordinary": cut},
            "mute": {"ordinary": silent},
            "bad_ordinary": {"ordinary": ("", "error")},
            "empty": {f"rejected/{n}": silent for n in range(1, 6)},
            "cut": {f"rejected/{n}": (" A dog", "length") for n in range(1, 6)},
            "blind": {f"rejected/{n}": " I\u2019m sorry, I cannot see the picture." for n in range(1, 6)},
            "same": {f"rejected/{n}": " it sleeps" for n in range(1, 6)},
            "bad_rejected": {"rejected/1": ("", "error")},
        }
        outcomes, _ = scripted(stage, scripts)
        found = {
            name: made.reason if isinstance(made, (Dropped, Failed)) else "pair" for name, made in outcomes.items()
        }
        assert found == {
            "good": "pair", "long_chosen": "cut_off_chosen", "no_chosen": "empty_chosen", "bad_chosen": "generation_failed",
            "one": "one_sentence", "endless": "cut_off_ordinary", "mute": "empty_ordinary", "bad_ordinary": "generation_failed",
            "empty": "empty_rejected", "cut": "cut_off_rejected", "blind": "refusal", "same": "identical_answers",
            "bad_rejected": "generation_failed",
        }  # fmt: skip
        assert outcomes["bad_rejected"] == Failed("generation_failed", "the processor refused it")
        pair = outcomes["good"][0]
        assert message_text(pair.rejected) == "A cat. A dog barks."
        assert message_text(pair.chosen) == "A cat. It sleeps."
        # 4 words and 5: the longer one is the blind one
        assert pair.meta["words"] == {"chosen": 4, "rejected": 5}
        assert pair.meta | {"without": "removed", "active_share": 0.25, "dependence": 0.5, "draw": 1} == pair.meta
        assert pair.meta["images_sha256"] == [sha256(encode_png(picture(1)))]

    def test_a_bad_draw_is_drawn_again(self, stage):
        refusal = " There is no image, please provide the image."
        script = {"rejected/1": refusal, "rejected/2": ("", "stop"), "rejected/3": " A dog barks."}
        outcomes, engine = scripted(stage, {"a": script, "b": {}})
        assert rejected_of(outcomes["a"]) == "A cat. A dog barks."
        assert outcomes["a"][0].meta["draw"] == 3
        # all rows of a round in one call: chosen, first sentences, then three rounds, the last two for row a alone
        calls = [[request.id for request in requests] for requests, _ in engine.asked]
        assert calls[:2] == [["a/chosen", "b/chosen"], ["a/ordinary", "b/ordinary"]]
        assert calls[2:] == [["a/rejected/1", "b/rejected/1"], ["a/rejected/2"], ["a/rejected/3"]]
        outcomes, _ = scripted(stage, {"a": script}, draws=2)
        assert outcomes["a"] == Dropped("empty_rejected")

    def test_what_the_engine_is_asked(self, stage):
        _, engine = scripted(stage, {"a": {}})
        (chosen, how), (ordinary, plainly), (rejected, freely) = engine.asked
        assert how.contrast is not None
        assert (plainly.contrast, freely.contrast) == (None, None)
        assert (how.temperature, plainly.temperature, freely.temperature) == (0.0, 0.0, 1.0)
        assert ordinary[0].stop_at_sentence
        assert not rejected[0].stop_at_sentence
        assert chosen[0].images
        assert (rejected[0].images, placeholder_count(rejected[0].messages), rejected[0].prefix) == ([], 0, "A cat.")
        _, engine = scripted(stage, {"a": {}}, without="hidden")
        blind = engine.asked[-1][0][0]
        assert (placeholder_count(blind.messages), len(blind.images), blind.image_mask) == (1, 1, ImageMask(1.0, 0))

    def test_the_first_sentence_can_be_left_out(self, stage):
        outcomes, _ = scripted(stage, {"a": {}}, first_sentence="drop")
        assert rejected_of(outcomes["a"]) == "A dog barks."
        assert outcomes["a"][0].meta["start"] == "A cat."

    def test_one_sentence_can_start_from_the_question(self, stage):
        script = {"ordinary": ("Yes.", "stop"), "rejected/1": "No."}
        outcomes, engine = scripted(stage, {"a": script}, one_sentence="restart")
        assert rejected_of(outcomes["a"]) == "No."
        assert engine.asked[-1][0][0].prefix == ""

    @pytest.mark.parametrize(
        ("text", "gives_itself_away"),
        [
            ("I can\u2019t see any picture here.", True),
            ("As an AI, I look at nothing.", True),
            ("Please UPLOAD it.", True),
            ("I don't see any images attached.", True),
            ("You haven't provided an image.", True),
            ("The image you mentioned was not attached.", True),
            ("I don't have access to the image.", True),
            ("A man is about to upload a file to his laptop.", False),
            ("There is no image on the wall.", False),
            ("The dog cannot see the cat behind the wall.", False),
            ("A text-based sign reads STOP.", False),
            ("The loader uploads crates. An attachment lies there.", False),
            ("There is no star in the picture.", False),
            ("A large red circle at the top.", False),
        ],
    )
    def test_refusals(self, stage, text, gives_itself_away):
        assert stage.says_it_is_blind(text, stage.SAYS_IT_IS_BLIND) == gives_itself_away


def test_bad_rows_are_counted(stage, tmp_path):
    (tmp_path / "a.png").write_bytes(world.png(world.scene("test_fair", 1)))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    rows = [
        {"id": "good", "image": "a.png", "question": "Describe the picture."},
        {"id": "text", "question": "What?"},
        {"id": "cut", "image": "cut.png", "question": "What?"},
        {"id": "mark", "image": "a.png", "question": "Is <pad> an <image> mark? <image>"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest, pairs = run(stage, tmp_path / "rows.jsonl", tmp_path / "pairs")
    assert manifest.rows_in == 4 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.dropped["no_picture"] == 1
    assert manifest.dropped["truncated_image"] == 1
    assert manifest.quarantined == 2
    assert set(pairs) == {"good"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": {"contrast": None}},
            "sampling.contrast is null, so chosen answers would be the model's ordinary ones",
        ),
        (
            {"rejected": {"contrast": {"decay": 0.1}}},
            "rejected.contrast is given, but a rejected answer is drawn without",
        ),
        ({"draws": 0}, "draws 0: at least 1 draw is needed"),
        (
            {"rejected": {"temperature": 0.0}},
            "rejected.temperature 0 draws the same continuation each time, so draws 5",
        ),
        (
            {"sampling": {"contrast": {"decay": 0.1}, "attention_layer": 1}},
            "sampling.attention_layer is given, which is",
        ),
        ({"sampling": {"contrast": {"decoy": 1}}}, "sampling.contrast.decoy: unknown key .* did you mean 'decay'"),
    ],
)
def test_settings_that_mean_nothing(stage, changes, message):
    with pytest.raises(config.ConfigError, match=message):
        config.build(stage.Config, settings(output={"path": "x"}, **changes))


def test_decay_on_the_command_line(stage):
    path = bundled.configs()["datagen/m3id_scenes"]
    built = config.load(
        stage.Config, path, ["--sampling.contrast.decay", "0.5", "--sampling.contrast.max_weight", "null"]
    )
    assert (built.sampling.contrast.decay, built.sampling.contrast.max_weight) == (0.5, None)
    other = bundled.load_stage("bdhs")
    given = config.load(other.Config, bundled.configs()["datagen/bdhs_scenes"], ["--sampling.contrast.decay", "0.02"])
    assert (given.sampling.contrast.decay, given.sampling.contrast.gate) == (0.02, 0.3)


def test_an_engine_that_cannot_is_refused(stage, tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    model = {"model_name_or_path": "any", "engine": "openai"}
    wanted = settings(model=model, data={"path": tmp_path / "rows.jsonl"}, output={"path": tmp_path / "x"})
    with pytest.raises(ValueError, match=r"m3id needs contrast \(decode against the same prompt without its picture"):
        stage.main(config.build(stage.Config, wanted))


def test_published_settings(stage):
    built = config.load(stage.Config, bundled.configs()["datagen/m3id"])
    contrast = built.sampling.contrast
    assert (contrast.decay, contrast.gate, contrast.offset, contrast.without) == (0.02, 0.3, 0, "removed")
    assert built.sampling.temperature == 0.0
    assert (built.first_sentence, built.one_sentence, built.draws) == ("keep", "drop", 5)


class TestAtInference:
    """The same decoding in `evaluate_model`."""

    @pytest.fixture(scope="class")
    def recipe(self):
        return bundled.load_stage("evaluate_model")

    @staticmethod
    def evaluate(recipe, output, *more, **asking):
        values = config.read_yaml(bundled.configs()["recipes/evaluate_scenes"])
        changes = {
            "scenes": {"pictures": 6},
            "reliance": {"conditions": []},
            "draws": 100,
            "output": output,
            "asking": asking,
        }
        values = config.merge(config.merge(values, changes), config.parse_overrides(more))
        return recipe.main(config.build(recipe.Config, values))

    @staticmethod
    def replies(folder):
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        return {(row["eval"], row["id"]): row["text"] for row in lines}

    @pytest.fixture(scope="class")
    def folders(self, recipe, tmp_path_factory):
        folder = tmp_path_factory.mktemp("inference")
        self.evaluate(recipe, folder / "base")
        results = self.evaluate(recipe, folder / "m3id", "--asking.contrast.decay", "0.3", "--asking.contrast.gate", "0.9",
                                "--asking.contrast.plausible", "0.1")  # fmt: skip
        return folder, results

    def test_it_changes_answers_and_stands_in_the_settings(self, folders):
        folder, results = folders
        before, after = self.replies(folder / "base"), self.replies(folder / "m3id")
        assert before.keys() == after.keys()
        assert sum(before[key] != after[key] for key in before if key[0] == "chair") >= 3
        assert results["settings"]["contrast"]["decay"] == 0.3
        assert results["settings"]["short_answer_offset"] == 10
        plain = json.loads((folder / "base" / "results.json").read_text())["settings"]
        assert not {"contrast", "short_answer_offset"} & plain.keys()  # folders from before go on as they are

    def test_another_decoding_refuses_the_folder(self, recipe, folders):
        with pytest.raises(ValueError, match=r"made with other settings \(contrast: .*'decay': 0.3.* -> None"):
            self.evaluate(recipe, folders[0] / "m3id")
        with pytest.raises(ValueError, match=r"made with other settings \(contrast: None -> .*'decay': 0.02"):
            self.evaluate(recipe, folders[0] / "base", "--asking.contrast.decay", "0.02")

    def test_a_plain_baseline_is_compared_with_and_said_so(self, recipe, folders, tmp_path):
        folder, _ = folders
        shutil.copytree(folder / "m3id", tmp_path / "m3id")
        results = self.evaluate(
            recipe, tmp_path / "m3id", "--asking.contrast.decay", "0.3", "--asking.contrast.gate", "0.9",
            "--asking.contrast.plausible", "0.1", "--baseline", str(folder / "base"),
        )  # fmt: skip
        assert any("difference" in name for name in results["metrics"])
        assert [note for note in results["notes"] if "only this run used asking.contrast" in note]
        results = self.evaluate(recipe, tmp_path / "plain", "--baseline", str(folder / "m3id"))
        assert [note for note in results["notes"] if "only the baseline used asking.contrast" in note]

    def test_short_answers_have_an_offset_of_their_own(self):
        asked = asking.Asking(contrast=Contrast(decay=0.02, offset=0), short_answer_offset=10)
        assert asking._sampling(asked, caption=True).contrast.offset == 0
        assert asking._sampling(asked, caption=False).contrast.offset == 10
        assert asking._sampling(asking.Asking(), caption=False).contrast is None

    def test_an_engine_that_cannot_is_refused(self, tmp_path):
        engine = Scripted({})
        engine.capabilities = frozenset({"sample"})
        with pytest.raises(ValueError, match=r"`asking.contrast` needs contrast \(decode against"):
            asking.ask(engine, [], tmp_path, asking.Asking(contrast=Contrast()))

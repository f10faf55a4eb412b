"""RLAIF-V on the embedded world: verdicts kept, pictures that matter, runs that were killed, settings that are refused."""

import dataclasses
import json
import re

import pytest
from PIL import Image

from prefalign import bundled, config
from prefalign.config import ConfigError
from prefalign.execution import WHOLE, Ended, StageWorker
from prefalign.images import encode_png
from prefalign.length_balance import Cut
from prefalign.records import Candidates, Pair, Prompt, message_text, user_message
from prefalign.scenes.export import export
from prefalign.store import Failed, StoreError, read_records, run_job
from tests.rlaif_v_cases import SCENES, SMALL, settings, survey_of

ROWS = 6


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("rlaif_v")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlaif") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=ROWS)
    return folder


@pytest.fixture(scope="module")
def finished(stage, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlaif") / "out"
    manifest = stage.main(settings(stage, rows, folder))
    return folder, manifest, list(read_records(folder, Pair))


def test_every_verdict_of_a_pair_is_kept(finished):
    _, manifest, pairs = finished
    assert manifest.rows_in == ROWS == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.rows_out == len(pairs) >= 4
    assert set(manifest.models) == {"generator", "labeller"}
    by_parent = {}
    for pair in pairs:
        meta = pair.meta
        by_parent.setdefault(meta["parent"], []).append((meta["chosen_index"], meta["rejected_index"]))
        assert pair.margin >= 1
        assert pair.margin == meta["scores"][meta["chosen_index"]] - meta["scores"][meta["rejected_index"]]
        assert meta["sampling"]["temperature"] == 1.0
        for side, text in (("chosen", message_text(pair.chosen)), ("rejected", message_text(pair.rejected))):
            judged = meta["claims"][side]
            assert len(judged["claims"]) == len(judged["questions"]) == len(judged["p_yes"]) == len(judged["p_no"])
            assert judged["score"] == -sum(yes <= no for yes, no in zip(judged["p_yes"], judged["p_no"], strict=True))
            assert meta["words"][side] == len(text.split())
            assert all(yes + no > 0.9 for yes, no in zip(judged["p_yes"], judged["p_no"], strict=True))
    for drawn in by_parent.values():
        assert len(set(drawn)) == len(drawn) <= 2
    assert any(len(drawn) == 2 for drawn in by_parent.values())
    assert len({pair.id for pair in pairs}) == len(pairs)


def test_the_figures_add_up(finished):
    folder, _, pairs = finished
    found = json.loads((folder / "claims.json").read_text())
    assert sum(found["answers"].values()) == ROWS * 4
    assert found["pairs_drawn"] == len(pairs) == found["length_balance"]["after"]["pairs"]
    survey = survey_of(folder)
    assert sum(found["claims"].values()) == sum(len(judged["verdicts"]) for row in survey for judged in row["judged"])
    words = [pair.meta["words"]["rejected"] for pair in pairs]
    assert found["length_balance"]["before"]["rejected_words"] == pytest.approx(sum(words) / len(words), abs=1e-3)


def test_answers_are_those_of_sample_responses_and_stored_ones_are_judged_alike(stage, finished, rows, tmp_path):
    sampler = bundled.load_stage("sample_responses")
    known = {"model": SCENES["model"], "data": {"path": rows}, "output": {"path": tmp_path / "sampled"}, "num_generations": 4,
             "sampling": SMALL["sampling"]}  # fmt: skip
    sampler.main(config.build(sampler.Config, known))
    stored = settings(stage, tmp_path / "sampled", tmp_path / "out", model=None, labeller=SCENES["model"])
    manifest = stage.main(stored)
    assert set(manifest.models) == {"labeller"}
    one, other = survey_of(finished[0]), survey_of(tmp_path / "out")
    assert [[said["text"] for said in row["responses"]] for row in one] == [
        [said["text"] for said in row["responses"]] for row in other]  # fmt: skip
    for mine, theirs in zip(one, other, strict=True):
        for first, second in zip(mine["judged"], theirs["judged"], strict=True):
            assert first["verdicts"] == second["verdicts"]
            assert first["p_yes"] == pytest.approx(second["p_yes"], abs=1e-5)
    made = next(read_records(tmp_path / "out", Pair))
    candidates = {row.id: row for row in read_records(tmp_path / "sampled", Candidates)}
    assert made.meta["generator"] == candidates[made.meta["parent"]].responses[0]["generator"] != ""


def test_another_picture_changes_the_verdicts(stage, finished, rows, tmp_path):
    one, other = list(read_records(rows, Prompt))[:2]
    known = settings(stage, rows, tmp_path, model=None, labeller=SCENES["model"])
    models = stage.load(known)
    said = survey_of(finished[0])[0]["responses"]
    right = Candidates("a", one.images, one.messages, said)
    swapped, blank = (dataclasses.replace(right, images=images) for images in
                      (other.images, [encode_png(Image.new("RGB", (60, 60), "white"), "b.png")]))  # fmt: skip
    seen, wrong, empty = (stage.measure([row], models, known)[0]["judged"] for row in (right, swapped, blank))
    assert [judged["verdicts"] for judged in seen] != [judged["verdicts"] for judged in wrong]
    assert sum(judged.get("score") or 0 for judged in empty) < sum(judged.get("score") or 0 for judged in seen)


@pytest.mark.parametrize("where", ["measure", "outcome"])
def test_a_killed_run_ends_with_the_rows_of_one_that_was_not(stage, finished, rows, tmp_path, monkeypatch, where):
    """Killed in the second block of the pass, or after the first shard was written: nothing is lost, nothing comes twice."""
    calls = []
    work = getattr(stage, where)

    def killed(*given):
        calls.append(given)
        if len(calls) == (2 if where == "measure" else 3):
            raise KeyboardInterrupt
        return work(*given)

    folder = tmp_path / "killed"
    monkeypatch.setattr(stage, where, killed)
    with pytest.raises(KeyboardInterrupt):
        stage.main(settings(stage, rows, folder))
    assert len(list(folder.glob("survey/claims-*.json"))) == (1 if where == "measure" else 3)
    manifest = stage.main(settings(stage, rows, folder))
    expected, made = finished[1], list(read_records(folder, Pair))
    assert made == finished[2]
    assert (manifest.rows_used, manifest.rows_out, manifest.dropped) == (
        expected.rows_used, expected.rows_out, expected.dropped)  # fmt: skip
    assert (folder / "claims.json").read_text() == (finished[0] / "claims.json").read_text()
    assert len(calls) == (4 if where == "measure" else 3 + 4)  # what was done is not done again


def test_a_shorter_list_of_prompts_draws_the_same_pairs_and_other_settings_refuse(stage, finished, rows, tmp_path):
    """Every draw belongs to its row: two prompts alone give the pairs that they give among six."""
    stage.main(settings(stage, rows, tmp_path / "two", data={"limit": 2}))
    texts = [(message_text(pair.chosen), message_text(pair.rejected)) for pair in read_records(tmp_path / "two", Pair)]
    assert texts == [(message_text(p.chosen), message_text(p.rejected)) for p in finished[2]][: len(texts)]
    with pytest.raises(StoreError, match="another config"):
        stage.main(settings(stage, rows, finished[0], per_claim=True, pairs={"min_gap": 0.5}))
    with pytest.raises(StoreError, match="another config"):
        stage.main(settings(stage, rows, finished[0], conquer={"no": ["Nothing", "No"]}))


@pytest.mark.parametrize("order", [[0, 2, 1], [2, 1, 0]])
def test_blocks_are_served_in_any_order(stage, finished, rows, tmp_path, order):
    """As actors are sent them: where one has died, an earlier block goes to one that has done later ones."""
    worker = StageWorker(stage.main, settings(stage, rows, tmp_path / "out"), WHOLE)
    job = worker.next_step()
    assert not isinstance(job, Ended), job.error

    def spread(blocks):
        known = list(blocks)
        for number in order:
            made = worker.work(known[number].given)
            assert not isinstance(made, Ended), made.trace
            yield known[number], made

    worker.finish(run_job(job, spread, WHOLE))
    end = worker.next_step()
    assert end.error is None
    assert end.result.rows_out == finished[1].rows_out
    assert list(read_records(tmp_path / "out", Pair)) == finished[2]


def test_what_was_found_is_told_at_the_end(stage, finished, rows, capsys):
    stage.main(settings(stage, rows, finished[0]))
    complete, told = re.findall("^rlaif_v: .*", capsys.readouterr().err, re.MULTILINE)
    assert "already complete" in complete
    words = json.loads((finished[0] / "claims.json").read_text())["length_balance"]["after"]["chosen_words"]
    assert f"pairs_drawn {len(finished[2])}, " in told
    assert f"'chosen_words': {words}, " in told


def test_answers_that_were_drawn_are_paired_again_without_a_model(stage, finished, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "prefalign.engines.loading.load_engine", lambda *given, **known: pytest.fail("a model was loaded")
    )
    folder, manifest, pairs = finished
    assert stage.main(settings(stage, rows, tmp_path / "again", judged=folder)) == manifest
    assert list(read_records(tmp_path / "again", Pair)) == pairs
    alone = stage.main(settings(stage, rows, tmp_path / "one", judged=folder, pairs={"per_prompt": 1}))
    assert alone.rows_out == alone.rows_used == manifest.rows_used
    with pytest.raises(StoreError, match=r"settings.num_generations: 4 -> 5"):
        stage.main(settings(stage, rows, tmp_path / "five", judged=folder, num_generations=5))


def test_roles_with_equal_settings_share_one_model(stage, rows, tmp_path):
    models = stage.load(settings(stage, rows, tmp_path, divide={"by": "model"}))
    assert models.generator is models.judge.labeller is models.judge.splitter
    assert set(models.fingerprints()) == {"generator", "labeller", "splitter"}
    own = stage.load(settings(stage, rows, tmp_path, labeller={**SCENES["model"], "dtype": "float32"}))
    assert own.generator is not own.judge.labeller
    assert own.judge.splitter is None


def test_answers_that_cannot_be_drawn_are_named(stage, rows, tmp_path):
    known = settings(stage, rows, tmp_path)
    prompt = next(read_records(rows, Prompt))
    bad = dataclasses.replace(prompt, id="bad", messages=[user_message("An <image> mark.", 1)])
    found = stage.measure([bad, prompt], stage.load(known), known)
    outcome = stage.outcome(bad, found[0], Cut(), {}, known)
    assert isinstance(outcome, Failed)
    assert outcome.reason == "generation_failed"
    assert "reads as a place for a picture" in outcome.message
    assert len(found[1]["judged"]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "neither `model` nor `labeller` is given.*Name a labeller"),
        ({"num_generations": 1}, "num_generations is 1, and a pair needs two answers"),
        ({"num_generations": 0}, "num_generations is 0; give 1 or more"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature is 0.* the same greedy one. Raise"),
        ({"pairs": {"least_kept": 10}}, "pairs.least_kept is 10; it is a share"),
        ({"pairs": {"min_gap": 0}}, "min_gap is 0.*equal quality"),
        ({"pairs": {"per_prompt": 0}}, "per_prompt is 0"),
        ({"conquer": {"yes": []}}, "each needs a word"),
        ({"labels": {}}, "unknown key"),
    ],
)
def test_settings_that_cannot_be_are_refused(stage, rows, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(stage, rows, tmp_path, **changes)


@pytest.mark.parametrize("name", ["rlaif_v", "rlaif_v_scenes"])
def test_the_bundled_configs_run_on_the_tiny_model(stage, rows, tmp_path, name):
    """The tiny model takes every place in their own settings; it can list no claims, so only rules give pairs."""
    values = config.read_yaml(bundled.find(f"datagen/{name}"))
    changes = {"model": SCENES["model"], "labeller": None, "splitter": None, "num_generations": 4, "batch_size": 16,
               "data": {"path": rows, "images": None, "limit": 3}, "output": {"path": tmp_path / "out"},
               "sampling": {"max_new_tokens": 48}, "divide": {"sampling": {"max_new_tokens": 16}}}  # fmt: skip
    if name == "rlaif_v_scenes":
        changes = config.merge(changes, {part: SMALL[part] for part in ("divide", "conquer", "pairs")})
        manifest = stage.main(config.build(stage.Config, config.merge(values, changes)))
        assert manifest.rows_in == 3 == manifest.rows_used + sum(manifest.dropped.values())
        return
    changes["conquer"] = {"yes": ["Yes"], "no": ["No"]}  # its "yes" and "no" begin with one token
    with pytest.raises(
        StoreError, match=r"3: 3 few_judged\. .*`unreadable_list`.* Figures are in \S+/out/claims\.json"
    ):
        stage.main(config.build(stage.Config, config.merge(values, changes)))
    answers = json.loads((tmp_path / "out" / "claims.json").read_text())["answers"]
    assert answers.pop("unreadable_list") >= 9
    assert set(answers) <= {"duplicate"}

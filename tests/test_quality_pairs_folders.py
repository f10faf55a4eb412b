"""The folders of `quality_pairs`: each read by `datasets`, made by shards, found by plan and command line; none made at all."""

import dataclasses
import shutil

import pytest

from prefalign import bundled, cli, config
from prefalign.blocks import NoRows
from prefalign.execution import LeftToOthers, Shard, sharded
from prefalign.images import open_image
from prefalign.planner import Stage, plan
from prefalign.records import Candidates, Example, Pair, Prompt
from prefalign.scenes.export import export
from prefalign.store import StoreError, read_records
from tests.graders import ROWS, Grader, pixels, settings
from tests.shared_out import files


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("quality_pairs")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=ROWS)
    return folder


@pytest.fixture(scope="module")
def graded(stage, rows, tmp_path_factory):
    """A run with a fickle judge: folder, manifest, judge."""
    folder = tmp_path_factory.mktemp("quality") / "out"
    grader = Grader(list(read_records(rows, Prompt)), fickle=True)
    return folder, stage.main(settings(stage, rows, folder, grader)), grader


@pytest.mark.parametrize(
    ("name", "kind"), [("answers", Candidates), ("pairs", Pair), ("best", Example), ("steerlm", Example)]
)
def test_datasets_reads_each_folder(graded, tmp_path, name, kind):
    from datasets import load_dataset

    read = load_dataset(str(graded[0] / name), split="train", cache_dir=str(tmp_path))
    made = list(read_records(graded[0] / name, kind))
    assert read["id"] == [record.id for record in made]
    shown = {pixels(image) for row in read for image in row["images"]}
    assert shown == {pixels(open_image(image)) for record in made for image in record.images}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_shards_make_the_folders_of_one_process(stage, rows, graded, tmp_path, order):
    """Whoever ends last makes pairs, best answers and SteerLM rows of the answers of both."""

    def start(number):
        grader = Grader(list(read_records(rows, Prompt)), fickle=True)
        with sharded(Shard(number, 2)):
            return stage.main(settings(stage, rows, tmp_path / "out", grader)), grader

    with pytest.raises(
        LeftToOthers, match=rf"shard {order[0]}/2 of quality_pairs has done its blocks; 1 of 2 in .*answers"
    ):
        start(order[0])
    assert [entry.name for entry in tmp_path.glob("out/*") if entry.is_dir()] == ["answers"]
    manifest, grader = start(order[1])
    assert manifest == graded[1]
    assert 0 < len(grader.requests) < len(graded[2].requests)
    for folder in ("answers", "pairs", "best", "steerlm"):
        assert files(tmp_path / "out" / folder) == files(graded[0] / folder)
    assert (tmp_path / "out" / "quality.json").read_bytes() == (graded[0] / "quality.json").read_bytes()
    manifest, grader = start(order[0])  # comes again when all is done
    assert (manifest, grader.requests) == (graded[1], [])


def test_a_shard_goes_on_where_another_died_between_two_exports(stage, rows, graded, tmp_path):
    shutil.copytree(graded[0], tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "steerlm")
    (tmp_path / "out" / "best" / "manifest.json").unlink()
    with sharded(Shard(1, 2)):
        assert stage.main(settings(stage, rows, tmp_path / "out", Grader([]))) == graded[1]
    for folder in ("answers", "pairs", "best", "steerlm"):
        assert files(tmp_path / "out" / folder) == files(graded[0] / folder)


def test_a_plan_finds_the_answers(stage, rows, tmp_path):
    asked = settings(stage, rows, tmp_path / "out", data={"limit": 4})
    select = bundled.load_stage("select_responses")
    values = {"data": {"path": tmp_path / "out" / "answers"}, "output": {"path": tmp_path / "best"}, "produce": "best"}
    [made, then] = plan(
        [Stage("quality_pairs", stage, asked), Stage("select", select, config.build(select.Config, values))], rows=2
    )
    assert (made.rows_in, made.rows_out, made.blocks_done, made.conflict) == (4, 4, 0, "")
    assert (then.after, then.rows_in) == ("quality_pairs", 4)
    stage.main(asked)
    other = dataclasses.replace(asked, seed=1)
    [made] = plan([Stage("quality_pairs", stage, other)], rows=2)
    assert made.blocks_done == 1
    assert "seed: 0 -> 1" in made.conflict


def test_the_command_line_says_where_the_answers_are(stage, rows, tmp_path, capsys):
    asked = ["--config", "datagen/quality_pairs_scenes", "--data.path", str(rows), "--data.limit", "2",
             "--sampling.max_new_tokens", "8", "--output.path", str(tmp_path / "out")]  # fmt: skip
    out = tmp_path / "out"
    asked += ["--exports", "[]"]
    assert cli.main(["run", "quality_pairs", *asked]) == 0
    said = capsys.readouterr().out
    assert f"quality_pairs: 2 rows in, 2 rows out\nlook at them with: prefalign inspect {out}/answers\n" in said
    assert "beside them: nothing\n" in said
    shutil.copytree(out / "answers", out / "kept")
    assert cli.main(["run", "quality_pairs", *asked]) == 0
    assert f"beside them: {out}/kept\n" in capsys.readouterr().out
    nothing = ["--exports", "[best]", "--best.min_quality", "13"]
    assert cli.main(["run", "quality_pairs", *asked[:-2], *nothing]) == 1
    assert "error: quality_pairs made nothing of the answers to 2 prompts: best: 2" in capsys.readouterr().err


def test_a_folder_of_an_earlier_version_or_of_others(stage, rows, graded, tmp_path):
    shutil.copytree(graded[0] / "answers", tmp_path / "out")
    with pytest.raises(
        StoreError, match=r"out holds config.json, data, manifest.json, progress and no answers/.*earlier version"
    ):
        stage.main(settings(stage, rows, tmp_path / "out", Grader([])))
    assert not (tmp_path / "out" / "answers").exists()


def test_nothing_at_all_is_an_error_and_other_rules_go_on_with_the_answers(stage, rows, tmp_path):
    out = tmp_path / "out"
    strict = {"best": {"min_quality": 13}, "pairs": {"min_gap": 13}, "exports": ["pairs", "best"], "data": {"limit": 2}}
    grader = Grader(list(read_records(rows, Prompt)))
    with pytest.raises(
        NoRows,
        match=r"quality_pairs made nothing of the answers to 2 prompts: pairs: 2 small_gap; best: 2 low_quality\. No two answers"
        r" .*`pairs\.min_gap`\. Figures are in \S+/quality\.json\. Mend that and start again: what is graded in \S+/answers",
    ):
        stage.main(settings(stage, rows, out, grader, **strict))
    asked = len(grader.requests)
    milder = {**strict, "best": {"min_quality": 0}}
    assert stage.main(settings(stage, rows, out, grader, **milder)).rows_out == 2
    assert [len(list(read_records(out / "best", Example))), len(grader.requests)] == [2, asked]
    assert not (out / "pairs").exists()


class Chatty(Grader):
    """Says nothing that can be read until `understood`."""

    understood = False

    def reply(self, request):
        return super().reply(request) if self.understood else "I like\nit."


def test_a_judge_that_nobody_could_read_is_told_and_asked_again_for_what_is_missing(
    stage, rows, graded, tmp_path, capsys
):
    out = tmp_path / "out"
    judge = Chatty(list(read_records(rows, Prompt)), fickle=True)
    told = (
        r"prompts: pairs: 6 ungraded; best: 6 ungraded; steerlm: 6 ungraded\..* 24 of 24 answers lack a grade: {}\. To have them "
        rf"graded, mend the judge, delete {out}/answers/manifest.json, {out}/answers/progress/00000.json, \S+/00001.json and "
    )
    with pytest.raises(NoRows, match=told.format(r"in 3 attempts the judge gave .* \(the last: 'I like it\.'\)")):
        stage.main(settings(stage, rows, out, judge))
    asked = len(judge.requests)
    judge.understood = True
    with pytest.raises(NoRows, match=told.format("the judge gave no reply that can be read, or .*")):
        stage.main(settings(stage, rows, out, Grader([])))
    for name in ("manifest.json", "progress/00000.json"):
        (out / "answers" / name).unlink()
    stage.main(settings(stage, rows, out, judge))
    assert "8 of 24 answers lack a grade" in (said := capsys.readouterr().err)
    assert f"progress/00001.json, {out}/pairs, {out}/best, {out}/steerlm and start again" in said
    for name in ("pairs", "best", "steerlm"):
        shutil.rmtree(out / name)
    for name in ("manifest.json", "progress/00001.json"):
        (out / "answers" / name).unlink()
    stage.main(settings(stage, rows, out, judge))
    assert len(judge.requests) - asked == len(graded[2].requests)  # each once
    assert "lack a grade" not in capsys.readouterr().err
    for name, kind in (("answers", Candidates), ("pairs", Pair), ("best", Example), ("steerlm", Example)):
        assert list(read_records(out / name, kind)) == list(read_records(graded[0] / name, kind))
    assert (out / "quality.json").read_bytes() == (graded[0] / "quality.json").read_bytes()

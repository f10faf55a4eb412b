"""`make -C datagen`: every stage has a target, paths are the caller's, finished stages keep their rows, errors stop it."""

import json
import os
import re
import shutil
import subprocess

import pytest

from prefalign import bundled
from prefalign.manifest import read_manifest
from tests.launching import ROOT, WARM

COMMAND = WARM / "prefalign"
STAGES = sorted(name for name, path in bundled.stages().items() if path.parent.name == "datagen")
READ_PAIRS = ("filter_pairs", "image_contrast")


def make(where, *arguments, folder=ROOT / "datagen", code=0, command=COMMAND, **environment):
    """What make printed, started in `where`."""
    done = subprocess.run(["make", "--no-print-directory", "-C", str(folder), f"PREFALIGN={command}", *arguments], cwd=where,
                          env={**os.environ, "PWD": str(where), **environment}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def commands(where, *arguments):
    """The `prefalign run` commands that make would start."""
    return re.findall(r"/prefalign' run (.*?)\s*$", make(where, "-n", *arguments), re.MULTILINE)


def test_help_names_every_stage(tmp_path):
    shown = make(tmp_path, "help")
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == STAGES
    assert make(tmp_path) == shown


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_on_scenes_by_default(stage, tmp_path):
    command = commands(tmp_path, stage)[-1]
    assert command.startswith(f"{stage} --config 'datagen/{stage}_scenes' --data.path 'runs/")
    assert command.endswith(f"--output.path 'runs/datagen-128/{stage}'")
    reads = re.search(r"--data.path '(.*?)'", command)[1]
    if stage in READ_PAIRS:
        assert reads == "runs/datagen-128/bdhs"
        return
    if stage == "select_responses":
        order = [each.split()[0] for each in commands(tmp_path, stage)]
        assert order == ["sample_responses", "score_responses", "select_responses"]
        assert reads == "runs/datagen-128/score_responses"
        return
    # the rows that the header of the config names
    header = bundled.find(f"datagen/{stage}_scenes").read_text()
    named = re.search(r"scenes export --output \S+ (.*) --stop", header)[1]
    assert f"scenes export --output {reads} {named} --stop 128" in make(tmp_path, "-n", stage)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_takes_a_model_and_data(stage, tmp_path):
    [command] = commands(tmp_path, stage, "MODEL=some/model", "DATA=my rows.jsonl", "OUT=out", "ARGS=--seed 3")
    with_model = "    model: EngineConfig" in (ROOT / "datagen" / f"{stage}.py").read_text()
    named = " --model.model_name_or_path 'some/model'" if with_model else ""
    assert (
        command == f"{stage} --config 'datagen/{stage}'{named} --data.path 'my rows.jsonl' --output.path 'out' --seed 3"
    )


def test_own_config_decides_what_is_not_said(tmp_path):
    assert commands(tmp_path, "bdhs", "CONFIG=own.yaml") == ["bdhs --config 'own.yaml'"]
    assert commands(tmp_path, "bdhs", "CONFIG=own.yaml", "MODEL=scenes", "OUT=x") == [
        "bdhs --config 'own.yaml' --model.model_name_or_path 'scenes' --output.path 'x'"
    ]


def test_all_runs_every_stage_in_an_order_that_works(tmp_path):
    order = [command.split()[0] for command in commands(tmp_path, "all", "OUT=o")]
    assert sorted(order) == sorted([*STAGES, "score_responses"])
    assert order.index("sample_responses") < order.index("score_responses") < order.index("select_responses")
    assert order[-2:] == ["image_contrast", "filter_pairs"] or order[-2:] == ["filter_pairs", "image_contrast"]
    for command in commands(tmp_path, "all", "OUT=o"):
        assert f"--output.path 'o/{command.split()[0]}'" in command
        assert ("--data.path 'o/bdhs'" in command) == (command.split()[0] in READ_PAIRS)


def test_all_on_own_data_leaves_out_what_needs_twins(tmp_path):
    given = ("all", "MODEL=m", "DATA=rows.jsonl", "ARGS_povid=--seed 4")
    order = {command.split()[0]: command for command in commands(tmp_path, *given)}
    assert sorted(order) == [
        stage
        for stage in STAGES
        if stage
        not in (
            "curate_instructions",
            "clinical_rules",
            "import_published",
            "knowada",
            "mpa",
            "quality_pairs",
            "rlaif_v",
            "s_vco",
            "select_responses",
        )
    ]
    assert order["povid"].endswith("--seed 4")
    assert "--seed 4" not in order["bdhs"]
    shown = make(tmp_path, "-n", *given)
    for left_out in (
        "s_vco (needs TWINS=",
        "select_responses (needs SCORED=",
        "curate_instructions (needs labels or models of its own",
        "clinical_rules (needs labels or models of its own",
        "rlaif_v (needs labels or models of its own",
        "quality_pairs (needs labels or models of its own",
        "import_published (needs a published set",
    ):
        assert left_out in shown[shown.index("left out: ") :]
    order = {command.split()[0]: command for command in commands(tmp_path, *given, "TWINS=twins", "SCORED=scored")}
    assert "--data.path 'twins'" in order["s_vco"]
    assert "--data.path 'scored'" in order["select_responses"]
    assert "score_responses" not in order
    planned = make(tmp_path, "-n", "plan", *given[1:])
    assert "--then m3id" in planned
    assert "rlaif_v" not in planned
    assert "quality_pairs" not in planned


def test_readers_of_pairs_wait_for_no_stage_that_all_leaves_out(tmp_path):
    order = commands(tmp_path, "all", "MODEL=m", "DATA=rows.jsonl", "STAGES=rlaif_v stic filter_pairs")
    assert [command.split()[0] for command in order] == ["stic", "filter_pairs"]
    assert "--data.path 'runs/datagen/stic'" in order[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    where = tmp_path_factory.mktemp("caller")
    return where, make(where, "povid", "ROWS=6", "OUT=out of 'it'/povid")


def test_a_stage_runs_from_the_folder_of_the_caller(finished):
    where, shown = finished
    assert "povid: 6 rows in, 6 rows out" in shown
    assert read_manifest(where / "out of 'it'" / "povid").rows_out == 6
    assert {entry.name for entry in where.iterdir()} == {"out of 'it'", "runs"}


def test_a_finished_stage_keeps_its_rows(finished):
    where, _ = finished
    before = {file: file.stat().st_mtime_ns for file in (where / "out of 'it'").rglob("*") if file.is_file()}
    assert "povid: 6 rows in, 6 rows out" in make(where, "povid", "ROWS=6", "OUT=out of 'it'/povid")
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_the_command_that_is_suggested_writes_a_report(finished):
    where, shown = finished
    [suggested] = re.findall(r"look at them with: prefalign inspect (.*)", shown)
    done = subprocess.run(f"'{COMMAND}' inspect {suggested}", shell=True, cwd=where, capture_output=True, text=True)
    assert done.stdout == "report: out of 'it'/povid/report.html, open it in a browser\n", done.stderr
    (where / "out of 'it'" / "povid" / "report.html").unlink()


def test_a_folder_with_a_blank_and_other_counts_of_rows(tmp_path):
    """Each count of rows has its own folder, so that no run meets the rows of another count."""
    where = tmp_path / "a b"
    where.mkdir()
    for rows in ("6", "4"):
        shown = make(where, "povid", f"ROWS={rows}")
        assert f"povid: {rows} rows in" in shown
        assert f"cd '{where}' && " in shown
    assert sorted(entry.name for entry in (where / "runs").iterdir()) == ["datagen-4", "datagen-6", "scenes"]


def test_own_rows_with_the_tiny_model_are_noted(tmp_path):
    note = "note: MODEL is scenes"
    assert note in make(tmp_path, "-n", "povid", "DATA=rows.jsonl")
    assert note not in make(tmp_path, "-n", "povid", "DATA=rows.jsonl", "MODEL=scenes")
    assert note not in make(tmp_path, "-n", "povid")
    for goal in ("import_published", "plan-import_published"):  # no model, and the config of published sets
        shown = make(tmp_path, "-n", goal, "DATA=rows.jsonl")
        assert note not in shown
        assert "--config 'datagen/import_published' " in shown


def test_readers_of_pairs_run_no_stage_that_was_not_asked_for(tmp_path):
    assert "needs rows: give PAIRS=folder of pairs" in make(tmp_path, "all", "STAGES=filter_pairs", code=2)
    assert [each.split()[0] for each in commands(tmp_path, "all", "STAGES=filter_pairs", "PAIRS=p")] == ["filter_pairs"]
    shown = make(tmp_path, "-n", "plan-filter_pairs")
    assert "' run " not in shown
    assert "bdhs --config" in shown
    assert "--then filter_pairs" in shown


def test_answers_are_sampled_and_scored_before_they_are_selected(tmp_path):
    shown = make(tmp_path, "plan-select_responses", "ROWS=8", "SAMPLE=4")
    assert "select_responses: read the sample of score_responses" in shown
    make(tmp_path, "select_responses", "ROWS=6", "OUT=chosen", "ARGS=--seed 3")
    assert read_manifest(tmp_path / "chosen").seed == 3
    assert read_manifest(tmp_path / "runs" / "datagen-6" / "sample_responses").seed == 0
    assert sorted(entry.name for entry in (tmp_path / "runs" / "datagen-6").iterdir()) == [
        "sample_responses",
        "score_responses",
    ]


def test_other_settings_reach_the_stage_which_refuses(finished):
    where, _ = finished
    shown = make(where, "povid", "ROWS=6", "OUT=out of 'it'/povid", "ARGS=--seed 5", code=2)
    assert "holds rows made with another config (seed: 0 -> 5)" in shown


def test_changed_data_reaches_the_stage(tmp_path):
    rows = tmp_path / "rows.jsonl"
    line = {"id": "a", "image": "a.png", "question": "What?", "answer": "A large red square at the top left."}
    rows.write_text(json.dumps(line))
    from prefalign.scenes import world

    (tmp_path / "a.png").write_bytes(world.png(world.scene("test_fair", 0)))
    make(tmp_path, "povid", "DATA=rows.jsonl", "OUT=out")
    rows.write_text(json.dumps({**line, "id": "b"}))
    assert "data_sha256" in make(tmp_path, "povid", "DATA=rows.jsonl", "OUT=out", code=2)


def test_a_stopped_stage_goes_on(finished, tmp_path):
    shutil.copytree(finished[0] / "runs", tmp_path / "runs")
    arguments = ("povid", "ROWS=6", "OUT=o", "ARGS=--output.block_size 2")
    make(tmp_path, *arguments)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "o" / "data").iterdir()}
    (tmp_path / "o" / "manifest.json").unlink()
    (tmp_path / "o" / "progress" / "00002.json").unlink()
    (tmp_path / "o" / "data" / "train-00002.parquet").unlink()
    kept = (tmp_path / "o" / "data" / "train-00000.parquet").stat().st_mtime_ns
    make(tmp_path, *arguments)
    assert {file.name: file.read_bytes() for file in (tmp_path / "o" / "data").iterdir()} == whole
    assert (tmp_path / "o" / "data" / "train-00000.parquet").stat().st_mtime_ns == kept


def test_errors_stop_make_and_say_what_to_do(tmp_path):
    assert "bdhs with MODEL=some/model needs rows: give DATA=rows.jsonl" in make(
        tmp_path, "bdhs", "MODEL=some/model", code=2
    )
    assert "select_responses with MODEL=m needs rows: give DATA=candidates" in make(
        tmp_path, "select_responses", "MODEL=m", code=2
    )
    assert "s_vco with MODEL=m needs rows: give DATA=pairs" in make(tmp_path, "s_vco", "MODEL=m", code=2)
    assert "no data at gone.jsonl" in make(tmp_path, "povid", "DATA=gone.jsonl", code=2)
    assert "CONFIG is the config of one stage" in make(tmp_path, "all", "CONFIG=own.yaml", code=2)
    shown = make(tmp_path, "all", "DATA=gone.jsonl", "STAGES=povid image_contrast", code=2)
    assert "no data at gone.jsonl" in shown
    assert "image_contrast" not in shown


def test_plan_is_one_table_and_writes_no_output(tmp_path):
    shown = make(tmp_path, "plan", "STAGES=povid image_contrast", "ROWS=12", "SAMPLE=4")
    lines = [line.split() for line in shown.splitlines()]
    assert ["povid", "12", "12"] in [line[:3] for line in lines]
    assert ["image_contrast", "12", "12"] in [line[:3] for line in lines]
    assert ["all", "24", "24"] in [line[:3] for line in lines]
    assert "image_contrast: read the sample of povid" in shown
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["scenes"]
    assert "povid    12 " in make(tmp_path, "plan-povid", "ROWS=12", "SAMPLE=4")


def test_the_environment_is_made_when_it_is_missing(tmp_path):
    """A project whose Makefile can make one, and a folder that has none."""
    shutil.copytree(ROOT / "datagen", tmp_path / "project" / "datagen")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in (
        "sh",
        "make",
        "sed",
        "grep",
        "head",
        "mkdir",
        "chmod",
        "printf",
        "test",
        "echo",
        "cat",
        "find",
        "touch",
    ):
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    arguments = [
        "make",
        "--no-print-directory",
        "-C",
        str(tmp_path / "project" / "datagen"),
        "povid",
        "CONFIG=own.yaml",
    ]
    environment = {"PATH": str(tools), "PWD": str(tmp_path)}
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "the prefalign command is not on the PATH: activate its environment, or give PREFALIGN=" in done.stderr
    (tmp_path / "project" / "Makefile").write_text(
        ".venv/.demo:\n\tmkdir -p .venv/bin\n\tprintf '#!/bin/sh\\necho it runs: $$*\\n' > .venv/bin/prefalign\n"
        "\tchmod +x .venv/bin/prefalign\n\ttouch $@\n"
    )
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "it runs: run povid --config own.yaml" in done.stdout

"""The command: verbs, messages instead of tracebacks, stages started as files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefalign import bundled, cli, config
from prefalign.records import Prompt
from prefalign.scenes.data import KINDS
from prefalign.store import read_records

STAGE = '''"""A stage for tests: says what it was given."""

from dataclasses import dataclass, field


@dataclass
class Inner:
    beta: float = 0.1


@dataclass
class Extra:
    gamma: int


@dataclass
class Config:
    name: str
    inner: Inner = field(default_factory=Inner)
    extra: Extra | None = None
    several: list[Inner] = field(default_factory=list)


def main(config):
    if config.name == "boom":
        raise ValueError("boom: too loud. Lower it.")
    if config.name == "broken":
        raise FloatingPointError("loss is nan at step 3. Lower it.")
    if config.name == "stop":
        raise KeyboardInterrupt
    print(f"name={config.name} beta={config.inner.beta}")


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
'''


@pytest.fixture
def stage(tmp_path):
    file = tmp_path / "shout.py"
    file.write_text(STAGE)
    return file


def test_run_a_stage_of_ones_own(stage, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("name: x\n")
    assert cli.main(["run", str(stage), "--config", str(tmp_path / "run.yaml"), "--inner.beta", "0.5"]) == 0
    assert capsys.readouterr().out == "name=x beta=0.5\n"


@pytest.mark.parametrize(
    ("name", "said"), [("boom", "boom: too loud. Lower it."), ("broken", "loss is nan at step 3.")]
)
def test_errors_are_one_message(stage, name, said, capsys):
    assert cli.main(["run", str(stage), "--name", name]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {said}")
    assert "Traceback" not in captured.err


def test_traceback_on_request(stage, monkeypatch):
    monkeypatch.setenv("PREFALIGN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="too loud"):
        cli.main(["run", str(stage), "--name", "boom"])


def test_what_other_packages_say_at_each_start():
    """The two sentences alone; both packages still say everything else."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("deepspeed")
    load = "import logging, bitsandbytes, deepspeed; logging.getLogger('DeepSpeed').warning('news')"
    guarded = f"from prefalign import cli; cli.guarded(lambda: exec({load!r}), resumes=False)"
    plain, quiet = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for code in (load, guarded)
    )
    for sentence in cli._NO_NEWS.values():
        assert sentence not in quiet.stdout + quiet.stderr
    assert "news" in quiet.stdout + quiet.stderr
    if not torch.cuda.is_available():
        assert cli._NO_NEWS["DeepSpeed"] in plain.stdout + plain.stderr


def test_interruption(stage, capsys):
    assert cli.main(["run", str(stage), "--name", "stop"]) == 130
    assert "start the same command again" in capsys.readouterr().err


def test_unknown_stage_names_the_nearest(capsys):
    assert cli.main(["run", "bdsh"]) == 1
    assert "no stage called 'bdsh'; did you mean 'bdhs'?" in capsys.readouterr().err


def test_unknown_key(stage, capsys):
    assert cli.main(["run", str(stage), "--name", "x", "--inner.betta", "1"]) == 1
    assert "inner.betta: unknown key (value 1); did you mean 'beta'?" in capsys.readouterr().err


def test_run_without_stage(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run"])
    assert "run needs a stage" in capsys.readouterr().err


def test_stage_help_shows_docstring_and_settings(stage, capsys):
    assert cli.main(["run", str(stage), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "says what it was given" in shown
    assert "--name (required)" in shown
    assert "--inner.beta = 0.1" in shown
    assert "--extra = None\n  --extra.gamma (required)" in shown
    assert "--several = []" in shown
    assert "--several.beta" not in shown


def test_a_stage_file_started_directly(stage):
    done = subprocess.run([sys.executable, str(stage), "--name", "direct"], capture_output=True, text=True, check=True)
    assert done.stdout == "name=direct beta=0.1\n"


def test_list_names_stages_configs_and_profiles(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in (*bundled.stages(), *bundled.configs(), *bundled.profiles()):
        assert name in shown
    assert "slurm/train_preference  Train on several nodes with Slurm" in shown


def test_path_and_copy(tmp_path, capsys):
    assert cli.main(["path", "datagen/bdhs"]) == 0
    shown = Path(capsys.readouterr().out.strip())
    assert cli.main(["copy", "datagen/bdhs", str(tmp_path)]) == 0
    assert (tmp_path / "bdhs.yaml").read_bytes() == shown.read_bytes()
    assert cli.main(["copy", "deepspeed/zero3", str(tmp_path)]) == 0
    assert (tmp_path / "zero3.json").read_bytes() == bundled.find("configs/deepspeed/zero3.json").read_bytes()
    assert cli.main(["copy", "datagen/bdhs", str(tmp_path)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_path_tells_what_a_config_says_of_a_setting(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text("model: {dtype: float32, model_name_or_path: 'some model'}  # ours\nseed: 3\nlora: null\n")
    for setting, said in (("model.model_name_or_path", "some model"), ("seed", "3"), ("lora.r", ""), ("model.engine", ""),
                          ("model", '{"dtype": "float32", "model_name_or_path": "some model"}')):  # fmt: skip
        assert cli.main(["path", str(file), setting]) == 0
        assert capsys.readouterr().out == f"{said}\n"


def test_find_says_what_is_near():
    with pytest.raises(
        config.ConfigError, match=r"no stage, config or file called 'datagen/bdsh'; did you mean 'datagen/bdhs'"
    ):
        bundled.find("datagen/bdsh")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "aquarelle.yaml",
            "no file 'aquarelle.yaml' in the current folder, nor among the bundled ones; `prefalign list`",
        ),
        (
            "my/povid_scene.yml",
            "no file 'my/povid_scene.yml' in the current folder, nor among the bundled ones; did you mean 'datagen/povid_s",
        ),
        (
            "/nowhere/povid.yaml",
            "no file '/nowhere/povid.yaml', nor among the bundled ones; did you mean 'datagen/povid'?",
        ),
        ("mpa", "no config or file called 'mpa'; did you mean 'datagen/mpa'? `prefalign list` names the bundled ones."),
    ],
)
def test_a_config_that_is_not_there(given, said, tmp_path, capsys, monkeypatch):
    """In words, not by the catalogue; a stage's file is no config, though one is called as it."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "mpa", "--config", given]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {said}")
    assert shown.count("\n") == 1
    assert len(shown) < 250


def test_a_stage_file_that_is_not_there(capsys):
    assert cli.main(["run", "mine/mpaa.py"]) == 1
    said = "no file 'mine/mpaa.py' in the current folder, nor among the bundled ones; did you mean 'mpa'?"
    assert said in capsys.readouterr().err


def test_a_config_of_another_stage(tmp_path, capsys, monkeypatch):
    """A copy of a bundled config says by its head whose it is; the keys that there are come once."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["copy", "datagen/knowada_scenes"]) == 0
    verdict = (
        "knowada_scenes.yaml is a config of knowada, as its head says: "
        "`prefalign run knowada --config knowada_scenes.yaml`.\nConfigs of mpa: datagen/mpa, datagen/mpa_scenes.\n"
    )
    for verb in ("run", "plan"):
        assert cli.main([verb, "mpa", "--config", "knowada_scenes.yaml"]) == 1
        said = capsys.readouterr().err
        assert said.count("unknown key") > 2
        assert said.count("known: annotator, ") == 1
        assert verdict in said
    assert cli.main(["run", "knowada", "--config", "knowada_scenes.yaml", "--sed", "1"]) == 1
    assert "is a config of" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("povid", "With the same arguments `prefalign plan povid ...` runs the first rows in a scratch folder"),
        ("train_preference", "With the same arguments `prefalign doctor train_preference ...` takes one batch"),
        ("merge_adapter", "no other verb tries merge_adapter. Its settings: `prefalign run merge_adapter --help`."),
    ],
)
def test_a_dry_run_is_another_verb(name, said, capsys):
    for flag in ("--dry-run", "--dry-run=1"):
        assert cli.main(["run", name, flag, "--seed", "3"]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: run has no --dry-run")
        assert said in shown


@pytest.mark.parametrize("words", [["--config"], ["--config="], ["--config", "--name", "x"]])
def test_config_without_file(stage, words, capsys):
    assert cli.main(["run", str(stage), *words]) == 1
    assert "--config needs a file" in capsys.readouterr().err


def test_config_with_an_equals_sign(stage, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("name: a=b\n")
    assert cli.main(["run", str(stage), f"--config={tmp_path / 'run.yaml'}", "--inner.beta=0.5"]) == 0
    assert capsys.readouterr().out == "name=a=b beta=0.5\n"


def test_two_configs(stage, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("name: x\n")
    file = str(tmp_path / "run.yaml")
    assert cli.main(["run", str(stage), "--config", file, f"--config={file}"]) == 1
    assert "--config is given 2 times" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_demo_takes_a_config_of_ones_own(form, tmp_path, capsys):
    """What is refused before anything runs is said with its place: the file, or the command line."""
    (tmp_path / "mine.yaml").write_text("prompts: many\n")
    assert cli.main(["demo", *form.format(tmp_path / "mine.yaml").split()]) == 1
    assert capsys.readouterr().err.startswith("error: mine.yaml: prompts: ")
    assert cli.main(["demo", "--output", str(tmp_path / "out"), "--prompts", "many"]) == 1
    assert capsys.readouterr().err.startswith("error: command line: prompts: ")


def test_interruption_of_a_verb_that_does_not_resume(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_list", stop)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def export(folder, *words):
    assert cli.main(["scenes", "export", "--output", str(folder), "--stop", "2", *words]) == 0
    return list(read_records(folder, Prompt))


def test_scenes_export_by_regime_by_split_and_by_neither(tmp_path):
    seen = export(tmp_path / "seen")
    assert seen == export(tmp_path / "biased", "--split", "train_biased")
    fair = export(tmp_path / "fair", "--regime", "fair")
    validation = export(tmp_path / "val", "--split", "val_fair")
    bare = export(tmp_path / "bare", "--split", "val_fair", "--regime", "none")
    assert all(prompt.answer and prompt.facts for prompt in (*seen, *fair, *validation))
    assert [(prompt.answer, prompt.facts) for prompt in bare] == [(None, {}), (None, {})]
    assert validation[0].images == bare[0].images
    assert len({prompts[0].images[0]["bytes"] for prompts in (seen, fair, validation)}) == 3


def test_scenes_seed_draws_words_and_not_pictures(tmp_path):
    one, other = (export(tmp_path / seed, "--kind", "vqa", "--seed", seed) for seed in ("0", "3"))
    assert [prompt.images for prompt in one] == [prompt.images for prompt in other]
    assert [prompt.messages for prompt in one] != [prompt.messages for prompt in other]


def test_scenes_help_names_every_kind(capsys):
    with pytest.raises(SystemExit):
        cli.main(["scenes", "export", "--help"])
    shown = capsys.readouterr().out.split("--kind KIND")[-1].split("--regime")[0]
    assert all(kind in shown for kind in KINDS)


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("prefalign 0.")


def test_what_a_stage_made_is_said_and_how_to_look_at_it(tmp_path, capsys):
    """Pairs, and the conversations of STIC's second stage."""
    export(tmp_path / "rows")
    capsys.readouterr()
    for name, stage in (("pairs", "povid"), ("sft", "stic")):
        config_name = "datagen/povid_scenes" if name == "pairs" else "datagen/stic_sft_scenes"
        arguments = [
            "--config",
            config_name,
            "--data.path",
            str(tmp_path / "rows"),
            "--output.path",
            str(tmp_path / name),
        ]
        assert cli.main(["run", stage, *arguments]) == 0
        said = capsys.readouterr().out
        assert f"{stage}: 2 rows in, 2 rows out\n" in said
        assert f"look at them with: prefalign inspect {tmp_path / name}\n" in said

"""The command: verbs, messages instead of tracebacks, stages started as files."""

import subprocess
import sys
from pathlib import Path

import pytest

from prefalign import bundled, cli, config

STAGE = '''"""A stage for tests: says what it was given."""

from dataclasses import dataclass, field


@dataclass
class Inner:
    beta: float = 0.1


@dataclass
class Config:
    name: str
    inner: Inner = field(default_factory=Inner)


def main(config):
    if config.name == "boom":
        raise ValueError("boom: too loud. Lower it.")
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


def test_errors_are_one_message(stage, capsys):
    assert cli.main(["run", str(stage), "--name", "boom"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: boom: too loud. Lower it.")
    assert "Traceback" not in captured.err


def test_traceback_on_request(stage, monkeypatch):
    monkeypatch.setenv("PREFALIGN_TRACEBACK", "1")
    with pytest.raises(ValueError, match="too loud"):
        cli.main(["run", str(stage), "--name", "boom"])


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


def test_a_stage_file_started_directly(stage):
    done = subprocess.run([sys.executable, str(stage), "--name", "direct"], capture_output=True, text=True, check=True)
    assert done.stdout == "name=direct beta=0.1\n"


def test_list_names_stages_and_configs(capsys):
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in (*bundled.stages(), *bundled.configs()):
        assert name in shown


def test_path_and_copy(tmp_path, capsys):
    assert cli.main(["path", "datagen/bdhs"]) == 0
    shown = Path(capsys.readouterr().out.strip())
    assert cli.main(["copy", "datagen/bdhs", str(tmp_path)]) == 0
    assert (tmp_path / "bdhs.yaml").read_bytes() == shown.read_bytes()
    assert cli.main(["copy", "datagen/bdhs", str(tmp_path)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_find_says_what_is_near():
    with pytest.raises(
        config.ConfigError, match=r"no stage, config or file called 'datagen/bdsh'; did you mean 'datagen/bdhs'"
    ):
        bundled.find("datagen/bdsh")


def test_config_without_file(stage, capsys):
    assert cli.main(["run", str(stage), "--config"]) == 1
    assert "--config needs a file" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("prefalign 0.")

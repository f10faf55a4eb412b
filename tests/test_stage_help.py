"""`prefalign run STAGE --help`: every setting is explained, nothing twice, with the defaults of that place."""

import dataclasses
import re
import typing

import pytest

from prefalign import bundled, cli, config, stage_help

STAGE = '''"""A stage for tests."""

from dataclasses import dataclass, field


@dataclass
class Model:
    """A model.

    Attributes:
        name: folder or Hub id: for instance `scenes`, a name which is long enough that a narrow terminal breaks the line,
            as this sentence does too.
        limit: tokens.
    """

    name: str
    limit: int = 7


@dataclass
class Drawing:
    """How answers are drawn.

    Attributes:
        heat: 0 is greedy.
    """

    heat: float = 1.0
    most: int = 9


@dataclass
class Warm(Drawing):
    """Warmer."""

    heat: float = 0.5


@dataclass
class Config:
    """Settings.

    Attributes:
        model: answers.
        judge: says which is better;
            null: the model.
        first: its drawing.
        second: the other's.

    Raises:
        ValueError: never.
    """

    model: Model
    judge: Model | None = None
    first: Drawing = field(default_factory=lambda: Drawing(heat=0.25))
    second: Drawing = field(default_factory=lambda: Drawing(most=3))
    third: Warm = field(default_factory=Warm)


def main(config):
    pass
'''


def test_each_setting_is_explained_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    (tmp_path / "draw.py").write_text(STAGE)
    assert cli.main(["run", str(tmp_path / "draw.py"), "--help"]) == 0
    assert capsys.readouterr().out == (
        "A stage for tests.\n\n"
        "settings (--config FILE sets them, --name VALUE overrides):\n"
        "  model:\n      answers.\n"
        "  --model.name (required)\n"
        "      folder or Hub id: for instance `scenes`, a name which\n"
        "      is long enough that a narrow terminal breaks the line,\n"
        "      as this sentence does too.\n"
        "  --model.limit = 7\n      tokens.\n"
        "  --judge = None\n      says which is better; null: the model.\n      --judge.NAME: as --model.NAME\n"
        "  first:\n      its drawing.\n  --first.heat = 0.25\n      0 is greedy.\n  --first.most = 9\n"
        "  second:\n      the other's.\n      --second.NAME: as --first.NAME, but heat = 1.0, most =\n      3\n"
        "  --third.heat = 0.5\n      0 is greedy.\n  --third.most = 9\n"
    )


def test_help_ends_with_a_command_that_can_be_started(capsys):
    """Named as the stage where there is such a config, else the first."""
    for name, config_name in (("rlaif_v", "datagen/rlaif_v"), ("evaluate_model", "recipes/evaluate_files")):
        assert cli.main(["run", name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert shown.endswith(f"\nexample: prefalign run {name} --config {config_name}\n")
        assert set(bundled.configs_of(name)) <= set(re.split(r"[\s,]+", shown.split("its configs")[1]))
    assert cli.main(["run", "rlaif_v", "--help"]) == 0
    assert "--labeller.NAME: as --model.NAME\n" in capsys.readouterr().out


def sections(cls):
    return {cls}.union(
        *(sections(found) for kind in typing.get_type_hints(cls).values() for found in config.dataclasses_in(kind))
    )


@pytest.mark.parametrize("name", bundled.stages())
def test_every_setting_of_a_bundled_stage_is_explained(name):
    unexplained = [
        f"{cls.__name__}.{entry.name}"
        for cls in sections(bundled.load_stage(name).Config)
        for entry in dataclasses.fields(cls)
        if not stage_help.explanations(cls).get(entry.name)
    ]
    assert not unexplained


def test_every_config_belongs_to_a_stage():
    """By the command in its head; the demo's is a verb of its own."""
    for name, file in bundled.configs().items():
        assert bundled.stage_of(file) in (bundled.stages() if name != "recipes/demo" else [None]), name
    assert sorted(name for stage in bundled.stages() for name in bundled.configs_of(stage)) == sorted(bundled.configs())

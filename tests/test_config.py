"""Strict configuration: every mistake is named, with the value and the nearest name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from prefalign import bundled, config


@dataclass
class Crop:
    size: int = 4


@dataclass
class Noise:
    step: int = 500


@dataclass
class Trainer:
    beta: float = 0.1
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"


@dataclass
class Span:
    """Checks itself."""

    low: int = 0
    high: int = 1

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low is {self.low} and high {self.high}: nothing lies between. Swap them.")


@dataclass
class Measured:
    span: Span = field(default_factory=Span)
    times: int = 1

    def __post_init__(self):
        if self.times < 1:
            raise ValueError(f"times is {self.times}; measure at least once.")


@dataclass
class Config:
    output: Path
    trainer: Trainer = field(default_factory=Trainer)
    corruption: Crop | Noise = field(default_factory=Crop)
    seed: int = 0
    note: str | None = None


def write(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return file


def test_yaml_and_overrides(tmp_path):
    file = write(tmp_path, "output: runs/x\ntrainer: {beta: 1e-1}\n")
    loaded = config.load(Config, file, ["--trainer.beta", "5e-2", "--seed=3", "--note", "two words"])
    assert loaded == Config(Path("runs/x"), Trainer(beta=0.05), Crop(), 3, "two words")


def test_negative_values_are_values(tmp_path):
    assert config.load(Config, None, ["--output", "x", "--seed", "-1"]).seed == -1


def test_union_of_dataclasses(tmp_path):
    loaded = config.load(Config, write(tmp_path, "output: x\ncorruption: {step: 7}\n"))
    assert loaded.corruption == Noise(7)


def test_unknown_key_names_the_nearest(tmp_path):
    file = write(tmp_path, "output: x\ntrainer: {betta: 0.3}\n")
    with pytest.raises(config.ConfigError, match=r"trainer\.betta: unknown key \(value 0\.3\); did you mean 'beta'\?"):
        config.load(Config, file)


@dataclass
class Arguments:
    max_steps: int = 1
    eval_note: str = ""


@dataclass
class Recipe:
    output: Path
    note: str = ""
    data: Crop = field(default_factory=Crop)
    judge: Noise = field(default_factory=Noise)
    trainer: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": f"{__name__}.Arguments"})


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--max_steps", "2"], "max_steps: unknown key (value 2); did you mean 'trainer.max_steps'?"),
        (["--size", "2"], "size: unknown key (value 2); did you mean 'data.size'?"),
        (
            ["--judge.max_steps", "2"],
            "judge.max_steps: unknown key (value 2); did you mean 'trainer.max_steps' or 'judge.step'?",
        ),
        (["--judge.output", "x"], "judge.output: unknown key (value 'x'); did you mean 'output'?"),
        (["--eval_note", "x"], "eval_note: unknown key (value 'x'); did you mean 'trainer.eval_note' or 'note'?"),
        (["--judge.nothing", "x"], "judge.nothing: unknown key (value 'x'); known: step."),
    ],
)
def test_a_setting_without_its_section_is_found(words, hint):
    with pytest.raises(config.ConfigError) as error:
        config.load(Recipe, None, ["--output", "y", *words])
    assert str(error.value) == f"command line: {hint}"


def test_sections_of_every_stage_are_known():
    for name in bundled.stages():
        assert "output" in {place.partition(".")[0] for place in config._settings(bundled.load_stage(name).Config)}
    assert {"trainer.max_steps", "trainer.beta"} <= {
        *config._settings(bundled.load_stage("train_preference").Config),
    }


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("{}", ["--sed", "3"], "command line: sed: unknown key (value 3); did you mean 'seed'?"),
        ("sed: 3", ["--seed", "3"], "run.yaml: sed: unknown key (value 3); did you mean 'seed'?"),
        ("trainer: {beta: 1}", ["--trainer.bet", "3"], "command line: trainer.bet: unknown key"),
        ("trainer: {bet: 1}", ["--trainer.beta", "3"], "run.yaml: trainer.bet: unknown key"),
        ("trainer: {low: {beta: 1}}", ["--trainer.beta", "3"], "run.yaml: trainer.low: unknown key"),
        ("corruption: {step: x}", ["--corruption.step", "y"], "command line: "),
        ("corruption: {step: x}", ["--seed", "2"], "run.yaml: "),
        (
            "seed: x",
            ["--trainer.beta", "y"],
            "run.yaml: \n  command line: trainer.beta: Input should be a valid number",
        ),
    ],
)
def test_the_place_of_a_mistake_is_named(tmp_path, text, words, said):
    file = write(tmp_path, f"output: x\n{text}\n" if text != "{}" else "output: x\n")
    with pytest.raises(config.ConfigError) as error:
        config.load(Config, file, words)
    assert str(error.value).startswith(said)


def test_a_check_of_a_section_that_is_partly_typed(tmp_path):
    file = write(tmp_path, "span: {low: 3, high: 4}\n")
    with pytest.raises(config.ConfigError, match=r"^run.yaml with the command line: span: low is 3 and high 2"):
        config.load(Measured, file, ["--span.high", "2"])
    with pytest.raises(config.ConfigError, match=r"^run.yaml: times is 0"):
        config.load(Measured, write(tmp_path, "times: 0\n"), ["--span.high", "2"])
    with pytest.raises(config.ConfigError, match=r"^run.yaml with the command line: times is 0"):
        config.load(Measured, file, ["--times", "0"])


def test_unknown_override_names_the_nearest():
    with pytest.raises(config.ConfigError, match=r"sed: unknown key \(value 1\); did you mean 'seed'\?"):
        config.load(Config, None, ["--output", "x", "--sed", "1"])


def test_known_keys_are_listed_once_for_each_section():
    with pytest.raises(config.ConfigError) as error:
        config.load(Config, None, ["--output", "x", "--qqq", "1", "--zzz", "2", "--trainer.www", "3", "--sed", "4"])
    lines = [line.strip() for line in str(error.value).splitlines()]
    known = "known: corruption, note, output, seed, trainer."
    assert sorted(lines[1:]) == [
        f"qqq: unknown key (value 1); {known}",
        "sed: unknown key (value 4); did you mean 'seed'?",
        "trainer.www: unknown key (value 3); known: beta, loss_type.",
        "zzz: unknown key (value 2).",
    ]


def test_bad_type_and_missing_are_listed_together():
    with pytest.raises(config.ConfigError) as error:
        config.load(Config, None, ["--trainer.beta", "high"])
    assert "output: required, and not given" in str(error.value)
    assert "trainer.beta: Input should be a valid number" in str(error.value)
    assert "(got 'high')" in str(error.value)


def test_what_a_config_says_of_itself_is_said_alone():
    with pytest.raises(config.ConfigError) as error:
        config.load(Measured, None, ["--times", "0"])
    assert str(error.value) == "command line: times is 0; measure at least once."
    with pytest.raises(config.ConfigError) as error:
        config.load(Measured, None, ["--span.low", "3"])
    assert str(error.value) == "command line: span: low is 3 and high 1: nothing lies between. Swap them."


def test_duplicate_key(tmp_path):
    file = write(tmp_path, "output: x\nseed: 1\nseed: 2\n")
    with pytest.raises(config.ConfigError, match=r"run\.yaml: key 'seed' is written twice \(lines 2 and 3\)"):
        config.load(Config, file)


def test_broken_yaml(tmp_path):
    with pytest.raises(config.ConfigError, match=r"run\.yaml is not valid YAML"):
        config.load(Config, write(tmp_path, "output: [x\n"))


def test_top_level_must_be_a_mapping(tmp_path):
    with pytest.raises(config.ConfigError, match="must be a mapping of settings, got a list"):
        config.load(Config, write(tmp_path, "- a\n- b\n"))


def test_missing_file():
    with pytest.raises(config.ConfigError, match=r"no config at nowhere\.yaml.*prefalign list"):
        config.load(Config, "nowhere.yaml")


def test_override_without_value():
    with pytest.raises(config.ConfigError, match=r"--seed needs a value"):
        config.parse_overrides(["--seed"])
    with pytest.raises(config.ConfigError, match=r"--seed needs a value"):
        config.parse_overrides(["--seed", "--note", "x"])


def test_stray_word():
    with pytest.raises(config.ConfigError, match=r"expected an override such as --seed 3, got 'x'"):
        config.parse_overrides(["x"])


def test_override_conflict():
    with pytest.raises(config.ConfigError, match="'trainer' was already given a plain value"):
        config.parse_overrides(["--trainer", "x", "--trainer.beta", "1"])


def test_round_trip():
    original = Config(Path("runs/x"), Trainer(0.2), Noise(3))
    assert config.build(Config, config.to_mapping(original)) == original


def test_inputs_are_not_edited():
    base = {"a": {"b": 1}}
    assert config.merge(base, {"a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}
    assert base == {"a": {"b": 1}}


def test_only_true_and_false_are_booleans(tmp_path):
    (tmp_path / "a.yaml").write_text("fast_path: off\nanswer: yes\nflag: true\n")
    assert config.read_yaml(tmp_path / "a.yaml") == {"fast_path": "off", "answer": "yes", "flag": True}


@dataclass
class Inner:
    revision: str | None = None
    scale: float | Literal["auto"] = 1.0


@dataclass
class Texts:
    name: str = "x"
    path: Path = Path()
    mode: Literal["1", "off"] = "off"
    columns: list[str] = field(default_factory=list)
    by_name: dict[str, str] = field(default_factory=dict)
    inner: Inner | None = None
    number: int = 0
    anything: Any = None


AWKWARD = ["1234567", "0123456", "12e5", "1.5e+10", "0x1f", "123_456", "1:30", "2024-01-01", "0.50", "true", "yes", "a: b",
           "{a: 1}", "[a]", "#abc", "a #b", "*a", "- a", " a ", "-1"]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD)
def test_a_text_on_the_command_line_is_what_was_written(text):
    loaded = config.load(
        Texts, None, ["--name", text, f"--inner.revision={text}", "--by_name.key", text, "--path", text]
    )
    assert (loaded.name, loaded.inner.revision, loaded.by_name) == (text, text, {"key": text})
    assert loaded.path == Path(text)


def test_lists_of_texts_and_words_are_texts_too():
    loaded = config.load(Texts, None, ["--columns", "[0123, true, 'a, b', 1e5]", "--mode", "1"])
    assert (loaded.columns, loaded.mode) == (["0123", "true", "a, b", "1e5"], "1")


def test_quotes_and_null_mean_what_they_do_in_yaml():
    loaded = config.load(Texts, None, ["--name", '"a\\tb"', "--inner.revision", "null", "--columns", "['x']"])
    assert (loaded.name, loaded.inner.revision, loaded.columns) == ("a\tb", None, ["x"])
    assert config.load(Texts, None, ["--name", "'12'", "--inner.revision", ""]) == Texts("12", inner=Inner(None))
    assert config.load(Texts, None, ["--name", ""]).name == ""
    with pytest.raises(config.ConfigError, match="path: .* not"):
        config.load(Texts, None, ["--path", ""])
    with pytest.raises(config.ConfigError, match=r"name: Input should be a valid string \(got None\)"):
        config.load(Texts, None, ["--name", "null"])


def test_what_is_no_text_is_read_as_yaml():
    given = ["--number", "1234567", "--inner.scale", "0.5", "--anything", "0.5", "--inner.scale=auto"]
    loaded = config.load(Texts, None, given)
    assert (loaded.number, loaded.inner.scale, loaded.anything) == (1234567, "auto", 0.5)
    assert config.parse_overrides(["--name", "12"]) == {"name": 12}
    assert config.parse_overrides(["--nmae", "12", "--name.inside", "12"], Texts) == {
        "nmae": 12,
        "name": {"inside": 12},
    }


def test_a_text_that_yaml_takes_for_a_number_is_told_to_be_quoted(tmp_path):
    file = write(tmp_path, "name: 0123456\npath: 7\ninner: {revision: 2024-01-01}\n")
    with pytest.raises(config.ConfigError) as error:
        config.load(Texts, file)
    assert "name: a text is wanted, and YAML takes what is written there for 42798. Put it in quotes." in str(
        error.value
    )
    assert "path: a text is wanted, and YAML takes what is written there for 7." in str(error.value)
    assert (
        "inner.revision: a text is wanted, and YAML takes what is written there for datetime.date(2024, 1, 1)."
        in str(error.value)
    )


def test_a_commit_of_digits_reaches_a_stage():
    stage = bundled.load_stage("sample_responses")
    given = ["--config", "datagen/sample_responses_scenes", "--data.path", "owner/name", "--data.revision"]
    for commit in ("1234567", "0123456", "12e5"):
        built = bundled.resolve("sample_responses", stage, [*given, commit, "--model.model_revision", commit])
        assert (built.data.revision, built.model.model_revision) == (commit, commit)

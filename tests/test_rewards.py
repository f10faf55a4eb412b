"""The list of rewards: tables, weights, missing terms, errors of configs, Python functions, and TRL's form of it."""

import dataclasses
import importlib
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from prefalign.config import ConfigError
from prefalign.images import encode_png
from prefalign.records import user_message
from prefalign.rewards import (
    COMPARATORS,
    REWARDS,
    Combined,
    Response,
    Weighted,
    as_trl_functions,
    read_comparator,
    read_rewards,
)
from prefalign.rewards.function import Function
from prefalign.scenes import language, world
from tests.tiny_vlms import picture

FUNCTIONS = """
def words(responses):
    return [len(one.text.split()) for one in responses]

def terms(responses, scale=1.0):
    return {"words": [scale * len(one.text.split()) for one in responses], "pictures": [len(one.images) for one in responses]}

def unknown(responses):
    return [None if not one.text else 1.0 for one in responses]

def brightness(responses):
    import numpy, torch
    return torch.tensor([float(numpy.asarray(one.images[0]).mean()) for one in responses])

def trl(completions, prompts, answer, **columns):
    return [float(one[0]["content"] == truth) + 0.1 * len(prompt) for one, truth, prompt in zip(completions, answer, prompts)]

def bare(completions):
    return [len(one[0]["content"]) for one in completions]

def short(responses):
    return [1.0]

def number(responses):
    return 3.0

def text(responses):
    return ["good"] * len(responses)

def infinite(responses):
    return [float("inf")] * len(responses)

def broken(responses):
    raise KeyError("mine")

CONSTANT = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def responses(*texts, **more):
    return [Response(str(row), [], [user_message("What?")], text, **more) for row, text in enumerate(texts)]


@pytest.mark.parametrize(("name", "place"), [*REWARDS.items(), *COMPARATORS.items()])
def test_every_name_of_the_tables_is_a_class_of_settings(name, place):
    module, _, cls = place.partition(":")
    found = getattr(importlib.import_module(module), cls)
    assert dataclasses.is_dataclass(found)
    assert callable(getattr(found, "compare" if COMPARATORS.get(name) == place else "score"))
    assert found.__doc__


def test_a_weighted_sum_with_each_term_logged(file):
    rewards = read_rewards(
        [
            {"name": "function", "function": f"{file}:words", "weight": 2, "label": "words"},
            {"name": "function", "function": f"{file}:terms", "weight": {"words": -0.5}, "arguments": {"scale": 10}},
        ]
    )
    found = rewards.score(responses("a b", "a"))
    assert {name: values.tolist() for name, values in found.items()} == {
        "words/value": [2, 1],
        "function/words": [20, 10],
        "function/pictures": [0, 0],
        "total": [4 - 10, 2 - 5],
    }
    assert all(values.dtype == torch.float32 for values in found.values())


def test_a_missing_term_leaves_no_total_unless_it_has_no_weight(file):
    entries = [Weighted("known", Function(f"{file}:words")), Weighted("unknown", Function(f"{file}:unknown"), 0.5)]
    found = Combined(entries).score(responses("a b", ""))
    assert found["total"][0] == 2.5
    assert math.isnan(found["total"][1])
    assert found["known/value"].tolist() == [2, 0]
    facts = {"world": "scenes", "objects": []}  # nothing to recall
    recall = read_rewards([{"name": "objects", "weight": {"invented": 1.0}}]).score(responses("A star.", facts=facts))
    assert math.isnan(recall["objects/recall"])
    assert recall["total"].item() == -1


def test_no_responses(file):
    found = read_rewards([{"name": "objects"}, {"name": "function", "function": f"{file}:words"}]).score([])
    assert found["total"].shape == (0,)


def test_a_weight_that_counts_no_term(file):
    """What a function gives is known once it was called."""
    rewards = read_rewards([{"name": "function", "function": f"{file}:words", "weight": {"valeu": 1.0}}])
    with pytest.raises(ValueError, match=r"reward 'function' gives no term 'valeu', .*; did you mean 'value'"):
        rewards.score(responses("A star."))


ENGINE = {"model_name_or_path": "m"}
REWARD_TERMS = {"objects": ("invented", "wrong", "precision", "recall"), "missing_eos": ("penalty",), "length": ("penalty",),
                "multiple_choice": ("correct",), "yes_no": ("correct",)}  # fmt: skip
GIVEN = {
    "objects": ({}, "A star."),
    "missing_eos": ({}, "A star."),
    "length": ({}, "A star."),
    "multiple_choice": ({}, "A"),
    "yes_no": ({}, "Yes."),
    "symbolic": ({"length": True}, "A star."),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_reward_gives_the_terms_that_it_names(name):
    settings, text = GIVEN[name]
    (entry,) = read_rewards([{"name": name, **settings}]).entries
    assert tuple(entry.reward.score(responses(text, facts={"world": "scenes", "objects": []}))) == entry.reward.terms


@pytest.mark.parametrize(
    ("entry", "terms"),
    [
        ({"name": "claims", "labeller": ENGINE}, ("trust",)),
        (
            {"name": "statements", "model": ENGINE},
            ("descriptiveness_precision", "descriptiveness_recall", "contradiction_precision", "contradiction_recall"),
        ),
        ({"name": "implicit", "model": ENGINE, "reference": ENGINE}, ("log_ratio",)),
        ({"name": "judge", "model": ENGINE, "attributes": ["coherence", "verbosity"]}, ("coherence", "verbosity")),
        ({"name": "reward_model", "path": "p", "weights": {"helpfulness": 1.0}}, ("reward",)),
        ({"name": "symbolic"}, ("correct", "consistent")),
        *(({"name": name}, None) for name in ("objects", "missing_eos", "length", "multiple_choice", "yes_no")),
    ],
)
def test_a_misspelt_term_is_refused_before_anything_is_loaded(entry, terms):
    with pytest.raises(ConfigError) as error:
        read_rewards([{"name": "length", "label": "other"}, {**entry, "weight": {"typo": 1.0}}])
    wrong = f"rewards.1.weight: reward {entry['name']!r} gives no term 'typo', so its weight would count for nothing; "
    assert str(error.value).startswith(wrong)
    known = terms or REWARD_TERMS[entry["name"]]
    assert str(error.value) == wrong + f"known: {', '.join(sorted(known))}."
    read_rewards([{**entry, "weight": dict.fromkeys(known, 1.0)}])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "rewards: the list is empty"),
        ([{"name": "object"}], r"rewards.0.name: no reward called 'object'; did you mean 'objects'\?"),
        ([{"weight": 1}], "rewards.0.name: no reward called None; known: "),
        ([{"name": "length", "max_token": 3}], r"rewards.0: max_token: unknown key .*did you mean 'max_tokens'"),
        ([{"name": "length", "weight": 0}], "rewards.0.weight: 0 is no weight"),
        ([{"name": "length", "weight": "2"}], "rewards.0.weight: '2' is no weight"),
        ([{"name": "length", "weight": math.nan}], "rewards.0.weight: nan is no weight"),
        ([{"name": "length", "weight": True}], "rewards.0.weight: True is no weight"),
        ([{"name": "length", "weight": {"penalty": math.inf}}], "rewards.0.weight: .* is no weight"),
        ([{"name": "length", "weight": {}}], "rewards.0.weight: {} is no weight"),
        (
            [{"name": "length"}, {"name": "length"}],
            "rewards: 'length' stands in the list 2 times; give each its own `label`",
        ),
        ([{"name": "lenght"}, {"name": "yes_no", "parser": "x"}], r"(?s)did you mean 'length'.*rewards.1: parser"),
    ],
)
def test_lists_that_cannot_be(entries, message):
    with pytest.raises(ConfigError, match=message):
        read_rewards(entries)


def test_a_comparator_that_is_not_known():
    with pytest.raises(ConfigError, match=r"annotator.name: no annotator called 'juge'; did you mean 'judge'\?"):
        read_comparator({"name": "juge"})


def test_a_function_of_an_installed_module_and_of_a_file(file):
    assert Function("math:fsum").call is math.fsum
    found = Function(f"{file}:terms", {"scale": 2.0}).score(responses("a b c"))
    assert (found["words"].item(), found["pictures"].item()) == (6, 0)


def test_a_function_sees_the_picture(file):
    one, other, black = (Response("a", [picture(seed)], [], "") for seed in (0, 1, 2))
    black.images = [picture(2).point(lambda _: 0)]
    values = Function(f"{file}:brightness").score([one, other, black])["value"]
    assert values[0] != values[1]
    assert values[2] == 0


def test_a_function_written_for_trl(file):
    two = [
        Response("0", [], [user_message("What?")], "dog", answer="dog"),
        Response("1", [], [user_message("What?"), user_message("Well?")], "cat", answer="dog"),
    ]
    assert Function(f"{file}:trl").score(two)["value"].tolist() == pytest.approx([1.1, 0.2])
    assert Function(f"{file}:bare").score(two)["value"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("words", r"function is 'words'; name it as `package.module:name`"),
        ("mine.py:words", r"'mine.py:words': mine.py could not be imported \(there is no file 'mine.py'"),
        ("no.such.module:words", r"no.such.module could not be imported \(No module named 'no'"),
        ("FILE:word", "has no function 'word'; it has words, terms, unknown"),
        ("FILE:CONSTANT", "has no function 'CONSTANT'"),
    ],
)
def test_functions_that_are_not_there(file, function, message):
    with pytest.raises(ConfigError, match=message):
        read_rewards([{"name": "function", "function": function.replace("FILE", str(file))}])


def test_arguments_that_a_function_does_not_take(file):
    with pytest.raises(
        ConfigError, match=r"has no parameter 'scales' that `arguments` could set; it takes responses, scale"
    ):
        read_rewards([{"name": "function", "function": f"{file}:terms", "arguments": {"scales": 1}}])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"returned 1 values \(value\) for 2 response\(s\)"),
        ("number", r"returned a float \(value\) for 2 response\(s\)"),
        ("text", r"returned 'good' \(value\) as a score"),
        ("infinite", r"returned inf \(value\) as a score"),
    ],
)
def test_what_a_function_may_not_return(file, name, message):
    with pytest.raises(ValueError, match=message):
        Function(f"{file}:{name}").score(responses("a", "b"))


def test_a_functions_own_error_is_not_hidden(file):
    with pytest.raises(KeyError, match="mine"):
        Function(f"{file}:broken").score(responses("a"))


def test_trl_calls_the_total_with_its_own_arguments():
    """Arguments as `GRPOTrainer._calculate_rewards` of TRL 1.16 gives them."""
    scenes = [world.scene("test_fair", index) for index in (0, 1)]
    images = [world.draw(scene) for scene in scenes]
    rewards = read_rewards(
        [{"name": "objects", "weight": {"invented": 1.0}}, {"name": "missing_eos", "penalty": 4.0}, {"name": "length"}]
    )
    (total,) = as_trl_functions(rewards, end_token_ids=[2])
    assert total.__name__ == "total"
    logged = {}
    prompts = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
        for image in images
    ]
    found = total(
        prompts=prompts,
        completions=[[{"role": "assistant", "content": language.caption(scene)}] for scene in scenes],
        completion_ids=[[5, 6, 2], [5] * 896],
        image=images,
        id=["a", "b"],
        facts=['{"world": "scenes", "objects": []}', language.facts(scenes[1])],
        trainer_state=object(),
        log_extra=lambda *_: None,
        log_metric=logged.__setitem__,
    )
    said = len(language.parse(language.caption(scenes[0])))
    assert found == pytest.approx([-said - 10 * 3 / 896, -4 - 10])
    assert logged["missing_eos/penalty"] == -2
    assert logged["total"] == pytest.approx(sum(found) / 2)


def test_trl_gets_none_for_a_missing_score():
    (total,) = as_trl_functions(read_rewards([{"name": "objects"}]))
    arguments = {
        "prompts": [[{"role": "user", "content": "What?"}]] * 2,
        "completions": [[{"role": "assistant", "content": "A star."}]] * 2,
    }
    facts = ['{"world": "scenes", "objects": ["star"]}', None]
    assert total(**arguments, facts=facts, image=[None, None]) == [2, None]
    assert total(**arguments, facts=facts, images=[None, []]) == [2, None]


def test_trl_functions_hand_pictures_on(file):
    (total,) = as_trl_functions(read_rewards([{"name": "function", "function": f"{file}:brightness"}]))
    arguments = {
        "prompts": [[{"role": "user", "content": "What?"}]] * 2,
        "completions": [[{"role": "assistant", "content": "A."}]] * 2,
    }
    straight = total(**arguments, image=[picture(0), picture(1)])
    assert straight[0] != straight[1]
    assert total(**arguments, images=[[picture(1)], [picture(0)]]) == straight[::-1]


def test_trl_does_not_say_what_is_finished():
    with pytest.raises(
        ValueError, match=r"reward 'missing_eos' needs to know which completions are finished.*`end_token_ids`"
    ):
        as_trl_functions(read_rewards([{"name": "missing_eos"}]))


def test_encoded_pictures_reach_a_reward_as_they_are(file):
    encoded = encode_png(picture(0))
    found = Function(f"{file}:terms").score([Response("a", [encoded, encoded], [], "x")])
    assert found["pictures"].item() == 2


DOCUMENT = (Path(__file__).parent.parent / "docs/reward_models/rewards.md").read_text()
SNIPPETS = [part for text in re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL) for part in text.split("---\n")]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_of_the_document_can_be_read(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    Path("my_rewards.py").write_text(code)
    settings = yaml.safe_load(snippet)
    if "annotator" in settings:
        read_comparator(settings["annotator"])
    else:
        rewards = read_rewards(settings["rewards"])
        if "function" in snippet:
            assert rewards.score(responses("Perhaps a dog; it might sleep."))["total"].item() == -2


@pytest.mark.parametrize(("name", "place"), [*REWARDS.items(), *COMPARATORS.items()])
def test_every_setting_stands_in_the_document(name, place):
    if name == "reward_model":
        pytest.skip("has a page of its own")
    module, _, cls = place.partition(":")
    settings = {field.name for field in dataclasses.fields(getattr(importlib.import_module(module), cls))} - {"engine"}
    sections = [part for part in DOCUMENT.split("\n## ")[1:] if f"name: {name}" in part]
    assert sections
    assert not {setting for setting in settings if not any(setting in section for section in sections)}


def test_a_misspelt_term_beside_a_right_one_is_refused():
    with pytest.raises(ConfigError, match=r"reward 'objects' gives no term 'recal', .*; did you mean 'recall'"):
        read_rewards([{"name": "objects", "weight": {"invented": 1.0, "recal": 6.0}}])


def test_a_reward_file_with_a_dataclass_and_numpy_scores(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport numpy as np\nimport torch\n"
        "@dataclass\nclass Rule:\n    word: str = 'a'\n"
        "def found(responses):\n    return [np.float32(Rule().word in one.text) for one in responses]\n"
        "def tensors(responses):\n    return [torch.tensor(2.5) for one in responses]\n"
        "def ids(prompts, completions, completion_ids):\n    return [len(one) for one in completion_ids]\n"
    )
    assert Function(f"{path}:found").score(responses("a", "b"))["value"].tolist() == [1, 0]
    assert Function(f"{path}:tensors").score(responses("a"))["value"].tolist() == [2.5]
    with pytest.raises(
        ValueError, match=r"needs 'completion_ids', which it would not get: the columns here are prompts, "
    ):
        Function(f"{path}:ids")


def test_the_version_of_a_function_is_its_source(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def reward(responses):\n    return [1.0] * len(responses)\n")
    before = Function(f"{path}:reward").version
    assert before == Function(f"{path}:reward").version
    path.write_text("def reward(responses):\n    return [99.0] * len(responses)\n")
    assert len(before) == 64
    assert Function(f"{path}:reward").version != before
    assert len(Function("prefalign.text:split_sentences").version) == 64

"""Rounds sampled by another process: the protocol with the transformers engine behind it, stale weights, and what is refused."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefalign.blocks import NoRows
from prefalign.config import ConfigError, to_mapping
from prefalign.engines import Request
from prefalign.engines.transformers import load_engine
from prefalign.images import open_image
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.online import rounds, sampling_job, serving
from prefalign.online.checking import EngineGap
from prefalign.online.sampling import Draw
from prefalign.online.settings import check_settings, unread
from prefalign.records import Candidates, Prompt
from prefalign.store import OutputConfig, read_records, write_records
from prefalign.training.runs import RunError
from tests.online_runs import online_config, write_prompts

BASE = ModelConfig("scenes", device="cpu")
NOBODY = Draw(frozenset(), 0.5, 0, 1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("serving") / "prompts", 3)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A policy with an adapter that changes its answers."""
    torch.manual_seed(0)
    targets = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    model = get_peft_model(load_model(BASE), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    folder = tmp_path_factory.mktemp("adapted") / "adapter"
    model.save_pretrained(folder)
    return replace(BASE, adapter=str(folder))


@pytest.fixture
def config(prompts, tmp_path):
    return online_config(prompts, tmp_path, check={"prompts": 2})


@pytest.fixture
def in_this_process(monkeypatch):
    """Jobs are done here, which saves the start of a process; their files are the same."""

    def run_job(config, job, folder):
        job.outcome.parent.mkdir(parents=True, exist_ok=True)
        sampling_job.run_job(job)
        return json.loads(job.outcome.read_text())

    monkeypatch.setattr(serving, "run_job", run_job)


def answers(folder):
    rows = read_records(folder / "candidates", Candidates)
    return {(row.id, number): one for row in rows for number, one in enumerate(row.responses)}


@pytest.mark.usefixtures("warm_executable")
def test_another_process_draws_what_this_one_would(config, prompts, tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    rounds._draw_here(config, here, prompts, NOBODY, BASE)
    serving.draw_candidates(config, elsewhere, prompts, NOBODY, BASE)
    assert len(answers(here)) == 6
    assert answers(elsewhere) == answers(here)
    assert (elsewhere / "check.json").read_text() == (here / "check.json").read_text()
    assert json.loads((here / "check.json").read_text())["largest"] < 1e-4
    assert not (elsewhere / "served").exists()


def test_an_adapter_is_served_merged_and_other_weights_are_stopped(config, prompts, adapted, tmp_path, in_this_process):
    served = serving.serve(config, adapted, tmp_path / "served")
    assert (served.model_name_or_path, served.adapter) == (str(tmp_path / "served"), None)
    row = next(read_records(prompts, Prompt))
    asked = [Request(row.id, row.messages, [open_image(row.images[0])])]
    merged, apart, base = (load_engine(policy).logprobs(asked, [row.answer])[0] for policy in (served, adapted, BASE))
    assert (merged - apart).abs().max() < 0.01  # the merge is kept in the base's float16
    assert (base - apart).abs().max() > 0.1
    job = serving.make_job(config, tmp_path, prompts, NOBODY, serving.serve(config, BASE, tmp_path / "unused"))
    with pytest.raises(EngineGap, match=r"above the bound of 0.01: the engine samples from another policy"):
        serving.check_engine(config, job, adapted, tmp_path)
    assert not (tmp_path / "check.json").exists()
    assert not (tmp_path / "candidates").exists()
    serving.remove_served(tmp_path)
    assert not (tmp_path / "served").exists()


def test_answers_to_other_pictures_are_found(config, prompts, tmp_path, in_this_process):
    job = serving.make_job(config, tmp_path, prompts, NOBODY, serving.serve(config, BASE, tmp_path))
    drawn = serving.run_job(config, job, tmp_path)["answers"]
    rows = list(read_records(prompts, Prompt))
    swapped = [replace(row, images=rows[number - 1].images) for number, row in enumerate(rows)]
    write_records("test", swapped, output=OutputConfig(tmp_path / "swapped"), record=Prompt, settings={}, seed=0)
    model, processor = load_model(BASE), load_processor(BASE)
    assert serving._gap(config, job, drawn, model, processor).largest < 1e-4
    wrong = replace(job, prompts=tmp_path / "swapped")
    assert serving._gap(config, wrong, drawn, model, processor).largest > 0.1


def test_a_round_without_answers_says_so_on_this_side(config, prompts, tmp_path, in_this_process):
    ids = frozenset(row.id for row in read_records(prompts, Prompt))
    config.check.prompts = 0
    with pytest.raises(NoRows, match=r"sample_policy made no row out of 3: .*drawn_offline"):
        serving.draw_candidates(config, tmp_path / "round-1", prompts, Draw(ids, 1.0, 0, 1), BASE)


@pytest.mark.usefixtures("warm_executable")
def test_a_process_that_fails_is_quoted(config, prompts, tmp_path):
    config.engine = "vllm"
    with pytest.raises(RunError, match=r"ended with code 1: .*vLLM is not installed here.*check.txt. Mend the cause"):
        serving.draw_candidates(config, tmp_path / "round-1", prompts, NOBODY, BASE)
    assert not (tmp_path / "round-1" / "candidates").exists()


def test_sampling_ends_with_the_run(config, prompts, tmp_path):
    job = serving.make_job(config, tmp_path, prompts, NOBODY, serving.serve(config, BASE, tmp_path))
    job.outcome.parent.mkdir()
    (tmp_path / "job.json").write_text(json.dumps(to_mapping(job)))
    command = [sys.executable, "-m", "prefalign.online.sampling_job", str(tmp_path / "job.json")]
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a run that a shell started in the background
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert done.returncode
    assert "KeyboardInterrupt" in done.stderr
    assert not job.outcome.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer": {"algorithm": "online_dpo_step"}}, "'online_dpo_step', which changes the policy in every step"),
        ({"trainer": {"algorithm": "grpo"}}, "'grpo', which changes.*Set trainer.algorithm to online_dpo"),
        ({"trainer": {"algorithm": "rloo"}}, "'rloo', which changes.*or engine to transformers"),
        ({"bdhs": {}, "rewards": []}, "hides image tokens while it draws.*Set engine to transformers"),
        ({"model": {"load_in_4bit": True}}, "another policy than the one that trains.*Set load_in_4bit to false"),
        ({"vllm_python": "nowhere/bin/python"}, "nowhere/bin/python, and there is no such program.*make vllm-env"),
        ({"vllm_python": sys.executable}, "cannot import it .*No module named 'vllm'.*set vllm_python to its bin/python"),
        ({"vllm_python": None}, f"{sys.executable} cannot import it"),
    ],
)  # fmt: skip
def test_vllm_is_refused_before_anything_is_loaded(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        check_settings(online_config(tmp_path, tmp_path, **{"engine": "vllm", **changes}))


def test_settings_of_vllm_are_unread_without_it(tmp_path):
    given = {"vllm_python": "python", "vllm": {"enforce_eager": True}}
    assert unread(online_config(tmp_path, tmp_path, **given)) == ["vllm", "vllm_python"]
    assert unread(online_config(tmp_path, tmp_path, engine="vllm", **given)) == []

"""What a run with several models lacks is found before the weights of any of them are read."""

import shutil
import socket

import pytest
import torch
from safetensors.torch import save_file
from test_engine_scores import mllama_engine

from prefalign import bundled, config
from prefalign.checkpoints import SCENES_BASE, ModelError
from prefalign.engines.config import EngineConfig
from prefalign.engines.loading import check_engine
from prefalign.engines.server import ServerError
from prefalign.models import ModelConfig
from prefalign.online.annotating import read_annotator
from prefalign.rewards import read_rewards
from prefalign.scenes.export import export
from tests.stand_in_server import StandInServer, model_section

STAGES = {
    "quality_pairs": lambda judge: {"rewards": [{"name": "judge", "model": judge}]},
    "rlaif_v": lambda judge: {"labeller": judge},
    "knowada": lambda judge: {"annotator": "engine", "llm": judge},
    "mpa": lambda judge: {"annotator": "engine", "large": judge},
    "re_align": lambda judge: {"masking": {"masker": "engine"}, "masker": judge},
    "curate_instructions": lambda judge: {
        "stages": [
            {"name": "picture", "score": "information_gain", "keep": 0.5},
            {"name": "answer", "keep": 0.5, "rewards": [{"name": "judge", "model": judge}]},
        ]
    },
}
"""By stage, where another model than the policy stands."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checks") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=2)
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A model whose weights fail when they are read, and not before."""
    folder = tmp_path_factory.mktemp("checks") / "policy"
    shutil.copytree(SCENES_BASE, folder)
    save_file({"alone": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def dead():
    """The section of a judge on a port where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    return {"model_name_or_path": "judge", "engine": "openai", "server": {"base_url": address, "max_retries": 0}}


def run(name, policy, rows, tmp_path, judge):
    stage = bundled.load_stage(name)
    changes = {
        "model": {"model_name_or_path": str(policy)},
        "data": {"path": rows},
        "output": {"path": tmp_path / "out"},
    }
    known = config.read_yaml(bundled.find(f"datagen/{name}_scenes"))
    replaced = STAGES[name](judge)
    values = config.merge({key: value for key, value in known.items() if key != "labeller"}, {**changes, **replaced})
    stage.main(config.build(stage.Config, values))


@pytest.mark.parametrize("name", STAGES)
def test_a_server_that_is_down_is_found_before_weights_are_read(name, policy, rows, tmp_path, dead):
    with pytest.raises(ServerError, match=r"no server answers at http://127.0.0.1:.* Start it"):
        run(name, policy, rows, tmp_path, dead)


@pytest.mark.parametrize("name", STAGES)
def test_a_folder_that_is_missing_is_found_before_weights_are_read(name, policy, rows, tmp_path):
    with pytest.raises(ModelError, match=r"there is no folder '/nowhere/judge'. Check the path"):
        run(name, policy, rows, tmp_path, {"model_name_or_path": "/nowhere/judge"})


@pytest.mark.parametrize("name", STAGES)
def test_weights_are_read_once_the_other_model_is_there(name, policy, rows, tmp_path):
    with StandInServer() as server, pytest.raises(ModelError, match=r"the weights of .* lack \d+ tensor"):
        run(name, policy, rows, tmp_path, model_section(server))
    assert server.listed
    assert not server.asked


def test_a_server_without_the_model_or_with_another_key_is_found_too(policy, rows, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with StandInServer() as server:
        other = {**model_section(server), "model_name_or_path": "gpt"}
        with pytest.raises(ServerError, match="has no model 'gpt'; it serves other, tiny-vlm"):
            run("rlaif_v", policy, rows, tmp_path, other)
    with StandInServer(key="secret") as server, pytest.raises(ServerError, match="OPENAI_API_KEY is not set"):
        run("rlaif_v", policy, rows, tmp_path, model_section(server))


def test_a_judge_that_is_not_asked_may_be_down(policy, rows, tmp_path, dead):
    stage = bundled.load_stage("mpa")
    values = config.read_yaml(bundled.find("datagen/mpa_scenes"))
    values |= {
        "model": {"model_name_or_path": str(policy)},
        "data": {"path": rows},
        "output": {"path": tmp_path / "out"},
    }
    with pytest.raises(ModelError, match="the weights of"):
        stage.main(config.build(stage.Config, {**values, "large": dead}))


class TestRewards:
    @pytest.mark.parametrize(
        "entry",
        [
            lambda judge: {"name": "judge", "model": judge},
            lambda judge: {"name": "claims", "labeller": {"model_name_or_path": "scenes"}, "splitter": judge},
            lambda judge: {"name": "statements", "model": judge},
        ],
    )
    def test_each_looks_for_its_server(self, entry, dead):
        rewards = read_rewards([{"name": "length"}, entry(dead)])
        with pytest.raises(ServerError, match="no server answers"):
            rewards.check()
        with StandInServer() as server:
            read_rewards([entry(model_section(server))]).check()

    def test_what_is_not_used_is_not_looked_for(self, dead):
        scenes = {"model_name_or_path": "scenes"}
        read_rewards(
            [
                {"name": "claims", "labeller": scenes, "splitter": dead, "divide": {"by": "rules"}},
                {"name": "statements", "model": dead, "annotator": "rules"},
            ]
        ).check()

    def test_a_server_that_gives_no_log_probs_is_refused_without_being_asked(self, dead):
        entry = {"name": "implicit", "model": {"model_name_or_path": "scenes"}, "reference": dead}
        with pytest.raises(ValueError, match=r"reward 'implicit' needs logprobs .* which OpenAIEngine cannot do"):
            read_rewards([entry]).check()

    def test_a_reward_model_that_is_none(self, tmp_path):
        with pytest.raises(ValueError, match="is no reward model"):
            read_rewards([{"name": "reward_model", "path": str(tmp_path)}]).check()

    def test_annotators_of_online_runs_look_for_theirs(self, dead):
        judge = {"name": "judge", "model": dead}
        for annotator, rewards in ((judge, []), ({"name": "rewards", "rewards": [judge]}, []), (None, [judge])):
            with pytest.raises(ServerError, match="no server answers"):
                read_annotator(annotator, rewards, 0.0)


def test_a_model_that_lacks_a_capability_is_refused_without_its_weights(policy, tmp_path):
    """Mllama's pictures are not among its tokens; its weights here are none that could be loaded."""
    folder = tmp_path / "mllama"
    shutil.copytree(policy, folder)
    mllama_engine().config.save_pretrained(folder)
    check_engine(ModelConfig(str(folder)), needs=["sample", "logprobs"])
    with pytest.raises(ValueError, match=r"mia_dpo needs attention .*TransformersEngine cannot do with this model"):
        check_engine(ModelConfig(str(folder)), needs=["attention"], stage="mia_dpo")


def test_a_model_without_a_processor_or_with_a_torn_file_is_found_without_loading(policy, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(policy, folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="model.safetensors in .* is damaged"):
        check_engine(ModelConfig(str(folder)))
    shutil.copy(policy / "model.safetensors", folder)
    check_engine(ModelConfig(str(folder)))
    for file in folder.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has no processor \(missing: processor_config.json or"):
        check_engine(ModelConfig(str(folder)))


def test_a_server_is_only_asked_for_its_models():
    with StandInServer() as server:
        check_engine(config.build(EngineConfig, model_section(server)), needs=["sample"])
        assert (server.listed, len(server.asked)) == (1, 0)
        with pytest.raises(ValueError, match=r"mia_dpo needs attention .* which OpenAIEngine cannot do with any model"):
            check_engine(config.build(EngineConfig, model_section(server)), needs=["attention"], stage="mia_dpo")
        assert server.listed == 1

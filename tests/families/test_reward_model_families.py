"""Reward models of the families that need torchvision: sharing a prompt changes no score, and pictures count."""

from dataclasses import replace

import pytest
import torch

from prefalign.images import encode_png
from prefalign.records import assistant_message
from prefalign.rewards.vlm import RewardModel
from tests.reward_runs import assert_close, loss_and_gradients, make_reward_model, make_reward_pair
from tests.tiny_vlms import WITH_VIDEO, picture, save_tiny

pytestmark = pytest.mark.families


@pytest.fixture(scope="module", params=WITH_VIDEO)
def checkpoint(request, tmp_path_factory):
    return save_tiny(request.param, tmp_path_factory.mktemp("tiny") / request.param)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_shared_is_plain(checkpoint, lora):
    shared, alone = (make_reward_model(checkpoint, lora=lora, fast_path=path) for path in ("auto", "off"))
    assert (shared.route.layout, alone.route.layout) == ("split", "plain")
    pairs = [make_reward_pair(2), make_reward_pair(3, images=2), make_reward_pair(4)]
    pairs.append(replace(pairs[0], id="again", chosen=[assistant_message("a large red circle")]))
    pairs.append(make_reward_pair(5, rejected_images=[encode_png(picture(99, (56, 40)))]))
    rows = [pair.to_row() for pair in pairs]
    found = [loss_and_gradients(one, rows, rejected_pictures=True) for one in (shared, alone)]
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
    assert found[0][0].std() > 1e-2
    assert_close(found[0][1], found[1][1], 5e-5)


def test_saved_and_loaded_it_looks_at_its_pictures(checkpoint, tmp_path):
    rows = [make_reward_pair(number).to_row() for number in range(4)]
    made = make_reward_model(checkpoint, lora=True)
    made.calibrate(rows)
    made.save(tmp_path)
    model = RewardModel.load(tmp_path, device="cpu")
    before = model.score(rows)
    assert torch.allclose(before, made.score(rows), atol=1e-4)
    rows[0]["images"], rows[1]["images"] = rows[1]["images"], rows[0]["images"]
    assert ((model.score(rows) - before).abs() > 1e-3).squeeze().tolist() == [True, True, False, False]

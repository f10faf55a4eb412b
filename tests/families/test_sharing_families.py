"""Shared prefills on the families with a video processor: the same answers as when every prompt runs by itself."""

import pytest
import torch
from tiny_vlms import WITH_VIDEO, picture, save_tiny

from prefalign.engines import ImageMask, Request, Sampling
from prefalign.engines.transformers import TransformersEngine
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.records import user_message

pytestmark = pytest.mark.families

STARTS = ("", "There is a", "There is a large red circle at the", "There is a large red circle at the top left. A")


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_the_same_answers(family, tmp_path):
    config = ModelConfig(str(save_tiny(family, tmp_path / family)), device="cpu", dtype="float32")
    model, processor = load_model(config), load_processor(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and "embed" not in name:
                weight.mul_(3)
    requests = [
        Request(f"{number}/{part}", [user_message("Describe the picture.", 1)], [shown], prefix=start, seed=1,
                image_mask=ImageMask(0.5, number) if number else None)
        for number, shown in enumerate([picture(0, size=(64, 96)), picture(1, size=(96, 64))])
        for part, start in enumerate(STARTS)
    ]  # fmt: skip
    fast, slow = (TransformersEngine(model, processor, share_prompts=share) for share in (True, False))
    assert fast.shares
    for temperature in (0.0, 1.0):
        sampling = Sampling(max_new_tokens=12, temperature=temperature)
        assert fast.generate(requests, sampling) == [slow.generate([one], sampling)[0] for one in requests]

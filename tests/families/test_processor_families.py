"""Options of the processor for families that take pictures of any size."""

import pytest
from tiny_vlms import WITH_VIDEO, picture, save_tiny

from prefalign.engines import Request
from prefalign.engines.transformers import load_engine
from prefalign.models import ModelConfig, load_processor
from prefalign.processors import processor_fingerprint
from prefalign.records import user_message

pytestmark = pytest.mark.families


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_pixel_budget_decides_what_the_model_sees(family, tmp_path):
    folder = save_tiny(family, tmp_path / family)
    shown, values = picture(0).resize((300, 200)), []
    for least, most in ((28 * 28, 64 * 64), (112 * 112, 224 * 224)):
        config = ModelConfig(str(folder), device="cpu", processor={"min_pixels": least, "max_pixels": most})
        processor = load_processor(config)
        _, height, width = processor.image_processor([shown], return_tensors="pt")["image_grid_thw"][0].tolist()
        side = processor.image_processor.patch_size
        assert least <= height * width * side**2 <= most
        engine = load_engine(config)
        values.append(
            engine.logprobs([Request("row", [user_message("What?", 1)], [shown])], ["A cat."])[0].sum().item()
        )
    assert values[0] != values[1]


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_a_processor_that_was_saved_again_has_the_same_fingerprint(family, tmp_path):
    folder = save_tiny(family, tmp_path / family)
    first = load_processor(ModelConfig(str(folder)))
    first.save_pretrained(folder)
    assert processor_fingerprint(load_processor(ModelConfig(str(folder)))) == processor_fingerprint(first)


def test_a_pixel_budget_counts_and_is_the_same_once_saved(tmp_path):
    folder = save_tiny("qwen2_vl", tmp_path / "model")
    plain = load_processor(ModelConfig(str(folder)))
    small = load_processor(ModelConfig(str(folder), processor={"min_pixels": 28 * 28, "max_pixels": 64 * 64}))
    assert processor_fingerprint(small) != processor_fingerprint(plain)
    small.save_pretrained(folder)
    assert processor_fingerprint(load_processor(ModelConfig(str(folder)))) == processor_fingerprint(small)

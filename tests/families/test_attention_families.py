"""Attention and geometry of the families whose processor needs torchvision."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import GREEDY, some_requests
from local_features import changed_tokens, without_vision_attention
from published_attention import check_against_published
from tiny_vlms import BUILDERS, WITH_VIDEO, picture, save_tiny

from prefalign import families
from prefalign.engines import Request
from prefalign.engines.transformers import TransformersEngine, load_engine
from prefalign.grounding import Grounding
from prefalign.models import ModelConfig
from prefalign.records import user_message

pytestmark = pytest.mark.families


@pytest.fixture(scope="module", params=WITH_VIDEO)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder: Path = save_tiny(request.param, tmp_path_factory.mktemp("attention_families") / request.param)
    return load_engine(ModelConfig(str(folder), device="cpu"), batch_size=8)


def test_it_equals_the_published_way_of_taking_it(engine: TransformersEngine) -> None:
    requests = some_requests(4)
    completions = engine.generate(requests, GREEDY)
    found = {layer: engine.attention(requests, completions, layer=layer) for layer in range(2)}
    check_against_published(engine, requests, completions, found)


def test_watching_an_answer_equals_measuring_it(engine: TransformersEngine) -> None:
    requests = some_requests(4)
    for layer in range(2):
        completions = engine.generate(requests, replace(GREEDY, attention_layer=layer))
        for mine, other in zip(completions, engine.attention(requests, completions, layer=layer), strict=True):
            assert len(mine.token_ids) >= 5
            torch.testing.assert_close(mine.attention.weights, other.weights, atol=1e-6, rtol=0)
            assert torch.equal(mine.attention.image, other.image)


def test_a_ragged_batch_equals_one_by_one(engine: TransformersEngine) -> None:
    requests = some_requests(4)
    answers = ["A red dog.", "Yes", "There is a large red circle at the top left. No.", "It is 3.5."]
    for request, answer, found in zip(requests, answers, engine.attention(requests, answers), strict=True):
        (alone,) = engine.attention([request], [answer])
        torch.testing.assert_close(alone.weights, found.weights, atol=1e-6, rtol=0)


def test_each_token_belongs_to_its_picture(engine: TransformersEngine) -> None:
    images = [picture(1, (60, 40)), picture(2, (28, 56))]
    (found,) = engine.attention([Request("a", [user_message("Which?", 2)], images)], ["A red dog."])
    for number, image in enumerate(images):
        doubled = Request("b", [user_message("Which?", 2)], [image, image])
        (alone,) = engine.attention([doubled], ["A red dog."])
        assert (found.image == number).sum() * 2 == len(alone.image)


@pytest.mark.parametrize("size", [(96, 40), (40, 96), (64, 64), (200, 100)])
def test_a_spot_at_a_tokens_centre_moves_that_token(engine: TransformersEngine, size: tuple[int, int]) -> None:
    processor, model_class, config = BUILDERS[families.family(engine.config)]()
    torch.manual_seed(0)
    model = without_vision_attention(model_class(config))
    centres = Grounding(model, processor).centres(size)
    moved = {
        number: changed_tokens(model, processor, size, tuple(centre))
        for number, centre in enumerate(centres)
        if not np.isnan(centre).any()
    }
    assert len(moved) >= 2
    assert all(found[number] for number, found in moved.items())
    assert np.mean([found.mean() for found in moved.values()]) < 0.55

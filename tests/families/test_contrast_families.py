"""M3ID decoding on the families that need torchvision: equal to the slow loop, with rotary positions of its own."""

import pytest
from engine_cases import some_requests
from test_contrast import GREEDY, generate, tokens
from tiny_vlms import WITH_VIDEO, save_tiny

from prefalign.engines import Contrast
from prefalign.engines.transformers import TransformersEngine, load_engine
from prefalign.models import ModelConfig
from tests.contrast_reference import greedy

pytestmark = pytest.mark.families

SETTINGS = Contrast(decay=0.1, gate=0.9, offset=5, max_weight=None)


@pytest.fixture(scope="module", params=WITH_VIDEO)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    folder = save_tiny(request.param, tmp_path_factory.mktemp("contrast") / request.param)
    return load_engine(ModelConfig(str(folder), device="cpu"), batch_size=8)


@pytest.mark.parametrize("way", ["removed", "hidden"])
def test_tokens_are_those_of_the_slow_loop(engine: TransformersEngine, way: str) -> None:
    requests = some_requests(4)
    requests[1].prefix = "There is a red"
    settings = Contrast(**{**vars(SETTINGS), "without": way})
    found = generate(engine, requests, settings)
    assert {completion.contrast.without for completion in found if completion.contrast} == {way}
    for request, completion in zip(requests, found, strict=True):
        expected, _ = greedy(engine, request, settings, GREEDY.max_new_tokens, way=way)
        assert completion.token_ids == expected
    assert tokens(found) != tokens(engine.generate(requests, GREEDY))

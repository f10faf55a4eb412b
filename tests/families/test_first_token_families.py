"""Probabilities of an answer's first word in families whose processors need torchvision."""

import pytest
from engine_cases import some_requests
from tiny_vlms import WITH_VIDEO, picture, save_tiny

from prefalign.engines import Request
from prefalign.engines.transformers import load_engine
from prefalign.models import ModelConfig

pytestmark = pytest.mark.families
WORDS = ("Yes", "No", "There", "A")


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_first_words_agree_with_log_probs_in_any_batch_and_look_at_the_picture(family, tmp_path):
    engine = load_engine(ModelConfig(str(save_tiny(family, tmp_path / family)), device="cpu"), batch_size=4)
    requests = some_requests(4)
    found = engine.first_token(requests, WORDS)
    for word in WORDS:
        scored = engine.logprobs(requests, [word] * 4)
        assert [row.probs[word] for row in found] == pytest.approx([float(one[0].exp()) for one in scored], rel=1e-3)
    for request, row in zip(requests, found, strict=True):
        assert engine.first_token([request], WORDS)[0].probs == pytest.approx(row.probs, rel=1e-3)
    swapped = Request("s", requests[0].messages, [picture(77, (40, 48))])
    (other,) = engine.first_token([swapped], WORDS)
    assert max(abs(other.probs[word] / found[0].probs[word] - 1) for word in WORDS) > 1e-4

"""Rows with and without pictures in several processes, for the families that need torchvision."""

import pytest

from tests.tiny_vlms import WITH_VIDEO, save_tiny
from tests.weight_order import assert_one_order

pytestmark = pytest.mark.families


@pytest.mark.parametrize("fast_path", ["auto", "off"])
@pytest.mark.parametrize("family", WITH_VIDEO)
def test_a_batch_without_pictures_uses_the_weights_in_the_order_of_one_with(family, fast_path, tmp_path):
    assert_one_order(save_tiny(family, tmp_path / family), tmp_path, fast_path)

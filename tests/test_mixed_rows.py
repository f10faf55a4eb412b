"""Rows with and without pictures in several processes; `test_distributed.py` runs them under ZeRO."""

import pytest

from tests.tiny_vlms import PLAIN, save_tiny
from tests.weight_order import assert_one_order


@pytest.mark.parametrize("fast_path", ["auto", "off"])
@pytest.mark.parametrize("family", [name for name in PLAIN if name != "paligemma"])  # which prepares no text alone
def test_a_batch_without_pictures_uses_the_weights_in_the_order_of_one_with(family, fast_path, tmp_path):
    assert_one_order(save_tiny(family, tmp_path / family), tmp_path, fast_path)

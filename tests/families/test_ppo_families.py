"""PPO's passes on the families that need torchvision: the check of `test_ppo_families.py`."""

import pytest

from tests.test_ppo_all_families import check_family, folders  # noqa: F401
from tests.tiny_vlms import WITH_VIDEO

pytestmark = pytest.mark.families


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_minibatches_of_pictures_of_other_sizes(family, folders, tmp_path):  # noqa: F811
    check_family(folders(family), tmp_path)

"""Engine against trainer, ours and TRL's, token by token, in the families that need torchvision."""

import pytest

from tests import test_online_checks as plain_families
from tests import test_online_trl as through_trl
from tests.online_runs import write_prompts
from tests.tiny_vlms import WITH_VIDEO

pytestmark = pytest.mark.families


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_engine_and_trainer_agree_and_the_model_is_left_as_it_was(family, tmp_path):
    plain_families.test_engine_and_trainer_agree_and_the_model_is_left_as_it_was(family, tmp_path)


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_an_engine_that_is_shown_another_picture_is_found(family, tmp_path):
    plain_families.test_an_engine_that_is_shown_another_picture_is_found(plain_families.load_tiny(family, tmp_path))


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_trls_log_probs_are_those_of_our_engine(family, tmp_path):
    through_trl.test_trls_log_probs_are_those_of_our_engine(family, write_prompts(tmp_path / "prompts", 2), tmp_path)


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_the_trainer_is_tried_without_weights_and_refuses_no_family(family, tmp_path):
    plain_families.test_the_trainer_is_tried_without_weights_and_refuses_no_family(family, tmp_path)

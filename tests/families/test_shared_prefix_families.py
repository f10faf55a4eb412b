"""The shared path of the families that need torchvision: the matrix of `equality.py`, checks of `test_shared_prefix.py`."""

import pytest

from tests import test_shared_prefix as plain_families
from tests.equality import Bench, pairwise
from tests.tiny_vlms import WITH_VIDEO

pytestmark = pytest.mark.families


@pytest.fixture(scope="module")
def benches(tmp_path_factory) -> dict[str, Bench]:
    """A model and rows of each family."""
    return {family: Bench(family, tmp_path_factory.mktemp(family)) for family in WITH_VIDEO}


@pytest.mark.parametrize("cell", pairwise(WITH_VIDEO), ids=str)
def test_shared_is_plain_and_trl(cell, benches):
    for other, difference in benches[cell.family].differences(cell).items():
        assert difference.holds(), (other, difference)


@pytest.mark.parametrize("fast_path", ["auto", "off"])
@pytest.mark.parametrize("family", WITH_VIDEO)
def test_answers_and_pictures_change_nothing_but_their_own(family, fast_path, benches):
    plain_families.test_an_answer_is_independent_of_the_others(family, fast_path, benches)
    plain_families.test_a_picture_changes_its_own_row_alone(family, fast_path, benches)


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_rows_of_a_pack_are_independent_and_may_stand_in_any_order(family, benches):
    plain_families.test_rows_of_a_pack_are_independent_and_may_stand_in_any_order(family, benches)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_six_pairs_of_four_ranked_answers_are_one_document(family, benches):
    plain_families.test_six_pairs_of_four_ranked_answers_are_one_document(family, "lora", benches)


@pytest.mark.parametrize("training", ["frozen", "tower", "lora"])
@pytest.mark.parametrize("family", WITH_VIDEO)
def test_a_picture_passes_the_tower_once(family, training, benches):
    plain_families.test_a_picture_passes_the_tower_once(family, training, benches)
    if training == "lora" or (training == "frozen" and not family.startswith("qwen")):
        plain_families.test_a_frozen_tower_runs_once_a_step_without_a_graph_in_train(family, training, benches)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_three_steps_of_train_end_at_the_same_weights(family, benches):
    plain_families.test_three_steps_of_train_end_at_the_same_weights(family, benches)

"""Which prompts a PPO run asks, in which order, and how picture features are cut."""

from types import SimpleNamespace

import pytest
import torch

from prefalign.models import ModelConfig, load_processor
from prefalign.online.prompt_rows import keep_fitting, load_prompts
from prefalign.online.sampler import RolloutBatches, visits
from prefalign.records import Example
from prefalign.store import OutputConfig, write_records
from prefalign.training.documents import decode
from prefalign.training.features import join_features, split_features
from tests.ppo_runs import write_prompts
from tests.training_runs import write_pairs


def test_prompts_and_pairs_are_asked(tmp_path):
    rows = load_prompts(write_prompts(tmp_path / "prompts", 4, images=2))
    assert set(rows.column_names) == {"id", "images", "messages", "answer", "facts"}
    assert rows[0]["answer"] == "a dog"
    assert [set(picture) for picture in rows[1]["images"]] == [{"bytes", "path"}] * 2  # encoded
    pairs = load_prompts(write_pairs(tmp_path / "pairs", 3))
    assert set(pairs.column_names) == set(rows.column_names)
    assert pairs[2]["messages"][-1]["role"] == "user"


def test_folders_that_ask_nothing(tmp_path):
    with pytest.raises(ValueError, match="holds no finished rows"):
        load_prompts(tmp_path)
    message = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
    rows = [Example(id="e", images=[], messages=[message, answer])]
    write_records("test", rows, output=OutputConfig(tmp_path / "examples"), record=Example, settings={}, seed=0)
    with pytest.raises(ValueError, match="have no question that is open"):
        load_prompts(tmp_path / "examples")
    write_records("test", [], output=OutputConfig(tmp_path / "none"), record=Example, settings={}, seed=0)
    with pytest.raises(ValueError, match="holds 0 rows"):
        load_prompts(tmp_path / "none")


def test_prompts_that_leave_no_room_are_dropped_whole_and_counted(tiny_llava, tmp_path):
    processor = load_processor(ModelConfig(str(tiny_llava), device="cpu"))
    rows = load_prompts(write_prompts(tmp_path / "prompts", 6))
    everything, fit = keep_fitting(rows, processor, None, 10)
    assert len(everything) == fit.rows_used == 6
    assert fit.summary() == ""
    longest = max(int(value) for value in measured(rows, processor))
    kept, fit = keep_fitting(rows, processor, longest + 9, 10)
    assert fit.rows_in == 6 == fit.rows_used + len(fit.too_long)
    assert set(fit.too_long) == {"prompt-2", "prompt-5"}
    assert set(fit.too_long.values()) == {longest}
    assert [row["id"] for row in kept] == ["prompt-0", "prompt-1", "prompt-3", "prompt-4"]
    assert f"prompt-2 with {longest} tokens" in fit.summary()
    assert fit.counts() == {"rows_in": 6, "rows_used": 4, "rows_prompt_too_long": 2}
    with pytest.raises(ValueError, match="none of the 6 prompts leaves room for 10 new tokens in max_length 12"):
        keep_fitting(rows, processor, 12, 10)


def measured(rows, processor):
    """Tokens of each prompt with its picture."""
    for row in rows:
        texts = [block.get("text") for block in row["messages"][0]["content"] if block["type"] == "text"]
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": texts[0]}]}],
            add_generation_prompt=True,
        )
        images = [[decode(picture) for picture in row["images"]]]
        yield processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt").input_ids.shape[1]


def test_processes_ask_different_rows_and_a_rollout_is_visited_again_and_again():
    each = [RolloutBatches(11, prompts=2, visits=3, seed=5, process=number, processes=2) for number in range(2)]
    first, second = (list(one) for one in each)
    assert [len(one) for one in each] == [6, 6] == [len(first), len(second)]
    assert first[0] == first[1] == first[2] != first[3]
    asked = [*first[0], *second[0], *first[3], *second[3]]
    assert len(set(asked)) == 8
    before = [list(one) for one in each]
    each[0].set_epoch(1)
    assert list(each[0]) != before[0]
    each[0].set_epoch(0)
    assert list(each[0]) == before[0]
    assert each[0].batch_sampler is each[0]


def test_visits_take_all_answers_in_each_pass():
    planned = visits(12, passes=2, size=4, together=2, seed=1)
    assert [len(numbers) for numbers in planned] == [4] * 6
    for part in (planned[:3], planned[3:]):
        assert sorted(number for numbers in part for number in numbers) == list(range(12))
    assert planned[:3] != planned[3:]
    assert planned == visits(12, passes=2, size=4, together=2, seed=1)
    assert planned != visits(12, passes=2, size=4, together=2, seed=2)


@pytest.mark.parametrize("one", [True, False], ids=["tensor", "list"])
def test_features_are_cut_and_joined_in_any_order(one):
    def output(pooler_output, deepstack_features=None):
        return SimpleNamespace(pooler_output=pooler_output, deepstack_features=deepstack_features)

    flat, deep = torch.arange(12.0).view(6, 2), [torch.arange(6.0).view(6, 1)]
    features = output(flat if one else [flat[:4], flat[4:]], deep)
    parts = split_features(features, [1, 0, 3, 2])
    assert parts[1] == {}
    for part in parts:
        if part:
            part["kind"] = output
    joined = join_features([parts[3], parts[1], parts[0]])
    pooled = joined.pooler_output if one else joined.pooler_output[0]
    assert pooled.tolist() == flat[[4, 5, 0]].tolist()
    assert joined.deepstack_features[0][0].flatten().tolist() == [4.0, 5.0, 0.0]
    assert join_features([parts[1]]) is None
    with pytest.raises(ValueError, match="6 features for 7 image tokens"):
        split_features(features, [1, 6])

"""The folder of a reward model: what is loaded scores as what was saved, or says why not; one base carries two adapters."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from prefalign.models import ModelConfig, fingerprint, load_model, load_processor
from prefalign.records import message_text
from prefalign.rewards import read_rewards
from prefalign.rewards.artefact import RewardModelError
from prefalign.rewards.reward import Response
from prefalign.rewards.vlm import BaseModel, RewardModel
from prefalign.training.lora import LoraSettings
from tests.reward_runs import RATING, make_reward_model, make_reward_pair
from tests.tiny_vlms import save_tiny

ROWS = [make_reward_pair(number).to_row() for number in range(6)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny LLaVA, and reward models of it: all weights, and an adapter."""
    top = tmp_path_factory.mktemp("models")
    base = save_tiny("llava", top / "base")
    for name, lora in (("full", False), ("adapter", True)):
        model = make_reward_model(base, lora=lora, attributes=["correctness", "coherence"])
        with torch.no_grad():
            model.head.bias += 0.5
        model.calibrate(ROWS)
        model.save(top / name)
    return top


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of one of them, to be damaged."""

    def copy(name):
        return shutil.copytree(folders / name, tmp_path / name)

    return copy


def changed(file, name, change):
    tensors = load_file(file)
    key = next(key for key in tensors if name in key)
    tensors[key] = change(tensors[key])
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["full", "adapter"])
def test_what_is_loaded_scores_as_what_was_saved(name, folders):
    made = make_reward_model(folders / "base", lora=name == "adapter", attributes=["correctness", "coherence"])
    with torch.no_grad():
        made.head.bias += 0.5
    loaded = RewardModel.load(folders / name, device="cpu")
    for facts in (True, False):
        assert torch.allclose(loaded.score(ROWS, facts=facts), made.score(ROWS, facts=facts), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    assert loaded.attributes == ["correctness", "coherence"]
    assert loaded.rating == made.rating


def test_the_folder_holds_head_prompt_processor_base_scale_and_golden_rows(folders):
    files = {file.name for file in (folders / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "reward_head.safetensors", "reward_model.json", "golden.parquet",
            "processor_config.json", "tokenizer.json", "chat_template.jinja"} <= files  # fmt: skip
    assert "model.safetensors" in {file.name for file in (folders / "full").iterdir()}
    note = json.loads((folders / "adapter" / "reward_model.json").read_text())
    scores = make_reward_model(folders / "base", lora=True, attributes=["correctness", "coherence"]).score(ROWS) + 0.5
    assert note["scale"]["with_facts"]["mean"] == pytest.approx(scores.mean(dim=0).tolist(), abs=1e-5)
    assert note["scale"]["with_facts"]["deviation"] == pytest.approx(scores.std(dim=0).tolist(), abs=1e-5)
    assert note["scale"]["with_facts"] != note["scale"]["without_facts"]
    assert note["base"]["name"] == str(folders / "base")
    golden = pq.read_table(folders / "adapter" / "golden.parquet").to_pylist()
    assert [row["id"] for row in golden] == ["pair-0", "pair-1", "pair-2", "pair-3"]
    assert golden[3]["images"] == ROWS[3]["images"]
    assert torch.allclose(torch.tensor([row["scores"] for row in golden]), scores[:4], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "file", "part", "change"),
    [
        ("adapter", "reward_head.safetensors", "weight", lambda weight: -weight),
        ("adapter", "reward_head.safetensors", "bias", lambda bias: bias + 1.0),
        ("adapter", "adapter_model.safetensors", "lora_B", torch.zeros_like),
        ("full", "model.safetensors", "layers.0.mlp.up_proj", lambda weight: weight * 1.5),
        ("full", "model.safetensors", "multi_modal_projector.linear_1.weight", torch.zeros_like),
    ],
)
def test_weights_that_changed_are_found(name, file, part, change, copied):
    folder = copied(name)
    changed(folder / file, part, change)
    message = (
        r"does not give the scores that it gave .* golden row pair-\d.* deviations off where 0.02 are allowed.*copy the"
    )
    with pytest.raises(RewardModelError, match=message):
        RewardModel.load(folder, device="cpu")


def test_another_prompt_or_processor_is_found(copied):
    folder = copied("full")
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["image_mean"] = [0.0, 0.0, 0.0]
    (folder / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(RewardModelError, match="does not give the scores"):
        RewardModel.load(folder, device="cpu")
    folder = copied("adapter")
    note = json.loads((folder / "reward_model.json").read_text())
    note["prompt"]["lead"] = "A dog:"
    (folder / "reward_model.json").write_text(json.dumps(note))
    with pytest.raises(RewardModelError, match=r"golden row pair-[123] had"):  # row 0 has no facts
        RewardModel.load(folder, device="cpu")


def test_scores_that_are_no_numbers_are_found(copied):
    folder = copied("adapter")
    changed(folder / "reward_head.safetensors", "bias", lambda bias: bias * float("nan"))
    with pytest.raises(RewardModelError, match="and has nan"):
        RewardModel.load(folder, device="cpu")


def test_a_base_with_other_weights_is_refused(folders, copied, tmp_path, tiny_idefics3):
    folder = copied("adapter")
    other = save_tiny("llava", tmp_path / "other", seed=1)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(other)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    message = r"trained on '.*base' with other weights than .*other has \(fingerprint \w+, here \w+\).*Use the weights"
    with pytest.raises(RewardModelError, match=message):
        RewardModel.load(folder, device="cpu")
    for checkpoint in (other, tiny_idefics3):
        with pytest.raises(RewardModelError, match="other weights than the model that is to carry it has"):
            RewardModel.load(folders / "adapter", onto=policy_on(checkpoint))


def policy_on(checkpoint, dropout=0.5):
    """A policy with an adapter that does something, in training."""
    model = load_model(ModelConfig(str(checkpoint), device="cpu", dtype="float32"))
    policy = get_peft_model(model, LoraSettings(r=2, alpha=4, dropout=dropout).to_peft(), adapter_name="policy")
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy.train()


def state_of(policy):
    flags = {name: parameter.requires_grad for name, parameter in policy.named_parameters() if ".reward." not in name}
    return flags, [module.training for module in policy.modules()], policy.active_adapter


def test_one_base_carries_policy_and_reward(folders):
    policy = policy_on(folders / "base")
    batch = make_reward_model(folders / "base").collator(layout="plain")(ROWS)["plain"]

    def logits():
        policy.eval()
        found = policy(**batch).logits.detach()
        policy.train()
        return found

    before, flags = logits(), state_of(policy)[0]
    reward = RewardModel.load(folders / "adapter", onto=policy)
    attached = state_of(policy)
    assert attached[0] == flags
    assert all(attached[1][:5])
    assert policy.active_adapter == "policy"
    assert not any(parameter.requires_grad for name, parameter in policy.named_parameters() if ".reward." in name)
    alone = RewardModel.load(folders / "adapter", device="cpu").score(ROWS)
    assert torch.allclose(reward.score(ROWS), alone, atol=1e-5)
    assert state_of(policy) == attached
    assert torch.equal(logits(), before)
    with policy.disable_adapter():
        assert torch.allclose(reward.score(ROWS), alone, atol=1e-5)
        assert (logits() - before).abs().max() > 1e-3  # still off
    assert state_of(policy)[0] == flags
    assert torch.equal(logits(), before)
    policy(**batch).logits.sum().backward()
    with_gradient = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all(".policy." in name for name in with_gradient)


def test_an_error_while_scoring_leaves_the_policy_as_it_was(folders):
    policy = policy_on(folders / "base")
    reward = RewardModel.load(folders / "adapter", onto=policy)
    before = state_of(policy)
    with pytest.raises(ValueError, match="placeholder"):
        reward.score([{**ROWS[0], "images": []}])
    with pytest.raises(TypeError):
        reward(packed={"tokens": None}, places=torch.zeros(1, dtype=torch.long))
    assert state_of(policy) == before


def test_what_cannot_be_carried_is_refused(folders):
    policy = policy_on(folders / "base")
    with pytest.raises(RewardModelError, match="all weights were trained: it has no adapter .* train it with `lora`"):
        RewardModel.load(folders / "full", onto=policy)
    with pytest.raises(RewardModelError, match="has an adapter called 'policy' already.*another `adapter_name`"):
        RewardModel.load(folders / "adapter", onto=policy, adapter_name="policy")
    reward = RewardModel.load(folders / "adapter", onto=policy)
    with pytest.raises(RewardModelError, match="is the adapter 'reward' on a model that others use"):
        reward.save(folders / "again")


def test_what_is_no_finished_reward_model_is_refused(folders, copied, tmp_path):
    with pytest.raises(RewardModelError, match="is no reward model .no reward_model.json.*train_reward_model"):
        RewardModel.load(folders / "base")
    made = make_reward_model(folders / "base")
    made.save(tmp_path / "checkpoint")
    with pytest.raises(RewardModelError, match="is a checkpoint of a run that has not ended.*load_best_model_at_end"):
        RewardModel.load(tmp_path / "checkpoint")
    folder = copied("full")
    note = json.loads((folder / "reward_model.json").read_text())
    (folder / "reward_model.json").write_text(json.dumps({**note, "schema": 2}))
    with pytest.raises(RewardModelError, match="another version of prefalign .schema 2, here 1"):
        RewardModel.load(folder)
    made.base = None
    with pytest.raises(RewardModelError, match="built without `base`"):
        made.save(tmp_path / "none")


def test_a_model_that_tells_nothing_apart_has_no_scale(folders):
    model = make_reward_model(folders / "base")
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.raises(ValueError, match="all 6 reference answers have the same score.*cannot tell answers apart"):
        model.calibrate(ROWS)
    with pytest.raises(ValueError, match="1 reference answers: a deviation needs two"):
        model.calibrate(ROWS[:1])


def test_a_list_of_rewards_names_it_by_its_folder(folders):
    rewards = read_rewards(
        [{"name": "reward_model", "path": str(folders / "adapter"), "weight": {"correctness": 2.0}, "device": "cpu"}]
    )
    pairs = [make_reward_pair(number) for number in range(6)]
    answers = [
        Response(pair.id, pair.images, pair.prompt, message_text(pair.chosen), facts=pair.facts) for pair in pairs
    ]
    found = rewards.score(answers)
    assert list(found) == ["reward_model/correctness", "reward_model/coherence", "total"]
    assert torch.allclose(found["total"], 2 * found["reward_model/correctness"])
    # these are the reference answers themselves
    bare = read_rewards([{"name": "reward_model", "path": str(folders / "adapter"), "facts": False, "device": "cpu"}])
    coherence = bare.score(answers)["reward_model/coherence"]
    assert coherence.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert coherence.std().item() == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(ValueError, match="batch_size is 0; a forward pass scores at least 1 response"):
        read_rewards([{"name": "reward_model", "path": str(folders / "adapter"), "batch_size": 0}])


def test_a_base_in_4_bits_is_loaded_in_4_bits_again(folders, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(str(folders / "base"), device="cpu", dtype="float32", load_in_4bit=True)
    model = load_model(config)
    base = BaseModel(str(folders / "base"), None, fingerprint(model), "float32", load_in_4bit=True)
    adapted = get_peft_model(model, LoraSettings(r=2, alpha=4).to_peft())
    made = RewardModel(adapted, load_processor(config), base=base, rating=RATING)
    made.eval().calibrate(ROWS)
    made.save(tmp_path)
    loaded = RewardModel.load(tmp_path, device="cpu")
    assert loaded.model.get_base_model().is_loaded_in_4bit
    assert torch.allclose(loaded.score(ROWS), made.score(ROWS), atol=1e-4)

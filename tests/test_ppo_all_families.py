"""PPO's passes on every family: minibatches take their own pictures' patches along, whatever their sizes and order."""

import pytest
import torch

from prefalign.engines import Request
from prefalign.engines.transformers import TransformersEngine
from prefalign.training.documents import decode
from tests.ppo_runs import Brightness, begun, lively, make_ppo, passes, re_read, write_prompts
from tests.tiny_vlms import PLAIN, save_tiny

SIZES = ((40, 48), (96, 40), (64, 64))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of a family, saved once."""
    made = {}

    def checkpoint(family):
        if family not in made:
            made[family] = save_tiny(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return checkpoint


@pytest.mark.parametrize("family", PLAIN)
def test_minibatches_of_pictures_of_other_sizes(family, folders, tmp_path):
    check_family(folders(family), tmp_path)


def check_family(checkpoint, folder):
    images = 1 if "paligemma" in str(checkpoint) else 2
    prompts = write_prompts(folder / "prompts", 4, images=images, sizes=SIZES)
    settings = {"num_generations": 2, "per_device_train_batch_size": 4, "reward": Brightness(), "max_new_tokens": 4}
    trainer = begun(lively(make_ppo(checkpoint, prompts, folder / "run", **settings)))
    kept, whole = trainer.rollout, passes(trainer)
    assert len(kept.answers) == 8

    plain_engine = TransformersEngine(trainer.roles.policy, trainer.processing_class)
    requests = [Request(answer.response.id, answer.response.messages, [decode(image) for image in answer.response.images], seed=3)
                for answer in kept.answers]  # fmt: skip
    trainer.roles.activate("policy")
    for answer, alone in zip(kept.answers, plain_engine.generate(requests, trainer.sampling), strict=True):
        assert answer.response.text == alone.text
        assert answer.tokens.tolist()[: len(alone.token_ids)] == alone.token_ids

    for order in ([6, 7, 0, 1], [4, 5], [2, 3, 6, 7, 4, 5]):
        for role, name, values in (("policy", "log_probs", whole["logps"]), ("value", "values", whole["values"])):
            batch = trainer._prepared(order)
            with torch.no_grad():
                found = kept.spread(trainer.roles(role, batch)[name], batch, kept.mask.shape[1])
            assert torch.allclose(found[kept.mask[order]], values[order][kept.mask[order]], atol=1e-4), (role, order)
    batch = trainer._prepared([0, 1])
    trainer._policy_loss(trainer.roles, batch, [0, 1], first=True)
    assert "first_ratio" not in trainer.alarms.warned

    rows = [trainer.train_dataset[number] for number in range(4)]
    said = [answer.tokens for answer in kept.answers]
    scores = kept.scores["total"].clone()
    rows[0]["images"], rows[1]["images"] = rows[1]["images"], rows[0]["images"]
    re_read(trainer, rows, said)
    again = trainer.scorer.rewards.score([answer.response for answer in kept.answers])["total"]
    assert (again[:4] != scores[:4]).all()
    for name, values in passes(trainer).items():
        moved = (values - whole[name]).abs().masked_fill(~kept.mask, 0).amax(dim=1)
        assert (moved[:4] > 10 * moved[4:].max().clamp(min=1e-6)).all(), name

    plain = lively(make_ppo(checkpoint, prompts, folder / "plain", fast_path="off", **settings))
    begun(plain)
    assert [answer.tokens.tolist() for answer in plain.rollout.answers] == [tokens.tolist() for tokens in said]
    re_read(plain, [plain.train_dataset[number] for number in range(4)], said)
    for name, values in passes(plain).items():
        assert torch.allclose(values[kept.mask], whole[name][kept.mask], atol=2e-4), name

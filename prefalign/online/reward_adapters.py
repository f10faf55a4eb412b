"""A reward model on the policy's own base: one set of weights serves policy, value, reference and reward."""

from __future__ import annotations

from typing import Any

from accelerate.utils import is_peft_model

from prefalign.rewards import Combined
from prefalign.rewards.artefact import RewardModelError, read_note
from prefalign.rewards.learned import LearnedReward
from prefalign.rewards.vlm import RewardModel

ADAPTER = "reward"


def share_base(rewards: Combined, policy: Any) -> tuple[str | None, str]:
    """Load the first reward model of a list as an adapter of the policy, if it is one of the same base.

    Args:
        rewards: of the run; the entry then scores with that adapter.
        policy: a `PeftModel`.

    Returns:
        Name of the adapter, None if the reward model keeps weights of its own or there is none; and a remark for the log.
    """
    learned = [entry.reward for entry in rewards.entries if isinstance(entry.reward, LearnedReward)]
    if not learned or not is_peft_model(policy):
        return None, ""
    if read_note(learned[0].path)["weights"] == "full":
        return None, "; the reward model has weights of its own (all of them were trained)"
    try:
        learned[0].model = RewardModel.load(learned[0].path, onto=policy, adapter_name=ADAPTER)
    except RewardModelError as error:
        if "with other weights" not in str(error):
            raise
        return None, "; the reward model has weights of its own (it was trained on another base than the policy)"
    return ADAPTER, "; the reward model is an adapter of the policy's base"

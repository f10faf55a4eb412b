"""A reward model beside the policy: as an adapter of the same base, or as the weights that the values start from."""

from __future__ import annotations

from typing import Any, Literal

from accelerate.utils import is_peft_model

from prefalign import families
from prefalign.models import ModelConfig, load_model
from prefalign.rewards import Combined
from prefalign.rewards.artefact import OtherBaseError, read_note
from prefalign.rewards.learned import LearnedReward
from prefalign.rewards.vlm import RewardModel

ADAPTER = "reward"


def value_start(rewards: Combined, policy: Any) -> Any:
    """A copy of the weights of a list's first reward model, for the values to start from where all weights train.

    Args:
        rewards: of the run.
        policy: a full model.

    Returns:
        A model of the policy's architecture and size; None without such a reward model.
    """
    learned = [entry.reward for entry in rewards.entries if isinstance(entry.reward, LearnedReward)]
    if not learned or read_note(learned[0].path)["weights"] != "full":
        return None
    core = families.core(policy)
    dtype = str(core.dtype).removeprefix("torch.")
    model = load_model(ModelConfig(str(learned[0].path), device=str(core.device), dtype=dtype))
    shapes = [{name: parameter.shape for name, parameter in one.named_parameters()} for one in (model, core)]
    return model if type(model) is type(core) and shapes[0] == shapes[1] else None


def share_base(rewards: Combined, policy: Any, fast_path: Literal["auto", "off"] = "auto") -> tuple[str | None, str]:
    """Load the first reward model of a list as an adapter of the policy, if it is one of the same base.

    One of another base leaves the policy as it was.

    Args:
        rewards: of the run; the entry then scores with that adapter.
        policy: a `PeftModel`.
        fast_path: of the run.

    Returns:
        Name of the adapter, None if the reward model keeps weights of its own or there is none; and a remark for the log.
    """
    learned = [entry.reward for entry in rewards.entries if isinstance(entry.reward, LearnedReward)]
    if not learned or not is_peft_model(policy):
        return None, ""
    if read_note(learned[0].path)["weights"] == "full":
        return None, "; the reward model has weights of its own (all of them were trained)"
    try:
        learned[0].model = RewardModel.load(learned[0].path, onto=policy, adapter_name=ADAPTER, fast_path=fast_path)
    except OtherBaseError:
        return None, "; the reward model has weights of its own (it was trained on another base than the policy)"
    return ADAPTER, "; the reward model is an adapter of the policy's base"

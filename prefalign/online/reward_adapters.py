"""A reward model beside the policy: as an adapter of the same base, or as the weights that the values start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import is_peft_model

from prefalign import families
from prefalign.models import ModelConfig, load_model
from prefalign.rewards import Combined
from prefalign.rewards.artefact import OtherBaseError, read_note
from prefalign.rewards.learned import LearnedReward
from prefalign.rewards.vlm import RewardModel

if TYPE_CHECKING:
    from transformers import ProcessorMixin

ADAPTER = "reward"
OF_NO_PICTURE = frozenset(
    {"text_config", "architectures", "dtype", "transformers_version", "_name_or_path", "use_cache"}
)
"""Fields of a config that do not change what a picture becomes; types are compared tensor by tensor."""


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


def encodes_alike(reward: RewardModel, policy: Any, processor: ProcessorMixin) -> bool:
    """Whether a reward model would make of a picture, to the bit, the features that a policy makes of it.

    Args:
        reward: on the policy's base, or with weights of its own.
        policy: a full model or a `PeftModel`, as it is now.
        processor: the policy's.

    Returns:
        Pictures are prepared alike, the models read them alike (which layer of which tower), and every tensor of vision tower and
        projector is the same, adapters on them included.
    """
    if _preparation(reward.processor) != _preparation(processor):
        return False
    if _reading(families.core(reward.model).config) != _reading(families.core(policy).config):
        return False
    active = getattr(reward.model, "active_adapter", None)
    mine = _picture_side(reward.model, reward.adapter or active)
    theirs = _picture_side(policy, getattr(policy, "active_adapter", None))
    return mine.keys() == theirs.keys() and all(_same(tensor, theirs[name]) for name, tensor in mine.items())


def _preparation(processor: ProcessorMixin) -> tuple[str, dict[str, Any], dict[str, Any]]:
    pictures: Any = processor.image_processor
    settings = {
        name: value for name, value in processor.to_dict().items() if name not in ("tokenizer", "chat_template")
    }
    return type(pictures).__name__, pictures.to_dict(), settings


def _reading(config: Any) -> dict[str, Any]:
    """What a model's config says beside its language model: of the tower, and which of its states become features."""
    return {
        name: value for name, value in _without(config.to_dict(), OF_NO_PICTURE).items() if not name.startswith("_")
    }


def _without(values: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {
        name: _without(value, names) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in names
    }


def _picture_side(model: Any, adapter: str | None) -> dict[str, torch.Tensor]:
    """Tensors of tower and projector by the names that they have without PEFT's wrappers; of adapters, those of one."""
    found = {}
    for name, tensor in families.core(model).state_dict(keep_vars=True).items():
        others = ("lora_" in name or ".modules_to_save." in name) and f".{adapter}." not in name
        if families.tower(name) != "language_model" and not others:
            found[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor.detach()
    return found


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.data_ptr() == other.data_ptr() and one.shape == other.shape:
        return True
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)

"""Policy, value and reference of a PPO run in one module: adapters on one base, or models of their own.

| role | with an adapter | with all weights |
| --- | --- | --- |
| policy | the adapter of the given `PeftModel` | the given model |
| reference | no adapter; a frozen copy of the policy's where the run starts from one | a frozen copy |
| value | adapter `value` and a head in float32 | a copy that trains, and a head in float32 |

Parts that train in no role (a frozen tower) are there once. The reward is no part of this, see `prefalign.rewards`; a reward
model may be one more adapter of the same base, and is left as it was.

Legend of shapes: `B` answers, `A` tokens of the longest, `N` labels of all answers of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import is_peft_model
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from prefalign import families
from prefalign.config import ConfigError
from prefalign.online.copies import (
    copy_adapter,
    copy_of_what_trains,
    disable_dropout,
    is_of,
    like,
    moved,
)
from prefalign.training.checkpoints import restore_weights
from prefalign.training.forward import hidden_states, share, unshare
from prefalign.training.scoring import run

if TYPE_CHECKING:
    from peft import PeftConfig

VALUE, REFERENCE = "value", "reference"
"""Names of the adapters."""

ADAPTER_FILE, HEAD_FILE = "adapter_model.safetensors", "value_head.safetensors"

FIELDS = ("log_probs", "entropy")

Role = Literal["policy", "value", "reference"]


class Roles(nn.Module):
    """The models of a PPO run behind one `forward`, so that DDP and DeepSpeed wrap one module.

    Args:
        model: policy; a full model or a `PeftModel`.
        layout: how documents are run (`Route.layout`).
        temperature: that every log-prob is taken at.
        peft_config: wrap `model` in an adapter.
        reward_adapter: with an adapter, name of the reward model's on the same base; the value adapter starts as a copy of it.
        value_model: with all weights, what the value starts from (a reward model's weights), which becomes part of this; by
            default a copy of the policy.

    Raises:
        ConfigError: `reward_adapter` names no adapter of the policy's base, or `value_model` is of another architecture.
    """

    def __init__(
        self,
        model: Any,
        *,
        layout: str,
        temperature: float = 1.0,
        peft_config: PeftConfig | None = None,
        reward_adapter: str | None = None,
        value_model: Any = None,
    ):
        super().__init__()
        unshare(model)
        continues = is_peft_model(model)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        self.adapts = is_peft_model(model)
        self.policy = model
        self.reference: Any = None
        self.value: Any = None
        self.reference_adapter: str | None = None
        if self.adapts:
            self.adapter: str = model.active_adapter
            # the reward model's adapter is loaded onto a base whose own adapter was new, so it does not make that one old
            self._adapters(reward_adapter, keeps_start=continues and moved(model, self.adapter))
        else:
            self.reference = copy_of_what_trains(model).requires_grad_(False).eval()
            self.value = copy_of_what_trains(model) if value_model is None else like(value_model, model)
            self.value.requires_grad_(False)
            for (_, theirs), (_, mine) in zip(self.value.named_parameters(), model.named_parameters(), strict=True):
                theirs.requires_grad_(mine.requires_grad)
            self._drop_head(self.value)
        width = families.core(model).config.get_text_config().hidden_size
        self.value_head = nn.Linear(width, 1, dtype=torch.float32, device=families.core(model).device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        for role in self._models():
            disable_dropout(role)
            core = families.core(role)
            if role is not self.value:
                add_fused_lm_head(core, temperature=temperature, outputs=FIELDS)
            share(role, layout)
        self._flags = [(parameter, parameter.requires_grad) for parameter in self.parameters()]

    def _models(self) -> list[Any]:
        return [model for model in (self.policy, self.reference, self.value) if model is not None]

    def _adapters(self, reward_adapter: str | None, *, keeps_start: bool) -> None:
        policy = self.policy
        source = reward_adapter or self.adapter
        if source not in policy.peft_config:
            raise ConfigError(
                f"the value adapter is to start from the adapter {source!r}, and the policy's base has "
                f"{', '.join(policy.peft_config)}. Load the reward model onto the policy first, or start from the "
                "policy's adapter."
            )
        policy.add_adapter(VALUE, copy.deepcopy(policy.peft_config[source]))
        if reward_adapter is not None:
            copy_adapter(policy, source, VALUE)
        if keeps_start:
            policy.add_adapter(REFERENCE, copy.deepcopy(policy.peft_config[self.adapter]))
            copy_adapter(policy, self.adapter, REFERENCE)
            self.reference_adapter = REFERENCE
        policy.set_adapter(self.adapter)
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(is_of(name, self.adapter) or is_of(name, VALUE))
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # steps of 1e-5 are lost in 16 bits

    @staticmethod
    def _drop_head(model: Any) -> None:
        """The value model's language head is never run; one that trains would get no gradient."""
        head = families.core(model).get_output_embeddings()
        embeddings = families.core(model).get_input_embeddings()
        for parameter in head.parameters():
            if parameter is not embeddings.weight:
                parameter.requires_grad_(False)

    @property
    def config(self) -> Any:
        """The policy's config."""
        return families.core(self.policy).config

    @property
    def dtype(self) -> torch.dtype:
        """Of the policy's weights."""
        return families.core(self.policy).dtype

    def parameters_of(self, role: Literal["policy", "value"]) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters that train for a role."""

        def is_value(name: str) -> bool:
            return name.startswith(("value.", "value_head.")) or (self.adapts and is_of(name, VALUE))

        return [
            (name, p) for name, p in self.named_parameters() if p.requires_grad and is_value(name) == (role == VALUE)
        ]

    def groups(self, rates: Mapping[str, float], decay: Collection[str], weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer.

        Args:
            rates: learning rates of `policy` and `value`.
            decay: names of the parameters that decay.
            weight_decay: by how much.
        """
        groups = [
            {"params": [p for name, p in self.parameters_of(role) if (name in decay) == decays],
             "weight_decay": weight_decay if decays else 0.0, "decays": decays, "role": role,
             "lr": rates[role]}
            for role in ("policy", "value") for decays in (True, False)
        ]  # fmt: skip
        return [group for group in groups if group["params"]]

    def set_decay(self, optimizer: Any, weight_decay: float) -> None:
        """Set the policy's weight decay: 0 while the values train alone, as it would move the policy with a gradient of 0 too.

        Args:
            optimizer: with the groups of `groups`.
            weight_decay: by how much.
        """
        for group in optimizer.param_groups:
            if group.get("decays") and group.get("role") == "policy":
                group["weight_decay"] = weight_decay

    def audit(self) -> None:
        """Check that the policy got a gradient that is not 0; `forward` gives all parameters one of 0 at least.

        Raises:
            ValueError: it did not.
        """
        trains = self.parameters_of("policy")
        if not any(parameter.grad is not None and bool(parameter.grad.any()) for _, parameter in trains):
            raise ValueError(
                f"all {len(trains)} trainable tensors of the policy ({trains[0][0]}, ...) got a gradient of 0 from tokens that "
                "have advantages: the policy would never change. Look at which adapter is active, and at what cuts the graph "
                "(trainer.gradient_checkpointing_kwargs: {use_reentrant: false})."
            )

    def forward(self, role: Role, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Run one role on a batch.

        Each result has a share of 0 in every other parameter that trains, so that in several processes each backward pass gives
        a gradient, 0 at least, to all of them.

        Args:
            role: who is asked. It stays active until the next call: a backward pass with gradient checkpointing runs the
                forward pass once more, so it has to come before another role is asked.
            batch: from `PreferenceCollator.collate`, with the one view `chosen`.

        Returns:
            Of the policy and the reference `log_probs` and `entropy`, of the value `values`: (N,) each, in label order.
        """
        self.activate(role)
        if role == "value":
            states = self._states(self.policy if self.value is None else self.value, batch)
            with torch.autocast(states.device.type, enabled=False):
                found = {"values": self._head(states.float())}
        else:
            model = self.reference if role == "reference" and self.reference is not None else self.policy
            output = run(model, batch)
            found = {name: output[name] for name in FIELDS}
        if torch.is_grad_enabled():
            nothing = torch.stack([0.0 * p.sum().float() for p, trains in self._flags if trains]).sum()
            found = {name: value + nothing.to(value.dtype) for name, value in found.items()}
        return found

    def _states(self, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        if "packed" in batch:
            return hidden_states(model, batch["packed"])
        plain = {key: value for key, value in batch["plain"].items() if key != "completion_mask"}
        states = families.core(model).model(**plain, use_cache=False).last_hidden_state
        return states[:, :-1][batch["plain"]["completion_mask"][:, 1:].bool()]

    def activate(self, role: Role) -> None:
        """Make a role's adapter the active one, and leave alone which parameters train: PEFT's switches change that too."""
        if not self.adapts:
            return
        off = role == "reference" and self.reference_adapter is None
        if off:
            self.policy.base_model.disable_adapter_layers()
        else:
            self.policy.base_model.enable_adapter_layers()
            names = {"policy": self.adapter, "value": VALUE, "reference": self.reference_adapter}
            self.policy.set_adapter(names[role])
        self.restore_flags()

    def restore_flags(self) -> None:
        """Train what trained at the start, after something else (a reward model on the same base) switched adapters."""
        for parameter, trains in self._flags:
            parameter.requires_grad_(trains)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        """As transformers does, without reentrance, and without its hooks that ask for gradients in a frozen tower."""
        how = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        for model in (self.policy, self.value):
            if model is not None:
                core = families.core(model)
                enable = getattr(core, "activation_checkpointing_enable", None) or core.gradient_checkpointing_enable
                enable(how, **settings)
                core.disable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        """The name by which transformers before 5.23 asks for `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **settings)

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        """In float32 whatever an engine has cast the head to."""
        weight, bias = self.value_head.weight.float(), self.value_head.bias.float()
        return nn.functional.linear(states, weight, bias)[:, 0]

    def save(self, folder: Path) -> None:
        """Write the policy as any model or adapter is written, and the value under `value`."""
        value = folder / VALUE
        if self.adapts:
            self.policy.save_pretrained(folder, selected_adapters=[self.adapter])
            self.policy.save_pretrained(folder, selected_adapters=[VALUE])
        else:
            self.policy.save_pretrained(folder)
            self.value.save_pretrained(value)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.value_head.state_dict().items()}, value / HEAD_FILE
        )

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote; the reference is what the run started from, and is not in it."""
        value = folder / VALUE
        if self.adapts:
            for name, place in ((self.adapter, folder), (VALUE, value)):
                set_peft_model_state_dict(self.policy, load_file(place / ADAPTER_FILE), adapter_name=name)
        else:
            restore_weights(self.policy, folder)
            restore_weights(self.value, value)
        self.value_head.load_state_dict(load_file(value / HEAD_FILE))


@contextmanager
def first_of_two(accelerator: Any, model: Any) -> Iterator[None]:
    """A backward pass that another one follows before gradients are exchanged.

    Args:
        accelerator: of the run.
        model: the roles, as they are wrapped for several processes.
    """
    state = accelerator.gradient_state
    before = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(before)

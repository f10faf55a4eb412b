"""TRL's own losses and settings through the shared path: loss, gradients and every logged metric of stock `DPOTrainer`."""

import re

import pytest
import torch
from trl import DPOConfig

from prefalign.config import ConfigError
from prefalign.losses import read_losses
from prefalign.training.arguments import training_arguments
from prefalign.training.checks import check_settings
from tests.equality import Bench, Case, compare, step
from tests.training_runs import largest_difference, weights

SETTINGS = {
    "sigmoid": {},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "aot": {"loss_type": ["aot"]},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "sft": {"loss_type": ["sft"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "sigmoid + sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "ld_alpha": {"ld_alpha": 0.5},
    "WPO": {"use_weighting": True},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "beta": {"beta": 0.5},
    "ld_alpha, WPO, checkpointing": {"ld_alpha": 0.5, "use_weighting": True, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench("llava", tmp_path_factory.mktemp("llava"))


def test_every_loss_type_is_here():
    described = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    run = {name for settings in SETTINGS.values() for name in settings.get("loss_type", ["sigmoid"])}
    assert run == set(re.findall(r"`'(\w+)'`", described))


@pytest.mark.parametrize("training", ["frozen", "lora"])
@pytest.mark.parametrize("name", SETTINGS)
def test_same_loss_gradients_and_metrics_as_stock_trl(name, training, bench):
    settings = dict(SETTINGS[name])
    case = Case("llava", "text", training, "1", 3, settings.pop("gradient_checkpointing", False), "online")
    ours = bench.ours(case, fast_path="auto", **settings)
    stock = bench.stock(case, **settings)
    shared, right = step(ours, ours.train_dataset), step(stock, stock.train_dataset)
    if name == "sft":  # no reference is kept for it, so there are no rewards to log
        right.metrics = {key: value for key, value in right.metrics.items() if not key.startswith("rewards/")}
    # (log-ratio - 1 / (2 beta))^2 falls by 1 / beta per unit at its start, where sigmoid's slope is below beta
    slope = 1 / ours.args.beta if name == "sppo_hard" else ours.args.beta
    difference = compare(shared, right, slope=slope, lora=training == "lora")
    assert difference.holds(), difference


@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_no_hook_is_left_behind_in_any_step(training, bench):
    """TRL's sums of a reference with `ld_alpha` turn checkpointing on again, which adds a hook to each embedding every time."""
    case = Case("llava", "text", training, "1", 3, True, "online")
    trainer = bench.ours(case, fast_path="auto", ld_alpha=0.5, max_steps=3, per_device_train_batch_size=3)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing
    assert not trainer.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    ("losses", "settings", "message"),
    [
        (["text"], {"beta": 0}, "trainer.beta is 0.0, no scale of a reward: at 0 nothing has a gradient"),
        (["text"], {"beta": float("nan")}, "trainer.beta is nan, no scale"),
        (["text"], {"loss_weights": [-1.0]}, r"trainer.loss_weights is \[-1.0\]; a weight is a positive number"),
        (["text"], {"label_smoothing": 0.5}, "trainer.label_smoothing is 0.5; .* from 0 to below 0.5: at a half"),
        (["text"], {"loss_type": []}, "trainer.loss_type: the list is empty, so `text` has no loss"),
        (["visual"], {"loss_type": ["ipo"]}, r"trainer.loss_type is \['ipo'\], and only the loss `text` reads it, .* \(visual\)"),
        (["visual"], {"loss_weights": [3.0]}, r"trainer.loss_weights is \[3.0\], and only the loss `text`"),
        (["visual"], {"ld_alpha": 0.3}, "trainer.ld_alpha is 0.3, and only"),
        (["visual"], {"use_weighting": True}, "trainer.use_weighting is True, and only"),
        (["visual"], {"label_smoothing": 0.1}, "trainer.label_smoothing is 0.1, and only"),
        (["visual"], {"f_divergence_type": "forward_kl"}, "trainer.f_divergence_type is 'forward_kl', and only"),
        (["visual"], {"discopop_tau": 0.1}, r"trainer.discopop_tau is 0.1, .* or add {name: text} to `losses`"),
        (["simpo"], {"sync_ref_model": True}, r"sync_ref_model: the losses \(simpo\) look at no reference, so there is none"),
    ],
)  # fmt: skip
def test_settings_that_train_nothing_or_the_opposite_are_refused(losses, settings, message, tmp_path):
    def check(adapts=False, **more):
        args = training_arguments(more, output=tmp_path, seed=0)
        terms = read_losses([{"name": name} for name in losses], beta=0.1)
        check_settings(terms, args, reference="online", tokens_per_pass=None, brings_reference=False, adapts=adapts)

    check()
    with pytest.raises(ConfigError, match=message):
        check(**settings)
    if losses == ["text"]:
        with pytest.raises(ConfigError, match="trainer.sync_ref_model: with an adapter the reference is the model"):
            check(adapts=True, sync_ref_model=True)


def test_a_reference_that_follows_the_policy_is_stock_trls_and_leaves_the_frozen_tower_alone(bench):
    """Mixed in place after each step: a tower that both models shared would be scaled down by it."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6, "optim": "sgd",
                "learning_rate": 0.05, "max_steps": 3, "per_device_train_batch_size": 3}  # fmt: skip
    case = Case("llava", "text", "frozen", "1", 3, False, "online")
    ours, stock = bench.ours(case, fast_path="auto", **settings), bench.stock(case, **settings)
    start = weights(ours.ref_model)
    ours.train()
    stock.train()
    for name, weight in ours.model.named_parameters():
        if not weight.requires_grad:
            assert torch.equal(weight, start[name]), name
    assert largest_difference(weights(ours.model), weights(stock.model)) < 1e-5
    assert largest_difference(weights(ours.ref_model), weights(stock.ref_model)) < 1e-5
    assert largest_difference(weights(ours.ref_model), start) > 1e-3

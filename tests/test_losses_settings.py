"""The weighted list of a run's losses: which views it needs, what bad settings are told, the published lists."""

import re

import pytest

from prefalign import bundled, config
from prefalign.config import ConfigError
from prefalign.losses import TERMS, read_losses, views_of
from prefalign.negatives import Negative
from prefalign.training.arguments import training_arguments
from prefalign.training.lora import LoraSettings

OWN = [name for name in TERMS if name != "text"]


def term(name, **more):
    return read_losses([{"name": name, **more}], beta=0.1)[0]


VIEWS_OF = {
    "two_pictures": ("chosen", "rejected_on_own_image"),
    "anchor": ("chosen",),
    "s_vco": ("chosen", "rejected", "chosen_on_rejected_image", "rejected_on_rejected_image", "chosen_without_image",
              "rejected_without_image"),
    "povid_noise": ("chosen", "chosen_on_rejected_image"),
    "ddpo": ("chosen", "rejected"),
    "chip": ("chosen", "rejected", "chosen_on_rejected_image"),
    "v_dpo": ("chosen", "rejected", "chosen_without_image", "rejected_without_image"),
    "opa_dpo": ("chosen", "rejected", "chosen_on_rejected_image"),
    "tpo": ("chosen", "rejected", "chosen_on_rejected_image", "rejected_on_rejected_image"),
    "cdpo": ("chosen", "rejected"),
    "bco": ("chosen", "rejected"),
    "stic": ("chosen",),
    "simpo": ("chosen", "rejected"),
    "orpo": ("chosen", "rejected"),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS_OF)
def test_views(name):
    entry = term(name)
    assert views_of([entry]) == VIEWS_OF[name]
    assert set(entry.term.logits) <= set(entry.term.views)


def test_views_follow_the_settings():
    assert views_of([term("s_vco", betas=[0.1, 0.1, 0, 0])]) == (
        "chosen", "chosen_on_rejected_image", "chosen_without_image")  # fmt: skip
    assert views_of([term("s_vco", betas=[0, 0, 0, 0.1])]) == ("rejected", "rejected_without_image")
    assert views_of([term("anchor", below_zero=["rejected"])]) == ("chosen", "rejected")
    assert views_of([term("v_dpo", without="rejected_image")])[2:] == (
        "chosen_on_rejected_image", "rejected_on_rejected_image")  # fmt: skip
    assert views_of([term("chip", image=False)]) == ("chosen", "rejected")
    assert term("chip", kl=0).term.logits == ()
    assert views_of([term("text"), term("visual"), term("anchor")]) == (
        "chosen",
        "rejected",
        "chosen_on_rejected_image",
    )


def test_where_beta_comes_from():
    entries = read_losses([{"name": "anchor"}, {"name": "ddpo", "beta": 0.5}, {"name": "simpo"}], beta=0.3)
    assert [entry.term.beta for entry in entries] == [0.3, 0.5, 2.0]
    assert [name for name in TERMS if not term(name).term.needs_reference] == ["stic", "simpo", "orpo"]
    assert [name for name in OWN if not term(name).term.per_row] == ["bco"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "ancor"}, "losses.0.name: no preference term called 'ancor'; did you mean 'anchor'?"),
        ({"name": "anchor", "delt": 1}, "losses.0.delt: unknown key (value 1); did you mean 'delta'?"),
        (
            {"name": "anchor", "beta": 0},
            (
                "losses.0.beta: 0.0 is no scale of a reward: at 0 nothing has a gradient, and below it "
                "the rejected side is preferred. Give a positive number; 0.1 is usual."
            ),
        ),
        ({"name": "simpo", "beta": -1}, "losses.0.beta: -1.0 is no scale of a reward"),
        (
            {"name": "anchor", "below_zero": ["visual"]},
            ("losses.0.below_zero.0: Input should be 'rejected' or 'chosen_on_rejected_image' (got 'visual')."),
        ),
        (
            {"name": "anchor", "below_zero": ["rejected", "rejected"]},
            ("losses.0: below_zero names a view twice: rejected, rejected; once is enough."),
        ),
        (
            {"name": "s_vco", "betas": [0, 0, -1, 0]},
            (
                "losses.0: betas are [0.0, 0.0, -1.0, 0.0]: 0 or less switches a comparison "
                "off, and at least one must be left, all of them finite. The published ones are [0.1, 0.1, 0.1, 0.1]."
            ),
        ),
        ({"name": "s_vco", "betas": [0.1]}, "losses.0.betas.1: Field required (got [0.1])."),
        (
            {"name": "ddpo", "gamma": 0},
            (
                "losses.0: gamma is 0.0; a changed token counts a positive number of times (1: as much as "
                "the others; RLHF-V's is 5)."
            ),
        ),
        (
            {"name": "chip", "min_block": 0},
            ("losses.0: min_block is 0; a stretch of equal tokens has at least 1 token (3 is the published)."),
        ),
        (
            {"name": "chip", "kl": -0.1},
            (
                "losses.0: kl is -0.1; below 0 it would reward the rejected answer for leaving the "
                "reference. Take 0.1 as published, or 0 to leave the token level out."
            ),
        ),
        (
            {"name": "v_dpo", "g": 0},
            (
                "losses.0: g is 0.0: at 1 there is no guidance (take the term `text`), below 1 it rewards "
                "answers that ignore the picture, and at 0, the released script's value, no gradient is left. Take 1.5 to 2."
            ),
        ),
        ({"name": "v_dpo", "g": 1}, "losses.0: g is 1.0: at 1 there is no guidance"),
        (
            {"name": "v_dpo", "without": "black"},
            "losses.0.without: Input should be 'removed' or 'rejected_image' (got 'black').",
        ),
        (
            {"name": "opa_dpo", "anchor": -1},
            (
                "losses.0: anchor is -1.0, and a part's weight is 0 or more; below 0 it would train "
                "the opposite (published: image 0.2, anchor 1)."
            ),
        ),
        ({"name": "tpo", "detach": "maybe"}, "losses.0.detach: Input should be a valid boolean"),
        (
            {"name": "cdpo", "label_smoothing": 0.5},
            (
                "losses.0: label_smoothing is 0.5; it is the share of wrong labels, from 0 to "
                "below 0.5: at a half the labels say nothing, above it they say the opposite."
            ),
        ),
        (
            {"name": "stic", "alpha": 0},
            (
                "losses.0: alpha is 0.0; it weighs a log-likelihood, and at 0 or below it would train "
                "nothing or make the chosen answers unlikely. The published one is 1/1024 (0.0009765625)."
            ),
        ),
        (
            {"name": "simpo", "gamma": -1},
            (
                "losses.0: gamma is -1.0; the chosen answer has to win by that margin, which is 0 or "
                "more (the paper: 0.5 to 1.6)."
            ),
        ),
        (
            {"name": "orpo", "lam": 0},
            (
                "losses.0: lam is 0.0; it weighs the odds ratio and is above 0 (published: 0.1). For "
                "imitation alone take the term `text` with trainer.loss_type [sft]."
            ),
        ),
        (
            {"name": "bco", "weight": 0},
            "losses.0.weight: 0 is no positive number; leave the entry out to train without it.",
        ),
    ],
)
def test_bad_settings(entry, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_losses([entry], beta=0.1)


def test_a_bad_list_is_told_all_at_once():
    with pytest.raises(ConfigError) as error:
        read_losses([{"name": "bco"}, {"name": "bco"}, {"name": "orpo", "lam": -1}], beta=0.1)
    assert "losses: 'bco' stands in the list 2 times; add their weights up in one entry." in str(error.value)
    assert "losses.2: lam is -1.0" in str(error.value)
    with pytest.raises(ConfigError, match="the list is empty, so there is nothing to train"):
        read_losses([], beta=0.1)


PUBLISHED = {
    "mdpo": [("text", 1.0), ("visual", 1.0), ("anchor", 1.0)],
    "rdpo": [("text", 1.0), ("visual", 1.0)],
    "s_vco": [("s_vco", 1.0)],
    "povid_stage2": [("text", 0.5), ("povid_noise", 0.5)],
    "rlhf_v": [("ddpo", 1.0)],
    "chip": [("chip", 1.0)],
    "v_dpo": [("v_dpo", 1.0)],
    "opa_dpo": [("opa_dpo", 1.0)],
    "tpo": [("tpo", 1.0)],
    "mpo": [("text", 1.0), ("bco", 0.2)],
    "stic": [("text", 1.0), ("stic", 1.0)],
    "two_pictures": [("two_pictures", 1.0)],
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_settings(method):
    name = f"recipes/train_preference_{method}"
    values = config.read_yaml(bundled.configs()[name])
    arguments = training_arguments({**values["trainer"], "bf16": False}, output=values["output"], seed=0)
    losses = read_losses(values["losses"], beta=arguments.beta)
    assert [(entry.name, entry.weight) for entry in losses] == PUBLISHED[method]
    other_picture = any("on_rejected_image" in view for view in views_of(losses))
    if method in ("rdpo", "s_vco"):  # their pairs bring the other picture
        assert other_picture
        assert "negative" not in values
    else:
        assert other_picture == ("negative" in values)
    if "negative" in values:
        config.build(Negative, values["negative"], source=name)
    if values.get("lora"):
        config.build(LoraSettings, values["lora"], source=name)
    header = bundled.configs()[name].read_text().split("\n\n")[0]
    assert f"prefalign run train_preference --config configs/{name}.yaml" in header
    assert all(word in header for word in ("Pairs:", "Hardware:", "Expected:", "Settings:"))

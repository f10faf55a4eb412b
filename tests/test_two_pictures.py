"""Two answers on two pictures: the loss against TRL and by hand, what each picture changes, and who refuses such pairs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from torch.nn.functional import logsigmoid
from trl import DPOTrainer

from prefalign import bundled
from prefalign.filtering import Filters
from prefalign.hub.dataset_card import RowStatistics
from prefalign.images import encode_png
from prefalign.losses import read_losses, views_of
from prefalign.models import ModelConfig, freeze, load_model, load_processor
from prefalign.negatives import Negative
from prefalign.online.step_run import step_rows
from prefalign.records import Pair, Prompt, message_text
from prefalign.rewards.rows import check_pictures, load_reward_pairs
from prefalign.store import OutputConfig, write_records
from prefalign.training.arguments import training_arguments
from prefalign.training.checks import reading_rejected
from prefalign.training.pairs import check_columns, check_negative, check_rejected_side, check_texts, load_pairs
from prefalign.training.reference import cache_reference
from prefalign.training.sized_rows import RowSize, sized_rows
from prefalign.training.unpaired import load_unpaired
from tests.equality import compare, disturb, log_probs, step
from tests.online_runs import run as online_run
from tests.training_runs import make_pair, make_trainer

FLAG = {"rejected_on_rejected_images": True}


def write(folder: Path, pairs: list[Pair]) -> Path:
    write_records("test", pairs, output=OutputConfig(folder, block_size=3), record=Pair, settings={}, seed=0)
    return folder


def apart(number: int, **more) -> Pair:
    return replace(make_pair(number, rejected_size=(96, 30)), meta={"a": 1, **FLAG}, **more)


def alone(number: int) -> Pair:
    return replace(make_pair(number), rejected_images=[])


def one_text(number: int) -> Pair:
    pair = make_pair(number)
    return replace(pair, rejected=pair.chosen)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Two answers on two pictures, two on one, one on two: what ms-swift lets stand in one file."""
    pairs = [apart(0), alone(1), one_text(2), apart(3)]
    return write(tmp_path_factory.mktemp("pairs") / "mixed", pairs)


@pytest.fixture(scope="module")
def one_picture(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("pairs") / "alone", [alone(number) for number in range(4)])


def trainer_of(checkpoint, pairs, folder, losses=("two_pictures",), **more):
    """A trainer whose policy has moved away from its reference."""
    trainer = make_trainer(checkpoint, pairs, folder, losses=losses, **more)
    disturb(trainer.model)
    return trainer


def loss_of(trainer, rows) -> float:
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()


@pytest.mark.parametrize("repeated", [False, True], ids=["no other picture", "the same picture again"])
def test_on_one_picture_it_is_trls_dpo(repeated, tiny_llava, one_picture, tmp_path):
    """Loss and gradients of stock `DPOTrainer` on the same rows."""
    ours = trainer_of(tiny_llava, one_picture, tmp_path / "a")
    config = ModelConfig(str(tiny_llava), device="cpu")
    model = load_model(config)
    freeze(model, ("vision",))
    stock = DPOTrainer(
        model, ref_model=load_model(config), train_dataset=load_dataset(str(one_picture), split="train"),
        args=training_arguments({"gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no"},
                                output=tmp_path / "b", seed=3),
        processing_class=load_processor(config),
    )  # fmt: skip
    disturb(stock.model)
    rows = list(ours.train_dataset)
    if repeated:
        rows = [{**row, "rejected_images": row["images"]} for row in rows]
    found, wanted = step(ours, rows), step(stock, stock.train_dataset)
    shared = {name: value for name, value in found.metrics.items() if not name.startswith("two_pictures/")}
    for name in ("rewards/chosen", "rewards/rejected", "margins", "accuracies"):
        name_of_trl = name if name.startswith("rewards/") else f"rewards/{name}"
        assert found.metrics[f"two_pictures/{name}"] == pytest.approx(wanted.metrics[name_of_trl], abs=1e-5)
    difference = compare(replace(found, metrics=shared), wanted)
    assert difference.holds(), difference
    assert abs(wanted.loss - 0.6931) > 1e-3


def test_each_answer_on_its_own_picture(tiny_llava, mixed, tmp_path):
    """By hand, from TRL's layout of the loss `text` on rows of one picture each."""
    trainer = trainer_of(tiny_llava, mixed, tmp_path)
    text = make_trainer(tiny_llava, mixed, tmp_path / "text", fast_path="off")
    disturb(text.model)
    rows = list(trainer.train_dataset)
    own = [{**row, "images": row["rejected_images"] or row["images"]} for row in rows]
    ratios = []
    for view, shown in (("chosen", rows), ("rejected", own)):
        batch = text.data_collator(shown)
        policy = log_probs(text, batch)[view]
        with torch.no_grad():
            flat = text._reference(batch)["log_probs"]
        reference = flat[batch["index"][view]].split([len(each) for each in policy])
        ratios.append(torch.stack([(one - two).sum() for one, two in zip(policy, reference, strict=True)]))
    by_hand = -logsigmoid(0.1 * (ratios[0] - ratios[1])).mean().item()
    assert loss_of(trainer, rows) == pytest.approx(by_hand, abs=1e-6)
    # one answer on two pictures is the term `visual`, two answers on one are DPO
    visual = trainer_of(tiny_llava, mixed, tmp_path / "visual", losses=("visual",))
    assert loss_of(visual, [rows[2]]) == pytest.approx(loss_of(trainer, [rows[2]]), abs=1e-6)
    assert loss_of(text, [rows[1]]) == pytest.approx(loss_of(trainer, [rows[1]]), abs=1e-6)
    assert abs(loss_of(text, [rows[0]]) - loss_of(trainer, [rows[0]])) > 1e-4


@pytest.mark.parametrize("side", ["images", "rejected_images"])
def test_either_picture_changes_the_loss(side, tiny_llava, mixed, tmp_path):
    trainer = trainer_of(tiny_llava, mixed, tmp_path)
    rows = [row for row in trainer.train_dataset if row["rejected_images"]]
    swapped = [{**row, side: rows[place - 1][side]} for place, row in enumerate(rows)]
    blank = [{**row, side: [encode_png(Image.new("RGB", (40, 48)))]} for row in rows]
    numbers = [loss_of(trainer, each) for each in (rows, swapped, blank)]
    assert min(abs(one - two) for one, two in zip(numbers, numbers[1:] + numbers[:1], strict=True)) > 1e-5


@pytest.mark.parametrize(
    "losses", [("two_pictures",), ("two_pictures", "visual", "anchor")], ids=["alone", "with others"]
)
@pytest.mark.parametrize("family", ["tiny_llava", "tiny_idefics3"])
def test_shared_path_and_cached_reference_are_the_plain_way(family, losses, request, mixed, tmp_path):
    checkpoint = request.getfixturevalue(family)
    kept = (0, 2, 3) if "visual" in losses else (0, 1, 2, 3)
    plain = trainer_of(checkpoint, mixed, tmp_path / "plain", losses=losses, fast_path="off")
    rows = [plain.train_dataset[number] for number in kept]
    wanted = step(plain, rows)
    shared = trainer_of(checkpoint, mixed, tmp_path / "shared", losses=losses)
    assert shared.route.layout == "split"
    cached = make_trainer(checkpoint, mixed, tmp_path / "cached", losses=losses, reference="cached")
    cached.train_dataset = cached.train_dataset.select(kept)
    cache_reference(cached, tmp_path / "cache", reference="tiny", verify=1, progress=False)
    disturb(cached.model)
    for trainer in (shared, cached):
        difference = compare(step(trainer, rows), wanted)
        assert difference.holds(), difference


# --- who reads such pairs on which picture ---


def checked(folder, entries, loss_type=("sigmoid",)):
    losses = read_losses([{"name": entry} if isinstance(entry, str) else entry for entry in entries], beta=0.1)
    check_rejected_side(load_pairs(folder), folder, reading_rejected(losses, loss_type))


@pytest.mark.parametrize(
    ("entries", "named"),
    [(["text"], "text"), (["s_vco"], "s_vco"), (["text", "visual", "anchor"], "text"), (["two_pictures", "ddpo"], "ddpo"),
     (["simpo", "cdpo"], "simpo, cdpo"), ([{"name": "anchor", "below_zero": ["rejected"]}], "anchor")],
    ids=str,
)  # fmt: skip
def test_losses_that_would_reject_it_on_the_wrong_picture_are_refused(entries, named, mixed):
    words = (
        f"2 of the 4 pairs of {mixed} reject an answer about `rejected_images` (`meta.rejected_on_rejected_images`), and {named} "
        "would reject it on `images`, where it may be right. Take [{name: two_pictures}], which"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        checked(mixed, entries)


def test_losses_that_read_it_right_or_not_at_all(mixed, tmp_path):
    checked(mixed, ["two_pictures"])
    checked(mixed, ["two_pictures", "anchor"])
    checked(mixed, ["visual", "anchor"])
    checked(mixed, ["text"], ["sft"])  # imitates the chosen answers
    with pytest.raises(ValueError, match="and text would reject it on `images`"):
        checked(mixed, ["text"], ["sigmoid", "sft"])
    twins = write(tmp_path / "twins", [replace(make_pair(number), meta={"parent_meta": FLAG}) for number in range(4)])
    for entries in (["text"], ["s_vco"], ["text", "visual", "anchor"], ["tpo"]):
        checked(twins, entries)


def test_pairs_whose_rejected_answer_is_about_the_first_picture(tmp_path):
    """Those of mDPO, rDPO and S-VCO, in which the other picture is a bad one, or the rejected text is true of it."""
    twins = write(tmp_path / "twins", [make_pair(0), make_pair(1), one_text(2), alone(3), apart(4)])
    with pytest.raises(
        ValueError, match=r"two_pictures reads .* and 2 of the 5 pairs of .*twins have such pictures without sayi"
    ):
        checked(twins, ["two_pictures"])


def test_it_needs_no_other_picture_and_makes_none(mixed):
    views = ("chosen", "rejected_on_own_image")
    check_columns(load_pairs(mixed), views, mixed)
    with pytest.raises(ValueError, match="no loss of this run looks at another picture"):
        check_negative(load_pairs(mixed), views, mixed, Negative("crop"))


def test_a_plan_without_pairs_counts_both_pictures(tiny_llava):
    processor = load_processor(ModelConfig(str(tiny_llava), device="cpu"))
    [row] = sized_rows(
        processor, ("chosen", "rejected_on_own_image"), RowSize(prompt=60, answer=8, pictures=1, side=48), 1, 0
    )
    assert len(row["images"]) == len(row["rejected_images"]) == 1
    assert row["images"] != row["rejected_images"]


def test_a_run_on_such_pairs_starts_with_these_checks(mixed, tmp_path):
    recipe = bundled.load_stage("train_preference")
    with pytest.raises(ValueError, match="2 of the 4 pairs of .*mixed reject an answer about `rejected_images`"):
        recipe.main(recipe.Config(ModelConfig("scenes"), mixed, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_rounds_refuse_them_as_offline_pairs_before_anything_is_drawn(mixed, tmp_path):
    with pytest.raises(ValueError, match="2 of the 4 pairs of .*, and text would reject it on `images`"):
        online_run(None, tmp_path / "online", offline=mixed, p_offline=1.0)
    assert not (tmp_path / "online").exists()


def test_one_text_on_one_picture_has_no_gradient(mixed, tmp_path):
    pairs = write(tmp_path / "same", [replace(alone(number), rejected=alone(number).chosen) for number in range(3)])
    views = views_of(read_losses([{"name": "two_pictures"}], beta=0.1))
    with pytest.raises(ValueError, match="chosen and rejected are the same text in all 3 pairs"):
        check_texts(load_pairs(pairs), views, pairs)
    check_texts(load_pairs(mixed), views, mixed)
    two = write(tmp_path / "two", [one_text(number) for number in range(3)])
    check_texts(load_pairs(two), views, two)


def test_other_readers_of_pairs_refuse_them(mixed, tmp_path):
    with pytest.raises(
        ValueError, match="2 pairs of .*mixed reject an answer about `rejected_images`, and KTO's rows show"
    ):
        load_unpaired(mixed)
    rows = load_reward_pairs(mixed)
    with pytest.raises(
        ValueError, match=r"2 of the 4 pairs of .* which would be shown with `images`.*rejected_pictures to true"
    ):
        check_pictures(rows, mixed, rejected_pictures=False)
    check_pictures(rows, mixed, rejected_pictures=True)
    grader = bundled.load_stage("grade_reward_model")
    with pytest.raises(ValueError, match="2 pairs of .* a grade shows both answers with `images`"):
        grader.read_pairs(grader.PairSet(mixed))
    prompts = tmp_path / "prompts"
    asked = [Prompt(pair.id, pair.images, pair.prompt) for pair in (apart(0), alone(1))]
    write_records("test", asked, output=OutputConfig(prompts), record=Prompt, settings={}, seed=0)
    with pytest.raises(
        ValueError, match="pair pair-0 of .* rejects an answer about `rejected_images`, which online_dpo_step"
    ):
        list(step_rows(prompts, mixed))


def test_stages_that_look_at_the_first_picture_drop_them():
    contrast, s_vco, score, sift = (
        bundled.load_stage(name) for name in ("image_contrast", "s_vco", "score_responses", "filter_pairs")
    )
    settings = contrast.Config(None, None, negative=Negative("blur"))
    two, one = contrast.process([apart(0), alone(1)], settings, lambda: None)
    assert (two.reason, len(one)) == ("two_pictures", 1)
    assert s_vco._prepare(apart(0)).reason == "two_pictures"
    assert isinstance(s_vco._prepare(make_pair(0)), list)
    assert score.candidates_of(apart(0)).reason == "two_pictures"
    assert [answer["text"] for answer in score.candidates_of(alone(0)).responses] == ["a red square", "a dog jumps"]
    [found] = sift._score_block([apart(0)], sift.Config(None, None, Filters()), None)
    assert found["verdict"] == ("two_pictures", None)


def test_a_card_counts_them():
    statistics = RowStatistics()
    for pair in (apart(0), alone(1)):
        statistics.add(pair.to_row())
    assert statistics.as_table()["rows whose `rejected` is about `rejected_images`, not `images`"] == "1"
    assert message_text(apart(0).rejected) == "a dog jumps"

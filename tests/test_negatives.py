"""Other pictures of a pair: each operation by hand, and made in training exactly as the stage stores them."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from prefalign import bundled, config
from prefalign.corruption import blur, crop, crop_box, difference, mask_pixels
from prefalign.models import ModelConfig, load_processor
from prefalign.negatives import Negative, negative_seed, negatives, spoil
from prefalign.records import Pair
from prefalign.store import OutputConfig, write_records
from prefalign.training.collator import PreferenceCollator
from prefalign.training.pairs import load_pairs
from tests.tiny_vlms import picture
from tests.training_runs import largest_difference, make_pair, make_trainer

KINDS = ("crop", "diffusion", "blur", "mask", "blank")
STAGE = bundled.load_stage("image_contrast")
RECIPE = bundled.load_stage("train_preference")
LN2 = math.log(2)
VISUAL = ("chosen", "chosen_on_rejected_image")


def test_crops_cover_one_to_twenty_percent_with_sides_near_each_other():
    """2,000 boxes of 640x480: area evenly in [0.01, 0.2] (mean 0.105, standard error 0.0548 / sqrt(2000) = 0.0012), log of the
    aspect evenly around 0 in +-0.288 (standard error 0.0037). The smallest box has sides of 48 and 64 pixels, so whole pixels
    cost at most 0.5/48 + 0.5/64 = 1.8 % of the area, and 1.9 % of the aspect.
    """
    boxes = [crop_box((640, 480), seed=seed) for seed in range(2000)]
    areas = np.array([w * h / (640 * 480) for _, _, w, h in boxes])
    aspects = np.array([w / h for _, _, w, h in boxes])
    assert areas.max() <= 0.2
    assert areas.min() >= 0.01 * (1 - 0.019)
    assert areas.max() > 0.199
    assert areas.min() < 0.0105
    assert areas.mean() == pytest.approx(0.105, abs=0.004)
    assert 0.75 / 1.019 <= aspects.min() < 0.76
    assert 1.32 < aspects.max() <= 4 / 3 * 1.019
    assert np.log(aspects).mean() == pytest.approx(0, abs=0.012)
    assert all(min(x, y) >= 0 and x + w <= 640 and y + h <= 480 for x, y, w, h in boxes)
    lefts = np.array([x / (640 - w) for x, _, w, _ in boxes])
    assert lefts.mean() == pytest.approx(0.5, abs=0.02)
    assert len(set(boxes)) > 1900


@pytest.mark.parametrize(
    ("size", "area", "sides"),
    [
        ((100, 100), [0.16, 0.16], (40, 40)),  # sqrt(0.16 * 10000)
        ((100, 100), [0.04, 0.040001], (20, 20)),  # 20 pixels; 28 would be above the largest area given
        ((1000, 20), [0.2, 0.2], (200, 20)),  # 63.2 square is too high for 20: the area stays, 4000 / 20 = 200 wide
        ((20, 1000), [0.2, 0.2], (20, 200)),
    ],
)
def test_crop_sides_by_hand(size, area, sides):
    assert crop_box(size, seed=3, area=area, aspect=[1, 1])[2:] == sides


def test_small_crops_are_widened():
    """100 x 100 between 4 and 20 %: 20 to 44.7 pixels a side, those below 28 are widened; (28/100)^2 = 7.84 %."""
    drawn = [crop_box((100, 100), seed=seed, area=[0.04, 0.2], aspect=[1, 1])[2:] for seed in range(300)]
    assert min(drawn) == (28, 28)
    assert max(w * h for w, h in drawn) <= 2000
    assert drawn.count((28, 28)) / 300 == pytest.approx((0.0784 - 0.04) / 0.16, abs=0.09)


def test_small_pictures_widen_to_the_largest_area_and_no_further():
    """60x60: 28 x 28 = 784 is above 20 % (720), so both sides shrink to sqrt(720) = 26.8, in whole pixels 27 x 26 = 702."""
    assert {crop_box((60, 60), seed=seed, aspect=[1, 1])[2:] for seed in range(50)} == {(27, 26)}


@pytest.mark.parametrize("size", [(2000, 20), (30, 4000), (28, 28), (9, 7), (3000, 16)])
def test_no_crop_is_nearly_the_whole_picture(size):
    whole = size[0] * size[1]
    for seed in range(300):
        x, y, w, h = crop_box(size, seed=seed)
        assert w * h <= 0.2 * whole
        assert x + w <= size[0]
        assert y + h <= size[1]


def test_a_crop_shows_its_box_and_nothing_else():
    halves = Image.new("RGB", (40, 20), (255, 0, 0))
    halves.paste((0, 0, 255), (20, 0, 40, 20))
    assert crop(halves, (2, 3, 10, 10)).getcolors() == [(800, (255, 0, 0))]
    assert crop(halves, (20, 0, 8, 8)).getcolors() == [(800, (0, 0, 255))]
    assert crop(halves, (10, 0, 20, 20)).size == (40, 20)


def test_masked_pixels_by_hand():
    """White 40 x 30: 0.3 * 1200 = 360 single pixels. Blocks of 0.25 * 40 = 10: 4 x 3 cells, round(3.6) = 4 of 100 pixels."""
    white = Image.new("RGB", (40, 30), "white")
    single = np.asarray(mask_pixels(white, seed=1)).sum(axis=2)
    assert (single == 0).sum() == 360
    assert (single == 765).sum() == 840
    blocks = np.asarray(mask_pixels(white, seed=1, block=0.25)).sum(axis=2)
    cells = blocks.reshape(3, 10, 4, 10).transpose(0, 2, 1, 3).reshape(12, 100)
    assert sorted((cell == 0).sum() for cell in cells) == [0] * 8 + [100] * 4
    assert (np.asarray(mask_pixels(white, seed=1, share=1.0)) == 0).all()
    odd = np.asarray(mask_pixels(Image.new("RGB", (41, 30), "white"), seed=1, block=0.25)).sum(axis=2)
    assert odd.shape == (30, 41)


def test_blur_spreads_an_edge_over_its_sigma():
    """A black-white edge under sigma 4 (0.04 of 100): the normal distribution's 0.5 at the edge, 0.841 at one sigma."""
    edge = Image.new("RGB", (100, 40))
    edge.paste((255, 255, 255), (50, 0, 100, 40))
    row = np.asarray(blur(edge, sigma=0.04))[20, :, 0] / 255
    assert (row[49] + row[50]) / 2 == pytest.approx(0.5, abs=0.02)
    assert (row[53] + row[54]) / 2 == pytest.approx(0.841, abs=0.03)
    assert row[30] < 0.01
    assert difference(blur(Image.new("RGB", (30, 30), (9, 90, 200))), Image.new("RGB", (30, 30), (9, 90, 200))) == 0


def test_difference_by_hand():
    black, white = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2), "white")
    half = white.copy()
    half.paste((0, 0, 0), (0, 0, 2, 2))
    assert (difference(black, white), difference(white, half), difference(half, half)) == (1.0, 0.5, 0.0)


@pytest.mark.parametrize("kind", [*KINDS, "swap"])
def test_every_kind_changes_the_picture_keeps_its_size_and_is_decided_by_the_seed(kind):
    image, other = picture(3, (64, 48)), picture(9, (30, 50))
    made = spoil(image, Negative(kind=kind), seed=1, other=other)
    assert (made.size, made.mode) == ((64, 48), "RGB")
    assert difference(made, image) > 0.01
    assert made.tobytes() == spoil(image, Negative(kind=kind), seed=1, other=other).tobytes()
    draws = kind in ("crop", "diffusion", "mask")
    assert (made.tobytes() != spoil(image, Negative(kind=kind), seed=2, other=other).tobytes()) == draws
    looked_at = kind not in ("blank", "swap")
    assert (
        made.tobytes() != spoil(picture(4, (64, 48)), Negative(kind=kind), seed=1, other=other).tobytes()
    ) == looked_at
    if kind == "swap":
        assert made.tobytes() == other.resize((64, 48)).tobytes()


def test_first_leaves_the_other_pictures_and_each_has_a_seed_of_its_own():
    images = [picture(1), picture(1)]
    both = negatives(images, Negative(kind="mask"), seed=0, identity="a")
    assert both[0].tobytes() != both[1].tobytes()
    first = negatives(images, Negative(kind="mask", which="first"), seed=0, identity="a")
    assert (first[0].tobytes(), first[1]) == (both[0].tobytes(), images[1])
    assert both[0].tobytes() == spoil(images[0], Negative(kind="mask"), seed=negative_seed(0, "a", 0)).tobytes()
    assert negatives(images, Negative(kind="mask"), seed=0, identity="b")[0].tobytes() != both[0].tobytes()
    assert negatives([], Negative(which="first"), seed=0, identity="a") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"area": [0.2, 0.01]}, r"area is \[0.2, 0.01\]; give the smallest and the largest share"),
        ({"area": [0.0, 0.2]}, "area is"),
        ({"aspect": [1.0]}, r"aspect is \[1.0\]; give the smallest and the largest width over height"),
        ({"least_side": 0}, "least_side is 0; a crop has a side of 1 pixel"),
        ({"aspect": [1.0, math.inf]}, r"aspect is \[1.0, inf\]; give"),
        ({"aspect": [math.nan, 1.0]}, "aspect is"),
        ({"sigma": 0.0}, "sigma is 0.0, which is no width of a blur"),
        ({"sigma": math.nan}, "sigma is nan, which is no width of a blur"),
        ({"sigma": math.inf}, "sigma is inf"),
        ({"share": 1.2}, "share is 1.2; mask a share of the pixels above 0"),
        ({"block": -0.1}, "block is -0.1; give a share of the longer side"),
        ({"step": 1000}, "noise step 1000 is outside the schedule"),
    ],
)
def test_settings_that_make_no_negative(settings, message):
    with pytest.raises(ValueError, match=message):
        Negative(**settings)


def test_swap_needs_another_picture():
    with pytest.raises(
        ValueError, match="'swap' shows another picture of the data, and none was given.*image_contrast"
    ):
        spoil(picture(0), Negative(kind="swap"), seed=0)


# --- in training ---


def plain_pairs(folder: Path, count: int = 8, images: int = 1) -> Path:
    """Pairs without rejected pictures."""
    pairs = [replace(make_pair(number, images), rejected_images=[]) for number in range(count)]
    write_records("test", pairs, output=OutputConfig(folder), record=Pair, settings={"images": images}, seed=0)
    return folder


def stored(pairs: Path, folder: Path, negative: dict, seed: int) -> Path:
    values = {"data": {"path": pairs}, "output": {"path": folder}, "negative": negative, "seed": seed}
    assert STAGE.main(config.build(STAGE.Config, values)).dropped == {}
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return plain_pairs(tmp_path_factory.mktemp("negatives") / "pairs")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["tiny_llava", "tiny_idefics3"])
def test_made_on_the_fly_is_what_is_stored_to_the_bit(kind, family, request, tmp_path):
    folder = plain_pairs(tmp_path / "pairs", 3, images=2)
    processor = load_processor(ModelConfig(str(request.getfixturevalue(family)), device="cpu"))
    rows = list(load_pairs(folder))
    collate = PreferenceCollator(processor, VISUAL, negative=Negative(kind=kind), seed=5)
    ours = collate(rows)["plain"]
    from_disk = list(load_pairs(stored(folder, tmp_path / "ic", {"kind": kind}, 5)))
    theirs = PreferenceCollator(processor, VISUAL)(from_disk)["plain"]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    half = len(ours["pixel_values"]) // 2
    assert not torch.equal(ours["pixel_values"][:half], ours["pixel_values"][half:])
    again = pickle.loads(pickle.dumps(collate))(rows[::-1])["plain"]  # another worker, another order
    tiles = ours["pixel_values"][half:]
    assert torch.equal(
        again["pixel_values"][half:], tiles.reshape(3, -1, *tiles.shape[1:]).flip(0).reshape(tiles.shape)
    )


def test_pictures_that_a_row_has_are_kept(tiny_llava):
    processor = load_processor(ModelConfig(str(tiny_llava), device="cpu"))
    row = make_pair(0).to_row()
    with_negative = PreferenceCollator(processor, VISUAL, negative=Negative(), seed=5)([row])["plain"]
    without = PreferenceCollator(processor, VISUAL)([row])["plain"]
    assert torch.equal(with_negative["pixel_values"], without["pixel_values"])


def loss_and_gradients(trainer, rows):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_those_of_the_stored_pairs_and_the_picture_matters(tiny_llava, pairs, tmp_path):
    trainer = make_trainer(tiny_llava, pairs, tmp_path / "run", losses=("visual",), per_device_train_batch_size=8)
    trainer.data_collator.negative, trainer.data_collator.seed = Negative(), 5
    trainer.train()
    on_the_fly = list(load_pairs(pairs))[:4]
    from_disk = list(load_pairs(stored(pairs, tmp_path / "ic", {}, 5)))[:4]
    loss, gradients = loss_and_gradients(trainer, on_the_fly)
    other_loss, other_gradients = loss_and_gradients(trainer, from_disk)
    assert loss == other_loss < LN2
    assert largest_difference(gradients, other_gradients) == 0.0
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-4

    swapped = [{**row, "images": on_the_fly[index - 1]["images"]} for index, row in enumerate(on_the_fly)]
    numbers = [loss, loss_and_gradients(trainer, swapped)[0]]
    for negative, seed in ((Negative(kind="blank"), 5), (Negative(), 6)):
        trainer.data_collator.negative, trainer.data_collator.seed = negative, seed
        numbers.append(loss_and_gradients(trainer, on_the_fly)[0])
    assert len({round(number, 5) for number in numbers}) == 4, numbers


def recipe_run(checkpoint: Path, pairs: Path, output: Path, **more) -> dict[str, torch.Tensor]:
    trainer = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
    }
    values = {"model": {"model_name_or_path": str(checkpoint), "device": "cpu"}, "pairs": str(pairs), "output": str(output),
              "losses": [{"name": "visual"}], "trainer": trainer, "seed": 5, **more}  # fmt: skip
    RECIPE.main(config.build(RECIPE.Config, values))
    return load_file(output / "model.safetensors")


def test_a_run_on_the_fly_ends_with_the_weights_of_one_on_stored_pairs(tiny_llava, pairs, tmp_path):
    ours = recipe_run(tiny_llava, pairs, tmp_path / "a", negative={"kind": "crop"})
    theirs = recipe_run(tiny_llava, stored(pairs, tmp_path / "ic", {"kind": "crop"}, 5), tmp_path / "b")
    blanked = recipe_run(tiny_llava, pairs, tmp_path / "c", negative={"kind": "blank"})
    assert largest_difference(ours, theirs) == 0.0
    assert largest_difference(ours, blanked) > 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative": {"kind": "swap"}}, "'swap' shows a picture of another row.*prefalign run image_contrast"),
        (
            {"negative": {"kind": "crop"}, "losses": [{"name": "text"}]},
            "'crop', and no loss of this run looks at another picture",
        ),
        (
            {},
            r"`rejected_images` \(views chosen_on_rejected_image\), which is empty in 8 of the 8 pairs.*`negative.kind: crop`",
        ),
    ],
)
def test_negatives_that_cannot_be_made_are_refused_before_anything_is_loaded(settings, message, pairs, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe_run(tmp_path / "no-model", pairs, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_negative_that_no_row_needs_is_refused(pairs, tmp_path):
    folder = stored(pairs, tmp_path / "ic", {"kind": "mask"}, 0)
    with pytest.raises(
        ValueError, match="'crop', and all 8 pairs of .* have `rejected_images` already, .* with `--negative null`"
    ):
        recipe_run(tmp_path / "no-model", folder, tmp_path / "run", negative={"kind": "crop"})


def test_held_out_pairs_may_all_have_their_pictures(tiny_llava, pairs, tmp_path):
    """Only the rows to train on have to need the negative."""
    held_out = stored(pairs, tmp_path / "ic", {"kind": "mask"}, 0)
    recipe_run(tiny_llava, pairs, tmp_path / "run", negative={"kind": "crop"}, eval_pairs=str(held_out))
    assert "eval_loss" in json.loads((tmp_path / "run" / "eval_results.json").read_text())
    with pytest.raises(ValueError, match="have `rejected_images` already"):
        recipe_run(tiny_llava, held_out, tmp_path / "turned", negative={"kind": "crop"}, eval_pairs=str(pairs))


def test_stored_and_made_pictures_in_one_run_are_counted(tiny_llava, tmp_path, capsys):
    rows = [make_pair(number) if number < 3 else replace(make_pair(number), rejected_images=[]) for number in range(8)]
    write_records("test", rows, output=OutputConfig(tmp_path / "mixed"), record=Pair, settings={}, seed=0)
    recipe_run(tiny_llava, tmp_path / "mixed", tmp_path / "run", negative={"kind": "crop"})
    assert "8 pairs, 3 show the other picture stored with them, 5 one made on the fly" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "rows.json").read_text())["stored_pictures"] == 3


def test_pairs_of_one_text_are_refused_where_texts_are_compared(tiny_llava, tmp_path, capsys):
    """Pairs of an answer with itself, as image_contrast makes of prompts: refused by name for `text`, not for `visual` or SFT."""
    rows = [make_pair(number) for number in range(8)]
    same = [replace(row, rejected=row.chosen) for row in rows]
    for name, content in {"same": same, "some": [*same[:2], *rows[2:]]}.items():
        write_records("test", content, output=OutputConfig(tmp_path / name), record=Pair, settings={"n": name}, seed=0)
    with pytest.raises(
        ValueError, match="the same text in all 8 pairs of .*same, and the losses .*Add {name: visual} to `losses`"
    ):
        recipe_run(tmp_path / "no-model", tmp_path / "same", tmp_path / "run", losses=[{"name": "text"}])
    with pytest.raises(ValueError, match="the same text in all 8 pairs"):
        recipe_run(
            tmp_path / "no-model",
            tmp_path / "some",
            tmp_path / "run",
            losses=[{"name": "text"}],
            eval_pairs=str(tmp_path / "same"),
        )
    recipe_run(tiny_llava, tmp_path / "same", tmp_path / "visual")
    assert "8 pairs, all fit" in capsys.readouterr().out
    recipe_run(tiny_llava, tmp_path / "some", tmp_path / "text", losses=[{"name": "text"}])
    assert "8 pairs, 2 have one text as both answers" in capsys.readouterr().out
    settings = {"loss_type": ["sft"], "max_steps": 1, "gradient_checkpointing": False}
    recipe_run(tiny_llava, tmp_path / "same", tmp_path / "sft", losses=[{"name": "text"}], trainer=settings)


def test_rows_without_any_picture_have_nothing_to_make_one_of(tmp_path):
    folder = plain_pairs(tmp_path / "pairs", 2, images=0)
    with pytest.raises(ValueError, match=r"look at `images` \(views chosen\), which is empty in 2 of the 2 pairs"):
        recipe_run(tmp_path / "no-model", folder, tmp_path / "run", negative={"kind": "crop"})

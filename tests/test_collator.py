"""Rows to batches: equal to TRL's collator, another picture per side, image tokens never cut."""

import copy
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from prefalign.families import image_token_ids
from prefalign.images import ImageError, encode_png
from prefalign.models import ModelConfig, load_processor
from prefalign.records import Pair, assistant_message
from prefalign.report.rows import write_report
from prefalign.store import OutputConfig, write_records
from prefalign.training.collator import PreferenceCollator
from prefalign.training.documents import PromptTooLong, decode
from prefalign.training.examples import load_examples
from prefalign.training.pairs import keep_fitting, load_pairs, pairs_manifest
from tests.equality import as_row, assert_same_inputs, trl_batch
from tests.sft_runs import make_example, write_examples
from tests.tiny_vlms import picture
from tests.training_runs import make_pair, write_pairs

VISUAL = ("chosen", "chosen_on_rejected_image")


@pytest.fixture(params=["tiny_llava", "tiny_idefics3"])
def processor(request):
    return load_processor(ModelConfig(str(request.getfixturevalue(request.param)), device="cpu"))


def test_equals_trl_to_the_bit_and_edits_nothing(processor):
    rows = [as_row(make_pair(0)), as_row(make_pair(1, images=2)), as_row(make_pair(2))]
    before = copy.deepcopy(rows)
    ours, theirs = PreferenceCollator(processor)(rows), trl_batch(processor, rows)
    assert_same_inputs(ours["plain"], theirs)
    for name in ("input_ids", "attention_mask", "completion_mask"):  # what TRL's loss and metrics read
        assert torch.equal(ours[name], ours["plain"][name]), name
    assert rows == before


def test_equals_trl_when_answers_are_cut(processor):
    rows = [as_row(make_pair(0)), as_row(make_pair(1))]
    longest = max(PreferenceCollator(processor).lengths(row).prompt for row in rows)
    ours = PreferenceCollator(processor, max_length=longest + 2)(rows)
    assert ours["input_ids"].shape[1] == longest + 2
    assert_same_inputs(ours["plain"], trl_batch(processor, rows, max_length=longest + 2))


def test_each_side_shows_its_own_picture(processor):
    """Halves of the visual term's batch are what TRL makes of `images` and of `rejected_images`, tokens and pixels."""
    rows = [as_row(make_pair(0, rejected_size=(96, 30))), as_row(make_pair(1, rejected_size=(96, 30)))]
    batch = PreferenceCollator(processor, VISUAL)(rows)["plain"]
    on_images, on_rejected = trl_batch(processor, rows), trl_batch(processor, rows, side="rejected_images")
    for half, expected in ((slice(0, 2), on_images), (slice(2, 4), on_rejected)):
        for row, wanted in zip(range(*half.indices(4)), range(2), strict=True):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            assert torch.equal(ids, expected["input_ids"][wanted][expected["attention_mask"][wanted].bool()])
    pixels = batch["pixel_values"]
    half = len(pixels) // 2
    tiles_one, tiles_two = on_images["pixel_values"][:half], on_rejected["pixel_values"][:half]
    if pixels.ndim == 4:
        assert torch.equal(pixels[:half], tiles_one)
        assert torch.equal(pixels[half:], tiles_two)
    else:  # (rows, tiles, channels, height, width), padded to the most tiles
        assert torch.equal(pixels[:half, : tiles_one.shape[1]], tiles_one)
        assert torch.equal(pixels[half:, : tiles_two.shape[1]], tiles_two)
    assert not torch.equal(pixels[:half], pixels[half:])


def test_swapping_rejected_images_changes_only_the_second_half(tiny_llava: Path):
    collate = PreferenceCollator(load_processor(ModelConfig(str(tiny_llava))), VISUAL)
    row, other = as_row(make_pair(0)), as_row(make_pair(5))
    one = collate([row])["plain"]["pixel_values"]
    two = collate([{**row, "rejected_images": other["rejected_images"]}])["plain"]["pixel_values"]
    assert torch.equal(one[0], two[0])
    assert not torch.equal(one[1], two[1])


def test_rows_without_pictures_mix_with_rows_that_have_them(processor):
    rows = [as_row(make_pair(0)), as_row(make_pair(1, images=0))]
    batch = PreferenceCollator(processor)(rows)["plain"]
    alone = PreferenceCollator(processor)(rows[1:])["plain"]
    assert "pixel_values" not in alone
    ids = batch["input_ids"][1][batch["attention_mask"][1].bool()]
    assert torch.equal(ids, alone["input_ids"][0][alone["attention_mask"][0].bool()])


def test_no_image_token_is_ever_cut(processor):
    row = as_row(make_pair(0))
    collate = PreferenceCollator(processor)
    prompt = collate.lengths(row).prompt
    image_tokens = torch.tensor(image_token_ids(processor))
    whole = torch.isin(collate([row])["input_ids"][0], image_tokens).sum()
    cut = PreferenceCollator(processor, max_length=prompt + 1)([row])
    assert cut["completion_mask"].sum(dim=1).tolist() == [1, 1]
    assert torch.isin(cut["input_ids"][0], image_tokens).sum() == whole > 0
    with pytest.raises(
        PromptTooLong, match=f"row pair-0: the prompt has {prompt} tokens .* Raise max_length to {prompt + 1}"
    ):
        PreferenceCollator(processor, max_length=prompt)([row])


def test_rows_that_do_not_fit_are_counted_and_named(tiny_llava: Path, tmp_path: Path):
    """Prompts of rows 0, 3, 6 are shortest (no `now`), 2 and 5 longest; see `make_pair`."""
    dataset = load_pairs(write_pairs(tmp_path / "pairs", 8))
    processor = load_processor(ModelConfig(str(tiny_llava)))
    prompts = {row["id"]: PreferenceCollator(processor).lengths(row).prompt for row in dataset}
    longest = max(prompts.values())
    kept, fit = keep_fitting(dataset, PreferenceCollator(processor, max_length=longest))
    assert fit.too_long == {"pair-2": longest, "pair-5": longest}
    assert (fit.rows_in, fit.rows_used, fit.needed) == (8, 6, longest + 1)
    assert fit.rows_in == fit.rows_used + len(fit.too_long)
    assert kept["id"][:3] == ["pair-0", "pair-1", "pair-3"]
    assert fit.summary().startswith(
        "dropped 2 of 8 rows whose prompt and image tokens fill max_length (pair-2, pair-5)"
    )
    assert f"max_length {longest + 1} keeps all" in fit.summary()
    assert keep_fitting(dataset, PreferenceCollator(processor, max_length=fit.needed))[1].too_long == {}
    assert keep_fitting(dataset, PreferenceCollator(processor))[1].rows_used == 8
    shortest = min(prompts.values())
    with pytest.raises(ValueError, match=f"no row fits max_length 4: the shortest prompt needs {shortest + 1}"):
        keep_fitting(dataset, PreferenceCollator(processor, max_length=4))


def test_answers_that_a_cut_makes_one_text_are_counted(tiny_llava: Path, tmp_path: Path):
    """The answers of even rows differ in their last word, those of odd ones in their first."""
    rows = [replace(make_pair(0), id=f"pair-{number}") for number in range(4)]
    for number, pair in enumerate(rows):
        texts = ("{} on a red square", "a red square on {}")[number % 2 == 0]
        pair.chosen, pair.rejected = ([assistant_message(texts.format(word))] for word in ("mat", "dog"))
    write_records("test", rows, output=OutputConfig(tmp_path / "pairs"), record=Pair, settings={}, seed=0)
    dataset, processor = load_pairs(tmp_path / "pairs"), load_processor(ModelConfig(str(tiny_llava)))
    longest = max(PreferenceCollator(processor).lengths(row).prompt for row in dataset)
    _, fit = keep_fitting(dataset, PreferenceCollator(processor, max_length=longest + 3))
    assert (fit.answers_cut, fit.same_texts, fit.same_when_cut) == (4, 0, 2)
    assert "4 rows lose the end of an answer to max_length; 2 have one text as both answers once cut" in fit.summary()
    assert keep_fitting(dataset, PreferenceCollator(processor, max_length=200))[1].same_when_cut == 0
    assert keep_fitting(dataset, PreferenceCollator(processor, VISUAL, max_length=longest + 3))[1].same_when_cut == 0


def test_pictures_and_placeholders_must_agree(tiny_llava: Path):
    processor = load_processor(ModelConfig(str(tiny_llava)))
    row = as_row(make_pair(0))
    with pytest.raises(ValueError, match="row pair-0: the prompt has 1 image placeholder.* `images` holds 0 picture"):
        PreferenceCollator(processor)([{**row, "images": []}])
    with pytest.raises(ValueError, match="`rejected_images` holds 0 .*A loss term looks at rejected_images: use pairs"):
        PreferenceCollator(processor, VISUAL)([{**row, "rejected_images": []}])


def test_pictures_are_decoded_in_one_way(tmp_path: Path):
    """A phone photograph (EXIF: turn by 90 degrees), transparency over white, a file reference, what `datasets` decoded."""
    photo = picture(1, (40, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", exif=exif)
    assert decode({"bytes": buffer.getvalue(), "path": None}).size == (48, 40)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(clear).getpixel((0, 0)) == (255, 255, 255)
    assert decode(encode_png(photo)).tobytes() == photo.tobytes() == decode(photo).tobytes()
    photo.save(tmp_path / "photo.png")
    assert decode({"bytes": None, "path": str(tmp_path / "photo.png")}).tobytes() == photo.tobytes()
    assert decode(photo.convert("CMYK")).mode == "RGB"
    with pytest.raises(ImageError, match="not an image"):
        decode({"bytes": b"nothing here", "path": "x.png"})


def test_pairs_folder_is_memory_mapped_and_stays_encoded(tmp_path: Path):
    dataset = load_pairs(write_pairs(tmp_path / "pairs", 7))
    assert len(dataset) == 7
    assert dataset.cache_files
    assert dataset[6]["images"][0]["bytes"] == make_pair(6).images[0]["bytes"]
    assert pairs_manifest(tmp_path / "pairs").rows_out == 7


def test_unfinished_pairs_are_refused(tmp_path: Path):
    folder = write_pairs(tmp_path / "pairs", 2)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds no finished pairs .*start it again with the same config"):
        load_pairs(folder)


def test_a_data_file_is_no_folder_of_a_stage(tmp_path: Path):
    """Training, SFT and the report say how it is imported."""
    file = tmp_path / "my rows.jsonl"
    file.write_text("{}\n")
    readers = ((load_pairs, "pairs"), (load_examples, "examples"), (lambda path: write_report(path, tmp_path), "pairs"))
    for read, produce in readers:
        with pytest.raises(ValueError, match="is a data file") as error:
            read(file)
        command = f"import_published --data.path '{file}' --output.path 'runs/my rows' --produce {produce}`"
        assert command in str(error.value)


def test_rows_that_are_no_pairs_are_refused(tmp_path: Path):
    folder = write_examples(tmp_path / "examples", [make_example(0)])
    message = r"are no pairs: they have no .*chosen, rejected \(stage `test` wrote .*messages.*`prefalign run train_sft` trains"
    with pytest.raises(ValueError, match=message):
        load_pairs(folder)

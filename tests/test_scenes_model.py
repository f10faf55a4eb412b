"""The tiny base: tokenizer, template and checkpoint as promised, figures of the shipped weights, and the picture matters."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from prefalign.scenes import base_checkpoint, build, data, language, measure, model, vision, world

SAMPLE = 128
STAR = "There is a large red star at the top left."


@pytest.fixture(scope="module")
def maker():
    return AutoProcessor.from_pretrained(base_checkpoint(), backend="pil")


@pytest.fixture(scope="module")
def base():
    return AutoModelForImageTextToText.from_pretrained(base_checkpoint(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def fair(base, maker):
    return measure.half(base, maker, "test_fair", SAMPLE)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, prefalign.scenes; assert not {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_word_of_the_world_is_one_token_where_the_template_puts_it(maker):
    words = maker.tokenizer

    def parts(text):
        for place in world.PLACES:
            text = text.replace(place, place.replace(" ", "-"))
        return len(text.replace(".", " .").replace(",", " ,").replace("?", " ?").split())

    for picture in world.scenes("test_fair", 0, 40):
        asked = language.questions(picture)
        for text in [
            language.caption(picture),
            language.description(picture),
            *(question.answer for question in asked),
        ]:
            assert len(words.tokenize(f" {text}")) == parts(text), text
        for question in asked:  # after a picture's newline
            assert len(words.tokenize(f"\n{question.text}")) == 1 + parts(question.text), question.text


@pytest.mark.parametrize(
    "text", ["Hello,  world!\n\tTwo  spaces .", "na\u00efve \u65e5\u672c \U0001f600", " leading", "x </s> y"]
)
def test_any_text_encodes_and_decodes_exactly(maker, text):
    assert maker.tokenizer.decode(maker.tokenizer(text).input_ids) == text


def test_special_tokens_are_distinct_and_the_tokenizer_is_reproducible(maker):
    words = maker.tokenizer
    named = [words.pad_token_id, words.bos_token_id, words.eos_token_id, words.convert_tokens_to_ids("<image>")]
    assert sorted(named) == [0, 1, 2, 3]
    assert words.get_vocab() == model.tokenizer().get_vocab()


def test_chat_template_is_llava_s_for_blocks_strings_several_images_and_open_turns(maker):
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": STAR}]}
    prompt = "<s>USER: <image>\nDescribe the picture. ASSISTANT:"

    def render(messages, **options):
        return maker.apply_chat_template(messages, tokenize=False, **options)

    assert render([asked], add_generation_prompt=True) == prompt
    assert render([asked, said]) == f"{prompt} {STAR}</s>"
    assert render([asked, said], continue_final_message=True) == f"{prompt} {STAR}"
    plain = [{"role": "user", "content": "<image>\nDescribe the picture."}, {"role": "assistant", "content": STAR}]
    assert render(plain) == f"{prompt} {STAR}</s>"
    assert render(plain, continue_final_message=True) == f"{prompt} {STAR}"
    assert render(measure.chat("Which?", 2)) == "<s>USER: <image>\n<image>\nWhich? "
    assert render([{"role": "system", "content": "Be brief."}, asked, said, asked], add_generation_prompt=True) == (
        f"<s>Be brief. {prompt[3:]} {STAR}</s>{prompt[3:]}"
    )


def test_the_answer_mask_covers_the_answer_and_its_end(maker):
    asked = {"role": "user", "content": [{"type": "text", "text": "Describe the picture."}]}
    given = maker.tokenizer.apply_chat_template(
        [asked, {"role": "assistant", "content": [{"type": "text", "text": STAR}]}],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    kept = [token for token, own in zip(given["input_ids"], given["assistant_masks"], strict=True) if own]
    assert maker.tokenizer.decode(kept).strip() == f"{STAR}</s>"


@pytest.mark.parametrize("images", [0, 1, 2])
def test_training_rows_are_what_template_and_processor_write(maker, images):
    turns = [("Is there a star?", "Yes."), ("Where is it?", "At the top.")]
    messages = []
    for number, (asked, answer) in enumerate(turns):
        messages += measure.chat(asked, images if number == 0 else 0)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = maker.apply_chat_template(messages, tokenize=False)
    pictures = [Image.new("RGB", (60, 60))] * images
    given = maker(images=[pictures] if images else None, text=[text], return_tensors="pt")
    ids, labels = build.encode(maker.tokenizer, turns, images)
    assert given["input_ids"][0].tolist() == ids
    kept = [label for label in labels if label != build.IGNORE]
    assert maker.tokenizer.decode(kept) == " Yes.</s> At the top.</s>"


def test_training_pixels_are_the_processor_s(maker):
    image = np.asarray(world.draw(world.scene("train_biased", 0)))
    row = build.Row([5], [5], [0], [])
    ours = build.batch([row], image[None], pad=0)["pixel_values"]
    theirs = maker(images=[Image.fromarray(image)], text=["<image>"], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs)


def test_training_rows_hide_all_some_or_no_image_tokens_or_have_no_picture(maker):
    rng = random.Random(0)
    rows = [build.training_row(maker.tokenizer, rng, asks, 50) for asks in (False, True) for _ in range(150)]
    shares = [len(row.hidden) / (model.IMAGE_TOKENS * len(row.pictures)) for row in rows if row.pictures]
    assert 0.03 < sum(not row.pictures for row in rows) / len(rows) < 0.15
    assert 0.07 < sum(share == 1.0 for share in shares) / len(shares) < 0.25
    assert any(0.2 < share < 1.0 for share in shares)
    assert sum(share == 0.0 for share in shares) / len(shares) > 0.6
    inputs = build.batch(rows[:8], np.zeros((50, 60, 60, 3), np.uint8), pad=0)
    hidden = inputs["attention_mask"] == 0
    assert (inputs["labels"][hidden] == build.IGNORE).all()
    assert inputs["position_ids"].tolist() == [list(range(inputs["input_ids"].shape[1]))] * 8


def test_the_learning_rate_warms_up_holds_and_decays():
    rates = [build.rate(step, 900) for step in (0, build.WARM_UP, 539, 720, 899)]
    assert rates == pytest.approx([1 / build.WARM_UP, 1.0, 1.0, 0.51, 0.02], abs=0.01)


def test_vision_labels_say_what_stands_where():
    picture = world.scene("train_biased", 1)
    told = vision.labels(picture)
    for place, (shape, colour, size) in zip(world.PLACES, told, strict=True):
        things = [thing for thing in picture.objects if thing.place == place]
        if not things:
            assert (shape, colour, size) == (len(world.SHAPES), vision.IGNORE, vision.IGNORE)
        else:
            assert world.SHAPES[shape] == things[0].shape
            assert list(world.COLOURS)[colour] == things[0].colour
            assert list(world.SIZES)[size] == things[0].size


def test_every_weight_is_trained_by_one_optimizer(maker):
    untrained = model.untrained(maker.tokenizer)
    groups = [group["params"] for optimizer in build.optimizers_for(untrained) for group in optimizer.param_groups]
    ours = [id(weight) for group in groups for weight in group]
    assert sorted(ours) == sorted(id(weight) for weight in untrained.parameters())


def test_the_warm_up_reads_places_shapes_colours_and_sizes_as_words(maker):
    untrained = model.untrained(maker.tokenizer)
    places, what = vision.directions(untrained, maker.tokenizer)
    tokens = torch.zeros(1, vision.GRID**2, model.WIDTH)
    tokens[0, vision.token_places() == 4] = places[4] + what[0][2] + what[1][1] + what[2][0]
    shape, colour, size = vision.read(tokens, what)
    assert (shape[0, 4].argmax(), colour[0, 4].argmax(), size[0, 4].argmax()) == (2, 1, 0)
    assert shape[0, 0].abs().max() == 0
    assert (tokens[0] @ places.T)[vision.token_places() == 4].argmax(-1).eq(4).all()


def test_a_build_of_two_steps_leaves_a_checkpoint_with_its_card(tmp_path):
    found = build.build(tmp_path, steps=2, vision_steps=2, pictures=8, sample=4)
    card = (tmp_path / "README.md").read_text()
    assert measure.table(found) in card
    assert "prefalign scenes build" in card
    AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="steps=0: the base needs at least one training step"):
        build.build(tmp_path, steps=0)


def test_the_shipped_checkpoint_has_hub_names_half_precision_and_is_small():
    folder = base_checkpoint()
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        kinds = {file.get_slice(name).get_dtype() for name in names}
    roots = ("vision_tower.vision_model.", "language_model.model.", "language_model.lm_head.", "multi_modal_projector.")
    assert all(name.startswith(roots) for name in names)
    assert kinds == {"F16"}
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    config = json.loads((folder / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        assert config[part]["hidden_size"] // config[part]["num_attention_heads"] == 64
    assert config["text_config"]["max_position_embeddings"] >= 2048
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_saving_again_keeps_hub_names(base, maker, tmp_path):
    base.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "vision_tower.vision_model.pre_layrnorm.weight" in set(file.keys())


def test_the_base_is_grounded_and_hallucinates_where_its_prior_fails(base, maker, fair):
    biased = measure.half(base, maker, "test_biased", SAMPLE)
    assert fair["recall_clear"] >= 0.78
    assert 0.10 <= fair["chair_i"] <= 0.32
    assert fair["chair_i"] >= 1.2 * biased["chair_i"]
    assert fair["companions"] > 0.5
    assert fair["companions"] > fair["companions_by_chance"] + 0.1
    assert fair["fluent"] >= 0.95


def test_the_base_is_fluent_when_blind_greedy_and_sampled(base, maker):
    pictures = [world.scene("test_fair", index) for index in range(SAMPLE // 2)]
    asked = [measure.PROMPT] * len(pictures)
    for sample in (False, True):
        torch.manual_seed(0)
        said = measure.answers(base, maker, pictures, asked, blind=True, sample=sample)
        assert measure.captioned(pictures, said)["fluent"] >= 0.95


def test_the_picture_matters(base, maker):
    pictures = [world.scene("test_fair", index) for index in range(24)]
    said = measure.answers(base, maker, pictures, [measure.PROMPT] * 24)
    assert len(set(said)) >= 20
    own, other = (measure.captioned(side, said)["recall"] for side in (pictures, pictures[1:] + pictures[:1]))
    assert own > other + 0.15


def test_swapping_the_picture_changes_the_log_prob_of_its_caption(base, maker):
    pictures = [world.scene("test_fair", index) for index in range(16)]
    pixels = np.stack([np.asarray(world.draw(picture)) for picture in pictures])

    def loss(shift):
        rows = []
        for at, picture in enumerate(pictures):
            ids, labels = build.encode(maker.tokenizer, [(measure.PROMPT, language.caption(picture))], 1)
            rows.append(build.Row(ids, labels, [(at + shift) % 16], []))
        with torch.inference_mode():
            total, number = build.loss_of(base, build.batch(rows, pixels, 0))
        return float(total) / number

    assert loss(1) > loss(0) + 0.3


def test_colours_are_answered_from_the_picture(base, maker):
    asked = []
    for picture in world.scenes("test_fair", 0, SAMPLE):
        question = next((question for question in language.questions(picture) if question.kind == "colour"), None)
        if question is not None:
            asked.append((picture, question))
    pictures, questions = zip(*asked, strict=True)

    def right(shown):
        said = measure.answers(base, maker, shown, [question.text for question in questions], most_tokens=16)
        return sum(question.label in text.lower() for question, text in zip(questions, said, strict=True)) / len(said)

    assert right(list(pictures)) > 0.3
    assert right(list(pictures)) > right([*pictures[1:], pictures[0]]) + 0.1


def test_captioned_counts_by_hand():
    picture = world.scene("test_fair", 0)
    shapes = sorted(picture.shapes)
    absent = next(shape for shape in world.SHAPES if shape not in shapes and world.COMPANIONS[shape] in shapes)
    found = measure.captioned([picture], [f"There is a {shapes[0]}. There is a {absent} at the top. No blue {absent}."])
    assert found["chair_i"] == 0.5
    assert found["recall"] == 1 / len(shapes)
    assert found["companions"] == 1.0
    assert found["objects"] == 2.0
    assert found["fluent"] == pytest.approx(1 / 3)


def test_measuring_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json, so there is no checkpoint to measure"):
        measure.figures(tmp_path)


def test_the_seen_regime_is_exactly_what_the_base_saw():
    assert len(list(data.rows("caption", regime="seen", start=data.BASE_PICTURES - 1))) == 1

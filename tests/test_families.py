"""What differs between families, for those that need no torchvision (the others: tests/families)."""

from pathlib import Path

import pytest
import torch
import transformers
from tiny_vlms import PLAIN, picture, save_tiny

from prefalign import families
from prefalign.models import ModelConfig, load_model, load_processor
from prefalign.records import assistant_message, user_message

CHAT = tuple(name for name in PLAIN if name != "paligemma")


@pytest.fixture(scope="module", params=PLAIN)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture
def processor(checkpoint: Path):
    return load_processor(ModelConfig(str(checkpoint)))


def _asked(processor, text: str = "What is it?", images: int = 1):
    messages = [user_message(text, images)]
    pictures = [[picture(seed) for seed in range(images)]]
    rendered = families.render(processor, messages)
    return processor(text=[rendered], images=pictures, add_special_tokens=False, return_tensors="pt")


def test_image_tokens_are_as_many_as_the_features(checkpoint: Path, processor) -> None:
    model = load_model(ModelConfig(str(checkpoint)))
    batch = _asked(processor, images=2)
    mask = families.image_token_mask(batch["input_ids"], model.config)
    features = model.get_image_features(
        **{
            key: value for key, value in batch.items() if key in ("pixel_values", "image_sizes", "pixel_attention_mask")
        },
        return_dict=True,
    ).pooler_output
    rows = sum(
        part.reshape(-1, part.shape[-1]).shape[0]
        for part in (features if not torch.is_tensor(features) else [features])
    )
    assert mask.sum() == rows > 0
    assert families.family(model.config) == checkpoint.name


def test_marks_are_banned_and_ends_are_not(checkpoint: Path, processor) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    banned = processor.tokenizer.convert_ids_to_tokens(families.banned_token_ids(processor, config))
    assert {"<pad>", "<bos>"} < set(banned)
    visual = {token for token in processor.tokenizer.get_vocab() if "image" in token and token.startswith("<")}
    assert visual <= set(banned)
    assert "<eos>" not in banned
    assert "." not in banned
    ends = processor.tokenizer.convert_ids_to_tokens(families.end_token_ids(processor))
    closing = {"idefics3": "<end_of_utterance>", "gemma3": "<end_of_turn>"}.get(checkpoint.name, "<eos>")
    assert set(ends) == {"<eos>", closing}


def test_padding_that_also_ends_a_turn_may_be_sampled(tiny_llava: Path) -> None:
    processor = load_processor(ModelConfig(str(tiny_llava)))
    config = transformers.AutoConfig.from_pretrained(tiny_llava)
    processor.tokenizer.pad_token = "<eos>"
    assert processor.tokenizer.eos_token_id not in families.banned_token_ids(processor, config)


def test_positions_ignore_the_padding_side(checkpoint: Path, processor) -> None:
    model = load_model(ModelConfig(str(checkpoint)))
    for mask, expected in (([0, 0, 1, 1, 1], [0, 0, 0, 1, 2]), ([1, 1, 1, 0, 0], [0, 1, 2, 2, 2])):
        batch = {"input_ids": torch.full((1, 5), 9), "attention_mask": torch.tensor([mask])}
        assert families.position_ids(model, batch).tolist() == [expected]


RENDERED = {
    "llava": "<bos>USER: <image>\nWhat is it? ASSISTANT:",
    "llava_next": "<bos>USER: <image>\nWhat is it? ASSISTANT:",
    "idefics3": "<bos>User:<image>What is it?<end_of_utterance>\nAssistant:",
    "gemma3": "<bos><start_of_turn>user\n<start_of_image>What is it?<end_of_turn>\n<start_of_turn>model\n",
    "paligemma": "<image>What is it?",
}


def test_the_open_turn_of_every_template(checkpoint: Path, processor) -> None:
    """Frozen: what the models read."""
    messages = [user_message("What is it?", 1)]
    opened = families.render(processor, messages)
    assert opened == RENDERED[checkpoint.name]
    blank = " " if checkpoint.name in ("llava", "llava_next", "idefics3") else ""
    for prefix in ("A red", "A red ", "A red \n"):
        assert families.render(processor, messages, prefix) == f"{opened}{blank}A red"
    assert families.render(processor, messages, "  ") == opened


def test_turns_and_pictures_stay_in_place(tiny_llava: Path, tiny_idefics3: Path) -> None:
    messages = [user_message("One.", 1), assistant_message("Yes."), user_message("Two.", 2)]
    expected = {
        tiny_llava: "<bos>USER: <image>\nOne. ASSISTANT: Yes.<eos>USER: <image>\n<image>\nTwo. ASSISTANT:",
        tiny_idefics3: "<bos>User:<image>One.<end_of_utterance>\nAssistant: Yes.<end_of_utterance>\n"
        "User:<image><image>Two.<end_of_utterance>\nAssistant:",
    }
    for folder, text in expected.items():
        assert families.render(load_processor(ModelConfig(str(folder))), messages) == text


def test_a_prefix_that_a_template_cuts_is_still_there(tiny_llava: Path) -> None:
    """A template that drops old answers' thoughts opens the turn with a mark that a finished answer lacks."""
    processor = load_processor(ModelConfig(str(tiny_llava)))
    processor.chat_template = processor.chat_template.replace("{{ 'ASSISTANT:' }}", "{{ 'ASSISTANT:<think>' }}")
    assert families.render(processor, [user_message("Q")], "A red").endswith("ASSISTANT:<think>A red")


def test_the_split_is_that_of_trl(checkpoint: Path, processor) -> None:
    from trl.data_utils import apply_chat_template

    messages = [user_message("What is it?", 1)]
    for answer in ("A red dog.", "It costs 3.5. Yes", "Two\nlines"):
        row = {"prompt": messages, "chosen": [assistant_message(answer)], "rejected": [assistant_message("No.")]}
        theirs = apply_chat_template(row, processor)
        assert families.render_answer(processor, messages, answer) == (theirs["prompt"], theirs["chosen"])
        assert theirs["chosen"].strip() != answer  # a turn is closed


def test_a_prefix_counts_as_prompt(tiny_llava: Path) -> None:
    processor = load_processor(ModelConfig(str(tiny_llava)))
    messages = [user_message("Q")]
    prompt, completion = families.render_answer(processor, messages, " red dog.", "There is a")
    assert (prompt, completion) == ("<bos>USER: Q ASSISTANT: There is a", " red dog.<eos>")
    assert families.render_answer(processor, messages, "red dog.", "There is a ") == (prompt, completion)


@pytest.mark.parametrize("name", CHAT)
def test_expanded_lengths_are_known_before_reading(name: str, tmp_path: Path) -> None:
    processor = load_processor(ModelConfig(str(save_tiny(name, tmp_path))))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    sizes = [(48, 40), (30, 90)]
    for size, count in zip(sizes, families.image_lengths(processor, sizes), strict=True):
        text = families.render(processor, [user_message("Q", 1)])
        batch = processor(text=[text], images=[[picture(0, (size[1], size[0]))]], return_tensors="pt")
        assert abs(int(families.image_token_mask(batch["input_ids"], config).sum()) - count) <= count // 2


def test_errors(tiny_llava: Path) -> None:
    with pytest.raises(ValueError, match=r"a model of type 'llama' has no image token in its config"):
        families.family(transformers.LlamaConfig())
    with pytest.raises(ValueError, match=r"'bert' has no image token"):
        families.image_token_ids(transformers.BertConfig())
    processor = load_processor(ModelConfig(str(tiny_llava)))
    processor.chat_template = None
    with pytest.raises(ValueError, match="the LlavaProcessor of this checkpoint has no chat template"):
        families.render(processor, [user_message("Q")])


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision"),
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.visual.deepstack_merger_list.0.norm.weight", "projector"),
        ("base_model.model.model.visual.blocks.1.attn.qkv.lora_A.default.weight", "vision"),
        ("model.multi_modal_projector.linear_1.weight", "projector"),
        ("model.connector.modality_projection.proj.weight", "projector"),
        ("model.image_newline", "projector"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model"),
        ("model.text_model.layers.0.self_attn.q_proj.weight", "language_model"),
        ("lm_head.weight", "language_model"),
    ],
)
def test_towers_by_name(name: str, tower: str) -> None:
    assert families.tower(name) == tower

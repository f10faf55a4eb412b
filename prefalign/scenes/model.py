"""The tiny VLM of the embedded world: LLaVA architecture, byte-level tokenizer, processor and chat template, from nothing.

The 60x60 pixels of a picture become 6x6 = 36 image tokens. Every word of the world is one token; any other text still encodes.
Weights are saved under the Hub's LLaVA names (`vision_tower.vision_model.*`), which transformers and vLLM both load.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from prefalign.scenes import language
from prefalign.scenes.world import COLOURS, PIXELS, PLACES, SHAPES, SIZES, scenes

PATCH = 10  # a place of the 3x3 grid is 2x2 patches
IMAGE_TOKENS = (PIXELS // PATCH) ** 2
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
WIDTH, HEADS, LAYERS = 128, 2, 4  # heads of 64, which vLLM supports
WORD_SIZE = 0.15  # standard deviation of word embeddings at the start: small beside what attention adds
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}{% for block in message['content'] %}{{ block['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for block in message['content'] %}{{ block['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ 'USER: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ block['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_HUB, _OURS = "vision_tower.vision_model.", "vision_tower."


def corpus() -> list[str]:
    """The text the tokenizer is trained on: every word of the world, alone and capitalised, and a sample of what is said."""
    words = [*SHAPES, *COLOURS, *SIZES, *language.NUMBERS, *" ".join(PLACES).split()]
    words += [word for forms in language.SYNONYMS.values() for word in forms]
    words += ["first", "second", "both", "neither", "pictures", "which", "assistant", "user"]
    lines = [f"{word} {word}\n{word.capitalize()} {word.capitalize()}" for word in words]
    prompts = [*language.CAPTION_PROMPTS, *language.DESCRIPTION_PROMPTS]
    lines += [f"USER: {IMAGE}\n{prompt} ASSISTANT: {prompt}" for prompt in prompts]
    for picture in scenes("train_biased", 0, 400):
        lines += [language.caption(picture), language.description(picture)]
        lines += [f"{asked.text}\n{asked.text} ASSISTANT: {asked.answer}" for asked in language.questions(picture)]
    return lines * 2


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges run until every word of `corpus` is one token; a place of two words is one token too."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )
    fast.add_tokens([AddedToken(f" {place}", normalized=False) for place in PLACES if " " in place])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def processor() -> LlavaProcessor:
    """The LLaVA processor: any picture is brought to 60x60 RGB, pixels to -1..1, `<image>` to 36 image tokens."""
    words = tokenizer()
    size = {"height": PIXELS, "width": PIXELS}
    pictures = CLIPImageProcessorPil(
        size=size,
        crop_size=size,
        do_center_crop=False,
        do_convert_rgb=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        pictures,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def config(words: PreTrainedTokenizerFast) -> LlavaConfig:
    """The model's config for this tokenizer."""
    ids = {name: words.convert_tokens_to_ids(token) for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS))}
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=PIXELS,
        patch_size=PATCH,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        tie_word_embeddings=False,
    )


def untrained(words: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """The model with random float32 weights drawn from `seed`, of sizes that suit so narrow a model.

    Attention starts out mimetic (Trockman and Kolter, arXiv 2305.09828): queries meet keys that are like them, and what is
    attended to is passed on as it is.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config(words))
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            torch.nn.init.normal_(weight, std=0.02 if "embed" in name else weight[0].numel() ** -0.5)
    language_model = model.model.language_model
    torch.nn.init.normal_(language_model.embed_tokens.weight, std=WORD_SIZE)
    model.lm_head.weight.data = language_model.embed_tokens.weight.data * (WIDTH**-0.5 / WORD_SIZE)
    for layer in language_model.layers:
        layer.self_attn.q_proj.weight.data *= 0.8
        layer.self_attn.k_proj.weight.data = layer.self_attn.q_proj.weight.data.clone()
        layer.self_attn.o_proj.weight.data = layer.self_attn.v_proj.weight.data.T.contiguous()
        layer.mlp.down_proj.weight.data *= (2 * LAYERS) ** -0.5
    model.model.multi_modal_projector.linear_2.weight.data *= 0.2
    patches = model.model.vision_tower.embeddings
    torch.nn.init.normal_(patches.patch_embedding.weight, std=patches.patch_embedding.weight[0].numel() ** -0.5)
    patches.position_embedding.weight.data[1:] = 0.5 * _waves(PIXELS // PATCH)
    model.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
    )
    return model


def _waves(side: int) -> torch.Tensor:
    """Sines and cosines of row and column for a grid of patches, (side * side, WIDTH): neighbours start out alike."""
    speeds = math.pi / 2 ** torch.linspace(0, math.log2(side) + 1, WIDTH // 4)
    turns = torch.arange(side)[:, None] * speeds
    line = torch.cat([turns.sin(), turns.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, WIDTH)


def save(
    model: LlavaForConditionalGeneration, maker: LlavaProcessor, output: Path, dtype: torch.dtype = torch.float16
) -> None:
    """Write config, weights (cast to `dtype`, Hub names), processor, tokenizer and chat template. The model stays as it is."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to(dtype) for name, value in model.state_dict().items()}
    model.save_pretrained(output, state_dict=weights)
    maker.save_pretrained(output)
    file = output / "model.safetensors"
    named = {_hub_name(name): value.to(dtype).contiguous() for name, value in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})
    file.chmod(0o644)
    stored = LlavaConfig.from_pretrained(output)
    stored.dtype = stored.text_config.dtype = stored.vision_config.dtype = str(dtype).removeprefix("torch.")
    stored.architectures = ["LlavaForConditionalGeneration"]
    stored.save_pretrained(output)


def _hub_name(name: str) -> str:
    if name.startswith(_OURS) and not name.startswith(_HUB):
        return _HUB + name.removeprefix(_OURS)
    return name

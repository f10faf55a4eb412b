"""Tiny random vision-language models, each saved as a checkpoint folder with its processor: `save_tiny("llava", folder)`.

Chat templates are those of the real families, shortened. `PLAIN` need nothing beyond pillow; `WITH_VIDEO` have a video processor,
which needs torchvision.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers as T
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PLAIN = ("llava", "llava_next", "idefics3", "gemma3", "paligemma")
WITH_VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")

_CORPUS = [
    "the quick brown fox jumps over the lazy dog. There is a large red circle at the top left.",
    "What is in the image? A red square on a blue background. Describe the picture in detail.",
    "USER: ASSISTANT: user assistant system model 0123456789 How many objects are there? Yes. No.",
] * 50

_ROLE_LOOP = "{% for message in messages %}"
_BLOCKS = (
    "{{% if message['content'] is string %}}{{{{ message['content'] }}}}{{% else %}}{{% for block in message['content'] %}}"
    "{{% if block['type'] == 'image' %}}{{{{ '{image}' }}}}{{% elif block['type'] == 'text' %}}{{{{ block['text'] }}}}"
    "{{% endif %}}"
    "{{% endfor %}}{{% endif %}}"
)


def _vicuna(image: str) -> str:
    """LLaVA-1.5: no begin-of-sequence in the template, the tokenizer adds it."""
    return (
        _ROLE_LOOP + "{% if message['role'] == 'system' %}" + _BLOCKS.format(image=image) + "{{ ' ' }}"
        "{% elif message['role'] == 'user' %}{{ 'USER: ' }}" + _BLOCKS.format(image=image + r"\n") + "{{ ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' }}" + _BLOCKS.format(image=image) + "{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )


def _chatml(image: str) -> str:
    """Qwen-VL, LLaVA-OneVision, InternVL."""
    return (
        _ROLE_LOOP
        + r"{{ '<|im_start|>' + message['role'] + '\n' }}"
        + _BLOCKS.format(image=image)
        + r"{{ '<|im_end|>\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def _idefics(image: str) -> str:
    """Idefics3 and SmolVLM: `User:` followed by a blank unless a picture comes first."""
    return (
        "{{ bos_token }}" + _ROLE_LOOP + "{{ message['role'] | capitalize }}"
        "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
        + _BLOCKS.format(image=image)
        + r"{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )


def _gemma(image: str) -> str:
    """Gemma3: the assistant is called `model`, and text is trimmed."""
    blocks = _BLOCKS.format(image=image).replace("block['text']", "block['text'] | trim")
    return (
        "{{ bos_token }}"
        + _ROLE_LOOP
        + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        r"{{ '<start_of_turn>' + role + '\n' }}" + blocks + r"{{ '<end_of_turn>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )


def _plain(image: str) -> str:
    """PaliGemma has no turns: picture, question, newline (added by the processor), answer."""
    return (
        _ROLE_LOOP
        + _BLOCKS.format(image=image)
        + "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )


def _tokenizer(
    extra: list[str], chat_template: str, named: dict[str, str] | None = None, *, eos: str = "<eos>", bos: bool = False
):
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"] + [token for token in extra if token not in ("<pad>", "<bos>", "<eos>")]
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
        )
    fast = T.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=eos,
        bos_token="<bos>",
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens=named or {},
    )
    fast.chat_template = chat_template
    return fast


def _text(tokenizer, **more) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
_STEPS = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def _clip():
    return T.CLIPVisionConfig(**_VISION, image_size=28, patch_size=14, projection_dim=32)


def _siglip(patch: int = 14, **more):
    return T.SiglipVisionConfig(**_VISION, image_size=28, patch_size=patch, vision_use_head=False, **more)


def _llava():
    words = _tokenizer(["<image>"], _vicuna("<image>"), {"image_token": "<image>"}, bos=True)
    pictures = T.CLIPImageProcessorPil(**_CROP)
    processor = T.LlavaProcessor(pictures, words, **_STEPS, chat_template=words.chat_template)
    config = T.LlavaConfig(
        vision_config=_clip(),
        text_config=T.LlamaConfig(**_text(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_seq_length=4,
    )
    return processor, T.LlavaForConditionalGeneration, config


def _llava_next():
    words = _tokenizer(["<image>"], _vicuna("<image>"), {"image_token": "<image>"}, bos=True)
    grid = [[28, 56], [56, 28], [56, 56]]
    pictures = T.LlavaNextImageProcessorPil(**_CROP, image_grid_pinpoints=grid)
    processor = T.LlavaNextProcessor(pictures, words, **_STEPS, chat_template=words.chat_template)
    config = T.LlavaNextConfig(
        vision_config=_clip(),
        text_config=T.LlamaConfig(**_text(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    return processor, T.LlavaNextForConditionalGeneration, config


def _llava_onevision():
    words = _tokenizer(["<|im_start|>", "<|im_end|>", "<image>", "<video>"], _chatml("<image>"), eos="<|im_end|>")
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    processor = T.LlavaOnevisionProcessor(
        T.LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=grid),
        words,
        T.LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=words.chat_template,
    )
    config = T.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=T.Qwen2Config(**_text(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    return processor, T.LlavaOnevisionForConditionalGeneration, config


def _qwen(version: str):
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    template = _chatml("<|vision_start|><|image_pad|><|vision_end|>")
    words = _tokenizer(["<|im_start|>", "<|im_end|>", *marks], template, eos="<|im_end|>")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(names, words.convert_tokens_to_ids(marks), strict=True))
    patch = 16 if version == "3" else 14
    pictures = T.Qwen2VLImageProcessorPil(min_pixels=(2 * patch) ** 2, max_pixels=(4 * patch) ** 2, patch_size=patch)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision: dict = {"depth": 2, "num_heads": 4, "patch_size": patch}
    if version == "2":
        processor = T.Qwen2VLProcessor(pictures, words, T.Qwen2VLVideoProcessor(), chat_template=words.chat_template)
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        config = T.Qwen2VLConfig(text_config=_text(words, rope_parameters=rope), vision_config=vision, **ids)
        return processor, T.Qwen2VLForConditionalGeneration, config
    vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    if version == "2.5":
        processor = T.Qwen2_5_VLProcessor(pictures, words, T.Qwen2VLVideoProcessor(), chat_template=words.chat_template)
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        config = T.Qwen2_5_VLConfig(text_config=_text(words, rope_parameters=rope), vision_config=vision, **ids)
        return processor, T.Qwen2_5_VLForConditionalGeneration, config
    processor = T.Qwen3VLProcessor(pictures, words, T.Qwen3VLVideoProcessor(), chat_template=words.chat_template)
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = _text(words, head_dim=16, rope_parameters={**rope, "mrope_interleaved": True})
    config = T.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    return processor, T.Qwen3VLForConditionalGeneration, config


_TILES = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
_TILES += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_TILE_SIZES = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}


def _tiled(config_class, words):
    return config_class(
        vision_config={**_VISION, "image_size": 28, "patch_size": 7},
        text_config=T.LlamaConfig(**_text(words)),
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )


def _idefics3():
    words = _tokenizer(_TILES, _idefics("<image>"))
    pictures = T.Idefics3ImageProcessorPil(**_TILE_SIZES)
    processor = T.Idefics3Processor(pictures, words, image_seq_len=4, chat_template=words.chat_template)
    return processor, T.Idefics3ForConditionalGeneration, _tiled(T.Idefics3Config, processor.tokenizer)


def _smolvlm():
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    }
    words = _tokenizer([*_TILES, "<video>"], _idefics("<image>"), named)
    processor = T.SmolVLMProcessor(
        T.SmolVLMImageProcessorPil(**_TILE_SIZES),
        words,
        T.SmolVLMVideoProcessor(),
        image_seq_len=4,
        chat_template=words.chat_template,
    )
    return processor, T.SmolVLMForConditionalGeneration, _tiled(T.SmolVLMConfig, processor.tokenizer)


def _internvl():
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = _tokenizer(
        ["<|im_start|>", "<|im_end|>", *named.values()], _chatml(r"<IMG_CONTEXT>\n"), named, eos="<|im_end|>"
    )
    processor = T.InternVLProcessor(
        T.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4),
        words,
        T.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=words.chat_template,
    )
    config = T.InternVLConfig(
        vision_config={**_VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config=T.Qwen2Config(**_text(words)),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return processor, T.InternVLForConditionalGeneration, config


def _paligemma():
    words = _tokenizer(["<image>"], _plain("<image>"))
    pictures = T.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    pictures.image_seq_length = 4
    processor = T.PaliGemmaProcessor(pictures, words, chat_template=words.chat_template)
    token = processor.image_token_id
    config = T.PaliGemmaConfig(
        vision_config=_siglip(projection_dim=64),
        text_config=T.GemmaConfig(**_text(processor.tokenizer, head_dim=16)),
        image_token_index=token,
        image_token_id=token,
        projection_dim=64,
        hidden_size=64,
    )
    return processor, T.PaliGemmaForConditionalGeneration, config


def _gemma3():
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = _tokenizer(["<start_of_turn>", "<end_of_turn>", *named.values()], _gemma("<start_of_image>"), named)
    processor = T.Gemma3Processor(
        T.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        words,
        chat_template=words.chat_template,
        image_seq_length=4,
    )
    boi, eoi, image = words.convert_tokens_to_ids(list(named.values()))
    config = T.Gemma3Config(
        vision_config=_siglip(7),
        text_config=T.Gemma3TextConfig(**_text(words, head_dim=16, sliding_window=512)),
        mm_tokens_per_image=4,
        boi_token_index=boi,
        eoi_token_index=eoi,
        image_token_id=image,
        image_token_index=image,
    )
    return processor, T.Gemma3ForConditionalGeneration, config


BUILDERS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": lambda: _qwen("2"),
    "qwen2_5_vl": lambda: _qwen("2.5"),
    "qwen3_vl": lambda: _qwen("3"),
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "paligemma": _paligemma,
    "gemma3": _gemma3,
}


def save_tiny(name: str, folder: str | Path, seed: int = 0, *, wide: bool = False) -> Path:
    """Write a random checkpoint of a family with its processor.

    Weights are drawn wide (four times the usual width in the matrices), so that a picture moves the answer well above rounding.
    `wide` (llava, qwen2_5_vl): two heads of 64, the smallest that vLLM computes on a CPU.
    """
    folder = Path(folder)
    processor, model_class, config = BUILDERS[name]()
    if wide:
        _widen(config)
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() >= 2 and "embed" not in key:
                weight.mul_(4.0)
            if weight.dim() >= 2 and not weight.any():  # Gemma3's projector begins at zero: blind
                weight.normal_(std=0.2)
    model.generation_config = T.GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if name == "llava":
        _rename_as_on_the_hub(folder / "model.safetensors")
    return folder


def _widen(config) -> None:
    text = config.text_config
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 128, 2, 1
    if hasattr(text, "head_dim"):
        text.head_dim = 64
    if config.model_type == "qwen2_5_vl":
        config.vision_config.out_hidden_size = 128
        text.rope_parameters["mrope_section"] = [8, 12, 12]


def picture(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """A picture of noise, (width, height)."""
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def _rename_as_on_the_hub(file: Path) -> None:
    """transformers 5 saves a fresh LLaVA as `vision_tower.*`; the Hub and vLLM say `vision_tower.vision_model.*`."""
    ours, hub = "vision_tower.", "vision_tower.vision_model."
    named = {
        hub + key.removeprefix(ours) if key.startswith(ours) and not key.startswith(hub) else key: value
        for key, value in load_file(file).items()
    }
    save_file(named, file, metadata={"format": "pt"})

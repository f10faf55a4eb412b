"""What differs between families of vision-language models, read off the config, the processor and the tokenizer.

Legend of shapes: `B` rows of a batch, `T` tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefalign.records import Message, assistant_message

if TYPE_CHECKING:
    import torch

TESTED = {
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
    "internvl": "InternVL",
    "paligemma": "PaliGemma",
    "gemma3": "Gemma3",
}
"""`model_type` to name of the families that the tests run."""

TOWERS = ("vision", "projector", "language_model")

_PROJECTOR = re.compile(
    r"projector|connector|merger|modality_projection|image_newline|mm_input_projection|mm_soft_emb|embed_vision|aligner"
)
_VISION = re.compile(r"vision_tower|vision_model|visual|vision_encoder|vision_embed|image_tower")
_VISUAL_TOKEN = re.compile(r"image|img|video|vision|visual|audio|_patch|row_\d+_col_\d+|soft_token", re.IGNORECASE)
_VISUAL_CONFIG = re.compile(
    r"^(image|video|audio|vision|visual|boi|eoi|boa|eoa|bov|eov)\w*_token_(id|index)$|^(boi|eoi)_token_(id|index)$"
)
_MARK = "PREFALIGNMARK"


def family(config: Any) -> str:
    """The family of a model, as its `model_type` (`llava`, `qwen2_5_vl`, ...).

    Args:
        config: a transformers config.

    Raises:
        ValueError: if it is not the config of a model that reads pictures and writes text with pictures as tokens.
    """
    model_type = str(getattr(config, "model_type", ""))
    if _image_token_id(config) is None:
        raise ValueError(
            f"a model of type {model_type!r} has no image token in its config, so pictures cannot be shown to it. "
            f"Use a vision-language model; tested families: {', '.join(TESTED.values())}."
        )
    return model_type


def image_token_ids(config: Any) -> tuple[int, ...]:
    """Ids that stand for a piece of a picture in the expanded prompt: one picture feature goes in at each of them.

    Marks around and between the pieces (`<|vision_start|>`, `<row_1_col_1>`, `<start_of_image>`) are text to the model: they hold
    nothing of the picture, and see what the mask lets everybody see.

    Raises:
        ValueError: if the config names no image token.
    """
    token = _image_token_id(config)
    if token is None:
        family(config)
    assert token is not None
    return (token,)


def image_token_mask(input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Where a batch holds pieces of pictures.

    Args:
        input_ids: (B, T) ids of the expanded prompt.
        config: the model's config.

    Returns:
        (B, T) bool.
    """
    import torch

    wanted = torch.tensor(image_token_ids(config), device=input_ids.device)
    return torch.isin(input_ids, wanted)


def visual_token_ids(processor: Any, config: Any) -> list[int]:
    """Ids of all image, video and audio marks: what a text must not contain."""
    found = {
        int(value)
        for name, value in config.to_dict().items()
        if _VISUAL_CONFIG.match(name) and isinstance(value, int) and value >= 0
    }
    found |= {
        index
        for index, token in processor.tokenizer.added_tokens_decoder.items()
        if token.special and _VISUAL_TOKEN.search(token.content)
    }
    return sorted(found)


def visual_tokens(processor: Any, config: Any) -> list[str]:
    """The marks of `visual_token_ids` as they are written, longest first."""
    written = processor.tokenizer.convert_ids_to_tokens(visual_token_ids(processor, config))
    return sorted({token for token in written if token}, key=lambda token: (-len(token), token))


def banned_token_ids(processor: Any, config: Any, *, keep: Sequence[int] = ()) -> list[int]:
    """Ids that an answer never holds: image, video and audio marks, padding and begin-of-sequence.

    Args:
        processor: the model's processor.
        config: the model's config.
        keep: ids that end a turn and stay allowed even if they are also the padding.
    """
    tokenizer = processor.tokenizer
    kept = {*keep, tokenizer.eos_token_id}
    banned = {*visual_token_ids(processor, config), tokenizer.pad_token_id, tokenizer.bos_token_id} - {None}
    return sorted(banned - kept)


def end_token_ids(processor: Any, generation_config: Any = None) -> list[int]:
    """Ids that end an answer: the tokenizer's and the generation config's end, and what the template closes a turn with."""
    tokenizer = processor.tokenizer
    ends = {tokenizer.eos_token_id}
    named = getattr(generation_config, "eos_token_id", None)
    ends |= set(named) if isinstance(named, (list, tuple)) else {named}
    return sorted((ends | {turn_end_id(processor)}) - {None})


def turn_end_id(processor: Any) -> int:
    """Id of the mark that the chat template closes an answer with; the tokenizer's end-of-sequence if it has none."""
    tokenizer = processor.tokenizer
    closing = tokenizer(_closing(processor), add_special_tokens=False).input_ids
    return next((index for index in closing if _is_special(tokenizer, index)), tokenizer.eos_token_id)


def missing_end(processor: Any) -> str:
    """What an answer in training must be given at its end: nothing where the chat template closes it, else the end of sequence.

    LLaVA-1.5's template on the Hub closes an answer with nothing; trained on such, a model never learns to stop.

    Raises:
        ValueError: if the tokenizer has no end of sequence either.
    """
    _, answer = render_answer(processor, [{"role": "user", "content": [{"type": "text", "text": "?"}]}], "!")
    tokenizer = processor.tokenizer
    closes = turn_end_id(processor) in tokenizer(answer, add_special_tokens=False).input_ids
    if not closes and tokenizer.eos_token is None:
        raise ValueError(
            "neither the chat template nor the tokenizer ends an answer, so a model would never learn to stop. Give "
            "the tokenizer an eos_token."
        )
    return "" if closes else tokenizer.eos_token


def core(model: Any) -> Any:
    """The transformers model under PEFT and other wrappers."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, "module", inner)


def position_ids(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Positions of the prompt with nothing hidden, whichever side is padded.

    Args:
        model: the model.
        batch: `input_ids` and `attention_mask` (B, T), zeros in the mask at padding only, and what else the processor gave.

    Returns:
        (B, T), or (3, B, T) for families with rotary positions in time, height and width (Qwen-VL).
    """
    mask = batch["attention_mask"]
    rope = getattr(getattr(core(model), "model", None), "get_rope_index", None)
    if rope is None or not any(name.endswith("grid_thw") for name in batch):
        return (mask.long().cumsum(-1) - 1).clamp(min=0)
    wanted = inspect.signature(rope).parameters
    given = {name: value for name, value in batch.items() if name in wanted}
    positions, _ = rope(**given)
    return positions


def clear_position_cache(model: Any) -> None:
    """Forget the rotary offsets that a Qwen-VL keeps from its last call; stale ones shift a later forward pass."""
    inner = getattr(core(model), "model", None)
    if inner is not None and getattr(inner, "rope_deltas", None) is not None:
        inner.rope_deltas = None


def render(processor: Any, messages: Sequence[Message], prefix: str = "") -> str:
    """The prompt as text, ending in an open assistant turn that begins with `prefix`.

    Args:
        processor: processor with a chat template.
        messages: conversation up to a user turn.
        prefix: forced start of the answer; blanks at its end are cut, since a model writes them with the next word.

    Raises:
        ValueError: if the processor has no chat template.
    """
    opened = _apply(processor, messages, add_generation_prompt=True)
    prefix = prefix.rstrip()
    if not prefix:
        return opened
    # through the template as an answer, so that the blank after the role mark is the one of training
    rendered = _apply(processor, [*messages, assistant_message(prefix + _MARK)])
    start = rendered.split(_MARK)[0]
    return start if start.startswith(opened.rstrip()) and start.endswith(prefix) else opened + prefix


def render_answer(processor: Any, messages: Sequence[Message], answer: str, prefix: str = "") -> tuple[str, str]:
    """Prompt and completion as text, split where TRL's `apply_chat_template` splits them.

    Args:
        processor: processor with a chat template.
        messages: conversation up to a user turn.
        answer: the answer, without `prefix`.
        prefix: start of the answer that counts as prompt.

    Returns:
        `(prompt, completion)`; the completion ends with what the template closes the turn with.
    """
    prompt = render(processor, messages, prefix)
    whole = _apply(processor, [*messages, assistant_message(prefix + answer)])
    shared = 0
    while shared < min(len(prompt), len(whole)) and prompt[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


def rewrites_prompt(processor: Any) -> bool:
    """Whether the processor puts text after the prompt's end (PaliGemma's newline), so that a prefix must follow as tokens."""
    return type(processor).__name__ == "PaliGemmaProcessor"


def image_lengths(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """How many image tokens pictures become, where the processor can tell without reading them; else zeros.

    Args:
        processor: the processor.
        sizes: (height, width) in pixels.
    """
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None or not sizes:
        return [0] * len(sizes)
    try:
        return [int(value) for value in count(image_sizes=[list(size) for size in sizes])["num_image_tokens"]]
    except (AttributeError, KeyError, TypeError, NotImplementedError):
        return [0] * len(sizes)


def image_tokens_among_others(processor: Any, config: Any, size: tuple[int, int]) -> int:
    """How many image tokens a picture becomes in a prompt with several, found by preparing two of its size.

    Args:
        processor: the processor. Some families cut a lone picture into tiles and leave several whole (LLaVA-OneVision).
        config: the model's config.
        size: (height, width) in pixels.
    """
    from PIL import Image

    picture = Image.new("RGB", (size[1], size[0]))
    text = render(processor, [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}])
    batch = processor(text=[text], images=[[picture, picture]], add_special_tokens=False, return_tensors="pt")
    return int(image_token_mask(batch["input_ids"], config).sum()) // 2


def tower(name: str) -> str:
    """The tower that a parameter belongs to, by its name: `vision`, `projector` or `language_model`."""
    if _PROJECTOR.search(name):
        return "projector"
    return "vision" if _VISION.search(name) else "language_model"


def vision_side() -> str:
    """Regular expression for the full names of the modules of vision tower and projector, and of what is in them."""
    return rf".*(?:{_VISION.pattern}|{_PROJECTOR.pattern})\w*"


def context_length(config: Any) -> int | None:
    """Number of positions of the language model, or None where it has no limit."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def cross_attends(config: Any) -> bool:
    """Whether pictures reach the language model beside its prompt (Mllama): hiding tokens of the prompt hides nothing of them."""
    layers = ("cross_attention_layers", "cross_layer_interval")
    parts = (config, config.get_text_config())
    return config.is_encoder_decoder or any(getattr(part, name, None) for part in parts for name in layers)


def _image_token_id(config: Any) -> int | None:
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= 0:
            return value
    return None


def _apply(processor: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"the {type(processor).__name__} of this checkpoint has no chat template, so a conversation cannot be put to the "
            "model. Use an instruction-tuned checkpoint, or add a `chat_template.jinja` to its folder."
        )
    return processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)


def _closing(processor: Any) -> str:
    question = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    return _apply(processor, [question, assistant_message(_MARK)]).split(_MARK)[-1]


def _is_special(tokenizer: Any, index: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(index)
    return index in tokenizer.all_special_ids or (added is not None and added.special)

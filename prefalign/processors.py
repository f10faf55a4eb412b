"""What tells processors apart: the same weights with another chat template, tokenizer or picture size answer otherwise.

The fingerprint of an engine is that of its weights and that of its processor, `0123456789abcdef-01234567`. The latter is of what
decides a prompt's tokens and pixels and a reply's text, and not of files: paths, versions and what a call has set (padding) stay
out.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

OTHER_PROCESSOR = "the same weights with another chat template, tokenizer or image processor"
_NOT_OF_PICTURES = {"processor_class", "auto_map", "device", "return_tensors", "name_or_path", "transformers_version"}
_WITH_PROCESSOR = re.compile(r"\b([0-9a-f]{16})-[0-9a-f]{8}\b")


def engine_fingerprint(weights: str, processor: Any) -> str:
    """Fingerprint of a model that is asked through a processor.

    Args:
        weights: `models.fingerprint` of the model.
        processor: from `models.load_processor`.
    """
    return f"{weights}-{processor_fingerprint(processor)}"


def weights_of(text: str) -> str:
    """A text in which each fingerprint of an engine is cut to that of its weights; names of served models stay as they are."""
    return _WITH_PROCESSOR.sub(r"\1", text)


def processor_fingerprint(processor: Any) -> str:
    """Content hash of a processor: chat template, tokenizer, image processor and its own settings.

    Returns:
        8 hex digits; equal for a processor that was saved and loaded again, wherever it lies.
    """
    tokenizer = processor.tokenizer
    settings = {
        name: value
        for name, value in vars(processor).items()
        if isinstance(value, (bool, int, float, str)) and not name.startswith("_") and name != "chat_template"
    }
    return _digest(
        {
            "class": type(processor).__name__,
            "settings": settings,
            "template": processor.chat_template or tokenizer.chat_template,
            "tokenizer": _tokenizer(tokenizer),
            "images": _image_processor(processor.image_processor),
        }
    )


def image_processor_fingerprint(image_processor: Any) -> str:
    """Content hash of an image processor, 8 hex digits: of its kind and settings, and not of the library that it resizes with."""
    return _digest(_image_processor(image_processor))


def _image_processor(image_processor: Any) -> dict[str, Any]:
    kind = re.sub("(Fast|Pil)$", "", type(image_processor).__name__)
    settings = {
        name: value
        for name, value in json.loads(image_processor.to_json_string()).items()
        if value is not None and not name.startswith("_") and name not in _NOT_OF_PICTURES
    }
    return {**settings, "image_processor_type": kind}


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Of a tokenizer: how it cuts text and joins tokens, and the tokens that a template can name."""
    python = {
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python
        return {**python, "class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    whole = json.loads(backend.to_str())
    return {**python, **{name: part for name, part in whole.items() if name not in ("padding", "truncation")}}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

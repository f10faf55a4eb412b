"""Weights kept in 4 bits (QLoRA, arXiv 2305.14314): what they compute in, which of them are rounded, and that they can train."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from prefalign import families
from prefalign.checkpoints import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

logger = logging.getLogger(__name__)


def computing_dtype(source: str, revision: str | None, asked: str, device: torch.device) -> str:
    """Name of the dtype that a model in 4 bits computes in.

    Args:
        source: folder or Hub id of its checkpoint.
        revision: branch, tag or commit on the Hub.
        asked: `dtype` of the config; `auto` is what the checkpoint is stored in.
        device: where it computes.

    Raises:
        ModelError: bitsandbytes is not installed, the checkpoint is quantised already, or does not say its dtype.
    """
    from transformers import PreTrainedConfig

    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "load_in_4bit needs bitsandbytes, which is not installed. Run `pip install prefalign[qlora]`, or leave load_in_4bit "
            "out and load the weights as they are stored."
        )
    values, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    if stored := values.get("quantization_config"):
        raise ModelError(
            f"{source!r} is quantised already ({stored.get('quant_method', 'unknown method')}), and load_in_4bit would round "
            "rounded weights. Name the model that it was made from, or leave load_in_4bit out."
        )
    if asked != "auto":
        return asked
    parts = (values, values.get("text_config") or {})
    name = next((part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)), None)
    if name is None:
        raise ModelError(
            f"config.json of {source!r} does not say its dtype, and what is stored in 4 bits is computed in another. Set "
            "`dtype`, such as bfloat16."
        )
    if name == "float16" and device.type == "cpu":
        logger.info("%s is stored in float16, which a CPU computes badly; it computes in float32.", source)
        return "float32"
    return str(name)


def in_4_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with doubly quantised scales, for the blocks of the language model, which hold nearly all weights.

    Tower and projector are small beside these, run once per picture, and every later layer reads what they round; the tower
    also may be trained. The head's log-probs are the loss.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", families.vision_side()],
    )


def keep_differentiable(model: Any) -> None:
    """On a CPU with AVX512-BF16, keep bitsandbytes from what it does to a weight at its first pass in eval mode.

    It would be packed for a kernel of bfloat16 that has no gradient, and stay so when training goes on: what lies before such
    a layer would train on nothing, without an error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False

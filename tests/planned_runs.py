"""Models and configs that trainings are planned for, shared by the tests of the plan."""

from pathlib import Path

import torch
from transformers import LlamaConfig

from prefalign import bundled, config
from tests import tiny_vlms

RECIPE = bundled.load_stage("train_preference")
TOY = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8, "num_key_value_heads": 8}


def save_llava(folder, text, vision, weights=True):
    """A LLaVA of other sizes with pictures of 576 tokens; for a large one, without weights."""
    processor, model_class, made = tiny_vlms.BUILDERS["llava"]()
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    made.vision_config.update({**vision, "image_size": 336})
    made.text_config = LlamaConfig(**{**made.text_config.to_dict(), "max_position_embeddings": 2048, **text})
    made.image_seq_length = 576
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    if weights:
        torch.manual_seed(0)
        model_class(made).save_pretrained(folder)
    return Path(folder)


def save_toy(folder):
    """3 layers of width 256, 576 tokens a picture."""
    text = {**TOY, "num_hidden_layers": 3, "vocab_size": 4096, "head_dim": 32}
    return save_llava(folder, text, {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3})


def run_config(model, pairs, output="unused", *, lora=False, reference="cached", **trainer):
    values = {
        "model": {"model_name_or_path": str(model)},
        "pairs": str(pairs),
        "output": str(output),
        "reference": reference,
    }
    values["trainer"] = {"per_device_train_batch_size": 2, "optim": "adamw_torch", **trainer}
    values |= {"lora": {"r": 4, "alpha": 8}} if lora else {}
    return config.build(RECIPE.Config, values)

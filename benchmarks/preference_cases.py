"""Models of random weights, rows and trainers for `preference_step.py`: the same weights and rows on TRL's side and on ours.

The toy LLaVA has a third of a step in its vision tower where LLaVA-1.5-7B has 2 %; the toy Qwen2.5-VL has 15 %, as at 7B.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers as T
import trl.trainer.utils
from datasets import Dataset, Features, Image, List
from peft import LoraConfig
from PIL import Image as Pictures
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import logsigmoid
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from prefalign.images import encode_png
from prefalign.losses import read_losses
from prefalign.models import fingerprint, freeze
from prefalign.records import Pair, assistant_message, user_message
from prefalign.training.lora import LANGUAGE_LINEAR
from prefalign.training.pairs import COLUMNS
from prefalign.training.preference import PreferenceTrainer
from prefalign.training.reference import cache_reference

BETA = 0.1
PROMPT_WORDS = 36  # with role marks and the picture's place, 40 tokens of text
ANSWER_WORDS = (59, 139)  # and the end of turn: 60 to 140 tokens
SIDES = ("trl", "trlc", "cached", "online")


@dataclass(frozen=True)
class Case:
    """One kind of batch.

    Attributes:
        family: `llava` or `qwen`.
        size: (width, height) of each picture, in pixels.
        pairs: rows of a batch, if `ranked` is 0.
        pictures: pictures of each row.
        vocabulary: entries of the output layer.
        ranked: a batch is all pairs of this many ranked answers to one prompt.
        losses: names of `prefalign.losses.TERMS`.
        layers: decoder layers.
        tower_layers: layers of the vision tower.
        shape: `toy`, or the layers of `7b`.
    """

    family: str = "llava"
    size: tuple[int, int] = (336, 336)
    pairs: int = 2
    pictures: int = 1
    vocabulary: int = 8192
    ranked: int = 0
    losses: tuple[str, ...] = ("text",)
    layers: int = 6
    tower_layers: int = 12
    shape: str = "toy"


QWEN_SIZE = (1120, 896)  # 80 x 64 patches of 14 pixels, merged by 2 x 2: 1,280 tokens
CASES = {
    "576": Case(),
    "64": Case(size=(112, 112)),
    "576v32k": Case(vocabulary=32064, pairs=1),
    "1280": Case("qwen", size=QWEN_SIZE, pairs=1, tower_layers=4),
    "3img": Case(pictures=3, pairs=1),
    "mdpo": Case(losses=("text", "visual"), pairs=1),
    "k4": Case(ranked=4),
}
SHAPES = {
    "llava7b": Case(vocabulary=32064, pairs=1, shape="7b", layers=32, tower_layers=24),
    "qwen7b": Case("qwen", size=QWEN_SIZE, vocabulary=152064, pairs=1, shape="7b", layers=28, tower_layers=32),
}

_TEXT: dict[tuple[str, str], dict[str, Any]] = {
    ("llava", "toy"): {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8},
    ("llava", "7b"): {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    ("qwen", "toy"): {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 2},
    ("qwen", "7b"): {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4},
}  # fmt: skip
_VISION: dict[tuple[str, str], dict[str, Any]] = {
    ("llava", "toy"): {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "projection_dim": 384},
    ("llava", "7b"): {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "projection_dim": 768},
    ("qwen", "toy"): {"hidden_size": 160, "intermediate_size": 432, "num_heads": 4, "fullatt_block_indexes": [3]},
    ("qwen", "7b"): {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31]},
}  # fmt: skip
_TEMPLATE = (
    "{{% for message in messages %}}{{{{ 'USER ' if message['role'] == 'user' else 'ASSISTANT ' }}}}"
    "{{% for block in message['content'] %}}"
    "{{{{ '{image} ' if block['type'] == 'image' else block['text'] + ' ' }}}}{{% endfor %}}"
    "{{% if message['role'] == 'assistant' %}}{{{{ eos_token }}}}{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ 'ASSISTANT ' }}}}{{% endif %}}"
)


class PictureProcessor(T.Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its part for videos, which would need torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        T.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


@dataclass
class Workbench:
    """What all sides of a case share: configuration, processor and rows.

    Args:
        case: which batch.
        seed: of weights, words and pictures. With 6, two rows of 576 image tokens are padded by 4 % in TRL's layout and hold 1.8
            times the tokens of ours, the means over many batches with answers of these lengths.
        dtype: of the weights.
    """

    case: Case
    seed: int = 6
    dtype: torch.dtype = torch.float32

    @cached_property
    def processor(self) -> Any:
        """Words are `w0`, `w1`, ...: one token each, as many as the vocabulary has."""
        llava = self.case.family == "llava"
        picture = "<image>" if llava else "<|vision_start|><|image_pad|><|vision_end|>"
        marks = ["<image>"] if llava else ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
        special = ["<pad>", "<s>", "</s>", *marks]
        known = [*special, "USER", "ASSISTANT"]
        known += [f"w{number}" for number in range(self.case.vocabulary - len(known))]
        words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.add_special_tokens(special)
        named = {"image_token": "<image>"} if llava else {}
        tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>",
                                              pad_token="<pad>", extra_special_tokens=named)  # fmt: skip
        tokenizer.chat_template = template = _TEMPLATE.format(image=picture)
        if not llava:
            pictures = T.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=2048 * 28 * 28)
            return PictureProcessor(pictures, tokenizer, chat_template=template)
        side = self.case.size[0]
        pictures = T.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return T.LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                                num_additional_image_tokens=1, chat_template=template)  # fmt: skip

    def config(self) -> Any:
        """The config of the family, with the case's numbers of layers."""
        case, tokenizer = self.case, self.processor.tokenizer
        wide, seeing = _TEXT[case.family, case.shape], _VISION[case.family, case.shape]
        text = wide | {
            "vocab_size": case.vocabulary,
            "num_hidden_layers": case.layers,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        }
        if case.family == "llava":
            side = case.size[0]
            vision = T.CLIPVisionConfig(**seeing, num_hidden_layers=case.tower_layers, image_size=side, patch_size=14)
            return T.LlavaConfig(
                vision_config=vision,
                text_config=T.LlamaConfig(**text),
                image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
                image_seq_length=(side // 14) ** 2,
                vision_feature_layer=-2,
            )
        width = wide["hidden_size"] // wide["num_attention_heads"]
        section = [width // 8, 3 * width // 16, 3 * width // 16]
        rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 1e6}
        seeing = seeing | {"depth": case.tower_layers, "out_hidden_size": wide["hidden_size"]}
        marks = ("image_pad", "video_pad", "vision_start", "vision_end")
        ids = {
            f"{mark.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for mark in marks
        }
        return T.Qwen2_5_VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=seeing, **ids)

    def model(self) -> Any:
        """A new model, always of the same weights."""
        classes = {"llava": T.LlavaForConditionalGeneration, "qwen": T.Qwen2_5_VLForConditionalGeneration}
        torch.manual_seed(self.seed)
        device = "cuda" if self.case.shape != "toy" else "cpu"
        with torch.device(device):
            config = self.config()
            config._attn_implementation = "sdpa"
            model = classes[self.case.family]._from_config(config, dtype=self.dtype)
        return model.to(device)

    @cached_property
    def rows(self) -> Dataset:
        """As `load_pairs` gives them, pictures encoded."""
        draw = np.random.default_rng(self.seed)

        def words(number: int) -> str:
            return " ".join(f"w{index}" for index in draw.integers(0, self.case.vocabulary - 16, number))

        def answer() -> list[Any]:
            return [assistant_message(words(int(draw.integers(ANSWER_WORDS[0], ANSWER_WORDS[1] + 1))))]

        def pictures() -> list[Any]:
            width, height = self.case.size
            shapes = [(height, width, 3)] * self.case.pictures
            return [encode_png(Pictures.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))) for shape in shapes]

        def question() -> dict[str, Any]:
            other = pictures() if "visual" in self.case.losses else []
            return {"images": pictures(), "rejected_images": other,
                    "prompt": [user_message(words(PROMPT_WORDS), self.case.pictures)]}  # fmt: skip

        if self.case.ranked:
            asked, answers = question(), [answer() for _ in range(self.case.ranked)]
            found = [
                asked | {"chosen": better, "rejected": worse} for better, worse in itertools.combinations(answers, 2)
            ]
        else:
            found = [question() | {"chosen": answer(), "rejected": answer()} for _ in range(self.case.pairs)]
        encoded = List(Image(decode=False))
        kinds = {
            name: encoded if "images" in name else kind for name, kind in Pair.features().items() if name in COLUMNS
        }
        return Dataset.from_list([{"id": f"row-{number}", **row} for number, row in enumerate(found)], Features(kinds))

    def arguments(self, output: str, *, checkpointing: bool) -> DPOConfig:
        """One batch, one step, a learning rate of 0: every step of a side starts from the same weights."""
        on_cpu = self.case.shape == "toy"
        return DPOConfig(
            output_dir=output, beta=BETA, max_length=None, learning_rate=0.0, max_steps=1, remove_unused_columns=False,
            per_device_train_batch_size=len(self.rows), gradient_checkpointing=checkpointing, use_cpu=on_cpu, bf16=False,
            dataloader_pin_memory=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip

    def trainer(
        self, side: Literal["trl", "cached", "online"], output: str, *, lora: bool, checkpointing: bool
    ) -> DPOTrainer:
        """A trainer that has not taken a step; one with a cache has filled it.

        Args:
            side: `trl`, `cached` or `online`.
            output: folder of the run.
            lora: an adapter of rank 16 on the language model's linear layers; else everything but the vision tower.
            checkpointing: gradient checkpointing.
        """
        model = self.model()
        if not lora:
            freeze(model, ["vision"])
        shared: dict[str, Any] = {
            "args": self.arguments(output, checkpointing=checkpointing),
            "processing_class": self.processor,
            "peft_config": LoraConfig(r=16, lora_alpha=32, target_modules=LANGUAGE_LINEAR) if lora else None,
        }
        if side == "trl":
            kind = ThreeViews if "visual" in self.case.losses else DPOTrainer
            decoded = self.rows.cast_column("images", List(Image())).cast_column("rejected_images", List(Image()))
            reference = None if lora else copy.deepcopy(model).requires_grad_(False).eval()
            trainer = kind(model=model, ref_model=reference, train_dataset=decoded, **shared)
        else:
            losses = read_losses([{"name": name} for name in self.case.losses], beta=BETA)
            trainer = PreferenceTrainer(model, train_dataset=self.rows, losses=losses, reference=side, **shared)
        if side == "cached":
            cache_reference(trainer, Path(output) / "reference", reference=fingerprint(model), verify=0, progress=False)
        trainer.remove_callback(PrinterCallback)
        return trainer


def start(trainer: DPOTrainer) -> None:
    """Take one step inside `train()`, which turns checkpointing on as in any run; then move the policy off its reference.

    A policy equal to its reference has a loss of ln 2, whatever a trainer does.
    """
    trainer.train()
    move(trainer.model)


def move(model: torch.nn.Module) -> None:
    """Add noise to what trains, drawn from each tensor's name."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=draw).to(parameter)
            size = parameter.detach().abs().mean().item() or 1.0
            parameter.data.add_(noise, alpha=0.02 * size)


class ThreeViews(DPOTrainer):
    """mDPO's text and picture terms as one would add them to TRL: its own step, and a third forward of the same layout.

    The third view shows the chosen answers on the other pictures, to policy and reference. TRL has no such loss.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._collate: Any = self.data_collator  # type: ignore[has-type]
        self.data_collator = self._three_views
        self._said: list[torch.Tensor] = []
        for module in (self.model, self.ref_model):
            if module is not None:
                module.register_forward_hook(lambda _, __, out: self._said.append(out.log_probs.sum(dim=1)))

    def _three_views(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        other = self._collate([{**row, "images": row["rejected_images"]} for row in rows])
        return {**self._collate(rows), "other": {key: value[: len(rows)] for key, value in other.items()}}

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        other = dict(inputs.pop("other"))
        labels = other["input_ids"].masked_fill(other.pop("completion_mask") == 0, -100)
        self._said.clear()
        loss = super()._compute_loss(model, inputs, return_outputs)
        model(**other, labels=labels, fused_lm_head=True, use_cache=False)
        with torch.no_grad():
            adapted = self.ref_model is None
            with model.disable_adapter() if adapted else contextlib.nullcontext():
                (model if adapted else self.ref_model)(**other, labels=labels, fused_lm_head=True, use_cache=False)
        policy, reference, policy_other, reference_other = self._said
        own = (policy - reference).chunk(2)[0]
        return loss - logsigmoid(self.beta * (own - (policy_other - reference_other))).mean()


@contextlib.contextmanager
def head_on_answers() -> Iterator[None]:
    """TRLc: TRL's fused head scores completion tokens only, as it does on CUDA; on a CPU it scores every position."""
    decide = trl.trainer.utils._use_triton
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = decide

"""`RewardModel`: a vision-language model with a linear head that reads a score off the end of a rating turn.

Papers: Fact-RLHF, arXiv 2309.14525 (the reward model is of the policy's kind and reads facts), N+ (Huang et al. 2024: head of
standard deviation 1/sqrt(d+1), bias 0). Departure from Fact-RLHF: prompt and pictures run once for all answers to them.

Legend of shapes: `M` answers, `N` distinct answers, `A` attributes, `W` width of the language model, `T` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from prefalign import families
from prefalign.records import canonical_json, normalise_messages
from prefalign.rewards.augmentation import RatingPrompt
from prefalign.rewards.collator import RewardCollator
from prefalign.training.documents import digest_of, picture_bytes
from prefalign.training.features import join_features
from prefalign.training.forward import hidden_states, is_shared, share, shared_layout
from prefalign.training.routes import find_route

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import ProcessorMixin

GOLDEN_ROWS = 4


@dataclass
class BaseModel:
    """The weights that a reward model starts from.

    Attributes:
        name: folder, Hub id or `scenes`.
        revision: on the Hub.
        fingerprint: `models.fingerprint` before anything was trained.
        dtype: in which it was loaded, such as `bfloat16`.
        load_in_4bit: its language model was quantised (QLoRA).
    """

    name: str
    revision: str | None
    fingerprint: str
    dtype: str
    load_in_4bit: bool = False


@dataclass
class Scale:
    """Scores of reference answers, by which scores of different models compare.

    Attributes:
        mean: per attribute.
        deviation: per attribute.
        rows: answers that were scored.
    """

    mean: list[float]
    deviation: list[float]
    rows: int


@dataclass
class Golden:
    """An answer with the scores that the model gave it when it was saved.

    Attributes:
        row: as `RewardModel.score` takes it.
        scores: (A,) with facts.
        scores_without_facts: (A,) without.
    """

    row: dict[str, Any]
    scores: list[float]
    scores_without_facts: list[float]


@dataclass
class Calibration:
    """What `RewardModel.calibrate` found: scales with facts and without, and golden rows."""

    with_facts: Scale
    without_facts: Scale
    golden: list[Golden] = field(default_factory=list)


class RewardModel(nn.Module):
    """Scores of answers to prompts with pictures.

    Args:
        model: a transformers model or a `PeftModel`; its forward is wrapped (`prefalign.training.forward.share`).
        processor: its processor.
        base: the weights that it starts from; needed to save it.
        attributes: names of the scores, one row of the head each.
        rating: how a conversation becomes the text that is scored.
        fast_path: `auto` runs prompt and pictures once for all answers to them, where the family allows it exactly.
        adapter: name of the adapter, where `model` is a `PeftModel` that others use too: each forward pass activates it, runs in
            eval mode without gradient, and leaves everything as it was.
        seed: of the head's start.
    """

    def __init__(
        self,
        model: Any,
        processor: ProcessorMixin,
        *,
        base: BaseModel | None = None,
        attributes: Sequence[str] = ("reward",),
        rating: RatingPrompt | None = None,
        fast_path: Literal["auto", "off"] = "auto",
        adapter: str | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.processor = processor
        self.base = base
        self.attributes = list(attributes)
        self.rating = rating or RatingPrompt()
        self.adapter = adapter
        self.calibration: Calibration | None = None
        self._features: Mapping[str, dict[str, Any]] = {}
        self.route = find_route(model, fast_path)
        core = families.core(model)
        if not is_shared(model):
            share(model, self.route.layout)
        width = core.config.get_text_config().hidden_size
        self.head = nn.Linear(width, len(self.attributes), dtype=torch.float32, device=core.device)
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn((len(self.attributes), width), generator=generator) / math.sqrt(width + 1)
        with torch.no_grad():
            self.head.weight.copy_(start)
            self.head.bias.zero_()

    @property
    def config(self) -> Any:
        """The transformers config of the model."""
        return families.core(self.model).config

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights; the head is float32."""
        return families.core(self.model).dtype

    @property
    def device(self) -> torch.device:
        """Where the head is, and so the scores."""
        return self.head.weight.device

    def freeze_unused(self) -> None:
        """Stop the gradient of the vocabulary's head, which no score passes through, unless it is the embedding too."""
        core = families.core(self.model)
        out, embeddings = core.get_output_embeddings(), core.get_input_embeddings()
        if out is not None and out.weight is not embeddings.weight:
            out.requires_grad_(False)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """As of a transformers model."""
        self.model.gradient_checkpointing_enable(**settings)

    def gradient_checkpointing_disable(self) -> None:
        """As of a transformers model."""
        self.model.gradient_checkpointing_disable()

    def collator(self, **settings: Any) -> RewardCollator:
        """What makes batches for this model.

        Args:
            **settings: fields of `RewardCollator` over those that the model decides.
        """
        decided: dict[str, Any] = {
            "processor": self.processor,
            "layout": shared_layout(self.model),  # who shares the model may have changed it
            "image_token_id": families.image_token_ids(self.config)[0],
            "rating": self.rating,
            "attributes": tuple(self.attributes),
        }
        return RewardCollator(**{**decided, **settings})

    def forward(
        self,
        packed: Mapping[str, Any] | None = None,
        plain: Mapping[str, torch.Tensor] | None = None,
        places: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of the answers of a batch of `RewardCollator`.

        Args:
            packed: documents, for the layouts that share prompts.
            plain: model inputs of all answers, for the one that does not.
            places: (M,) for `packed` the branch that holds each answer, for `plain` the position of its last token.

        Returns:
            (M, A) float32.
        """
        assert places is not None
        with nullcontext() if self.adapter is None else self._borrowed():
            if packed is not None:
                last = hidden_states(self.model, packed)[places]
            else:
                assert plain is not None
                states = families.core(self.model).model(**plain, use_cache=False).last_hidden_state
                last = states[torch.arange(len(states), device=states.device), places]
            with torch.autocast(last.device.type, enabled=False):
                return self.head(last.float())

    @contextmanager
    def with_features(self, features: Mapping[str, dict[str, Any]]) -> Iterator[None]:
        """Within it, `score` takes these features of pictures instead of running the tower on them.

        Right only for features that this model's own tower and projector would make of what its own processor prepares. A
        batch with a picture that is not among them is encoded whole, and so is every batch of the layout `plain`.

        Args:
            features: by digest of the pictures (`Document.pictures`), as `split_features` cuts them, on the model's device.
        """
        self._features = features
        try:
            yield
        finally:
            self._features = {}

    @torch.no_grad()
    def score(self, rows: Sequence[Mapping[str, Any]], *, facts: bool = True, batch_size: int = 16) -> torch.Tensor:
        """Scores of single answers; answers to one prompt that fall into a batch share it and its pictures.

        Args:
            rows: `id`, `images`, `prompt` and `chosen` (the answer) each, and `facts` where there are some.
            facts: show them.
            batch_size: answers of one forward pass.

        Returns:
            (N, A) float32 on the CPU, in the order of the rows.
        """
        collator = self.collator(views=("chosen",), facts=facts, encoded=self._features)
        order = sorted(range(len(rows)), key=lambda number: _prompt_key(rows[number]))
        found = torch.zeros(len(rows), len(self.attributes))
        training = self.training
        if self.adapter is None:
            self.eval()
        try:
            for start in range(0, len(order), batch_size):
                numbers = order[start : start + batch_size]
                batch = on_device(collator.answers([rows[number] for number in numbers]), self.device)
                if pictures := batch.get("packed", {}).pop("pictures", None):
                    batch["packed"]["features"] = join_features([self._features[digest] for digest in pictures])
                found[numbers] = self(**batch).float().cpu()
        finally:
            if self.adapter is None:
                self.train(training)
        return found

    def calibrate(self, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 16) -> None:
        """Find mean and deviation of the scores of reference answers, and keep the first few with their scores for the self-test.

        Args:
            rows: as `score` takes them.
            batch_size: answers of one forward pass.

        Raises:
            ValueError: there are fewer than two answers, or all scores of an attribute are the same.
        """
        if len(rows) < 2:
            raise ValueError(f"{len(rows)} reference answers: a deviation needs two at the least.")
        both = {facts: self.score(rows, facts=facts, batch_size=batch_size) for facts in (True, False)}
        scales = {}
        for facts, scores in both.items():
            deviation = scores.std(dim=0)
            if not bool((deviation > 0).all()) or not bool(scores.isfinite().all()):
                flat = [name for name, value in zip(self.attributes, deviation.tolist(), strict=True) if not value > 0]
                raise ValueError(
                    f"all {len(rows)} reference answers have the same score, or none ({', '.join(flat)}), so the reward model "
                    "cannot tell answers apart. Train with a smaller learning rate, or look at its pairs."
                )
            scales[facts] = Scale(scores.mean(dim=0).tolist(), deviation.tolist(), len(rows))
        kept = [
            Golden(dict(rows[number]), both[True][number].tolist(), both[False][number].tolist())
            for number in range(min(GOLDEN_ROWS, len(rows)))
        ]
        self.calibration = Calibration(scales[True], scales[False], kept)

    def save(self, folder: Path) -> None:
        """Write the artefact: adapter or weights, head, processor, `reward_model.json`, golden rows (`artefact.save`)."""
        from prefalign.rewards import artefact

        artefact.save(self, folder)

    def restore(self, folder: Path) -> None:
        """Load the weights of a checkpoint of this same model."""
        from prefalign.rewards import artefact

        artefact.restore(self, folder)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        onto: PeftModel | None = None,
        adapter_name: str = "reward",
        fast_path: Literal["auto", "off"] = "auto",
    ) -> RewardModel:
        """Load a saved reward model and test it on its golden rows.

        Args:
            folder: what `save` wrote.
            device: `auto`, `cpu`, `cuda`, ...
            dtype: `auto` is that in which the base was loaded for training.
            onto: a `PeftModel` with the same base, which gets the adapter beside its own, so that one base serves policy and
                reward. Its active adapter, its flags and its modes stay as they are.
            adapter_name: name of the adapter there.
            fast_path: as of the class.

        Raises:
            ValueError: the folder is no finished reward model, the base has other weights than the one it was trained on, or the
                scores of the golden rows are not what they were.
        """
        from prefalign.rewards import artefact

        return artefact.load(
            Path(folder), device=device, dtype=dtype, onto=onto, adapter_name=adapter_name, fast_path=fast_path
        )

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        """The reward adapter on a model that others use: active, in eval mode, without gradient; afterwards all is as before."""
        peft_model = self.model
        flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
        modes = [(module, module.training) for module in peft_model.modules()]
        switched_off = [
            module
            for module in peft_model.modules()
            if getattr(module, "disable_adapters", None) is True and hasattr(module, "enable_adapters")
        ]
        active = peft_model.active_adapter
        try:
            for module in switched_off:
                module.enable_adapters(True)
            peft_model.set_adapter(self.adapter)
            peft_model.eval()
            with torch.no_grad():
                yield
        finally:
            peft_model.set_adapter(active)
            for module in switched_off:
                module.enable_adapters(False)
            for module, mode in modes:
                module.training = mode
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors, however deep, on a device."""
    if isinstance(batch, Mapping):
        return {key: on_device(value, device) for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch


def _prompt_key(row: Mapping[str, Any]) -> str:
    pictures = digest_of([picture_bytes(picture) for picture in row["images"]])
    return canonical_json(normalise_messages(row["prompt"])) + pictures

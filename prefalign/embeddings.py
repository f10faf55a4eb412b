"""Pictures as unit vectors: CLIP, SigLIP, DINOv2, or the vision encoder of a vision-language model itself.

Legend of shapes: `N` pictures, `T` tokens of a picture, `D` values of an embedding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from prefalign import families
from prefalign.checkpoints import ModelError, check_family, check_weights, resolve
from prefalign.models import ModelConfig, fingerprint, load_model, load_processor
from prefalign.processors import image_processor_fingerprint, weights_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

OWN = "own"
FEATURES = ("auto", "image_embeds", "cls", "mean", "max")
_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")


@dataclass
class EmbedderConfig:
    """What turns pictures into vectors.

    Attributes:
        model_name_or_path: folder or Hub id of CLIP, SigLIP, DINOv2 or a vision-language model; `scenes`; `own` is the
            generator that the stage has loaded.
        model_revision: branch, tag or commit on the Hub.
        feature: `image_embeds` (the space CLIP and SigLIP share with text), `cls` (class token of the last hidden state),
            `mean` and `max` (of all tokens of the last hidden state; the maximum says better which small things a picture
            holds); `auto` takes `image_embeds` where there is one, the mean for a vision-language model, else the class token,
            else the mean.
        batch_size: pictures in one forward pass; it changes speed and memory, not the vectors beyond rounding.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; not for `own`.
        device: `auto`, `cpu`, `cuda`, ...; not for `own`.
    """

    model_name_or_path: str = OWN
    model_revision: str | None = None
    feature: Literal["auto", "image_embeds", "cls", "mean", "max"] = "auto"
    batch_size: int = 32
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.feature not in FEATURES:
            raise ValueError(
                f"feature {self.feature!r} is none that pictures are embedded by; use one of {', '.join(FEATURES)}."
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; at least 1 picture goes through the encoder at a time.")


class Embedder:
    """Embeds pictures with one model. Made by `load_embedder`.

    Attributes:
        feature: what is taken of the model, never `auto`.
        fingerprint: identity of the vectors: the model's weights, the image processor and the feature.
    """

    def __init__(self, model: Any, image_processor: Any, *, feature: str, batch_size: int, weights: str = "") -> None:
        """Args:
            model: a transformers model that reads pictures (a `PeftModel` is fine).
            image_processor: what prepares its pictures.
            feature: one of `FEATURES`.
            batch_size: pictures in one forward pass.
            weights: fingerprint of the model's weights, computed if left out.

        Raises:
            ModelError: if the model has no vision encoder or lacks the feature.
        """
        self.model = families.core(model)
        self.image_processor = image_processor
        self.batch_size = batch_size
        self._tower = _vision_tower(self.model)
        self._one_by_one = False
        self.feature = _feature(feature, self.model, self._tower)
        prepares = image_processor_fingerprint(image_processor)
        self.fingerprint = f"{weights or fingerprint(model)}-{prepares}-{self.feature}"

    def embed(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Vectors of pictures.

        Args:
            images: N decoded RGB pictures.

        Returns:
            (N, D) float32, every row of length 1; (0, 0) for no picture.
        """
        import numpy as np
        import torch

        rows = []
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(images), self.batch_size):
                    rows.append(self._batch(list(images[start : start + self.batch_size])).float().cpu())
        finally:
            self.model.train(training)
        if not rows:
            return np.zeros((0, 0), dtype=np.float32)
        return torch.nn.functional.normalize(torch.cat(rows), dim=-1).numpy()

    def _batch(self, images: list[Image.Image]) -> torch.Tensor:
        """(N, D) features of some pictures, not yet of length 1; together where the model takes one tensor for each."""
        import torch

        if not self._one_by_one or len(images) == 1:
            found = self._together(images)
            if found is not None:
                return found
            self._one_by_one = True
        return torch.cat([self._batch([image]) for image in images])

    def _together(self, images: list[Image.Image]) -> torch.Tensor | None:
        """(N, D) of one forward pass; None where its output cannot be told apart by picture."""
        import torch

        try:
            given = self.image_processor(images=images, return_tensors="pt")
        except (ValueError, TypeError, RuntimeError):  # pictures that a processor brings to different sizes
            if len(images) == 1:
                raise
            return None
        parameter = next(self.model.parameters())
        inputs = {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in given.items()
            if isinstance(value, torch.Tensor)
        }
        if self.feature == "image_embeds":
            found = _called(self.model.get_image_features, inputs)
            return found if isinstance(found, torch.Tensor) else found.pooler_output
        hidden = self._hidden(inputs)
        if "image_grid_thw" in inputs and hidden.dim() == 2:  # Qwen-VL: the patches of all pictures in one sequence
            patches = inputs["image_grid_thw"].prod(-1)
            sizes = (patches * len(hidden) // patches.sum()).tolist()
            return torch.cat([self._pooled(part[None]) for part in hidden.split(sizes)])
        hidden = hidden.reshape(-1, *hidden.shape[-2:])
        if len(hidden) == len(images):
            return self._pooled(hidden)
        if len(images) > 1:
            return None
        # several tiles of one picture: all their tokens, or the mean of their class tokens
        return hidden[:, :1].mean(0) if self.feature == "cls" else self._pooled(hidden.flatten(0, 1)[None])

    def _hidden(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The last hidden state of the vision encoder: (N, T, D), (tiles, T, D) or (patches, D)."""
        if self._tower is None:
            hidden = _last_hidden_state(_called(self.model.forward, inputs, call=self.model))
            return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden
        caught: list[Any] = []
        handle = self._tower.register_forward_hook(lambda module, given, output: caught.append(output))
        try:
            _called(getattr(self.model, "model", self.model).get_image_features, inputs)
        finally:
            handle.remove()
        return _last_hidden_state(caught[0])

    def _pooled(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, D) of (N, T, D)."""
        if self.feature == "max":
            return hidden.amax(1)
        return hidden[:, 0] if self.feature == "cls" else hidden.mean(1)


def load_embedder(config: EmbedderConfig, engine: Any = None) -> Embedder:
    """The embedder that a config names.

    Args:
        config: which model and feature.
        engine: the generator in memory, taken for `own`.

    Raises:
        ModelError: if the model cannot be found, has no vision encoder, or lacks the feature.
        ValueError: for `own` without an engine that holds its model in this process.
    """
    if config.model_name_or_path == OWN:
        if "vision_embed" not in getattr(engine, "capabilities", ()):
            raise ValueError(
                "embedder.model_name_or_path is 'own', the generator's vision encoder, and no generator is loaded in this "
                "process to take it from. Name a model that embeds pictures, such as openai/clip-vit-large-patch14."
            )
        return Embedder(engine.model, engine.processor.image_processor, feature=config.feature,
                        batch_size=config.batch_size, weights=weights_of(engine.fingerprint))  # fmt: skip
    named = _named(config)
    source, _, revision = resolve(named)
    try:
        check_family(source, replace(named, model_revision=revision))
    except ModelError:
        model, processor = _load_encoder(source, revision, config)
    else:
        model, processor = load_model(named), load_processor(named).image_processor
    return Embedder(model, processor, feature=config.feature, batch_size=config.batch_size)


def check_embedder(config: EmbedderConfig) -> None:
    """Raise `ModelError` if the model that embeds pictures is nowhere, before any weights are read."""
    if config.model_name_or_path != OWN:
        resolve(_named(config))


def _named(config: EmbedderConfig) -> ModelConfig:
    return ModelConfig(config.model_name_or_path, config.model_revision, dtype=config.dtype, device=config.device)


def _load_encoder(source: str, revision: str | None, config: EmbedderConfig) -> tuple[Any, Any]:
    """Model and image processor of a CLIP, SigLIP or DINOv2."""
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    try:
        settings = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"config.json of {source!r} could not be read: {error}") from error
    if not any(hasattr(settings, name) for name in ("vision_config", "image_size", "num_channels")):
        raise ModelError(
            f"{source!r} is of model_type {settings.model_type!r}, which has no vision encoder, so it cannot embed pictures. "
            "Use CLIP, SigLIP, DINOv2 or a vision-language model."
        )
    check_weights(source)
    try:
        model, report = AutoModel.from_pretrained(
            source, revision=revision, dtype=config.dtype, use_safetensors=True, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"the picture encoder {source!r} could not be loaded: {error}") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ModelError(
            f"the weights of {source!r} lack {len(missing)} tensor(s) that a {type(model).__name__} has "
            f"({', '.join(missing[:3])}); they would be random. Use a complete checkpoint."
        )
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if config.dtype == "auto" and torch.device(device).type == "cpu":
        model = model.float()  # a CPU computes badly in the half precision that CLIP is stored in
    return model.to(device).eval(), processor


def _vision_tower(model: Any) -> Any | None:
    """The vision encoder inside a model; None where the model is one."""
    tower = next((module for name, module in model.named_modules() if name.split(".")[-1] in _TOWERS), None)
    if tower is None and not str(getattr(model, "main_input_name", "")).startswith("pixel_values"):
        raise ModelError(
            f"a {type(model).__name__} has no vision encoder that could be found ({', '.join(_TOWERS)}), so it cannot embed "
            "pictures. Use CLIP, SigLIP, DINOv2 or another vision-language model."
        )
    return tower if hasattr(getattr(model, "model", model), "get_image_features") else None


def _feature(wanted: str, model: Any, tower: Any | None) -> str:
    """The feature to take, `auto` resolved."""
    joint = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
    encoder = tower if tower is not None else model
    classes = any(part in _CLASS_TOKENS for name, _ in encoder.named_parameters() for part in name.split("."))
    if wanted == "image_embeds" and not joint:
        raise ModelError(
            f"a {type(model).__name__} has no space that it shares with text, so there are no image_embeds. Use the feature "
            "`cls`, `mean` or `max`, or `auto`."
        )
    if wanted == "cls" and not classes:
        raise ModelError(
            f"the vision encoder {type(encoder).__name__} has no class token, so `cls` would be the vector of its first patch, "
            "the top left corner. Use the feature `mean` or `max`, or `auto`."
        )
    if wanted != "auto":
        return wanted
    if joint:
        return "image_embeds"
    return "cls" if tower is None and classes else "mean"


def _called(function: Any, inputs: Mapping[str, Any], call: Any = None) -> Any:
    """Call with those inputs that the function names."""
    known = inspect.signature(function).parameters
    return (call or function)(**{name: value for name, value in inputs.items() if name in known})


def _last_hidden_state(output: Any) -> torch.Tensor:
    found = getattr(output, "last_hidden_state", None)
    return found if found is not None else output[0] if isinstance(output, tuple) else output

"""POVID: pairs whose rejected answer is the reference with plausible mistakes written into it.

Chosen is the reference answer of a row; rejected is what an editor makes of it: rules that know the row's vocabulary, or an
LLM or VLM. With `rejected_images: noised` the noised picture is written beside, for training terms that look at it.

Paper: Zhou, Cui, Rafailov, Finn, Yao, "Aligning Modalities in Vision Large Language Models via Preference Fine-tuning",
arXiv 2402.11411. Code: YiyangZhou/POVID at 92c7c67. The authors' editor was GPT-4V; its wording was not released.
Differs from the released code: noised pixels are clamped, not wrapped (`noise.wrap: true` wraps); the noise is drawn from the
row's seed, not anew at each fetch.

Needs: rows with reference answers; `editor: engine` needs a generator, `editor: rules` needs none.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prefalign import records, sources, stages, store
from prefalign.corruption import diffusion_noise, noise_factors
from prefalign.editors import Edit, EditItem, Editor, EngineEditor
from prefalign.engines import Sampling
from prefalign.engines.config import EngineConfig
from prefalign.images import EncodedImage, encode_png
from prefalign.manifest import Manifest
from prefalign.records import Pair, Prompt
from prefalign.rule_editor import KINDS, RuleEditor, Vocabulary
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import same_answer

if TYPE_CHECKING:
    from PIL import Image

METHOD = "povid"


@dataclass
class NoiseConfig:
    """The noised picture of stage 2.

    Attributes:
        step: step of the schedule, counted from zero.
        space: `native` noises the picture as it is, `preprocessed` at the encoder's resolution.
        wrap: let pixels outside 0..255 wrap around, as the released code does.
    """

    step: int = 500
    space: Literal["native", "preprocessed"] = "native"
    wrap: bool = False

    def __post_init__(self) -> None:
        noise_factors(self.step)


@dataclass
class RuleConfig:
    """Settings of the rule-based editor.

    Attributes:
        kinds: types of mistakes.
        injections: mistakes per answer, at most one in a sentence.
        vocabulary: the words it knows; those of the embedded world if left out.
    """

    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    injections: int = 1
    vocabulary: Vocabulary = field(default_factory=Vocabulary)


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: rows with reference answers.
        output: folder of pairs.
        editor: `rules`, or `engine` for an LLM or VLM.
        rules: settings of the rules.
        model: the engine's model.
        family: the engine's prompt family; `auto` decides by the question.
        pictures: show the engine the row's pictures (false for an LLM).
        sampling: how the engine is drawn from.
        rejected_images: `noised` writes the noised pictures as `rejected_images`.
        noise: step and space of that noise; the step is noted in every row's `meta`.
        batch_size: sequences per forward pass.
        seed: with a row's id it decides edits and noise.
    """

    data: DataConfig
    output: OutputConfig
    editor: Literal["rules", "engine"] = "rules"
    rules: RuleConfig = field(default_factory=RuleConfig)
    model: EngineConfig | None = None
    family: Literal["auto", "captioning", "reasoning"] = "auto"
    pictures: bool = True
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=512))
    rejected_images: Literal["none", "noised"] = "none"
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    batch_size: int = 16
    seed: int = 0


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    sources.files_of(config.data)
    editor = load_editor(config)
    return store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, editor, config),
        output=config.output,
        record=Pair,
        settings=row_settings(config),
        seed=config.seed,
        models={"injector": editor.fingerprint},
    )


def load_editor(config: Config) -> Editor:
    """The editor that a config asks for.

    Raises:
        ValueError: if an engine is asked for and no model is named.
    """
    if config.editor == "rules":
        rules = config.rules
        return RuleEditor(rules.vocabulary, kinds=rules.kinds, injections=rules.injections, seed=config.seed)
    if config.model is None:
        raise ValueError(
            "editor is `engine`, and no model is named to write the edits. Set model.model_name_or_path, or editor to `rules`."
        )
    from prefalign.engines.loading import load_engine

    engine = load_engine(config.model, batch_size=config.batch_size)
    return EngineEditor(engine, config.sampling, family=config.family, pictures=config.pictures, seed=config.seed)


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows."""
    if config.editor == "rules":
        how: dict[str, Any] = {"rules": dataclasses.asdict(config.rules)}
    else:
        how = {"family": config.family, "pictures": config.pictures, "sampling": dataclasses.asdict(config.sampling)}
    return {"editor": config.editor, **how, "rejected_images": config.rejected_images,
            "noise": dataclasses.asdict(config.noise)}  # fmt: skip


def process(block: list[Prompt], editor: Editor, config: Config) -> list[Outcome]:
    """One outcome for each prompt of a block; an engine edits all of them in one call."""

    def work(rows: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        items = [
            EditItem(prompt.id, prompt.messages, images, str(prompt.answer), prompt.facts) for prompt, images in rows
        ]
        return [
            _outcome(prompt, item, edit, editor.fingerprint, config)
            for (prompt, _), item, edit in zip(rows, items, editor.edit(items), strict=True)
        ]

    return stages.in_order(block, stages.usable, work)


def _outcome(prompt: Prompt, item: EditItem, edit: Edit, injector: str, config: Config) -> Outcome:
    if edit.refused == "generation_failed":
        return Failed(edit.refused, edit.message)
    if edit.refused is not None:
        return Dropped(edit.refused)
    if same_answer(item.answer, edit.text):
        return Dropped("identical_answers")
    noise_seed = records.row_seed(config.seed, f"{prompt.id}/noise")
    meta = {
        "injector": injector,
        "injection_type": edit.kind,
        "injected": edit.injected,
        "noise_step": config.noise.step,
        "noise_space": config.noise.space,
        "noise_seed": noise_seed,
    }
    noised = _noised(item, noise_seed, config.noise) if config.rejected_images == "noised" else []
    return [
        stages.make_pair(prompt, method=METHOD, chosen=item.answer, rejected=edit.text, settings=row_settings(config),
                         seed=config.seed, model=injector, meta=meta, rejected_images=noised)
    ]  # fmt: skip


def _noised(item: EditItem, seed: int, noise: NoiseConfig) -> list[EncodedImage]:
    return [
        encode_png(diffusion_noise(image, seed=seed + number, step=noise.step, space=noise.space, wrap=noise.wrap))
        for number, image in enumerate(item.images)
    ]


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

"""S-VCO: pairs of two pictures that differ in one detail, with two texts that are each true of one of them only.

Both sides are right about their own picture and wrong about the other: (images, chosen) and (rejected_images, rejected). This
stage draws no picture. It takes counterfactual pairs, those of the embedded world (`prefalign scenes export --kind twin`) or
your own (MVC's layout), and keeps the ones that teach: pictures alike in kind and different to the eye, texts that differ in a
content word, a question that does not tell which picture it is about.

Paper: Wu, Sun, Wen, Haber, "Symmetrical Visual Contrastive Optimization: Aligning Vision-Language Models with Minimal
Contrastive Images", arXiv 2502.13928. Code: s-vco/s-vco at bc8f941, which holds the loss and not the filter; the filter's rule
and encoders are from its README, the pooled features are ours (image embedding of SigLIP, class token of DINOv2). Left out:
the rewriting of both texts by GPT-4o, for which there is no code either. Bring texts that are written already.

Needs: pairs with two pictures; two picture encoders. The paper's loss reads both sides; what reads `images` alone (stock TRL,
`term: text`) uses the first picture with both texts, which is the paper's "DPO on MVC".
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefalign import sources, stages, store
from prefalign.embeddings import Embedder, EmbedderConfig, load_embedder
from prefalign.english import ARTICLES, AUXILIARIES, stem
from prefalign.images import sha256
from prefalign.manifest import Manifest
from prefalign.records import Pair, message_text, record_id
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.text import same_answer, swap_yes_no, word_diff

if TYPE_CHECKING:
    from PIL import Image

METHOD = "s_vco"
_WORD = re.compile(r"\w+")
_POINTING = {"this", "that", "these", "those", "there", "here"}
_PRONOUNS = {"i", "you", "it", "we", "they", "its", "their", "them", "which", "who", "whose"}
_ANYWHERE = {"in", "on", "at", "by", "from", "with", "for", "to"}
_SEEMING = {"seem", "seems", "appear", "appears"}
_FUNCTION_WORDS = ARTICLES | AUXILIARIES | _POINTING | _PRONOUNS | _SEEMING | {"of", "and", "or", "but", "as"}


@dataclass
class FilterConfig:
    """Which pairs of pictures are kept.

    Attributes:
        semantic: encoder that tells what pictures are of.
        visual: encoder that tells what they look like.
        least_semantic: pictures at or below this cosine of `semantic` are of different things.
        most_visual: pictures at or above this cosine of `visual` cannot be told apart.
        exempt: categories that are kept whatever their similarity: a mirrored picture looks much the same to an encoder.
    """

    semantic: EmbedderConfig = field(default_factory=lambda: EmbedderConfig("google/siglip-so400m-patch14-384"))
    visual: EmbedderConfig = field(default_factory=lambda: EmbedderConfig("facebook/dinov2-large", feature="cls"))
    least_semantic: float = 0.7
    most_visual: float = 0.5
    exempt: list[str] = field(default_factory=lambda: ["left-right"])


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: pairs with `rejected_images`: ours, or rows in MVC's layout.
        output: folder of pairs.
        filter: which pairs of pictures are kept; null keeps all of them and embeds nothing.
        seed: part of a pair's id; nothing is drawn.
    """

    data: DataConfig
    output: OutputConfig
    filter: FilterConfig | None = field(default_factory=FilterConfig)
    seed: int = 0


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    sources.files_of(config.data)
    encoders = load_encoders(config.filter) if config.filter else None
    return store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, encoders, config),
        output=config.output,
        record=Pair,
        settings=row_settings(config),
        seed=config.seed,
        models=_fingerprints(encoders),
        reads=Pair,
    )


@dataclass
class Encoders:
    """The two picture encoders of the filter."""

    semantic: Embedder
    visual: Embedder


def load_encoders(config: FilterConfig) -> Encoders:
    """Load both encoders; one that is asked for twice is loaded once."""
    semantic = load_embedder(config.semantic)
    return Encoders(semantic, semantic if config.visual == config.semantic else load_embedder(config.visual))


def _fingerprints(encoders: Encoders | None) -> dict[str, str]:
    if encoders is None:
        return {}
    return {"semantic": encoders.semantic.fingerprint, "visual": encoders.visual.fingerprint}


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows. `two_sided` says in every manifest that the rejected text is true of its own picture."""
    how = config.filter and {
        "least_semantic": config.filter.least_semantic,
        "most_visual": config.filter.most_visual,
        "exempt": config.filter.exempt,
    }
    return {"two_sided": True, "filter": how}


def process(block: list[Pair], encoders: Encoders | None, config: Config) -> list[Outcome]:
    """One outcome for each pair of a block; all pictures of a block are embedded together."""

    def work(rows: list[tuple[Pair, list[Image.Image]]]) -> list[Outcome]:
        found = [_similarities(encoder, rows) for encoder in (encoders.semantic, encoders.visual)] if encoders else []
        alike = list(zip(*found, strict=True)) or [(None, None)] * len(rows)
        return [
            _outcome(pair, semantic, visual, encoders, config)
            for (pair, _), (semantic, visual) in zip(rows, alike, strict=True)
        ]

    return stages.in_order(block, _prepare, work)


def _prepare(pair: Pair) -> list[Image.Image] | Dropped | Failed:
    """The decoded pictures of both sides, first all of `images`, or why the pair cannot be used."""
    if not pair.images:
        return Dropped("no_picture")
    if not pair.rejected_images:
        return Dropped("no_rejected_picture")
    if pair.on_two_pictures:  # its rejected text is wrong of its own picture
        return Dropped("two_pictures")
    if pair.meta.get("two_sided") is False:
        return Dropped("not_two_sided")
    if (reason := text_fault(pair)) is not None:
        return Dropped(reason)
    images = stages.opened([*pair.images, *pair.rejected_images])
    if isinstance(images, list) and _same_pixels(images[: len(pair.images)], images[len(pair.images) :]):
        return Dropped("same_picture")
    return images


def _same_pixels(images: list[Image.Image], others: list[Image.Image]) -> bool:
    """Whether both sides show the same, however it is encoded."""
    return [(image.size, image.tobytes()) for image in images] == [(image.size, image.tobytes()) for image in others]


def text_fault(pair: Pair) -> str | None:
    """Why the texts of a pair do not make a contrast, or None.

    Returns:
        `identical_texts`; `no_content_difference` if they differ in function words, case or punctuation only;
        `query_leaks` if the prompt uses words that one text alone has, and none that the other alone has (a yes/no question may:
        it names what it asks about; "in", "with" and the like, which most prompts have, can only show that it names both);
        where facts tell, `false_of_its_picture` and `true_of_both`.
    """
    chosen, rejected = message_text(pair.chosen), message_text(pair.rejected)
    if same_answer(chosen, rejected):
        return "identical_texts"
    words = content_words(chosen), content_words(rejected)
    if words[0] == words[1]:
        return "no_content_difference"
    asked = stems(content_words(message_text(pair.prompt)))
    sides = stems(words[0]), stems(words[1])
    alone = sides[0] - sides[1], sides[1] - sides[0]
    one_sided = all(bool(named & alone[0]) != bool(named & alone[1]) for named in (asked, asked - _ANYWHERE))
    if one_sided and not _yes_and_no(chosen, rejected):
        return "query_leaks"
    other = pair.facts.get("rejected")
    if pair.facts.get("world") == "scenes" and isinstance(other, dict):
        from prefalign.scenes.twins import true_of

        truths = [true_of(text, facts) for text in (chosen, rejected) for facts in (pair.facts, other)]
        if not (truths[0] and truths[3]):
            return "false_of_its_picture"
        if truths[1] or truths[2]:
            return "true_of_both"
    return None


def content_words(text: str) -> list[str]:
    """Words of a text in order, lower case, without articles, auxiliaries, most pronouns and the like.

    Numbers, negations, prepositions, he and she stay: two and three, no and a, left and right, on and under are contrasts.
    """
    return [word for word in _WORD.findall(text.lower()) if word not in _FUNCTION_WORDS]


def stems(words: list[str]) -> set[str]:
    """What a noun's singular and plural share, so that "how many stars" names neither one star nor two stars.

    It need not be a word: house and houses give hous.
    """
    return {stem(word) for word in words}


def _yes_and_no(chosen: str, rejected: str) -> bool:
    """Whether one text begins with yes and the other with no."""
    first = swap_yes_no(chosen)
    return first is not None and content_words(first)[:1] == content_words(rejected)[:1]


def _similarities(encoder: Embedder, rows: list[tuple[Pair, list[Image.Image]]]) -> list[float]:
    """Cosine of each row's pictures with their counterparts; of several pictures, the pair that is least alike."""
    vectors = encoder.embed([image for _, images in rows for image in images])
    found, start = [], 0
    for _, images in rows:
        one, other = vectors[start : start + len(images)].reshape(2, len(images) // 2, -1)
        found.append(round(float((one * other).sum(-1).min()), 4))
        start += len(images)
    return found


def _outcome(
    pair: Pair, semantic: float | None, visual: float | None, encoders: Encoders | None, config: Config
) -> Outcome:
    category = str(pair.facts.get("category") or pair.meta.get("category") or "unknown")
    exempt = config.filter is not None and category in config.filter.exempt
    if config.filter is not None and semantic is not None and visual is not None and not exempt:
        if semantic <= config.filter.least_semantic:
            return Dropped("pictures_unrelated")
        if visual >= config.filter.most_visual:
            return Dropped("pictures_look_alike")
    changes = word_diff(message_text(pair.chosen), message_text(pair.rejected))
    settings, models = row_settings(config), _fingerprints(encoders)
    meta = {
        "parent": pair.id,
        "seed": config.seed,
        "settings": settings,
        "two_sided": True,
        "category": category,
        "semantic_similarity": semantic,
        "visual_similarity": visual,
        "filter_skipped": exempt or config.filter is None,
        "encoders": models,
        "contrast": [[text.strip() for op, text in changes if op == side] for side in ("removed", "added")],
        "images_sha256": [sha256(image) for image in pair.images],
        "rejected_images_sha256": [sha256(image) for image in pair.rejected_images],
        "parent_method": pair.method,
        "parent_meta": pair.meta,
    }
    identity = record_id(
        method=METHOD, parent=pair.id, settings=settings, model="+".join(models.values()), seed=config.seed
    )
    return [dataclasses.replace(pair, id=identity, method=METHOD, meta=meta)]


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

"""Benchmarks from a user's own files: COCO captions (CHAIR), POPE, short answers; replies made elsewhere are read too."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prefalign.evals import Item, Prediction, attributes, chair, yesno
from prefalign.evals.reading import read_jsonl
from prefalign.images import EncodedImage, read_image
from prefalign.records import user_message


@dataclass
class ChairFiles:
    """CHAIR on COCO, from your copies of its files.

    Attributes:
        synonyms: the benchmark's file of 80 lines; the first name of a line is the node.
        instances: `instances_*2014.json` files.
        captions: `captions_*2014.json` files.
        questions: JSONL of `{"image_id", "image"}`: which pictures to describe.
        images: folder of the pictures.
        prompt: what is asked.
        parser: `robust`, or `original` for the released code's reading of captions.
        generated: captions made elsewhere, JSONL of `{"image_id", "caption"}`; no model is needed then.
    """

    synonyms: Path
    instances: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    questions: Path | None = None
    images: Path | None = None
    prompt: str = "Please describe this image in detail."
    parser: chair.Parser = "robust"
    generated: Path | None = None


@dataclass
class PopeFiles:
    """POPE.

    Attributes:
        questions: its JSONL files (random, popular, adversarial).
        images: folder of the pictures.
        answers: replies made elsewhere, one file for each of questions; none: a model is asked.
        suffix: appended to each question, as in `Answer the question using a single word or phrase.`; the benchmark asks bare.
    """

    questions: list[Path]
    images: Path | None = None
    suffix: str = ""
    answers: list[Path] = field(default_factory=list)


@dataclass
class ShortFiles:
    """Short answers.

    Attributes:
        questions: JSONL of `{"id", "image", "question", "answer"}`, optional `kind`, `group`, `choices`.
        images: folder of the pictures.
    """

    questions: Path
    images: Path | None = None


@dataclass
class FilesData:
    """Benchmarks from your files; leave out what you do not have.

    Attributes:
        chair: captions, whose objects are compared with those of the pictures.
        pope: yes/no questions about objects.
        short: questions with short answers.
    """

    chair: ChairFiles | None = None
    pope: PopeFiles | None = None
    short: ShortFiles | None = None


@dataclass
class Loaded:
    """Items of all sections, the vocabulary that reads the captions among them, and replies that the files bring along."""

    items: list[Item]
    vocabulary: chair.Vocabulary | None
    replies: list[Prediction]


def load_files(files: FilesData, *, needs_pictures: bool) -> Loaded:
    """Read every section that is given.

    Args:
        needs_pictures: whether a model will be asked; otherwise no picture is opened.

    Raises:
        ValueError: for a folder, file or line that is missing or malformed.
    """
    loaded = Loaded([], None, [])
    if files.chair is not None:
        items, made, loaded.vocabulary = chair_items(files.chair, needs_pictures)
        loaded.items += items
        loaded.replies += made
    if files.pope is not None:
        items, made = pope_items(files.pope, needs_pictures)
        loaded.items += items
        loaded.replies += made
    if files.short is not None:
        folder = _pictures(files.short.images, "files.short", needs_pictures)
        loaded.items += attributes.read_short(files.short.questions, folder)
    return loaded


def chair_items(data: ChairFiles, needs_pictures: bool) -> tuple[list[Item], list[Prediction], chair.Vocabulary]:
    """Pictures to describe, or the captions that were generated elsewhere, with COCO's truth."""
    vocabulary = chair.vocabulary(chair.read_synonyms(data.synonyms), parser=data.parser)
    made = chair.read_captions(data.generated) if data.generated is not None else {}
    if data.questions is not None:
        rows = read_jsonl(data.questions, required=("image_id", "image"))
        asked = {int(row["image_id"]): str(row["image"]) for _, row in rows}
    elif made:
        asked = dict.fromkeys(made, "")
    else:
        raise ValueError(
            "`files.chair` needs `questions` (pictures to describe) or `generated` (captions made elsewhere)."
        )
    truth = chair.read_coco_truth(asked, vocabulary, instances=data.instances, captions=data.captions)
    folder = _pictures(data.images, "files.chair", needs_pictures and not made)
    items = [
        Item(
            eval="chair",
            id=f"coco-{image_id}",
            group=f"coco-{image_id}",
            images=[read_image(folder / name)] if folder is not None and not made else [],
            messages=[user_message(data.prompt, images=1)],
            kind="coco",
            truth=truth[image_id],
        )
        for image_id, name in asked.items()
    ]
    given = [
        Prediction("chair", f"coco-{image_id}", f"coco-{image_id}", data.prompt, made[image_id])
        for image_id in asked
        if image_id in made
    ]
    return items, given, vocabulary


def pope_items(data: PopeFiles, needs_pictures: bool) -> tuple[list[Item], list[Prediction]]:
    """POPE questions of every file, and the answers that were made elsewhere."""
    if data.answers and len(data.answers) != len(data.questions):
        raise ValueError(
            f"`files.pope` has {len(data.answers)} answer file(s) for {len(data.questions)} question file(s); they belong "
            "together in order. Give one for each."
        )
    folder = _pictures(data.images, "files.pope", needs_pictures and not data.answers)
    items: list[Item] = []
    given: list[Prediction] = []
    known: dict[Path, EncodedImage] = {}
    for number, questions in enumerate(data.questions):
        found = yesno.read_pope(questions, None if data.answers else folder, suffix=data.suffix, known=known)
        if data.answers:
            given += yesno.read_pope_answers(data.answers[number], found)
        items += found
    return items, given


def _pictures(folder: Path | None, section: str, needed: bool) -> Path | None:
    """The folder of a section's pictures; None where only saved replies are scored."""
    if not needed:
        return None
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"`{section}.images` is {folder}, which is no folder; the model would be asked without pictures. Give the folder."
        )
    return folder

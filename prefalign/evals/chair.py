"""CHAIR: which objects a caption names, which of them are not in the picture, and which it misses.

    CHAIRi = sum over captions of #(m not in G) / sum of #m        m: mentioned nodes, a list with repeats
    CHAIRs = captions with at least one m not in G / all captions  G: nodes in the picture
    recall = sum of |set(m) & G| / sum of |G|

Source: Rohrbach et al. 2018, arXiv 1809.02156; LisaAnne/Hallucination `utils/chair.py`; recall as in CHAIR-metric-standalone.
`original` reads captions as the released code does, with its quirks: "bus" loses its s and is never counted while "buses"
is; a synonym with a stray leading blank or a missing one never matches; only two-word names of its own list are merged.
`robust` counts all of these. In both, the colour "orange" counts as the fruit where the table has it, and "no dog" as a
mention.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefalign.evals import Item, Prediction, Scored, reply_status
from prefalign.evals.reading import check_row, read_json, read_jsonl, read_text

Parser = Literal["robust", "original"]

TWO_WORD_NAMES = (
    "air plane", "baseball bat", "baseball glove", "bow tie", "cell phone", "fire hydrant", "hair drier", "home plate",
    "hot dog", "laptop computer", "mobile phone", "motor bike", "motor cycle", "parking meter", "potted plant", "sports ball",
    "stop light", "stop sign", "street light", "suit case", "teddy bear", "tennis racket", "traffic light", "traffic signal",
    "wine glass",
)  # fmt: skip
ANIMALS = ("animal", "bear", "bird", "cat", "cow", "cub", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")

_TOKEN = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*|[^\sa-z0-9]")
_IRREGULAR = {"people": "person", "children": "child", "men": "man", "geese": "goose", "feet": "foot", "teeth": "tooth",
              "leaves": "leaf", "loaves": "loaf", "oxen": "ox", "axes": "axe"}  # fmt: skip
_MICE = {"mice": "mouse"}
_UNCHANGED = ("scissors", "news", "series", "species", "pliers", "shears", "clippers", "chassis", "rice")
_KEPT_PLURALS = (
    "cookies",
    "doggies",
    "veggies",
    "birdies",
    "beanies",
    "collies",
    "cuties",
    "aunties",
    "pixies",
    "zombies",
)
_ORIGINAL_RULES = [
    (re.compile(pattern + "$"), replacement)
    for pattern, replacement in (
        (r"(.)ae", r"\1a"), (r"([octpvir])i", r"\1us"), (r"(cris|ax|test)es", r"\1is"), (r"(shoe)s", r"\1"),
        (r"(o)es", r"\1"), (r"(bus)es", r"\1"), (r"([ml])ice", r"\1ouse"), (r"(x|ch|ss|sh)es", r"\1"),
        (r"movies", "movie"), (r"([^aeiouy]|qu)ies", r"\1y"), (r"([aeo]l|[^d]ea|ar)ves", r"\1f"), (r"(er)ves", r"\1ve"),
        (r"([nlw]i)ves", r"\1fe"), (r"([lr])ves", r"\1f"), (r"([aeo]|[sth]i)ves", r"\1ve"), (r"([^f])ves", r"\1fe"),
        (r"(ba|the)ses", r"\1sis"), (r"([hdronp]|cl)oses", r"\1ose"), (r"([ti])a", r"\1um"), (r"s", ""),
    )
]  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """How words become nodes.

    Attributes:
        nodes: surface name to node name.
        merges: two or more words to the one name they are treated as.
        parser: `robust`, or `original` for the released code's reading.
    """

    nodes: Mapping[str, str]
    merges: Mapping[str, str]
    parser: Parser = "robust"

    def node(self, name: str) -> str:
        """The node of a category name.

        Raises:
            ValueError: for a name that the synonym table does not have.
        """
        if name not in self.nodes:
            raise ValueError(
                f"category {name!r} is not in the synonym table, so its mentions cannot be checked. Add it there."
            )
        return self.nodes[name]


def vocabulary(synonyms: Mapping[str, Sequence[str]], *, parser: Parser = "robust") -> Vocabulary:
    """Build the lookup from a table of node -> names.

    Args:
        synonyms: `{"dog": ["dog", "puppy", ...]}`.
        parser: see the module's docstring. A name listed under two nodes goes to the last one (`original`), or to the node
            that is called so, else to the first (`robust`).
    """
    nodes: dict[str, str] = {}
    if parser == "original":
        nodes = {name: node for node, names in synonyms.items() for name in names}
    else:
        listed = [
            (" ".join(name.split()), node)
            for node, names in synonyms.items()
            for raw in names
            for name in raw.split(",")
        ]
        nodes = {name: node for name, node in reversed(listed) if name} | {node: node for node in synonyms}
    merges = {name: name for name in TWO_WORD_NAMES}
    if parser == "robust":
        merges |= {name: name for name in nodes if " " in name}
    merges |= {f"{qualifier} {animal}": animal for qualifier in ("baby", "adult") for animal in ANIMALS}
    merges |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet",
               "wine glas": "wine glass"}  # fmt: skip
    return Vocabulary(nodes, merges, parser)


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Read the benchmark's synonym file: one line per node, names separated by `, `, the first is the node.

    Names keep a stray leading blank, which the parser `original` needs.

    Raises:
        ValueError: for a file without any line.
    """
    lines = [line.strip() for line in read_text(Path(path)).splitlines()]
    table = {line.split(", ")[0]: line.split(", ") for line in lines if line}
    if not table:
        raise ValueError(f"{Path(path).name} holds no synonyms; CHAIR would find no object in any caption.")
    return table


def mentions(caption: str, vocabulary: Vocabulary) -> list[str]:
    """Nodes that a caption names, in order, repeats kept."""
    tokens = _TOKEN.findall(caption.lower())
    if vocabulary.parser == "original":
        words = _merge([_singular_as_released(token) for token in tokens], vocabulary)
    else:
        words = _robust_words(tokens, vocabulary)
    if "toilet" in words:
        words = [word for word in words if word != "seat"]
    return [vocabulary.nodes[word] for word in words if word in vocabulary.nodes]


def score(item: Item, prediction: Prediction | None, vocabulary: Vocabulary) -> Scored:
    """Count a caption's mentions against the item's truth.

    Returns:
        numbers: `captions` (1), `mentions`, `hallucinated`, `hallucinating` (0/1), `hit`, `truth`, `words`, and where
        `item.clear` is known `hit_clear` and `truth_clear`.
    """
    status = reply_status(prediction)
    if status is not None or prediction is None:
        return Scored("chair", item.id, item.group, status or "error", item.kind)
    named = mentions(prediction.text, vocabulary)
    wrong = [node for node in named if node not in item.truth]
    numbers = {
        "captions": 1,
        "mentions": len(named),
        "hallucinated": len(wrong),
        "hallucinating": int(bool(wrong)),
        "hit": len(set(named) & item.truth),
        "truth": len(item.truth),
        "words": len(prediction.text.split()),
    }
    if item.clear is not None:
        numbers |= {"hit_clear": len(set(named) & item.clear), "truth_clear": len(item.clear)}
    parsed = ", ".join(f"{node}!" if node not in item.truth else node for node in named)
    return Scored("chair", item.id, item.group, "ok", item.kind, parsed, {key: float(n) for key, n in numbers.items()})


def read_coco_truth(
    image_ids: Iterable[int],
    vocabulary: Vocabulary,
    *,
    instances: Sequence[Path] = (),
    captions: Sequence[Path] = (),
) -> dict[int, frozenset[str]]:
    """Nodes in each picture: instance categories plus what the reference captions name.

    Args:
        image_ids: pictures wanted.
        instances: `instances_*.json` files of COCO (val and train 2014 for the benchmark).
        captions: `captions_*.json` files of COCO.

    Raises:
        ValueError: if a picture is in none of the files: every mention in it would count as hallucinated; or if a file is
            cut off or not COCO's.
    """
    found: dict[int, set[str]] = {image_id: set() for image_id in image_ids}
    seen: set[int] = set()
    for file in [*instances, *captions]:
        content = read_json(file)
        check_row(content, ("annotations",), Path(file).name)
        names = {category["id"]: category["name"] for category in content.get("categories", [])}
        seen.update(image["id"] for image in content.get("images", []))
        for annotation in content["annotations"]:
            image_id = annotation["image_id"]
            seen.add(image_id)
            if image_id not in found:
                continue
            if "caption" in annotation:
                found[image_id].update(mentions(annotation["caption"], vocabulary))
            else:
                found[image_id].add(vocabulary.node(names[annotation["category_id"]]))
    unknown = sorted(set(found) - seen)
    if unknown:
        raise ValueError(
            f"{len(unknown)} picture(s) are in none of the annotation files (first: {unknown[0]}), so all their mentions "
            "would count as hallucinated. Give the files of their split (train and val 2014)."
        )
    return {image_id: frozenset(nodes) for image_id, nodes in found.items()}


def read_captions(path: str | Path) -> dict[int, str]:
    """Generated captions: JSONL of `{"image_id", "caption"}` (OPERA, lmms-eval), a list of them, or the original's `imgToEval`.

    Raises:
        ValueError: for a file without captions, a row without these keys, or a picture with two captions.
    """
    path = Path(path)
    keys = ("image_id", "caption")
    try:
        content: Any = json.loads(read_text(path))
    except json.JSONDecodeError:
        content = None
    if isinstance(content, dict) and "imgToEval" in content:
        content = list(content["imgToEval"].values())
    rows = list(enumerate(content, 1)) if isinstance(content, list) else read_jsonl(path, required=keys)
    if not rows:
        raise ValueError(f"{path.name} holds no captions: there would be nothing to score. Check how it was written.")
    found: dict[int, str] = {}
    for number, row in rows:
        check_row(row, keys, f"{path.name} row {number}")
        image_id = int(row["image_id"])
        if image_id in found:
            raise ValueError(f"{path.name} has two captions for picture {image_id}; which one counts? Keep one.")
        found[image_id] = row["caption"]
    return found


def _singular_as_released(word: str) -> str:
    """Singular as the released code's `pattern.en` gives it, restated for English nouns of everyday captions."""
    if any(kept.endswith(word) for kept in _UNCHANGED) or word.endswith(_KEPT_PLURALS):
        return word
    for plural, singular in _IRREGULAR.items():
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    for pattern, replacement in _ORIGINAL_RULES:
        if pattern.search(word):
            return pattern.sub(replacement, word)
    return word


def _merge(words: list[str], vocabulary: Vocabulary) -> list[str]:
    merged, position = [], 0
    while position < len(words):
        pair = " ".join(words[position : position + 2])
        if pair in vocabulary.merges:
            merged.append(vocabulary.merges[pair])
            position += 2
        else:
            merged.append(words[position])
            position += 1
    return merged


def _robust_words(tokens: list[str], vocabulary: Vocabulary) -> list[str]:
    words, position = [], 0
    while position < len(tokens):
        for length in (3, 2, 1):
            phrase = " ".join(tokens[position : position + length])
            found = _known(phrase.replace("-", " "), vocabulary) if length <= len(tokens) - position else None
            if found is not None:
                words.append(found)
                position += length
                break
        else:
            words.append(tokens[position])
            position += 1
    return words


def _known(phrase: str, vocabulary: Vocabulary) -> str | None:
    """The name that a phrase, or its singular, is treated as."""
    for candidate in _singulars(phrase):
        if candidate in vocabulary.merges:
            return vocabulary.merges[candidate]
        if candidate in vocabulary.nodes:
            return candidate
    return None


def _singulars(phrase: str) -> Iterable[str]:
    """The phrase and what it may be the plural of; only those in the table count, so a wrong guess costs nothing."""
    yield phrase
    for plural, singular in (_IRREGULAR | _MICE).items():
        if phrase.endswith(plural):
            yield phrase.removesuffix(plural) + singular
    if phrase.endswith("s") and not phrase.endswith("ss"):
        yield phrase[:-1]
    for ending, singulars in {"ies": ("ie", "y"), "ves": ("f", "fe"), "es": ("",)}.items():
        if phrase.endswith(ending):
            yield from (phrase.removesuffix(ending) + singular for singular in singulars)

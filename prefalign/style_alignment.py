"""Questions and answers said again in a model's own words, and checked: the last step of Align2LLaVA's curation.

Text far from a language model's own habits costs it language ability when it is trained on. So the model rewrites it, and a
second pass checks that the meaning stayed. A rewriting is refused, and the original kept, where a number or a name differs (no
model is asked), and where the verifier does not say yes.

Source: arXiv 2409.18541; its prompts are not known in full, these are ours, and so are the checks of numbers and names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from prefalign.describing import clean_completions
from prefalign.engines import Completion, Engine, Request, Sampling
from prefalign.english import NUMBERS, SCALES, TENS
from prefalign.records import user_message
from prefalign.text import normalised, same_answer, split_sentences

if TYPE_CHECKING:
    from PIL import Image

Part = Literal["question", "answer"]
Verdict = Literal["taken", "empty", "cut_off", "unchanged", "numbers", "names", "refused", "failed"]

REWRITE = """Say this {part} again in your own words. Keep every fact, number and name, add nothing, and give the {part} alone.

{text}"""
VERIFY = """First version: {before}

Second version: {after}

Does the second version of this {part} say the same as the first, with no fact changed, added or lost? Answer with yes or no."""

_NUMBERS = {
    **{word: str(value) for value, word in enumerate(NUMBERS)},
    **{word: f"{value}0" for value, word in enumerate(TENS, 2)},
    **{word: str(SCALES[word]) for word in ("hundred", "thousand", "million")},
    "dozen": "12",
}
_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


@dataclass
class StyleSampling(Sampling):
    """How rewritings are drawn: greedy, so that nothing is made up for variety."""

    max_new_tokens: int = 512
    temperature: float = 0.0


@dataclass
class StyleConfig:
    """How text is brought into a model's own style.

    Attributes:
        rewrite: asks for the rewriting; `{text}` once, `{part}` is `question` or `answer`.
        verify: asks whether it says the same; `{before}` and `{after}`.
        parts: what is rewritten.
        pictures: show the pictures while rewriting and checking; the published way is text alone.
        sampling: how rewritings are drawn.
    """

    rewrite: str = REWRITE
    verify: str = VERIFY
    parts: list[Part] = field(default_factory=lambda: ["question", "answer"])
    pictures: bool = False
    sampling: StyleSampling = field(default_factory=StyleSampling)

    def __post_init__(self) -> None:
        for name, template, slots in (
            ("rewrite", self.rewrite, ["text"]),
            ("verify", self.verify, ["before", "after"]),
        ):
            missing = [slot for slot in slots if f"{{{slot}}}" not in template]
            if missing:
                raise ValueError(
                    f"style.{name} has no {{{missing[0]}}}, so the model would not see what it is about. Write it where the text "
                    "goes."
                )
            try:
                template.format(part="", **dict.fromkeys(slots, ""))
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"style.{name} cannot be filled in ({error!r}): in braces it may have part, {', '.join(slots)}. Double other "
                    "braces."
                ) from error
        if not self.parts:
            raise ValueError(
                "style.parts is empty, so nothing would be rewritten. Name question, answer or both, or leave style out."
            )


@dataclass(frozen=True)
class Rewritten:
    """What became of one text.

    Attributes:
        text: the rewriting if it was taken, else the original.
        verdict: `taken`; or why the original was kept: `empty`, `cut_off`, `unchanged`, `numbers`, `names`, `refused` (the
            verifier), `failed` (the engine).
    """

    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Text:
    """A text to rewrite.

    Attributes:
        id: identity, for the draw.
        part: what it is.
        text: itself.
        images: the row's pictures, shown if the settings say so.
    """

    id: str
    part: Part
    text: str
    images: list[Image.Image]


def numbers_of(text: str) -> frozenset[str]:
    """The numbers of a text, digits and English number words alike ("two" and "2" are one number)."""
    digits = {found.replace(",", "") for found in _DIGITS.findall(text)}
    words = {_NUMBERS[word] for word in re.split(r"[^a-z]+", text.lower()) if word in _NUMBERS}
    return frozenset(digits | words)


def names_of(text: str) -> frozenset[str]:
    """Words with a capital that does not begin a sentence, in lower case: names of people, places and things (not "I")."""
    found = set()
    for sentence in split_sentences(text):
        for word in _WORD.findall(sentence)[1:]:
            if word[0].isupper() and word.split("'")[0] != "I":
                found.add(word.lower())
    return frozenset(found)


def changed_facts(before: str, after: str) -> Literal["numbers", "names"] | None:
    """Which kind of fact two versions of a text differ in, as far as words show it; None: neither.

    A name that begins a sentence in one version and stands inside one in the other is the same name.
    """
    if numbers_of(before) != numbers_of(after):
        return "numbers"
    words = [{word.lower() for word in _WORD.findall(text)} for text in (before, after)]
    if names_of(before) - words[1] or names_of(after) - words[0]:
        return "names"
    return None


def align_style(engine: Engine, texts: Sequence[Text], config: StyleConfig, *, seed: int = 0) -> list[Rewritten]:
    """Rewrite texts and check them, all rewritings in one call of the engine and all checks in another.

    Args:
        engine: the model whose style is wanted; it is also the verifier.
        texts: what is rewritten.
        config: settings.
        seed: seed of the draws.

    Returns:
        One for each text, in order.
    """
    wanted = [config.rewrite.format(part=text.part, text=text.text) for text in texts]
    said = _ask(engine, texts, wanted, "rewrite", config, seed)
    found: dict[int, Rewritten] = {}
    open_: list[int] = []
    for number, (text, completion) in enumerate(zip(texts, said, strict=True)):
        failed = completion.error is not None
        verdict = "failed" if failed else _problem(text.text, completion.text, completion.finish_reason)
        if verdict is None:
            open_.append(number)
        else:
            found[number] = Rewritten(text.text, verdict)
    asked = [config.verify.format(part=texts[n].part, before=texts[n].text, after=said[n].text) for n in open_]
    replies = _ask(engine, [texts[n] for n in open_], asked, "verify", config, seed)
    for number, reply in zip(open_, replies, strict=True):
        yes = normalised(reply.text).split()[:1] == ["yes"]
        found[number] = Rewritten(said[number].text, "taken") if yes else Rewritten(texts[number].text, "refused")
    return [found[number] for number in range(len(texts))]


def _ask(
    engine: Engine, texts: Sequence[Text], asked: Sequence[str], what: str, config: StyleConfig, seed: int
) -> list[Completion]:
    requests = []
    for text, question in zip(texts, asked, strict=True):
        images = text.images if config.pictures else []
        requests.append(
            Request(f"{text.id}/{text.part}/{what}", [user_message(question, len(images))], images, seed=seed)
        )
    return clean_completions(engine, engine.generate(requests, config.sampling)) if requests else []


def _problem(before: str, after: str, finish: str) -> Verdict | None:
    if not after.strip():
        return "empty"
    if finish == "length":
        return "cut_off"
    if same_answer(before, after):
        return "unchanged"
    return changed_facts(before, after)

"""An LLM that writes probing questions about captions, judges answers, rewrites captions and checks them: KnowAda's annotator.

Source: arXiv 2411.09018; code moranyanuka/KnowAda, `prompts/`. All prompts are worded anew. Differs from the released code: a
reply that cannot be read is missing, not wrong; the rewrite is found by a line that the caption itself does not hold.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prefalign.engines import Completion, Engine, Request, Sampling
from prefalign.judge import Judge, Question, wording_version
from prefalign.knowledge import Captioned, Reply
from prefalign.records import user_message
from prefalign.text import normalised

_QUESTION = re.compile(
    r"^[\s*\-]*(?:\d+[.):]\s*)?\**question(?:\s*\d+)?\**\s*:[\s*]*(?:\d+[.):]\s*)?(?P<text>\S.*)$", re.I
)
_INTEGER = re.compile(r"-?\d+(?:\.\d+)?")
_LABEL = re.compile(r"^[\s*\-]*(?:\d+[.):]\s*)?\**(?P<label>entailed|contradicted|neutral)\b\**\s*:\W*\w", re.I)
_TOTAL = re.compile(r"^\W*(?:totals?\b.*\d|(?:(?:entailed|contradicted|neutral)\W*\d+\W*)+$)", re.I)
MARKER = "NEW CAPTION"

_ASK = """\
You are given a detailed caption of a picture. Write questions whose answers the caption states, for someone who sees only the
picture. Go through the caption and cover every object, action, attribute, number and relation that it mentions. Each question
must be clear, ask for one thing, have exactly one right answer, and be answerable by looking at the picture. Do not mention the
caption, do not give hints, and do not write the answers. Begin each question on a line of its own with "Question:"."""
_ASK_SHOTS = (
    (
        "A grey cat sleeps on a folded blue towel beside a window. Three flower pots stand on the sill.",
        ("What animal is asleep?", "What colour is the cat?", "What does the cat lie on?", "What colour is the towel?",
         "What stands on the sill?", "How many flower pots are there?"),
    ),
    (
        "Two men in orange vests repair a road. The one on the left holds a shovel.",
        ("How many men are there?", "What colour are the men's vests?", "What are the men doing?",
         "What does the man on the left hold?"),
    ),
    (
        "A street sign reads 'Elm Ave' in white letters. Behind it a red bus has stopped.",
        ("What does the street sign read?", "What colour are the letters of the sign?", "What has stopped behind the sign?",
         "What colour is the bus?"),
    ),
)  # fmt: skip
_JUDGE = """\
You are given a caption of a picture, a question about the picture and an answer to it. Take what the caption says as true and
grade the answer:
1: wrong, or it does not answer the question.
2: nearly right: it differs from what the caption says in a detail that hardly matters.
3: right.
Reply with the number and nothing else.

Caption: {caption}

Question: {question}

Answer: {answer}

Grade:"""
_REWRITE = """\
You are given a caption of a picture and questions that must not be answerable from it any more. Take out exactly what answers
them. Keep all other words and their order, and see to it that the result reads well. {added}
Cover every question. First write one line for each question that says what has to go. Then write a line that begins with
"{marker}:" and after it the new caption and nothing else."""
_ADD_NOTHING = (
    "Apart from articles and the like, use no word that the caption does not have, no more general one either."
)
_MAY_ADD = (
    "Where the name of something has to go but not what is said of it, put one of these words in its place: {words}. Apart from "
    "these, articles and the like, use no word that the caption does not have, no more general one either."
)
_REWRITE_SHOTS = (
    (
        "A grey cat sleeps on a folded blue towel beside a window. Three flower pots stand on the sill.",
        ("What colour is the towel?", "How many flower pots are there?"),
        ("'blue' tells the colour of the towel.", "'Three' tells the number of pots."),
        "A grey cat sleeps on a folded towel beside a window. Flower pots stand on the sill.",
    ),
    (
        "Two men in orange vests repair a road. The one on the left holds a shovel.",
        ("What does the man on the left hold?",),
        ("The second sentence is about nothing else.",),
        "Two men in orange vests repair a road.",
    ),
    (
        "A street sign reads 'Elm Ave' in white letters. Behind it a red bus has stopped.",
        ("What does the street sign read?", "What has stopped behind the sign?", "What colour is the bus?"),
        ("The words of the sign go, its letters stay.", "The bus has to go.", "It goes with the bus."),
        "A street sign in white letters.",
    ),
    (
        "An old woman with glasses pours tea from a striped pot into a small cup.",
        ("Does the woman wear glasses?", "What pattern does the pot have?"),
        ("'with glasses' says so.", "'striped' is the pattern."),
        "An old woman pours tea from a pot into a small cup.",
    ),
)
_ANSWERABLE = """\
You are given a text and a question. Can the question be answered from what the text says? Do not guess and do not use what is
usual in such a scene. Reply with "yes" or "no" and nothing else.

Text: {text}

Question: {question}

Reply:"""
_STATEMENTS = """\
You are given a true caption of a picture and a text about the same picture. Split the text into single statements, and label each
by the caption:
Entailed: the caption says so.
Contradicted: the caption says otherwise, or the statement adds something that could be seen and the caption does not mention.
Neutral: an opinion or a mood, which a caption can neither confirm nor deny.
Write one line for each statement: the label, a colon, the statement. Write nothing else."""


class EngineAnnotator:
    """An LLM as annotator. It never sees a picture: the caption is what it knows.

    Attributes:
        engine: the LLM.
        fingerprint: of its model and of what it is asked.
        judging: the judge of answers; `judging.counts` tells what was asked, kept and missing.
        checking: the judge of rewrites.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        cache: Path | None = None,
        max_new_tokens: int = 1024,
        allowed_words: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """Args:
        engine: the LLM.
        cache: file that keeps judgements by model, caption, question and answer; None keeps none.
        max_new_tokens: longest list of questions, rewrite with its rationale, or list of statements.
        allowed_words: words that it is told it may put in place of a name in a rewrite (those of `knowledge.rewrite_problem`).
        seed: seed of the stage.
        """
        self.engine = engine
        self.fingerprint = f"{engine.fingerprint}/{wording()}"
        self.sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
        self.allowed_words = allowed_words
        self.seed = seed
        short = Sampling(max_new_tokens=30, temperature=0.0)
        self.judging = Judge(engine, wording_version("knowada-grade", _JUDGE), short, cache, retries=0)
        self.checking = Judge(engine, wording_version("knowada-answerable", _ANSWERABLE), short, cache, retries=0)

    def questions(self, items: Sequence[Captioned]) -> list[list[str] | Reply]:
        """Probing questions of each caption; a reply without a "Question:" line has none."""
        said = self._ask([(f"{item.id}/questions", question_prompt(item.caption)) for item in items])
        found: list[list[str] | Reply] = []
        for completion in said:
            read = read_questions(completion.text)
            if completion.finish_reason == "error":
                found.append(Reply(refused="generation_failed", message=str(completion.error)))
            else:
                found.append(read or Reply(refused="no_questions", message=completion.text[:200]))
        return found

    def judge(self, items: Sequence[tuple[str, str, str]]) -> list[int | Reply | None]:
        """Grades; with a cache the same caption, question and answer are not asked about again once a grade was read."""
        asked = [
            Question(question, _JUDGE.format(caption=caption.strip(), question=question, answer=answer.strip()))
            for caption, question, answer in items
        ]
        grades = self.judging.ask(asked, read_score)
        return [_failed(self.judging, place, "the grade of an answer") or grade for place, grade in enumerate(grades)]

    def rewrite(self, items: Sequence[tuple[Captioned, Sequence[str]]]) -> list[Reply]:
        """Captions rewritten with a rationale first; `unreadable` without exactly one line that begins with the marker."""
        prompts = [
            (f"{item.id}/rewrite", rewrite_prompt(item.caption, questions, self.allowed_words))
            for item, questions in items
        ]
        return [
            _reply(completion, read_rewrite(completion.text, marker_of(item.caption)))
            for (item, _), completion in zip(items, self._ask(prompts), strict=True)
        ]

    def answerable(self, items: Sequence[tuple[str, str]]) -> list[bool | Reply | None]:
        """Whether each text answers its question, as the LLM says."""
        asked = [Question(question, _ANSWERABLE.format(text=text, question=question)) for text, question in items]
        told = self.checking.ask(asked, read_yes_no)
        return [_failed(self.checking, place, "the check of a rewrite") or one for place, one in enumerate(told)]

    def statements(self, items: Sequence[tuple[Captioned, str]]) -> list[list[str] | Reply]:
        """Labels counted line by line; the model's own sums are not asked for. Texts about one item are numbered."""
        asked: Counter[str] = Counter()
        prompts = []
        for item, text in items:
            name = f"{item.id}/statements/{asked[item.id]}"
            asked[item.id] += 1
            prompts.append((name, f"{_STATEMENTS}\n\nCaption: {item.caption}\n\nText: {text}\n\nStatements:"))
        found: list[list[str] | Reply] = []
        for completion in self._ask(prompts):
            labels = read_labels(completion.text)
            reply = _reply(completion, completion.text if labels else None)
            found.append(reply if reply.refused else labels)
        return found

    def _ask(self, prompts: Sequence[tuple[str, str]]) -> list[Completion]:
        requests = [Request(name, [user_message(text)], [], seed=self.seed) for name, text in prompts]
        return self.engine.generate(requests, self.sampling) if requests else []


def _failed(judge: Judge, place: int, what: str) -> Reply | None:
    """Why the question at a place got no reply; None if it did."""
    error = judge.failed.get(place)
    return None if error is None else Reply(refused="generation_failed", message=f"{what}: {error}")


def _reply(completion: Completion, text: str | None) -> Reply:
    if completion.finish_reason == "error":
        return Reply(refused="generation_failed", message=str(completion.error))
    if completion.finish_reason == "length":
        return Reply(refused="cut_off", message=f"...{completion.text[-60:]}")
    if text is None:
        return Reply(refused="unreadable", message=completion.text[:200])
    return Reply(text)


def question_prompt(caption: str) -> str:
    """What an LLM is asked to write questions about a caption, with three examples."""
    shots = [f"Caption: {given}\n" + "\n".join(f"Question: {one}" for one in asked) for given, asked in _ASK_SHOTS]
    return "\n\n".join([_ASK, *shots, f"Caption: {caption.strip()}"])


def read_questions(reply: str) -> list[str]:
    """The questions in a reply: lines that begin with "Question:" and end with a question mark, numbers and repeats taken away.

    Example:
        >>> read_questions("Here they are:\\n1. Question: What is red?\\nQuestion: 2. Who sits?\\nQuestion: what is red?")
        ['What is red?', 'Who sits?']
    """
    found: dict[str, str] = {}
    for line in reply.splitlines():
        marked = _QUESTION.match(line)
        if marked and (text := marked["text"].strip().strip("*").strip()).endswith("?"):
            found.setdefault(normalised(text), text)
    return list(found.values())


def read_score(reply: str) -> int | None:
    """The grade in a reply: its first number, if that is 1, 2 or 3; else None (so "-1", "2.5" and "10" are missing)."""
    found = _INTEGER.search(reply)
    return int(float(found[0])) if found and float(found[0]) in (1, 2, 3) else None


def read_yes_no(reply: str) -> bool | None:
    """True for a reply that begins with yes, False with no, None for any other."""
    first = normalised(reply).split(" ", 1)[0]
    return {"yes": True, "no": False}.get(first)


def read_labels(reply: str) -> list[str]:
    """The label of each statement of a reply, in lower case.

    A first line that ends in a colon may announce them, and totals do not count.

    Returns:
        One for each line; none if any other line has no label and statement, since shares would be of what could be read.

    Example:
        >>> read_labels("Here they are:\\n1. Entailed: a cat.\\nContradicted: a dog.\\nTotals: 1 and 1.")
        ['entailed', 'contradicted']
        >>> read_labels("Entailed: a cat.\\nContradicted - a dog.")
        []
    """
    lines = [line for line in reply.splitlines() if re.search(r"\w", line) and not _TOTAL.match(line)]
    labels = [_LABEL.match(line) for line in lines]
    if lines and not labels[0] and re.search(r":[\s*]*$", lines[0]):
        labels = labels[1:]
    return [found["label"].lower() for found in labels if found] if all(labels) else []


def marker_of(caption: str) -> str:
    """What begins the line with the new caption: `MARKER`, numbered if the caption itself holds it."""
    marker, number = MARKER, 1
    while marker.lower() in caption.lower():
        number += 1
        marker = f"{MARKER} {number}"
    return marker


def rewrite_prompt(caption: str, questions: Sequence[str], allowed_words: Sequence[str] = ()) -> str:
    """What an LLM is asked to take the answers to questions out of a caption, with four examples.

    Args:
        caption: the caption.
        questions: what must not be answerable from it any more.
        allowed_words: words that may stand in place of a name; others than the caption's make it a bad rewrite.
    """
    marker = marker_of(caption)
    added = _MAY_ADD.format(words=", ".join(allowed_words)) if allowed_words else _ADD_NOTHING
    shots = [
        f"{_asked(given, unknown)}\n\n" + "\n".join(f"- {why}" for why in reasons) + f"\n{marker}: {made}"
        for given, unknown, reasons, made in _REWRITE_SHOTS
    ]
    return "\n\n".join([_REWRITE.format(marker=marker, added=added), *shots, _asked(caption, questions)])


def _asked(caption: str, questions: Sequence[str]) -> str:
    numbered = "\n".join(f"{number}. {question}" for number, question in enumerate(questions, 1))
    return f"Caption: {caption.strip()}\nQuestions:\n{numbered}"


def read_rewrite(reply: str, marker: str) -> str | None:
    """What follows the marker to the end of a reply; None without exactly one line that begins with it."""
    found = list(re.finditer(rf"^[\s*#]*{re.escape(marker)}\**\s*:\**", reply, re.IGNORECASE | re.MULTILINE))
    return reply[found[0].end() :].strip() if len(found) == 1 else None


def wording() -> str:
    """Version of everything that the LLM is asked."""
    rewriting = (rewrite_prompt("", [""]), _MAY_ADD)
    return wording_version("knowada", question_prompt(""), _JUDGE, *rewriting, _ANSWERABLE, _STATEMENTS)

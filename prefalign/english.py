"""English, as far as rules know it: numbers in words, words that only join others, articles, plurals, forms of a word."""

from __future__ import annotations

import re

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
"""Words for 0 to 20, by number."""
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SCALES = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
ORDINALS = (
    "first", "second", "third", "fifth", "eighth", "ninth", "twelfth",
    *(f"{word}th" for word in (*NUMBERS[4:20], *SCALES)), *(f"{word[:-1]}ieth" for word in TENS),
)  # fmt: skip
AMOUNTS = ("half", "halves", "quarter", "quarters", "dozen", "dozens", "trillion", *(f"{word}s" for word in SCALES))
"""Words for amounts that `read_number` does not read."""
ARTICLES = frozenset(("a", "an", "the"))
OPENERS = frozenset(("a", "an", "no", "some", "several", "many", "few", "both", "another"))
"""Words that begin a phrase and say how many things it is about, or that any one is meant."""
DETERMINERS = frozenset(
    ("the", "this", "that", "these", "those", "his", "her", "its", "their", "our", "my", "your", "each", "every")
)
"""Words that begin a phrase about things that are known."""
AUXILIARIES = frozenset(
    ("is", "are", "was", "were", "be", "been", "being", "has", "have", "had", "do", "does", "did", "can", "could", "may", "might",
     "will", "would")
)  # fmt: skip
FUNCTION_WORDS = OPENERS | DETERMINERS | AUXILIARIES | frozenset(
    ("any", "all", "i", "you", "he", "she", "it", "we", "they", "them", "him", "us", "me", "who", "whom", "whose", "which",
     "what", "there", "here", "where", "when", "while", "as", "if", "than", "then", "so", "and", "or", "but", "nor", "yet",
     "because", "although", "though", "also", "too", "not", "very", "just", "only", "am", "having", "must", "shall",
     "should", "of", "in", "on", "at", "by", "to", "from", "with", "without", "for", "into", "onto", "up", "down", "out",
     "off", "over", "under", "through", "across", "along", "around", "about", "above", "below", "behind", "between",
     "beside", "near", "inside", "outside", "against", "during", "before", "after", "toward", "towards", "within", "upon",
     "image", "picture", "photo", "photograph", "scene")
)  # fmt: skip
"""Words that say nothing of a picture by themselves."""
_SAID_AN = re.compile(r"[aeiou]|hour|honou?r|honest|heir|x-ray|8|1[18]\b", re.IGNORECASE)
_SAID_A = re.compile(r"eu|ewe|one\b|once\b|u(?:ni(?![nmd])|s[aeu]|t[ei]|kulele|fo\b|-)", re.IGNORECASE)
IRREGULAR_PLURALS = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese", "foot": "feet",
    "tooth": "teeth", "leaf": "leaves", "loaf": "loaves", "knife": "knives", "wife": "wives", "shelf": "shelves",
    "scarf": "scarves", "calf": "calves", "ox": "oxen", "wolf": "wolves",
}  # fmt: skip
"""Plurals that no rule gives, by their singular."""
_ENDS_COMPOUNDS = frozenset(IRREGULAR_PLURALS) - {"ox", "goose", "man"}
_NOT_A_MAN = ("human", "german", "roman", "shaman", "talisman", "ottoman")
_SAME_PLURAL = frozenset(
    ("sheep", "deer", "fish", "aircraft", "scissors", "glasses", "sunglasses", "binoculars", "skis", "pants", "trousers", "jeans",
     "shorts")
)  # fmt: skip
_WITH_ES = ("s", "x", "z", "ch", "sh", "potato", "tomato", "hero", "echo", "mosquito", "volcano", "buffalo")
_IRREGULAR_VERBS = {
    "sat": "sit", "stood": "stand", "ran": "run", "wore": "wear", "worn": "wear", "held": "hold", "hung": "hang", "made": "make",
    "taken": "take", "written": "write", "drawn": "draw", "ridden": "ride", "driven": "drive", "eaten": "eat", "broken": "break",
    "shown": "show", "grown": "grow", "built": "build", "lit": "light",
}  # fmt: skip
_ENDINGS = (
    (re.compile(r"(?<=\w{2}[^siu])s$"), ""),  # stars; buses, puppies and knives go on
    (re.compile(r"(?<=[sxzo])e$|(?<=[cs]h)e$"), ""),  # buse: bus; house and houses: hous
    (re.compile(r"[vf]e$"), "f"),  # knive and knife: knif
    (re.compile(r"ie$"), "y"),  # puppie: puppy
)


def spoken(number: int) -> str:
    """A whole number from 0 on in words, without "and" and hyphens.

    Example:
        >>> spoken(1150), spoken(21)
        ('one thousand one hundred fifty', 'twenty one')
    """
    for name, scale in reversed(SCALES.items()):
        if number >= scale:
            rest = f" {spoken(number % scale)}" if number % scale else ""
            return f"{spoken(number // scale)} {name}{rest}"
    if number < len(NUMBERS):
        return NUMBERS[number]
    return TENS[number // 10 - 2] + (f" {NUMBERS[number % 10]}" if number % 10 else "")


def read_number(words: str) -> int | None:
    """The whole number that words in lower case say; None unless they do it as `spoken` does.

    "And", hyphens and "a" for one do not count. "Nineteen eighty" and "one fifty", which may
    be a year, a time or a price, are no number.

    Example:
        >>> read_number("a hundred and twenty-one"), read_number("one fifty")
        (121, None)
    """
    said = [word for word in re.sub("^a ", "one ", words.replace("-", " ")).split() if word != "and"]
    total = part = 0
    for word in said:
        if word == "hundred":
            part *= SCALES[word]
        elif word in SCALES:
            total, part = total + part * SCALES[word], 0
        elif word in NUMBERS or word in TENS:
            part += NUMBERS.index(word) if word in NUMBERS else 10 * TENS.index(word) + 20
        else:
            return None
    return total + part if spoken(total + part) == " ".join(said) else None


def article(words: str) -> str:
    """ "a" or "an", as the sound of the first of these words wants it.

    Example:
        >>> [article(words) for words in ("red apple", "apple", "hour", "uniform", "X-ray")]
        ['a', 'an', 'an', 'a', 'an']
    """
    return "an" if _SAID_AN.match(words) and not _SAID_A.match(words) else "a"


def plural(noun: str) -> str:
    """More than one of a thing; of several words the last one changes.

    Example:
        >>> [plural(noun) for noun in ("wine glass", "baby", "fireman", "ox", "human", "sheep")]
        ['wine glasses', 'babies', 'firemen', 'oxen', 'humans', 'sheep']
    """
    last = noun.split(" ")[-1].lower()
    if last in _SAME_PLURAL:
        return noun
    if last in IRREGULAR_PLURALS:
        return noun[: len(noun) - len(last)] + IRREGULAR_PLURALS[last]
    for single in sorted(_ENDS_COMPOUNDS, key=len, reverse=True):
        if last.endswith(single):  # bookshelf, grandchild
            return noun[: len(noun) - len(single)] + IRREGULAR_PLURALS[single]
    if last.endswith("man") and not last.endswith(_NOT_A_MAN):
        return f"{noun[:-3]}men"
    if last.endswith(_WITH_ES):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if re.search("[^aeiou]y$", last) else f"{noun}s"


def plural_spellings(noun: str) -> list[str]:
    """Every way in which more than one of a thing may be written, to read it; of several words the last one changes.

    Example:
        >>> plural_spellings("wooden box"), plural_spellings("snowman")
        (['wooden boxs', 'wooden boxes'], ['snowmans', 'snowmen'])
    """
    head, _, last = noun.rpartition(" ")
    start = f"{head} " if head else ""
    ends = [] if last.endswith("s") else [f"{last}s"]
    if last.endswith(("s", "x", "z", "ch", "sh", "o")):
        ends.append(f"{last}es")
    if re.search("[^aeiou]y$", last):
        ends.append(f"{last[:-1]}ies")
    for single, plural in IRREGULAR_PLURALS.items():
        if last == single or (single in ("man", "child", "person") and last.endswith(single)):
            ends.append(last.removesuffix(single) + plural)
    return [start + end for end in ends]


def stem(word: str) -> str:
    """What a noun's singular and plural share, which need not be a word.

    Example:
        >>> stem("houses"), stem("house"), stem("women"), stem("knives"), stem("knife")
        ('hous', 'hous', 'woman', 'knif', 'knif')
    """
    for single, many in IRREGULAR_PLURALS.items():
        if word.endswith(many):
            word = word.removesuffix(many) + single
    for ending, short in _ENDINGS:
        word = ending.sub(short, word)
    return word


def bases(word: str) -> set[str]:
    """A word and what it may be an inflection of, some of it no word: two words are forms of one if they have one in common.

    Example:
        >>> bases("sitting") & bases("sits"), bases("men") & bases("man"), bases("cape") & bases("cap")
        ({'sit'}, {'man'}, set())
    """
    found = {word, *(word.removesuffix(many) + one for one, many in IRREGULAR_PLURALS.items() if word.endswith(many))}
    if word in _IRREGULAR_VERBS:
        found.add(_IRREGULAR_VERBS[word])
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        found |= {word[:-1], re.sub("es$", "", word), re.sub("ies$", "y", word)}
    root = re.sub("ing$|(?<!e)ed$", "", word)
    if root != word and re.search("[aeiouy]", root):
        found |= {root, f"{root}e", re.sub(r"([^aeiouy])\1$", r"\1", root)}
        found.add(re.sub("y$", "ie", root) if word.endswith("ing") else re.sub("i$", "y", root))
    return found

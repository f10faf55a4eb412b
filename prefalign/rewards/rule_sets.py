"""Rule sets: which answers to linked questions can stand together.

`bone_marrow` is the table of Dr-LLaVA (arXiv 2405.19567; released code `AlaaLab/Dr-LLaVA`, RewardModel_HEME); the others are for
general pictures. How answers are read is in `prefalign.rewards.readings`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefalign.rewards import readings
from prefalign.rewards.readings import Variable


@dataclass(frozen=True)
class RuleSet:
    """Linked questions and the answers to them that can stand together.

    Attributes:
        variables: by name.
        rows: the combinations that are possible; None: all answers have to be the same category.
        released: the reading of the authors' code, a list of rules by variable (see `read_as_released`).
    """

    variables: Mapping[str, Variable]
    rows: tuple[Mapping[str, str], ...] | None = None
    released: Mapping[str, Sequence[tuple[str, Sequence[Sequence[str]], Sequence[str]]]] = field(default_factory=dict)

    def parse(self, variable: str, text: str, rules: Mapping[str, Any]) -> str | None:
        """The category of an answer to one of the questions; None for "no match".

        Args:
            variable: what was asked.
            text: the answer.
            rules: `facts["rules"]` of the row, for what its reading depends on.
        """
        known = self.variables[variable]
        return known.read(text, variable, rules) if known.read is not None else known.parse(text)

    def miscounts(self, variable: str, text: str, rules: Mapping[str, Any]) -> bool:
        """Whether an answer says another number than `rules["number"]`, where the question is whether there are some."""
        if self.variables[variable].read is not readings.some_or_none or rules.get("number") is None:
            return False
        return readings.number(text) not in (None, rules["number"])

    def agree(self, said: Sequence[tuple[str, str | None]]) -> bool:
        """Whether (variable, category) pairs can stand together; a None never does."""
        if any(category is None for _, category in said):
            return False
        if self.rows is None:
            return len({category for _, category in said}) == 1
        return any(all(row.get(variable) == category for variable, category in said) for row in self.rows)

    def domain(self, variable: str, rules: Mapping[str, Any]) -> list[str] | None:
        """The categories of a variable; None for numbers, which are open.

        Args:
            variable: what was asked.
            rules: `facts["rules"]` of the row; the options of a choice are its categories.
        """
        known = self.variables[variable]
        if known.read is readings.option_taken:
            return sorted({str(option).lower() for option in rules["options"][variable].values()})
        return list(known.phrases) or list(known.closed) or None

    def lacking(self, rules: Mapping[str, Any]) -> str | None:
        """What reading the answers that `rules` ask for needs and `rules` lack; None if they lack nothing."""
        for variable in (*(rules.get("asked") or ()), *(rules.get("reference") or ())):
            read = self.variables[variable].read
            options = rules.get("options")
            if read is readings.option_taken:
                texts = options.get(variable) if isinstance(options, Mapping) else None
                if not isinstance(texts, Mapping) or not texts or not all(map(_is_option, texts)):
                    return f"options.{variable} (text by letter, such as A)"
            if read is readings.value_named and not (
                isinstance(rules.get("values"), (list, tuple)) and rules["values"]
            ):
                return "values (what could be named)"
            if read is readings.value_named and "value" not in rules:
                return "value (the one asked for)"
        return None


def _is_option(key: Any) -> bool:
    return isinstance(key, str) and len(key) == 1 and key.isalnum()


def read_as_released(rules: Sequence[tuple[str, Sequence[Sequence[str]], Sequence[str]]], text: str) -> str | None:
    """Read a text as Dr-LLaVA's code does, by parts of words: the first rule (category, groups, excluded) that holds.

    A rule holds if the text contains one string of each group, and none that is excluded.
    """
    plain = text.lower()
    for category, groups, excluded in rules:
        if all(any(part in plain for part in group) for group in groups) and not any(
            part in plain for part in excluded
        ):
            return category
    return None


def read_rule_set(name: str, entry: Mapping[str, Any]) -> RuleSet:
    """A rule set of a config: `variables` (phrases by category, by variable) and `rows` (category by variable).

    Raises:
        ValueError: for a phrase that is no regular expression, or a row with an unknown variable or category.
    """
    unknown = sorted(set(entry) - {"variables", "rows"})
    if unknown or not entry.get("variables") or not entry.get("rows"):
        raise ValueError(
            f"rule set {name!r} has {', '.join(entry) or 'nothing'}; it consists of `variables` (phrases by category, "
            "for each variable) and `rows` (the combinations of categories that are possible)."
        )
    try:
        variables = {
            variable: Variable({str(key): list(value) for key, value in phrases.items()})
            for variable, phrases in entry["variables"].items()
        }
        for variable in variables.values():
            variable.parse("")
    except re.error as error:
        raise ValueError(
            f"rule set {name!r}: {error.pattern!r} is no regular expression ({error}). Escape its signs."
        ) from error
    for row in entry["rows"]:
        for variable, category in row.items():
            if variable not in variables or category not in variables[variable].phrases:
                raise ValueError(
                    f"rule set {name!r}: a row has {variable}: {category}, which no answer could be read as. Its variables are "
                    + "; ".join(f"{known} ({', '.join(value.phrases)})" for known, value in variables.items())
                )
    return RuleSet(variables, tuple(dict(row) for row in entry["rows"]))


_POOR = ("inadequate", "(?:low|poor|insufficient)(?:[ -]| in |image |the )*quality", "(?:too|very) poor", "insufficient",
         "unsuitable", "quality is (?:too )?(?:low|poor|inadequate|insufficient)", "too few (?:nucleated )?cells",
         "lacks (?:sufficient |enough |nucleated )*cells")  # fmt: skip
_SIGNS = "(?:signs?|evidence|indications?) of "
_NOT_FEW = "(?<!few )(?<!few red )(?<!little )"  # some blood is in every adequate region
_ILL = ("disease", "cancer(?:ous)?", "malignan(?:t|cy|cies)", "blood cancer")

_FAULTS = ("low", "poor", "insuffici", "inadequate", "not", "no ", "devoid", "free", "absent")  # of the released code

_BONE_MARROW = RuleSet(
    variables={
        "quality": Variable(
            {
                "good": ("suitable", "adequate", "appropriate", "optimal", "usable", "acceptable", "sufficient", "good", "fit",
                         "high[ -]quality", "can be used"),
                "bad": ("unsuitable", "inadequate", "inappropriate", "suboptimal", "unusable", "unacceptable", "insufficient",
                        "bad", "poor", "low[ -]quality", "cannot be (?:\\w+ )?(?:used|utilized)"),
            },
            opposites={"good": "bad", "bad": "good"},
        ),
        "analysis": Variable(
            {
                "adequate": ("adequate", "suitable", "optimal", "ideal", "excellent", "prime"),
                "blood": (f"{_NOT_FEW}(?:red )?blood(?: cells)?(?![ -]clot)", "bloody", "blood-(?!clot)\\w+", f"{_NOT_FEW}rbcs?"),
                "clot": ("(?:blood[ -])?clot(?:s|ted|ting)?(?: (?:of )?blood)?", "coagul\\w+(?: blood)?"),
            }
        ),
        "abnormality": Variable(
            {
                "normal": ("normal", "healthy", "unremarkable", "benign"),
                "abnormal": ("abnormal(?:ity|ities)?", "irregular(?:ity|ities)?", "disorder", *_ILL),
                "inadequate": (*_POOR, "impossible", "not feasible"),
            },
            opposites={"normal": "abnormal", "abnormal": "normal"},
            strong=("inadequate",),
        ),
        "cells": Variable(
            {
                "none": (f"(?:no|nothing) (?:{_SIGNS})?(?:abnormal|unusual|atypical)(?: cells?)?(?: growth| proliferation)?",
                         "none of the(?:se)? cells (?:is|are|looks?|seems?) (?:abnormal|unusual|atypical)",
                         "no abnormalit(?:y|ies)", "none(?! of\\b)", "normal(?: cells?| cellular)?(?: growth)?", "typical",
                         "without abnormalities"),
                "myeloblasts": ("myeloblasts?", "blast cells?", "blasts"),
                "plasma cells": ("plasma cells?",),
                "inadequate": _POOR,
            },
            strong=("inadequate",),
        ),
        "diagnosis": Variable(
            {
                "normal": ("normal", "healthy"),
                "AML": ("acute myeloid leuka?emia", "aml"),
                "MM": ("multiple myeloma", "myeloma", "(?<!\\d )mm"),
                "inadequate": _POOR,
                "cancer": _ILL,
            },
            opposites={"cancer": "normal"},
            strong=("inadequate",),
            weak=("cancer",),
        ),
    },
    rows=tuple(
        dict(zip(("quality", "analysis", "abnormality", "cells", "diagnosis"), row, strict=True))
        for row in (
            ("good", "adequate", "normal", "none", "normal"),
            ("good", "adequate", "abnormal", "myeloblasts", "AML"),
            ("good", "adequate", "abnormal", "plasma cells", "MM"),
            ("bad", "blood", "inadequate", "inadequate", "inadequate"),
            ("bad", "clot", "inadequate", "inadequate", "inadequate"),
        )
    ),
    released={
        "quality": (
            ("good", (("effective", "appropriate", "suit", "apt ", "optimal"),),
             (" not ", " no ", " inadequate ", " unsuitable")),
            ("bad", (("no", "inadequate", "unsuitable"),), ()),
        ),
        "analysis": (
            ("adequate", (("optimal", "advantageous", "suitable", "adequate", "well", "prime"),
                          ("near", "close", "adjacent", "proximity", "vicinity", "proximate")), ()),
            ("blood", (("blood", "rbc"),), ()),
            ("clot", (("unsuit", "hinder", "less", "negative", "adverse"), ("particles",)),
             ("near", "close", "adjacent", "proximity to", "vicinity")),
        ),
        "abnormality": (
            ("abnormal", (("malig", "cancer", " disorder"),), ()),
            ("abnormal", (("medical", "illne"), ("display",)), ()),
            ("normal", ((" normal", "no abnormali"),), ()),
            ("inadequate", (("inadequate", "impossible", "low-quality", "low quality", "unclear ", "unsuitable",
                             "insufficient"),), ()),
            ("inadequate", (("quality",), ("low", "poor", "insuffici", "inadequate", "subpar")), ()),
        ),
        "cells": (
            ("plasma cells", (("plasma",),), ()),
            ("myeloblasts", (("myeloblast",),), ()),
            ("inadequate", (("quality",), _FAULTS), ()),
            ("none", (("no ", "not", "devoid", "free", "absent", "absence"),), ()),
        ),
        "diagnosis": (
            ("normal", (("blood cancer",), ("not", "no ", "devoid", "free", "absent", "absence")), (" quality",)),
            ("normal", ((" healthy",),), ()),
            ("MM", (("multiple myeloma", "mm"),), ()),
            ("AML", (("acute myeloid leukemia", "aml"),), ()),
            # the code looks for each letter of "quality", not for the word
            ("inadequate", (tuple("quality"), _FAULTS), ()),
            ("cancer", (("blood cancer",),), ()),
        ),
    },
)  # fmt: skip

_SIDES = Variable(
    {
        "left": ("left", "left side", "left-hand side"),
        "right": ("right", "right side", "right-hand side"),
        "above": ("above", "over", "on top of"),
        "below": ("below", "under", "underneath", "beneath"),
    }
)

_SAYS_YES_OR_NO = Variable(read=readings.yes_no, closed=("yes", "no"))
_EXISTS = Variable(read=readings.exists, closed=("yes", "no"))
_ABSENT = Variable(read=readings.absent, closed=("yes", "no"))
_SOME_OR_NONE = Variable(read=readings.some_or_none, closed=("some", "none"))
RULE_SETS: dict[str, RuleSet] = {
    "bone_marrow": _BONE_MARROW,
    "existence_count": RuleSet(
        {"exists": _EXISTS, "count": _SOME_OR_NONE},
        ({"exists": "yes", "count": "some"}, {"exists": "no", "count": "none"}),
    ),
    "existence_absence": RuleSet(
        {"exists": _EXISTS, "absent": _ABSENT},
        ({"exists": "yes", "absent": "no"}, {"exists": "no", "absent": "yes"}),
    ),
    "presence": RuleSet(
        {"exists": _EXISTS, "absent": _ABSENT, "count": _SOME_OR_NONE},
        ({"exists": "yes", "absent": "no", "count": "some"}, {"exists": "no", "absent": "yes", "count": "none"}),
    ),
    "attribute": RuleSet(
        {"is": _SAYS_YES_OR_NO, "which": Variable(read=readings.value_named, closed=("yes", "no"))}
    ),
    "count_list": RuleSet({"count": Variable(read=readings.count), "list": Variable(read=readings.how_many_listed)}),
    "sides": RuleSet(
        {"there": _SIDES, "back": _SIDES},
        tuple({"there": one, "back": other} for one, other in
              (("left", "right"), ("right", "left"), ("above", "below"), ("below", "above"))),
    ),
    "choice": RuleSet({"first": Variable(read=readings.option_taken), "second": Variable(read=readings.option_taken)}),
}  # fmt: skip
"""Name in `facts["rules"]["set"]` to rule set.

`existence_count`: is there an X, how many; `existence_absence`: is there an X, is there no X; `presence`: all three; `attribute`:
is it red, which colour; `count_list`: how many, name them; `sides`: X seen from Y, Y from X; `choice`: options in two orders.
"""

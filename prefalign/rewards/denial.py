"""Whether a sentence denies a phrase: "no sign of X", "nothing is X", "X is not present", "X can be ruled out".

For `prefalign.rewards.readings`. Where a negation stands in the clause and could belong to something else, the answer is that
it is unclear, so that no text earns what it may have denied.
"""

from __future__ import annotations

import re

_VERB = (
    r"(?:is|are|was|were|be|has|have|had|shows?|contains?|appears?|seems?|looks?|makes?|points?|suggests?|indicates?)\b"
)
_NO = (
    r"\b(?:no|without|neither|nor|rather than|instead of|absence of|lacks?|lack of|free (?:of|from)|devoid of|negative for|"
    r"rules? out|excludes?|inconsistent with|zero|nowhere|nobody|none(?! other than\b)|"
    r"nothing(?! (?:but|short of|other than|less than|better|wrong|amiss)\b))"
)
_NOT = r"\b(?:not|cannot|never|\w+n't)"
_NEAR = re.compile(rf"(?:{_NO}|{_NOT})(?:[\s-]+[\w'/]+){{0,3}}[\s-]*$")
_REACHING = (
    re.compile(  # "no sign of an increase in ...", "does not show signs of this or ...", "none of the cells is ..."
        rf"{_NO}(?:[\s,-]+(?!{_VERB}|that\b)[\w'/]+)*[\s-]*$|"
        rf"{_NOT}(?:[\s,-]+[\w'/]+)*[\s,]+n?or\b(?:[\s-]+[\w'/]+){{0,3}}[\s-]*$|"
        rf"(?:\b(?:none|nothing|nowhere|neither)|(?:^|\bthat) ?no\b(?! (?:it|this|that|the|there|i|we)\b))"
        rf"(?:[\s-]+(?!{_VERB}|that\b)[\w'/]+)* {_VERB}(?: (?!in\b|on\b|near\b)[\w'/]+){{0,2}}[\s-]*$"
    )
)
_DOUBT = r"\b(?:hardly|scarcely|barely|far from|anything but)\b"
_DOUBTED = re.compile(rf"{_DOUBT}(?:[\s-]+[\w'/]+){{0,4}}[\s-]*$")
_FAR = re.compile(rf"{_NOT}\b|{_NO}\b.*\b(?:that|if|whether)\b")
_NO_AND = re.compile(rf"\b(?:no|without)(?:[\s-]+(?!{_VERB})[\w'/]+)+ and (?:an? |the )?$")
_DENIED_AFTER = re.compile(
    rf"^(?:[\s-]+(?!{_VERB})[\w'/]+){{0,5}}?\s+(?:(?:is|are|was|were|can be|could be|has been|have been|seems?|appears?|looks?)"
    r"(?: (?:\w+ly|very|also|quite|rather|to be))*"
    r" (?:not|never|absent|unlikely|improbable|excluded|ruled out|lacking|missing|out of the question)|"
    r"(?:can|do|does|did|has|have) not|cannot|\w+n't)\b"
)
_LABELLED = re.compile(r" ?: ?(?:no|not|none|absent|negative|excluded|ruled out|unlikely)\b")  # "X: negative"
_SHARED_DENIAL = re.compile(  # "... and X are not present": of both, or of X
    rf"^(?:(?:,|,? and)? (?!{_VERB})[\w'/-]+){{1,6}} (?:are|were|can be|could be|have been)"
    r" (?:not|absent|unlikely|excluded|ruled out)\b"
)
_NEGATION_AFTER = re.compile(rf"{_NOT}\b|\b(?:absent|unlikely|improbable|excluded|ruled out)\b|{_DOUBT}")
CERTAIN = re.compile(
    r"\b(?:(?:there is )?no doubt|without (?:a |any )?doubt|not (?:only|just|merely)|cannot be denied)\b"
)
_CLAUSE = re.compile(
    r"^(?:yes|no|nope),|[.;:!?\n]|(?<!anything )\bbut\b|\band\b(?! (?:of|any)\b)|"
    r"\b(?:although|while|because|since|so|therefore)\b|"
    rf",(?! (?:(?!{_VERB})[\w'/-]+,? ){{0,6}}n?or\b)"  # not in "no this, that or"
)
_SUBCLAUSE = re.compile(r"\b(?:because|since|that|which|who|so|as|where|when|whereas|though|if|rather than|without)\b")


def denied(plain: str, start: int, end: int) -> bool | None:
    """Whether a clause denies the phrase at these places; None where what a negation in it belongs to is unclear."""
    cuts = [0, *(cut.end() for cut in _CLAUSE.finditer(plain) if cut.end() <= start)]
    before = plain[cuts[-1] : start]
    if _DOUBTED.search(before):
        return None
    after = _SUBCLAUSE.split(_CLAUSE.split(plain[end:])[0])[0]
    earlier = bool(_NEAR.search(before) or _REACHING.search(before))
    later = bool(_DENIED_AFTER.match(after) or _LABELLED.match(plain, end))
    if earlier or later:
        both = earlier and later
        return None if both or (later and len(_NEGATION_AFTER.findall(after)) > 1) else True
    subject = not re.search(rf"\b{_VERB}", _SUBCLAUSE.split(before)[-1])
    shared = subject and _SHARED_DENIAL.match(re.split(r"[.;:!?]", plain[end:])[0])
    unclear = _FAR.search(before) or _NEGATION_AFTER.search(after) or _NO_AND.search(plain[:start]) or shared
    return None if unclear else False

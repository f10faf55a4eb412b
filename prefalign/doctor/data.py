"""Checks of the rows: pictures as tokens, what `max_length` leaves, pictures that differ, pairs that teach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from prefalign import families
from prefalign.doctor.case import Case, shown
from prefalign.doctor.findings import Finding, NotExaminedError, judge, some
from prefalign.losses import VIEWS
from prefalign.losses.term import EITHER
from prefalign.records import message_text, placeholder_count
from prefalign.text import same_answer
from prefalign.training.documents import decode
from prefalign.training.pairs import pairs_manifest

LENGTH_BIAS = 0.2
"""Mean difference of the answers' lengths, as a share of the rejected answer's, above which length alone tells them apart."""
ONE_SIDED, ENOUGH = 0.05, 20
"""Rows whose other answer is the longer one, for each where it is not, below which it does too; among so many rows at least."""


def check_rows(case: Case) -> list[Finding]:
    """Rows that the collator could not read; the run would stop at the first."""
    total = len(case.readings) + len(case.unreadable)
    seen = f"{len(case.readings)} of a sample of {total} read ({len(case.trainer.train_dataset)} in the folder)"
    if case.fitting:
        seen += f", {len(case.rows)} run as a batch"
    problem = ""
    if case.unreadable:
        first, error = next(iter(case.unreadable.items()))
        problem = f"The run stops at such a row. {some(list(case.unreadable))}; {first}: {error}"
    return [judge("rows", seen, fail=problem)]


def check_manifest(case: Case) -> list[Finding]:
    """The manifests add up; that they name as many rows as there are, `load_pairs` demands."""
    findings = []
    for folder in filter(None, (case.config.pairs, case.config.eval_pairs)):
        manifest = pairs_manifest(folder)
        dropped = sum(manifest.dropped.values())
        seen = f"{manifest.stage}: {manifest.rows_in} rows in, {manifest.rows_out} out, {dropped} dropped"
        problem = ""
        if manifest.rows_in != manifest.rows_used + dropped:
            problem = f"{manifest.rows_in} rows in are not {manifest.rows_used} used and {dropped} dropped. Make the pairs again."
        findings.append(judge("manifest", seen, fail=problem))
    return findings


def check_visual_tokens(case: Case) -> list[Finding]:
    """How many tokens pictures become, and how much of the context and of a row they are."""
    [token] = families.image_token_ids(case.model_config)
    per_picture, per_row, shares = [], [], []
    for reading in sampled(case):
        document = max(reading.documents.documents, key=lambda document: len(document.prompt))
        pictures = placeholder_count(reading.row["prompt"])
        tokens = int((document.prompt == token).sum())
        per_row.append(tokens)
        shares.append(tokens / reading.total)
        if pictures:
            per_picture.append(tokens / pictures)
    if not per_picture:
        return [
            judge("visual tokens", "no row of the sample holds a picture", warn="Nothing visual is learned from it.")
        ]
    context = families.context_length(case.model_config)
    longest = max(reading.total for reading in case.readings)
    seen = f"{_spread(per_picture)} a picture, {_spread(per_row)} a row, {mean(shares):.0%} of a row's tokens"
    problem = ""
    if context:
        seen += f"; the longest row takes {longest} of {context} positions, pictures {max(per_row) / context:.0%}"
        if min(longest, case.collator.max_length or longest) > context:
            problem = f"The longest row needs {longest} positions, the model has {context}. Set trainer.max_length to {context}."
    return [judge("visual tokens", seen, fail=problem)]


def check_max_length(case: Case) -> list[Finding]:
    """Rows and answers that survive `max_length`."""
    limit, readings = case.collator.max_length, sampled(case)
    most = max(reading.total for reading in readings)
    if limit is None:
        return [judge("max_length", f"none: nothing is cut; rows take up to {most} tokens")]
    dropped = [reading for reading in readings if reading.prompt >= limit]
    cut = [reading for reading in readings if reading.prompt < limit < reading.total]
    seen = f"{limit}: {len(readings) - len(dropped)} of {len(readings)} rows kept, {len(cut)} lose the end of an answer"
    advice = f"trainer.max_length {most} keeps all of the sample whole."
    if dropped:
        ids = some([f"{reading.row['id']} ({reading.prompt} tokens)" for reading in dropped])
        advice = f"Dropped, since prompt and image tokens fill it: {ids}. {advice}"
    if cut:
        ids = some([str(reading.row["id"]) for reading in cut])
        advice = f"Without its end an answer does not teach to stop: {ids}. {advice}"
    nothing = len(dropped) == len(readings)
    return [judge("max_length", seen, fail=advice * nothing, warn=advice * bool(dropped or cut))]


def check_pictures(case: Case) -> list[Finding]:
    """Pictures of one colour, and rows that all show the same."""
    readings = [reading for reading in sampled(case) if reading.row["images"]]
    if not readings:
        raise NotExaminedError("no row of the sample holds a picture")
    pictures = [(reading.row["id"], decode(picture)) for reading in readings for picture in reading.row["images"]]
    uniform = [str(identity) for identity, picture in pictures if len(picture.getcolors(1) or ()) == 1]
    distinct = len({shown(reading.row) for reading in readings})
    sizes = sorted({picture.size for _, picture in pictures}, key=lambda size: size[0] * size[1])
    smallest, largest = ("x".join(map(str, sizes[place])) for place in (0, -1))
    span = smallest if len(sizes) == 1 else f"{smallest} to {largest}"
    seen = f"{distinct} different in {len(readings)} rows, {span} pixels, {len(uniform)} of one colour"
    fail = warn = ""
    if len(uniform) == len(pictures):
        fail = "All pictures are of one colour: there is nothing to see. Look at how they were stored."
    elif uniform:
        warn = f"Nothing is to be seen in the pictures of {some(uniform)}. Look at them: prefalign inspect {case.config.pairs}"
    elif distinct == 1 < len(readings):
        warn = "All rows of the sample show the same picture, so answers need not look at it."
    return [judge("pictures", seen, fail=fail, warn=warn)]


def check_other_picture(case: Case) -> list[Finding]:
    """The other picture of a pair reaches the model as another one."""
    others = [view for view in case.trainer.views if VIEWS[view].images in ("rejected_images", EITHER)]
    own = [view for view in case.trainer.views if VIEWS[view].images == "images"]
    if not others or not own:
        raise NotExaminedError("no loss looks at another picture")
    same, changes = [], []
    either = all(VIEWS[view].images == EITHER for view in others)  # a pair without another picture is none the worse
    for reading in sampled(case):
        if either and not reading.row["rejected_images"]:
            continue
        documents, places = reading.documents.documents, reading.documents.places
        one, two = (documents[places[view][0][0]].vision.get("pixel_values") for view in (own[0], others[-1]))
        if one is None or two is None:
            continue
        if one.shape == two.shape:
            changes.append((one.float() - two.float()).abs().mean().item())
            if changes[-1] == 0:
                same.append(str(reading.row["id"]))
        else:
            changes.append(float("inf"))
    if either and not changes:
        raise NotExaminedError("no row of the sample has another picture")
    finite = [change for change in changes if change != float("inf")]
    seen = f"differs in {len(changes) - len(same)} of {len(changes)} rows"
    seen += f", by {mean(finite):.2f} a pixel value on average" if finite else ", in size"
    means = "two texts are compared on one picture" if either else "such a loss stays where it starts"
    advice = f"Both sides show the same pixels in {some(same)}: {means}." if same else ""
    return [judge("other picture", seen, fail=advice * (len(same) == len(changes) and not either), warn=advice)]


def check_pairs(case: Case) -> list[Finding]:
    """Answers that differ, and by more than their length; rows that are there once."""
    readings = [reading for reading in sampled(case) if len(reading.answers()) == 2]
    if not readings:
        raise NotExaminedError("the losses look at one answer of each pair only")
    lengths = {side: mean(len(reading.answers()[side]) for reading in readings) for side in ("chosen", "rejected")}
    texts = [tuple(message_text(reading.row[side]) for side in ("chosen", "rejected")) for reading in readings]
    one_text = [reading.row for reading, both in zip(readings, texts, strict=True) if same_answer(*both)]
    same = [str(row["id"]) for row in one_text if not _pictures_are_compared(row, case)]
    differ = f"in {len(readings) - len(one_text)} of {len(readings)} rows"
    if apart := len(one_text) - len(same):
        differ += f", {apart} have one answer on two pictures"
    contents = [
        (shown(reading.row), message_text(reading.row["prompt"]), *both)
        for reading, both in zip(readings, texts, strict=True)
    ]
    copies = len(contents) - len(set(contents))
    gap = lengths["chosen"] / lengths["rejected"] - 1
    longer = [len(reading.answers()["chosen"]) - len(reading.answers()["rejected"]) for reading in readings]
    more, less = sum(difference > 0 for difference in longer), sum(difference < 0 for difference in longer)
    length = (
        f"chosen {lengths['chosen']:.1f} tokens, rejected {lengths['rejected']:.1f} ({gap:+.0%}); chosen longer in {more}, "
        f"rejected in {less} of {len(readings)} rows"
    )
    bias = ""
    if abs(gap) > LENGTH_BIAS or (max(more, less) >= ENOUGH and min(more, less) <= ONE_SIDED * max(more, less)):
        bias = (
            f"Length alone tells the answers apart, and the policy may learn {'longer' if more > less else 'shorter'} ones. "
            "Balance the pairs (`prefalign run filter_pairs`), or try loss_type: [sigmoid_norm]."
        )
    problem = f"Nothing is learned from one text as both answers: {some(same)}." if same else ""
    return [
        judge("answer lengths", length, warn=bias),
        judge("answers differ", differ, warn=problem, fail=problem * (len(same) == len(readings))),
        judge("duplicates", f"{copies} of {len(readings)} rows are copies of another",
              warn="`prefalign run filter_pairs` drops them." if copies else ""),
    ]  # fmt: skip


def _pictures_are_compared(row: Mapping[str, Any], case: Case) -> bool:
    """Whether the losses read a row on two different pictures, so that one text as both answers teaches something too."""
    looked_at = {VIEWS[view].images for view in case.trainer.views}
    if "images" not in looked_at or not looked_at & {"rejected_images", EITHER}:
        return False
    if not row["rejected_images"]:
        return "rejected_images" in looked_at and case.collator.negative is not None
    return shown(row) != shown(row, "rejected_images")


def sampled(case: Case) -> list:
    """The readings.

    Raises:
        NotExaminedError: there are none.
    """
    if not case.readings:
        raise NotExaminedError("no row of the sample could be read")
    return case.readings


def _spread(values: Sequence[float]) -> str:
    low, middle, high = min(values), median(values), max(values)
    return f"{middle:.0f}" if low == high else f"{low:.0f} to {high:.0f} (median {middle:.0f})"

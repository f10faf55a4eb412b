"""Checks of what the model reads: template, end of turn, padding, marks in answers, and the processor that is saved."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from trl.data_utils import apply_chat_template

from prefalign import families
from prefalign.doctor.case import Case, Reading
from prefalign.doctor.data import sampled
from prefalign.doctor.findings import Finding, judge, some
from prefalign.losses import VIEWS
from prefalign.records import message_text, normalise_messages, placeholder_count
from prefalign.training.documents import Document, decode

LOOKED_AT = 8
"""Rows whose prompts are prepared again, by other ways."""


def check_template(case: Case) -> list[Finding]:
    """Prompt and answer as text become the tokens of training, and generation is asked what training shows."""
    tokenizer, bos = case.processor.tokenizer, case.processor.tokenizer.bos_token_id
    own = [(reading, document) for reading in sampled(case)[:LOOKED_AT] if (document := _own(reading)) is not None]
    doubled, other, seams, heads = [], [], [], {}
    for reading, document in own:
        name, prompt = str(reading.row["id"]), document.prompt
        if bos is not None and prompt[:2].tolist() == [bos, bos]:
            doubled.append(name)
        if not torch.equal(_generation_prompt(case.processor, reading.row), prompt):
            other.append(name)
        texts = _texts(case, reading.row)
        for side, answer in reading.answers().items():
            start = texts[side].find(message_text(normalise_messages(reading.row[side])).strip())
            if start < 0 or texts[side][:start].strip():
                heads[name] = texts[side][: start if start >= 0 else 24]
            if families.rewrites_prompt(case.processor):
                continue
            whole = _ids(case.processor, texts["prompt"] + texts[side], reading.row)
            if not torch.equal(whole, torch.cat([prompt, answer])):
                seams.append(name)
    checked = f"{len(own)} rows"
    findings = [
        judge("one begin mark", f"{len(doubled)} of {checked} begin with two {tokenizer.bos_token}" if bos is not None else
              "the tokenizer has none",
              fail="The chat template writes it twice, which the model never saw. Take one out of the template."
              if doubled else ""),
        judge("generation prompt", f"equal to the prompt of training in {len(own) - len(other)} of {checked}",
              fail=f"`apply_chat_template(add_generation_prompt=True)` gives other tokens for {some(other)}: what is trained "
              "is not what is asked later. Mend the chat template." if other else ""),
        judge("template round trip", f"prompt + answer, tokenised as one text, in {len(own) - len(set(seams))} of {checked}",
              warn=f"Other tokens at the seam in {some(sorted(set(seams)))}. Training shows what generation gives, prompt "
              "first; scores of whole texts elsewhere will differ." if seams else ""),
    ]  # fmt: skip
    if heads:
        name, head = next(iter(heads.items()))
        findings[-1] = judge(
            "template round trip",
            f"answers begin with {head!r} in {len(heads)} of {checked}",
            warn=f"The loss covers more than the answer's text ({name}). The template should end the prompt there when "
            "add_generation_prompt is set, and leave answers as they are.",
        )
    return findings


def check_end_of_turn(case: Case) -> list[Finding]:
    """Each answer's end of turn is in its loss, and generation stops at it."""
    tokenizer, end = case.processor.tokenizer, families.turn_end_id(case.processor)
    mark, added = tokenizer.convert_ids_to_tokens(end), case.collator.reader.end
    answers = [(reading.row["id"], ids) for reading in sampled(case) for ids in reading.answers().values()]
    endless = [str(name) for name, ids in answers if end not in ids.tolist()]
    endless += [name for name, found in _masked(case).items() if not found]
    seen = f"{mark} ends {len(answers) - len(endless)} of {len(answers)} answers"
    stops = families.core(case.trainer.model).generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, (list, tuple)) else {stops, tokenizer.eos_token_id}
    fail = warn = ""
    if endless:
        fail = (
            f"No {mark} is in the loss of {some(endless)}, so the model forgets to stop. The chat template has to close an "
            "assistant turn, and the loss mask to cover it."
        )
    elif end not in stops:
        warn = f"`generate` does not stop at {mark}. Add its id {end} to eos_token_id in generation_config.json."
    elif added:
        warn = (
            f"The chat template closes an answer with nothing. Training here adds {added}; other trainers would not. Write "
            "{{ eos_token }} after an answer in the template."
        )
    return [judge("end of turn", seen, fail=fail, warn=warn)]


def _masked(case: Case) -> dict[str, bool]:
    """Row id to whether the loss mask covers the ends of all its answers that are not cut."""
    end = families.turn_end_id(case.processor)
    if not case.fitting:
        return {}
    batch = case.collator(case.rows)
    limit = case.collator.max_length
    ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    found = {}
    totals = {reading.row["id"]: reading.total for reading in case.fitting}
    for number, row in enumerate(case.rows):
        if limit is None or totals[row["id"]] <= limit:
            found[str(row["id"])] = all(
                bool((ids[place][mask[place]] == end).any()) for place in (number, number + len(case.rows))
            )
    return found


def check_padding(case: Case) -> list[Finding]:
    """Padding that is also an end mark, and masks that count it."""
    tokenizer = case.processor.tokenizer
    pad, ends = tokenizer.pad_token_id, families.end_token_ids(case.processor)
    batch = case.collator(case.rows)
    sides = [case.trainer.views[0], case.trainer.views[min(1, len(case.trainer.views) - 1)]]
    answers = sum(int(batch["answers"][VIEWS[view].answer]["mask"].sum()) for view in sides)
    seen = (
        f"{tokenizer.pad_token}, {int(batch['completion_mask'].sum())} tokens in the loss for {answers} in the answers"
    )
    fail = "Padding is in the loss, or answers are not." if int(batch["completion_mask"].sum()) != answers else ""
    warn = ""
    if pad in ends:
        warn = (
            f"{tokenizer.pad_token} is padding and an end mark. Here masks come from lengths, so nothing is lost; tools that "
            "mask by token lose the end of every answer. Give the tokenizer a pad_token of its own."
        )
    return [judge("padding", seen, fail=fail, warn=warn)]


def check_marks_in_answers(case: Case) -> list[Finding]:
    """Special tokens written inside an answer."""
    tokenizer, end = case.processor.tokenizer, families.turn_end_id(case.processor)
    special = set(tokenizer.all_special_ids) | set(families.visual_token_ids(case.processor, case.model_config))
    visual = families.visual_token_ids(case.processor, case.model_config)
    pictures: dict[str, str] = {}
    others: dict[str, str] = {}
    for reading in sampled(case):
        for side in reading.answers():
            text = message_text(normalise_messages(reading.row[side]))
            inside = {i for i in tokenizer(text, add_special_tokens=False).input_ids if i in special or i == end}
            for found, kind in ((pictures, inside & set(visual)), (others, inside - set(visual))):
                if kind:
                    found[str(reading.row["id"])] = tokenizer.convert_ids_to_tokens(min(kind))
    seen = f"{len(pictures) + len(others)} of {len(case.readings)} rows have some inside an answer"
    fail = warn = ""
    if pictures:
        name, mark = next(iter(pictures.items()))
        fail = f"{mark} in an answer is read as a place for a picture that is not there ({name}). Take such rows out."
    if others:
        name, mark = next(iter(others.items()))
        warn = f"{mark} in the text of an answer is read as a mark, not as text ({some(list(others))}). Take it out."
    return [judge("marks in answers", seen, fail=fail, warn=warn)]


def check_processor_saved(case: Case) -> list[Finding]:
    """The processor that is saved with the model prepares a row as the one of the run."""
    from transformers import AutoProcessor

    reading = next((reading for reading in sampled(case) if reading.row["images"]), sampled(case)[0])
    check = "processor saved"
    with tempfile.TemporaryDirectory() as folder:
        case.processor.save_pretrained(folder)
        try:
            loaded = AutoProcessor.from_pretrained(folder, trust_remote_code=case.config.model.trust_remote_code)
        except (OSError, ValueError, ImportError, AttributeError) as error:
            return [judge(check, f"a {type(case.processor).__name__} could not be loaded again", fail=str(error))]
    try:
        again = replace(case.collator.reader, processor=loaded).read([reading.row]).documents
    except (ValueError, OSError, AttributeError, TypeError) as error:
        return [judge(check, f"loaded again as {type(loaded).__name__}, it cannot prepare a row", fail=str(error))]
    differs = []
    for one, two in zip(reading.documents.documents, again, strict=True):
        if not torch.equal(one.prompt, two.prompt) or [a.tolist() for a in one.answers] != [
            a.tolist() for a in two.answers
        ]:
            differs.append("token ids")
        if one.vision.keys() != two.vision.keys() or not all(
            torch.equal(one.vision[k], two.vision[k]) for k in one.vision
        ):
            differs.append("pixels")
    if loaded.chat_template != case.processor.chat_template:
        differs.append("the chat template")
    seen = f"{type(loaded).__name__} loaded again gives {'other' if differs else 'the same'} " + " and ".join(
        sorted(set(differs)) or ["ids and pixels"]
    )
    advice = (
        "Whoever loads the trained model would show it something else. Use a processor that transformers saves whole."
    )
    return [judge(check, seen, fail=advice if differs else "")]


def _own(reading: Reading) -> Document | None:
    """The document that shows a row's own pictures, if the run has such a view."""
    for view, [(number, _)] in reading.documents.places.items():
        if VIEWS[view].images == "images":
            return reading.documents.documents[number]
    return None


def _texts(case: Case, row: Mapping[str, Any]) -> dict[str, str]:
    """Prompt and answers as TRL renders them, with the end that the trainer adds."""
    sides = {side: normalise_messages(row[side]) for side in ("prompt", "chosen", "rejected")}
    texts = apply_chat_template(sides, case.processor)
    return {side: text + case.collator.reader.end * (side != "prompt") for side, text in texts.items()}


def _ids(processor: Any, text: str, row: Mapping[str, Any]) -> torch.Tensor:
    images = [[decode(picture) for picture in row["images"]]] if row["images"] else None
    return processor(text=[text], images=images, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


def _generation_prompt(processor: Any, row: Mapping[str, Any]) -> torch.Tensor:
    """Prompt ids by transformers' own way from messages to tensors."""
    messages = normalise_messages(row["prompt"])
    if families.rewrites_prompt(processor) or not placeholder_count(messages):
        return _ids(processor, families.render(processor, messages), row)
    pictures = iter([decode(picture) for picture in row["images"]])
    conversation = [
        {
            **message,
            "content": [
                {**block, "image": next(pictures)} if block["type"] == "image" else block
                for block in message["content"]
            ],
        }
        for message in messages
    ]
    prepared = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return prepared["input_ids"][0]

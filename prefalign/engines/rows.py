"""Requests as the tokens a model is given, and what it drew as completions: alike for every engine that works on tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from prefalign import families
from prefalign.engines import Completion, Request
from prefalign.engines.stopping import Row, certain_sentence


def prompt_row(processor: Any, index: int, request: Request, answer: str | Completion, *, score: bool) -> Row:
    """The text and tokens of a request, with an answer after it.

    Args:
        processor: the model's processor.
        index: place of the request among those asked.
        request: the request.
        answer: if `score`, what is scored, a text or a completion; else empty.
        score: whether `answer` follows the prompt, cut into tokens where TRL cuts it.
    """
    if isinstance(answer, Completion):
        row = prompt_row(processor, index, request, "", score=False)
        end = [families.turn_end_id(processor)] if answer.finish_reason == "stop" else []
        return replace(row, tail=[*row.tail, *answer.token_ids, *end], given=len(row.tail))
    if score:
        prompt, completion = families.render_answer(processor, request.messages, answer, request.prefix)
        return Row(index, request, prompt, token_ids(processor.tokenizer, completion))
    if request.given:
        return Row(index, request, families.render(processor, request.messages), list(request.given))
    if families.rewrites_prompt(processor):
        prompt = families.render(processor, request.messages)
        return Row(index, request, prompt, token_ids(processor.tokenizer, request.prefix.rstrip()))
    return Row(index, request, families.render(processor, request.messages, request.prefix), [])


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as it is written, without special tokens that a tokenizer adds by itself."""
    return tokenizer(text, add_special_tokens=False).input_ids if text else []


def drawn_completion(
    tokenizer: Any, ends: Collection[int], request: Request, tail: list[int], new: list[int]
) -> Completion:
    """What a model drew for a request.

    Args:
        tokenizer: the model's tokenizer.
        ends: ids that end an answer.
        request: the request.
        tail: the last tokens of its prompt.
        new: tokens drawn; those from the first end on do not count.
    """
    end = next((place for place, token in enumerate(new) if token in ends), None)
    reason = "length" if end is None else "stop"
    end_token = None if end is None else new[end]
    new = new[:end]
    text = new_text(tokenizer, request, tail, new)
    if request.stop_at_sentence and (cut := certain_sentence(request.prefix, text)) is not None:
        while new and len(new_text(tokenizer, request, tail, new[:-1]).rstrip()) >= len(cut):
            new = new[:-1]
        text, reason, end_token = cut, "sentence", None
    return Completion(request.id, text, token_ids=new, finish_reason=reason, end_token=end_token)


def new_text(tokenizer: Any, request: Request, tail: list[int], new: list[int]) -> str:
    """What new tokens add to the text, so that `prefix + text` reads well: decoded after the tokens before them."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = decode(tail), decode([*tail, *new])
    text = whole[len(before) :] if whole.startswith(before) else decode(new)
    joined = request.prefix and not request.prefix[-1].isspace()
    return text if joined else text.lstrip()

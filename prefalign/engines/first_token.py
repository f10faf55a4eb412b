"""How likely an answer is to begin with each of some words: a labeller's yes or no as probabilities, from one forward pass.

Plain probabilities of the model: no temperature, no repetition penalty (which would shift them towards words that the question
does not hold), no banned tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefalign.engines import USAGE, Completion, Request

if TYPE_CHECKING:
    from prefalign.engines.transformers import TransformersEngine
    from prefalign.engines.vllm import VllmEngine


def measure(engine: TransformersEngine, requests: Sequence[Request], words: Sequence[str]) -> list[dict[str, float]]:
    """What `TransformersEngine.first_token` gives, whose docstring says what that is."""
    if any(request.given for request in requests):
        raise ValueError(
            "a request with `given` tokens goes on in the middle of a conversation, and words are looked up as they begin an "
            "answer. Put the earlier turns into its messages."
        )
    found = [dict.fromkeys(words, math.nan) for _ in requests]
    failed: dict[int, Completion] = {}
    tokens: dict[str, list[int]] = {}
    for request in requests:
        if request.prefix not in tokens:
            tokens[request.prefix] = word_tokens(engine, request, words)
    # a row with the first word as its answer has the prompt as it is trained on; what is read stands before the word
    for batch in engine._batches(requests, [*words[:1]] * len(requests), failed, score=True):
        longest = max(len(row.tail) for row in batch.rows)
        with engine._inference() as model:
            logits = model(**batch.tensors, logits_to_keep=longest + 1, use_cache=False).logits
        batch.count(USAGE, drawn=len(batch.rows))
        for row, values in zip(batch.rows, logits, strict=True):
            probs = values[longest - len(row.tail)].float().softmax(-1)[tokens[row.request.prefix]].tolist()
            found[row.index] = dict(zip(words, probs, strict=True))
    return found


def word_tokens(engine: TransformersEngine | VllmEngine, request: Request, words: Sequence[str]) -> list[int]:
    """Id of the first token of each word where it begins an answer to a request, after the blank that the template may write.

    Raises:
        ValueError: if there are no words, one is empty or unknown to the tokenizer, or two begin with the same token.
    """
    if not words or not all(word.strip() for word in words):
        raise ValueError(
            f"words are {list(words)}; give at least one that an answer can begin with, none of them empty."
        )
    first: dict[int, str] = {}
    for word in words:
        token = engine._row(0, request, word, score=True).tail[0]
        if token == engine.tokenizer.unk_token_id:
            raise ValueError(
                f"{word!r} begins with a token that is unknown to this model, so its probability would be that of any unknown "
                "word. Give another spelling."
            )
        if token in first:
            raise ValueError(
                f"{first[token]!r} and {word!r} begin with the same token ({engine.tokenizer.decode([token])!r}), so this "
                "model's first token cannot tell them apart, and a sum over both would count it twice. Leave one of them out."
            )
        first[token] = word
    return list(first)

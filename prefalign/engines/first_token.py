"""How likely an answer is to begin with each of some words: a labeller's yes or no as probabilities, from one forward pass.

Plain probabilities of the model: no temperature, no repetition penalty (which would shift them towards words that the question
does not hold), no banned tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefalign.engines import USAGE, Completion, FirstToken, Request
from prefalign.engines.rows import prompt_row

if TYPE_CHECKING:
    from prefalign.engines.transformers import TransformersEngine


def measure(engine: TransformersEngine, requests: Sequence[Request], words: Sequence[str]) -> list[FirstToken]:
    """What `TransformersEngine.first_token` gives, whose docstring says what that is."""
    if any(request.given for request in requests):
        raise ValueError(
            "a request with `given` tokens goes on in the middle of a conversation, and words are looked up as they begin an "
            "answer. Put the earlier turns into its messages."
        )
    found: dict[int, FirstToken] = {}
    failed: dict[int, Completion] = {}
    tokens: dict[str, list[int]] = {}
    for request in requests:
        if request.prefix not in tokens:
            tokens[request.prefix] = word_tokens(engine.processor, request, words)
    # a row with the first word as its answer has the prompt as it is trained on; what is read stands before the word
    for batch in engine.batches(requests, [*words[:1]] * len(requests), failed, score=True):
        longest = max(len(row.tail) for row in batch.rows)
        with engine.inference() as model:
            logits = model(**batch.tensors, logits_to_keep=longest + 1, use_cache=False).logits
        batch.count(USAGE, drawn=len(batch.rows))
        for row, values in zip(batch.rows, logits, strict=True):
            probs = values[longest - len(row.tail)].float().softmax(-1)[tokens[row.request.prefix]].tolist()
            found[row.index] = FirstToken(dict(zip(words, probs, strict=True)))
    return [found.get(index) or FirstToken({}, failed[index].error) for index in range(len(requests))]


def word_tokens(processor: Any, request: Request, words: Sequence[str]) -> list[int]:
    """Id of the first token of each word where it begins an answer to a request, after the blank that the template may write.

    Args:
        processor: the model's processor.
        request: the request.
        words: the words.

    Raises:
        ValueError: if there are no words, one is empty or unknown to the tokenizer, or two begin with the same token.
    """
    if not words or not all(word.strip() for word in words):
        raise ValueError(
            f"words are {list(words)}; give at least one that an answer can begin with, none of them empty."
        )
    tokenizer = processor.tokenizer
    first: dict[int, str] = {}
    for word in words:
        token = prompt_row(processor, 0, request, word, score=True).tail[0]
        if token == tokenizer.unk_token_id:
            raise ValueError(
                f"{word!r} begins with a token that is unknown to this model, so its probability would be that of any unknown "
                "word. Give another spelling."
            )
        if token in first:
            raise ValueError(
                f"{first[token]!r} and {word!r} begin with the same token ({tokenizer.decode([token])!r}), so this "
                "model's first token cannot tell them apart, and a sum over both would count it twice. Leave one of them out."
            )
        first[token] = word
    return list(first)

"""Generation and scoring with vLLM in this process: continuous batching, one prefill for what prompts share.

It runs in an environment of its own (constraints-vllm.txt), since vLLM's pins and TRL's do not meet. Prompts are the transformers
engine's, token for token; greedy answers are too, as far as rounding allows. What is drawn at a temperature is another draw from
the same distribution, decided by seed and id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prefalign import families
from prefalign.engines import USAGE, Completion, FirstToken, Request, Sampling
from prefalign.engines.first_token import word_tokens
from prefalign.engines.prompts import check_answers, request_problem
from prefalign.engines.rows import drawn_completion, new_text, prompt_row, token_ids
from prefalign.engines.sampling import check_sampling
from prefalign.engines.stopping import CONTEXT_TAIL, SENTENCE_MARKS, Row, certain_sentence
from prefalign.records import row_seed

NO_SCORES = (
    "vLLM does not score given answers through a LoRA adapter. Merge it into its base (`prefalign run merge_adapter`) and name "
    "the merged model, or use the transformers engine."
)


class VllmEngine:
    """An `Engine` on a `vllm.LLM`. With an adapter it does not score given answers: vLLM's LoRA has no way to (tested: 0.32).

    Args:
        llm: the `vllm.LLM`, with prefix caching.
        processor: the model's processor, from `models.load_processor`.
        config: the model's transformers config.
        ends: ids that end an answer (`families.end_token_ids`).
        fingerprint: identity of weights and processor for record ids (`processors.engine_fingerprint`).
        adapter: folder of a LoRA adapter that requests go through; `llm` must have been made with `enable_lora`.
        own_context: positions of the model, where `max_model_len` may be fewer. Rows do not depend on that: an answer that it
            alone would cut off is an error.
    """

    capabilities: frozenset[str] = frozenset({"sample", "logprobs", "prefix", "first_token"})

    def __init__(
        self,
        llm: Any,
        processor: Any,
        config: Any,
        *,
        ends: Sequence[int],
        fingerprint: str = "",
        adapter: str | Path | None = None,
        own_context: int | None = None,
    ) -> None:
        self.llm = llm
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.config = config
        self.ends = list(ends)
        self.fingerprint = fingerprint
        self.context = int(llm.llm_engine.model_config.max_model_len)
        self.own_context = max(own_context or 0, self.context)
        self.visual_tokens = families.visual_tokens(processor, config)
        words = int(llm.llm_engine.model_config.get_vocab_size())
        banned = families.banned_token_ids(processor, config, keep=self.ends)
        self.bias = dict.fromkeys([*banned, *range(len(self.tokenizer), words)], float("-inf"))
        self.adapter = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self.adapter = LoRARequest(Path(adapter).name, 1, str(adapter))
            self.capabilities = self.capabilities - {"logprobs"}

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order.

        Requests about the same pictures go to vLLM one after the other, so that it finds their prefill in its cache. A request
        that cannot be put to the model, or whose answer only `max_model_len` cut off, comes back alone with `finish_reason`
        `error`.

        Args:
            requests: what to answer.
            sampling: how to draw; a row's draw is decided by its id and seed.

        Raises:
            ValueError: for settings that mean nothing, or that vLLM has no way to follow (`contrast`, `attention_layer`, a
                request's `image_mask`).
        """
        check_sampling(sampling)
        for name in ("contrast", "attention_layer"):
            if getattr(sampling, name) is not None:
                raise _refusal(f"sampling.{name}")
        done: dict[int, Completion] = {}
        rows = self._rows(requests, [""] * len(requests), done)
        for row, prompt, output in self._run(rows, done, lambda row: self._sampling(row.request, sampling)):
            new = list(output.outputs[0].token_ids)
            said = drawn_completion(self.tokenizer, self.ends, row.request, prompt[-CONTEXT_TAIL:], new)
            cut = (
                self.context < self.own_context
                and said.finish_reason == "length"
                and len(new) < sampling.max_new_tokens
            )
            done[row.index] = _error(row.request, cut_message(row.request, len(new), self.context)) if cut else said
            USAGE.new_tokens += len(new)
        return [done[index] for index in range(len(requests))]

    def logprobs(self, requests: Sequence[Request], answers: Sequence[str | Completion]) -> list[torch.Tensor]:
        """Log-probs of given answers, teacher-forced, of the tokens that the transformers engine scores.

        Args:
            requests: the prompts; a `prefix` counts as prompt.
            answers: one answer each, without the prefix: a text, or what `generate` gave, whose own tokens are then taken.

        Returns:
            One float32 tensor (T_i,) per request: a value for each token of the answer and of what the chat template closes the
            turn with. A request that cannot be scored gives a single NaN.

        Raises:
            ValueError: if the engine has an adapter, or a request an `image_mask`.
        """
        if self.adapter is not None:
            raise ValueError(NO_SCORES)
        from vllm import SamplingParams

        check_answers(requests, answers)
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        found = [torch.tensor([float("nan")]) for _ in requests]
        rows = self._rows(requests, answers, {}, score=True)
        for row, prompt, output in self._run(rows, {}, lambda row: params):
            count = len(row.tail) - row.given
            places = range(len(prompt) - count, len(prompt))
            found[row.index] = torch.tensor([output.prompt_logprobs[place][prompt[place]].logprob for place in places])
            USAGE.prompt_tokens -= count
            USAGE.new_tokens += count
        return found

    def first_token(self, requests: Sequence[Request], words: Sequence[str]) -> list[FirstToken]:
        """As `Engine.first_token` says; a `prefix` counts as prompt, `given` is refused."""
        from vllm import SamplingParams

        tokens: dict[str, list[int]] = {}
        for request in requests:
            if request.given:
                raise ValueError(
                    f"request {request.id} has `given` tokens and goes on in the middle of a conversation, and words are looked "
                    "up as they begin an answer. Put the earlier turns into its messages."
                )
            if request.prefix not in tokens:
                tokens[request.prefix] = word_tokens(self.processor, request, words)
        found: dict[int, FirstToken] = {}
        failed: dict[int, Completion] = {}
        rows = self._rows(requests, [*words[:1]] * len(requests), failed, score=True)
        for row in rows:
            row.tail = []  # what is read stands before the word
        params = {
            prefix: SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=ids, detokenize=False)
            for prefix, ids in tokens.items()
        }
        for row, _, output in self._run(rows, failed, lambda row: params[row.request.prefix]):
            values = output.outputs[0].logprobs[0]
            probs = [values[token].logprob for token in tokens[row.request.prefix]]
            found[row.index] = FirstToken(dict(zip(words, torch.tensor(probs).exp().tolist(), strict=True)))
            USAGE.new_tokens += 1
        return [found.get(index) or FirstToken({}, failed[index].error) for index in range(len(requests))]

    def attention(self, requests: Sequence[Request], answers: Sequence[Any], *, layer: int | None = None) -> list[Any]:
        """Not to be had from vLLM.

        Raises:
            ValueError: always.
        """
        raise _refusal("attention")

    def problem(self, request: Request, answer: str = "") -> str | None:
        """Why a request cannot be put to the model, as far as that shows before the pictures are prepared; None if it can."""
        return request_problem(request, answer, self)

    def _rows(
        self,
        requests: Sequence[Request],
        answers: Sequence[str | Completion],
        failed: dict[int, Completion],
        *,
        score: bool = False,
    ) -> list[Row]:
        """Rows that can be run, those about the same pictures together; the others are put into `failed`."""
        if any(request.image_mask for request in requests):
            raise _refusal("image_mask")
        rows = []
        for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            reason = self.problem(request, answer if isinstance(answer, str) else answer.text)
            if reason is None:
                rows.append(self._row(index, request, answer, score=score))
            else:
                failed[index] = _error(request, reason)
        return in_picture_order(rows)

    def _row(self, index: int, request: Request, answer: str | Completion, *, score: bool) -> Row:
        return prompt_row(self.processor, index, request, answer, score=score)

    def _run(
        self, rows: Sequence[Row], failed: dict[int, Completion], params_of: Any
    ) -> Iterator[tuple[Row, list[int], Any]]:
        """Put rows to vLLM; gives each as it is done with the ids of its prompt and what came out."""
        from vllm.exceptions import VLLMClientError

        engine = self.llm.llm_engine
        waiting: dict[str, Row] = {}
        for row in rows:
            prompt: dict[str, Any] = {"prompt_token_ids": [*token_ids(self.tokenizer, row.prompt), *row.tail]}
            if row.request.images:
                prompt["multi_modal_data"] = {"image": row.request.images}
            name = str(row.index)
            try:
                engine.add_request(name, prompt, params_of(row), lora_request=self.adapter)
            except (ValueError, VLLMClientError) as error:
                failed[row.index] = _error(row.request, f"request {row.request.id}: {self._reason(error)}")
            else:
                waiting[name] = row
        try:
            while waiting:
                for output in engine.step():
                    if output.request_id not in waiting:
                        continue
                    row = waiting[output.request_id]
                    if not output.finished:
                        if not self._sentence_ended(row, output):
                            continue
                        engine.abort_request([output.request_id])
                    del waiting[output.request_id]
                    ids = list(output.prompt_token_ids)
                    USAGE.requests += 1
                    USAGE.prompt_tokens += len(ids)
                    USAGE.image_tokens += sum(map(ids.count, families.image_token_ids(self.config)))
                    yield row, ids, output
        finally:
            if waiting:
                engine.abort_request(list(waiting))

    def _sampling(self, request: Request, sampling: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        whole = RequestOutputKind.CUMULATIVE if request.stop_at_sentence else RequestOutputKind.FINAL_ONLY
        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seed=row_seed(request.seed, request.id),
            stop_token_ids=self.ends,
            logit_bias=self.bias,
            detokenize=False,
            output_kind=whole,
        )

    def _sentence_ended(self, row: Row, output: Any) -> bool:
        """Whether what was drawn so far holds a sentence that has certainly ended."""
        new = list(output.outputs[0].token_ids)
        recent = self.tokenizer.decode(new[-3:])
        if SENTENCE_MARKS.isdisjoint(recent) or not set(self.ends).isdisjoint(new):
            return False
        text = new_text(self.tokenizer, row.request, list(output.prompt_token_ids[-CONTEXT_TAIL:]), new)
        return certain_sentence(row.request.prefix, text) is not None

    def _reason(self, error: Any) -> str:
        after = re.search(r"\(length (\d+)\).* is longer than the maximum model length", str(error), re.DOTALL)
        length = error.value if getattr(error, "parameter", None) == "input_tokens" else after and after[1]
        if length:
            if self.context < self.own_context:
                return (
                    f"the prompt has {length} tokens, and model.vllm.max_model_len is {self.context} (the model has "
                    f"{self.own_context} positions). Raise it."
                )
            return (
                f"the prompt has {length} tokens, and the model has {self.context} positions. Use fewer or smaller "
                "pictures, or less text."
            )
        return f"vLLM refused the prompt or its picture: {error}"


def in_picture_order(rows: Sequence[Row]) -> list[Row]:
    """Rows about the same pictures together, in the order in which the pictures first come; among them those of one prompt."""
    digests: dict[int, bytes] = {}
    for row in rows:
        for image in row.request.images:
            if id(image) not in digests:
                digests[id(image)] = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
    pictures = {row.index: b"".join(digests[id(image)] for image in row.request.images) for row in rows}
    first = {content: place for place, content in reversed(list(enumerate(pictures.values())))}
    return sorted(rows, key=lambda row: (first[pictures[row.index]], row.prompt, row.index))


def cut_message(request: Request, length: int, limit: int) -> str:
    """Why an answer that only `max_model_len` cut off is no answer."""
    return (
        f"request {request.id}: the answer was cut off after {length} tokens by model.vllm.max_model_len {limit}, before "
        "max_new_tokens and the model's own positions, and rows would depend on a setting of memory. Raise max_model_len, or "
        "lower max_new_tokens."
    )


def _error(request: Request, reason: str) -> Completion:
    return Completion(request.id, "", finish_reason="error", error=reason)


def _refusal(what: str) -> ValueError:
    return ValueError(
        f"{what} was asked for, and vLLM neither shows its attention nor takes a mask or a second prompt, so answers would come "
        "without it. Set `engine` to transformers."
    )

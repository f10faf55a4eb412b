"""Generation and scoring with transformers: batched, ordered by length, with noise and masks that belong to the row.

Legend of shapes: `B` rows of a batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from prefalign import families
from prefalign.engines import USAGE, Completion, FirstToken, ImageAttention, Request, Sampling, first_token, sharing
from prefalign.engines.attention import measure, readable_layer
from prefalign.engines.contrast import blind_branch, text_alone_works
from prefalign.engines.prompts import check_answers, hidden_mask, request_problem, with_tails
from prefalign.engines.rows import drawn_completion, new_text, prompt_row, token_ids
from prefalign.engines.sampling import RepetitionPenalty, RowNoise, check_sampling
from prefalign.engines.stopping import SENTENCE_MARKS, Batch, Row, RowStop
from prefalign.engines.watching import watching
from prefalign.models import ModelConfig, fingerprint, load_model, load_processor
from prefalign.processors import engine_fingerprint


class TransformersEngine:
    """An `Engine` on a model in this process.

    Args:
        model: model from `models.load_model` (a `PeftModel` is fine); it may go on being trained between calls.
        processor: its processor.
        batch_size: rows in one forward pass. It changes speed and memory, not the results beyond rounding.
        fingerprint: identity of weights and processor for record ids (`processors.engine_fingerprint`).
        share_prompts: run what several prompts begin with once (`sharing.py`), where the model allows it.
    """

    def __init__(
        self, model: Any, processor: Any, *, batch_size: int = 16, fingerprint: str = "", share_prompts: bool = True
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.batch_size = batch_size
        self.fingerprint = fingerprint
        self.config = families.core(model).config
        self.shares = share_prompts and sharing.can_share(self.config)
        self.ends = families.end_token_ids(processor, families.core(model).generation_config)
        self.pad = (
            self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        )
        self.banned = families.banned_token_ids(processor, self.config, keep=self.ends)
        self.context = families.context_length(self.config)
        self.capabilities = capabilities(self.config)
        self.visual_tokens = families.visual_tokens(processor, self.config)
        self._sentence_tokens: torch.Tensor | None = None
        families.family(self.config)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in order.

        A request that cannot be put to the model (pictures and placeholders differ, an image mark in its text, a prompt longer
        than the context) comes back alone with `finish_reason` `error`.

        Args:
            requests: what to answer.
            sampling: how to draw. The noise of a row depends on its id and seed, the step and the token, so neither order nor
                batch changes what is drawn.
        """
        check_sampling(sampling)
        if sampling.contrast is not None and "contrast" not in self.capabilities:
            raise ValueError(
                f"a {self.config.model_type} reads pictures through cross-attention layers and not as tokens of the prompt, so "
                "there is no prompt without its picture to decode against. Leave `contrast` out, or use a model that has its "
                "picture among the tokens, such as LLaVA or Qwen-VL."
            )
        if watched := sampling.attention_layer is not None:
            readable_layer(self, sampling.attention_layer)
        done: dict[int, Completion] = {}
        share = self.shares and sampling.contrast is None and not watched and sampling.repetition_penalty == 1
        for rows in self.batches(requests, [""] * len(requests), done, share=share):
            for row, completion in zip(rows.rows, self._generate(rows, sampling), strict=True):
                done[row.index] = completion
        return [done[index] for index in range(len(requests))]

    def logprobs(self, requests: Sequence[Request], answers: Sequence[str | Completion]) -> list[torch.Tensor]:
        """Log-probs of given answers, teacher-forced; the tokens are those that TRL trains on.

        Args:
            requests: the prompts; a `prefix` counts as prompt, an `image_mask` is applied.
            answers: one answer each, without the prefix: a text, or what `generate` gave, whose own tokens are then taken.

        Returns:
            One float32 tensor (T_i,) per request on the CPU: a value for each token of the answer and of what the chat template
            closes the turn with (of a completion: for its tokens, and for the end of the turn if it came to it). A request that
            cannot be scored (`problem` says why) gives a single NaN.
        """
        check_answers(requests, answers)
        failed: dict[int, Completion] = {}
        scored: dict[int, torch.Tensor] = {}
        for rows in self.batches(requests, answers, failed, score=True):
            for row, values in zip(rows.rows, self._score(rows), strict=True):
                scored[row.index] = values
        return [scored.get(index, torch.tensor([float("nan")])) for index in range(len(requests))]

    def attention(
        self, requests: Sequence[Request], answers: Sequence[str | Completion], *, layer: int | None = None
    ) -> list[ImageAttention]:
        """Attention of given answers to each image token of their prompts (MIA-DPO, arXiv 2410.17637).

        The mean over heads and over the query rows of the answer's tokens that were fed back: all but its last, which is drawn
        and never a query. The model may use any attention kernel and keeps it; see `attention.py`.

        Args:
            requests: the prompts, as for `logprobs`.
            answers: one answer each, a text or what `generate` gave.
            layer: decoder layer, 0-based, negative from the end; None: the middle one.

        Returns:
            One for each request, on the CPU; what cannot be measured has an `error` and no weights.

        Raises:
            ValueError: if there is no such layer, or it has no attention map.
        """
        check_answers(requests, answers)
        return measure(self, requests, answers, layer)

    def first_token(self, requests: Sequence[Request], words: Sequence[str]) -> list[FirstToken]:
        """As `Engine.first_token` says; a `prefix` counts as prompt, an `image_mask` is applied, `given` is refused."""
        return first_token.measure(self, requests, words)

    def problem(self, request: Request, answer: str = "") -> str | None:
        """Why a request cannot be put to the model, as far as that shows before the pictures are prepared; None if it can."""
        return request_problem(request, answer, self)

    def batches(
        self,
        requests: Sequence[Request],
        answers: Sequence[str | Completion],
        failed: dict[int, Completion],
        *,
        score: bool = False,
        share: bool = False,
    ) -> Iterator[Batch]:
        """Batches of rows that can be run, longest first, on the model's device.

        Args:
            requests: the prompts.
            answers: one answer each, which follows its prompt if `score`; empty ones to generate.
            failed: gets, by place of the request, a completion with the error for what cannot be put to the model.
            score: whether answers are in the batches, as the rows' `tail`.
            share: run what several prompts begin with once, where that pays.
        """
        rows = []
        for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
            reason = self.problem(request, answer if isinstance(answer, str) else answer.text)
            if reason is None:
                rows.append(self._row(index, request, answer, score=score))
            else:
                failed[index] = Completion(request.id, "", finish_reason="error", error=reason)
        tokens = self._token_ids(rows)
        groups = [[row for row in rows if row.request.images], [row for row in rows if not row.request.images]]
        for group in groups:
            lengths = self._lengths(group, tokens)
            stems = sharing.on_stems(group, tokens, lengths) if share and not any(row.tail for row in group) else []
            hiding = any(row.request.image_mask for row in group)
            if stems and (hiding or len(stems) < len(group)):
                yield from self._shared(stems, failed)
                continue
            group.sort(key=lambda row: (-lengths[row.index], row.index))
            for start in range(0, len(group), self.batch_size):
                batch = self._encode(group[start : start + self.batch_size], failed)
                if batch.rows:
                    yield batch

    def _shared(self, stems: list[sharing.Stem], failed: dict[int, Completion]) -> Iterator[Batch]:
        """Batches of rows on stems; where a stem is refused, its rows are put to the model one by one, so that each says why."""
        for part in sharing.in_batches(stems, self.batch_size):
            batch = self._encode([stem.row for stem in part], {})
            if len(batch.rows) == len(part):
                yield sharing.rows_of(part, batch)
            else:
                batch = self._encode([row for stem in part for row in stem.rows], failed)
                if batch.rows:
                    yield batch

    def encode(self, requests: Sequence[Request]) -> Batch:
        """The prompts of some requests as one batch, in order; those that cannot be put to the model are left out."""
        return self._encode([self._row(index, one, "", score=False) for index, one in enumerate(requests)], {})

    @cached_property
    def reads_text_alone(self) -> bool:
        """Whether the model can be asked without a picture."""
        return text_alone_works(self)

    def _row(self, index: int, request: Request, answer: str | Completion, *, score: bool) -> Row:
        return prompt_row(self.processor, index, request, answer, score=score)

    def _tokens(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)

    def _token_ids(self, rows: Sequence[Row]) -> dict[int, list[int]]:
        """By index, the token ids of each row's prompt, a picture being one."""
        texts = self.tokenizer([row.prompt for row in rows], add_special_tokens=False).input_ids if rows else []
        return {row.index: ids for row, ids in zip(rows, texts, strict=True)}

    def _lengths(self, rows: Sequence[Row], tokens: Mapping[int, Sequence[int]]) -> dict[int, int]:
        sizes = sorted({(image.height, image.width) for row in rows for image in row.request.images})
        image_tokens = dict(zip(sizes, families.image_lengths(self.processor, sizes), strict=True))
        return {
            row.index: len(tokens[row.index])
            + len(row.tail)
            + sum(image_tokens[image.height, image.width] for image in row.request.images)
            for row in rows
        }

    def _encode(self, rows: list[Row], failed: dict[int, Completion]) -> Batch:
        """Processor, tails, positions and masks of some rows; rows that the processor or the context refuses go to `failed`."""
        try:
            tensors = self._process(rows)
        except (ValueError, TypeError, IndexError, RuntimeError, ZeroDivisionError) as error:
            if len(rows) == 1:
                failed[rows[0].index] = _error(rows[0], f"the processor refused the prompt or its picture: {error}")
                return Batch()
            halves = [self._encode(half, failed).rows for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
            good = [*halves[0], *halves[1]]
            if len(good) == len(rows):
                raise
            return self._encode(good, failed) if good else Batch()
        lengths = tensors["attention_mask"].sum(1).tolist()
        pieces = families.image_token_mask(tensors["input_ids"], self.config).sum(1).tolist()
        fitting = []
        for row, length, has_picture in zip(rows, lengths, pieces, strict=True):
            if row.request.image_mask is not None and not has_picture:
                failed[row.index] = _error(
                    row,
                    "its prompt holds no image token, so the image mask would hide nothing. Give it a picture, or no mask.",
                )
            elif self.context is not None and length + len(row.tail) > self.context - (not row.tail):
                failed[row.index] = _error(
                    row,
                    f"the prompt has {length} tokens{f' and the text after it {len(row.tail)}' if row.tail else ''}, and the "
                    f"model has {self.context} positions. Use fewer or smaller pictures, or less text.",
                )
            else:
                fitting.append(row)
        if len(fitting) < len(rows):
            return self._encode(fitting, failed) if fitting else Batch()
        if any(row.tail for row in rows):
            after = int(families.rewrites_prompt(self.processor))
            tensors = with_tails(tensors, [row.tail for row in rows], pad=self.pad, token_type=after)
        model = families.core(self.model)
        tensors = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in tensors.items()
            if isinstance(value, torch.Tensor)
        }
        tensors["position_ids"] = families.position_ids(model, tensors)
        tensors["attention_mask"] = hidden_mask(tensors, [row.request.image_mask for row in rows], self.config)
        return Batch(rows, tensors, [length + len(row.tail) for length, row in zip(lengths, rows, strict=True)], pieces)

    def _process(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        images = [row.request.images for row in rows]
        tensors = self.processor(
            text=[row.prompt for row in rows],
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        return {name: value for name, value in tensors.items() if name != "labels"}

    @contextmanager
    def inference(self) -> Iterator[Any]:
        """The bare model in eval mode and without gradients, left afterwards as it was found."""
        model = families.core(self.model)
        training, generation = self.model.training, model.generation_config
        self.model.eval()
        families.clear_position_cache(model)
        try:
            with torch.no_grad():
                yield model
        finally:
            families.clear_position_cache(model)
            model.generation_config = generation
            self.model.train(training)

    def _generate(self, batch: Batch, sampling: Sampling) -> list[Completion]:
        settings = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,  # put after the contrast instead, which wants plain log-probs
            eos_token_id=self.ends,
            pad_token_id=self.pad,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        with self.inference() as model:
            inputs = sharing.prefilled(model, batch, self.pad) if batch.stems else batch.tensors
            width = inputs["input_ids"].shape[1]
            stop = RowStop(self, batch, width)
            requests = [row.request for row in batch.rows]
            processors: list[Any] = [RowNoise(requests, sampling, self.banned, len(self.tokenizer), width)]
            if sampling.repetition_penalty != 1:
                processors.insert(0, RepetitionPenalty(sampling.repetition_penalty, inputs["attention_mask"]))
            branch = None
            if sampling.contrast is not None and batch.rows[0].request.images:
                branch = blind_branch(self, batch, sampling.contrast, width)
                processors.insert(0, branch)
            # generate fills what is not set here from the model's own settings (sampling of the checkpoint's author)
            model.generation_config = settings
            with watching(self, model, batch, sampling.attention_layer) as watcher:
                ids = model.generate(
                    **inputs,
                    generation_config=settings,
                    logits_processor=LogitsProcessorList(processors),
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
        answers = [new[: stop.stopped.get(index, len(new))] for index, new in enumerate(ids[:, width:].tolist())]
        batch.count(USAGE, drawn=sum(self._drawn(answer) for answer in answers))
        completions = [self._completion(*parts) for parts in zip(batch.rows, stop.tails, answers, strict=True)]
        if branch is not None:
            branch.note(completions)
        if watcher is not None:
            watcher.note(completions)
        return completions

    def _drawn(self, new: list[int]) -> int:
        """How many tokens were drawn for a row: those up to its end-of-sequence, without the padding behind it."""
        return next((place + 1 for place, token in enumerate(new) if token in self.ends), len(new))

    def _completion(self, row: Row, tail: list[int], new: list[int]) -> Completion:
        return drawn_completion(self.tokenizer, self.ends, row.request, tail, new)

    def new_text(self, request: Request, tail: list[int], new: list[int]) -> str:
        """What new tokens add to the text, so that `prefix + text` reads well: decoded after the tokens before them."""
        return new_text(self.tokenizer, request, tail, new)

    def sentence_tokens(self) -> torch.Tensor:
        """(V,) bool: tokens that hold a mark which may end a sentence."""
        if self._sentence_tokens is None:
            texts = self.tokenizer.batch_decode([[index] for index in range(len(self.tokenizer))])
            self._sentence_tokens = torch.tensor([not SENTENCE_MARKS.isdisjoint(text) for text in texts])
        return self._sentence_tokens

    def _score(self, batch: Batch) -> list[torch.Tensor]:
        longest = max(len(row.tail) for row in batch.rows)
        with self.inference() as model:
            logits = model(**batch.tensors, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1]
            targets = batch.tensors["input_ids"][:, -longest:] if longest else batch.tensors["input_ids"][:, :0]
            values = [
                row_logits.float().log_softmax(-1).gather(1, row_targets[:, None]).squeeze(1).cpu()
                for row_logits, row_targets in zip(logits, targets.to(logits.device), strict=True)
            ]
        batch.count(USAGE)
        return [value[longest - len(row.tail) + row.given :] for row, value in zip(batch.rows, values, strict=True)]


def capabilities(config: Any) -> frozenset[str]:
    """What the engine can do with a model of this transformers config."""
    found = frozenset({"sample", "logprobs", "prefix", "vision_embed", "first_token"})
    return found if families.cross_attends(config) else found | {"contrast", "image_mask", "attention"}


def load_engine(config: ModelConfig, *, batch_size: int = 16) -> TransformersEngine:
    """Load model and processor and put an engine on them, with their fingerprint."""
    processor = load_processor(config)  # its faults show in no time
    model = load_model(config)
    identity = engine_fingerprint(fingerprint(model), processor)
    return TransformersEngine(model, processor, batch_size=batch_size, fingerprint=identity)


def _error(row: Row, reason: str) -> Completion:
    return Completion(row.request.id, "", finish_reason="error", error=f"request {row.request.id}: {reason}")

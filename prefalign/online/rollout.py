"""A rollout: answers drawn from the policy as it is, kept as the tokens that were drawn, ready for every later pass.

Prompts and pictures are prepared once per rollout; where tower and projector stay as they are, pictures are encoded once too. The
answers to one prompt are branches of one document, so a pass runs prompt and pictures once for all of them.

Legend of shapes: `B` answers of this process, `T` tokens of the longest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefalign import families
from prefalign.engines import Sampling
from prefalign.manifest import write_atomically
from prefalign.online.conversations import Conversation, Course, single
from prefalign.records import assistant_message, message_text
from prefalign.rewards import Response
from prefalign.training.documents import Document, Documents, Reader, decode
from prefalign.training.features import join_features, split_features
from prefalign.training.forward import encode_pictures

if TYPE_CHECKING:
    from prefalign.online.prepared import PreparedEngine
    from prefalign.training.collator import PreferenceCollator

VIEW = "chosen"
"""The one view that a rollout's documents have: an answer to its own pictures."""


@dataclass
class Answer:
    """One drawn answer.

    Attributes:
        response: as rewards see it.
        tokens: (T,) ids as they were drawn, the end of the turn included where it came.
        drawn: (T,) bool, false at tokens that the policy was given (later questions of a conversation).
        turn: (T,) number of the answer that a token belongs to, of those in a conversation.
        failed: why nothing could be drawn; such an answer counts in no loss.
    """

    response: Response
    tokens: torch.Tensor
    drawn: torch.Tensor
    turn: torch.Tensor
    failed: str | None = None


@dataclass
class Rollout:
    """Answers of one iteration with everything that the updates read.

    Attributes:
        iteration: its number.
        answers: in row order, the answers to one prompt behind each other.
        documents: prompts with their pictures, and where each answer stands.
        features: picture features by digest of the pictures (`Document.pictures`); None: pictures are encoded in every pass.
        mask: (B, T) bool, tokens that were drawn.
        logps: (B, T) log-probs of the policy that drew them; likewise `ref_logps`, `entropy` and `values`.
        scores: by term and `total`, (B,); NaN where missing.
        advantages: (B, T).
        returns: (B, T).
    """

    iteration: int
    answers: list[Answer]
    documents: Documents
    features: dict[str, dict[str, Any]] | None = None
    mask: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    logps: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    ref_logps: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    entropy: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    values: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    advantages: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    returns: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def drawn(self) -> torch.Tensor:
        """(B, T) bool: tokens that the policy drew, whether or not they count in a loss."""
        pad = torch.nn.utils.rnn.pad_sequence
        return pad([answer.drawn for answer in self.answers], batch_first=True, padding_value=False)

    def batch(self, numbers: Sequence[int], collator: PreferenceCollator) -> dict[str, Any]:
        """Some answers for a pass, on the CPU: as the collator makes it.

        Args:
            numbers: of the answers.
            collator: with the one view `VIEW`.
        """
        part = self.documents.part(numbers)
        batch = collator.collate(part, [self.answers[number].response.id for number in numbers])
        if self.features is not None and "packed" in batch:
            batch["pictures"] = [document.pictures for document in part.documents if document.pictures]
        return batch

    def with_features(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with the features of its pictures, once it is on its device."""
        pictures = batch.pop("pictures", None)
        if pictures and self.features is not None:
            batch["packed"]["features"] = join_features([self.features[digest] for digest in pictures])
        return batch

    def spread(self, values: torch.Tensor, batch: Mapping[str, Any], width: int) -> torch.Tensor:
        """Values of labels, (N,), at their places in (rows of the batch, `width`); 0 elsewhere."""
        mask = batch["answers"][VIEW]["mask"].to(values.device)
        spread = values.new_zeros(mask.shape).masked_scatter(mask, values[batch["index"][VIEW].to(values.device)])
        return torch.nn.functional.pad(spread, (0, width - spread.shape[1]))

    def write(self, folder: Path, process: int) -> None:
        """Write `lines` to a file of the iteration and the process."""
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in self.lines())
        write_atomically(folder / f"{self.iteration:06d}-{process}.jsonl", text.encode())

    def lines(self) -> Iterator[str]:
        """One line of JSON for each answer."""
        for number, answer in enumerate(self.answers):
            scores = {name: values[number].item() for name, values in self.scores.items()}
            yield json.dumps(
                {
                    "id": answer.response.id,
                    "question": message_text(answer.response.messages),
                    "text": answer.response.text,
                    "finished": answer.response.finished,
                    "tokens": answer.response.tokens,
                    "failed": answer.failed,
                    "scores": {name: None if value != value else value for name, value in scores.items()},
                },
                ensure_ascii=False,
            )


def draw(
    rows: Sequence[Mapping[str, Any]],
    *,
    engine: PreparedEngine,
    reader: Reader,
    collator: PreferenceCollator,
    encodes: bool,
    sampling: Sampling,
    iteration: int,
    seed: int,
    generations: int = 1,
    plan: Callable[[Mapping[str, Any], str], Conversation] | None = None,
) -> Rollout:
    """Draw answers to some prompts, or conversations that begin with them.

    The noise of an answer follows from the seed, its row, the iteration and its number alone: processes and batches do not
    change it, and no two of them draw the same.

    Args:
        rows: prompts with `id`, `images`, `messages`, and where known `answer` and `facts`.
        engine: on the policy.
        reader: prepares prompts (`views` is `[VIEW]`).
        collator: likewise makes batches.
        encodes: encode each picture once, for this and all later passes.
        sampling: how to draw; `max_new_tokens` holds for each turn.
        iteration: number of the rollout.
        seed: of the run.
        generations: answers to each prompt.
        plan: from a row and what its order is drawn by (row and iteration), the conversation to be had; None: one answer.
    """
    plan = plan or (lambda row, drawn_by: single(row))
    plans = [plan(row, f"{row['id']}/{iteration}") for row in rows]
    read = read_prompts(reader, [{**row, "messages": one.messages} for row, one in zip(rows, plans, strict=True)])
    features = encode_once(read.documents, engine.model, collator, most=engine.batch_size) if encodes else None
    by_answer = [read.documents[document] for document, _ in read.places[VIEW] for _ in range(generations)]
    courses: list[Course] = []
    for row, one in zip(rows, plans, strict=True):
        pictures = [decode(picture) for picture in row["images"]]
        for number in range(generations):
            courses.append(Course(f"{row['id']}/{iteration}/{number}", one, pictures, len(courses)))
    while waiting := [course for course in courses if course.is_open]:
        requests = [course.request(seed) for course in waiting]
        engine.documents = {
            request.id: by_answer[course.number] for request, course in zip(requests, waiting, strict=True)
        }
        engine.features = features
        for course, completion in zip(waiting, engine.generate(requests, sampling), strict=True):
            course.take(completion, reader.processor)
    end = families.turn_end_id(reader.processor)
    answers, places = [], []
    for number, course in enumerate(courses):
        row = rows[number // generations]
        # where nothing could be drawn a document still needs a branch
        tokens, drawn, turn = (
            torch.tensor(part) for part in (course.tokens or [end], course.drawn or [False], course.turn or [0])
        )
        response = Response(
            course.identity, list(row["images"]), course.messages, course.texts[-1] if course.texts else "", row.get("answer"),
            course.plan.facts, finished=course.finished, tokens=int(drawn.sum()),
        )  # fmt: skip
        answers.append(Answer(response, tokens, drawn, turn, course.failed))
        document = read.places[VIEW][number // generations][0]
        places.append((document, read.documents[document].branch(tokens)))
    return Rollout(iteration, answers, Documents(read.documents, {VIEW: places}), features)


def read_prompts(reader: Reader, rows: Sequence[Mapping[str, Any]]) -> Documents:
    """Documents without answers, and where each row's prompt is."""
    answer = [assistant_message(".")]
    read = reader.read(
        [{"id": row["id"], "images": row["images"], "prompt": row["messages"], "chosen": answer, "rejected": answer}
         for row in rows]
    )  # fmt: skip
    for document in read.documents:
        document.answers.clear()
    return read


def encode_once(
    documents: Sequence[Document], model: Any, collator: PreferenceCollator, *, most: int
) -> dict[str, dict[str, Any]]:
    """Encode each distinct list of pictures and let its pixels go.

    Right only while neither tower nor projector trains, and for models whose documents are shared.

    Args:
        documents: of a rollout; of their `vision` only sizes are kept.
        model: any of the run's models: they share the tower.
        collator: the run's.
        most: documents that are encoded at a time.

    Returns:
        Features by digest of the pictures, on the model's device.
    """
    assert collator.image_token_id is not None
    core = families.core(model)
    distinct: dict[str, Document] = {}
    for document in documents:
        if document.vision:
            distinct.setdefault(document.pictures, document)
    waiting = list(distinct.values())
    features: dict[str, dict[str, Any]] = {}
    for start in range(0, len(waiting), most):
        part = waiting[start : start + most]
        read = Documents(
            [replace(document, answers=[document.prompt[-1:]]) for document in part],
            {VIEW: [(number, 0) for number in range(len(part))]},
        )
        packed = collator.collate(read, [""] * len(part))["packed"]
        packed["vision"] = {
            key: value.to(core.device, core.dtype if value.is_floating_point() else None)
            for key, value in packed["vision"].items()
        }
        counts = [int(document.prompt.eq(collator.image_token_id).sum()) for document in part]
        found = split_features(encode_pictures(model, packed), counts)
        features |= {document.pictures: one for document, one in zip(part, found, strict=True)}
    for document in documents:
        document.vision = {key: value for key, value in document.vision.items() if key.endswith("grid_thw")}
    return features

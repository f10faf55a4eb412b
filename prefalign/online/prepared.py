"""An engine for rollouts: it draws from the prompts that were prepared, and the pictures that were encoded, for later passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prefalign.engines.stopping import Batch, Row
from prefalign.engines.transformers import TransformersEngine
from prefalign.training.documents import Document, stack_vision
from prefalign.training.features import join_features


class PreparedEngine(TransformersEngine):
    """A `TransformersEngine` that takes each request's prompt from a document instead of running the processor.

    Attributes:
        documents: by request id, set before each call.
        features: picture features by digest of the pictures; None: the tower is run.
    """

    documents: Mapping[str, Document]
    features: Mapping[str, dict[str, Any]] | None = None

    def _process(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        documents = [self.documents[row.request.id] for row in rows]
        tensors = {
            "input_ids": _left_padded([document.prompt for document in documents], self.pad),
            "attention_mask": _left_padded([torch.ones_like(document.prompt) for document in documents], 0),
        }
        for key in documents[0].types:
            tensors[key] = _left_padded([document.types[key] for document in documents], 0)
        return tensors | stack_vision([document.vision for document in documents])

    def _encode(self, rows: list[Row], failed: dict[int, Any]) -> Batch:
        batch = super()._encode(rows, failed)
        documents = [self.documents[row.request.id] for row in batch.rows]
        if self.features is not None and any(document.pictures for document in documents):
            for key in {key for document in documents for key in document.vision}:
                batch.tensors.pop(key, None)
            features = join_features([self.features[document.pictures] for document in documents if document.pictures])
            batch.tensors["mm_encoder_outputs"] = {"image": features}  # type: ignore[assignment]
        return batch


def _left_padded(values: Sequence[torch.Tensor], padding: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        list(values), batch_first=True, padding_value=padding, padding_side="left"
    )  # fmt: skip

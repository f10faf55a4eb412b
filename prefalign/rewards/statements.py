"""How much of a caption the reference caption bears out, statement by statement, and how much it contradicts: KnowAda's DNLI.

No picture is looked at: a statement counts as contradicted, too, if it adds what could be seen and the reference leaves out, so
references must be dense. Source, equations and departures are in `prefalign.contradictions`.

Legend of shapes: `N` responses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from prefalign.contradictions import dnli
from prefalign.engines import Sampling
from prefalign.engines.config import EngineConfig
from prefalign.knowledge import Annotator, Captioned, Reply
from prefalign.records import canonical_json
from prefalign.rewards.reward import Response

if TYPE_CHECKING:
    import torch


STAGE = "reward 'statements'"


def _greedy() -> Sampling:
    return Sampling(max_new_tokens=1024, temperature=0.0)


@dataclass
class Statements:
    """Shares of a response's statements that its reference caption entails and contradicts, and of the reference's that it makes.

    Attributes:
        model: the LLM that splits captions into statements and labels them; it is shown no picture.
        annotator: `engine`: that LLM; `rules`: the embedded world's, which knows the truth.
        sampling: how its lists are drawn.
        batch_size: captions in one forward pass.
        seed: seed of its draws.
    """

    model: EngineConfig | None = None
    annotator: Literal["engine", "rules"] = "engine"
    sampling: Sampling = field(default_factory=_greedy)
    batch_size: int = 16
    seed: int = 0

    terms: ClassVar[tuple[str, ...]] = (
        "descriptiveness_precision", "descriptiveness_recall", "contradiction_precision", "contradiction_recall",
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.failures: dict[int, str] = {}
        if self.annotator == "engine" and self.model is None:
            raise ValueError(
                "annotator is `engine`, and no LLM is named to split captions into statements. Set model.model_name_or_path, "
                "or annotator to `rules` for the embedded world."
            )

    def check(self) -> None:
        """Look for the LLM, without loading it."""
        if self.annotator == "engine" and self.model is not None:
            from prefalign.engines.loading import check_engine

            check_engine(self.model, needs=["sample"], stage=STAGE)

    @cached_property
    def labeller(self) -> Annotator:
        """Who labels statements; the LLM is loaded here."""
        if self.annotator == "rules" or self.model is None:
            # by name, since the embedded world is built on rewards
            annotator: Annotator = importlib.import_module("prefalign.scenes.probing").SceneAnnotator()
            return annotator
        from prefalign.caption_annotator import EngineAnnotator
        from prefalign.engines.loading import load_engine

        engine = load_engine(self.model, batch_size=self.batch_size, needs=["sample"], stage=STAGE)
        made = EngineAnnotator(engine, seed=self.seed)
        made.sampling = self.sampling
        return made

    @property
    def version(self) -> str:
        """Who labels statements."""
        return self.labeller.fingerprint

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """DNLI's four numbers (N,), those of contradiction negative, so that more is better in each.

        A response without a text or a reference caption has none (NaN), and so has one whose statements, or whose reference's,
        could not be read. Where nobody replied `failures` says why, by place of the response. A reference is asked about once.

        Raises:
            FactsError: `annotator` is `rules`, and a response's facts are not those of a scene.
        """
        import torch

        self.failures = {}
        asked = [row for row, one in enumerate(responses) if one.text.strip() and (one.answer or "").strip()]
        captioned = {
            row: Captioned(responses[row].id, str(responses[row].answer), responses[row].facts) for row in asked
        }
        keys = {row: _identity(one) for row, one in captioned.items()}
        references = {key: dataclasses.replace(captioned[row], id=key) for row, key in keys.items()}
        items = [(captioned[row], responses[row].text) for row in asked]
        items += [(one, one.caption) for one in references.values()]
        found = self.labeller.statements(items) if items else []
        of_references = dict(zip(references, found[len(asked) :], strict=True))
        values = {term: [math.nan] * len(responses) for term in self.terms}
        for row, labels in zip(asked, found[: len(asked)], strict=True):
            reference = of_references[keys[row]]
            for one in (reference, labels):
                if isinstance(one, Reply) and one.refused == "generation_failed":
                    self.failures[row] = one.message
            if isinstance(labels, Reply) or isinstance(reference, Reply) or not labels or not reference:
                continue
            for term, value in dnli(labels, len(reference)).items():
                values[term][row] = -value if term.startswith("contradiction") else value
        return {term: torch.tensor(one) for term, one in values.items()}


def _identity(reference: Captioned) -> str:
    """The id of a reference, the same for each row that has it: what is drawn for a row does not depend on the rows beside it."""
    return hashlib.sha256(canonical_json([reference.caption, reference.facts]).encode()).hexdigest()[:24]

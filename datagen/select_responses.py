"""Select responses: from scored answers to a training set: pairs, best of n, SteerLM rows, or all comparisons.

- `pairs`: the best answer against one that is worse by a gap (DPO).
- `best`: the best answer of each prompt (rejection sampling, for SFT).
- `steerlm`: every answer, its attributes written into the prompt (SFT); at inference ask for the values that are wanted.
- `ranked`: every two answers that differ by the gap (for reward models).

Source: Li, Lin and Pei, "Multi-modal Preference Alignment Remedies Regression of Visual Instruction Tuning on Language Model",
arXiv 2402.10884, its released data notebook. Not in the release: empty, unfinished and repeated answers are in no pair, nor are
two that nearly agree (after the online rounds of arXiv 2407.02477).

Needs: candidates with scores (`reward_models/score_responses.py`); no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prefalign import selecting, sources, stages, store
from prefalign.manifest import Manifest
from prefalign.records import Candidates
from prefalign.selecting import BestConfig, PairsConfig, Produce, Rules, SteerConfig
from prefalign.sources import DataConfig
from prefalign.store import Outcome, OutputConfig

METHOD = "select_responses"
FIGURES = "selection.json"


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: candidates with scores.
        output: folder of pairs or of examples.
        produce: what is made of them.
        quality: weight of each score in an answer's quality.
        pairs: which answers make a pair (`pairs`, `ranked`).
        best: which answers are imitated (`best`).
        steerlm: how attributes are written (`steerlm`).
        unfinished: use answers that ran into the length limit.
        seed: with a row's id it draws rejected answers and the rows without attributes.
    """

    data: DataConfig
    output: OutputConfig
    produce: Produce = "pairs"
    quality: dict[str, float] = field(default_factory=lambda: {"total": 1.0})
    pairs: PairsConfig = field(default_factory=PairsConfig)
    best: BestConfig = field(default_factory=BestConfig)
    steerlm: SteerConfig = field(default_factory=SteerConfig)
    unfinished: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        rules_of(self)


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    sources.files_of(config.data)
    rules = rules_of(config)
    manifest = store.run_stage(
        METHOD,
        config.data,
        lambda block: [selecting.outcome(row, rules) for row in block],
        output=config.output,
        record=rules.record,
        settings=rules.settings(),
        seed=config.seed,
        reads=Candidates,
    )
    folder = config.output.path
    found = stages.write_figures(folder, FIGURES, lambda: selecting.figures(folder, manifest))
    stages.say_figures(METHOD, found)
    return manifest


def rules_of(config: Config) -> Rules:
    """The rules that the settings describe."""
    return Rules(METHOD, config.produce, config.quality, config.pairs, config.best, config.steerlm, config.unfinished,
                 config.seed)  # fmt: skip


def outcome(row: Candidates, config: Config) -> Outcome:
    """What one prompt's answers give, or why they give nothing."""
    return selecting.outcome(row, rules_of(config))


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

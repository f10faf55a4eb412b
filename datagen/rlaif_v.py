"""RLAIF-V: several answers of one model, each scored by how many of its claims a labeller refutes; the better against the worse.

1. Sample n answers to each prompt from the policy (or take stored ones): same model and decoding on both sides, so that style
   cannot tell them apart.
2. Divide each into claims, and turn every claim into a yes/no question (a model, or rules).
3. Conquer: the labeller sees picture and question; yes against no by its first token's probabilities.
4. Score: -(number of rejected claims). Pairs that differ by a least gap; a few of each prompt are drawn.
5. Balance lengths over the whole set: the score punishes long answers, so rejected ones are longer.

Source: Yu et al., "RLAIF-V: Open-Source AI Feedback Leads to Super GPT-4V Trustworthiness", arXiv 2405.17220, and its released
pipeline. Equations, and where they differ from the release, are in `prefalign.claims` and `prefalign.length_balance`. Differs
besides: pairs are drawn by the row's seed, equal answers are judged once and make no pair.

How: steps 1 to 3 are one pass over all prompts, kept block by block in `survey/` of the output; then the balance is decided
from counts, once for all processes, and pairs are written block by block. A killed run goes on where it was. With `judged`, the
pass is read from the output of an earlier run and no model is loaded: the same verdicts, paired by another rule.

Needs: prompts with pictures and `model`, or candidates of one model (`datagen/sample_responses.py`); a labeller that gives
probabilities (`first_token`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefalign import claim_survey, pairing, responses, sources, stages, store
from prefalign.claim_survey import ClaimSurvey, words_of
from prefalign.claims import ClaimJudge, ConquerConfig, Judgement, as_meta
from prefalign.dividing import FAILED, Answer, DivideConfig
from prefalign.engines import Engine, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.length_balance import Balance, Cut
from prefalign.manifest import Manifest, write_atomically
from prefalign.records import Candidates, Pair, Prompt, canonical_json, row_seed
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig
from prefalign.surveys import Survey

METHOD = "rlaif_v"
FIGURES = "claims.json"
RULE = ("pairs.min_gap", "pairs.per_prompt", "pairs.length_balance", "pairs.least_kept")
"""Settings that may differ from those of `judged`: answers and verdicts are the same with all of them."""
Row = dict[str, Any]


@dataclass
class AnswerSampling(Sampling):
    """How answers are drawn: `Sampling` with the published temperature and length."""

    max_new_tokens: int = 512
    temperature: float = 0.7


@dataclass
class PairsConfig:
    """Which answers make a pair.

    Attributes:
        min_gap: least difference of scores, above 0: 1 is one rejected claim (with `per_claim`, a share of the claims).
        per_prompt: pairs drawn from all of a prompt that differ so; fewer where there are fewer.
        unfinished: use answers that ran into the length limit, as published.
        length_balance: `published` drops pairs whose chosen answer is the shorter one, `both` those of the side that is shorter
            on average, `off` none.
        least_kept: least share of the pairs that the balance keeps. A better balance that keeps fewer is warned of, and not
            made; 0, as published: none is too few.
    """

    min_gap: float = 1.0
    per_prompt: int = 2
    unfinished: bool = True
    length_balance: Balance = "both"
    least_kept: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.least_kept <= 1:
            raise ValueError(
                f"pairs.least_kept is {self.least_kept:g}; it is a share: 0.1 keeps a tenth of all pairs at least."
            )
        pairing.make_dpo_pairs([], random.Random(0), min_gap=self.min_gap, per_prompt=self.per_prompt)


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: prompts; without `model` candidates.
        output: folder of pairs.
        judged: output of an earlier run, whose answers and verdicts are taken, so that no model is loaded. Of its settings only
            pairs.min_gap, per_prompt, length_balance and least_kept may differ. null: answers are drawn and judged.
        model: the policy, whose answers are drawn; null: the data hold answers.
        labeller: says yes or no; null: the policy itself.
        splitter: lists claims and questions from text alone; null: the labeller.
        num_generations: answers to each prompt (not read for candidates).
        sampling: how they are drawn (likewise).
        divide: how answers become claims and questions.
        conquer: how the labeller is asked.
        per_claim: score by the share of rejected claims instead of their number.
        pairs: which answers make a pair.
        batch_size: sequences per forward pass.
        seed: with a row's id it decides answers, lists and which pairs are drawn.
    """

    data: DataConfig
    output: OutputConfig
    judged: Path | None = None
    model: EngineConfig | None = None
    labeller: EngineConfig | None = None
    splitter: EngineConfig | None = None
    num_generations: int = 10
    sampling: AnswerSampling = field(default_factory=AnswerSampling)
    divide: DivideConfig = field(default_factory=DivideConfig)
    conquer: ConquerConfig = field(default_factory=ConquerConfig)
    per_claim: bool = False
    pairs: PairsConfig = field(default_factory=PairsConfig)
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.judged is not None and self.judged.resolve() == self.output.path.resolve():
            raise ValueError(
                f"judged and output.path are both {self.judged}, and a folder holds the pairs of one rule. Give the new pairs a "
                "folder of their own."
            )
        if self.model is None and self.labeller is None:
            raise ValueError(
                "neither `model` nor `labeller` is given, so nothing could say which claims are true. Name a labeller for stored "
                "answers, or a model to draw answers from, which then labels its own."
            )
        if self.model is not None:
            responses.check_count(self.num_generations, self.sampling)
            if self.num_generations < 2:
                raise ValueError(
                    "num_generations is 1, and a pair needs two answers. Give 2 or more (10 is published)."
                )


@dataclass
class Models:
    """The engines of a run: `generator` draws answers (None: they are stored), `judge` divides and labels."""

    generator: Engine | None
    judge: ClaimJudge

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints by role, for the manifest."""
        splitter = self.judge.splitter
        known = {"generator": self.generator, "labeller": self.judge.labeller, "splitter": splitter}
        return {role: engine.fingerprint for role, engine in known.items() if engine is not None}


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    sources.files_of(config.data)
    models: Models | None = None
    if config.judged is None:
        models = load(config)
        names, version = models.fingerprints(), models.judge.version
    else:
        before = claim_survey.config_of(config.judged, METHOD)
        names, version = before["models"], before["settings"]["judge"]
    settings = row_settings(config, version)
    decided = functools.cache(lambda: decide(config, models))
    manifest = store.run_stage(
        METHOD,
        config.data,
        lambda block: [outcome(row, found, decided().cut, settings, config) for row, found in decided().of(block)],
        output=config.output,
        record=Pair,
        settings=settings,
        seed=config.seed,
        models=names,
        reads=Prompt if config.model is not None else Candidates,
    )
    if (figures := config.output.path / FIGURES).is_file():
        found = json.loads(figures.read_text())
        stages.say_figures(METHOD, found)
    return manifest


def load(config: Config) -> Models:
    """The engines that a config asks for; roles with equal settings share one.

    Raises:
        ValueError: if one of them cannot do its part.
    """
    from prefalign.engines.loading import check_engine, load_engine

    labeller = config.labeller or config.model
    roles: list[tuple[EngineConfig | None, list[str]]] = [(config.model, ["sample"]), (labeller, ["first_token"])]
    if config.divide.by == "model":
        roles.append((config.splitter or labeller, ["sample"]))
    models: list[tuple[EngineConfig, list[str]]] = []
    for wanted, _ in roles:
        if wanted is not None and not any(wanted == known for known, _ in models):
            needs = {need for other, all_needs in roles if other == wanted for need in all_needs}
            models.append((wanted, sorted(needs)))
    for wanted, required in models:
        check_engine(wanted, needs=required, stage=METHOD)
    loaded = [
        (wanted, load_engine(wanted, batch_size=config.batch_size, needs=required, stage=METHOD))
        for wanted, required in models
    ]
    found = [next((engine for known, engine in loaded if known == wanted), None) for wanted, _ in roles]
    splitter = found[2] if len(found) > 2 else None
    assert found[1] is not None
    return Models(found[0], ClaimJudge(found[1], splitter, config.divide, config.conquer, config.seed))


def row_settings(config: Config, judge: str) -> Row:
    """The settings that change rows, with the version of what judges."""
    known = dataclasses.asdict(config)
    unread = ["sampling", "attempts"] if config.divide.by == "rules" else ["rules"]
    divide = {name: value for name, value in known["divide"].items() if name not in unread}
    drawn = ["num_generations", "sampling"] if config.model is not None else []
    settings = {name: known[name] for name in ("conquer", "per_claim", "pairs", *drawn)}
    return {**settings, "divide": divide, "judge": judge}


def decide(config: Config, models: Models | None) -> ClaimSurvey:
    """Steps 1 to 5: the pass over all inputs, of which blocks that are done are read, and the cut that it leads to.

    Args:
        config: settings.
        models: the engines; None: what they said is in `judged`.

    Raises:
        StoreError: if `judged` is no run over the same rows with the same settings.
    """
    total, repeated = sources.survey(config.data)
    reads: type[Any] = Prompt if config.model is not None else Candidates
    passed = Survey(METHOD, config.data, config.output, reads, total, repeated, RULE)
    before = None if config.judged is None else claim_survey.earlier(passed, config.judged)

    def work(rows: list[Any]) -> list[Row]:
        if before is not None:
            return before.of([row.id for row in rows])
        assert models is not None
        return measure(rows, models, config)

    found = ClaimSurvey(
        passed,
        work,
        again=models_failed,
        draw=lambda row: draw(row, config),
        balance=config.pairs.length_balance,
        least_kept=config.pairs.least_kept,
    )
    write_atomically(config.output.path / FIGURES, json.dumps(found.figures, indent=2).encode())
    return found


def models_failed(found: Row) -> bool:
    """Whether a model did not answer for a row: another time it may."""
    return "failed" in found and found["failed"][0] == FAILED


def measure(rows: Sequence[Prompt | Candidates], models: Models, config: Config) -> list[Row]:
    """Steps 1 to 3 for a block, and the scores: answers and their judgements as JSON-able values for each row."""
    found: list[Row] = [{"id": row.id, "responses": [], "judged": []} for row in rows]
    ready = []
    for row, known in zip(rows, found, strict=True):
        prompt = Prompt(row.id, row.images, row.messages, row.answer, row.facts)
        images = stages.usable(prompt, answer=False)
        if isinstance(images, Dropped):
            known["dropped"] = images.reason
        elif isinstance(images, Failed):
            known["failed"] = [images.reason, images.message]
        else:
            ready.append((row, images, known))
    _answer(ready, models, config)
    ready = [entry for entry in ready if "failed" not in entry[2]]
    asked, places = [], []
    for row, images, known in ready:
        if len({(one["generator"], canonical_json(one["settings"])) for one in known["responses"]}) > 1:
            known["dropped"] = "several_generators"
            continue
        problems = pairing.unusable(known["responses"], unfinished=config.pairs.unfinished)
        known["judged"] = [as_meta(Judgement(reason=problem)) for problem in problems]
        for number, problem in enumerate(problems):
            if problem is None:
                asked.append(Answer(f"{row.id}/{number}", row.messages, known["responses"][number]["text"], images))
                places.append((known, number))
    for (known, number), judged in zip(places, models.judge.judge(asked), strict=True):
        known["judged"][number] = {**as_meta(judged), "score": judged.score(per_claim=config.per_claim)}
        if judged.error is not None:
            known["failed"] = [FAILED, judged.error]
    for _, _, known in ready:
        if "failed" in known:
            known |= {"responses": [], "judged": []}  # the others' verdicts alone would make other pairs
    return found


def _answer(ready: Sequence[tuple[Any, Any, Row]], models: Models, config: Config) -> None:
    """Put down the answers to prompts, drawn as `sample_responses` draws them, or the stored ones."""
    rows: list[Candidates | Failed] = [row for row, _, _ in ready]
    if models.generator is not None:
        rows = responses.draw([(row, images) for row, images, _ in ready], models.generator, config.sampling,
                              num_generations=config.num_generations, method=METHOD, seed=config.seed)  # fmt: skip
    for row, (_, _, known) in zip(rows, ready, strict=True):
        if isinstance(row, Failed):
            known["failed"] = [row.reason, row.message]
        else:
            known["responses"] = [_stored(response) for response in row.responses]


def _stored(response: Mapping[str, Any]) -> Row:
    """What is needed of a stored answer."""
    known = {name: response.get(name) for name in ("text", "finish_reason", "tokens", "settings")}
    return {**known, "generator": response.get("generator") or ""}


def draw(found: Row, config: Config) -> list[tuple[int, int]]:
    """The pairs of a row before the balance: numbers of the chosen and of the rejected answer, drawn by seed and id."""
    scores = [judged.get("score") for judged in found.get("judged", ())]
    pairs = pairing.ranked_pairs(scores, min_gap=config.pairs.min_gap)
    rng = random.Random(row_seed(config.seed, f"{found['id']}/pairs"))
    return [(choice.chosen, choice.rejected) for choice in rng.sample(pairs, min(len(pairs), config.pairs.per_prompt))]


def outcome(row: Prompt | Candidates, found: Row, cut: Cut, settings: Row, config: Config) -> Outcome:
    """The pairs of a row that the length balance leaves, or why there are none."""
    if "failed" in found:
        return Failed(*found["failed"])
    if "dropped" in found:
        return Dropped(found["dropped"])
    drawn = draw(found, config)
    if not drawn:
        return Dropped(
            "few_judged" if sum(judged.get("score") is not None for judged in found["judged"]) < 2 else "small_gap"
        )
    made = [
        pair_of(row, found, chosen, rejected, index, settings, config)
        for index, (chosen, rejected) in enumerate(drawn)
        if cut.keeps(*words_of(found, chosen, rejected))
    ]
    return made or Dropped("length_balance")


def pair_of(
    row: Prompt | Candidates, found: Row, chosen: int, rejected: int, index: int, settings: Row, config: Config
) -> Pair:
    """A pair with every verdict that led to it."""
    sides = {"chosen": chosen, "rejected": rejected}
    judged = {side: found["judged"][number] for side, number in sides.items()}
    words = dict(zip(sides, words_of(found, chosen, rejected), strict=True))
    told = {side: found["responses"][number] for side, number in sides.items()}
    return stages.make_pair(
        Prompt(row.id, row.images, row.messages, row.answer, row.facts),
        method=METHOD,
        chosen=told["chosen"]["text"],
        rejected=told["rejected"]["text"],
        settings=settings,
        seed=config.seed,
        model=told["chosen"]["generator"],
        margin=judged["chosen"]["score"] - judged["rejected"]["score"],
        index=index,
        meta={
            "answers": len(found["responses"]),
            "scores": [entry.get("score") for entry in found["judged"]],
            **{f"{side}_index": number for side, number in sides.items()},
            "claims": judged,
            "words": words,
            "sampling": told["chosen"]["settings"],
        },
    )


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

"""Quality pairs: answers of a model, graded by attribute, and what the grades make: pairs, best answers, SteerLM rows.

Four answers to every prompt, each graded alone from 0 to 4 for helpfulness, correctness, coherence, complexity and verbosity by a
VLM that sees the picture. The quality of an answer adds up the first three. Chosen is the best answer (the first on ties),
rejected one drawn among those that are worse by 2 at least; prompts with other than four graded answers give no pair.

The graded answers are in `answers/` of the output folder; `pairs/`, `best/` (rejection sampling) and `steerlm/` beside it are
made of the stored grades. Nothing is graded twice, but for a share of the answers that shows how far the judge agrees with itself
(`quality.json`). For other rules over the same grades give `answers/` to `select_responses`.

Paper: Li, Lin and Pei, "Multi-modal Preference Alignment Remedies Regression of Visual Instruction Tuning on Language Model",
arXiv 2402.10884. Code: findalexli/mllm-dpo (sampling script, data notebook).
Differs from the released code: empty, unfinished, repeated and nearly equal answers are in no pair; a tenth of the SteerLM rows
goes without attributes; the judge is asked for its attributes in an order drawn for each answer.

Needs: rows with questions; a generator that samples; a judge (or any rewards: the true ones on the embedded world).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from prefalign import blocks, pairing, responses, selecting, sources, stages, store
from prefalign.engines import Engine
from prefalign.engines.config import EngineConfig
from prefalign.execution import SAMPLED, SHARD, WORKER
from prefalign.judge import RUBRIC, shortened
from prefalign.manifest import Manifest, read_manifest, write_atomically
from prefalign.records import Candidates, Prompt
from prefalign.responses import ResponseSampling
from prefalign.selecting import BestConfig, PairsConfig, Rules, SteerConfig
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig, StoreError

if TYPE_CHECKING:
    from PIL import Image

    from prefalign.rewards import Combined

METHOD = "quality_pairs"
ANSWERS = "answers"
FIGURES = "quality.json"
REPLIES = "judge.sqlite"
Export = Literal["pairs", "best", "steerlm"]


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        model: the generator, normally the model that will be trained.
        data: rows with questions.
        output: folder with a folder for the graded answers (`answers`) and one for each export.
        rewards: what grades, as `prefalign.rewards.read_rewards` takes it. A judge without a `cache` keeps its replies, as they
            were given, in `judge.sqlite` of the folder; over shards or Ray it keeps none, since nodes cannot share such a file.
        num_generations: answers to each prompt.
        sampling: how they are drawn.
        exports: what is made of the grades.
        quality: weight of each score in an answer's quality.
        pairs: which answers make a pair.
        best: which answers are imitated.
        steerlm: how attributes are written into prompts.
        unfinished: use answers that ran into the length limit.
        regrade: share of the answers that are graded once more, drawn by row and seed.
        batch_size: sequences of the generator per forward pass.
        seed: with a row's id it decides draws, rejected answers, what is graded again, and which rows go without attributes.
    """

    model: EngineConfig
    data: DataConfig
    output: OutputConfig
    rewards: list[dict[str, Any]]
    num_generations: int = 4
    sampling: ResponseSampling = field(default_factory=ResponseSampling)
    exports: list[Export] = field(default_factory=lambda: ["pairs", "best", "steerlm"])
    quality: dict[str, float] = field(
        default_factory=lambda: {f"judge/{name}": weight for name, weight in pairing.HELPSTEER.items()}
    )
    pairs: PairsConfig = field(default_factory=PairsConfig)
    best: BestConfig = field(default_factory=BestConfig)
    steerlm: SteerConfig = field(default_factory=lambda: SteerConfig([f"judge/{name}" for name in RUBRIC]))
    unfinished: bool = False
    regrade: float = 0.05
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        responses.check_count(self.num_generations, self.sampling)
        if not 0 <= self.regrade <= 1:
            raise ValueError(
                f"regrade is {self.regrade}; it is a share of the answers, so give a value from 0 to 1 (0.05)."
            )
        if self.pairs.group_size is not None and self.pairs.group_size > self.num_generations:
            raise ValueError(
                f"pairs.group_size is {self.pairs.group_size} and num_generations {self.num_generations}: no prompt would have "
                "so many graded answers, and none give a pair. Draw more answers, or set pairs.group_size to null."
            )
        for name in self.exports:
            rules_of(self, name)


def main(config: Config) -> Manifest:
    """Run the stage. Returns the manifest of the graded answers; those of the exports are in their folders.

    Raises:
        NoRows: nothing qualifies for any of the exports. The graded answers stay, as after any other run.
        StoreError: as `store.run_stage` does.
    """
    from prefalign.engines.loading import check_engine, load_engine
    from prefalign.rewards import named_scores, read_rewards, second_grades

    sources.files_of(config.data)
    folder, answers = config.output.path, rows_folder(config)
    check_folder(folder)
    alone = SHARD.get().alone and WORKER.get() is None
    rewards = read_rewards([_kept(entry, folder) for entry in config.rewards] if alone else config.rewards)
    named_scores.check_names(rewards, _named(config))
    check_engine(config.model, needs=["sample"], stage=METHOD)
    rewards.check()
    again = second_grades.asked_again(rewards) if config.regrade else None
    engine = load_engine(config.model, batch_size=config.batch_size, needs=["sample"], stage=METHOD)
    manifest = store.run_stage(
        METHOD,
        config.data,
        lambda block: process(block, engine, rewards, again, config),
        output=dataclasses.replace(config.output, path=answers),
        record=Candidates,
        settings=row_settings(config),
        seed=config.seed,
        models={"generator": engine.fingerprint, **rewards.versions()},
    )
    dropped = {name: why for name in config.exports if (why := export(folder, name, config))}
    found = figures(folder, rewards, config)  # anew at each start: an export may have been added
    write_atomically(folder / FIGURES, json.dumps(found, indent=2).encode())
    for name in config.exports:
        stages.say(f"{METHOD}/{name}: {found[name]}")
    stages.say(f"{METHOD}: agreement of the judge with itself: {found['agreement'] or 'not asked for'}")
    lack, way_on = ungraded(config, rewards)
    if config.exports and len(dropped) == len(config.exports) and not SAMPLED.get():
        raise blocks.NoRows(nothing_made(folder, manifest.rows_out, dropped) + lack,
                            way_on or f"Mend that and start again: what is graded in {answers} stays.")  # fmt: skip
    if way_on:
        stages.say(f"{METHOD}:{lack} {way_on}")
    return manifest


def rows_folder(config: Config) -> Path:
    """Where the graded answers are: `main` returns their manifest. Each kind of rows has a folder of its own, because `datasets`
    reads all Parquet files below the one it is given."""
    return config.output.path / ANSWERS


def check_folder(folder: Path) -> None:
    """Raise `StoreError` if the folder holds something that this stage has not put there."""
    known = {ANSWERS, FIGURES, *get_args(Export)}
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    alien = sorted(name for name in names if name not in known and not name.startswith((".", REPLIES)))
    if alien and ANSWERS not in names:
        raise StoreError(
            f"{folder} holds {', '.join(alien[:4])} and no {ANSWERS}/, so it is not a folder of {METHOD}, or one of an earlier "
            "version, which kept graded answers in the folder itself. Give another `output.path`."
        )


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change the graded answers. What is made of them has settings of its own."""
    drawn = responses.row_settings(config.num_generations, config.sampling)
    return {**drawn, "rewards": stages.portable(config.rewards), "regrade": config.regrade}


def _named(config: Config) -> list[tuple[str, str]]:
    """Each score that the exports read, with the setting that names it."""
    told = config.steerlm.attributes if "steerlm" in config.exports else []
    return [("quality", name) for name in config.quality] + [("steerlm.attributes", name) for name in told]


def rules_of(config: Config, name: Export) -> Rules:
    """How rows of one export are made."""
    return Rules(METHOD, name, config.quality, config.pairs, config.best, config.steerlm, config.unfinished,
                 config.seed)  # fmt: skip


def process(
    block: list[Prompt], engine: Engine, rewards: Combined, again: Combined | None, config: Config
) -> list[Outcome]:
    """One outcome for each prompt of a block: its answers, drawn together with all others and graded together.

    Args:
        block: prompts.
        engine: the generator.
        rewards: what grades.
        again: what grades a share of the answers once more; None: nothing does.
        config: settings.
    """
    from prefalign.rewards import named_scores, second_grades, stored

    def work(rows: list[tuple[Prompt, list[Image.Image]]]) -> list[Outcome]:
        drawn = responses.draw(rows, engine, config.sampling, num_generations=config.num_generations, method=METHOD,
                               seed=config.seed)  # fmt: skip
        ready = [(row, images) for row, (_, images) in zip(drawn, rows, strict=True) if not isinstance(row, Failed)]
        graded = stored.score_rows(ready, rewards) if ready else []
        named_scores.check_scores(graded, _named(config))
        if again is not None:
            pictures = [images for _, images in ready]
            graded = second_grades.grade_again(
                list(zip(graded, pictures, strict=True)), again, share=config.regrade, seed=config.seed
            )
        given = iter(graded)
        outcomes = [row if isinstance(row, Failed) else next(given) for row in drawn]
        return [row if isinstance(row, Failed) else [row] for row in outcomes]

    return stages.in_order(block, lambda prompt: stages.opened(prompt.images), work)


def export(folder: Path, name: Export, config: Config) -> Counter[str]:
    """Rows made of the stored grades, in a folder of their own; an export that nothing qualifies for is left out.

    Returns:
        Why nothing qualifies: prompts by reason. Empty if something does.
    """
    from prefalign.rewards import stored

    rules, answers = rules_of(config, name), folder / ANSWERS
    dropped: Counter[str] = Counter()
    for row in stored.without_pictures(answers):
        if not isinstance(found := selecting.outcome(row, rules), Dropped):
            break
        dropped[found.reason] += 1
    else:
        stages.say(f"{METHOD}: no answer qualifies for {name} ({_told(dropped)}), so there is no {folder.name}/{name}.")
        return dropped
    store.run_stage(
        METHOD,
        DataConfig(answers),
        lambda block: [selecting.outcome(row, rules) for row in block],
        output=dataclasses.replace(config.output, path=folder / name),
        record=rules.record,
        settings=rules.settings(),
        seed=config.seed,
        reads=Candidates,
    )
    return Counter()


def nothing_made(folder: Path, prompts: int, dropped: dict[Export, Counter[str]]) -> str:
    """Why there is no folder of rows beside the graded answers.

    Args:
        folder: the stage's output.
        prompts: how many have answers.
        dropped: prompts by reason, of each export.
    """
    reasons = "; ".join(f"{name}: {_told(why)}" for name, why in dropped.items())
    count = "1 prompt" if prompts == 1 else f"{prompts} prompts"
    common = sum(dropped.values(), Counter[str]())
    return f"{METHOD} made nothing of the answers to {count}: {reasons}.{blocks.likely_cause(folder, common)}"


def ungraded(config: Config, rewards: Combined) -> tuple[str, str]:
    """How many answers lack a score that the exports read, with the likely cause; and how to have them graded after all.

    Both are empty if none does, the second one as well if no judge is asked. A block is worked on again if its ledger and the
    manifest are gone, and the folders made of the grades that were stored have to go as well.
    """
    from prefalign.rewards.judged import JudgedAttributes

    answers = rows_folder(config)
    judges = {entry.name: entry.reward.judge for entry in rewards.entries if isinstance(entry.reward, JudgedAttributes)}
    names = [name for _, name in _named(config)]
    judged = [name for name in names if name == "total" or name.partition("/")[0] in judges]
    lacking: Counter[int] = Counter()
    total = others = 0
    for shard in sorted(answers.glob("data/*.parquet")):
        rows = (json.loads(row["responses"]) for row in sources.parquet_rows(shard, ["responses"]))
        given = [response["scores"] for row in rows for response in row]
        total += len(given)
        lacking[int(shard.stem.rpartition("-")[2])] = sum(
            any(one.get(name) is None for name in judged) for one in given
        )
        others += sum(any(one.get(name) is None for name in names) for one in given)
    lacking = +lacking
    if not judges or not lacking:
        return (f" {others} of {total} answers lack a score: the rewards gave none." if others else ""), ""
    lack = f" {lacking.total()} of {total} answers lack a grade"
    why = "the judge gave no reply that can be read, or had neither pictures nor facts to go by"
    for judge in judges.values():
        if judge.unread is not None:
            tries = f"in {judge.retries + 1} attempts"
            why = f"{tries} the judge gave no reply that can be read (the last: {shortened(judge.unread)})"
    ledgers = [f"{answers}/progress"]
    if len(lacking) <= 4:
        ledgers = [str(blocks.ledger_file(answers, number)) for number in lacking]
    made = [str(answers.with_name(name)) for name in get_args(Export) if answers.with_name(name).is_dir()]
    way_on = (
        f"To have them graded, mend the judge, delete {', '.join([f'{answers}/manifest.json', *ledgers, *made])} and start "
        "again: they are drawn again, and of the judge's replies those that can be read are taken from its cache, if it has "
        f"one. Another judge grades the answers as they are with `prefalign run score_responses --data.path {answers}`."
    )
    return f"{lack}: {why}.", way_on


def _told(dropped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())


def figures(folder: Path, rewards: Combined, config: Config) -> dict[str, Any]:
    """What a run gave: scores, rows and drops of each export, margins by policy, and the judge's agreement with itself."""
    from prefalign.rewards import second_grades, stored

    found = stored.figures(folder / ANSWERS, rewards)
    for name in config.exports:
        manifest = read_manifest(folder / name)
        found[name] = (
            {"rows": 0, "drop_rate": 1.0}
            if manifest is None
            else {**selecting.figures(folder / name, manifest), "dropped": manifest.dropped}
        )
    policies: tuple[pairing.Rejected, ...] = ("random", "worst", "nearest")
    found["policies"] = {name: policy_figures(folder / ANSWERS, name, config) for name in policies}
    found["agreement"] = second_grades.agreement(folder / ANSWERS)
    return found


def policy_figures(folder: Path, rejected: pairing.Rejected, config: Config) -> dict[str, Any]:
    """Pairs, mean margin and mean length gap (words) if the rejected answer were drawn so."""
    from prefalign.rewards import stored

    policy = dataclasses.replace(config.pairs, rejected=rejected)
    rules = rules_of(dataclasses.replace(config, pairs=policy), "pairs")
    outcomes = (selecting.outcome(row, rules) for row in stored.without_pictures(folder))
    pairs = [pair for outcome in outcomes if isinstance(outcome, list) for pair in outcome]
    count = len(pairs)
    return {
        "pairs": count,
        "margin": round(sum(pair.margin or 0.0 for pair in pairs) / count, 4) if count else None,
        "length_gap": round(sum(pair.meta["length_gap"] for pair in pairs) / count, 4) if count else None,
    }


def _kept(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The entry of a judge with a file for its replies."""
    return {"cache": str(folder / REPLIES), **entry} if entry.get("name") == "judge" else entry


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

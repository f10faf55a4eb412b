"""Clinical rules: from labels and a table of what can stand together to conversations, pairs and prompts that the rules judge.

Each picture has a label, and each label is a row of a table: which answers to linked questions are true together (Dr-LLaVA's
five questions about bone marrow patches, or your own). Questions come in an order drawn for each row, the picture with whichever
is first, in the words of a bank for training or of another one for tests. Some come with a hint ("the doctor thinks ..."), which
may be wrong: the right answer gives the right category and refuses.

- `sft`: conversations with right answers, a row up to each of them, since `train_sft` imitates the last turn (the authors' PPO
  does not work without).
- `pairs`: a question with a right and a wrong answer: one that agrees with a wrong hint (`hint`), one that fits the answers
  before it and is false of the picture (`consistent`), one that contradicts them (`inconsistent`).
- `prompts`: the questions with their references, for `train_ppo` and `train_online` with the reward `symbolic`, and for tests.

Labels are facts of the rows (`labels.fact`; `data.fact_columns` makes facts of columns), or follow from measured shares.
`presence` needs no label: it asks for things, present and absent, by `facts["objects"]`.

Paper: Sun, Qian, Xu et al., "Dr-LLaVA: Visual Instruction Tuning with Symbolic Clinical Grounding", arXiv 2405.19567. Code:
AlaaLab/Dr-LLaVA (reward_model.py, data scripts). What differs: see `prefalign.rewards.dialogues`.

Needs: rows with pictures, and labels or objects; no model.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefalign import records, sources, stages, store
from prefalign.manifest import Manifest
from prefalign.records import Example, Pair, Prompt, row_seed
from prefalign.rewards import dialogues
from prefalign.rewards.cases import (
    PRESENCE,
    Case,
    LabelConfig,
    ThingConfig,
    check_labels,
    labelled_case,
    presence_case,
    thing_slots,
)
from prefalign.rewards.dialogues import Hints, Kind, Speaker, Turn
from prefalign.rewards.phrases import BANKS, LABELS, HintPhrases, Phrases, Slots, Split, check
from prefalign.rewards.rule_sets import RULE_SETS, RuleSet, read_rule_set
from prefalign.sources import DataConfig
from prefalign.store import Dropped, Failed, Outcome, OutputConfig

if TYPE_CHECKING:
    from prefalign.rewards.symbolic import Symbolic

METHOD = "clinical_rules"
FIGURES = "conversations.json"


@dataclass
class Config:
    """Settings of the stage.

    Attributes:
        data: rows with pictures.
        output: folder of examples, pairs or prompts.
        produce: `sft`, `pairs` or `prompts`.
        rule_set: a key of `prefalign.rewards.rule_sets.RULE_SETS` that has a table, or of `rule_sets`.
        rule_sets: further rule sets, as the reward `symbolic` takes them.
        labels: where labels come from (rule sets other than those about presence).
        things: which things are asked for (rule sets about presence).
        split: which bank the questions are worded from.
        hints: how often a question comes with a hint (`sft`, `prompts`).
        kinds: which wrong answers (`pairs`), one pair each.
        phrases: words by variable, in place of those of the rule set's bank.
        hint_phrases: words for hints.
        seed: with a row's id it draws order, words, hints and wrong answers.
    """

    data: DataConfig
    output: OutputConfig
    produce: Literal["sft", "pairs", "prompts"] = "sft"
    rule_set: str = "bone_marrow"
    rule_sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: LabelConfig = field(default_factory=LabelConfig)
    things: ThingConfig = field(default_factory=ThingConfig)
    split: Split = "train"
    hints: Hints = field(default_factory=Hints)
    kinds: list[Kind] = field(default_factory=lambda: ["hint", "consistent", "inconsistent"])
    phrases: dict[str, Phrases] = field(default_factory=dict)
    hint_phrases: HintPhrases = field(default_factory=HintPhrases)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.produce == "pairs" and not self.kinds:
            raise ValueError(
                "kinds is empty, so there would be no wrong answer and no pair. Name hint, consistent, inconsistent."
            )
        known = rules_named(self)
        if not about_presence(known):
            check_labels(known, table(self), self.labels)
        elif not set(self.things.plurals) <= set(self.things.names):
            strange = sorted(set(self.things.plurals) - set(self.things.names))
            raise ValueError(
                f"things.plurals has {strange[0]!r}, which is none of things.names. Add it there, or take it out."
            )
        check(
            known, words_of(self, known), self.hint_phrases, lambda variable, category: fillings(self, known, category)
        )


def main(config: Config) -> Manifest:
    """Run the stage. Returns its manifest."""
    from prefalign.rewards.symbolic import Symbolic

    sources.files_of(config.data)
    known = rules_named(config)
    speaker = Speaker(known, words_of(config, known), config.hint_phrases, config.split)
    reward = Symbolic(rule_sets=config.rule_sets)
    kind: type[Pair] | type[Example] | type[Prompt] = {"pairs": Pair, "sft": Example, "prompts": Prompt}[config.produce]
    manifest = store.run_stage(
        METHOD,
        config.data,
        lambda block: [outcome(prompt, speaker, reward, config) for prompt in block],
        output=config.output,
        record=kind,
        settings=row_settings(config),
        seed=config.seed,
    )
    found = stages.write_figures(config.output.path, FIGURES, lambda: figures(config.output.path))
    stages.say_figures(METHOD, found)
    return manifest


def row_settings(config: Config) -> dict[str, Any]:
    """The settings that change rows of what is produced."""
    known = dataclasses.asdict(config)
    section = "kinds" if config.produce == "pairs" else "hints"
    shared = ("produce", "rule_set", "rule_sets", "labels", "things", "split", "phrases", "hint_phrases")
    return {name: known[name] for name in (*shared, section)}


def rules_named(config: Config) -> RuleSet:
    """The rule set of a config.

    Raises:
        ValueError: for an unknown one, or one without a table.
    """
    from prefalign.config import nearest

    sets = {**RULE_SETS, **{name: read_rule_set(name, entry) for name, entry in config.rule_sets.items()}}
    if config.rule_set not in sets:
        raise ValueError(f"rule_set is {config.rule_set!r}; {nearest(config.rule_set, list(sets))}")
    known = sets[config.rule_set]
    if known.rows is None or any(set(row) != set(known.variables) for row in known.rows):
        raise ValueError(
            f"rule_set {config.rule_set!r} has no table whose rows answer all of its questions, so a label or a list of objects "
            "does not say what is right. Take bone_marrow, presence, or a table of your own in rule_sets."
        )
    return known


def about_presence(known: RuleSet) -> bool:
    """Whether a rule set asks for things that are there or not, rather than by a label."""
    return set(known.variables) <= PRESENCE


def words_of(config: Config, known: RuleSet) -> dict[str, Phrases]:
    """The words by variable: the config's, else those of the bank."""
    bank = BANKS["presence"] if about_presence(known) else BANKS.get(config.rule_set, {})
    return {**bank, **config.phrases}


def table(config: Config) -> dict[str, Any]:
    """Category by variable, by label."""
    return dict(config.labels.rows or LABELS.get(config.rule_set, {}))


def fillings(config: Config, known: RuleSet, category: str) -> list[Slots]:
    """What phrasings are tried with before any row is read."""
    if not about_presence(known):
        return [{}]
    names = config.things.names or ["thing"]
    numbers = (0,) if category == "none" else (1, 2)
    return [thing_slots(name, number, config.things.plurals) for name in names for number in numbers]


def case_of(prompt: Prompt, known: RuleSet, config: Config) -> Case | Dropped | Failed:
    """What is true of a row's picture, or why that is not known."""
    if about_presence(known):
        return presence_case(prompt, known, config.things, seed=config.seed)
    return labelled_case(prompt, table(config), config.labels)


def outcome(prompt: Prompt, speaker: Speaker, reward: Symbolic, config: Config) -> Outcome:
    """What one row gives, or why it gives nothing."""
    images = stages.usable(prompt, answer=False)
    if not isinstance(images, list):
        return images
    case = case_of(prompt, speaker.known, config)
    if not isinstance(case, Case):
        return case
    try:
        if config.produce == "pairs":
            return _pairs(prompt, case, speaker, reward, config)
        rng = random.Random(row_seed(config.seed, f"{prompt.id}/dialogue"))
        turns = speaker.dialogue(case, rng, config.hints)
    except ValueError as error:  # the name of a thing that the rules misread
        return Failed("bad_reference", str(error))
    if config.produce == "sft":
        return [_example(prompt, case, turns[: place + 1], config) for place in range(len(turns))]
    name = records.record_id(method=METHOD, parent=prompt.id, settings=row_settings(config), model="", seed=config.seed)
    asked = dialogues.messages_of(turns[:1], len(prompt.images), answered=False)
    facts = {**prompt.facts, "rules": dialogues.rules_of(config.rule_set, case, turns), "case": case.label}
    return [Prompt(name, prompt.images, asked, turns[0].answer, facts)]


def _example(prompt: Prompt, case: Case, turns: list[Turn], config: Config) -> Example:
    """The conversation up to one of its answers, which is the one that is imitated."""
    return stages.make_example(
        prompt, method=METHOD, messages=dialogues.messages_of(turns, len(prompt.images)), settings=row_settings(config),
        seed=config.seed, meta={"case": case.label, "rules": dialogues.rules_of(config.rule_set, case, turns)}, index=len(turns),
    )  # fmt: skip


def _pairs(prompt: Prompt, case: Case, speaker: Speaker, reward: Symbolic, config: Config) -> Outcome:
    made = []
    for index, kind in enumerate(config.kinds):
        rng = random.Random(row_seed(config.seed, f"{prompt.id}/{kind}"))
        found = speaker.wrong_turn(case, kind, rng)
        if found is None:
            continue
        last = found.turns[-1]
        rules = dialogues.rules_of(config.rule_set, case, found.turns)
        asked = dialogues.messages_of(found.turns, len(prompt.images), answered=False)
        meta = {"kind": kind, "case": case.label, "variable": last.variable, "said": found.category}
        parent = dataclasses.replace(
            prompt, answer=last.answer, facts={**prompt.facts, "rules": rules, "case": case.label}
        )
        made.append(
            stages.make_pair(parent, method=METHOD, chosen=last.answer, rejected=found.wrong, settings=row_settings(config),
                             seed=config.seed, meta=meta, prompt=asked, index=index,
                             margin=_margin(asked, last, found.wrong, rules, reward))
        )  # fmt: skip
    return made or Dropped("no_wrong_answer")


def _margin(asked: list[records.Message], last: Turn, wrong: str, rules: dict[str, Any], reward: Symbolic) -> float:
    """What the right answer earns more than the wrong one, by the rules."""
    from prefalign.rewards import Response

    sides = [Response("", [], asked, text, facts={"rules": rules}) for text in (last.answer, wrong)]
    return sum(float(values[0] - values[1]) for values in reward.score(sides).values())


def figures(folder: Path) -> dict[str, Any]:
    """Of the rows made: how many, of which cases (a case that is most of them can be guessed), hints, kinds of wrong answers.

    Hints are those of the last question of an example or a pair, whose answer is learnt, and of all questions of a prompt.
    """
    counts: dict[str, Counter[str]] = {
        "cases": Counter(),
        "asked_first": Counter(),
        "hints": Counter(),
        "kinds": Counter(),
    }
    number = 0
    for row in stages.columns_of(folder, "meta", "facts"):
        known = {**row.get("facts", {}), **row.get("meta", {})}
        rules = known["rules"]
        number += 1
        counts["cases"][known["case"]] += 1
        counts["asked_first"][rules["asked"][0]] += 1
        counts["hints"].update(
            _hinted(rules, name) for name in (rules["asked"][-1:] if "meta" in row else rules["asked"])
        )
        counts["kinds"].update(
            kind for kind in [row.get("meta", {}).get("kind")] if kind
        )  # a fact may be called so, too
    return {"rows": number, **{name: dict(sorted(found.items())) for name, found in counts.items() if found}}


def _hinted(rules: dict[str, Any], name: str) -> str:
    hint = rules["hints"].get(name)
    return "none" if hint is None else "correct" if hint == rules["reference"][name] else "wrong"


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)

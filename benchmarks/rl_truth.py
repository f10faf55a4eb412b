"""Do learned rewards and training against them help by the truth? On the embedded world, against the base and offline DPO.

    python benchmarks/rl_truth.py [--json FILE] [--seeds 0,1,2] [--parts rm,ppo,online] [--quick] [--keep FOLDER] [--<size> N]

`rm`: reward models with facts and without, trained on captions that the base drew itself, ranked by the truth; graded on held-out
pairs of fair pictures and of the adversarial half (companions absent). `ppo`: the true hallucination (CHAIRi) and recall of
policies trained against these models, whose `watch` shows the truth that they never learn from: with facts, without, without the
KL term, and with a reward that pays for length, which the run's own alarms have to notice. `online`: DPO on answers of the policy
as it is, of the base, on stored BDHS pairs, and mixed, with equally many updates on equally many prompts.

Every step is a stage with its scenes config; what is in the folder of `--keep` is taken as it is. Each seed has pictures of its
own, to train on and to measure on, so that the interval over seeds (Student's t) holds both; of one seed it is the bootstrap over
pictures. `alarms/...` is the share of logged steps in which an alarm of the run rang.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from prefalign import bundled, config
from prefalign.evals.statistics import Estimate

Row = dict[str, Any]
Figures = dict[str, Estimate]
PPO_VARIANTS = ("facts", "no_facts", "no_kl", "length")
ONLINE_VARIANTS = ("online", "offline", "offline_bdhs", "mixed")
HALVES = {"held_out": "test_fair", "other": "test_adversarial"}
GRADES = ("accuracy", "accuracy_length_controlled", "accuracy_shuffled_picture", "accuracy_blank_picture",
          "accuracy_without_facts", "object_sensitivity")  # fmt: skip
TOLD = ("chair_i", "recall", "words_per_caption")
BATCH = 16
RANKED = [{"name": "objects", "weight": {"invented": 1.0, "recall": 0.5}}]
"""What ranks the captions that reward models learn from: by the gap of `pairs` the better of two invents one object less. Recall
counts little, and policies pay with it. Counted more (2.0, gap 1) pairs were too hard for 512 pictures: 0.60 instead of 0.76."""
TRUTH = [{"name": "objects", "weight": {"invented": 1.0, "wrong": 0.25, "recall": 6.0}}]


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        pictures: whose captions, drawn by the base, reward models learn from.
        epochs: of reward models.
        held_out: pictures of each half on which they are graded.
        ppo_steps: optimizer steps of a PPO run, two to 64 answers.
        prompts: of a round of online DPO.
        rounds: of it.
        tested: pictures on which policies are measured.
        draws: of the bootstrap.
    """

    pictures: int = 1024
    epochs: int = 4
    held_out: int = 256
    ppo_steps: int = 60
    prompts: int = 512
    rounds: int = 3
    tested: int = 512
    draws: int = 2000


QUICK = Sizes(24, 1, 16, 2, 16, 2, 8, 100)
"""Shows that everything runs; the figures mean nothing."""


class Workshop:
    """Runs stages with their scenes configs in the folder of a seed; what is there already is taken as it is.

    Args:
        root: scratch folder.
        seed: of everything that is drawn, the pictures with it.
        sizes: how much.
    """

    def __init__(self, root: Path, seed: int, sizes: Sizes):
        self.root, self.seed, self.sizes = root / f"seed-{seed}", seed, sizes

    def run(self, stage: str, name: str, changes: Mapping[str, Any], source: str = "") -> Path:
        """The folder `name` with what a stage makes; `changes` are over its scenes config, or over `source`."""
        folder = self.root / name
        module = bundled.load_stage(stage)
        file = bundled.find(source or f"{Path(bundled.stages()[stage]).parent.name}/{stage}_scenes")
        values = config.build(module.Config, config.merge(config.read_yaml(file), changes), source=file.stem)
        done = folder / "results.json"  # a grade starts anew each time, and says what it was made with
        if done.is_file() and json.loads(done.read_text()).get("config") == config.to_mapping(values):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        log = folder.with_suffix(".log")
        with log.open("a") as lines, contextlib.redirect_stdout(lines), contextlib.redirect_stderr(lines):
            module.main(values)
        if (took := time.perf_counter() - began) >= 1:
            print(f"seed {self.seed}: {name} by {stage}, {took:.0f} s", flush=True)
        return folder

    def prompts(self, split: str, start: int, count: int) -> Path:
        """Questions about pictures of a split, of which each seed has `count` of its own behind `start`."""
        from prefalign.scenes.export import export

        folder = self.root / f"prompts-{split}-{start}"
        first = start + self.seed * count
        export(folder, split=split, kind="caption", start=first, stop=first + count)
        return folder

    def pairs(self, split: str, count: int) -> Path:
        """Pairs of captions that the base draws for a picture: the one that invents least against others."""
        name, here = f"pairs-{split}", {"output": {"block_size": 64}, "seed": self.seed}
        drawn = self.run("sample_responses", f"{name}/drawn", config.merge(here, {
            "data": {"path": self.prompts(split, 0, count)}, "output": {"path": self.root / name / "drawn"},
            "sampling": {"temperature": 1.0}}))  # fmt: skip
        scored = self.run("score_responses", f"{name}/scored", {
            "data": {"path": drawn}, "output": {"path": self.root / name / "scored"}, "rewards": RANKED})  # fmt: skip
        return self.run("select_responses", f"{name}/pairs", config.merge(here, {
            "data": {"path": scored}, "output": {"path": self.root / name / "pairs"},
            "pairs": {"min_gap": 0.75, "per_prompt": 2}}))  # fmt: skip

    def reward_model(self, facts: bool) -> dict[str, Any]:
        """A reward model trained with or without facts, as an entry of `rewards`."""
        name = "facts" if facts else "no_facts"
        folder = self.run("train_reward_model", f"rm/{name}", {
            "pairs": self.pairs("train_fair", self.sizes.pictures), "output": self.root / "rm" / name, "facts": facts,
            "trainer": {"num_train_epochs": self.sizes.epochs}, "seed": self.seed})  # fmt: skip
        return {"name": "reward_model", "path": str(folder), "facts": facts}

    def told(self, name: str, policy: Path | str) -> Path:
        """The folder of an evaluation on fair test pictures."""
        scenes = {"splits": ["test_fair"], "start": 2048 + self.seed * self.sizes.tested, "pictures": self.sizes.tested,
                  "evals": ["chair"]}  # fmt: skip
        return self.run("evaluate_model", f"evaluation/{name}", {
            "model": {"model_name_or_path": str(policy)}, "scenes": scenes, "reliance": {"conditions": []},
            "draws": self.sizes.draws, "output": self.root / "evaluation" / name,
        }, "recipes/evaluate_scenes")  # fmt: skip


def estimate(entry: Mapping[str, Any]) -> Estimate:
    """An estimate as results files store it."""
    return Estimate(entry["value"], tuple(entry["ci95"]) if entry["ci95"] else None, entry["n"])


def reward_models(work: Workshop) -> dict[str, Figures]:
    """Grades of both reward models on both halves, and by how much facts help."""
    found: dict[str, Figures] = {}
    sets = {half: {"path": work.pairs(split, work.sizes.held_out), "domain": "in" if half == "held_out" else "out"}
            for half, split in HALVES.items()}  # fmt: skip
    folders = {}
    for facts in (True, False):
        variant = "facts" if facts else "no_facts"
        entry = work.reward_model(facts)
        folders[variant] = work.run("grade_reward_model", f"grade/{variant}", {
            "rewards": [entry], "sets": sets, "output": work.root / "grade" / variant, "seed": work.seed})  # fmt: skip
        graded = json.loads((folders[variant] / "results.json").read_text())["sets"]
        found[variant] = {f"{half}_{metric}": estimate(graded[half]["metrics"][metric])
                          for half in HALVES for metric in GRADES if facts or metric != "accuracy_without_facts"}  # fmt: skip
        found[variant] |= {f"pairs_{half}": Estimate(graded[half]["pairs"], None, 0) for half in HALVES}
    found["difference"] = {
        f"{half}_accuracy": paired(folders["facts"], folders["no_facts"], half, work.sizes.draws) for half in HALVES
    }
    return found


def paired(one: Path, other: Path, half: str, draws: int) -> Estimate:
    """Accuracy of one grade minus that of another, on the same pairs."""
    from prefalign.evals.statistics import resample

    graded = []
    for folder in (one, other):
        rows = map(json.loads, (folder / "items.jsonl").read_text().splitlines())
        graded.append({row["id"]: row for row in rows if row["set"] == half and row["margins"]["own"] is not None})
    shared = sorted(graded[0].keys() & graded[1].keys())
    right = [[right_of(side[name]["margins"]["own"]) for name in shared] for side in graded]
    columns = {"one": right[0], "other": right[1], "pairs": [1.0] * len(shared)}
    drawn = resample(columns, [graded[0][name]["picture"] for name in shared], draws=draws)
    return drawn.difference(("one", "other"), ("pairs", "pairs"), n=len(shared))[0]


def right_of(margin: float) -> float:
    """1 for a pair put right, half for a tie."""
    return 0.5 if margin == 0 else float(margin > 0)


def changes(work: Workshop, part: str, policies: Mapping[str, Path], offline: str) -> dict[str, Figures]:
    """What policies tell of test pictures, and how that differs from the base and from the policy of offline DPO."""
    folders = {variant: work.told(f"{part}-{variant}", policy) for variant, policy in policies.items()}
    folders = {"base": work.told("base", "scenes")} | folders
    found: dict[str, Figures] = {}
    for variant, folder in folders.items():
        metrics = json.loads((folder / "results.json").read_text())["metrics"]
        found[variant] = {name: estimate(metrics[name]) for name in TOLD}
        for other, suffix in (("base", "change"), (offline, "from_offline")):
            if variant not in ("base", other):
                found[variant] |= {f"{name}_{suffix}": value for name, value in
                                   differences(folder, folders[other], work.sizes.draws).items()}  # fmt: skip
    return found


def differences(one: Path, other: Path, draws: int) -> Figures:
    """What the captions of one evaluation tell less what those of the other do, on the same pictures."""
    from prefalign.evals import scoring, summary

    found, _ = summary.compare(*(scoring.read_items(folder / "items.jsonl") for folder in (one, other)), draws=draws)
    return {name: estimate(found[f"difference.{name}"]) for name in TOLD}


def ppo(work: Workshop) -> dict[str, Figures]:
    """PPO against both reward models, and offline DPO on the pairs that these learned from."""
    prompts = work.prompts("train_fair", 16_000, 4 * work.sizes.prompts)
    facts, no_facts = work.reward_model(True), work.reward_model(False)
    longer = {"name": "length", "label": "longer", "weight": -16.0, "penalty": 1.0, "max_tokens": 96}  # pays for tokens
    rewards = {"facts": [facts], "no_facts": [no_facts], "no_kl": [facts], "length": [facts, longer]}
    runs = {
        variant: work.run("train_ppo", f"ppo/{variant}", {
            "prompts": prompts, "output": work.root / "ppo" / variant, "reward_model": None, "rewards": rewards[variant],
            "watch": [{"name": "objects"}], "seed": work.seed, "force_reward": True,  # what a poor one does is shown, too
            "trainer": {"max_steps": work.sizes.ppo_steps, "logging_steps": 2,
                        **({"kl_coef": 0.0} if variant == "no_kl" else {})},
        }, "recipes/train_ppo_fact_rlhf_scenes")
        for variant in PPO_VARIANTS
    }  # fmt: skip
    dpo = work.run("train_preference", "dpo", {
        "pairs": work.pairs("train_fair", work.sizes.pictures), "output": work.root / "dpo",
        "trainer": {"max_steps": work.sizes.ppo_steps}, "seed": work.seed})  # fmt: skip
    found = changes(work, "ppo", runs | {"offline_dpo": dpo}, "offline_dpo")
    for variant, folder in runs.items():
        found[variant] |= logged(folder)
    return found


def logged(folder: Path) -> Figures:
    """What a PPO run says of itself: reward, truth and KL in its first rollout and its last ones, and its alarms."""
    history = [entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
               if "objective/scores" in entry]  # fmt: skip
    last = history[-max(1, len(history) // 6) :]

    def exact(value: float) -> Estimate:
        return Estimate(value, None, 1)

    def late(name: str) -> Estimate:
        return exact(statistics.fmean(entry[name] for entry in last))

    found = {"reward_before": exact(history[0]["objective/scores"]), "reward_after": late("objective/scores"),
             "kl": late("objective/kl")}  # fmt: skip
    for name in history[0]:
        if name.startswith("watch/") and not name.endswith("/std"):
            found |= {f"{name}/before": exact(history[0][name]), f"{name}/after": late(name)}
    names = sorted({name for entry in history for name in entry if name.startswith("alarms/")})
    found |= {name: exact(sum(name in entry for entry in history) / len(history)) for name in names}
    hacking = any(name.split("/")[1] in ("hacking", "verbosity", "length_reward") for name in names)
    return found | {"hacking_noticed": exact(float(hacking))}


def online(work: Workshop) -> dict[str, Figures]:
    """Online, offline and mixed DPO: as many prompts and updates each, the same judge of the policy's own answers."""
    rounds, each = work.sizes.rounds, work.sizes.prompts
    prompts = work.prompts("train_fair", 32_000, rounds * each)
    bdhs = work.run(
        "bdhs", "bdhs", {"data": {"path": prompts}, "output": {"path": work.root / "bdhs"}, "seed": work.seed}
    )
    steps = max(1, each // BATCH * 3 // 4)  # what is left of the prompts without ties, about
    trainer = {"max_steps": steps, "per_device_train_batch_size": BATCH}

    def loop(variant: str, **more: Any) -> Path:
        folder = work.run("train_online", f"online/{variant}", config.merge({
            "data": {"path": prompts}, "output": work.root / "online" / variant, "rounds": {"count": rounds, "prompts": each},
            "rewards": TRUTH, "trainer": trainer, "evaluation": None, "check": {"prompts": min(16, each)}, "seed": work.seed,
        }, more), "recipes/train_online_scenes")  # fmt: skip
        return folder / "policy"

    return changes(work, "online", {
        "online": loop("online"),
        "offline": loop("offline", rounds={"count": 1, "prompts": rounds * each}, trainer={"max_steps": rounds * steps}),
        "offline_bdhs": work.run("train_preference", "online/offline_bdhs", {
            "pairs": bdhs, "output": work.root / "online" / "offline_bdhs", "seed": work.seed,
            "trainer": {**trainer, "max_steps": rounds * steps}}),
        "mixed": loop("mixed", offline=bdhs, p_offline=0.5),
    }, "offline")  # fmt: skip


PARTS = {"rm": reward_models, "ppo": ppo, "online": online}
LEAST = {"rm/difference/held_out_accuracy": 0.0, "ppo/length/hacking_noticed": 1.0}
MOST = dict.fromkeys(("ppo/facts/chair_i_change", "online/online/chair_i_change", "online/mixed/chair_i_change"), 0.0)
UNITS = {
    "words": "words",
    "pairs": "pairs",
    "reward": "deviations",
    "kl": "nats per answer",
    "hacking": "share of runs",
}
"""By the first word of a metric's name; the others are shares."""


def rows_of(part: str, by_seed: Mapping[int, Mapping[str, Figures]]) -> list[Row]:
    """For each figure its value by seed, their mean, and the 95 % interval of that where there is one."""
    rows = []
    names = dict.fromkeys(
        (variant, metric) for found in by_seed.values() for variant in found for metric in found[variant]
    )
    for variant, metric in names:
        silent = Estimate(0.0 if metric.startswith("alarms/") else None, None, 0)
        values = {seed: found[variant].get(metric, silent) for seed, found in by_seed.items()}
        mean, interval = summed_up(list(values.values()))
        baseline = baseline_of(part, variant, metric, by_seed)
        name = f"{part}/{variant}/{metric}"
        unit = "of an answer" if metric.startswith("watch/") else UNITS.get(metric.split("_")[0], "share")
        shown = {**{str(seed): value.value for seed, value in values.items()}, "mean": mean}
        shown |= dict(zip(("low", "high"), interval, strict=True)) if interval else {}
        for last, value in shown.items():
            goal = LEAST.get(name, MOST.get(name)) if last == "mean" else None
            rounded = [None if number is None else round(number, 4) for number in (value, baseline)]
            rows.append({"name": f"rl/{name}/{last}", "value": rounded[0], "unit": unit, "baseline": rounded[1],
                         "goal": goal})  # fmt: skip
    return rows


def summed_up(values: Sequence[Estimate]) -> tuple[float | None, tuple[float, float] | None]:
    """Mean over seeds with its interval; of one seed its own."""
    known = [value for value in values if value.value is not None]
    numbers = [value.value for value in known if value.value is not None]
    if len(numbers) < 2:
        return (numbers[0], known[0].ci95) if numbers else (None, None)
    from scipy import stats

    mean = statistics.fmean(numbers)
    half = float(stats.t.ppf(0.975, len(numbers) - 1)) * statistics.stdev(numbers) / len(numbers) ** 0.5
    return mean, (mean - half, mean + half)


def baseline_of(part: str, variant: str, metric: str, by_seed: Mapping[int, Mapping[str, Figures]]) -> float | None:
    """What a figure is read against: no difference, chance, the model without facts, or the base."""
    if metric.endswith(("_change", "_from_offline")) or variant == "difference":
        return 0.0
    other = "no_facts" if part == "rm" else "base"
    if variant == other:
        return 0.5 if "accuracy" in metric else None
    return summed_up([found[other][metric] for found in by_seed.values() if metric in found[other]])[0]


def table(rows: Sequence[Row]) -> str:
    """The means with their intervals as lines for a terminal."""
    values = {row["name"]: row["value"] for row in rows}
    lines = []
    for row in rows:
        stem, _, last = row["name"].rpartition("/")
        if last == "mean":
            value = "none" if row["value"] is None else f"{row['value']:.3f}"
            known = f"{stem}/low" in values
            interval = f"[{values[f'{stem}/low']:.3f}, {values[f'{stem}/high']:.3f}]" if known else ""
            lines.append(f"{stem:<56} {value:>8} {interval:<18} {row['unit']}{verdict(stem, row)}")
    return "\n".join(lines)


def verdict(stem: str, row: Row) -> str:
    """The goal of a row, and whether it is missed."""
    if row["goal"] is None or row["value"] is None:
        return ""
    least = stem.removeprefix("rl/") in LEAST
    missed = row["value"] < row["goal"] if least else row["value"] > row["goal"]
    return f", {'at least' if least else 'at most'} {row['goal']:g}{' MISSED' if missed else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--quick", action="store_true", help="a few rows: shows that it runs, the figures mean nothing")
    parser.add_argument("--keep", type=Path, help="folder in which everything stays, to go on from")
    for size in fields(Sizes):
        parser.add_argument(f"--{size.name}", type=int, help=f"default {size.default}")
    chosen = parser.parse_args()
    parts = [name for name in chosen.parts.split(",") if name]
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"unknown part {unknown[0]!r}: known are {', '.join(PARTS)}")
    given = {name: getattr(chosen, name) for name in asdict(QUICK) if getattr(chosen, name) is not None}
    sizes = replace(QUICK if chosen.quick else Sizes(), **given)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts:
            by_seed = {}
            for seed in map(int, chosen.seeds.split(",")):
                by_seed[seed] = PARTS[part](Workshop(chosen.keep or Path(scratch), seed, sizes))
                found = rows_of(part, by_seed)
                if chosen.json:
                    chosen.json.write_text(json.dumps([*rows, *found], indent=2) + "\n")
            rows += found
            print(table(found), flush=True)


if __name__ == "__main__":
    main()

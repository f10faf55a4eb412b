"""The semi-online loop: rounds of sample -> annotate -> pair -> mix -> DPO, each arrow a folder that resumes by itself.

    prompts/                    all prompts of the run, read once
    round-1/prompts/            the round's slice
    round-1/check.json          engine against trainer, and KL of the policy that samples to the reference
    round-1/candidates/         its answers
    round-1/serving/            jobs of an engine in another process (`serving.py`)
    round-1/pairs/              annotated pairs
    round-1/mixed/              with the offline pairs that were drawn
    round-1/policy/             the policy after the round (of the last round: policy/)
    round-1/evaluation/         how it does, if the run evaluates
    round-1/no_pairs.json       in place of pairs, if no prompt that was drawn online gave a usable one
    round-1/metrics.json
    reference/                  log-probs of the reference, shared by all rounds

Source: Amirloo et al., arXiv 2407.02477, sections 3.2 and 3.3, with rounds in place of steps: weights move between rounds only,
so that any engine can sample and the trainer stays the offline one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from prefalign import bundled
from prefalign import config as settings
from prefalign.blocks import NoRows
from prefalign.config import ConfigError
from prefalign.engines.transformers import load_engine
from prefalign.losses import VIEWS, read_losses, views_of
from prefalign.manifest import read_manifest, write_atomically
from prefalign.models import ModelConfig, check_towers
from prefalign.online.annotating import annotate, read_annotator
from prefalign.online.checking import divergence
from prefalign.online.mixing import mix, offline_prompts
from prefalign.online.prompts import gather_prompts
from prefalign.online.round_checks import check_trainer, first_prompts, free_memory, gap_bound, keep_gap, measure_gap
from prefalign.online.round_metrics import NO_PAIRS, round_metrics, table, warnings_of
from prefalign.online.round_training import TrainingSettings, fill_reference, policy_config, train_round
from prefalign.online.sampling import Draw, drawn_answers, sample
from prefalign.online.serving import draw_candidates, remove_served
from prefalign.online.settings import FREE, OnlineConfig
from prefalign.records import Prompt, row_seed
from prefalign.sources import DataConfig
from prefalign.store import OutputConfig, read_records, write_records
from prefalign.training.arguments import training_arguments
from prefalign.training.checks import check_settings, reading_rejected
from prefalign.training.lora import check_quantised
from prefalign.training.pairs import check_rejected_side, load_pairs, pairs_manifest
from prefalign.training.runs import CONFIG_FILE, RunError, claim_run, open_run, run_files

PROMPTS = "round_prompts"


def _folder(config: OnlineConfig, number: int) -> Path:
    return config.output / f"round-{number}"


def policy_folder(config: OnlineConfig, number: int) -> Path | None:
    """Folder of the policy after a round; None for round 0: what the run starts from."""
    if number == 0:
        return None
    return config.output / "policy" if number == config.rounds.count else _folder(config, number) / "policy"


def _training(config: OnlineConfig) -> TrainingSettings:
    return TrainingSettings(
        config.losses, {"num_train_epochs": 1, **config.trl}, config.lora, config.freeze, config.fast_path
    )


def run_rounds(config: OnlineConfig) -> dict[str, Any]:
    """Run all rounds, or go on where an earlier run of them stopped; returns the content of `results.json`.

    Killed at any moment and started again, it ends with the weights of an uninterrupted run: finished arrows are kept, an
    unfinished one goes on from its last block or checkpoint.
    """
    if config.offline is not None:
        pairs_manifest(config.offline)
    _check_settings(config)
    _claim(config)
    identities = {prompt.id for prompt in read_records(gather_prompts(config), Prompt)}
    offline = offline_prompts(config.offline, identities) if config.offline is not None else frozenset()
    done: list[dict[str, Any]] = []
    for number in range(1, config.rounds.count + 1):
        file = _folder(config, number) / "metrics.json"
        if not file.is_file():
            print(f"\n== round {number} of {config.rounds.count}", flush=True)
            measured = _round(config, number, len(identities), offline)
            write_atomically(file, json.dumps(measured, indent=2).encode())
        done.append(_evaluated(config, number, json.loads(file.read_text(encoding="utf-8"))))
    before, why = _evaluate(config, 0)
    failed = [f"before the run: {why}"] if why else []
    failed += [f"after round {r['round']}: {r['evaluation_failed']}" for r in done if r.get("evaluation_failed")]
    warnings = warnings_of(done, before) + [
        f"no evaluation {one}. The policy is saved: start the same command again, and what is missing is measured."
        for one in failed
    ]
    results = {"before": before, "rounds": done, "warnings": warnings}
    write_atomically(config.output / "results.json", json.dumps(results, indent=2).encode())
    print("\n" + table(results))
    return results


def _check_settings(config: OnlineConfig) -> None:
    """Let bad settings fail before the folder is the run's: once it is, another config is another run.

    Raises:
        ConfigError: settings of TRL, losses, annotator or rewards that could not be used, or several processes.
        ValueError: offline pairs that the losses would read on the wrong picture.
        ModelError: there is no tower of a name in `freeze`.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise ConfigError(
            f"trainer.algorithm is 'online_dpo' and {started} processes were started: each would sample and write into the same "
            "folders. Start one process; grpo and rloo run in several."
        )
    arguments: Any = training_arguments(_training(config).trainer, output=config.output, seed=config.seed)
    check_quantised(config.model, config.lora, arguments)
    losses = read_losses(config.losses, beta=arguments.beta)
    check_settings(losses, arguments, reference="cached", tokens_per_pass=None, brings_reference=False,
                   adapts=config.lora is not None)  # fmt: skip
    check_towers(config.freeze)
    views = views_of(losses)
    pictured = [view for view in views if VIEWS[view].images == "rejected_images"]
    if pictured and (config.offline is None or config.p_offline < 1):
        raise ConfigError(
            f"losses: the views {', '.join(pictured)} look at `rejected_images`, and pairs of the policy's own answers have "
            "none. Take losses on the texts, such as [{name: text}], or offline pairs alone (p_offline: 1)."
        )
    if config.offline is not None:
        check_rejected_side(load_pairs(config.offline), config.offline, reading_rejected(losses, arguments.loss_type))
    if config.bdhs is None:
        read_annotator(config.annotator, config.rewards, config.margin)
    if config.evaluation is not None:
        _evaluation(config, 0)
    check_trainer(config, _training(config).trainer, losses)


def _claim(config: OnlineConfig) -> None:
    """Make a free folder the run's own, or find that it is.

    Raises:
        RunError: the folder holds a run with another config or other offline pairs, or something else; or `resume` cannot be met.
    """
    manifest = (config.offline / "manifest.json").read_text(encoding="utf-8") if config.offline is not None else ""
    files = run_files(settings.to_mapping(config), manifest, data="offline")
    began = (config.output / CONFIG_FILE).is_file()
    if config.resume is True and not began:
        raise RunError(f"resume is true and {config.output} holds no run. Set resume to auto to start anew.")
    if config.resume is False and began:
        raise RunError(
            f"resume is false and {config.output} holds a run, which starting anew would overwrite. Delete the folder, give "
            "another `output`, or set resume to auto to go on."
        )
    measured = next(config.output.glob("**/evaluation/results.json"), None) is not None
    open_run(config.output, files, free=FREE if measured else (*FREE, "evaluation", "evaluation_config"))
    claim_run(config.output, files)


def _slice(config: OnlineConfig, number: int, total: int) -> Path:
    """The prompts of a round, in order; after the last comes the first."""
    folder = _folder(config, number) / "prompts"
    size = min(config.rounds.prompts or total, total)
    start = (number - 1) * size % total

    def rows() -> Iterator[Prompt]:
        yield from islice(read_records(config.output / "prompts", Prompt), start, min(start + size, total))
        yield from islice(read_records(config.output / "prompts", Prompt), 0, max(start + size - total, 0))

    write_records(PROMPTS, rows(), output=OutputConfig(folder), record=Prompt,
                  settings={"start": start, "size": size}, seed=config.seed)  # fmt: skip
    return folder


def _round(config: OnlineConfig, number: int, total: int, offline: frozenset[str]) -> dict[str, Any]:
    folder = _folder(config, number)
    prompts = _slice(config, number, total)
    draw = Draw(offline, config.p_offline, config.seed, number)
    taken = [draw.takes_offline(prompt.id) for prompt in read_records(prompts, Prompt)]
    start = policy_config(config.model, policy_folder(config, number - 1), lora=config.lora is not None)
    online = None
    if not all(taken) and not (folder / NO_PAIRS).is_file():
        try:
            online = _online_pairs(config, number, prompts, draw, start)
        except NoRows as error:
            why = error.why
            if config.bdhs is None and read_manifest(folder / "candidates") is None:
                raise RunError(
                    f"round {number} of {config.rounds.count} has no answers: {why}. The policy answered none of the "
                    f"{taken.count(False)} prompts drawn online. Mend the cause and start the same command "
                    "again: the arrow is made anew."
                ) from error
            if not any(taken):
                raise RunError(
                    f"round {number} of {config.rounds.count} has nothing to train on: none of its {len(taken)} prompts gave a "
                    f"usable pair ({why}) and none took an offline one. If a judge or a disk was out, start the same command "
                    "again: the arrow is made anew. Otherwise give another `output`, with a smaller `margin`, more `responses` "
                    "or prompts (`rounds.prompts`), a higher `sampling.temperature`, or longer answers."
                ) from error
            print(f"round {number} trains on its {sum(taken)} offline pairs alone: {why}")
            write_atomically(folder / NO_PAIRS, json.dumps({"prompts": taken.count(False), "why": why}).encode())
    mix(prompts, online, config.offline, draw, output=folder / "mixed")
    _train(config, number, start, folder / "mixed")
    policy = policy_folder(config, number)
    assert policy is not None
    return round_metrics(folder, policy, number=number, divergence=_measure_divergence(config, number))


def _evaluated(config: OnlineConfig, number: int, measured: dict[str, Any]) -> dict[str, Any]:
    """A round's metrics with its evaluation; one that failed costs the run nothing, and is tried again at the next start."""
    if config.evaluation is None or measured["evaluation"]:
        return measured
    evaluation, why = _evaluate(config, number)
    measured = {**measured, "evaluation": evaluation, "evaluation_failed": why}
    write_atomically(_folder(config, number) / "metrics.json", json.dumps(measured, indent=2).encode())
    return measured


def _online_pairs(config: OnlineConfig, number: int, prompts: Path, draw: Draw, start: ModelConfig) -> Path:
    """Sample and annotate; each model is loaded for its arrow only."""
    folder = _folder(config, number)
    pairs, candidates = folder / "pairs", folder / "candidates"
    blocks = config.rounds.block_size
    if read_manifest(pairs if config.bdhs is not None else candidates) is None:
        if config.engine == "vllm":
            draw_candidates(config, folder, prompts, draw, start)
        else:
            _draw_here(config, folder, prompts, draw, start)
        free_memory()
    remove_served(folder)
    if read_manifest(pairs) is not None:
        return pairs
    if config.bdhs is not None:
        _bdhs_pairs(config, start, prompts, draw, pairs)
    else:
        annotator = read_annotator(config.annotator, config.rewards, config.margin)
        annotate(prompts, candidates, annotator, draw, output=OutputConfig(pairs, block_size=blocks))
        del annotator
        free_memory()
    return pairs


def _draw_here(config: OnlineConfig, folder: Path, prompts: Path, draw: Draw, start: ModelConfig) -> None:
    """Check the transformers engine in this process, and let it answer unless `bdhs` makes the pairs."""
    engine = load_engine(start, batch_size=config.batch_size)
    keep_gap(measure_gap(config, engine, prompts), gap_bound(config, engine.model.dtype), folder)
    if config.bdhs is None:
        sample(prompts, engine, draw, sampling=config.sampling, responses=config.responses,
               output=OutputConfig(folder / "candidates", block_size=config.rounds.block_size))  # fmt: skip


def _train(config: OnlineConfig, number: int, start: ModelConfig, mixed: Path) -> None:
    lora = config.lora is not None
    previous = config.rounds.reference == "previous"
    policy = policy_folder(config, number)
    assert policy is not None
    reference_folder = _folder(config, number) / "reference" if previous else config.output / "reference"
    reference_model = start if previous else policy_config(config.model, None, lora=lora)
    note = mixed / "reference.json"
    if not note.is_file():
        reference = fill_reference(_training(config), reference_model, mixed, reference_folder,
                                   continues=previous and lora and number > 1, seed=config.seed,
                                   output=_folder(config, number) / "reference_run")  # fmt: skip
        write_atomically(note, json.dumps({"reference": reference}).encode())
        free_memory()
    reference = json.loads(note.read_text(encoding="utf-8"))["reference"]
    train_round(_training(config), start, mixed, policy, reference=reference, reference_folder=reference_folder,
                continues=lora and number > 1, seed=config.seed + number - 1)  # fmt: skip
    free_memory()


def _measure_divergence(config: OnlineConfig, number: int) -> dict[str, Any]:
    """KL of the policy after a round to the model that the run starts from; kept in `divergence.json`."""
    file = _folder(config, number) / "divergence.json"
    if not config.check.prompts:
        return {}
    if not file.is_file():
        trained = policy_config(config.model, policy_folder(config, number), lora=config.lora is not None)
        engine = load_engine(trained, batch_size=config.batch_size)
        prompts = first_prompts(_folder(config, number) / "prompts", config.check.prompts)
        requests, answers = drawn_answers(
            engine, prompts, max_new_tokens=config.sampling.max_new_tokens, seed=config.seed
        )
        policy = engine.logprobs(requests, answers)
        del engine
        free_memory()
        reference = load_engine(config.model, batch_size=config.batch_size).logprobs(requests, answers)
        write_atomically(file, json.dumps(asdict(divergence(policy, reference)), indent=2).encode())
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _bdhs_pairs(config: OnlineConfig, start: ModelConfig, prompts: Path, draw: Draw, output: Path) -> None:
    """Pairs of the stage `bdhs`, its generator being the policy of the round; prompts drawn offline are left out."""
    drawn = output.with_name("drawn")
    write_records(PROMPTS, (prompt for prompt in read_records(prompts, Prompt) if not draw.takes_offline(prompt.id)),
                  output=OutputConfig(drawn), record=Prompt, settings={"visit": draw.visit}, seed=config.seed)  # fmt: skip
    assert config.bdhs is not None
    stage = bundled.load_stage("bdhs")
    stage.main(stage.Config(
        model=start, data=DataConfig(drawn), output=OutputConfig(output, block_size=config.rounds.block_size), bias=config.bdhs,
        similarity=config.similarity, sampling=config.sampling, batch_size=config.batch_size,
        seed=row_seed(config.seed, f"visit {draw.visit}"),
    ))  # fmt: skip


def _evaluation(config: OnlineConfig, number: int) -> Any:
    """The config of `evaluate_model` for the policy after a round.

    Raises:
        ConfigError: `evaluation` or `evaluation_config` name a setting that it has not.
    """
    assert config.evaluation is not None
    folder = _folder(config, number) / "evaluation" if number else config.output / "evaluation"
    stage = bundled.load_stage("evaluate_model")
    values = settings.merge(settings.read_yaml(bundled.find(config.evaluation_config)), config.evaluation)
    policy = policy_config(config.model, policy_folder(config, number), lora=config.lora is not None)
    values = settings.merge(values, {"model": settings.to_mapping(policy), "output": folder})
    return settings.build(stage.Config, values, source=config.evaluation_config)


def _evaluate(config: OnlineConfig, number: int) -> tuple[dict[str, Any], str | None]:
    """Estimates of `evaluate_model` on the policy after a round, 0 being what the run starts from; and why there are none."""
    if config.evaluation is None:
        return {}, None
    stage, chosen = bundled.load_stage("evaluate_model"), _evaluation(config, number)
    folder = chosen.output
    results = folder / "results.json"
    if not results.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder.parent / f"{folder.name}.txt").open("w") as log, contextlib.redirect_stdout(log):
                stage.main(chosen)
        except Exception as error:  # whatever it is, it measures only: the rounds after it need nothing of it
            why = f"{type(error).__name__}: {error}"
            print(f"WARNING: the evaluation in {folder} failed ({why}); the run goes on", flush=True)
            return {}, why
    measured = json.loads(results.read_text(encoding="utf-8"))["metrics"]
    return {name: entry.get("value") for name, entry in measured.items() if not name.startswith("difference.")}, None

"""Online DPO step by step: every batch samples from the policy as it is, annotates, and trains on that. For small models.

Source: Amirloo et al., arXiv 2407.02477, sections 3.2 (online), 3.3 (mixed) and 3.4 (online BDHS). The loss is that of
`PreferenceTrainer`, unchanged; the batch it is called on is made anew in every step. Generation inside a step leaves a GPU idle
most of the time: for more than small models take rounds (`rounds.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prefalign import families
from prefalign.config import ConfigError, to_mapping
from prefalign.engines import Request, Sampling
from prefalign.engines.transformers import TransformersEngine
from prefalign.guided import BiasConfig, Item, corrupted_answers, rejection
from prefalign.images import open_image
from prefalign.losses import VIEWS, read_losses, views_of
from prefalign.manifest import write_atomically
from prefalign.models import check_towers, fingerprint, freeze, load_processor
from prefalign.online.annotating import Annotator, as_response, read_annotator
from prefalign.online.prompts import gather_prompts
from prefalign.online.round_checks import check_held_out
from prefalign.online.sampling import Draw, near_identical, response, usable
from prefalign.online.settings import FREE
from prefalign.records import Pair, Prompt, assistant_message, normalise_messages, row_seed
from prefalign.store import OutputConfig, read_records, write_records
from prefalign.text import load_similarity
from prefalign.training.arguments import check_precision, training_arguments
from prefalign.training.checks import check_settings
from prefalign.training.distributed import claim_processes, running_processes
from prefalign.training.lora import check_quantised, check_trainable
from prefalign.training.pairs import COLUMNS, pairs_manifest
from prefalign.training.policy import load_policy
from prefalign.training.preference import PreferenceTrainer
from prefalign.training.runs import CONFIG_FILE, base_file, claim_run, is_finished, open_run, run_files
from prefalign.training.upkeep import train_and_save

if TYPE_CHECKING:
    from datasets import Dataset

    from prefalign.losses import Weighted
    from prefalign.online.settings import OnlineConfig
    from prefalign.text import Similarity

DROPPED = "online/dropped_"
"""Start of the names of the shares of rows that gave no pair."""


@dataclass
class OnTheFly:
    """How a prompt becomes a pair in a step.

    Attributes:
        annotator: says which answer is better; None with `bdhs`.
        sampling: how answers are drawn.
        responses: answers to each prompt.
        p_offline: probability that a row with an offline pair takes it.
        seed: with the step and a row's id it decides every draw.
        bdhs: chosen is the row's reference answer, rejected what the policy says with its eyes nearly closed.
        similarity: what compares answers for `bdhs`.
        batch_size: rows of one forward pass of the engine.
    """

    annotator: Annotator | None
    sampling: Sampling
    responses: int = 2
    p_offline: float = 0.0
    seed: int = 0
    bdhs: BiasConfig | None = None
    similarity: Similarity | None = None
    batch_size: int = 16


class OnlineStepTrainer(PreferenceTrainer):
    """`PreferenceTrainer` whose batches are prompts; their pairs are made by the policy in the step that trains on them.

    A row that gives no usable pair takes no part, and the others weigh what they would have weighed beside it: the loss is the
    sum over pairs divided by the rows of the batch. Where no row gives one, the step's gradient is zero.

    An answer trains on the very tokens that were drawn: a row whose text the tokenizer cuts otherwise is dropped (`retokenised`).

    Logged: `online/share` (of rows that took the policy's answers), `online/pairs` (usable pairs per row), `online/gap`,
    `online/length_gap` (characters of chosen less rejected) and `online/dropped_<reason>` (per row, so
    that with `online/pairs` they add up to 1).

    Args:
        *args: passed on.
        fly: how pairs are made.
        **kwargs: passed on; rows of `train_dataset` have the columns of pairs, `answer` and `facts`. `chosen` and `rejected` are
            the row's offline pair, or empty. `reference` is `online`.
    """

    def __init__(self, *args: Any, fly: OnTheFly, **kwargs: Any):
        self.fly = fly
        super().__init__(*args, **kwargs)
        self.pairs_collator = self.data_collator
        self.data_collator = _as_they_are  # type: ignore[assignment]
        self.engine = TransformersEngine(self.model, self.pairs_collator.processor, batch_size=fly.batch_size)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [*COLUMNS, "answer", "facts"]

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        """Prompts to a batch of pairs; a batch that is one already (held-out pairs) is left as it is."""
        if not isinstance(inputs, list):
            return super()._prepare_inputs(inputs)
        pairs = self.make_pairs(inputs)
        batch = self._collated(pairs)
        self._log_pairs(inputs, pairs)
        kept = [pair for pair in pairs if pair.reason is None]
        if not kept:
            return {"no_pairs": True}
        return super()._prepare_inputs({**batch, "weight": len(kept) / len(inputs)})

    def _collated(self, pairs: list[_Made]) -> dict[str, Any]:
        """The batch of all pairs whose answers are the tokens that were drawn; the others are marked `retokenised`."""
        while kept := [pair for pair in pairs if pair.reason is None]:
            batch = self.pairs_collator([pair.row for pair in kept])
            for number, pair in enumerate(kept):
                for side, drawn in pair.tokens.items():
                    trained = batch["answers"][side]["ids"][number, : len(drawn)].tolist()
                    if trained != drawn:
                        pair.reason = "retokenised"
            if all(pair.reason is None for pair in kept):
                return batch
        return {}

    def make_pairs(self, rows: Sequence[Mapping[str, Any]]) -> list[_Made]:
        """For each row its offline pair, a pair of the policy's answers, or why there is none."""
        step = self.state.global_step
        draw = Draw(frozenset(row["id"] for row in rows if row["chosen"]), self.fly.p_offline, self.fly.seed, step)
        made = [_Made({**row, "online": not draw.takes_offline(row["id"])}) for row in rows]
        online = [pair for pair in made if pair.row["online"]]
        if online and self.fly.bdhs is not None:
            self._by_hiding(online, self.fly.bdhs, seed=row_seed(self.fly.seed, f"step {step}"))
        elif online:
            self._by_annotating(online, seed=row_seed(self.fly.seed, f"step {step}"))
        return made

    def _by_hiding(self, pairs: list[_Made], bias: BiasConfig, *, seed: int) -> None:
        """Online BDHS: the reference answer against what the policy makes of it with most image tokens hidden."""
        assert self.fly.similarity is not None
        items = [
            Item(pair.row["id"], normalise_messages(pair.row["prompt"]), _pictures(pair.row), pair.row["answer"] or "")
            for pair in pairs
        ]
        for pair, item in zip(pairs, items, strict=True):
            if not item.answer.strip():
                pair.reason = "no_reference"
        asked = [(pair, item) for pair, item in zip(pairs, items, strict=True) if pair.reason is None]
        answers = corrupted_answers(
            self.engine, [item for _, item in asked], bias, self.fly.sampling, self.fly.similarity, seed=seed
        )
        for (pair, item), answer in zip(asked, answers, strict=True):
            pair.reason = rejection(item, answer)
            pair.answer(item.answer, answer.text)

    def _by_annotating(self, pairs: list[_Made], *, seed: int) -> None:
        """Answers of the policy as it is, the better one chosen by the annotator."""
        assert self.fly.annotator is not None
        number = self.fly.responses
        requests = [
            Request(f"{pair.row['id']}/{place}", normalise_messages(pair.row["prompt"]), pictures, seed=seed)
            for pair in pairs
            for pictures in [_pictures(pair.row)]
            for place in range(number)
        ]
        answers = self.engine.generate(requests, self.fly.sampling)
        entries = [response(answer, 0.0, self.fly.sampling, "") for answer in answers]
        groups = []
        for place, pair in enumerate(pairs):
            left, pair.reason = usable(entries[place * number : (place + 1) * number])
            if pair.reason is None:
                groups.append((pair, _prompt(pair.row), left))
        found = self.fly.annotator.prefer(
            [[as_response(prompt, entry) for entry in left] for _, prompt, left in groups]
        )
        end = families.turn_end_id(self.pairs_collator.processor)
        for (pair, _, left), preference in zip(groups, found, strict=True):
            if preference.chosen is None or preference.rejected is None:
                pair.reason = preference.reason
                continue
            chosen, rejected = left[preference.chosen], left[preference.rejected]
            pair.answer(chosen["text"], rejected["text"])
            pair.gap = preference.gap
            pair.tokens = {"chosen": [*chosen["token_ids"], end], "rejected": [*rejected["token_ids"], end]}
            if near_identical(chosen["text"], rejected["text"]):
                pair.reason = "near_identical"

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if "no_pairs" not in inputs:
            return super()._compute_loss(model, inputs, return_outputs)
        nothing = sum(
            (parameter.sum() * 0 for parameter in model.parameters() if parameter.requires_grad), torch.zeros(())
        )
        return (nothing, {}) if return_outputs else nothing

    def _log_pairs(self, rows: Sequence[Any], pairs: Sequence[_Made]) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        online = [pair for pair in pairs if pair.row["online"]]
        usable_pairs = [pair for pair in online if pair.reason is None]
        metrics["online/share"].append(len(online) / len(rows))
        steps = len(metrics["online/share"])
        metrics["online/pairs"].append(len([pair for pair in pairs if pair.reason is None]) / len(rows))
        gaps = [pair.gap for pair in usable_pairs if pair.gap is not None]
        if gaps:
            metrics["online/gap"].append(sum(gaps) / len(gaps))
        if usable_pairs:
            metrics["online/length_gap"].append(sum(pair.longer for pair in usable_pairs) / len(usable_pairs))
        counts = Counter(f"{DROPPED}{pair.reason}" for pair in pairs if pair.reason is not None)
        for name in {*counts, *(name for name in metrics if name.startswith(DROPPED))}:
            shares = metrics[name]
            shares += [0.0] * (steps - 1 - len(shares))  # the steps since the last log in which none was dropped for it
            shares.append(counts[name] / len(rows))


@dataclass
class _Made:
    """A row on its way to a pair.

    `reason` says why it gives none; `tokens` are those that were drawn, by side, end of turn included (none: a text of another
    origin); `longer` is by how many characters chosen is longer.
    """

    row: dict[str, Any]
    reason: str | None = None
    tokens: dict[str, list[int]] = field(default_factory=dict)
    gap: float | None = None
    longer: int = 0

    def answer(self, chosen: str, rejected: str) -> None:
        """Take these as the two answers."""
        self.row = {**self.row, "chosen": [assistant_message(chosen)], "rejected": [assistant_message(rejected)]}
        self.longer = len(chosen) - len(rejected)


def _as_they_are(rows: list[Any]) -> list[Any]:
    return rows


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    return [open_image(picture) for picture in row["images"]]


def _prompt(row: Mapping[str, Any]) -> Prompt:
    facts = json.loads(row["facts"]) if row["facts"] else {}
    return Prompt(row["id"], row["images"], normalise_messages(row["prompt"]), row["answer"], facts)


def step_rows(prompts: Path, offline: Path | None) -> Iterator[Pair]:
    """Rows of a run step by step: each prompt once, with the first offline pair that belongs to it, or with no answers."""
    known = {prompt.id for prompt in read_records(prompts, Prompt)}
    seen: set[str] = set()
    for pair in read_records(offline, Pair) if offline is not None else ():
        parents = [name for name in (pair.meta.get("parent"), pair.id) if name in known - seen]
        if parents:
            seen.add(parents[0])
            yield replace(pair, id=parents[0], rejected_images=[])
    for prompt in read_records(prompts, Prompt):
        if prompt.id not in seen:
            yield Pair(prompt.id, prompt.images, prompt.messages, [], [], "online_step", answer=prompt.answer,
                       facts=prompt.facts)  # fmt: skip


def load_rows(folder: Path) -> Dataset:
    """The rows that `step_rows` gave, as a dataset."""
    from datasets import Features, Image, List, load_dataset

    encoded = List(Image(decode=False))
    wanted = (*COLUMNS, "answer", "facts")
    features = Features(
        {name: encoded if "images" in name else kind for name, kind in Pair.features().items() if name in wanted}
    )
    shards = sorted(str(shard) for shard in folder.glob("data/*.parquet"))
    return load_dataset("parquet", data_files=shards, columns=list(features), features=features, split="train")


def read_settings(config: OnlineConfig) -> tuple[Any, list[Weighted], Annotator | None]:
    """TRL's arguments, losses and annotator of a run, before anything is loaded or written.

    Raises:
        ConfigError: several processes, losses on a picture that no row has, or a setting that one of the three refuses.
        ModelError: there is no tower of a name in `freeze`.
    """
    arguments: Any = training_arguments(config.trl, output=config.output, seed=config.seed)
    if arguments.world_size > 1:
        raise ConfigError(
            f"trainer.algorithm is 'online_dpo_step' and {arguments.world_size} processes run: one whose rows give no pair would "
            "wait for the others for ever. Start one process, or take rounds (online_dpo)."
        )
    check_held_out(arguments)
    check_quantised(config.model, config.lora, arguments)
    losses = read_losses(config.losses, beta=arguments.beta)
    check_settings(losses, arguments, reference="online", tokens_per_pass=None, brings_reference=False,
                   adapts=config.lora is not None)  # fmt: skip
    check_towers(config.freeze)
    pictured = [view for view in views_of(losses) if VIEWS[view].images == "rejected_images"]
    if pictured:
        raise ConfigError(
            f"losses: the views {', '.join(pictured)} look at `rejected_images`, and a row of online_dpo_step has none: answers "
            "are drawn to a prompt's own pictures, and those of offline pairs are not read. Take losses on the texts, such as "
            "[{name: text}], or train on the offline pairs with train_preference."
        )
    hiding = config.bdhs is not None
    return arguments, losses, None if hiding else read_annotator(config.annotator, config.rewards, config.margin)


def make_trainer(
    config: OnlineConfig, files: dict[str, str], read: tuple[Any, list[Weighted], Annotator | None]
) -> OnlineStepTrainer:
    """The trainer of a run, on the rows in its folder.

    Args:
        config: the run.
        files: text files by name, written beside every saved model; the base is added to them.
        read: what `read_settings` gave.
    """
    arguments, losses, annotator = read
    model = load_policy(config.model, config.lora, device=str(arguments.device))
    check_precision(model.dtype, arguments)
    files |= base_file(
        config.model.model_name_or_path, fingerprint(model), changed=bool(getattr(model, "is_quantized", False))
    )
    if config.lora is None:
        freeze(model, config.freeze)
    fly = OnTheFly(
        annotator,
        config.sampling,
        config.responses,
        config.p_offline,
        config.seed,
        config.bdhs,
        load_similarity(config.similarity) if config.bdhs is not None else None,
        config.batch_size,
    )
    trainer = OnlineStepTrainer(
        model,
        args=arguments,
        train_dataset=load_rows(config.output / "rows"),
        processing_class=load_processor(config.model),
        losses=losses,
        peft_config=config.lora.to_peft() if config.lora else None,
        files=files,
        fast_path=config.fast_path,
        fly=fly,
    )
    check_trainable(trainer.model, config.freeze)
    return trainer


def train_steps(config: OnlineConfig) -> None:
    """Train step by step, or go on from the last checkpoint, and save the policy in the output folder."""
    if config.offline is not None:
        pairs_manifest(config.offline)
    read = read_settings(config)  # bad settings are to fail before the folder is the run's
    own = {CONFIG_FILE: run_files(to_mapping(config), "")[CONFIG_FILE]}
    open_run(config.output, own, resume=config.resume, free=FREE)
    if is_finished(config.output):
        print(f"{config.output} is finished; nothing to do.")
        return
    claim_run(config.output, own)
    rows = config.output / "rows"
    write_records("online_rows", step_rows(gather_prompts(config), config.offline), output=OutputConfig(rows), record=Pair,
                  settings={"offline": config.offline is not None}, seed=config.seed)  # fmt: skip
    files = run_files(to_mapping(config), (rows / "manifest.json").read_text(encoding="utf-8"), data="data")
    trainer = make_trainer(config, files, read)
    checkpoint = open_run(config.output, trainer.files, resume=config.resume, free=FREE)
    for name, text in trainer.files.items():
        write_atomically(config.output / name, text.encode())
    claim_processes(config.output, running_processes(trainer.accelerator, config.trl), main_process=True)
    counts = {"rows_in": len(trainer.train_dataset), "rows_used": len(trainer.train_dataset)}
    print(f"{counts['rows_in']} prompts" + (f"; going on from {checkpoint.name}" if checkpoint else ""))
    train_and_save(trainer, config.output, checkpoint=checkpoint, rows=counts, counts=counts)

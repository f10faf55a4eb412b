"""What two ways of computing one step have in common: batches of ours and of TRL's, and the outcome of a training step."""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from prefalign.images import open_image
from prefalign.losses import VIEWS, read_losses
from prefalign.models import ModelConfig, freeze, load_model, load_processor
from prefalign.records import assistant_message
from prefalign.training.arguments import training_arguments
from prefalign.training.frozen import NoInputHooks
from prefalign.training.lora import LoraSettings
from prefalign.training.pairs import load_pairs
from prefalign.training.preference import PreferenceTrainer
from prefalign.training.reference import cache_reference
from prefalign.training.scoring import run
from tests.tiny_vlms import save_tiny
from tests.training_runs import make_pair, write_pairs


def as_row(pair: Any) -> dict[str, Any]:
    """A row as Arrow gives it: image blocks with a null text."""
    row = pair.to_row()
    for name in ("prompt", "chosen", "rejected"):
        row[name] = [
            {"role": turn["role"], "content": [{"type": b["type"], "text": b.get("text")} for b in turn["content"]]}
            for turn in row[name]
        ]
    return row


def trl_batch(
    processor: Any, rows: Sequence[Mapping[str, Any]], side: str = "images", max_length: int | None = None
) -> dict[str, torch.Tensor]:
    """What TRL's own collator makes of the rows with the pictures of one side."""
    examples = [
        {**{name: row[name] for name in ("prompt", "chosen", "rejected")}, "images": [open_image(x) for x in row[side]]}
        for row in copy.deepcopy(list(rows))
    ]
    return dict(DataCollatorForVisionPreference(processor, max_length=max_length)(examples))


def assert_same_inputs(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Equal to the bit; ids of padding, which no model reads, are the end of turn in TRL's batch and padding in ours."""
    assert ours.keys() == theirs.keys()
    real = theirs["attention_mask"].bool()
    for name, wanted in theirs.items():
        assert ours[name].dtype == wanted.dtype, name
        assert ours[name].shape == wanted.shape, name
        same = torch.equal(ours[name][real], wanted[real]) if name == "input_ids" else torch.equal(ours[name], wanted)
        assert same, name


# --- one training step, computed in two ways ---

LOSSES = {
    "text": ["text"],
    "visual": ["visual"],
    "text+visual": ["text", {"name": "visual", "weight": 0.5}],
    "six views": ["text", "s_vco"],
    "logits": ["text", "chip"],
}
AXES: dict[str, tuple[Any, ...]] = {
    "losses": tuple(LOSSES),
    "training": ("frozen", "tower", "lora"),
    "pictures": ("other size", "3", "1"),
    "rows": (3, 1),
    "checkpointing": (True, False),
    "reference": ("cached", "online"),
}
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """One cell of the matrix.

    Attributes:
        family: key of `tiny_vlms.BUILDERS`.
        losses: key of `LOSSES`.
        training: all but the vision tower, all with it, or an adapter.
        pictures: one, three, or one that has another size on the other side.
        rows: pairs in the batch, of different lengths.
        checkpointing: of the shared path; the other runs without.
        reference: of the shared path; the other runs it online.
    """

    family: str
    losses: str
    training: str
    pictures: str
    rows: int
    checkpointing: bool
    reference: str

    def __str__(self) -> str:
        checkpoints = "checkpoints" if self.checkpointing else "none"
        values = (self.family, self.losses, self.training, self.pictures, self.rows, checkpoints, self.reference)
        return "-".join(str(value).replace(" ", "_") for value in values)

    def possible(self) -> bool:
        """PaliGemma reads no prompt without a picture; logits over the vocabulary are not cached."""
        blind = self.family == "paligemma" and self.losses == "six views"
        return not blind and not (self.losses == "logits" and self.reference == "cached")


def all_cases(families: Sequence[str]) -> list[Case]:
    """The whole matrix of some families."""
    cases = (Case(*values) for values in itertools.product(families, *AXES.values()))
    return [case for case in cases if case.possible()]


def pairwise(families: Sequence[str]) -> list[Case]:
    """A part of the matrix in which each two values of two axes meet in some case: greedy, the same every time."""
    pairs = {case: set(itertools.combinations(enumerate(astuple(case)), 2)) for case in all_cases(families)}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(pairs, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return chosen


@dataclass
class Outcome:
    """What a training step leaves behind.

    Attributes:
        loss: of the batch.
        gradients: by parameter name.
        metrics: what TRL would log.
        magnitude: sum of |log-probs| of a row's views, from which rounding of sums follows.
        flagged: modules that run with gradient checkpointing.
    """

    loss: float
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]
    magnitude: float
    flagged: int


@dataclass
class Difference:
    """Two outcomes compared, each number beside what rounding allows.

    Attributes:
        loss: difference of the losses.
        loss_allowed: 4 * beta * eps * sum |log-probs|, and 4 eps of the loss itself.
        gradient: largest difference of any gradient, over the largest gradient.
        gradient_allowed: 1e-5, with an adapter 2e-5.
        problems: sets of gradients or metrics that differ.
    """

    loss: float
    loss_allowed: float
    gradient: float
    gradient_allowed: float
    problems: list[str]

    def holds(self) -> bool:
        """Whether the two are equal as far as rounding allows."""
        return self.loss <= self.loss_allowed and self.gradient <= self.gradient_allowed and not self.problems


def step(trainer: Any, rows: Any) -> Outcome:
    """One `training_step` on some rows, with gradient checkpointing set up as `train()` does."""
    model, args = trainer.model, trainer.args
    if args.gradient_checkpointing and not model.is_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
        if isinstance(trainer, PreferenceTrainer):
            NoInputHooks(trainer).on_train_begin(args, trainer.state, trainer.control)
    trainer.current_gradient_accumulation_steps = 1
    model.zero_grad()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    loss = trainer.training_step(model, trainer.data_collator(list(rows))).item()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    summed = max(abs(metrics.get("logps/chosen", 0.0)), abs(metrics.get("logps/rejected", 0.0)))
    return Outcome(
        loss,
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        metrics,
        summed * max(2, len(getattr(trainer, "views", ()))),
        sum(bool(getattr(module, "gradient_checkpointing", False)) for module in model.modules()),
    )


def compare(one: Outcome, two: Outcome, *, slope: float = 0.1, lora: bool = False) -> Difference:
    """How far two outcomes are apart; `two` is what counts as right, `slope` that of the loss in a log-prob, by default beta."""
    problems = []
    if one.gradients.keys() != two.gradients.keys():
        problems.append(f"gradients of {sorted(one.gradients.keys() ^ two.gradients.keys())[:4]} on one side only")
    if one.metrics.keys() != two.metrics.keys():
        problems.append(f"metrics {sorted(one.metrics.keys() ^ two.metrics.keys())} on one side only")
    sums = 4 * EPSILON * two.magnitude
    for name in sorted(one.metrics.keys() & two.metrics.keys()):
        apart = abs(one.metrics[name] - two.metrics[name])
        if not apart <= sums + 1e-5 * abs(two.metrics[name]):
            problems.append(f"{name} {one.metrics[name]} and {two.metrics[name]}")
    largest = max(gradient.abs().max().item() for gradient in two.gradients.values())
    assert largest > 1e-4, "a step without gradients proves nothing"
    apart = max(
        (one.gradients[name] - two.gradients[name]).abs().max().item()
        for name in one.gradients.keys() & two.gradients.keys()
    )
    allowed = slope * sums + 4 * EPSILON * abs(two.loss)
    return Difference(abs(one.loss - two.loss), allowed, apart / largest, 2e-5 if lora else 1e-5, problems)


def disturb(model: torch.nn.Module) -> None:
    """Move what trains away from where it is, the same way for the same names, so that policy and reference differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                spread = 0.05 * parameter.std().item() if parameter.any() else 0.02
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)


class Bench:
    """Trainers of one family's tiny model, which is loaded once.

    Args:
        family: key of `tiny_vlms.BUILDERS`.
        folder: scratch folder.
        change: changes the model's config, which is then built at random.
    """

    def __init__(self, family: str, folder: Path, change: Callable[[Any], None] | None = None):
        self.family, self.folder = family, folder
        config = ModelConfig(str(save_tiny(family, folder / "model")), device="cpu")
        self.model, self.processor = load_model(config), load_processor(config)
        if change is not None:
            changed = copy.deepcopy(self.model.config)
            change(changed)
            weights = self.model.state_dict()
            self.model = type(self.model)(changed).eval()
            self.model.load_state_dict(weights, strict=False)
        self.datasets: dict[str, tuple[Any, Any]] = {}
        self.known: dict[tuple[str, Case], Outcome] = {}

    def rows(self, pictures: str) -> tuple[Any, Any]:
        """The rows as the library reads them and as `datasets.load_dataset` does."""
        if pictures not in self.datasets:
            folder = self.folder / pictures.replace(" ", "_")
            size = (96, 30) if pictures == "other size" else (40, 48)
            write_pairs(folder, 3, images=3 if pictures == "3" else 1, rejected_size=size)
            self.datasets[pictures] = load_pairs(folder), load_dataset(str(folder), split="train")
        return self.datasets[pictures]

    def arguments(self, *, checkpointing: bool = False, **settings: Any) -> Any:
        """TRL's arguments."""
        settings = {"gradient_checkpointing": checkpointing, "disable_tqdm": True, "save_strategy": "no", **settings}
        return training_arguments(settings, output=self.folder / "run", seed=3)

    def policy(self, training: str) -> tuple[Any, dict[str, Any]]:
        """A copy of the model and what the trainer is told of its adapter."""
        model = copy.deepcopy(self.model)
        if training == "frozen":
            freeze(model, ("vision",))
        return model, {"peft_config": LoraSettings(r=4, alpha=8).to_peft()} if training == "lora" else {}

    def ours(self, case: Case, *, fast_path: str, moved: bool = True, **settings: Any) -> PreferenceTrainer:
        """Our trainer, its policy moved away from its reference once that is fixed."""
        model, adapter = self.policy(case.training)
        arguments = self.arguments(checkpointing=case.checkpointing, **settings)
        entries = [{"name": entry} if isinstance(entry, str) else entry for entry in LOSSES[case.losses]]
        trainer = PreferenceTrainer(
            model, args=arguments, train_dataset=self.rows(case.pictures)[0].select(range(case.rows)),
            processing_class=self.processor, losses=read_losses(entries, beta=arguments.beta), fast_path=fast_path,
            reference=case.reference, **adapter,
        )  # fmt: skip
        if case.reference == "cached":
            cache_reference(trainer, self.folder / "caches" / str(case), reference="tiny", verify=1, progress=False)
        if moved:
            disturb(trainer.model)
        return trainer

    def stock(self, case: Case, **settings: Any) -> DPOTrainer:
        """TRL's trainer as it is."""
        model, adapter = self.policy(case.training)
        trainer = DPOTrainer(
            model, ref_model=None if adapter else copy.deepcopy(model), args=self.arguments(**settings),
            train_dataset=self.rows(case.pictures)[1].select(range(case.rows)), processing_class=self.processor, **adapter,
        )  # fmt: skip
        disturb(trainer.model)
        return trainer

    def differences(self, case: Case) -> dict[str, Difference]:
        """The shared path against the plain one, and for the text loss against TRL's trainer."""
        right = replace(case, checkpointing=False, reference="online")
        against = ["plain"]
        if case.losses == "text" and self.family != "paligemma":  # TRL's collator prepares no prompt for PaliGemma
            against.append("trl")
        for name in against:
            if (name, right) not in self.known:
                other = self.stock(right) if name == "trl" else self.ours(right, fast_path="off")
                self.known[name, right] = step(other, other.train_dataset)
        trainer = self.ours(case, fast_path="auto")
        assert trainer.route.layout == ("mask" if self.family in ("gemma3", "paligemma") else "split")
        shared = step(trainer, trainer.train_dataset)
        assert bool(shared.flagged) == case.checkpointing
        return {name: compare(shared, self.known[name, right], lora=case.training == "lora") for name in against}


# --- log-probs of a batch, and batches that differ in one thing ---


def log_probs(trainer: PreferenceTrainer, batch: Mapping[str, Any]) -> dict[str, list[torch.Tensor]]:
    """Per view, the log-prob of each token of each row's answer."""
    with torch.no_grad():
        flat = run(trainer.model, batch)["log_probs"]
    return {view: list(flat[batch["index"][view]].split(lengths(batch, view))) for view in trainer.views}


def lengths(batch: Mapping[str, Any], view: str) -> list[int]:
    """Tokens of each row's answer."""
    return batch["answers"][VIEWS[view].answer]["mask"].sum(dim=1).tolist()


def answer_changed(batch: Mapping[str, Any], view: str, row: int | None = None) -> dict[str, Any]:
    """The batch with every token of a view's answers, or of one row's, replaced by another."""
    batch = copy.deepcopy(dict(batch))
    chosen = batch["index"][view].split(lengths(batch, view))
    for number, labels in enumerate(chosen):
        if row is not None and number != row:
            continue
        if "packed" in batch:
            layout, ids = batch["packed"]["layout"], batch["packed"]["tokens"]["input_ids"]
            layout.labels[labels] = another(layout.labels[labels])
            # the position that predicts token t holds token t - 1
            ids.view(-1)[layout.label_rows[labels[1:]]] = layout.labels[labels[:-1]]
        else:
            ids = batch["plain"]["input_ids"]
            where = batch["plain"]["completion_mask"].bool().nonzero()[labels]
            ids[where[:, 0], where[:, 1]] = another(ids[where[:, 0], where[:, 1]])
    return batch


def another(ids: torch.Tensor) -> torch.Tensor:
    """For each token id a different one that stands for no piece of a picture."""
    return 100 + (ids - 99) % 250


def ranked_rows(answers: int) -> list[dict[str, Any]]:
    """All pairs of ranked answers to one prompt."""
    texts = ["a red square", "a red square on a blue background", "a dog jumps", "the fox jumps over the lazy dog"]
    prompt = make_pair(0)
    return [
        as_row(replace(prompt, id=f"{better}-{worse}", chosen=[assistant_message(texts[better])],
                       rejected=[assistant_message(texts[worse])]))
        for better, worse in itertools.combinations(range(answers), 2)
    ]  # fmt: skip


@contextmanager
def patch_embeddings(*models: Any) -> Iterator[list[int]]:
    """What goes through the patch embeddings of these models' towers: pictures or patches, one entry each time."""
    ran: list[int] = []
    embeddings = {
        id(module): module
        for model in models
        if model is not None
        for module in model.modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d))
    }
    hooks = [module.register_forward_hook(lambda *call: ran.append(len(call[-1]))) for module in embeddings.values()]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()

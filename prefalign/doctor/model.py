"""Checks of model and loss: what trains and gets a gradient, the reference, the picture, one path against the other."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from prefalign import families
from prefalign.config import ConfigError
from prefalign.corruption import blank
from prefalign.doctor.case import Case, plain, shown
from prefalign.doctor.findings import Finding, NotExaminedError, judge, some
from prefalign.losses import VIEWS
from prefalign.losses.text import REFERENCE_FREE
from prefalign.manifest import differences
from prefalign.models import parameter_table
from prefalign.training.documents import decode
from prefalign.training.lora import check_trainable
from prefalign.training.plain_pass import unused_by_plain_pass
from prefalign.training.reference import SETTINGS_FILE, TOLERANCE, ReferenceCache, cache_settings, row_key
from prefalign.training.upkeep import audit_gradients

BLIND = 1e-4
"""Change of an answer's log-prob, in nats a token, that is rounding in float32."""
DULL = 0.02
"""Change below which the picture hardly counts."""
MOVED = (0.1, 0.9)
"""Share of weights that one step has to move: below the first the run fails, below the second it loses some."""


def check_what_trains(case: Case) -> list[Finding]:
    """Trainable parameters by tower, and nothing in a tower that is meant to stay as it is."""
    model = case.trainer.model
    parts = []
    for row in parameter_table(model)[:-1]:
        share = (
            f"{row['trainable']:,} of {row['parameters']:,}" if row["trainable"] else f"frozen ({row['parameters']:,})"
        )
        parts.append(f"{row['tower']} {share}")
    try:
        check_trainable(model, case.config.freeze)
    except ConfigError as error:
        return [judge("what trains", "; ".join(parts), fail=str(error))]
    kinds = Counter(str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad)
    return [judge("what trains", f"{'; '.join(parts)}; {', '.join(kinds)}")]


def check_lora(case: Case) -> list[Finding]:
    """Layers of the language model that the adapter reaches."""
    if case.config.lora is None:
        raise NotExaminedError("no adapter: all weights that are not frozen train")
    adapted = sorted({n.split(".lora_")[0] for n, p in case.trainer.model.named_parameters() if ".lora_" in n})
    towers = Counter(families.tower(name) for name in adapted)
    layers = case.model_config.get_text_config().num_hidden_layers
    reached = {name.split(".layers.")[1].split(".")[0] for name in adapted if families.tower(name) == "language_model"
               and ".layers." in name}  # fmt: skip
    kinds = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    where = ", ".join(f"{count} linear layers of the {tower}" for tower, count in sorted(towers.items()))
    seen = f"{where} ({', '.join(kinds)}), {len(reached)} of {layers} blocks"
    advice = (
        "lora.target_modules leaves blocks of the language model out. Is that meant?" if len(reached) < layers else ""
    )
    return [judge("lora targets", seen, warn=advice)]


def check_gradients(case: Case) -> list[Finding]:
    """Each trainable tensor gets a finite gradient that is not 0, and nothing else gets one.

    Two kinds need none: what lies behind a factor that is 0 at the start, and what the model's own forward pass leaves out.
    """
    step, model = case.step, case.trainer.model
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    moving = {name for name, gradient in step.gradients.items() if gradient.any()}
    waiting = _behind_zeros(case, moving)
    still = [name for name in trainable if name not in moving | waiting]
    unread = unused_by_plain_pass(model, case.trainer.processing_class, still) if still else set()
    without = [name for name in still if name not in unread]
    broken = [name for name, gradient in step.gradients.items() if not gradient.isfinite().all()]
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in step.gradients.values()))
    towers = Counter(families.tower(name) for name in trainable if name in moving)
    where = ", ".join(f"{count} {tower}" for tower, count in towers.items())
    seen = f"norm {norm:.3g}; {len(moving)} of {len(trainable)} trainable tensors have one ({where})"
    seen += f", {len(waiting)} lie behind a factor that starts at 0" if waiting else ""
    seen += f", {len(unread)} the model's own forward pass does not read" if unread else ""
    fail = warn = ""
    if broken:
        fail = f"Not finite: {some(broken)}. Try trainer.bf16 in place of fp16, or float32 weights."
    elif norm == 0:
        fail = "All gradients are zero, so nothing would change. The losses compare things that are the same."
    elif idle := _still_policy(case, moving):
        fail, warn = idle
    if without and not warn:
        warn = f"These get none and will not change: {some(without)}."
    if {families.tower(name) for name in still} - set(towers):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.zeros_like(parameter) if name in moving else None
        try:
            audit_gradients(model.named_parameters(), saw_pictures=any(row["images"] for row in case.rows))
        except ValueError as error:
            fail = fail or str(error)
        model.zero_grad(set_to_none=True)
    return [judge("gradients", seen, fail=fail, warn=warn)]


def _behind_zeros(case: Case, moving: set[str]) -> set[str]:
    """Tensors whose gradient comes through one that starts at 0: LoRA's A through its B, PPO's values through their head."""
    found = {name.replace("lora_B", "lora_A") for name in moving if "lora_B" in name}
    roles = getattr(case.trainer, "roles", None)
    if roles is not None and "value_head.weight" in moving and not roles.value_head.weight.any():
        found |= {name for name, _ in roles.parameters_of("value")}
    return found - moving


def _still_policy(case: Case, moving: set[str]) -> tuple[str, str] | None:
    """Of PPO, whose values get a gradient in any case: what is wrong, as failure and warning, if the policy gets none."""
    roles, kept = getattr(case.trainer, "roles", None), getattr(case.trainer, "rollout", None)
    if roles is None or kept is None or any(name in moving for name, _ in roles.parameters_of("policy")):
        return None
    fail = warn = ""
    if bool((kept.mask & (kept.advantages != 0)).any()):
        fail = (
            "No tensor of the policy gets a gradient other than 0 from tokens that have advantages: it would never change. Look "
            "at which adapter is active, and at what cuts the graph."
        )
    else:
        warn = "No token of the batch has an advantage, so the policy gets no gradient from it. See the rewards."
    return fail, warn


def check_weights_move(case: Case) -> list[Finding]:
    """The share of weights that one AdamW step of the run's learning rate changes; the model stays as it is."""
    args, gradients = case.trainer.args, case.step.gradients
    moved = total = 0
    kinds = set()
    for name, parameter in case.trainer.model.named_parameters():
        if not parameter.requires_grad or name not in gradients:
            continue
        gradient = gradients[name].to(parameter.device)
        before = parameter.detach()
        after = torch.nn.Parameter(before.clone())
        after.grad = gradient
        betas = (args.adam_beta1, args.adam_beta2)
        torch.optim.AdamW([after], args.learning_rate, betas, args.adam_epsilon, args.weight_decay).step()
        counted = gradient != 0
        total += int(counted.sum())
        moved += int((after.detach() != before)[counted].sum())
        kinds.add(str(parameter.dtype).removeprefix("torch."))
    if not total:
        raise NotExaminedError("no gradient is above zero")
    share = moved / total
    seen = f"{share:.1%} of {total:,} {'/'.join(sorted(kinds))} weights with a gradient, by a step of {args.learning_rate:g}"
    advice = (
        f"The other steps are smaller than {'/'.join(sorted(kinds))} resolves, and are lost. Train all weights in float32 "
        "(model.dtype: float32, trainer.bf16: true where the GPU has it), train an adapter, or raise trainer.learning_rate."
    )
    return [judge("weights move", seen, fail=advice * (share < MOVED[0]), warn=advice * (share < MOVED[1]))]


def check_reference(case: Case) -> list[Finding]:
    """At the start policy and reference say the same of every token."""
    if not case.trainer.needs_reference:
        raise NotExaminedError("no loss reads a reference")
    batch = case.batch(case.rows, case.collator)
    policy, reference = case.log_probs(batch, training=True), case.log_probs(batch, reference=True)
    apart = max((policy[view] - reference[view]).abs().max().item() for view in policy)
    how = (
        "adapter off"
        if case.config.lora
        else "a copy"
        if case.trainer.ref_model is not None
        else "the policy as it starts"
    )
    tokens = sum(int(batch["answers"][VIEWS[view].answer]["mask"].sum()) for view in policy)
    seen = f"{how}; log-probs of {tokens} tokens differ by {apart:.2g} at most"
    advice = (
        "Policy and reference differ before the first step, so the losses start from a difference that nobody made. Set "
        "trainer.disable_dropout to true; an adapter has to start at zero."
    )
    return [judge("policy = reference", seen, fail=advice if apart > tolerance(case) else "")]


def check_reference_cache(case: Case) -> list[Finding]:
    """Cached reference log-probs that are there already are those of this run."""
    config = case.config
    folder = config.reference_folder or config.output / "reference"
    if config.reference != "cached" or not case.trainer.needs_reference:
        raise NotExaminedError("the reference runs in every step" if case.trainer.needs_reference else "no reference")
    if not (folder / SETTINGS_FILE).is_file():
        raise NotExaminedError("none yet; the run computes it")
    wanted = json.loads(json.dumps(cache_settings(case.trainer, case.base)))
    changed = list(differences(json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")), wanted))
    if changed:
        advice = "The run refuses it. Give another reference_folder, or delete this one."
        return [judge("reference cache", f"{folder} was made otherwise: {'; '.join(changed)}", fail=advice)]
    cache = ReferenceCache(folder, tuple(case.trainer.views))
    keys = {row_key(reading.row) for reading in case.fitting}
    batch = case.batch(case.rows, case.collator)
    live = case.log_probs(batch, reference=True)
    apart = 0.0
    for number, row in enumerate(case.rows):
        if (key := row_key(row)) not in cache:
            continue
        for view, kept in cache[key].items():
            mask = batch["answers"][VIEWS[view].answer]["mask"][number].cpu()
            now = live[view][number].cpu()[mask]
            apart = max(apart, (kept - now).abs().max().item() if len(kept) == len(now) else math.inf)
    held = sum(key in cache for key in keys)
    seen = f"{held} of {len(keys)} sampled rows are there; a token of the batch differs by {apart:.2g} at most"
    advice = f"These are not this reference's numbers. Delete {folder}; it is computed anew."
    return [judge("reference cache", seen, fail=advice if apart > tolerance(case) else "")]


def check_first_loss(case: Case) -> list[Finding]:
    """The first loss is what the losses are where policy and reference are one: all margins zero."""
    trainer = case.trainer
    if not trainer.needs_reference:
        raise NotExaminedError(f"{case.step.loss:.4f}; without a reference it may start anywhere")
    if any(entry.term.logits for entry in trainer.losses):
        raise NotExaminedError(f"{case.step.loss:.4f}; a loss reads the reference's logits")
    batch = case.batch(case.rows, case.collator)
    batch["reference"] = case.log_probs(batch)
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        zero = trainer.compute_loss(trainer.model, batch).item()
    known = start_of(case)
    seen = f"{case.step.loss:.6g}; with all margins at zero {zero:.6g}" + (
        "" if known is None else f", by hand {known:.6g}"
    )
    bound = 1e-4 if case.precise else 0.02
    wanted = [zero] if known is None else [zero, known]
    wrong = any(not abs(case.step.loss - value) <= bound * max(1.0, abs(value)) for value in wanted)
    advice = "The run does not start where its losses say it does: something moves the policy or the reference before."
    return [judge("first loss", seen, fail=advice if wrong else "")]


def start_of(case: Case) -> float | None:
    """The loss at margins of zero, worked out by hand for TRL's losses that start from a constant; else None."""
    args = case.trainer.args
    half, one = math.log(2), 1.0
    constants = {
        "sigmoid": half, "sigmoid_norm": half, "robust": half, "aot": half, "aot_unpaired": half, "hinge": one,
        "apo_zero": one, "apo_down": one, "nca_pair": 2 * half, "bco_pair": 2 * half, "ipo": (0.5 / args.beta) ** 2,
        "sppo_hard": 2 * (0.5 / args.beta) ** 2,
    }  # fmt: skip
    own = {"visual": half, "two_pictures": half}
    kinds, weights = args.loss_type, args.loss_weights or [1.0] * len(args.loss_type)
    total = 0.0
    for entry in case.trainer.losses:
        if entry.name == "text" and not args.use_weighting and set(kinds) <= set(constants) - REFERENCE_FREE:
            total += entry.weight * sum(w * constants[kind] for kind, w in zip(kinds, weights, strict=True))
        elif entry.name in own:
            total += entry.weight * own[entry.name]
        else:
            return None
    return total


def check_picture(case: Case) -> list[Finding]:
    """How far the answers' log-probs move when rows are shown another row's pictures, and blank ones."""
    collator = replace(case.collator, max_length=None)
    rows = [row for row in case.rows if row["images"]]
    views = [view for view in case.trainer.views if VIEWS[view].images == "images"]
    if not rows or not views:
        raise NotExaminedError("the batch shows no pictures")
    blanks = [{**row, "images": [blank(decode(picture)) for picture in row["images"]]} for row in rows]
    swapped = [{**row, "images": found} for row in rows if (found := _others(case, row))]
    own = _answers(case, rows, collator, views)
    changes = {
        "blank": [(one - two).abs() for one, two in zip(own, _answers(case, blanks, collator, views), strict=True)]
    }
    if swapped:
        kept = [number for number, row in enumerate(rows) if _others(case, row)]
        chosen = [own[number] for number in kept]
        others = _answers(case, swapped, collator, views)
        changes["another row's"] = [(one - two).abs() for one, two in zip(chosen, others, strict=True)]
    means = {name: torch.cat(apart).mean().item() for name, apart in changes.items()}
    seen = "an answer's token moves by " + ", ".join(
        f"{value:.3g} nats with {name} picture" for name, value in means.items()
    )
    if not swapped:
        seen += "; no row of the sample has other pictures to swap with"
    fail = warn = ""
    if max(means.values()) < (BLIND if case.precise else DULL):
        fail = (
            "The answers do not depend on the pictures at all. Pictures without content, a projector without weights, or "
            "image tokens that hold nothing: look at `pictures` and at the checkpoint."
        )
    elif min(means.values()) < DULL:
        warn = "The pictures hardly count: these pairs are decided by their text. Filter them: `prefalign run filter_pairs`."
    return [judge("picture counts", seen, fail=fail, warn=warn)]


def _answers(case: Case, rows: list[Any], collator: Any, views: list[str]) -> list[torch.Tensor]:
    """Row by row the log-probs of its answers' tokens."""
    batch = case.trainer._prepare_inputs(collator(rows))
    found = case.log_probs(batch)
    return [
        torch.cat([found[view][number][batch["answers"][VIEWS[view].answer]["mask"][number]] for view in views])
        for number in range(len(rows))
    ]


def _others(case: Case, row: Any) -> list[Any]:
    """As many pictures, but others, from the next row of the sample that has them; none if there is no such row."""
    ids = [reading.row["id"] for reading in case.readings]
    start = ids.index(row["id"])
    for reading in case.readings[start + 1 :] + case.readings[:start]:
        if len(reading.row["images"]) == len(row["images"]) and shown(reading.row) != shown(row):
            return list(reading.row["images"])
    return []


def check_paths(case: Case) -> list[Finding]:
    """Log-probs, loss and gradients of the shared path against those of TRL's layout, on this batch."""
    route = case.trainer.route
    if route.layout == "plain":
        raise NotExaminedError(f"prompts are not shared: {route.reason}")
    if any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in case.trainer.model.modules()):
        raise NotExaminedError("dropout is on (trainer.disable_dropout), so no two passes agree")
    shared, other = case.step, case.take_step(plain(case.collator))
    one, two = (case.log_probs(case.batch(case.rows, how)) for how in (case.collator, plain(case.collator)))
    tokens = max((one[view] - two[view]).abs().max().item() for view in one)
    loss = abs(shared.loss - other.loss) / max(abs(other.loss), 1e-12)
    largest = max(gradient.abs().max().item() for gradient in other.gradients.values())
    same = shared.gradients.keys() == other.gradients.keys()
    apart = max((shared.gradients[n] - g).abs().max().item() for n, g in other.gradients.items()) if same else math.inf
    apart = apart / largest if largest else apart
    seen = (
        f"route {route.layout}: log-probs differ by {tokens:.1e}, the loss by {loss:.1e}, gradients by {apart:.1e} of the "
        f"largest; {shared.tokens:,} tokens in {shared.seconds:.2f} s, plain {other.tokens:,} in {other.seconds:.2f} s"
    )
    bound = 1e-4 if case.precise else 0.05
    advice = "Do not trust the fast path here: set fast_path to 'off', and report this table."
    return [judge("shared = plain", seen, fail=advice * (max(loss, apart) > bound or tokens > tolerance(case)))]


def tolerance(case: Case) -> float:
    """Largest difference of a token's log-prob that rounding explains."""
    args = case.trainer.args
    kind = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(case.trainer.model.dtype).removeprefix("torch.")
    return TOLERANCE[kind]

"""Checks of a batch of the policy's own answers: what was drawn, what it is worth, and what training on it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prefalign import families
from prefalign.doctor import model, world
from prefalign.doctor.case import peak, shown
from prefalign.doctor.drawing import DrawnCase
from prefalign.doctor.findings import Finding, NotExaminedError, judge, some
from prefalign.engines import Request
from prefalign.engines.transformers import TransformersEngine
from prefalign.online.checking import check_gap
from prefalign.online.settings import FREE
from prefalign.records import normalise_messages
from prefalign.rewards.grading import check_fit_for_rl
from prefalign.training.documents import decode
from prefalign.training.runs import CONFIG_FILE, RunError, open_run

LOOKED_AT = 8
"""Rows among which another picture is looked for."""

BLIND = 1e-4
"""Change of an answer's log-prob, in nats a token, that is rounding in float32."""


def check_prompts(case: DrawnCase) -> list[Finding]:
    """Prompts that fit, and whether they show pictures."""
    total, too_long = case.prompts
    pictured = sum(bool(row["images"]) for row in case.rows)
    seen = f"{total} prompts; {pictured} of {len(case.rows)} in the batch show pictures"
    warn = "No prompt of the batch shows a picture, so nothing visual is learned." if not pictured else ""
    if too_long:
        warn = f"These leave no room for an answer and are dropped: {some(list(too_long))}. Raise trainer.max_length."
    return [judge("prompts", seen, warn=warn)]


def check_generation(case: DrawnCase) -> list[Finding]:
    """Answers are drawn, differ and end."""
    drawn = case.drawn
    texts = [text for _, text in drawn.texts]
    if not texts:
        if not any(row.get("chosen") is None or not row["chosen"] for row in case.rows):
            raise NotExaminedError("all rows of the batch take their offline pair")
        return [judge("generation", f"no answer; {_counted(drawn.problems)}", fail=_NOTHING)]
    empty = sum(not text.strip() for text in texts)
    seen = f"{len(texts)} answers, {len(set(texts))} different, {sum(map(len, texts)) / len(texts):.0f} characters on average"
    fail = warn = ""
    if drawn.finished is not None:
        seen += f", {drawn.finished} ended by themselves"
        if not drawn.finished:
            warn = "Not one answer ends. Raise max_new_tokens, or train a model that has been through SFT."
    if empty == len(texts):
        fail = _NOTHING
    elif len(set(texts)) == 1 < len(texts):
        warn = (
            "All answers are the same text: there is nothing to learn from. Raise the temperature, look at the prompts."
        )
    return [judge("generation", seen, fail=fail, warn=warn)]


_NOTHING = (
    "The model says nothing that could be used. Look at its chat template and at what it answers (`prefalign run`)."
)


def check_worth(case: DrawnCase) -> list[Finding]:
    """Rewards or annotator say which answer is better."""
    drawn = case.drawn
    seen = f"{drawn.usable} of {drawn.asked} count"
    seen += f"; {_counted(drawn.problems)}" if drawn.problems else ""
    for name, values in drawn.scores.items():
        known = values[~values.isnan()]
        if len(known):
            seen += f"; {name} {known.mean():.3g} +- {known.std(correction=0):.2g}"
    fail = warn = ""
    if not drawn.usable:
        fail = "Nothing of the batch can be trained on: see the reasons. Look at the rewards, the annotator and the answers."
    elif drawn.usable < drawn.asked / 2:
        warn = "More than half of the batch is lost. More `responses`, a smaller `margin` or longer answers keep more."
    totals = drawn.scores.get("total", torch.empty(0))
    totals = totals[~totals.isnan()]
    if not fail and len(totals) > 1 and not float(totals.std()):
        warn = "All answers score alike, so there is nothing to learn from. Look at the reward, or draw more answers."
    return [judge("rewards", seen, fail=fail, warn=warn)]


def _counted(problems: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(problems.items()))


def check_graded(case: DrawnCase) -> list[Finding]:
    """Reward models were graded, as they are used here, and are fit to be trained against."""
    findings = []
    for entry in _learned(case.entries):
        folder = Path(entry["path"])
        problems = check_fit_for_rl(folder, entry=entry, floor=case.config.reward_floor, force=True)
        said = "; ".join(problems)
        forced = case.config.force_reward
        advice = f"{said}. Grade it (`prefalign run grade_reward_model`) or train a better one" if problems else ""
        findings.append(judge("reward graded", f"{folder}: {'unfit' if problems else 'fit'}",
                              fail=advice + ("." if advice else "") if not forced else "",
                              warn=f"{advice}; force_reward goes on all the same." if advice and forced else ""))  # fmt: skip
    if not findings:
        raise NotExaminedError("no reward model")
    return findings


def _learned(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found = [entry for entry in entries if entry.get("name") == "reward_model" and "path" in entry]
    return found + [inner for entry in entries for inner in _learned(entry.get("rewards") or [])]


def check_reference(case: DrawnCase) -> list[Finding]:
    """At the start policy and reference say the same of every token that was drawn."""
    apart = case.drawn.kl
    if apart is None:
        raise NotExaminedError("no token counts")
    exact = families.core(case.policy).dtype == torch.float32 and not (case.trainer.args.bf16 or case.trainer.args.fp16)
    advice = "Policy and reference differ before the first step, so the KL penalty pulls from the start."
    seen = f"log-probs of {case.step.tokens} drawn tokens differ by {apart:.2g} at most"
    return [judge("policy = reference", seen, fail=advice if apart > (1e-4 if exact else 0.1) else "")]


def check_engine(case: DrawnCase) -> list[Finding]:
    """The engine samples from the policy that the trainer trains."""
    if case.gap is None:
        raise NotExaminedError("engine and trainer are one, or nothing was drawn")
    check_gap(case.gap, case.bound)
    seen = f"{case.gap.tokens} tokens differ by {case.gap.largest:.2g} nats at most"
    return [judge("engine = trainer", seen)]


def check_loss(case: DrawnCase) -> list[Finding]:
    """The loss of the batch is a number."""
    taken = case.step
    seen = f"loss {taken.loss:.4g} on {taken.tokens} tokens of answers, drawn, judged and trained on in {taken.seconds:.1f} s"
    seen += peak()
    finite = bool(torch.isfinite(torch.tensor(taken.loss)))
    fail = "" if finite else "The first loss is no number. Load the weights in float32 or bfloat16 (model.dtype)."
    return [judge("one batch", seen, fail=fail)]


def check_picture(case: DrawnCase) -> list[Finding]:
    """How far the log-probs of the policy's own answers move when they are read beside another row's picture."""
    asked: list[tuple[Any, ...]] = []
    dataset = case.trainer.train_dataset
    sample = [dataset[number] for number in range(min(LOOKED_AT, len(dataset)))]
    for number, text in case.drawn.texts:
        row = case.rows[number]
        others = next((other["images"] for other in sample if len(other["images"]) == len(row["images"])
                       and shown(other) != shown(row)), None)  # fmt: skip
        if row["images"] and others and text.strip():
            asked.append((normalise_messages(row.get("messages") or row["prompt"]), row["images"], others, text))
    if not asked:
        raise NotExaminedError("the batch has no other pictures to swap with")
    if hasattr(case.trainer, "roles"):
        case.trainer.roles.activate("policy")
    engine = TransformersEngine(case.policy, case.trainer.processing_class, batch_size=len(asked))
    texts = [text for *_, text in asked]
    own, other = (
        engine.logprobs(
            [Request(str(number), one[0], [decode(image) for image in one[place]]) for number, one in enumerate(asked)],
            texts,
        )
        for place in (1, 2)
    )
    moved = torch.cat([(a - b).abs() for a, b in zip(own, other, strict=True)]).mean().item()
    seen = f"a token of an answer moves by {moved:.3g} nats with another row's picture"
    advice = "What the policy says does not depend on the pictures. Look at the checkpoint and at its projector."
    return [judge("picture counts", seen, fail=advice if moved < BLIND else "")]


def check_folder(case: DrawnCase) -> list[Finding]:
    """Whether the rounds or steps may use their folder."""
    folder = case.config.output
    try:
        open_run(folder, case.files, resume="auto", free=(*FREE, "evaluation", "evaluation_config"))
    except RunError as error:
        return [judge("output", str(folder), fail=str(error))]
    began = (folder / CONFIG_FILE).is_file()
    return [judge("output", f"{folder} " + ("holds a run with this config, which goes on" if began else "is free"))]


_DRAWN = (
    ("prompts", check_prompts),
    ("what trains", model.check_what_trains),
    ("lora targets", model.check_lora),
    ("reward graded", check_graded),
    ("one batch", check_loss),
    ("generation", check_generation),
    ("rewards", check_worth),
)
_TRAINED = (
    ("gradients", model.check_gradients),
    ("weights move", model.check_weights_move),
    ("picture counts", check_picture),
    ("device", world.check_device),
    ("disk", world.check_disk),
)
PPO_CHECKS = (*_DRAWN, ("policy = reference", check_reference), *_TRAINED, ("output", world.check_output))
ONLINE_CHECKS = (*_DRAWN, ("engine = trainer", check_engine), *_TRAINED, ("output", check_folder))

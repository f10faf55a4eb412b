"""Model card: what was published, how to use it with a picture, what it was made from, what was measured.

Every number comes from a file that a run left behind (manifest, config, evaluation, trainer state); what no file says
is said to be unknown.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

import prefalign
from prefalign import bundled
from prefalign.hub.merges import hub_ids, licences, merge_papers, merge_words
from prefalign.hub.methods import is_imitation, method_words, papers, settings_table, tags
from prefalign.hub.staging import Base
from prefalign.manifest import library_versions

USE_FULL = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo_id}", dtype="auto")
"""
USE_ADAPTER = """\
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
{base_import}
base = AutoModelForImageTextToText.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, "{repo_id}")
"""
USE_BOTH = """\
processor = AutoProcessor.from_pretrained("{repo_id}")

picture = Image.open("picture.jpg").convert("RGB")
content = [{{"type": "image", "image": picture}}, {{"type": "text", "text": "Describe this image."}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.device, dtype=model.dtype)
output = model.generate(**inputs, max_new_tokens=128)
answer = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(answer)
"""


def model_card(
    repo_id: str,
    *,
    base: Base,
    adapter: bool,
    method: str | None,
    license: str | None,
    datasets: Sequence[str],
    config: str | None,
    data: Mapping[str, Any] | None,
    merge: Mapping[str, Any] | None,
    trainer_state: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    baseline: Mapping[str, Any] | None,
    rows: Mapping[str, Any] | None,
    checked: Mapping[str, Any],
) -> str:
    """Write a model card with `model-index`.

    Args:
        repo_id: OWNER/NAME on the Hub.
        base: what it was trained from.
        adapter: whether only an adapter is published.
        method: how it was made, in words; None: as its config and the note of its merge say.
        license: Hub licence id, or None if the publisher named none.
        datasets: Hub ids of the training data.
        config: resolved training config as YAML.
        data: manifest of the training pairs or rows.
        merge: `merge.json` of a merged model.
        trainer_state: the trainer's `trainer_state.json`.
        rows: the run's `rows.json`: how many rows were used.
        evaluation: `results.json` of an evaluation of this model, with `test_set`: what it was measured on, in words.
        baseline: `results.json` of the same evaluation of its base.
        checked: report of `release_checks.verify`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name, run = repo_id.split("/")[-1], yaml.safe_load(config) if config else {}
    mixed = merge is not None and merge["stage"] != "merge_adapter"
    words = method or (merge_words(merge) if merge and not run else method_words(run))
    bases = list(dict.fromkeys([*([base.hub_id] if base.hub_id else []), *(hub_ids(merge) if mixed and merge else [])]))
    labels = ["prefalign", *(["trl"] if run else []), *tags(run), *_slugs(method or ""), *(["merge"] if merge else [])]
    card = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=bases if len(bases) > 1 else base.hub_id,
        base_model_relation=("merge" if mixed else "adapter" if adapter else "finetune") if bases else None,
        license=license,
        datasets=list(datasets) or None,
        tags=list(dict.fromkeys([*labels, *([data["stage"]] if data else [])])),
        model_name=name,
        eval_results=_eval_results(evaluation) or None,
    )
    use = USE_FULL.format(repo_id=repo_id)
    if adapter:
        shipped = base.is_scenes and base.hub_id is None
        use = USE_ADAPTER.format(
            repo_id=repo_id,
            base_import="from prefalign.scenes import base_checkpoint\n" if shipped else "",
            base="base_checkpoint()" if shipped else json.dumps(base.hub_id),
        )
    kind = "LoRA adapter" if adapter else "full weights"
    return str(
        ModelCard.from_template(
            card,
            template_str=template("model_card.md.j2"),
            name=name,
            what="A vision-language model: it takes pictures and text and answers in text. "
            + _origin(words, base, run=run, merge=merge if method is None else None, published=kind),
            snippet=(use + USE_BOTH.format(repo_id=repo_id)).strip(),
            evaluation=_evaluation_table(evaluation, baseline) if evaluation else None,
            base=base.label,
            method=words,
            published=kind,
            merged=merge_words(merge) if merge and run else None,
            nothing_trained=merge is not None and not run,
            training=settings_table(run) | _training_facts(trainer_state, rows),
            papers=[*papers(run), *(merge_papers(merge) if merge else [])],
            config=config.strip() if config else None,
            data=data_section(data) if data else None,
            checks=_check_lines(checked),
            limitations=_limitations(evaluation, base, license, run, merge),
            versions={"prefalign": prefalign.__version__, **library_versions()},
        )
    )


def _origin(words: str, base: Base, *, run: Mapping[str, Any], merge: Mapping[str, Any] | None, published: str) -> str:
    """One sentence: how it was made and from what."""
    if merge and not run:
        return f"It is {words}, without further training. It starts from {base.label}, and is published as {published}."
    how = "trained by" if is_imitation(run) else "aligned with"
    after = f"; then came {merge_words(merge)}" if merge else ""
    return f"It was {how} {words} from {base.label}{after}. It is published as {published}."


def template(name: str) -> str:
    return resources.files("prefalign.hub").joinpath(name).read_text(encoding="utf-8")


def _eval_results(evaluation: Mapping[str, Any] | None) -> list[Any]:
    from huggingface_hub import EvalResult

    if not evaluation:
        return []
    results = []
    for name, metric in evaluation["metrics"].items():
        if name.startswith("difference.") or metric.get("invalid") or not _finite(metric["value"]):
            continue
        test_set, interval = evaluation["test_set"], _interval(metric)
        results.append(
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=_slug(test_set),
                dataset_name=test_set,
                metric_type=name,
                metric_name=name,
                metric_value=metric["value"],
                metric_args={**({"ci95": interval} if interval else {}), "n": metric["n"]},
            )
        )
    return results


def _evaluation_table(evaluation: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    after, before = evaluation["metrics"], baseline["metrics"] if baseline else {}
    rows = [
        {
            "name": name,
            "n": metric["n"],
            "before": _estimate(before.get(name)),
            "after": _estimate(metric),
            "difference": _estimate(after.get(f"difference.{name}"), signed=True),
        }
        for name, metric in after.items()
        if not name.startswith("difference.")
    ]
    notes = [str(note) for note in evaluation.get("notes") or []]
    if baseline:
        settings, settings_before = _asked(evaluation), _asked(baseline)
        different = sorted(
            key for key in {*settings, *settings_before} if settings.get(key) != settings_before.get(key)
        )
        if different:
            notes.append(f"Before and after were NOT measured alike; these settings differ: {', '.join(different)}.")
        uneven = [name for name in after if name in before and after[name]["n"] != before[name]["n"]]
        if uneven:
            notes.append(f"Before and after cover different numbers of items in: {', '.join(uneven)}.")
    return {
        "lead": f"Measured on {evaluation['test_set']}.",
        "has_baseline": baseline is not None,
        "before_model": _portable(str(baseline["model"])) if baseline else "",
        "has_p": any(_finite(metric.get("p_holm")) for metric in after.values()),
        "has_difference": any(name.startswith("difference.") for name in after),
        "rows": rows,
        "notes": notes,
    }


def _asked(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that decide what was asked, not which model answered or where it wrote."""
    ignored = ("model", "output", "baseline", "batch_size", "fingerprint")
    return {key: value for key, value in (evaluation.get("settings") or {}).items() if key not in ignored}


def _training_facts(state: Mapping[str, Any] | None, rows: Mapping[str, Any] | None) -> dict[str, str]:
    facts = {}
    if rows:
        imitated = "unanswered" in rows
        too_long = "longer than max_length" if imitated else "prompt longer than max_length"
        dropped = {too_long: len(rows["too_long"]), "without a question and an answer": len(rows.get("unanswered", ()))}
        reasons = "; ".join(f"{count:,} dropped: {reason}" for reason, count in dropped.items() if count)
        used = f"{rows['rows_used']:,} of {rows['rows_in']:,}"
        facts["rows trained on" if imitated else "pairs trained on"] = f"{used} ({reasons})" if reasons else used
        if rows.get("answers_cut"):
            facts["pairs whose answers were cut to max_length"] = f"{rows['answers_cut']:,}"
    if not state:
        return facts
    facts |= {"updates": str(state.get("global_step")), "epochs": f"{state.get('epoch') or 0:.2f}"}
    logged = [entry for entry in state.get("log_history") or [] if "loss" in entry]
    if logged:
        facts["first and last logged loss"] = f"{logged[0]['loss']:.4f}, {logged[-1]['loss']:.4f}"
        for name in ("rewards/accuracies", "rewards/margins"):
            if name in logged[-1]:
                facts[f"last `{name}`"] = f"{logged[-1][name]:.4f}"
    return facts


def data_section(manifest: Mapping[str, Any]) -> dict[str, Any]:
    facts = {
        "made by": f"stage `{manifest['stage']}` of prefalign {manifest['code_version']}",
        "generator": ", ".join(f"{name} ({_portable(value)})" for name, value in manifest["models"].items())
        or "none recorded",
        "seed": str(manifest["seed"]),
        "inputs read": f"{manifest['rows_in']:,}",
        "inputs used": f"{manifest['rows_used']:,}",
        "inputs dropped": counted(manifest["dropped"]) or "none",
        "rows made": f"{manifest['rows_out']:,}",
        "SHA-256 of the input data": manifest["config"].get("data_sha256") or "not recorded",
    }
    lead = f"{manifest['rows_out']:,} rows made from {manifest['rows_used']:,} of {manifest['rows_in']:,} inputs."
    return {"lead": lead, "facts": facts, "about": stage_docstring(manifest["stage"])}


def stage_docstring(stage: str) -> str | None:
    file = bundled.stages().get(stage)
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) if file else None


def _check_lines(checked: Mapping[str, Any]) -> list[str]:
    share = f"{checked['picture_effect']:.2g}"
    lines = [
        "Logits were finite and an answer was generated.",
        f"A blank picture instead of the true one moved the next-token logits by up to {share} of the largest logit.",
    ]
    if "adapter_effect" in checked:
        lines.append(
            f"Switching the adapter off moved the logits by up to {checked['adapter_effect']:.2g} of the largest."
        )
    if checked.get("compared_tensors"):
        changed, compared = checked["changed_tensors"], checked["compared_tensors"]
        lines.append(f"{changed} of {compared} weight tensors differ from the base.")
    return lines


def _limitations(
    evaluation: Mapping[str, Any] | None,
    base: Base,
    license: str | None,
    run: Mapping[str, Any],
    merge: Mapping[str, Any] | None,
) -> list[str]:
    limits = []
    if base.is_scenes or (evaluation and evaluation["test_set"].startswith("scenes")):
        limits.append(
            "Made and measured in the synthetic scenes world only (drawn coloured shapes): the numbers say nothing about "
            "photographs, and the model is of no use outside that world."
        )
    if evaluation:
        limits.append(f"Nothing was measured beyond the table above ({evaluation['test_set']}).")
        limits.append("A difference whose interval includes zero is no evidence of a change.")
        limits.append("Whether pictures of the evaluation were also seen in training was not counted.")
    else:
        limits.append("Nothing was measured.")
    if merge and not run:
        limits.append("A mixture can lose what its parts were good at, and nothing about it makes a model safe.")
    elif is_imitation(run):
        limits.append(
            "Imitation teaches the manner of its answers too, and to state what a picture may not show; it does not make a "
            "model safe."
        )
    else:
        limits.append(
            "Preference training can make answers shorter or lose true details; it does not make a model safe."
        )
    if license is None:
        named = licences(merge) if merge else {}
        limits.append(
            f"The publisher named no licence; those of its parts apply at least "
            f"({', '.join(f'`{part}`: {name}' for part, name in named.items())})."
            if named
            else "The publisher named no licence; the base model's licence applies at least."
        )
    return limits


def _estimate(metric: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if metric is None or not _finite(metric["value"]):
        return "n/a"
    sign = "+" if signed else ""
    text = f"{metric['value']:{sign}.3f}"
    if interval := _interval(metric):
        text += f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
    if _finite(metric.get("p_holm")):
        text += f", p {metric['p_holm']:.2g}"
    return f"{text}, INVALID: {metric['invalid']}" if metric.get("invalid") else text


def _interval(metric: Mapping[str, Any]) -> list[float] | None:
    interval = metric.get("ci95")
    return list(interval) if interval and _finite(*interval) else None


def _finite(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _portable(name: str) -> str:
    """A model's or file's name without the folders of this machine."""
    return Path(name).name if Path(name).is_absolute() else name


def _slug(text: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in text.lower()).strip("-")


def _slugs(method: str) -> list[str]:
    known = ("dpo", "sft", "rdpo", "mdpo", "ipo", "kto", "online-dpo", "ppo", "lora")
    words = set(_slug(method).split("-"))
    return [name for name in known if name in words or name in _slug(method)]

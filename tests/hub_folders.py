"""Folders that the publishing tests publish: pairs, a full-weight run, an adapter, evaluations."""

import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from prefalign.images import encode_png
from prefalign.records import Pair, assistant_message, user_message
from prefalign.store import OutputConfig, write_records
from tests.tiny_vlms import picture

SECRET = "hf_" + "Ab1" * 9


def save_pairs(folder: Path) -> Path:
    """Five rows of three pictures in three shards, and a quarantined one."""
    rows = [
        Pair(
            id=f"row{n}",
            images=[encode_png(picture(n // 2), "p.png")],
            prompt=[user_message("what is in the image ?", images=1)],
            chosen=[assistant_message("a red square" if n else "a fox")],
            rejected=[assistant_message("a lazy dog")],
            method="bdhs",
            meta={"generator": "scenes-base", "seed": 3},
            margin=float(n),
        )
        for n in range(5)
    ]
    write_records("bdhs", rows, output=OutputConfig(folder, block_size=2), record=Pair, settings={"share": 0.9}, seed=3)
    (folder / "quarantine").mkdir()
    (folder / "quarantine" / "00000.jsonl").write_text("{}\n")
    return folder


def save_trained(folder: Path, base: Path, pairs: Path) -> Path:
    """A full-weight run: weights other than the base's, and all the files that must not be published."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    weights["language_model.lm_head.weight" if "language_model.lm_head.weight" in weights else "lm_head.weight"] += 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model": {"model_name_or_path": str(base)}, "pairs": str(pairs), "trainer": {"beta": 0.2}}
    (folder / "prefalign_config.yaml").write_text(yaml.safe_dump(config))
    shutil.copyfile(pairs / "manifest.json", folder / "pairs_manifest.json")
    log = [{"loss": 0.6931, "step": 1}, {"loss": 0.5, "rewards/accuracies": 0.75, "step": 4}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 2.0, "log_history": log}))
    (folder / "rows.json").write_text(
        json.dumps({"rows_in": 5, "rows_used": 4, "too_long": {"row2": 900}, "answers_cut": 0})
    )
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    (folder / "checkpoint-4").mkdir()
    torch.save({"state": 1}, folder / "checkpoint-4" / "optimizer.pt")
    return folder


def save_adapter(base: Path, folder: Path, *, spread: float) -> Path:
    """A LoRA on `base`; `spread` is the width of lora_B (0: as before training, a no-op)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_().mul_(spread)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(base).save_pretrained(folder)
    return folder


def save_evaluations(folder: Path) -> Path:
    """`after` and `before`, 0.2 and 0.3 in `chair_i`."""
    for name, value in (("after", 0.2), ("before", 0.3)):
        metrics = {
            "chair_i": {"value": value, "ci95": [value - 0.04, value + 0.04], "n": 120},
            "recall": {"value": 0.5, "ci95": [0.4, 0.6], "n": 120},
            "no_items": {"value": None, "ci95": None, "n": 0, "invalid": "not defined"},
            "patchy": {"value": 0.7, "ci95": None, "n": 9, "invalid": "5 % of the items are missing"},
        }
        if name == "after":
            metrics["difference.chair_i"] = {"value": -0.1, "ci95": [-0.15, -0.05], "n": 120, "p_holm": 0.004}
        results = {"model": f"/somewhere/else/{name}", "settings": {"max_new_tokens": 512},
                   "metrics": metrics, "notes": ["greedy answers"]}  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "results.json").write_text(json.dumps(results))
        rows = [json.dumps({"eval": "chair", "group": f"scene-0-test_fair-{n:06d}"}) for n in range(3)]
        (folder / name / "items.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target

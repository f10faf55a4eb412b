"""Set-ups of `prefalign doctor`, healthy and broken, shared by its tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny_vlms import picture

from prefalign import bundled, config
from prefalign.doctor import Finding, case
from prefalign.images import encode_png
from prefalign.records import Pair, assistant_message, user_message
from prefalign.store import OutputConfig, write_records

STAGE = bundled.load_stage("train_preference")
COLOURS = ("red", "blue", "green", "white", "black", "grey", "pink", "brown")
LORA = {"lora": {"r": 4, "alpha": 8}}


def pair(number: int, **more: Any) -> Pair:
    """A pair with answers of like lengths."""
    mine, other = COLOURS[number % 8], COLOURS[(number + 3) % 8]
    values = {
        "id": f"pair-{number}",
        "images": [encode_png(picture(number))],
        "rejected_images": [encode_png(picture(100 + number))],
        "prompt": [user_message("what is in the picture" + " now" * (number % 3) + " ?", 1)],
        "chosen": [assistant_message(f"a {mine} square")],
        "rejected": [assistant_message(f"a {other} circle")],
        "method": "test",
    }
    return Pair(**{**values, **more})


def write(folder: Path, pairs: Sequence[Pair]) -> Path:
    """A finished pairs folder."""
    write_records("test", pairs, output=OutputConfig(folder, block_size=5), record=Pair, settings={}, seed=0)
    return folder


def settings(checkpoint: Path, pairs: Path, output: Path, **changes: Any) -> Any:
    """The recipe's config: full training on the CPU, batches of 4; changes are merged into the defaults."""
    usual = {
        "model": {"model_name_or_path": str(checkpoint), "device": "cpu"},
        "pairs": str(pairs),
        "output": str(output),
        "trainer": {"learning_rate": 1e-4, "per_device_train_batch_size": 4, "max_steps": 4, "disable_tqdm": True},
    }
    return config.build(STAGE.Config, config.merge(usual, changes))


def prepare(checkpoint: Path, pairs: Path, folder: Path, **changes: Any) -> case.Case:
    """A case whose run would write into `folder/run`."""
    chosen = settings(checkpoint, pairs, folder / "run", **changes)
    return case.prepare(chosen, rows=64, scratch=folder / "scratch")


def edited(checkpoint: Path, folder: Path, *, template: str | None = None, **files: dict[str, Any]) -> Path:
    """A copy of a checkpoint with JSON files changed, and another chat template."""
    made = shutil.copytree(checkpoint, folder)
    for name, changes in files.items():
        file = made / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    if template is not None:
        (made / "chat_template.jinja").write_text(template)
    return made


def template_of(checkpoint: Path) -> str:
    """The chat template of a checkpoint."""
    return (checkpoint / "chat_template.jinja").read_text()


def changed_weights(checkpoint: Path, folder: Path, part: str, value: float) -> Path:
    """A copy of a checkpoint whose tensors with `part` in their name hold one value."""
    made = shutil.copytree(checkpoint, folder)
    tensors = load_file(made / "model.safetensors")
    assert any(part in name for name in tensors)
    for name, tensor in tensors.items():
        if part in name:
            tensor.fill_(value)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


def only(findings: Sequence[Finding]) -> Finding:
    """The one finding of a check."""
    [finding] = findings
    return finding


def by_name(findings: Sequence[Finding]) -> dict[str, Finding]:
    """Findings by the name of their check."""
    return {found.check: found for found in findings}

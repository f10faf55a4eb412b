"""What must hold before anything is pushed: it loads in a fresh process, the picture and the adapter matter, nothing leaks.

`python -m prefalign.hub.release_checks FOLDER` is the fresh process: it knows nothing but the folder (and, for an adapter,
the base) and prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from prefalign.models import ModelConfig

SECRETS = {
    "Hugging Face token": re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}"),
    "API key": re.compile(r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}"),
    "AWS key": re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    "AWS secret": re.compile(r"(?i)aws_secret_access_key[\"']?\s*[:=]\s*[\"']?([A-Za-z0-9/+=]{30,})"),
    "GitHub token": re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})"),
    "authorization header": re.compile(r"(?i)authorization[\"']?\s*[:=]\s*[\"']?bearer\s+(\S{8,})"),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "secret": re.compile(r"(?i)(?:api[_-]?key|password|secret)[\"']?\s*[:=]\s*[\"']?([A-Za-z0-9_/+-]{20,})"),
}
ROOTS = "home|Users|root|tmp|mnt|scratch|workspace|work|var|opt|srv|media|private|Volumes|kaggle"
WINDOWS_ROOTS = r"Users|Documents|Program Files|Windows|Temp|data|projects|work|home"
ABSOLUTE_PATH = re.compile(
    rf"(?<![\w.~-])/(?:{ROOTS})/[^\s\"'`,;)\]}}]+|(?<![A-Za-z0-9])[A-Za-z]:\\{{1,2}}(?:{WINDOWS_ROOTS})\\[^\s\"']*"
)
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "vocab.txt")
TEXT_SUFFIXES = (".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".jinja", ".py", ".csv")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
ROW_PATH_COLUMNS = ("images", "rejected_images", "meta", "facts", "responses")
ANSWERS = ("text", "earlier", "unstripped", "unstripped_earlier")
"""What a response holds of the model's words (`responses`)."""
QUESTION = "Describe this image."
SMALLEST_CHANGE = 1e-6


class CheckError(ValueError):
    """Something is wrong with what was going to be published; nothing has been pushed."""


def scan_folder(folder: Path) -> list[str]:
    """Look for pickles, secrets and absolute paths in every file of a staged folder.

    Returns:
        One line per finding: file, line, kind, masked value. Vocabularies are not searched for paths (their entries are
        pieces of text such as `/home/`).
    """
    findings = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if file.suffix in PICKLE_SUFFIXES:
            findings.append(f"{name}: a pickle file, which runs code when it is opened; save with safetensors")
        elif file.suffix in TEXT_SUFFIXES:
            with file.open(encoding="utf-8", errors="replace") as stream:
                for number, line in enumerate(stream, 1):
                    found = scan_text(line, paths=file.name not in VOCABULARIES)
                    findings += [f"{name} line {number}: {finding}" for finding in found]
    return findings


def scan_row(row: Mapping[str, Any]) -> list[str]:
    """Look for secrets in all text of a data row, and for absolute paths where rows keep provenance and file names.

    What a model answered may show a path: it is not looked for in texts of answers, those in `responses` among them.
    """
    findings = []
    for column, value in row.items():
        for text, paths in _cells(column, value):
            findings += [f"column {column}: {finding}" for finding in scan_text(text, paths=paths)]
    return findings


def _cells(column: str, value: Any) -> Iterator[tuple[str, bool]]:
    """Texts of a row's column, each with whether paths are looked for in it."""
    if column == "responses" and isinstance(value, str):
        for response in json.loads(value):
            for name, item in response.items():
                yield from ((text, name not in ANSWERS) for text in _strings(item))
    else:
        yield from ((text, column in ROW_PATH_COLUMNS) for text in _strings(value))


def scan_text(text: str, *, paths: bool = True) -> list[str]:
    """Findings in a piece of text: the kind and the masked value, never the value itself."""
    findings = [
        f"{kind} {mask(match.group(match.lastindex or 0))}"
        for kind, pattern in SECRETS.items()
        for match in pattern.finditer(text)
    ]
    if paths:
        findings += [f"absolute path {mask(match.group(), keep=12)}" for match in ABSOLUTE_PATH.finditer(text)]
    return findings


def mask(value: str, keep: int = 4) -> str:
    """The first characters and the length of a value that must not be repeated."""
    return f"{value[:keep]}... ({len(value)} characters)"


def refuse(findings: list[str]) -> None:
    """Raise with every finding.

    Raises:
        CheckError: if there is one.
    """
    if findings:
        shown = "\n  ".join(findings[:20]) + (f"\n  and {len(findings) - 20} more" if len(findings) > 20 else "")
        raise CheckError(
            f"nothing was published, because the folder holds what should not leave this machine:\n  {shown}\n"
            "Take these out of the folder's own files (README.md is written from its config, manifest and evaluation), "
            "replace any key that was written to disk, and publish again."
        )


def in_fresh_process(folder: Path, *, base: str | None = None, picture: Path | None = None) -> dict[str, Any]:
    """Run `verify` in a new Python process.

    Raises:
        CheckError: with the process's own message, or the end of its traceback.
    """
    command = [sys.executable, "-m", "prefalign.hub.release_checks", str(folder)]
    command += ["--base", base] if base else []
    command += ["--picture", str(picture)] if picture else []
    package = str(Path(__file__).parent.parent.parent)
    search = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search}, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        start = next((number for number, line in enumerate(lines) if line.startswith("refused: ")), len(lines) - 5)
        why = "\n  ".join(lines[max(start, 0) :]).removeprefix("refused: ").replace(str(folder), "the folder")
        raise CheckError(f"nothing was published, because the folder failed in a fresh process: {why}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def verify(folder: Path, *, base: str | None = None, picture: Path | None = None) -> dict[str, Any]:
    """Load a staged folder as its users will, and check that it works.

    Args:
        folder: a staged model, adapter or data set.
        base: path or Hub id of an adapter's base; for full weights a local base to tell them from, if there is one.
        picture: picture to ask about; a drawn one if None.

    Returns:
        Measured numbers: for models `text`, `picture_effect`, `adapter_effect` or `changed_tensors`, `fingerprint`;
        for data sets `columns`.

    Raises:
        CheckError: says what does not work.
    """
    if (folder / "data").is_dir():
        return _verify_dataset(folder)
    import torch

    processor = _load_processor(folder)
    model = _load_model(folder, base)
    true = _sample_picture() if picture is None else _open(picture)
    blank = _blank(true)
    with torch.inference_mode():
        inputs = _encode(processor, true, model)
        try:
            logits = model(**inputs).logits.float()
        except ValueError as error:
            raise CheckError(
                f"the model cannot read a picture as its processor gives it ({_first_line(error)}). Publish the processor that "
                "the model was trained with, and a chat template that shows the picture."
            ) from error
        if not torch.isfinite(logits).all():
            raise CheckError("the model gives NaN or infinite logits on a sample picture; the weights are broken.")
        without = model(**_encode(processor, blank, model)).logits.float()
        picture_effect = _change(logits[:, -1], without[:, -1])
        if picture_effect <= SMALLEST_CHANGE:
            raise CheckError(
                "the next-token logits are the same for a sample picture and for a blank one, so the model does not see "
                "pictures. Check that the processor puts image tokens into the prompt and that the vision tower was saved."
            )
        answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = processor.decode(answer, skip_special_tokens=True)
        if not text.strip():
            raise CheckError(
                f"the model answers {QUESTION!r} on a sample picture with nothing at all ({len(answer)} token(s)). "
                "Check the chat template and the end-of-sequence token."
            )
        report: dict[str, Any] = {
            "text": text,
            "picture_effect": picture_effect,
            "fingerprint": _fingerprint(folder, base, model),
        }
        if (folder / "adapter_config.json").is_file():
            with model.disable_adapter():
                report["adapter_effect"] = _change(logits, model(**inputs).logits.float())
            if report["adapter_effect"] <= SMALLEST_CHANGE:
                raise CheckError(
                    "the adapter is a no-op: logits with it and without it are the same. It was not trained, or its "
                    "weights do not fit this base (look for `Found missing adapter keys` when it is loaded)."
                )
        elif base is not None:
            report["compared_tensors"], report["changed_tensors"] = _compare_weights(folder, Path(base))
    return report


def _verify_dataset(folder: Path) -> dict[str, Any]:
    from datasets import load_dataset

    rows = load_dataset(str(folder), split="train", streaming=True)
    first = next(iter(rows))
    for column in ("images", "rejected_images"):
        for image in first.get(column) or []:
            image.load()
    return {"columns": list(first)}


def _load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    advice = "Save the processor beside the model: `processor.save_pretrained(folder)`."
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"the processor does not load ({_first_line(error)}). {advice}") from error
    parts = [part for part in ("tokenizer", "image_processor") if getattr(processor, part, None) is None]
    if parts:
        raise CheckError(
            f"the folder has no complete processor: {type(processor).__name__} lacks {' and '.join(parts)}, so no one "
            f"could show the model a picture. {advice}"
        )
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise CheckError(f"the processor has no chat template, so servers refuse messages. {advice}")
    return processor


def _named(folder: Path, base: str | None) -> ModelConfig:
    """The folder as engines name it: an adapter is put on its base."""
    from prefalign.models import ModelConfig

    adapter = (folder / "adapter_config.json").is_file()
    return ModelConfig(str(base), adapter=str(folder)) if adapter else ModelConfig(str(folder))


def _load_model(folder: Path, base: str | None) -> Any:
    from prefalign.models import load_model

    try:
        return load_model(_named(folder, base))
    except Exception as error:
        raise CheckError(f"the model does not load ({type(error).__name__}: {_first_line(error)})") from error


def _fingerprint(folder: Path, base: str | None, model: Any) -> str:
    """That of an engine on the folder."""
    from prefalign.models import fingerprint, load_processor
    from prefalign.processors import engine_fingerprint

    return engine_fingerprint(fingerprint(model), load_processor(_named(folder, base)))


def _encode(processor: Any, picture: Image.Image, model: Any) -> Any:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    except Exception as error:
        raise CheckError(
            f"the processor cannot encode a picture ({type(error).__name__}: {_first_line(error)})."
        ) from error
    return inputs.to(model.device, dtype=model.dtype)


def _change(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference of two logit tensors of one shape, as a share of the largest logit."""
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-12))


def _compare_weights(folder: Path, base: Path) -> tuple[int, int]:
    """Count tensors of full weights that the base has too, and those of them that differ."""
    from safetensors import safe_open

    where = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            where.update(dict.fromkeys(tensors.keys(), file))
    compared = changed = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in list(tensors.keys()):
                if name not in where:
                    continue
                with safe_open(where[name], framework="pt") as before:
                    compared += 1
                    changed += not before.get_tensor(name).float().equal(tensors.get_tensor(name).float())
    if compared and not changed:
        raise CheckError(
            f"all {compared} weight tensors are those of the base {base.name}: nothing was learned, or the wrong folder "
            "was given."
        )
    return compared, changed


def _sample_picture() -> Image.Image:
    """A red disc and a blue square on white, 96 x 96."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((8, 8, 48, 48), fill="red")
    draw.rectangle((54, 50, 88, 84), fill="blue")
    return picture


def _open(picture: Path) -> Image.Image:
    from prefalign.images import open_image, read_image

    return open_image(read_image(picture))


def _blank(picture: Image.Image) -> Image.Image:
    from PIL import Image

    return Image.new("RGB", picture.size, (128, 128, 128))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:500]


def main() -> int:
    """The fresh process."""
    parser = argparse.ArgumentParser(
        prog="python -m prefalign.hub.release_checks", description="Check a staged folder."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", help="path or Hub id of the base model")
    parser.add_argument("--picture", type=Path, help="picture to ask about")
    arguments = parser.parse_args()
    try:
        report = verify(arguments.folder, base=arguments.base, picture=arguments.picture)
    except CheckError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

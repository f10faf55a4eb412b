"""Rows with traps across blocks, stages of a few lines, and folders to compare: for tests of several processes at one stage."""

import json
from pathlib import Path

from PIL import Image

from prefalign import bundled, config
from prefalign.execution import Shard, sharded
from prefalign.records import Prompt
from prefalign.scenes.export import export
from prefalign.store import OutputConfig, read_records, write_records

STAGE = '''"""Answers in capitals.

A stage for tests: without a model, and with a mishap at one row.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from prefalign import store
from prefalign.records import Pair, assistant_message
from prefalign.sources import DataConfig
from prefalign.store import OutputConfig


@dataclass
class Config:
    data: DataConfig
    output: OutputConfig
    mishap: str = "none"
    at: str = "r07"
    marks: Path = Path(".")


def main(config):
    if config.mishap == "start":
        raise ValueError("there is no such model. Name another.")
    if config.mishap == "die_at_start":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.mishap == "moved":
        raise ValueError(f"{config.data.path} is read at {config.data.revision}.")
    settings = {"pid": os.getpid()} if config.mishap == "differ" else {}
    def process(block):
        if any(prompt.id.startswith(config.at) for prompt in block):
            befall(config)
        for prompt in block:
            yield [Pair(id=f"pair-{prompt.id}", images=prompt.images, prompt=prompt.messages, method="test",
                        chosen=[assistant_message(prompt.answer.upper())], rejected=[assistant_message("no")])]
    done = store.run_stage("capitals", config.data, process, output=config.output, record=Pair, settings=settings, seed=0)
    if config.mishap == "two":
        again = OutputConfig(config.output.path / "again", config.output.block_size)
        done = store.run_stage("capitals", config.data, process, output=again, record=Pair, settings={"again": 1}, seed=0)
    return done


def befall(config):
    marks = len(list(config.marks.glob("mark-*")))
    if config.mishap in ("die_once", "die", "hang"):
        (config.marks / f"mark-{os.getpid()}").touch()
    if config.mishap == "die" or (config.mishap == "die_once" and not marks):
        os.kill(os.getpid(), signal.SIGKILL)
    while config.mishap == "hang" and not marks:
        time.sleep(0.05)
    if config.mishap == "differ":
        time.sleep(60)  # until the other actor is there and the driver ends both
    if config.mishap == "refuse":
        raise ValueError(f"{config.at} cannot be done. Leave it out.")
    if config.mishap == "bug":
        raise KeyError("unforeseen")


if __name__ == "__main__":
    from prefalign.cli import run_file

    run_file(__file__)
'''


def write_stage(folder: Path) -> Path:
    """The stage above as a file."""
    file = folder / "capitals.py"
    file.write_text(STAGE)
    return file


def write_rows(folder: Path, rows: int = 22) -> Path:
    """Rows `r00`, `r01`, ...; among them, blocks apart, a duplicate (of r01), two contents of one id (r04), a row without a
    picture file, a broken line, and rows without id of which two are the same."""
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (4, 4), (number * 80, 0, 0)).save(folder / f"{number}.png")
    known = [
        {
            "id": f"r{number:02}",
            "image": f"{number % 3}.png",
            "question": f"Question {number}?",
            "answer": f"Yes {number}.",
        }
        for number in range(rows)
    ]
    known[9] |= {"image": "none.png"}
    known[13] = known[1]
    known[17] = known[4] | {"answer": "Another."}
    for number in (3, 19):
        known[number] = {"image": "1.png", "question": "Without an id?", "answer": "Yes."}
    lines = [json.dumps(row) for row in known]
    lines[11] = '{"id": "torn'
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def files(folder: Path) -> dict[str, bytes]:
    """Every file of an output folder but hidden ones."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def prompts_with_a_duplicate(folder: Path) -> None:
    """Ten prompts of the embedded world, and the second of them once more."""
    export(folder.with_name("scenes"), split="train_biased", kind="caption", start=0, stop=10)
    prompts = list(read_records(folder.with_name("scenes"), Prompt))
    write_records("t", [*prompts, prompts[1]], output=OutputConfig(folder), record=Prompt, settings={}, seed=0)


def scenes_config(stage, name, data, folder):
    """The config of a stage on the embedded world, for blocks of three rows and short answers."""
    known = {"data": {"path": str(data)}, "output": {"path": str(folder), "block_size": 3}}
    short = {"sampling": {"max_new_tokens": 16}} if name == "sample_responses" else {"max_new_tokens": 64}
    scenes = config.read_yaml(bundled.find(f"datagen/{name}_scenes"))
    return config.build(stage.Config, config.merge(scenes, known | short))


def settings(stage, rows, folder, *, mishap="none", marks=".", **output):
    output = {"path": folder, "block_size": 3} | output
    return config.build(
        stage.Config, {"data": {"path": rows}, "output": output, "mishap": mishap, "marks": str(marks), "at": "r06"}
    )


def start(stage, asked, number=0, count=1):
    with sharded(Shard(number, count)):
        return stage.main(asked)

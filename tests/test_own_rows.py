"""Rows of one's own with the bundled configs: their pictures are not looked for in its folder; the README's commands work."""

import json
import re
import shlex
from pathlib import Path

import pytest

from prefalign import bundled, cli, config, execution, sources
from prefalign.manifest import read_manifest
from prefalign.records import Pair
from prefalign.scenes import world
from prefalign.store import read_records
from tests.stand_in_server import MODEL

README = (Path(__file__).parent.parent / "README.md").read_text()
FOLDERS = {name for name, file in bundled.configs().items() if config.stated(file, "data.images")}
GRADES = json.dumps({"helpfulness": 3, "correctness": 1, "coherence": 4, "complexity": 1, "verbosity": 2})
ROWS = ["--data.path", "rows.jsonl"]


def stage_of(name):
    """The stage that a config is for, by the command in its header."""
    return bundled.load_stage(re.search(r"prefalign run (\w+)", bundled.configs()[name].read_text()).group(1))


def readme_commands(stage):
    """The README's commands that run a stage on rows of one's own, as argument lists."""
    lines = re.findall(rf"^prefalign (run {stage} --config configs/.*)$", README.replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Two rows whose pictures lie beside them, in the folder that the user is in."""
    monkeypatch.chdir(tmp_path)
    asked = {"question": "What is there?", "answer": "A large red square at the top left."}
    for name in ("a", "b"):
        Path(f"{name}.png").write_bytes(world.png(world.scene("test_fair", ord(name))))
    Path("rows.jsonl").write_text("".join(json.dumps({"id": n, "image": f"{n}.png", **asked}) + "\n" for n in "ab"))


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_other_rows_leave_the_folder_of_a_bundled_config(name):
    def images(*given, chosen=name):
        return bundled.resolve(name, stage_of(name), ["--config", chosen, *given]).data.images

    folder = Path(config.stated(bundled.find(name), "data.images"))
    assert images() == folder
    assert images("--data.limit", "3") == folder
    for given in (ROWS, ["--data", "{path: rows.jsonl}"], ["--data.path=openbmb/RLAIF-V-Dataset"]):
        assert images(*given) is None
    assert images(*ROWS, "--data.images", "photos", chosen=f"configs/{name}.yaml") == Path("photos")


def test_a_config_of_ones_own_keeps_its_folder(tmp_path):
    own = tmp_path / "bdhs.yaml"
    own.write_text(bundled.find("datagen/bdhs").read_text())
    resolved = bundled.resolve("bdhs", stage_of("datagen/bdhs"), ["--config", str(own), *ROWS])
    assert resolved.data.images == Path("data/coco/train2014")
    with pytest.raises(ValueError, match="data.images is 'data/coco/train2014', and there is no such folder"):
        sources.files_of(resolved.data)


def test_the_readmes_commands_find_the_rows(rows):
    given = [command for stage in ("quality_pairs", "rlaif_v") for command in readme_commands(stage)]
    assert len(given) == 3
    for _, stage, *rest in given:
        _, rest = execution.take_options(rest)
        resolved = bundled.resolve(stage, bundled.load_stage(stage), rest)
        assert sources.files_of(resolved.data) == [Path("rows.jsonl")]


def test_the_readmes_server_answers_and_judges(rows, server):
    [command] = readme_commands("quality_pairs")
    known = {"http://localhost:8000/v1": server.url, "my-vlm": MODEL, "my-judge": "other"}
    line = "\n".join(command)
    for name, value in known.items():
        assert name in line
        line = line.replace(name, value)
    server.words = {"Grade": GRADES}
    assert cli.main(line.split("\n")) == 0
    assert read_manifest(Path("runs/quality/answers")).rows_used == 2
    asked = {(one.name, one.body["model"]) for one in server.asked}
    assert asked == {("What", MODEL), ("Grade", "other")}
    assert server.answers()["What"] == 8 <= server.answers()["Grade"]  # some are graded twice


def test_pictures_beside_the_rows_are_read_and_missing_ones_told(rows, capsys):
    command = ["run", "povid", "--config", "configs/datagen/povid.yaml", *ROWS, "--editor", "rules"]
    assert cli.main([*command, "--output.path", "out"]) == 0
    [first, second] = read_records(Path("out"), Pair)
    assert first.images[0]["bytes"] == Path("a.png").read_bytes() != second.images[0]["bytes"]
    Path("a.png").unlink()
    Path("b.png").unlink()
    assert cli.main([*command, "--output.path", "gone"]) == 1
    assert "say where pictures are with `data.images`" in capsys.readouterr().err

"""Data sets of the Hub read in streaming, against a stand-in server: rows, pictures, what is fetched, resume, errors."""

import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from PIL import Image

from prefalign.images import encode_png
from prefalign.manifest import read_manifest
from prefalign.records import Pair, message_text
from prefalign.sources import DataConfig, files_of, read_rows, to_pair
from prefalign.store import read_records
from tests.published_sets import BAD, GOOD, PAIRED, QUESTION, ROWS, pictures
from tests.stand_in_hub import TOKEN, Repository, StandInHub
from tests.tiny_vlms import picture

STEPS = """
import json, sys
from pathlib import Path
from prefalign import bundled, cli, sources
from prefalign.sources import DataConfig

done = []
for step in json.loads(sys.argv[1]):
    kind, name, settings = step
    try:
        if kind == "import":
            stage = bundled.load_stage("import_published")
            data, output = DataConfig(Path(name), **settings["data"]), settings["output"]
            data.images = data.images and Path(data.images)
            stage.main(stage.Config(data, stage.OutputConfig(Path(output), block_size=3)))
            done.append("finished")
        elif kind == "forget":
            for file in settings:
                Path(name, file).unlink()
            done.append(Path(name, "data/train-00000.parquet").stat().st_mtime_ns)
        elif kind == "same":
            read = getattr(sources, settings["how"])
            known, streamed = (DataConfig(Path(path)) for path in (settings["file"], name))
            found = [[read(row, data) for row in sources.read_rows(data)] for data in (known, streamed)]
            done.append(len(found[0]) if found[0] == found[1] else repr(found))
        elif kind == "survey":
            total, repeated = sources.survey(DataConfig(Path(name), **settings))
            done.append([total, "1" in repeated, "2" in repeated])
        elif kind == "check":
            sources.files_of(DataConfig(Path(name), **settings))
            done.append(sources.fingerprint(DataConfig(Path(name), **settings)))
    except (ValueError, RuntimeError) as error:
        done.append(f"{type(error).__name__}: {error}")
print(json.dumps(done))
"""


def steps(server, where, *wanted):
    """What came of each step, in one new process that may talk to the server alone."""
    done = subprocess.run([sys.executable, "-c", STEPS, json.dumps(wanted)], cwd=where, capture_output=True, text=True,
                          env=server.environment(where / "cache"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def as_parquet(rows, **settings):
    """Rows with encoded pictures as one Parquet file, with the column types of a data set of the Hub."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    kinds = {int: Value("int64"), str: Value("string"), dict: Picture()}
    features = Features({name: kinds[type(value)] for name, value in rows[0].items()})
    buffer = io.BytesIO()
    Dataset.from_list(rows, features=features).to_parquet(buffer, **settings)
    return buffer.getvalue()


def rlhf_v(number):
    said = {"question": f"{QUESTION} {number}", "chosen": GOOD, "rejected": BAD}
    return {
        "image": encode_png(picture(number), f"{number}.png"),
        "idx": number,
        "text": json.dumps(said),
        "ds_name": "RLHF-V",
    }


def noisy(number):
    """A row of which a picture of 400 kB is nearly all."""
    noise = Image.frombytes("RGB", (365, 365), random.Random(number).randbytes(365 * 365 * 3))
    return {**rlhf_v(number), "image": encode_png(noise, f"{number}.png")}


@pytest.fixture(scope="module")
def hub():
    """`tester/rlhf_v` of ten rows in two shards and a test split; `tester/large`, 24 MB; `tester/files`, pictures as files."""
    rows = [rlhf_v(number) for number in range(10)]
    source = random.Random(0)
    large = [{"image": {"bytes": source.randbytes(6_000_000), "path": "x.png"}, "question_id": n, "question": QUESTION}
             for n in (1, 2, 1, 3)]  # fmt: skip
    lines = [
        {**ROWS["povid"][0], "id": str(n), "image": name}
        for n, name in enumerate(("pictures/a.png", "pictures/gone.png"))
    ]
    with StandInHub() as server:
        server.repositories["dataset", "tester/rlhf_v"] = Repository(False, {
            "data/train-00000-of-00002.parquet": as_parquet(rows[:5]), "data/train-00001-of-00002.parquet": as_parquet(rows[5:]),
            "data/test-00000-of-00001.parquet": as_parquet([rlhf_v(99)]),
        }, 1)  # fmt: skip
        server.repositories["dataset", "tester/large"] = Repository(
            False, {"data/train-00000-of-00001.parquet": as_parquet(large, batch_size=1)}, 1
        )
        server.repositories["dataset", "tester/files"] = Repository(False, {
            "train.jsonl": "".join(json.dumps(line) + "\n" for line in lines).encode(),
            "pictures/a.png": encode_png(picture(3))["bytes"],
        }, 1)  # fmt: skip
        noise = [noisy(number) for number in range(12)]
        server.repositories["dataset", "tester/noisy"] = Repository(
            False,
            {
                f"data/train-0000{n}-of-00002.parquet": as_parquet(noise[6 * n : 6 * n + 6], batch_size=3)
                for n in range(2)
            },
            1,
        )
        server.repositories["dataset", "tester/preferences"] = Repository(False, {
            "test.jsonl": json.dumps({"ask": QUESTION, "good": GOOD, "bad": BAD, "img": "pictures/a.png"}).encode(),
            "pictures/a.png": encode_png(picture(5))["bytes"],
        }, 1)  # fmt: skip
        many = [{**ROWS["povid"][0], "id": str(number), "image": "pictures/a.png"} for number in range(7)]
        server.repositories["dataset", "tester/lines"] = Repository(False, {
            "train.jsonl": "".join(json.dumps(line) + "\n" for line in many).encode(),
            "pictures/a.png": encode_png(picture(3))["bytes"],
        }, 1, ("v1",))  # fmt: skip
        yield server


def local(folder, files):
    """The rows of these files as pairs, read from disk."""
    folder.mkdir()
    for number, content in enumerate(files):
        (folder / f"{number}.parquet").write_bytes(content)
    data = DataConfig(folder)
    return [to_pair(row, data) for row in read_rows(data)]


@pytest.fixture(scope="module")
def ran(hub, tmp_path_factory):
    """One process that does everything: where it worked, what came of each step, by name."""
    where = tmp_path_factory.mktemp("streamed")
    images = where / "coco"
    (images / "pictures").mkdir(parents=True)
    for name, number in (("a.png", 9), ("gone.png", 8)):
        (images / "pictures" / name).write_bytes(encode_png(picture(number))["bytes"])
    (where / "tester" / "here").mkdir(parents=True)
    (where / "tester" / "here" / "rows.jsonl").write_text(json.dumps(ROWS["trl"][0]) + "\n")
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad", "images": "img"}
    entry = {"hf_hub_url": "tester/preferences", "split": "test", "ranking": True, "columns": columns}
    (where / "lf").mkdir()
    (where / "lf" / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    killed = ["manifest.json", "import.json", "progress/00002.json", "data/train-00002.parquet"]
    wanted = {
        "survey": ("survey", "tester/large", {}),
        "whole": ("import", "tester/rlhf_v", {"data": {}, "output": "out"}),
        "first": ("import", "tester/rlhf_v", {"data": {"limit": 4}, "output": "first"}),
        "test": ("import", "tester/rlhf_v@test", {"data": {"revision": "main"}, "output": "test"}),
        "files": ("import", "tester/files", {"data": {}, "output": "files"}),
        "elsewhere": ("import", "tester/files", {"data": {"images": str(images)}, "output": "elsewhere"}),
        "described": ("import", "lf/dataset_info.json@mine", {"data": {}, "output": "described"}),
        "noisy": ("import", "tester/noisy", {"data": {}, "output": "noisy"}),
        "lines": ("import", "tester/lines", {"data": {}, "output": "lines"}),
        "started": ("import", "tester/moving", {"data": {}, "output": "stopped"}),
        "stopped": ("forget", "stopped", killed),
        "gone on": ("import", "tester/moving", {"data": {}, "output": "stopped"}),
        "unknown": ("check", "tester/nothing", {}),
        "split": ("check", "tester/rlhf_v", {"split": "validation"}),
        "revision": ("check", "tester/rlhf_v", {"revision": "v9"}),
        "config": ("check", "tester/rlhf_v", {"config": "french"}),
        "configurations": ("check", "tester/configurations", {}),
        "tagged": ("import", "tester/lines", {"data": {"revision": "v1"}, "output": "tagged"}),
        "broken": ("check", "tester/broken", {}),
        "on disk": ("check", "tester/here", {}),
        "split on disk": ("check", "tester/here", {"split": "train"}),
    }
    listed = pictures(where / "coco")
    shown = {name: (listed / name).read_bytes() for name in ("a.png", "b.png")}
    for name, rows in ROWS.items():
        content = json.dumps(rows).encode()
        (listed / f"{name}.json").write_bytes(content)
        hub.repositories["dataset", f"tester/list_{name}"] = Repository(False, {"train.json": content, **shown}, 1)
        how = "to_pair" if name in PAIRED else "to_prompt" if name == "verl" else "to_candidates"
        wanted[name] = ("same", f"tester/list_{name}", {"file": str(listed / f"{name}.json"), "how": how})
    files = dict(hub.repositories["dataset", "tester/rlhf_v"].files)
    hub.repositories["dataset", "tester/moving"] = Repository(False, files, 1)
    several = "---\nconfigs:\n- config_name: easy\n  data_files: easy.jsonl\n- config_name: hard\n  data_files: hard.jsonl\n---\n"
    hub.repositories["dataset", "tester/configurations"] = Repository(
        False, {"README.md": several.encode(), **{f"{name}.jsonl": b'{"id": 1}' for name in ("easy", "hard")}}, 1
    )
    hub.repositories["dataset", "tester/broken"] = Repository(False, {"train.parquet": b"PAR1 and no more"}, 1)
    done = dict(zip(wanted, steps(hub, where, *wanted.values()), strict=True))
    assert [name for name, step in wanted.items() if step[0] == "import" and done[name] != "finished"] == []
    return where, done


def test_rows_streamed_are_those_of_the_files(hub, ran, tmp_path):
    where, _ = ran
    files = hub.repositories["dataset", "tester/rlhf_v"].files
    pairs = list(read_records(where / "out", Pair))
    expected = local(tmp_path / "local", [files[name] for name in sorted(files) if "train" in name])
    assert [pair.meta["parent"] for pair in pairs] == [pair.id for pair in expected] == [str(n) for n in range(10)]
    for pair, known in zip(pairs, expected, strict=True):
        assert (pair.images, pair.prompt, pair.chosen, pair.rejected) == (
            known.images,
            known.prompt,
            known.chosen,
            known.rejected,
        )
        assert pair.meta["columns"] == {"ds_name": "RLHF-V"}
    assert len({pair.images[0]["bytes"] for pair in pairs}) == 10
    source = {"repository": "tester/rlhf_v", "commit": f"{1:040d}", "config": "default", "split": "train"}
    assert read_manifest(where / "out").config["settings"]["source"] == source == pairs[0].meta["settings"]["source"]
    assert len(list(read_records(where / "first", Pair))) == 4
    [pair] = read_records(where / "test", Pair)
    assert (pair.meta["parent"], message_text(pair.prompt)) == ("99", f"{QUESTION} 99")


@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_streams_as_it_is_on_disk(ran, layout):
    """From lists of JSON, whose types `datasets` has to guess."""
    assert ran[1][layout] == len(ROWS[layout])


def test_a_set_that_llama_factory_takes_from_the_hub(ran):
    [pair] = read_records(ran[0] / "described", Pair)
    assert (message_text(pair.prompt), message_text(pair.chosen), message_text(pair.rejected)) == (QUESTION, GOOD, BAD)
    assert pair.images == [{**encode_png(picture(5)), "path": "a.png"}]
    source = read_manifest(ran[0] / "described").config["source"]
    assert (source["repository"], source["split"]) == ("tester/preferences", "test")


def test_pictures_that_are_files_of_the_repository_or_of_this_disk(ran):
    where, _ = ran
    [pair] = read_records(where / "files", Pair)
    assert pair.images == [{**encode_png(picture(3)), "path": "a.png"}]
    assert read_manifest(where / "files").dropped == {"missing_image": 1}
    quarantine = (where / "files/quarantine/00000.jsonl").read_text()
    assert "'pictures/gone.png' is not in the data set tester/files on the Hub" in quarantine
    shown = [pair.images[0]["bytes"] for pair in read_records(where / "elsewhere", Pair)]
    assert shown == [encode_png(picture(number))["bytes"] for number in (9, 8)]


def test_a_survey_fetches_no_pictures(hub, ran):
    assert ran[1]["survey"] == [4, True, False]  # rows; whether the ids 1 and 2 come again
    name = "data/train-00000-of-00001.parquet"
    size = len(hub.repositories["dataset", "tester/large"].files[name])
    assert size > 24_000_000
    assert hub.served[name] < size / 20


def test_a_stopped_import_goes_on_at_the_same_commit_only(hub, ran, tmp_path):
    where, done = ran
    stopped = where / "stopped"
    pairs = list(read_records(stopped, Pair))
    assert [pair.meta["parent"] for pair in pairs] == [str(n) for n in range(10)]
    assert [pair.images for pair in pairs] == [pair.images for pair in read_records(where / "out", Pair)]
    assert (stopped / "data/train-00000.parquet").stat().st_mtime_ns == done["stopped"]
    assert (stopped / "data/train-00002.parquet").stat().st_mtime_ns > done["stopped"]
    hub.repositories["dataset", "tester/moving"].commits += 1
    before = everything(stopped)
    refused, gone_on, pinned = steps(
        hub, where,
        ("import", "tester/moving", {"data": {}, "output": "stopped"}),
        ("import", "tester/moving", {"data": {"revision": f"{1:040d}"}, "output": "stopped"}),
        ("import", "tester/moving", {"data": {"revision": f"{2:040d}"}, "output": str(tmp_path / "pinned")}),
    )  # fmt: skip
    assert "holds rows made with another config" in refused
    assert f"settings.source.commit: {1:040d} -> {2:040d}" in refused
    assert (
        f"tester/moving on the Hub has changed since: give `data.revision: {1:040d}` to go on with the rows" in refused
    )
    assert "delete" not in refused
    assert (gone_on, pinned, everything(stopped)) == ("finished", "finished", before)


def test_a_stopped_import_fetches_only_what_is_not_done(hub, ran):
    """Parquet: four blocks of three rows, one row group each, two to a file; the second and the last are done again."""
    where, _ = ran
    before = everything(where / "noisy"), everything(where / "lines")
    for name, number in (("noisy", 1), ("noisy", 3), ("lines", 1)):
        (where / name / f"progress/0000{number}.json").unlink()
        (where / name / f"data/train-0000{number}.parquet").unlink()
        (where / name / "manifest.json").unlink(missing_ok=True)
    hub.served.clear()
    runs = [("import", f"tester/{name}", {"data": {}, "output": name}) for name in ("noisy", "lines")]
    assert steps(hub, where, *runs) == ["finished", "finished"]
    assert (everything(where / "noisy"), everything(where / "lines")) == before
    sizes = {name: len(content) for name, content in hub.repositories["dataset", "tester/noisy"].files.items()}
    assert len(sizes) == 2
    assert all(0.5 < hub.served[name] / size < 0.7 for name, size in sizes.items())


def test_a_finished_import_is_complete_without_the_hub(ran, tmp_path):
    where, _ = ran
    before = everything(where / "out")
    with StandInHub() as gone:
        environment = gone.environment(tmp_path)
    lines = ["--data.path", "tester/lines", "--output.path"]
    runs = [
        ["--output.path", "out"],
        ["--output.path", "out", "--min_block", "2"],
        ["--output.path", "out", "--data.revision", "v1"],
        ["--output.path", "fresh"],
        ["--output.path", "out", "--data.revision", f"'{1:040d}'"],
        [*lines, "lines"],
        [*lines, "tagged", "--data.revision", "v1"],
        [*lines, "tagged"],
        ["--output.path", "out", "--data.split", "test"],
    ]
    code = "import json, sys\nfrom prefalign import cli\nfor more in json.loads(sys.argv[2]):\n"
    code += "    print('---', cli.main([*json.loads(sys.argv[1]), *more]), file=sys.stderr)"
    words = ["run", "import_published", "--config", "datagen/import_published", "--output.block_size", "3"]
    words += ["--data.path", "tester/rlhf_v"]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(words), json.dumps(runs)], cwd=where, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    said = done.stderr.split("---")
    assert "import_published: out is already complete (10 rows)" in said[0]
    assert "holds rows made with another config (settings.min_block: 3 -> 2)" in said[1]
    for number in (2, 3, 7, 8):
        assert re.search(r"no data at tester/\w+ on this disk, and the Hub at http://127.0.0.1", said[number])
    assert [part.split()[0] for part in said[1:]] == ["0", "1", "1", "1", "0", "0", "0", "1", "1"]
    assert everything(where / "out") == before


def everything(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_what_cannot_be_streamed_is_said_before_any_work(ran):
    done = ran[1]
    nothing = "HubError: no data at tester/nothing on this disk, and the Hub has no data set of that name"
    assert done["unknown"].startswith(nothing)
    assert "the data set tester/rlhf_v has no split 'validation', only train, test. Give one of them" in done["split"]
    assert "the data set tester/rlhf_v has no revision 'v9'. Give a branch, tag or commit" in done["revision"]
    assert "the data set tester/rlhf_v has no configuration 'french'" in done["config"]
    several = (
        "the data set tester/configurations has several configurations, ['easy', 'hard'], and none is the default one"
    )
    assert f"{several}. Give one of them as `data.config`." in done["configurations"]
    assert "the data set tester/broken cannot be streamed" in done["broken"]
    assert "give its file as `data.path`" in done["broken"]
    assert len(done["on disk"]) == 64  # a folder of that name on disk is read instead
    assert done["split on disk"].startswith(
        "ValueError: tester/here is on this disk, and data.split is for data sets of the Hub"
    )


def test_offline_and_a_hub_that_does_not_answer(monkeypatch):
    with pytest.raises(ValueError, match="no data at tester/rlhf_v on this disk, and HF_HUB_OFFLINE is set"):
        files_of(DataConfig(Path("tester/rlhf_v")))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(
        ValueError, match=r"the Hub at http://127\.0\.0\.1:9 cannot be reached .*finished blocks are kept"
    ):
        files_of(DataConfig(Path("tester/rlhf_v")))


@pytest.mark.parametrize("path", ["rows/nothing.jsonl", "nothing", "a/b/c", "/tmp/nothing"])
def test_what_is_no_name_on_the_hub_is_a_missing_file(path):
    with pytest.raises(ValueError, match=r"no data at .*Set `data\.path` to a JSONL.*OWNER/NAME"):
        files_of(DataConfig(Path(path)))

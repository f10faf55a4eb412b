"""`make -C datagen push`: a stage's folder on a stand-in Hub, private, checked, and read back."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, constants

from prefalign import cli
from prefalign.hub import publish
from prefalign.hub.dataset_card import RowStatistics, dataset_card, read_rows
from prefalign.hub.staging import Base, stage
from prefalign.hub.upload import PublishError, upload
from prefalign.images import encode_png
from prefalign.manifest import Manifest, read_manifest
from prefalign.records import Candidates, Pair, assistant_message, user_message
from prefalign.store import OutputConfig, read_records, write_records
from tests.hub_folders import SECRET, save_pairs
from tests.stand_in_hub import TOKEN, StandInHub
from tests.tiny_vlms import picture

ROOT = Path(__file__).parent.parent
COMMAND = Path(sys.executable).parent / "prefalign"


def make(where, *arguments, **environment):
    """`make -C datagen` started in `where`."""
    command = ["make", "--no-print-directory", "-C", str(ROOT / "datagen"), f"PREFALIGN={COMMAND}", *arguments]
    variables = {**(environment or os.environ), "PWD": str(where)}
    return subprocess.run(command, cwd=where, env=variables, capture_output=True, text=True)


@pytest.fixture
def online(monkeypatch, tmp_path):
    """This process may talk to a stand-in and nothing else."""
    with StandInHub() as server:
        for name, value in (("ENDPOINT", server.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True),
                            ("HF_TOKEN_PATH", str(tmp_path / "no-login"))):  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_push_is_private_and_comes_back_as_it_was(tmp_path):
    save_pairs(tmp_path / "my pairs")
    with StandInHub() as server:
        done = make(
            tmp_path,
            "push",
            "REPO=tester/rows",
            "FROM=my pairs",
            "LICENSE=mit",
            **server.environment(tmp_path / "cache"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "published: " in done.stdout
        assert TOKEN not in done.stdout + done.stderr
        [(key, repository)] = server.repositories.items()
    assert (key, repository.private, repository.commits) == (("dataset", "tester/rows"), True, 1)
    shards = [name for name in repository.files if name.endswith(".parquet")]
    assert len(shards) == 3
    for name in (*shards, "manifest.json"):
        assert repository.files[name] == (tmp_path / "my pairs" / name).read_bytes()
    assert not [name for name in repository.files if "quarantine" in name or "progress" in name]
    card = DatasetCard(repository.files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}
    ]
    copy = tmp_path / "copy"
    for name, content in repository.files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    from datasets import load_dataset

    rows = load_dataset(str(copy), split="train", cache_dir=str(tmp_path / "datasets"))
    kept = list(read_records(tmp_path / "my pairs", Pair))
    assert rows["id"] == [pair.id for pair in kept]
    assert [row["images"][0].size for row in rows] == [picture(n // 2).size for n in range(5)]
    assert [list(row["images"][0].getdata()) for row in rows] == [list(picture(n // 2).getdata()) for n in range(5)]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("REPO=me/x",), "publish 'runs/datagen-128/bdhs' --to 'me/x' --private"),
        (("REPO=me/x", "OUT=runs/mine"), "publish 'runs/mine' --to 'me/x' --private"),
        (("REPO=me/x", "FROM=it's here", "OUT=y"), "publish 'it'\\''s here' --to 'me/x' --private"),
        (("REPO=me/x", "FROM=y", "PUBLIC=1", "LICENSE=cc-by-4.0", "ARGS=--dry-run"),
         "publish 'y' --to 'me/x' --license 'cc-by-4.0' --dry-run"),
    ],
)  # fmt: skip
def test_what_push_starts(tmp_path, arguments, command):
    shown = make(tmp_path, "-n", "push", *arguments).stdout
    [started] = re.findall(r"cd '(.*?)' && '.*?/prefalign' (publish.*)", shown.replace("\\\n", " "))
    assert started[0] == str(tmp_path)
    assert started[1].split() == command.split()


def test_push_needs_a_repository(tmp_path):
    done = make(tmp_path, "push", "FROM=x")
    assert done.returncode == 2
    assert "push needs the repository: REPO=OWNER/NAME" in done.stderr


@pytest.mark.parametrize("other", ["MODEL=someone/vlm", "DATA=rows.jsonl", "CONFIG=own.yaml", "PAIRS="])
def test_push_needs_a_folder_and_takes_no_other(tmp_path, other):
    """Not the folder that one is in, which may be a finished stage's too."""
    save_pairs(tmp_path / "pairs")
    done = make(tmp_path / "pairs", "push", "REPO=me/x", "ARGS=--dry-run", other)
    assert done.returncode == 2
    assert "push needs the finished folder that it puts on the Hub: FROM=folder" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["pairs"]


@pytest.mark.parametrize("beside", [True, False])
def test_what_is_pushed_is_linked_beside_the_folder_and_gone_afterwards(online, tmp_path, monkeypatch, beside):
    """Where nothing can be written there it is where the system has its own."""
    folder = save_pairs(tmp_path / "here" / "pairs")
    (tmp_path / "system").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    make_folder, seen = tempfile.mkdtemp, []

    def mkdtemp(suffix=None, prefix=None, dir=None):
        if not beside and dir == tmp_path / "here":
            raise PermissionError(13, "Permission denied", str(dir))
        return make_folder(suffix, prefix, dir)

    def look(staged, *arguments, **more):
        seen.append((staged.parent.parent, {file.name: os.stat(file).st_nlink for file in staged.glob("data/*")}))
        return upload(staged, *arguments, **more)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(publish, "upload", look)
    monkeypatch.setattr(publish, "in_fresh_process", lambda staged: {"columns": []})
    publish.publish_dataset(folder, "tester/rows", private=True)
    [(where, links)] = seen
    assert where == tmp_path / ("here" if beside else "system")
    assert links == {f"train-{number:05d}.parquet": 2 for number in range(3)}
    sent = online.repositories["dataset", "tester/rows"].files
    for number in range(3):
        name = f"data/train-{number:05d}.parquet"
        assert sent[name] == (folder / name).read_bytes()
    assert list((tmp_path / "here").iterdir()) == [folder]
    assert not any((tmp_path / "system").glob(".prefalign*"))


def test_files_are_copied_where_there_are_no_links_or_the_copy_stays(tmp_path, monkeypatch):
    folder = save_pairs(tmp_path / "pairs")
    shard = "data/train-00000.parquet"

    def staged(name, **how):
        stage(folder, tmp_path / name, publish.DATASET_FILES, Base("unknown"), **how)
        assert (tmp_path / name / shard).read_bytes() == (folder / shard).read_bytes()
        return (tmp_path / name / shard).stat().st_ino == (folder / shard).stat().st_ino

    (tmp_path / "elsewhere.parquet").write_bytes((folder / shard).read_bytes())
    (folder / shard).unlink()
    (folder / shard).symlink_to("../../elsewhere.parquet")
    assert staged("linked", link=True)
    assert not (tmp_path / "linked" / shard).is_symlink()
    assert not staged("kept")

    def refused(*files):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert not staged("without", link=True)

    def full(*files):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(
        PublishError, match=r"no room in .*full for a copy of config.json \(0.0 GB\). Make room there, or move"
    ):
        staged("full", link=True)


def test_nothing_is_sent_when_a_check_fails(online, tmp_path, capsys):
    pair = Pair(id="1", images=[encode_png(picture(0))], prompt=[user_message("what ?", images=1)],
                chosen=[assistant_message(f"my key is {SECRET}")], rejected=[assistant_message("no")], method="bdhs")  # fmt: skip
    write_records("bdhs", [pair], output=OutputConfig(tmp_path / "leaky"), record=Pair, settings={}, seed=0)
    assert cli.main(["publish", str(tmp_path / "leaky"), "--to", "tester/x", "--private"]) != 0
    shown = capsys.readouterr().err
    assert "row 1, column chosen: Hugging Face token hf_A... (30 characters)" in shown
    assert SECRET not in shown
    assert online.repositories == {}
    assert {method for method, _, _ in online.requests} <= {"GET"}


def test_what_arrived_is_not_sent_again(online, tmp_path):
    """A push that broke off before its commit goes on with the shards that are not there."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        (folder / f"train-{number:05d}.parquet").write_bytes(f"shard {number}".encode())
    arguments = {"repo_type": "dataset", "private": True, "replace": publish.SHARDS}
    online.commit_status = 409
    with pytest.raises(PublishError, match="Nothing was published"):
        upload(tmp_path, "tester/rows", **arguments)
    (folder / "train-00003.parquet").write_bytes(b"shard 3")
    online.commit_status = 200
    upload(tmp_path, "tester/rows", **arguments)
    sent = [path for method, path, _ in online.requests if method == "PUT"]
    assert len(sent) == len(set(sent)) == 4
    assert len(online.repositories["dataset", "tester/rows"].files) == 4


def card(folder, settings=None, dropped=None, stage=None):
    statistics, schema = read_rows(sorted(folder.glob("data/*.parquet")))
    known = vars(read_manifest(folder))
    manifest = Manifest(**{**known, "stage": stage or known["stage"], "dropped": dropped or {},
                           "config": {**known["config"], "settings": settings or {}}})  # fmt: skip
    return dataset_card("me/x", manifest=manifest, statistics=statistics, schema=schema, size=1, license=None)


def test_a_card_shows_the_first_rows_and_why_others_went(tmp_path):
    folder = save_pairs(tmp_path / "pairs")
    shown = card(folder, dropped={"missing_image": 3, "small_gap": 2})
    assert "| inputs dropped | 3 missing_image, 2 small_gap |" in shown
    assert "| seed | 3 |" in shown
    preview = shown[shown.index("## The first rows") : shown.index("## Licence")]
    assert preview.count("1 picture(s)") == 3
    assert "row0: 1 picture(s)\nprompt: what is in the image ?\nchosen: a fox\nrejected: a lazy dog" in preview
    graded = Candidates("c1", [encode_png(picture(1))], [user_message("what ?", images=1)],
                        [{"text": "long " * 100 + "```", "scores": {"total": 2.0}}])  # fmt: skip
    write_records("t", [graded], output=OutputConfig(tmp_path / "graded"), record=Candidates, settings={}, seed=0)
    preview = card(tmp_path / "graded")
    assert 'response {"total": 2.0}: ' + ("long " * 60).strip() in preview
    assert preview.count("```text") == 1


def test_a_card_counts_rows_without_keeping_them(tmp_path):
    """The figures of 2,000 rows with 750 pictures, in memory that the digests of the pictures alone would not fit in."""
    rng = random.Random(0)
    words, margins = [rng.randrange(1, 90) for _ in range(2_000)], [rng.random() for _ in range(2_000)]
    statistics = RowStatistics()
    tracemalloc.start()
    for number, (count, margin) in enumerate(zip(words, margins, strict=True)):
        shown, other = ({"bytes": b"%d of %d" % (number // each, each), "path": None} for each in (4, 8))
        row = {"id": str(number), "images": [shown], "rejected_images": [other], "margin": margin}
        statistics.add({**row, "chosen": [assistant_message("word " * count)]})
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    table = statistics.as_table()
    assert table["distinct pictures"] == "750"
    assert table["words in `chosen`"] == f"mean {sum(words) / 2_000:.1f}, from {min(words)} to {max(words)}"
    assert table["margin"] == f"mean {sum(margins) / 2_000:.3f}, from {min(margins):.3f} to {max(margins):.3f}"
    assert "words in `rejected`" not in table
    assert taken < 60_000


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        (1, "n<1K"), (999, "n<1K"), (1_000, "1K<n<10K"), (99_999, "10K<n<100K"), (999_999, "100K<n<1M"), (1_000_000, "1M<n<10M"),
        (50_000_000, "10M<n<100M"), (999_999_999, "100M<n<1B"), (10**9, "1B<n<10B"), (10**12 - 1, "100B<n<1T"), (10**12, "n>1T"),
    ],
)  # fmt: skip
def test_sizes_have_the_names_of_the_hubs_list(tmp_path, rows, name):
    folder = save_pairs(tmp_path / "pairs")
    statistics, schema = read_rows(sorted(folder.glob("data/*.parquet")))
    statistics.rows = rows
    written = dataset_card(
        "me/x", manifest=read_manifest(folder), statistics=statistics, schema=schema, size=1, license=None
    )
    assert DatasetCard(written).data.size_categories == [name]


def test_a_card_says_what_is_known_of_benchmark_pictures(tmp_path):
    folder = save_pairs(tmp_path / "pairs")
    assert "were not compared with those of benchmarks in this stage" in card(folder)
    checked = card(folder, {"contamination": {"lists": "0f", "names": "coco"}}, {"benchmark_picture": 7})
    assert "compared with lists of benchmark pictures" in checked
    assert "7 rows had one and went" in checked
    assert "were not compared" not in checked


def test_a_card_of_imported_rows_does_not_claim_them(tmp_path):
    folder = save_pairs(tmp_path / "pairs")
    source = {"repository": "openbmb/RLHF-V-Dataset", "commit": "abc" * 13, "config": "default", "split": "train"}
    shown = card(folder, {"source": source}, stage="import_published")
    assert "published by others as `openbmb/RLHF-V-Dataset` (commit `abcabcabcabc`, split `train`)" in shown
    assert "decided by whoever published the source" in shown
    assert "made without human labels" not in shown
    assert "made without human labels by the stage `bdhs`" in card(folder)
    assert json.dumps(source["repository"]) in shown

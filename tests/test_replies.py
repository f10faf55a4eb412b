"""The file of kept replies: what is in its way is found before anything is asked, and said so that nothing paid for is lost."""

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from prefalign import replies
from prefalign.replies import Replies, RepliesError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "kept.sqlite"
    Replies(path).keep({"a": "one"}, "m")
    return path


def test_nothing_is_made_before_something_is_kept(tmp_path):
    path = tmp_path / "new" / "kept.sqlite"
    assert Replies(path).kept(["a"]) == {}
    Replies(path).keep({}, "m")
    assert not path.parent.exists()
    Replies(path).keep({"a": "one", "b": "two"}, "m")
    Replies(path).keep({"a": "another"}, "n")
    assert Replies(path).kept(["a", "b", "c"]) == {"a": "one", "b": "two"}
    Replies(path).keep({"a": "new", "b": "newer"}, "n", over={"b", "d"})
    assert Replies(path).kept(["a", "b", "d"]) == {"a": "one", "b": "newer"}


def test_an_empty_file_holds_nothing_yet(tmp_path):
    path = tmp_path / "kept.sqlite"
    path.touch()
    assert Replies(path).kept(["a"]) == {}
    Replies(path).keep({"a": "one"}, "m")
    assert Replies(path).kept(["a"]) == {"a": "one"}


def test_what_is_no_file_of_replies_is_found_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"cache '.*' is a folder. Name a file, such as .*/replies.sqlite"):
        Replies(tmp_path)
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as base, base:
        base.execute("CREATE TABLE replies (key TEXT, reply TEXT)")
    with pytest.raises(ValueError, match="its table `replies` has the columns key, reply, and theirs has key, source"):
        Replies(other)
    (tmp_path / "notes.txt").write_text("not a data base " * 90)
    with pytest.raises(ValueError, match=r"cache 'notes.txt' holds no replies of a model \(file is not a .*\). Name"):
        Replies(tmp_path / "notes.txt")
    with pytest.raises(RepliesError, match=r"cache 'kept.sqlite' cannot be made in .*notes.txt, which is no folder"):
        Replies(tmp_path / "notes.txt" / "kept.sqlite")


def test_a_file_that_another_process_writes_to(file, monkeypatch):
    monkeypatch.setattr(replies, "PATIENCE", 0.1)
    kept = Replies(file)
    with closing(sqlite3.connect(file)) as base:
        base.execute("BEGIN EXCLUSIVE")
        for action in (lambda: Replies(file), lambda: kept.kept(["a"]), lambda: kept.keep({"b": "two"}, "m")):
            with pytest.raises(RepliesError, match=r"database is locked. Another process wrote to it .* start again"):
                action()
    kept.keep({"b": "two"}, "m")
    assert kept.kept(["a", "b"]) == {"a": "one", "b": "two"}


def test_a_full_disk_is_told_and_what_was_kept_stays(file):
    """In a process of its own, whose files may not grow."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from prefalign.cli import guarded\n"
        "from prefalign.replies import Replies\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))\n"
        "many = {f'k{i}': 'x' * 1000 for i in range(100)}\n"
        "sys.exit(guarded(lambda: Replies(Path(sys.argv[1])).keep(many, 'm'), resumes=True))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.match(r"error: cache 'kept.sqlite': .*(full|I/O).*, then start again. What was kept stays.", done.stderr)
    for advice in ("delete", "Traceback"):
        assert advice not in done.stderr
    assert Replies(file).kept(["a", "k0"]) == {"a": "one"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to everything")
def test_a_file_that_cannot_be_written(file):
    file.chmod(0o444)
    with pytest.raises(RepliesError, match=r"readonly database. Make the file and its folder writable, then start"):
        Replies(file)


def test_a_damaged_file_is_not_thrown_away(file):
    Replies(file).keep({f"k{number}": "x" * 1000 for number in range(100)}, "m")
    damaged = bytearray(file.read_bytes())
    damaged[4096:] = b"\xff" * (len(damaged) - 4096)
    file.write_bytes(damaged)
    with pytest.raises(RepliesError, match=r"malformed. It is damaged; `sqlite3 FILE .recover` gets back"):
        Replies(file).kept(["a", "k5"])

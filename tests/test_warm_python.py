"""The Python of `tests/warm_python.py` is like one that was started: arguments, folder, streams, ends and signals."""

import os
import signal
import subprocess
import time

import pytest

from tests.launching import ROOT, TIMEOUT, WARM

SCRIPT = """
import json, os, signal, sys, threading, time
from pathlib import Path
how = sys.argv[1]
if how == "tell":
    Path("told.json").write_text(json.dumps([__name__, sys.argv, os.environ["OWN"], "torch" in sys.modules, sys.path[0]]))
    print(sys.stdin.read().upper())
elif how == "leave":
    sys.exit("left")
elif how == "raise":
    raise KeyError("raised")
elif how in ("leave threads", "raise over threads"):
    def finish():
        time.sleep(0.3)
        Path("finished").touch()
    threading.Thread(target=finish).start()
    if how == "leave threads":
        sys.exit(3)
    raise KeyError("raised")
elif how == "die":
    os.kill(os.getpid(), signal.SIGKILL)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    Path("pid").write_text(str(os.getpid()))
    Path("pid").rename("ready")
    time.sleep(60)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "script.py").write_text(SCRIPT)
    return tmp_path / "own" / "script.py"


def start(script, folder, how):
    return subprocess.Popen([WARM / "python", "-u", script, how, "a b"], cwd=folder, env={**os.environ, "OWN": "mine"}, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_runs_a_file(script, tmp_path):
    process = start(script, tmp_path, "tell")
    assert process.communicate("said", timeout=2 * TIMEOUT) == ("SAID\n", "")
    assert process.returncode == 0
    told = f'["__main__", ["{script}", "tell", "a b"], "mine", true, "{script.parent}"]'
    assert (tmp_path / "told.json").read_text() == told


def test_it_runs_a_module():
    done = subprocess.run([WARM / "python", "-m", "prefalign.cli", "list"], cwd=ROOT, capture_output=True, text=True)
    command = subprocess.run([WARM / "prefalign", "list"], cwd=ROOT, capture_output=True, text=True)
    assert "train_preference" in done.stdout
    assert (done.returncode, done.stdout) == (command.returncode, command.stdout)


@pytest.mark.parametrize(
    ("how", "code", "said"), [("leave", 1, "left"), ("raise", 1, "KeyError: 'raised'"), ("die", -9, "")]
)
def test_it_ends_as_the_process_does(script, tmp_path, how, code, said):
    process = start(script, tmp_path, how)
    assert said in process.communicate(timeout=TIMEOUT)[1]
    assert process.returncode == code


@pytest.mark.parametrize(("how", "code"), [("leave threads", 3), ("raise over threads", 1)])
def test_its_threads_finish_first(script, tmp_path, how, code):
    process = start(script, tmp_path, how)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == code
    assert (tmp_path / "finished").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 7), (signal.SIGKILL, -9)])
def test_signals_reach_the_process(script, tmp_path, number, code):
    process = start(script, tmp_path, "wait")
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == code
    asked = int((tmp_path / "ready").read_text())
    end = time.monotonic() + 60
    while runs(asked):
        assert time.monotonic() < end
        time.sleep(0.01)

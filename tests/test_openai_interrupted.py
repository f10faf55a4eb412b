"""Ctrl-C while a server is asked: what is under way is waited for, no longer than an answer may take."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

from prefalign.engines import parallel
from tests.stand_in_server import engine_on

INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background starts its processes without
from prefalign.cli import guarded
from prefalign.engines.config import ServerConfig
from prefalign.engines import Request, Sampling
from prefalign.engines.openai import OpenAIEngine
from prefalign.records import user_message
engine = OpenAIEngine("tiny-vlm", ServerConfig(base_url=sys.argv[1], timeout=60))
requests = [Request(f"row{number}", [user_message(f"row{number} what?")], []) for number in range(20)]
sys.exit(guarded(lambda: engine.generate(requests, Sampling()) and 0, resumes=True))
"""


def test_what_is_under_way_is_waited_for_no_longer_than_an_answer_may_take(server, caplog):
    reached = engine_on(server, timeout=0.5).server
    stuck = threading.Thread(target=time.sleep, args=(4,), daemon=True)
    stuck.start()
    started = time.monotonic()
    parallel._wait([stuck], reached)
    assert 0.5 < time.monotonic() - started < 2
    assert "waiting for 1 answers under way, at most 0.5 s" in caplog.text
    assert reached.client.is_closed()


class TestInterrupted:
    """Ctrl-C says what it waits for, waits for no pause, and a second one for nothing."""

    @contextlib.contextmanager
    def running(self, server):
        with subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, server.url], stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                deadline = time.monotonic() + 30
                while len(server.asked) < 16 and time.monotonic() < deadline:
                    time.sleep(0.01)
                yield process
            finally:
                process.kill()

    def test_answers_under_way_are_waited_for(self, server):
        server.delay = 1.5
        with self.running(server) as process:
            process.send_signal(signal.SIGINT)
            told = process.communicate(timeout=20)[1]
        assert "waiting for 16 answers under way, at most 60 s; Ctrl-C again leaves them" in told
        assert "interrupted; start the same command again" in told
        assert (process.returncode, len(server.asked)) == (130, 16)

    def test_a_second_interrupt_leaves_them(self, server):
        server.delay = 15.0
        with self.running(server) as process:
            process.send_signal(signal.SIGINT)
            line = process.stderr.readline()
            process.send_signal(signal.SIGINT)
            second = time.monotonic()
            told = process.communicate(timeout=20)[1]
        assert line.startswith("waiting for 16 answers under way")
        assert "interrupted; start the same command again" in told
        assert "Traceback" not in told
        assert process.returncode == 130
        assert time.monotonic() - second < 5

    def test_pauses_before_the_next_try_end(self, server):
        server.faults, server.headers = {f"row{number}": [429] * 9 for number in range(20)}, {"Retry-After": "30"}
        with self.running(server) as process:
            time.sleep(0.3)
            first = time.monotonic()
            process.send_signal(signal.SIGINT)
            told = process.communicate(timeout=20)[1]
        assert "waiting for" not in told
        assert process.returncode == 130
        assert time.monotonic() - first < 5

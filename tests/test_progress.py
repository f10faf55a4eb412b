"""Bars on a terminal, lines in a log."""

import re
import sys
import time

from prefalign import progress
from prefalign.progress import progress_bar


def go(number, **settings):
    for _ in progress_bar(range(number), desc="asked", unit="row", **settings):
        time.sleep(0.02)


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.1)
    go(20)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) < 20
    assert all(re.match(r"asked: +\d+%\|.*\| \d+/20 \[.*row/s\]$", line) for line in lines)
    go(20, disable=True)
    assert capsys.readouterr().err == ""


def test_a_log_gets_nothing_of_what_takes_no_minute(capsys):
    go(5)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    go(5)
    assert "\rasked: 100%" in capsys.readouterr().err

"""The server engine against a local server that fails on command: nothing lost, twice or paid twice, and no key shown."""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import re
import signal
import socket
import sqlite3
import time
import traceback
from collections import Counter
from email.utils import formatdate

import httpx2
import pytest

from prefalign.engines import Request
from prefalign.engines.config import ServerConfig
from prefalign.engines.openai import OpenAIEngine
from prefalign.engines.server import ServerError
from prefalign.records import user_message
from tests.stand_in_server import (
    DRAWN,
    GREEDY,
    KEY,
    MODEL,
    PICTURES,
    about,
    engine_on,
    seen,
    some,
)

FAULTS = {"row0": [429], "row1": [500, 503], "row2": ["late"], "row3": ["cut"], "row4": ["reset"], "row5": ["no json"],
          "row6": ["no answer"], "row7": ["no words", 429], "row8": ["cut", 500]}  # fmt: skip


def test_whatever_a_server_does_nothing_is_lost_and_nothing_comes_twice(server, caplog):
    server.faults = {name: list(todo) for name, todo in FAULTS.items()}
    requests = some(12)
    with caplog.at_level(logging.INFO):
        answers = engine_on(server, timeout=1.5).generate(requests, GREEDY)
    assert [(one.id, one.text, one.error) for one in answers] == [(one.id, seen(one), None) for one in requests]
    assert server.answers() == Counter(request.id for request in requests)
    tries = Counter(one.name for one in server.asked)
    assert tries == Counter({request.id: 1 + len(FAULTS.get(request.id, [])) for request in requests})
    assert "12 of the tries for 12 requests failed and were made again" in caplog.text
    pauses = [float(pause) for pause in re.findall(r"Retrying request in ([\d.]+) seconds", caplog.text)]
    assert sum(0.375 <= pause <= 0.5 for pause in pauses) == 9
    assert sum(0.75 <= pause <= 1.0 for pause in pauses) == 3 == len(pauses) - 9


def test_who_waits_for_a_next_try_says_so_once(server, caplog):
    server.faults = {"row0": [503], "row1": [503], "row2": [503]}
    engine_on(server, concurrency=1).generate(some(3), GREEDY)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert re.fullmatch(r"http://\S+: a request failed \(it answered 503\); try 2 of 5 follows in 0\.\d s", said[0])


def test_retry_after_is_respected(server):
    server.faults, server.headers = {"row0": [429]}, {"Retry-After": "0.8"}
    engine_on(server).generate(some(1), GREEDY)
    first, second = (one.came for one in server.asked)
    assert second - first > 0.7  # by itself the library waits at most half a second


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (429, r"request row0: the server answered 429 \(fault 429 of Bearer none\) in 2 tries"),
        (500, r"request row0: the server answered 500 \(fault 500 of Bearer none\) in 2 tries"),
        (
            "late",
            r"request row0: no whole answer within 1 s in 2 tries. Raise server.timeout, or lower server.concurrency",
        ),
        (
            "blanks",
            r"request row0: no whole answer within 1 s in 2 tries. Raise server.timeout, or lower server.concurrency",
        ),
        (
            "half",
            r"request row0: no whole answer within 1 s in 2 tries. Raise server.timeout, or lower server.concurrency",
        ),
        ("cut", r"request row0: the connection broke before the answer was whole in 2 tries \(RemoteProtocolError\)"),
        ("no json", r"request row0: the server sent no chat completion but '\{\"choices\": .*half an ans' in 2 tries"),
        ("nested", r"request row0: the server sent no chat completion but '\[{300}\.\.\.' in 2 tries"),
        ("no answer", r"request row0: the server sent no chat completion but .*upstream broke.* in 2 tries"),
    ],
)
def test_after_the_last_try_that_request_alone_has_failed(server, fault, message):
    server.faults = {"row0": [fault, fault]}
    limit = 1.0 if fault in ("late", "blanks", "half") else 20.0
    started = time.monotonic()
    answers = engine_on(server, timeout=limit, max_retries=1).generate(some(3), GREEDY)
    assert time.monotonic() - started < 3.5
    assert [one.finish_reason for one in answers] == ["error", "stop", "stop"]
    assert answers[0].text == ""
    assert sum(one.name == "row0" for one in server.asked) == 2
    assert re.fullmatch(message + r"\.?", answers[0].error), answers[0].error


def test_where_a_server_wants_no_other_try_it_is_not_said_that_there_was_one(server):
    server.faults, server.headers = {"row0": [429]}, {"x-should-retry": "false"}
    [answer] = engine_on(server).generate(some(1), GREEDY)
    assert len(server.asked) == 1
    assert answer.error == "request row0: the server answered 429 (fault 429 of Bearer none) in the one try it had"


@pytest.mark.parametrize("wait", ["3600", formatdate(time.time() + 3600, usegmt=True)])
@pytest.mark.parametrize("fault", [429, 503])
def test_a_server_that_wants_to_be_left_alone_for_long_stops_the_run(server, tmp_path, fault, wait):
    """Else every row after it would be put into quarantine, though an hour later it would have its answer."""
    server.faults, server.headers = {"row2": [fault]}, {"Retry-After": wait}
    engine = engine_on(server, concurrency=1, cache=tmp_path / "answers.sqlite")
    said = rf"answers {fault} \(.*; Retry-After: {re.escape(wait)}\), and no request waits longer than 120 s\. Start the same"
    with pytest.raises(ServerError, match=said):
        engine.generate(some(4), GREEDY)
    assert len(server.asked) == 3
    assert [one.finish_reason for one in engine.generate(some(4), GREEDY)] == ["stop"] * 4
    assert [one.name for one in server.asked[3:]] == ["row2", "row3"]


def test_what_is_wrong_with_one_request_is_told_at_once_and_of_it_alone(server):
    server.faults = {"row1": [400]}
    hole = Request("hole", [user_message("hole where?", 2)], PICTURES[:1])
    answers = engine_on(server).generate([*some(3), hole], GREEDY)
    assert [one.finish_reason for one in answers] == ["stop", "error", "stop", "error"]
    assert answers[1].error == "request row1: the server answered 400 (fault 400 of Bearer none)"
    assert answers[3].error.startswith("request hole: it has 2 image placeholder(s) for 1 picture(s). Write one for")
    assert len(server.asked) == 3


class TestStopsAtOnce:
    """What concerns every request stops the run with one message that says what to do."""

    def test_a_key_that_is_missing_or_wrong(self, server, monkeypatch):
        server.key = KEY
        with pytest.raises(
            ServerError, match=r"wants a key \(401\), and the environment variable OPENAI_API_KEY is not set"
        ):
            engine_on(server)
        monkeypatch.setenv("OTHER_KEY", "sk-wrong")
        with pytest.raises(
            ServerError, match=r"refuses the key in the environment variable OTHER_KEY \(401\). Put a valid"
        ):
            engine_on(server, api_key_env="OTHER_KEY")
        assert not server.asked
        monkeypatch.setenv("OTHER_KEY", KEY)
        assert engine_on(server, api_key_env="OTHER_KEY").generate(some(1), GREEDY)[0].finish_reason == "stop"

    def test_openai_without_a_key_is_not_even_asked(self, server):
        with pytest.raises(
            ValueError, match=r"api.openai.com/v1 wants a key, and the environment variable MINE is not set"
        ):
            OpenAIEngine("gpt", ServerConfig(api_key_env="MINE"))

    def test_an_unknown_model(self, server):
        with pytest.raises(
            ServerError, match=r"has no model 'tiny'; it serves other, tiny-vlm. Set model_name_or_path"
        ):
            OpenAIEngine("tiny", server.settings())

    def test_no_server_there(self, server, monkeypatch):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        with pytest.raises(
            ServerError, match=rf"no server answers at http://127.0.0.1:{port}/v1 .*refused.* Start it, or set"
        ):
            OpenAIEngine(MODEL, ServerConfig(max_retries=0))
        with pytest.raises(ServerError, match=r"/models is not there \(404\). Set server.base_url .* including /v1"):
            engine_on(server, base_url=server.url.removesuffix("/v1"))
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert engine_on(server, base_url=None).server.address == server.url

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (401, r"OPENAI_API_KEY is not set"),
            (404, r"answers 404 \(fault 404 .*\) when 'tiny-vlm' is asked. Set model_name_or_path to a model"),
            (402, r"/v1: 402 \(fault 402 .*\). Add credit to the account"),
            ("no credit", r"/v1: 429 \(You exceeded your quota\). Add credit to the account"),
            (422, r"'tiny-vlm' at .* does not take the setting 'temperature' as it is: 400 .* not left out silently"),
        ],
    )
    def test_in_the_middle_of_a_run(self, server, fault, message, tmp_path):
        server.faults = {"row3": [fault]}
        settings = {"concurrency": 1, "max_retries": 0, "cache": tmp_path / "kept.sqlite"}
        with pytest.raises(ServerError, match=message):
            engine_on(server, **settings).generate(some(12), GREEDY)
        assert len(server.asked) == 10  # those about its picture come last, and it is the first of them
        answers = engine_on(server, **settings).generate(some(12), GREEDY)
        assert [one.finish_reason for one in answers] == ["stop"] * 12
        assert set(server.answers().values()) == {1}  # what was answered before is not asked again

    def test_a_server_that_dies(self, server, tmp_path):
        engine = engine_on(server, max_retries=1, concurrency=1)
        engine.generate(some(2), GREEDY)
        server.__exit__()
        with pytest.raises(ServerError, match=r"no server answers at .* what is finished is kept, so start the same"):
            engine.generate([about("later")], GREEDY)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"base_url": "localhost:8000"},
                r"'localhost:8000' is no address of a server. .* such as http://localhost",
            ),
            (
                {"base_url": "http://host/v1?api-key=secret"},
                r"the server's address \(of host\) goes on after a \? or #, which requests do not keep",
            ),
            (
                {"base_url": "http://me:secret@host/v1"},
                r"the server's address \(of host\) holds a user name or password",
            ),
            ({"api_key_env": "BROKEN"}, r"variable BROKEN holds blanks, line breaks or other characters"),
            ({"concurrency": 0}, r"server.concurrency is 0; give 1 or more"),
            ({"requests_per_minute": -1}, r"server.requests_per_minute is -1; give 0 or more"),
            ({"max_retries": -1}, r"server.max_retries is -1; give 0 or more"),
            ({"timeout": 0}, r"server.timeout is 0; give the seconds"),
        ],
    )
    def test_settings_that_cannot_be(self, server, changes, message, monkeypatch):
        monkeypatch.setenv("BROKEN", "sk-one\nsk-two")
        with pytest.raises(ValueError, match=message) as caught:
            engine_on(server, **changes)
        assert "secret" not in str(caught.value)
        assert "sk-" not in str(caught.value)
        assert not server.listed


def replies_in(file):
    if not file.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(file)) as base:
        if not base.execute("SELECT name FROM sqlite_master").fetchall():
            return 0
        return base.execute("SELECT COUNT(*) FROM replies").fetchone()[0]


class TestKeptAnswers:
    def test_a_rerun_asks_nothing_and_what_decides_an_answer_asks_again(self, server, tmp_path):
        cache = tmp_path / "new" / "kept.sqlite"
        requests = [
            *some(4),
            about("start", PICTURES[0], prefix="A red"),
            about("long", PICTURES[0], stop_at_sentence=True),
        ]
        first = engine_on(server, cache=cache).generate(requests, DRAWN)
        again = engine_on(server, cache=cache).generate(requests[::-1], DRAWN)
        assert again[::-1] == first
        assert len(server.asked) == 6
        row = requests[0]
        changed = [
            dataclasses.replace(row, images=[PICTURES[1]]),
            dataclasses.replace(row, messages=[user_message("row0 what was this?", 1)]),
            dataclasses.replace(row, seed=1),
            dataclasses.replace(row, id="row00"),
            dataclasses.replace(row, prefix="A"),
        ]
        engine_on(server, cache=cache).generate(changed, DRAWN)
        engine_on(server, cache=cache).generate([row], dataclasses.replace(DRAWN, max_new_tokens=33))
        OpenAIEngine("other", server.settings(cache=cache)).generate([row], DRAWN)
        OpenAIEngine(MODEL, server.settings(cache=cache), revision="v2").generate([row], DRAWN)
        assert len(server.asked) == 6 + 5 + 3

    def test_failures_are_asked_again(self, server, tmp_path):
        server.faults = {"row1": [400]}
        settings = {"cache": tmp_path / "kept.sqlite"}
        assert engine_on(server, **settings).generate(some(2), GREEDY)[1].error
        assert engine_on(server, **settings).generate(some(2), GREEDY)[1].text == seen(some(2)[1])
        assert server.answers() == {"row0": 1, "row1": 1}

    def test_a_file_of_another_kind_is_found_before_anything_is_paid(self, server, tmp_path):
        (tmp_path / "notes.txt").write_text("not a data base " * 90)
        with pytest.raises(ValueError, match=r"cache 'notes.txt' holds no replies of a model"):
            engine_on(server, cache=tmp_path / "notes.txt")
        assert not server.listed

    def test_a_folder_in_its_place_is_found_before_anything_is_paid(self, server, tmp_path):
        with pytest.raises(ValueError, match="is a folder. Name a file"):
            engine_on(server, cache=tmp_path)
        assert not server.listed

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
    def test_a_process_that_is_killed_or_interrupted_loses_no_answer_that_was_kept(self, server, tmp_path, how):
        server.delay = 0.03
        settings = server.settings(cache=tmp_path / "kept.sqlite", concurrency=2)
        requests = some(150)

        def run():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with contextlib.suppress(KeyboardInterrupt):
                OpenAIEngine(MODEL, settings).generate(requests, GREEDY)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        deadline = time.monotonic() + 20
        while replies_in(settings.cache) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, how)
        process.join()
        time.sleep(0.2)  # the server finishes what it was at
        kept, before = replies_in(settings.cache), server.answers()
        server.delay = 0.0
        assert 3 <= kept < 150
        if how == signal.SIGINT:
            assert kept == len(before)  # what was under way was waited for
        answers = OpenAIEngine(MODEL, settings).generate(requests, GREEDY)
        assert [one.text for one in answers] == [seen(one) for one in requests]
        paid = server.answers() - before
        assert sum(paid.values()) == 150 - kept
        assert set(paid.values()) == {1}


def test_the_organization_of_the_environment_is_sent_to_openai_alone(server, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-mine")
    engine = engine_on(server)
    engine.generate(some(1), GREEDY)
    assert len(server.headers_seen) == 2  # its models, and the question
    assert not any("mine" in value for headers in server.headers_seen for value in headers.values())
    request = httpx2.Request("POST", "https://api.openai.com/v1", headers={"OpenAI-Organization": "org-mine"})
    for address, sent in (("https://api.openai.com/v1", True), ("https://notopenai.com/v1", False)):
        engine.server.address = address
        engine.server.open()
        engine.server._before(request)
        assert ("OpenAI-Organization" in request.headers) is sent


def test_requests_per_minute_holds_for_tries_too(server):
    server.faults, server.headers = {f"row{number}": [500] for number in range(4)}, {"Retry-After": "0.001"}
    engine_on(server, requests_per_minute=600).generate(some(6), GREEDY)
    came = sorted(one.came for one in server.asked)
    assert len(came) == 10
    assert came[9] - came[0] > 0.6  # 0.9, but for a server that is late to notice


def test_the_key_is_in_no_message_log_or_file(server, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.faults = {"row0": [500], "row1": ["no answer"], "row2": [429]}
    shown = []
    with caplog.at_level(logging.DEBUG):
        engine = engine_on(server, max_retries=0, cache=tmp_path / "kept.sqlite", concurrency=1)
        assert [one.body for one in server.asked] == []
        shown += [one.error or one.text for one in engine.generate(some(5), GREEDY)]
        assert sum("<key>" in text for text in shown) == 3
        for fault in (401, 402, 404, 422):
            server.faults = {"late": [fault]}
            try:
                engine.generate([about("late", seed=fault)], GREEDY)
            except ServerError as error:
                shown += traceback.format_exception(error)
        server.key = "sk-another"
        try:
            engine_on(server)
        except ServerError as error:
            shown += traceback.format_exception(error)
        shown += [repr(engine), repr(vars(engine)), repr(engine.server), engine.fingerprint]
    assert len(shown) > 20
    files = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    for piece in (KEY, KEY[3:], KEY[-10:]):
        assert piece not in "\n".join(shown)
        assert piece not in caplog.text
        assert piece.encode() not in files

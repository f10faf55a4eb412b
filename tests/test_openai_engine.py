"""The server engine against a local server that fails on command: nothing lost, twice or paid twice, and no key shown."""

import contextlib
import dataclasses
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import sqlite3
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import yaml

from prefalign import bundled, config, planner
from prefalign.engines import USAGE, Contrast, ImageMask, Request, Sampling, chat
from prefalign.engines.config import EngineConfig, ServerConfig
from prefalign.engines.loading import load_engine
from prefalign.engines.openai import OpenAIEngine
from prefalign.engines.server import ServerError
from prefalign.images import encode_png, open_image
from prefalign.records import Candidates, assistant_message, row_seed, user_message
from prefalign.rewards import Response, read_rewards
from prefalign.rewards.judged import JudgedAttributes, PairwiseJudge
from prefalign.scenes.export import export
from prefalign.store import OutputConfig, read_records, write_records
from tests.stand_in_server import KEY, MODEL, StandInServer, described
from tests.tiny_vlms import picture

GREEDY = Sampling(max_new_tokens=32, temperature=0.0)
DRAWN = Sampling(max_new_tokens=32)
PICTURES = [picture(number) for number in range(4)]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OPENAI_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def server():
    with StandInServer() as running:
        yield running


def engine_on(server, **changes):
    return OpenAIEngine(MODEL, server.settings(**changes))


def on(server, **changes):
    """The `model` section of a config."""
    return {"model_name_or_path": MODEL, "device": "auto", "engine": "openai",
            "server": dataclasses.asdict(server.settings(**changes))}  # fmt: skip


def about(name, *images, **more):
    return Request(name, [user_message(f"{name} what is this?", len(images))], list(images), **more)


def some(count):
    return [about(f"row{number}", PICTURES[number % len(PICTURES)]) for number in range(count)]


def seen(request):
    return described(request.images)


def test_answers_are_those_of_the_pictures_that_were_sent_pixel_by_pixel(server):
    other = PICTURES[0].copy()
    other.putpixel((0, 0), (1, 2, 3))
    requests = [about("one", PICTURES[0]), about("two", other), about("both", other, PICTURES[0])]
    answers = engine_on(server).generate(requests, GREEDY)
    assert [one.text for one in answers] == [seen(request) for request in requests]
    assert len({one.text for one in answers}) == 3


def test_messages_keep_turns_order_and_plain_text(server):
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        user_message("first one", 1),
        assistant_message("Yes."),
        {"role": "user", "content": [{"type": "text", "text": "chat before "}, {"type": "image"},
                                     {"type": "text", "text": "after"}]},
    ]  # fmt: skip
    engine = engine_on(server)
    [answer] = engine.generate([Request("chat", turns, PICTURES[:2])], GREEDY)
    sent = server.asked[0].body["messages"]
    assert [(turn["role"], turn["content"]) for turn in sent if isinstance(turn["content"], str)] == [
        ("system", "Be short."), ("assistant", "Yes.")]  # fmt: skip
    assert [block["type"] for block in sent[3]["content"]] == ["text", "image_url", "text"]
    assert [sent[3]["content"][place]["text"] for place in (0, 2)] == ["chat before ", "after"]
    assert answer.text == described(PICTURES[:2])
    [told] = engine.generate([about("alone")], GREEDY)
    assert (told.text, server.asked[1].body["messages"]) == (
        "No picture.", [{"role": "user", "content": "alone what is this?"}])  # fmt: skip


def test_settings_reach_the_server_and_what_it_would_add_itself_is_off(server):
    engine = engine_on(server)
    engine.generate([about("row", seed=3)], Sampling(11, temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.1))
    engine.generate([about("plain")], GREEDY)
    server.owner = "llamacpp"
    engine_on(server).generate([about("other")], Sampling(11, temperature=0, repetition_penalty=1.3))
    server.owner = "acme"
    engine_on(server).generate([about("unknown")], GREEDY)
    drawn, plain, other, unknown = ({**one.body, "messages": 0} for one in server.asked)
    common = {"model": MODEL, "messages": 0}
    assert drawn == {**common, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.0, "repetition_penalty": 1.1,
                     "max_tokens": 11, "seed": row_seed(3, "row") % 2**31, "return_token_ids": True}  # fmt: skip
    assert plain == {**common, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
                     "max_tokens": 32, "return_token_ids": True}  # fmt: skip
    assert other == {**common, "temperature": 0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.3,
                     "max_tokens": 11}  # fmt: skip
    assert unknown == {**common, "temperature": 0.0, "top_p": 1.0, "max_tokens": 32}


def test_openai_itself_takes_the_limit_of_length_under_its_new_name(server):
    engine = engine_on(server)
    engine.server.address = "https://api.openai.com/v1"  # the connection stays
    engine.generate([about("row")], GREEDY)
    assert server.asked[0].body["max_completion_tokens"] == 32
    assert "max_tokens" not in server.asked[0].body


def test_an_answer_that_is_withheld_or_empty(server):
    server.words = {"row0": "withheld", "row1": None}
    answers = engine_on(server).generate(some(2), GREEDY)
    assert answers[0].error == "request row0: the server broke off with finish_reason 'content_filter'"
    assert (answers[1].text, answers[1].finish_reason) == ("", "stop")


def test_a_draw_belongs_to_seed_and_id_whatever_is_asked_beside_it(server):
    engine = engine_on(server)
    first = engine.generate([about("a"), about("b"), about("b", seed=1)], DRAWN)
    assert len({one.text for one in first}) == 3
    assert engine.generate([about("b"), about("c"), about("a")], DRAWN)[::2] == first[1::-1]


def test_order_is_kept_the_limit_of_concurrency_holds_and_each_row_is_asked_once(server):
    server.delay = 0.05
    requests = some(24)
    answers = engine_on(server, concurrency=5).generate(requests, DRAWN)
    assert [one.id for one in answers] == [request.id for request in requests]
    assert all(one.text.startswith(seen(request)) for one, request in zip(answers, requests, strict=True))
    assert server.answers() == Counter(request.id for request in requests)
    assert 1 < server.busiest <= 5


def test_rows_about_one_picture_go_together_and_it_is_encoded_once(server, monkeypatch):
    encoded = []
    monkeypatch.setattr(chat, "encode_png", lambda image: encoded.append(image) or encode_png(image))
    kept = []
    pictures_of = chat.Pictures.__init__
    monkeypatch.setattr(chat.Pictures, "__init__", lambda self, asked: kept.append(self) or pictures_of(self, asked))
    requests = [*some(8), about("copy", PICTURES[1].copy())]
    engine_on(server, concurrency=1).generate(requests, GREEDY)
    order = [one.name for one in server.asked]
    assert order == ["row0", "row4", "row1", "row5", "copy", "row2", "row6", "row3", "row7"]
    assert len(encoded) == len(PICTURES)
    assert not kept[0]._urls


def test_equal_requests_are_asked_once(server):
    same = [about("same", PICTURES[0]), dataclasses.replace(about("same", PICTURES[0]), id="twin")]
    answers = engine_on(server).generate(same, GREEDY)
    assert [(one.id, one.text) for one in answers] == [("same", seen(same[0])), ("twin", seen(same[0]))]
    assert len(server.asked) == 1
    engine_on(server).generate(same, DRAWN)
    assert len(server.asked) == 3


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
        ("late", r"request row0: no answer within 1 s in 2 tries. Raise server.timeout, or lower server.concurrency"),
        ("cut", r"request row0: the connection broke before the answer was whole in 2 tries \(RemoteProtocolError\)"),
        ("no json", r"request row0: the server sent no chat completion but '\{\"choices\": .*half an ans' in 2 tries"),
        ("no answer", r"request row0: the server sent no chat completion but .*upstream broke.* in 2 tries"),
    ],
)
def test_after_the_last_try_that_request_alone_has_failed(server, fault, message):
    server.faults = {"row0": [fault, fault]}
    answers = engine_on(server, timeout=1.0 if fault == "late" else 20.0, max_retries=1).generate(some(3), GREEDY)
    assert [one.finish_reason for one in answers] == ["error", "stop", "stop"]
    assert answers[0].text == ""
    assert sum(one.name == "row0" for one in server.asked) == 2
    assert re.fullmatch(message + r"\.?", answers[0].error), answers[0].error


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

    def test_openai_without_a_key_is_not_even_asked(self):
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
            (402, r"/v1: 429 \(fault 402 .*\). Add credit to the account"),
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

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
    def test_a_process_that_is_killed_or_interrupted_loses_no_answer_that_was_kept(self, server, tmp_path, how):
        server.delay = 0.03
        settings = server.settings(cache=tmp_path / "kept.sqlite", concurrency=2)
        requests = some(30)

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
        assert 3 <= kept < 30
        if how == signal.SIGINT:
            assert kept == len(before)  # what was under way was waited for
        answers = OpenAIEngine(MODEL, settings).generate(requests, GREEDY)
        assert [one.text for one in answers] == [seen(one) for one in requests]
        paid = server.answers() - before
        assert sum(paid.values()) == 30 - kept
        assert set(paid.values()) == {1}


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


@pytest.mark.parametrize(
    ("prefix", "said", "text", "reason"),
    [
        ("", " It is 3.5 m tall. It sleeps.", "It is 3.5 m tall.", "sentence"),
        ("", "Dr. Who sleeps.", "Dr. Who sleeps.", "stop"),
        ("A red", " cat. It sleeps.", " cat.", "sentence"),
        ("A red ", " cat. It sleeps.", "cat.", "sentence"),
        ("It is red.", " A cat. It sleeps.", " A cat.", "sentence"),
    ],
)
def test_sentences_are_cut_and_joined_as_the_transformers_engine_does(server, prefix, said, text, reason):
    server.words = {"cut": said}
    request = about("cut", prefix=prefix, stop_at_sentence=True)
    [answer] = engine_on(server).generate([request], GREEDY)
    assert (answer.text, answer.finish_reason) == (text, reason)
    body = server.asked[0].body
    if prefix:
        assert body["messages"][-1] == {"role": "assistant", "content": prefix.rstrip()}
        assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    [whole] = engine_on(server).generate([dataclasses.replace(request, stop_at_sentence=False)], GREEDY)
    assert whole.text == (said if prefix.rstrip() == prefix != "" else said.lstrip())


def test_token_ids_of_vllm_are_the_answers_without_their_end_and_others_are_counted(server):
    server.words = {"row": "Three words more"}
    [answer] = engine_on(server).generate([about("row")], GREEDY)
    assert (answer.token_ids, answer.end_token, answer.length) == ([10, 11, 12], 2, 3)
    server.owner = "acme"
    [answer] = engine_on(server).generate([about("row")], GREEDY)
    assert (answer.token_ids, answer.end_token, answer.length) == ([], None, 3)


class TestFirstToken:
    def test_probabilities_of_words_among_the_likeliest(self, server):
        server.top = [
            (" Yes", math.log(0.5)),
            ("Yes", math.log(0.125)),
            ("No", math.log(0.25)),
            ("Not", math.log(0.05)),
        ]
        server.faults = {"row1": [400]}
        engine = engine_on(server)
        rows = engine.first_token(some(2), ["Yes", "No", "Maybe"])
        assert rows[0] == pytest.approx({"Yes": 0.625, "No": 0.25, "Maybe": 0.0})
        assert list(rows[1]) == ["Yes", "No", "Maybe"]
        assert all(math.isnan(value) for value in rows[1].values())
        body = next(one.body for one in server.asked if one.name == "row0")
        sent = {
            name: body[name] for name in ("logprobs", "top_logprobs", "max_tokens", "temperature", "top_p", "top_k")
        }
        assert sent == {
            "logprobs": True,
            "top_logprobs": 20,
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
        }

    def test_kept_and_apart_from_generated_answers(self, server, tmp_path):
        server.top = [("Yes", -0.5)]
        for _ in range(2):
            engine = engine_on(server, cache=tmp_path / "kept.sqlite")
            assert engine.first_token(some(1), ["Yes"])[0]["Yes"] == pytest.approx(math.exp(-0.5))
        assert len(server.asked) == 1
        engine.generate(some(1), Sampling(max_new_tokens=1))
        assert len(server.asked) == 2

    def test_a_server_that_tells_none(self, server):
        with pytest.raises(
            ServerError, match=r"tells no probabilities of its tokens \(top_logprobs\), which first_token"
        ):
            engine_on(server).first_token(some(1), ["Yes"])

    @pytest.mark.parametrize("words", [[], ["Yes", " "], ["Yes", " Yes"]])
    def test_words_that_cannot_be(self, server, words):
        with pytest.raises(
            ValueError, match="give at least one that an answer can begin with, none empty and none twice"
        ):
            engine_on(server).first_token(some(1), words)


class TestRefused:
    """Nothing is ignored: what a server cannot honour is refused by its name, before anything is asked."""

    @pytest.mark.parametrize(
        ("request_", "sampling", "message"),
        [
            (about("row"), Sampling(contrast=Contrast()), r"\(sampling.contrast\) was asked for, which no server does"),
            (about("row"), Sampling(attention_layer=0), r"\(sampling.attention_layer\) was asked for, which no server"),
            (about("row", image_mask=ImageMask(0.5, 0)), DRAWN, r"hiding image tokens \(image_mask\) was asked for"),
            (about("row", given=[1]), DRAWN, r"going on after given token ids \(given\) was asked for"),
            (about("row"), Sampling(top_p=2.0), r"top_p must be in \(0, 1\], got 2.0"),
        ],
    )
    def test_by_every_server(self, server, request_, sampling, message):
        with pytest.raises(ValueError, match=message):
            engine_on(server).generate([request_], sampling)
        assert not server.asked

    @pytest.mark.parametrize(
        ("request_", "sampling", "message"),
        [
            (
                about("row", prefix="A"),
                DRAWN,
                r"\(prefix\) was asked for, which a server that calls itself 'acme' is not known",
            ),
            (
                about("row"),
                Sampling(top_k=5),
                r"sampling.top_k is 5, and http.* \(which calls itself 'acme'\) is not known to",
            ),
            (
                about("row"),
                Sampling(repetition_penalty=1.2),
                r"sampling.repetition_penalty is 1.2, .* Set .* to 1 \(off\)",
            ),
        ],
    )
    def test_by_a_server_of_which_nothing_more_is_known(self, server, request_, sampling, message):
        server.owner = "acme"
        with pytest.raises(ValueError, match=message):
            engine_on(server).generate([request_], sampling)
        assert not server.asked

    def test_scores_and_attention(self, server):
        engine = engine_on(server)
        with pytest.raises(
            ValueError, match=r"log-probs of given answers \(logprobs\) was asked for, which no server does"
        ):
            engine.logprobs(some(1), ["x"])
        with pytest.raises(ValueError, match=r"attention of answers to their pictures \(attention\) was asked for"):
            engine.attention(some(1), ["x"])

    @pytest.mark.parametrize(
        ("name", "missing"), [("mia_dpo", r"attention \("), ("bdhs", r"image_mask \("), ("m3id", r"contrast \(")]
    )
    def test_stages_that_need_more_before_the_server_is_asked(self, server, name, missing, tmp_path):
        stage = bundled.load_stage(name)
        export(tmp_path / "rows", split="train_biased", kind="caption", start=0, stop=2)
        changes = {"model": on(server), "data": {"path": tmp_path / "rows"}, "output": {"path": tmp_path / "out"}}
        values = config.merge(config.read_yaml(bundled.find(f"datagen/{name}_scenes")), changes)
        with pytest.raises(ValueError, match=rf"{name} needs .*{missing}.*which OpenAIEngine cannot do with any model"):
            stage.main(config.build(stage.Config, values))
        assert server.listed == 0
        assert not (tmp_path / "out").exists()

    def test_a_verifier_that_scores_no_answers(self, server, tmp_path):
        stage = bundled.load_stage("filter_pairs")
        values = {"model": on(server), "data": {"path": tmp_path}, "output": {"path": tmp_path / "out"},
                  "filters": {"reliance": {}}}  # fmt: skip
        with pytest.raises(ValueError, match=r"filter_pairs needs logprobs \(.*which OpenAIEngine cannot do"):
            stage.load_verifier(config.build(stage.Config, values))

    def test_a_prefix_where_the_server_is_not_known_to_take_it(self, server):
        chosen = EngineConfig(MODEL, engine="openai", server=server.settings())
        assert load_engine(chosen, needs=["prefix", "sample", "first_token"], stage="m").fingerprint == MODEL
        server.owner = "acme"
        with pytest.raises(
            ValueError, match=r"m needs a forced start of the answer \(prefix\), which a server that calls"
        ):
            load_engine(chosen, needs=["prefix"], stage="m")

    @pytest.mark.parametrize("changes", [{"adapter": "x"}, {"load_in_4bit": True}, {"dtype": "float32"}])
    def test_settings_of_a_model_in_this_process(self, server, changes):
        chosen = EngineConfig(MODEL, engine="openai", server=server.settings(), **changes)
        with pytest.raises(
            ValueError, match=rf"{next(iter(changes))} is .*, and a server decides itself what it loads"
        ):
            load_engine(chosen)
        assert not server.listed


class TestStages:
    @pytest.fixture
    def rows(self, tmp_path):
        export(tmp_path / "rows", split="train_fair", kind="caption", start=0, stop=6)
        return tmp_path / "rows"

    def built(self, server, rows, folder, **settings):
        stage = bundled.load_stage("sample_responses")
        values = {"model": on(server, **settings), "data": {"path": rows}, "output": {"path": folder, "block_size": 2},
                  "num_generations": 2}  # fmt: skip
        return stage, config.build(stage.Config, values)

    def test_a_stage_whose_server_fails_goes_on_where_it_was_and_pays_nothing_twice(self, server, rows, tmp_path):
        stage, whole = self.built(server, rows, tmp_path / "whole")
        assert stage.main(whole).models == {"generator": MODEL}
        made = list(read_records(tmp_path / "whole", Candidates))
        assert len(made) == 6
        for row in made:
            told = described([open_image(row.images[0])])
            assert [response["text"].startswith(told) for response in row.responses] == [True, True]
        server.asked.clear()
        server.fails_after = 7
        stage, cut = self.built(server, rows, tmp_path / "cut", cache=tmp_path / "kept.sqlite", concurrency=1)
        with pytest.raises(ServerError, match="OPENAI_API_KEY is not set"):
            stage.main(cut)
        server.fails_after = None
        stage.main(cut)
        assert list(read_records(tmp_path / "cut", Candidates)) == made
        assert sum(server.answers().values()) == 12

    def test_a_plan_counts_what_the_run_will_ask(self, server, rows, tmp_path):
        stage, built = self.built(server, rows, tmp_path / "out")
        [made] = planner.plan([planner.Stage("sample_responses", stage, built)], rows=2)
        before = dataclasses.asdict(USAGE)
        stage.main(built)
        used = {name: getattr(USAGE, name) - value for name, value in before.items()}
        assert (made.requests, made.text_tokens, made.image_tokens) == (12, 12 * 7, 0)
        assert (used["requests"], used["prompt_tokens"]) == (12, 84)
        assert made.new_tokens == pytest.approx(used["new_tokens"], rel=0.3)


def test_the_examples_of_the_page_are_configs():
    page = (Path(__file__).parents[1] / "docs" / "engines.md").read_text(encoding="utf-8")
    found = re.findall(r"```yaml\n# (\w+)\n(.*?)```", page, re.DOTALL)
    assert [name for name, _ in found] == ["sample_responses", "score_responses"]
    for name, text in found:
        built = config.build(bundled.load_stage(name).Config, yaml.safe_load(text), source="docs/engines.md")
        model = built.model if name == "sample_responses" else read_rewards(built.rewards).entries[0].reward.model
        assert model.engine == "openai"


class TestJudges:
    GRADES = json.dumps({"helpfulness": 3, "correctness": 1, "coherence": 4, "complexity": 1, "verbosity": 2})

    def test_a_judge_behind_a_server_sees_the_pictures_or_is_told_the_facts(self, server):
        model = EngineConfig(MODEL, engine="openai", server=server.settings())
        rows = [Response(f"r{n}", [encode_png(PICTURES[n])], [user_message("What?", 1)], "A cat.",
                         facts={"captions": ["A dog."]}) for n in range(2)]  # fmt: skip
        server.words = {"Grade": self.GRADES}
        for pictures in (True, False):
            server.asked.clear()
            scores = JudgedAttributes(model=model, pictures=pictures).score(rows)
            assert scores["correctness"].tolist() == [1.0, 1.0]
            contents = [one.body["messages"][0]["content"] for one in server.asked]
            if pictures:
                assert {block["type"] for content in contents for block in content} == {"image_url", "text"}
                assert len({json.dumps(content[0]) for content in contents}) == 2
            else:
                assert all(isinstance(content, str) and "A dog." in content for content in contents)

    def test_scores_are_those_of_the_judge_wherever_it_runs(self, server, tmp_path):
        stage = bundled.load_stage("score_responses")
        server.words = {"Grade": self.GRADES}
        turn = [user_message("What?", 1)]
        rows = [
            Candidates(f"r{n}", [encode_png(PICTURES[n])], turn, [{"text": "A cat."}, {"text": "A dog."}])
            for n in range(2)
        ]
        write_records("t", rows, output=OutputConfig(tmp_path / "rows"), record=Candidates, settings={}, seed=0)
        for address in (server.url, server.url.replace("127.0.0.1", "localhost")):
            judge = {"name": "judge", "model": on(server, base_url=address), "weight": {"correctness": 1.0}}
            values = {"data": {"path": tmp_path / "rows"}, "output": {"path": tmp_path / "out"}, "rewards": [judge]}
            stage.main(config.build(stage.Config, values))
        assert len(server.asked) == 4
        scored = list(read_records(tmp_path / "out", Candidates))
        assert [response["scores"]["total"] for row in scored for response in row.responses] == [1.0] * 4

    def test_a_pairwise_judge(self, server):
        server.words = {"Compare": '{"reason": "r", "better": "A", "confidence": 90}'}
        judge = PairwiseJudge(model=EngineConfig(MODEL, engine="openai", server=server.settings()))
        ask = [user_message("What?", 1)]
        image = [encode_png(PICTURES[0])]
        [verdict] = judge.compare([(Response("a", image, ask, "A cat."), Response("b", image, ask, "A dog."))])
        assert verdict.votes == ("first", "second")
        assert len(server.asked) == 2

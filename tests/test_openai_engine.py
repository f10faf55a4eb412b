"""The server engine: what a server is sent, what becomes of its answers, and what is refused."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest

from prefalign import bundled, config
from prefalign.engines import Contrast, ImageMask, Request, Sampling, chat
from prefalign.engines.config import EngineConfig, ServerConfig, VllmConfig
from prefalign.engines.loading import check_engine, load_engine
from prefalign.engines.server import ServerError
from prefalign.images import encode_png
from prefalign.records import assistant_message, row_seed, user_message
from prefalign.scenes.export import export
from tests import stand_in_server
from tests.stand_in_server import (
    DRAWN,
    GREEDY,
    MODEL,
    PICTURES,
    about,
    described,
    engine_on,
    model_section,
    seen,
    some,
)


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
        assert rows[0].probs == pytest.approx({"Yes": 0.625, "No": 0.25, "Maybe": 0.0})
        assert rows[0].error is None
        assert rows[1].probs == {}
        assert "request row1: the server answered 400" in rows[1].error
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
            assert engine.first_token(some(1), ["Yes"])[0].probs["Yes"] == pytest.approx(math.exp(-0.5))
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
        changes = {
            "model": model_section(server),
            "data": {"path": tmp_path / "rows"},
            "output": {"path": tmp_path / "out"},
        }
        values = config.merge(config.read_yaml(bundled.find(f"datagen/{name}_scenes")), changes)
        with pytest.raises(ValueError, match=rf"{name} needs .*{missing}.*which OpenAIEngine cannot do with any model"):
            stage.main(config.build(stage.Config, values))
        assert server.listed == 0
        assert not (tmp_path / "out").exists()

    def test_a_verifier_that_scores_no_answers(self, server, tmp_path):
        stage = bundled.load_stage("filter_pairs")
        values = {"model": model_section(server), "data": {"path": tmp_path}, "output": {"path": tmp_path / "out"},
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

    @pytest.mark.parametrize(
        "changes",
        [
            {"adapter": "x"},
            {"load_in_4bit": True},
            {"dtype": "float32"},
            {"processor": {"size": 9}},
            {"device": "cuda:1"},
            {"attn_implementation": "eager"},
            {"trust_remote_code": True},
        ],
    )
    def test_settings_of_a_model_in_this_process(self, server, changes):
        chosen = EngineConfig(MODEL, engine="openai", server=server.settings(), **changes)
        with pytest.raises(
            ValueError, match=rf"{next(iter(changes))} is .*, and a server decides itself what it loads"
        ):
            load_engine(chosen)
        assert not server.listed

    def test_a_config_that_names_the_cpu_is_taken(self, server):
        chosen = EngineConfig(MODEL, engine="openai", device="cpu", server=server.settings())
        assert load_engine(chosen).fingerprint == MODEL

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            (
                EngineConfig("scenes", server=ServerConfig(base_url="http://host/v1", cache=Path("kept"))),
                r"^server.base_url, server.cache would be read by nothing: the engine is transformers.* server.cache null where",
            ),
            (
                EngineConfig("scenes", engine="vllm", server=ServerConfig(concurrency=4)),
                r"^server.concurrency would be read by nothing: the engine is vllm.* \(server.concurrency 16 where a config",
            ),
            (
                EngineConfig("scenes", vllm=VllmConfig(tensor_parallel_size=8)),
                r"^vllm.tensor_parallel_size would be read by nothing: the engine is transformers.* belongs to `engine: vllm`",
            ),
            (
                EngineConfig(MODEL, engine="openai", vllm=VllmConfig(enforce_eager=True)),
                r"^vllm.enforce_eager would be read by nothing: the engine is openai.* \(vllm.enforce_eager false where",
            ),
        ],
    )
    def test_settings_of_an_engine_that_was_not_chosen(self, chosen, message):
        for asked in (check_engine, load_engine):
            with pytest.raises(ValueError, match=message):
                asked(chosen)

    @pytest.mark.parametrize("name", ["/mnt/models/Qwen2.5-VL-7B", "/model", "~/qwen", r"C:\models\qwen"])
    def test_a_model_that_is_served_under_its_path(self, server, monkeypatch, name):
        monkeypatch.setattr(stand_in_server, "MODEL", name)
        with pytest.raises(
            ValueError, match=r"Start the server with a name \(vLLM and SGLang: --served-model-name, llama"
        ) as told:
            load_engine(EngineConfig(name, engine="openai", server=server.settings()))
        assert str(told.value).startswith(f"model_name_or_path is {name!r}, the path that a server calls a model by")
        assert not server.listed

    def test_names_with_strokes_are_names(self, server, monkeypatch):
        monkeypatch.setattr(stand_in_server, "MODEL", "Qwen/Qwen2.5-VL-7B-Instruct")
        chosen = EngineConfig("Qwen/Qwen2.5-VL-7B-Instruct", engine="openai", server=server.settings())
        assert load_engine(chosen).fingerprint == "Qwen/Qwen2.5-VL-7B-Instruct"

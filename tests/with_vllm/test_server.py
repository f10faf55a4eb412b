"""A real vLLM server through the openai engine: token-equal to transformers, and nothing lost when it is killed."""

import json
import time
from pathlib import Path

import pytest
from command import prefalign
from engine_cases import GREEDY, some_requests
from tiny_vlms import picture

from prefalign import bundled
from prefalign.engines import Request
from prefalign.engines.config import EngineConfig, ServerConfig
from prefalign.engines.loading import load_engine
from prefalign.models import ModelConfig, load_processor
from prefalign.records import Candidates, user_message
from prefalign.store import read_records

serving = bundled.load_stage(str(Path(__file__).parents[2] / "benchmarks" / "serving.py"))
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--no-enable-chunked-prefill"]


@pytest.fixture(scope="module")
def served(checkpoints, tmp_path_factory, request):
    """A server on a checkpoint whose chat template writes what the tokenizer adds, and the transformers engine on the same."""
    checkpoint = checkpoints[request.param]
    folder = tmp_path_factory.mktemp("served")
    load_processor(ModelConfig(str(checkpoint))).save_pretrained(folder / "processor")
    template = folder / "processor" / "chat_template.jinja"
    server = serving.VllmServer(checkpoint, folder / "log", [*OPTIONS, "--chat-template", str(template)])
    with server:
        yield server, load_engine(ModelConfig(str(checkpoint)))


def check_equal(answers, slow, requests):
    """The server's answers are those of the transformers engine, token for token.

    A server may draw a mark that engines in this process never draw (the begin of sequence): from there on nothing is compared.
    Nor are characters at an answer's end of which only some bytes were drawn, which the server leaves out of its text.
    """
    whole = 0
    for mine, theirs in zip(answers, slow.generate(requests, GREEDY), strict=True):
        drawn = next((place for place, token in enumerate(mine.token_ids) if token in slow.banned), None)
        assert mine.token_ids[:drawn] == theirs.token_ids[:drawn]
        assert mine.error is None
        if drawn is None:
            assert mine.finish_reason == theirs.finish_reason
            assert mine.text.rstrip("\ufffd") == theirs.text.rstrip("\ufffd")
            whole += 1
    assert whole >= 0.75 * len(requests)


@pytest.mark.parametrize("served", ["qwen2_5_vl", "llava"], indirect=True, scope="module")
class TestAnswers:
    def engine(self, served):
        settings = ServerConfig(base_url=served[0].address, concurrency=2, max_retries=1)
        return load_engine(EngineConfig("tiny", engine="openai", server=settings), needs=["sample", "prefix"])

    @pytest.mark.parametrize("prefix", ["", "There is"])
    def test_greedy_answers_are_equal_token_for_token(self, served, prefix):
        requests = some_requests(8, prefix=prefix)
        assert {len(request.images) for request in requests} == {1, 2}
        check_equal(self.engine(served).generate(requests, GREEDY), served[1], requests)

    def test_swapped_pictures_change_the_answer(self, served):
        first, second = picture(1), picture(2)
        asked = [
            Request(str(number), [user_message("What is in the image?", 2)], images)
            for number, images in enumerate([[first, second], [second, first]])
        ]
        answers = self.engine(served).generate(asked, GREEDY)
        check_equal(answers, served[1], asked)
        assert answers[0].token_ids != answers[1].token_ids

    def test_first_words_have_the_probabilities_of_the_transformers_engine(self, served):
        requests = some_requests(2)
        (slow,) = served[1].generate(requests[:1], GREEDY)
        words = [served[1].tokenizer.decode(slow.token_ids[:1]), "zebra"]
        found = self.engine(served).first_token(requests[:1], words)
        assert found[0].probs["zebra"] == 0
        if words[0].isascii() and words[0].strip():
            expected = served[1].first_token(requests[:1], words[:1])[0]
            assert found[0].probs[words[0]] == pytest.approx(expected.probs[words[0]], rel=1e-3)


def rows_in(folder):
    return {row.id: row for row in read_records(folder, Candidates)}


@pytest.mark.parametrize("served", ["llava"], indirect=True, scope="module")
def test_a_server_killed_amid_requests_and_started_again_costs_no_row_and_doubles_none(served, tmp_path):
    server, _ = served
    export = prefalign("scenes", "export", "--output", tmp_path / "prompts", "--split", "train_fair", "--kind", "caption",
                       "--stop", 24)  # fmt: skip
    assert export.wait() == 0, export.stdout.read()

    def stage(output):
        return prefalign("run", "sample_responses", "--config", "datagen/sample_responses_scenes", "--model.engine", "openai",
                         "--model.model_name_or_path", "tiny", "--model.server.base_url", server.address,
                         "--model.server.concurrency", 2, "--model.server.max_retries", 1, "--data.path", tmp_path / "prompts",
                         "--output.path", output, "--output.block_size", 4, "--num_generations", 2)  # fmt: skip

    whole = stage(tmp_path / "whole")
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said

    cut = stage(tmp_path / "cut")
    while not (list((tmp_path / "cut").rglob("*.parquet")) and server.running()):
        assert cut.poll() is None, cut.stdout.read()
        time.sleep(0.02)
    server.kill()
    said, _ = cut.communicate(timeout=300)
    assert cut.returncode != 0
    assert "no server answers" in said or "the connection broke" in said
    before = rows_in(tmp_path / "cut")
    assert 0 < len(before) < 24

    server.start()
    again = stage(tmp_path / "cut")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    expected, found = rows_in(tmp_path / "whole"), rows_in(tmp_path / "cut")
    assert sorted(found) == sorted(expected)
    assert len(list(read_records(tmp_path / "cut", Candidates))) == 24
    assert {name: found[name] for name in before} == before
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    assert manifest["rows_out"] == 24
    assert all(len(row.responses) == 2 and all(one["token_ids"] for one in row.responses) for row in found.values())

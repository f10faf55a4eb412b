"""Stages, plans and judges through a server."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from prefalign import bundled, config, plan_table, planner
from prefalign.engines import USAGE
from prefalign.engines.config import EngineConfig
from prefalign.engines.server import ServerError
from prefalign.images import encode_png, open_image
from prefalign.online.annotating import ByJudge
from prefalign.records import Candidates, user_message
from prefalign.rewards import Response, read_rewards
from prefalign.rewards.judged import JudgedAttributes, PairwiseJudge
from prefalign.scenes.export import export
from prefalign.store import OutputConfig, read_records, write_records
from tests.stand_in_server import MODEL, PICTURES, described, model_section


class TestStages:
    @pytest.fixture
    def rows(self, tmp_path):
        export(tmp_path / "rows", split="train_fair", kind="caption", start=0, stop=6)
        return tmp_path / "rows"

    def built(self, server, rows, folder, **settings):
        stage = bundled.load_stage("sample_responses")
        values = {"model": model_section(server, **settings), "data": {"path": rows}, "output": {"path": folder, "block_size": 2},
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

    def test_a_plan_says_where_a_server_is_paid_twice_and_how_it_is_not(self, server, rows, tmp_path):
        stage = bundled.load_stage("quality_pairs")
        server.words = {"Grade": TestJudges.GRADES}

        def asked(**settings):
            judge = {"name": "judge", "model": model_section(server, **settings)}
            values = {"data": {"path": rows, "limit": 1}, "output": {"path": tmp_path / str(len(server.asked))},
                      "rewards": [judge], "regrade": 0.0, "exports": [], "sampling": {"max_new_tokens": 4}}  # fmt: skip
            known = config.merge(config.read_yaml(bundled.find("datagen/quality_pairs_scenes")), values)
            built = config.build(stage.Config, known)
            before = len(server.asked)
            plans = planner.plan([planner.Stage("quality_pairs", stage, built)])
            planned = len(server.asked)
            stage.main(built)
            return plan_table.table(plans), planned - before, len(server.asked) - planned

        table, planned, ran = asked()
        assert (
            "paid for and were not kept, so the run asks for them again. To pay once, set rewards.0.model.server.cache"
            in table
        )
        assert planned == ran > 0
        table, planned, ran = asked(cache=tmp_path / "kept.sqlite")
        assert "paid for" not in table
        assert planned > 0 == ran

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
            judge = {"name": "judge", "model": model_section(server, base_url=address), "weight": {"correctness": 1.0}}
            values = {"data": {"path": tmp_path / "rows"}, "output": {"path": tmp_path / "out"}, "rewards": [judge]}
            stage.main(config.build(stage.Config, values))
        assert len(server.asked) == 4
        scored = list(read_records(tmp_path / "out", Candidates))
        assert [response["scores"]["total"] for row in scored for response in row.responses] == [1.0] * 4

    def test_a_judge_that_does_not_reply_fails_its_row_and_is_asked_again_by_a_new_run(self, server, tmp_path):
        stage = bundled.load_stage("score_responses")
        server.words = {"Grade": self.GRADES}
        server.faults = {"Grade": [0, 0, 500, 0]}  # of the second row's two answers one gets no reply
        turn = [user_message("What?", 1)]
        rows = [
            Candidates(f"r{n}", [encode_png(PICTURES[n])], turn, [{"text": "A cat."}, {"text": "A dog."}])
            for n in range(2)
        ]
        write_records("t", rows, output=OutputConfig(tmp_path / "rows"), record=Candidates, settings={}, seed=0)
        judge = {"name": "judge", "model": model_section(server, max_retries=0, concurrency=1),
                 "weight": {"correctness": 1.0}, "cache": str(tmp_path / "judge.sqlite")}  # fmt: skip

        def run(folder):
            values = {"data": {"path": tmp_path / "rows"}, "output": {"path": folder}, "rewards": [judge]}
            manifest = stage.main(config.build(stage.Config, values))
            return manifest, [row.id for row in read_records(folder, Candidates)]

        manifest, made = run(tmp_path / "first")
        assert (manifest.rows_in, manifest.rows_out, manifest.quarantined, made) == (2, 1, 1, ["r0"])
        assert manifest.dropped == {"judge_failed": 1}
        [line] = (tmp_path / "first" / "quarantine").glob("*.jsonl")
        assert "judge: the server answered 500 (fault 500 of Bearer none) in the one try it had" in line.read_text()
        assert not any("could not be read" in json.dumps(one.body) for one in server.asked)
        assert len(server.asked) == 4
        assert run(tmp_path / "second")[1] == ["r0", "r1"]
        assert len(server.asked) == 5  # the one that failed

    def test_rows_whose_grades_failed_are_no_quality_pairs(self, server, tmp_path):
        """The first grades of one row fail; a second one of another row is missing, and its first one counts."""
        stage = bundled.load_stage("quality_pairs")
        export(tmp_path / "rows", split="train_fair", kind="caption", start=0, stop=3)
        server.words = {"Grade": self.GRADES}
        server.faults = {"Grade": [429, *[0] * 7, 429]}
        values = {"data": {"path": tmp_path / "rows"}, "output": {"path": tmp_path / "out"}, "regrade": 1.0, "exports": [],
                  "rewards": [{"name": "judge", "model": model_section(server, max_retries=0, concurrency=1)}],
                  "num_generations": 2, "sampling": {"max_new_tokens": 8}, "pairs": {"group_size": None}}  # fmt: skip
        known = config.merge(config.read_yaml(bundled.find("datagen/quality_pairs_scenes")), values)
        manifest = stage.main(config.build(stage.Config, known))
        assert (manifest.rows_out, manifest.dropped) == (2, {"judge_failed": 1})
        answers = [
            response for row in read_records(tmp_path / "out" / "answers", Candidates) for response in row.responses
        ]
        assert not any(None in response["scores"].values() for response in answers)
        missing = [set(response["regraded"].values()) == {None} for response in answers]
        assert missing == [False, False, True, False]

    def test_a_pairwise_judge_that_fails_is_no_verdict_but_an_error(self, server):
        server.words = {"Compare": '{"better": "A"}'}
        server.faults = {"Compare": [0, 503, 0, 0]}
        judge = PairwiseJudge(
            model=EngineConfig(MODEL, engine="openai", server=server.settings(max_retries=0, concurrency=1))
        )
        ask = [user_message("What?", 1)]
        pairs = [
            tuple(Response("a", [encode_png(PICTURES[n])], ask, text) for text in ("A cat.", "A dog.")) for n in (0, 1)
        ]
        failed, other = judge.compare(pairs)
        assert (failed.winner, failed.reason) == (None, "no reply")
        assert failed.error == "the server answered 503 (fault 503 of Bearer none) in the one try it had"
        assert (other.winner, other.error, other.votes) == (None, None, ("first", "second"))
        [one, two] = ByJudge(PairwiseJudge(engine=judge.judge.engine)).prefer(pairs)
        assert [one.reason, two.reason] == ["order_disagrees"] * 2

    def test_a_pairwise_judge(self, server):
        server.words = {"Compare": '{"reason": "r", "better": "A", "confidence": 90}'}
        judge = PairwiseJudge(model=EngineConfig(MODEL, engine="openai", server=server.settings()))
        ask = [user_message("What?", 1)]
        image = [encode_png(PICTURES[0])]
        [verdict] = judge.compare([(Response("a", image, ask, "A cat."), Response("b", image, ask, "A dog."))])
        assert verdict.votes == ("first", "second")
        assert len(server.asked) == 2

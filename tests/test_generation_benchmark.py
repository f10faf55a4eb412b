"""The benchmarks of generation measure what they say: the loop is BDHS too, recorded rows are all stored, stages are killed."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from prefalign import bundled
from prefalign.engines import Request, Sampling
from prefalign.execution import Options, Shard
from prefalign.records import Candidates, Prompt, user_message
from prefalign.replies import Replies
from prefalign.scenes.data import rows
from prefalign.store import OutputConfig, write_records
from prefalign.text import load_similarity

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def generation():
    return bundled.load_stage(str(BENCHMARKS / "generation.py"))


@pytest.fixture(scope="module")
def chaos():
    return bundled.load_stage(str(BENCHMARKS / "chaos.py"))


@pytest.mark.parametrize(
    ("prefix", "joined", "expected"),
    [
        ("", "A cat. A dog", "A cat."),
        ("", "A cat.", None),
        ("A cat. ", "A cat. A dog. More", "A cat. A dog."),
        ("A cat.", "A cat. A dog", None),
        ("I see 3", "I see 3.5 cats. And", "I see 3.5 cats."),
    ],
)
def test_a_sentence_ends_once_something_follows_it(generation, prefix, joined, expected):
    assert generation._end(prefix, joined) == expected


def test_the_loop_says_what_the_stage_says(generation):
    """Same masks, positions and sentence ends, one sentence at a time: the same rejected answers at temperature 0."""
    from prefalign.engines.transformers import load_engine

    stage, settings = generation._bdhs_stage({"sampling": {"temperature": 0.0}})
    fast = load_engine(settings.model, batch_size=64)
    loops = {str(stops): generation.OneSentenceAtATime(fast.model, fast.processor, fast.fingerprint, stops=stops)
             for stops in (True, False)}  # fmt: skip
    prompts = [Prompt(**row) for row in rows("caption", "train_biased", 0, 6, regime="seen")]
    similarity = load_similarity("lexical")
    said = [[generation._rejected(outcome) for outcome in stage.process(prompts, engine, similarity, settings)]
            for engine in (fast, *loops.values())]  # fmt: skip
    assert said[0] == said[1] == said[2]
    assert all(text.endswith(".") for text in said[0])
    speedups, same = generation._compare(stage, settings, prompts[:4], fast, loops, block=2)
    assert min(speedups.values()) > 0
    assert same == 1.0


def test_the_recorded_engine_reads_no_picture(generation):
    requests = [Request(f"row-{number}", [user_message("?", 1)], [], prefix="I see") for number in (1, 10, 100)]
    said = [done.text for done in generation.Recorded().generate(requests, Sampling())]
    assert len(set(said)) == 3
    assert said == [done.text for done in generation.Recorded().generate(requests, Sampling())]


def test_memory_is_measured_on_rows_that_are_all_stored(generation, tmp_path):
    generation.write_prompts(tmp_path / "rows", 150)
    command = [sys.executable, str(BENCHMARKS / "generation.py"), "--measure-memory", str(tmp_path / "rows")]
    peak, seconds, rows_out = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert rows_out == 150
    assert 50 < peak < 2000
    assert seconds > 0
    assert len(list((tmp_path / "rows" / "out" / "data").iterdir())) == 3


def test_chaos_has_a_case_for_every_stage(chaos):
    cases = chaos.cases()
    stages = {name for name, path in bundled.stages().items() if path.parent.name == "datagen"}
    assert set(cases.values()) == stages | {"score_responses"}
    assert cases["stic"] == cases["stic_sft"] == "stic"


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("bdhs", "caption"),
        ("s_vco", "twin"),
        ("stic_sft", "vqa"),
        ("filter_pairs", "pairs"),
        ("score_responses", "sampled"),
    ],
)
def test_chaos_gives_a_case_the_rows_it_reads(chaos, case, kind, tmp_path):
    assert kind in chaos.prepare(case, tmp_path, 4).name


def test_chaos_compares_every_file_but_temporary_ones(chaos, tmp_path):
    for name in ("data/a.parquet", "pool/b.npy", ".made_by", "data/.a.parquet.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert chaos.contents(tmp_path) == {"data/a.parquet": b"data/a.parquet", "pool/b.npy": b"pool/b.npy"}


FOUND = 'INFO: 127.0.0.1:4 - "GET /v1/models HTTP/1.1" 200 OK\n'
GIVEN = 'INFO: 127.0.0.1:4 - "POST /v1/chat/completions HTTP/1.1" 200 OK\n'


class LoggedRun:
    """A run during which a server writes one line of its log between two looks: `f` found, `p` an answer given."""

    def __init__(self, log, lines):
        self.log, self.left = log, list(lines)

    @property
    def exitcode(self):
        if not self.left:
            return 0
        with self.log.open("a") as log:
            log.write(FOUND if self.left.pop(0) == "f" else GIVEN)
        return None


class LoggedServer:
    """A server that always works on three requests."""

    def __init__(self, log):
        self.log, self.killed = log, False

    def running(self):
        return 3

    def kill(self):
        self.killed = True


class TestServerChaos:
    @pytest.fixture(scope="class")
    def server_chaos(self):
        return bundled.load_stage(str(BENCHMARKS / "chaos_server.py"))

    def test_without_vllm_it_says_so_and_is_skipped(self, tmp_path):
        command = [sys.executable, str(BENCHMARKS / "chaos.py"), "--server", str(tmp_path / "python")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        assert (
            done.stdout == f"SKIPPED: killing a vLLM server, since there is no {tmp_path}/python (`make vllm-env`).\n"
        )

    def test_a_python_without_vllm_cannot_serve(self, server_chaos):
        if find_spec("vllm") is None:
            assert server_chaos.missing(Path(sys.executable)) == f"{sys.executable} has no vLLM (`make vllm-env`)"

    def test_answers_are_counted_where_they_were_given_and_where_they_were_kept(self, server_chaos, tmp_path):
        line = '(APIServer) INFO: 127.0.0.1:4 - "POST /v1/chat/completions HTTP/1.1" {}\n'
        (tmp_path / "log").write_text("".join(map(line.format, ("200 OK", "500 Internal Server Error", "200 OK"))))
        assert server_chaos.given(tmp_path / "log") == 2
        for key in "aba":
            Replies(tmp_path / "kept").keep({key: "{}"}, "model")
        assert server_chaos.kept(tmp_path / "kept") == 2

    @pytest.mark.parametrize(
        ("logged", "askers", "answers", "gave"),
        [
            ("fpfpp", 2, 1, 1),
            ("fpfpp", 2, 2, 2),
            ("ffppp", 2, 1, 1),
            ("fpppf", 2, 1, 3),
            ("fppp", 2, 1, 0),
            ("ffp", 2, 2, 0),
        ],
    )
    def test_a_server_is_killed_when_all_have_found_it(self, server_chaos, tmp_path, logged, askers, answers, gave):
        log = tmp_path / "log"
        log.write_text(FOUND + GIVEN)  # of a run before
        run, server = LoggedRun(log, logged), LoggedServer(log)
        assert server_chaos.kill_amid(server, [run], askers, answers) == ((gave, 3) if gave else (0, 0))
        assert server.killed == bool(gave)

    def test_shards_and_actors_ask_but_rays_driver_does_not(self, server_chaos):
        def askers(parts):
            return server_chaos.Stage(None, "rlaif_v", None, "", parts).askers

        assert askers([Options()]) == 1
        assert askers([Options(Shard(number, 3)) for number in range(3)]) == 3
        assert askers([Options(executor="ray", actors=2)]) == 2

    def test_ids_and_prompts_are_counted(self, server_chaos, tmp_path):
        output = OutputConfig(tmp_path)
        given = [Candidates(f"r{number}", [], [user_message("?", 0)], [{"text": "A."}]) for number in range(3)]
        write_records("t", given, output=output, record=Candidates, settings={}, seed=0)
        rows = server_chaos.rows_of("sample_responses", tmp_path)
        assert server_chaos.ids(rows) == {"r0": 1, "r1": 1, "r2": 1}
        assert server_chaos.ids(rows + rows[:1])["r0"] == 2
        assert server_chaos.prompts_of(rows) == {"r0", "r1", "r2"}

    @pytest.mark.parametrize(
        ("changes", "fails", "says"),
        [
            ({}, None, "identical, 15 rows of 10 of 12 prompts, ids the same, 84 answers given, 84 kept"),
            ({"compared": 9}, "compared", "15 rows of 9 of 12 prompts (TOO FEW COMPARED: 10 are needed), ids"),
            ({"different": ["data/a.parquet"]}, "identical", "DIFFERENT: ['data/a.parquet'], 15 rows"),
            ({"same_ids": False}, "same_ids", "ids DIFFERENT, 84 answers"),
            ({"paid": 85}, "kept", "85 answers given, 84 kept, 0 asked for again"),
            ({"again": 1}, "kept", "84 answers given, 84 kept, 1 asked for again"),
        ],
    )
    def test_a_trial_is_good_if_all_of_it_is(self, server_chaos, changes, fails, says):
        good = {
            "share": 0.5,
            "under_way": 4,
            "different": [],
            "same_ids": True,
            "rows": 15,
            "compared": 10,
            "prompts": 12,
        }
        counts = {"paid": 84, "kept": 84, "again": 0}
        trial = server_chaos.Trial("ray/rlaif_v/late", **{**good, **counts, **changes})
        assert says in trial.summary()
        failing = [line["name"] for line in trial.lines() if line["value"] < line["goal"]]
        assert failing == ([f"chaos/server/ray/rlaif_v/late/{fails}"] if fails else [])

    def test_the_one_model_of_the_server_labels_with_a_spread(self, chaos, server_chaos, tmp_path):
        settings = {**server_chaos.SETTINGS["rlaif_v"], "output": {"path": str(tmp_path / "pairs")}}
        chaos.generate(
            "rlaif_v", str(chaos.prepare("rlaif_v", tmp_path, 8)), str(tmp_path / "pairs"), settings=settings
        )
        compared = server_chaos.prompts_of(server_chaos.rows_of("rlaif_v", tmp_path / "pairs"))
        assert len(compared) >= server_chaos.LEAST_COMPARED * 8

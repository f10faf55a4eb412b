"""`prefalign plan`: what it counts is what a run needs, and nothing is written where the run will write."""

import dataclasses
import json

import pytest

from prefalign import bundled, cli, config, families, plan_table
from prefalign.engines import USAGE, Sampling
from prefalign.engines.transformers import load_engine
from prefalign.models import ModelConfig
from prefalign.plan_table import table
from prefalign.planner import Plan, Stage, plan
from prefalign.scenes import world
from prefalign.scenes.export import export
from tests.engine_cases import GREEDY, some_requests

COUNTED = ("requests", "prompt_tokens", "image_tokens", "new_tokens")


def used(action):
    """What USAGE grew by, and what the action gave."""
    before = dataclasses.asdict(USAGE)
    result = action()
    return {name: getattr(USAGE, name) - before[name] for name in COUNTED}, result


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts") / "rows"
    export(folder, split="train_biased", kind="caption", regime="seen", start=0, stop=20)
    return folder


def stage(name, rows, folder, **more):
    module = bundled.load_stage(name)
    changes = config.merge({"data": {"path": rows}, "output": {"path": folder}}, more)
    values = config.merge(config.read_yaml(bundled.find(f"datagen/{name}_scenes")), changes)
    return Stage(name, module, config.build(module.Config, values))


def prompt_lengths(engine, requests):
    texts = [families.render(engine.processor, request.messages, request.prefix) for request in requests]
    encoded = [engine.processor(text=[text], images=[request.images], add_special_tokens=False)["input_ids"][0]
               for text, request in zip(texts, requests, strict=True)]  # fmt: skip
    return [len(ids) for ids in encoded], [list(ids).count(engine.config.image_token_id) for ids in encoded]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("prefix", ["", "There is"])
def test_generation_is_counted_to_the_token(tiny_llava, batch_size, prefix):
    """Prompts without padding, image tokens apart, new tokens with the end that was drawn; refused rows not at all."""
    engine = load_engine(ModelConfig(str(tiny_llava), device="cpu"), batch_size=batch_size)
    requests = some_requests(4, prefix=prefix)
    lengths, pictures = prompt_lengths(engine, requests)
    refused = dataclasses.replace(requests[0], id="refused", images=[])
    counted, completions = used(lambda: engine.generate([*requests, refused], GREEDY))
    assert completions[-1].finish_reason == "error"
    drawn = sum(len(done.token_ids) + (done.finish_reason == "stop") for done in completions[:-1])
    assert counted == {"requests": 4, "prompt_tokens": sum(lengths), "image_tokens": sum(pictures), "new_tokens": drawn}
    assert sum(pictures) > 0 < drawn


def test_tokens_behind_a_sentence_end_were_drawn_too():
    """A sentence end is certain once something follows it: each such answer cost one token more than it has."""
    engine = load_engine(ModelConfig("scenes", device="cpu"))
    sampling = Sampling(max_new_tokens=40)
    counted, completions = used(lambda: engine.generate(some_requests(6, stop_at_sentence=True), sampling))
    ends = [done.finish_reason for done in completions]
    assert ends.count("sentence") >= 2
    more = ends.count("sentence") + ends.count("stop")
    assert counted["new_tokens"] == sum(len(done.token_ids) for done in completions) + more


def test_scoring_is_counted_to_the_token(tiny_llava):
    engine = load_engine(ModelConfig(str(tiny_llava), device="cpu"), batch_size=2)
    requests = some_requests(3)
    lengths, pictures = prompt_lengths(engine, requests)
    counted, scores = used(lambda: engine.logprobs(requests, ["A cat.", "Two.", "A very long answer."]))
    assert counted["new_tokens"] == sum(len(score) for score in scores)
    assert (counted["requests"], counted["image_tokens"]) == (3, sum(pictures))
    # the blank before an answer may go to either side of the cut
    assert abs(counted["prompt_tokens"] - sum(lengths)) <= 3


@pytest.mark.parametrize("drawn", [False, True], ids=["texts", "completions"])
def test_attention_is_counted_to_the_token(tiny_llava, drawn):
    """A measured answer costs its prompt and its tokens, as a scored one does."""
    engine = load_engine(ModelConfig(str(tiny_llava), device="cpu"), batch_size=2)
    requests = some_requests(3, prefix="There is")
    answers = engine.generate(requests, GREEDY) if drawn else [" a cat.", " no dog.", " nothing at all."]
    scored, _ = used(lambda: engine.logprobs(requests, answers))
    measured, _ = used(lambda: engine.attention(requests, answers))
    assert measured == scored
    assert measured["new_tokens"] > 0 < measured["image_tokens"]
    if drawn:
        lengths, _ = prompt_lengths(engine, requests)
        assert measured["prompt_tokens"] == sum(lengths)


def test_a_sample_of_all_rows_foretells_the_run(prompts, tmp_path):
    chosen = stage("bdhs", prompts, tmp_path / "out", output={"block_size": 8})
    [made] = plan([chosen], rows=20)
    assert not (tmp_path / "out").exists()
    counted, manifest = used(lambda: chosen.module.main(chosen.config))
    assert (made.rows_in, made.rows_out, made.dropped) == (manifest.rows_in, manifest.rows_out, manifest.dropped)
    assert made.requests == counted["requests"] >= 20
    assert made.image_tokens == counted["image_tokens"] == 36 * made.requests
    assert made.text_tokens == counted["prompt_tokens"] - counted["image_tokens"]
    assert made.new_tokens == counted["new_tokens"] > 0
    files = [file for folder in ("data", "progress") for file in (tmp_path / "out" / folder).iterdir()]
    assert made.bytes == pytest.approx(sum(file.stat().st_size for file in files), rel=0.01)
    assert made.blocks == 3
    assert made.seconds > 0 < made.seconds_loading


def test_a_sample_is_scaled_to_all_rows(prompts, tmp_path):
    """20 rows from 4: five times what the sample gave, and a disk estimate near the truth."""
    chosen = stage("povid", prompts, tmp_path / "out")
    [made] = plan([chosen], rows=4)
    assert (made.rows_in, made.rows_out, made.sampled, made.sampled_out) == (20, 20, 4, 4)
    assert made.requests == made.new_tokens == 0
    chosen.module.main(chosen.config)
    size = sum(file.stat().st_size for folder in ("data", "progress") for file in (tmp_path / "out" / folder).iterdir())
    assert made.bytes == pytest.approx(size, rel=0.15)


def test_the_limit_of_the_data_counts(prompts, tmp_path):
    [made] = plan([stage("povid", prompts, tmp_path / "out", data={"limit": 6})], rows=4)
    assert (made.rows_in, made.sampled) == (6, 4)
    [made] = plan([stage("povid", prompts, tmp_path / "out", data={"limit": 3})], rows=4)
    assert (made.rows_in, made.sampled) == (3, 3)


def test_a_stage_that_reads_one_before_it_is_run_on_its_sample(prompts, tmp_path):
    first = stage("povid", prompts, tmp_path / "povid")
    again = stage("povid", tmp_path / "povid", tmp_path / "again")
    plans = plan([first, again], rows=5)
    assert [made.rows_in for made in plans] == [20, 20]
    assert [made.after for made in plans] == ["", "povid"]
    assert not list(tmp_path.iterdir())
    assert "povid: read the sample of povid, whose output is not there yet" in table(plans)
    first.module.main(first.config)
    assert [made.after for made in plan([first, again], rows=5)] == ["", ""]


def test_progress_and_conflict_of_the_output_are_told(prompts, tmp_path):
    output = {"block_size": 4}
    chosen = stage("povid", prompts, tmp_path / "out", output=output, data={"limit": 8})
    chosen.module.main(chosen.config)
    (tmp_path / "out" / "progress" / "00001.json").unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    [made] = plan([chosen], rows=4)
    assert (made.blocks, made.blocks_done, made.conflict) == (2, 1, "")
    assert "povid: 1 of 2 blocks are done already" in table([made])
    more = stage("povid", prompts, tmp_path / "out", output=output, data={"limit": 12})
    [made] = plan([more], rows=4)
    assert made.conflict == "limit: 8 -> 12"
    chosen.module.main(chosen.config)
    assert "povid: finished already; the run keeps its rows." in table(plan([chosen], rows=4))
    other = stage("povid", prompts, tmp_path / "out", output=output, data={"limit": 8}, seed=5)
    [made] = plan([other], rows=4)
    assert made.conflict == "seed: 0 -> 5"
    assert "holds rows of another config (seed: 0 -> 5); the run will refuse it" in table([made])


def test_rows_that_would_stop_the_run_are_told(tmp_path):
    """Worked: 1 of 2 rows sampled fails, so 2 of 4 rows are expected to, above a limit of 1."""
    (tmp_path / "a.png").write_bytes(world.png(world.scene("test_fair", 0)))
    lines = [{"id": str(number), "image": ("a.png", "gone.png")[number % 2], "question": "What?",
              "answer": "A large red square at the top left."} for number in range(4)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for limit, stops in ((1, True), (2, False)):
        chosen = stage("povid", tmp_path / "rows.jsonl", tmp_path / "out", output={"max_quarantine": limit})
        [made] = plan([chosen], rows=2)
        assert (made.failed, made.max_quarantine) == (2, limit)
        shown = "povid: 2 rows are expected to fail; the run stops above --output.max_quarantine 1." in table([made])
        assert shown == stops


def test_errors_name_the_way_out(prompts, tmp_path):
    with pytest.raises(ValueError, match="--rows 0: a plan needs at least 1 row to run"):
        plan([stage("povid", prompts, tmp_path / "out")], rows=0)
    demo = bundled.load_stage("evaluate_model")
    with pytest.raises(ValueError, match="evaluate_model has no `data` and `output` sections"):
        Stage(
            "evaluate_model", demo, config.build(demo.Config, config.read_yaml(bundled.find("recipes/evaluate_scenes")))
        )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "image": "gone.png", "question": "?", "answer": "A."}))
    with pytest.raises(ValueError, match=r"povid made no row out of the first 1 \(1 missing_image\), so nothing can be foretold. "
                                         r"The first message: picture 'gone.png' is not in"):  # fmt: skip
        plan([stage("povid", tmp_path / "rows.jsonl", tmp_path / "out")])
    broken = [{"id": name, "question": "?", "answer": "A.", "image": 3} for name in "bc"]
    with (tmp_path / "rows.jsonl").open("a") as stream:
        stream.writelines("\n" + json.dumps(row) for row in broken)
    with pytest.raises(ValueError, match=r"1 missing_image.*The first message: (?!picture 'gone)"):
        plan([stage("povid", tmp_path / "rows.jsonl", tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_table_adds_up_and_reads_well():
    """Worked: 12,000,000 + 500 tokens are 12 M; 5,400 s are 1.5 h; 3 * 2^29 bytes are 1.5 GiB."""
    large = Plan(
        "bdhs", 1000, 900, {"cut_off": 100}, 3000, 500, 12_000_000, 40_000, 3 * 2**29, 5400.0, 30.0, 10, 9, 16, 0
    )
    small = Plan("povid", 1000, 1000, {}, 0, 0, 0, 0, 1500, 2.0, 1.0, 8, 8, 16, 0)
    lines = table([large, small]).splitlines()
    assert lines[0].split("  ")[0] == "stage"
    assert " ".join(lines[1].split()) == "bdhs 1,000 900 100 3,000 500 12 M 40,000 1.5 GiB 1.5 h 30.0 s"
    assert " ".join(lines[2].split()) == "povid 1,000 1,000 0 0 0 0 0 1.5 KiB 2.0 s 1.0 s"
    assert " ".join(lines[3].split()) == "all 2,000 1,900 100 3,000 500 12 M 40,000 1.5 GiB 1.5 h 31.0 s"
    assert lines[5].startswith("Measured on the first 8 to 10 rows of each stage and scaled up to all;")
    assert "bdhs: 9 rows came out of the 10 sampled; of all 1000 it is expected to drop: 100 cut_off." in lines[6]
    assert plan_table.duration(600) == "10 min"
    assert [plan_table.size(count) for count in (999, 5 * 2**20, 2**40)] == ["999 B", "5.0 MiB", "1.0 TiB"]


def test_the_verb(prompts, tmp_path, capsys):
    options = ["povid", "--config", "datagen/povid_scenes", "--data.path", str(prompts), "--output.path"]
    first, second = [*options, str(tmp_path / "a")], [*options, str(tmp_path / "b"), "--rules.injections", "1"]
    assert cli.main(["plan", *first, "--rows", "3", "--then", *second, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [(entry["stage"], entry["rows_in"], entry["sampled"]) for entry in made] == [("povid", 20, 3)] * 2
    assert cli.main(["plan", *first, "--rows", "3"]) == 0
    assert capsys.readouterr().out.startswith("stage  rows  rows out")
    assert cli.main(["plan", "--help"]) == 0
    assert "--then" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["bdhs", "--config", "datagen/bdhs_scenes", "--bath_size", "3"],
            "bath_size: unknown key (value 3); did you mean",
        ),
        (["bdhs", "--rows", "many"], "--rows many: give the number of rows to run"),
        (["--rows", "3"], "plan needs a stage, as in"),
        (["--seed", "3"], "plan needs a stage before --seed"),
        (["bdsh"], "no stage called 'bdsh'; did you mean 'bdhs'?"),
        (
            ["rlaif_v", "--config", "datagen/rlaif_v_scenes", "--judged", "runs/before"],
            "rlaif_v: there is nothing to plan with `judged`: answers and verdicts are taken from runs/before, no model is asked",
        ),
    ],
)
def test_errors_of_the_verb(arguments, message, capsys):
    assert cli.main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_sample_without_any_row_is_said_not_hidden(prompts, tmp_path):
    """Three pictures hold no neighbour that is near enough; what reads the pairs of such a sample is not run."""
    first = stage("re_align", prompts, tmp_path / "pairs", retrieval={"floor": 0.99985})
    then = stage("image_contrast", tmp_path / "pairs", tmp_path / "again")
    plans = plan([first, then], rows=3)
    assert (plans[0].sampled, plans[0].rows_in, plans[0].rows_out) == (3, 20, 0)
    assert sum(plans[0].dropped.values()) == 20
    assert (plans[1].sampled, plans[1].rows_in, plans[1].requests) == (0, 0, 0)
    shown = table(plans)
    assert "re_align: no row came out of the sample, so its calls, tokens, disk and time are too low." in shown
    assert "re_align: other pictures came from the sample alone" in shown
    assert "image_contrast: not run, since the sample of re_align gave no row to read." in shown


@pytest.mark.parametrize("name", ["quality_pairs", "mpa", "clinical_rules"])
def test_a_plan_prints_no_figures_of_its_sample_and_the_run_prints_its_own(name, prompts, tmp_path, capsys):
    options = [name, "--config", f"datagen/{name}_scenes", "--data.path", str(prompts), "--output.path", str(tmp_path)]
    assert cli.main(["plan", *options, "--rows", "2"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"{name}: running its first rows to measure them (--rows 2) ...\n"
    lines = shown.out.splitlines()
    assert lines[0].startswith("stage ")
    assert lines[3].startswith("Measured on the first 2 of 20 rows and scaled up to all;")
    assert cli.main(["run", *options, "--data.limit", "2"]) == 0
    assert f"\n{name}" in f"\n{capsys.readouterr().err}"


def test_a_plan_on_all_rows_says_so(prompts, tmp_path, capsys):
    options = ["povid", "--config", "datagen/povid_scenes", "--data.path", str(prompts), "--data.limit", "2"]
    assert cli.main(["plan", *options, "--output.path", str(tmp_path / "a"), "--rows", "4"]) == 0
    assert "\nMeasured on all rows, of which nothing is kept; loading is paid at each start." in capsys.readouterr().out

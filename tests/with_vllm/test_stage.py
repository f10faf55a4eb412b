"""A stage through vLLM in this process: the rows that it makes with transformers, by the same ids."""

import pytest
from command import prefalign

from prefalign.records import Candidates
from prefalign.store import read_records


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Greedy captions of eight pictures, by both engines."""
    folder = tmp_path_factory.mktemp("stage")
    export = prefalign("scenes", "export", "--output", folder / "prompts", "--split", "train_fair", "--kind", "caption",
                       "--stop", 8)  # fmt: skip
    said, _ = export.communicate()
    assert export.returncode == 0, said
    rows = {}
    for engine in ("transformers", "vllm"):
        of_vllm = ("--model.vllm.enforce_eager", "true") if engine == "vllm" else ()
        run = prefalign("run", "sample_responses", "--config", "datagen/sample_responses_scenes", "--model.engine", engine,
                        *of_vllm, "--data.path", folder / "prompts", "--output.path", folder / engine,
                        "--output.block_size", 4, "--num_generations", 1, "--sampling.temperature", 0)  # fmt: skip
        said, _ = run.communicate()
        assert run.returncode == 0, said
        rows[engine] = list(read_records(folder / engine, Candidates))
    return rows


def test_ids_and_greedy_rows_do_not_depend_on_the_engine(finished):
    assert len(finished["vllm"]) == 8
    assert finished["vllm"] == finished["transformers"]
    assert {row.responses[0]["finish_reason"] for row in finished["vllm"]} == {"stop"}

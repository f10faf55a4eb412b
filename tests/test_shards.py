"""Finished folders that lost something: every reader names the file or the count, and what to do."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefalign import bundled, cli
from prefalign.hub import publish_dataset
from prefalign.hub.publish import _check_columns
from prefalign.hub.staging import PublishError, kind_of
from prefalign.manifest import read_manifest
from prefalign.report.pairs import write_pair_report
from prefalign.sources import DataConfig, files_of
from prefalign.store import OutputConfig
from prefalign.training.examples import load_examples
from prefalign.training.pairs import load_pairs
from tests.sft_runs import make_example, write_examples
from tests.training_runs import write_pairs


@pytest.fixture
def pairs(tmp_path) -> Path:
    """8 rows in two shards."""
    return write_pairs(tmp_path / "pairs", 8)


def publish(folder):
    return publish_dataset(folder, "me/x", dry_run=True)


def inspect(folder):
    return write_pair_report(folder, folder / "report.html")


def run_stage(folder):
    """The stage that reads every kind of rows."""
    stage = bundled.load_stage("import_published")
    output = OutputConfig(folder.with_name("imported"))
    try:
        return stage.main(stage.Config(DataConfig(folder), output))
    except ValueError:
        assert not output.path.exists(), "nothing was begun"
        raise


def drop(folder, column):
    for shard in folder.glob("data/*.parquet"):
        pq.write_table(pq.read_table(shard).drop_columns([column]), shard)


def test_imitation_names_the_folders_of_several(pairs):
    with pytest.raises(
        ValueError, match=r"several folders of rows \(.*pairs.*\), and training reads one of them. Give its"
    ):
        load_examples(pairs.parent)


@pytest.mark.parametrize(("reader", "said"), [(load_pairs, "training reads one"), (kind_of, "published by itself")])
def test_the_pairs_inside_a_folder_of_several_are_named(pairs, reader, said):
    with pytest.raises(ValueError) as raised:
        reader(pairs.parent)
    assert said in str(raised.value)
    assert f"Its pairs are in {pairs}: give that." in str(raised.value)
    assert "start it again" not in str(raised.value)
    (pairs / "manifest.json").unlink()  # not finished, so not named
    with pytest.raises(ValueError, match="no finished pairs|Give the folder that a run wrote"):
        reader(pairs.parent)


@pytest.mark.parametrize("reader", [load_pairs, load_examples, publish, inspect, run_stage])
def test_a_damaged_shard_is_named(pairs, reader):
    shard = max(pairs.glob("data/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(
        ValueError, match=r"train-00001.parquet is not a whole Parquet file .*it has 3,000 bytes.*Copy it again"
    ):
        reader(pairs)


@pytest.mark.parametrize("reader", [load_pairs, load_examples, publish, run_stage])
def test_a_lost_shard_is_no_smaller_data_set(pairs, reader):
    max(pairs.glob("data/*.parquet")).unlink()
    with pytest.raises(ValueError, match=r"pairs hold 5 rows, but manifest.json says 8: a shard was lost or added"):
        reader(pairs)


@pytest.mark.parametrize("reader", [load_pairs, load_examples, publish, run_stage])
def test_no_shards_at_all(pairs, reader):
    for shard in pairs.glob("data/*.parquet"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"holds no shards .*manifest.json says 8 rows: .*delete the folder and run"):
        reader(pairs)
    assert kind_of(pairs) == "dataset"


@pytest.mark.parametrize(
    "content", ['{"version": 2}', "[]", '{"audio_filepath": "a.wav"}\n{"audio_filepath": "b.wav"}\n']
)
def test_a_manifest_of_another_program_says_nothing_of_the_rows(pairs, content):
    max(pairs.glob("data/*.parquet")).unlink()
    (pairs / "manifest.json").write_text(content)
    assert [file.name for file in files_of(DataConfig(pairs))] == ["train-00000.parquet"]


def test_a_stage_that_finds_its_manifest_looks_at_its_shards(tmp_path, capsys):
    rows = str(write_pairs(tmp_path / "in", 8))
    given = ["run", "filter_pairs", "--filters.margin.missing", "keep", "--data.path", rows, "--output.path"]
    assert cli.main([*given, str(tmp_path / "out")]) == 0
    assert "look at them with" in capsys.readouterr().out
    next((tmp_path / "out").glob("data/*.parquet")).unlink()
    assert cli.main([*given, str(tmp_path / "out")]) == 1
    assert "holds no shards (data/*.parquet)" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["images", "id"])
def test_columns_that_imitation_reads(tmp_path, column):
    examples = write_examples(tmp_path / "examples", map(make_example, range(2)))
    drop(examples, column)
    with pytest.raises(ValueError, match=f"examples have no {column} .stage `test` wrote .*, which training reads"):
        load_examples(examples)


def test_a_column_that_one_shard_lacks(pairs):
    shard = max(pairs.glob("data/*.parquet"))
    pq.write_table(pq.read_table(shard).drop_columns(["images"]), shard)
    for reader in (load_pairs, load_examples):
        with pytest.raises(ValueError, match="have no images"):
            reader(pairs)


@pytest.mark.parametrize("column", ["chosen", "images"])
def test_pairs_without_a_column_are_not_published(pairs, column):
    drop(pairs, column)
    with pytest.raises(PublishError, match=f"have no {column} .*no one could train on them"):
        publish(pairs)
    assert not pairs.with_name("pairs-publish").exists()


def test_conversations_without_pictures_are_not_published(tmp_path):
    examples = write_examples(tmp_path / "examples", map(make_example, range(2)))
    _check_columns(examples, read_manifest(examples))
    drop(examples, "images")
    with pytest.raises(PublishError, match="have no images .* id and images and messages belong together"):
        publish(examples)

"""Fingerprints of engines: every part of the processor that decides tokens or pixels counts, where it is kept does not."""

import json
import shutil
from pathlib import Path

import pytest
import transformers as T
from tiny_vlms import PLAIN, picture, save_tiny

from prefalign import bundled, config
from prefalign.checkpoints import SCENES_BASE
from prefalign.engines import Sampling
from prefalign.engines.fingerprints import checkpoint_fingerprint
from prefalign.engines.transformers import load_engine
from prefalign.evals.asking import Asking, ask
from prefalign.judge import Judge, Question
from prefalign.manifest import differences
from prefalign.models import ModelConfig, load_processor
from prefalign.processors import (
    engine_fingerprint,
    image_processor_fingerprint,
    processor_fingerprint,
    weights_of,
)
from prefalign.records import Candidates
from prefalign.rewards import read_rewards
from prefalign.scenes.export import export
from prefalign.store import StoreError, read_records

CHANGES = {
    "template": ("chat_template.jinja", "{% for", "You are blunt. {% for"),
    "picture size": ("processor_config.json", '"height": 60', '"height": 40'),
    "pixels": ("processor_config.json", '"resample": 3', '"resample": 2'),
    "image tokens": ("processor_config.json", '"patch_size": 10', '"patch_size": 20'),
    "tokenizer": ("tokenizer.json", '"normalizer": null', '"normalizer": {"type": "Lowercase"}'),
    "end of sequence": ("tokenizer_config.json", '"eos_token": "</s>"', '"eos_token": "<pad>"'),
    "decoding": (
        "tokenizer_config.json",
        '"clean_up_tokenization_spaces": false',
        '"clean_up_tokenization_spaces": true',
    ),
}


def copy(folder: Path) -> Path:
    return Path(shutil.copytree(SCENES_BASE, folder))


def change(folder: Path, name: str) -> Path:
    file, before, after = CHANGES[name]
    text = (folder / file).read_text()
    assert before in text
    (folder / file).write_text(text.replace(before, after, 1))
    return folder


def named(folder: Path | str, **more) -> ModelConfig:
    return ModelConfig(str(folder), device="cpu", **more)


@pytest.fixture(scope="module")
def blunt(tmp_path_factory):
    """The tiny model with another chat template."""
    return change(copy(tmp_path_factory.mktemp("blunt") / "model"), "template")


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_tokens_pixels_or_text_counts(name, tmp_path):
    plain = processor_fingerprint(load_processor(named("scenes")))
    assert processor_fingerprint(load_processor(named(change(copy(tmp_path / "model"), name)))) != plain


def test_paths_versions_and_what_a_call_has_set_do_not_count(tmp_path):
    plain = processor_fingerprint(load_processor(named("scenes")))
    moved = copy(tmp_path / "elsewhere" / "other-name")
    for file in ("config.json", "tokenizer_config.json", "processor_config.json"):
        content = json.loads((moved / file).read_text())
        more = {"name_or_path": "/data/x", "_name_or_path": "/data/x", "transformers_version": "4.1.0"}
        if "image_processor" in content:
            content["image_processor"] |= {"_processor_class": "X", "processor_class": "X", "device": "cpu", **more}
        (moved / file).write_text(json.dumps(content | more))
    processor = load_processor(named(moved))
    assert processor_fingerprint(processor) == plain
    processor.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2, padding_side="left")
    assert processor_fingerprint(processor) == plain


@pytest.mark.parametrize("family", PLAIN)
def test_a_processor_that_was_saved_again_is_the_same(family, tmp_path):
    folder = save_tiny(family, tmp_path / "model")
    first = load_processor(named(folder))
    first.save_pretrained(folder)
    assert processor_fingerprint(load_processor(named(folder))) == processor_fingerprint(first)


def test_options_count_as_what_they_make_of_the_processor(tmp_path):
    options = {"size": {"height": 40, "width": 40}}
    given = load_processor(named("scenes", processor=options))
    assert processor_fingerprint(given) != processor_fingerprint(load_processor(named("scenes")))
    given.save_pretrained(copy(tmp_path / "saved"))
    assert processor_fingerprint(load_processor(named(tmp_path / "saved"))) == processor_fingerprint(given)


def test_the_library_that_resizes_does_not_count():
    class CLIPImageProcessor(T.CLIPImageProcessorPil):
        """As where torchvision is installed."""

    with_pillow, with_torchvision = T.CLIPImageProcessorPil(), CLIPImageProcessor()
    assert image_processor_fingerprint(with_pillow) == image_processor_fingerprint(with_torchvision)
    assert image_processor_fingerprint(with_pillow) != image_processor_fingerprint(T.SiglipImageProcessorPil())


def test_a_tokenizer_written_in_python_is_known_by_its_vocabulary():
    processor = load_processor(named("scenes"))
    prints = set()
    for extra in (100, 101, 100):
        processor.tokenizer = T.ByT5Tokenizer(extra_ids=extra)
        prints.add(processor_fingerprint(processor))
    assert len(prints) == 2


def test_engines_of_one_folder_and_of_a_changed_copy(blunt, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain, changed, moved = (load_engine(named(folder)) for folder in ("scenes", blunt, copy(tmp_path / "moved")))
    assert plain.fingerprint == moved.fingerprint != changed.fingerprint
    assert weights_of(plain.fingerprint) == weights_of(changed.fingerprint) == plain.fingerprint[:16]
    # as vLLM has it, which reads the weights once
    for engine, folder in ((plain, "scenes"), (changed, blunt)):
        assert engine.fingerprint == engine_fingerprint(checkpoint_fingerprint(named(folder)), engine.processor)


def test_only_fingerprints_are_cut_to_weights():
    first, second = "0123456789abcdef-01234567", "fedcba9876543210-76543210"
    assert weights_of(f"{first}/{second}/grades-01234567") == "0123456789abcdef/fedcba9876543210/grades-01234567"
    for name in ("gpt-4o@v1", "0123456789abcdef", "model-0123456789abcdef0-01234567"):
        assert weights_of(name) == name
    (line,) = differences({"models": {"generator": first}}, {"models": {"generator": first[:-1] + "0"}})
    assert line.endswith("0 (the same weights with another chat template, tokenizer or image processor)")
    (line,) = differences({"generator": first}, {"generator": second})
    assert line == f"generator: {first} -> {second}"


def test_a_judge_of_another_template_is_asked_itself(blunt, tmp_path):
    """The two share a cache; the second is not given the first one's reply."""
    question = Question("q", "Describe the picture.", [picture(0, (60, 60))])
    said = []
    for folder in ("scenes", blunt, "scenes"):
        judge = Judge(
            load_engine(named(folder)), "v1", Sampling(max_new_tokens=4, temperature=0.0), tmp_path / "replies"
        )
        said += [(judge.ask([question], str), judge.counts["asked"], judge.counts["cached"])]
    assert [counts for _, *counts in said] == [[1, 0], [1, 0], [0, 1]]
    assert said[0][0] == said[2][0]


def test_a_half_made_folder_is_not_finished_with_another_template(blunt, tmp_path):
    export(tmp_path / "rows", split="train_fair", kind="caption", start=0, stop=2)
    stage = bundled.load_stage("sample_responses")
    scenes = config.read_yaml(bundled.find("datagen/sample_responses_scenes"))

    def run(folder: Path | str, out: str) -> list[Candidates]:
        known = {"data": {"path": tmp_path / "rows"}, "output": {"path": tmp_path / out, "block_size": 1},
                 "num_generations": 2, "sampling": {"max_new_tokens": 3}}  # fmt: skip
        known["model"] = {"model_name_or_path": str(folder)}
        stage.main(config.build(stage.Config, config.merge(scenes, known)))
        return list(read_records(tmp_path / out, Candidates))

    first = run("scenes", "out")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "progress" / "00001.json").unlink()
    message = (
        r"rows made with another config \(models.generator: \w{16}-\w{8} -> \w{16}-\w{8} \(the same weights with another chat "
        r"template, tokenizer or image processor\)\).*give another `output.path`"
    )
    with pytest.raises(StoreError, match=message):
        run(blunt, "out")
    assert run(copy(tmp_path / "moved"), "out") == first
    assert not {row.id for row in run(blunt, "other")} & {row.id for row in first}


def test_replies_of_an_evaluation_are_not_mixed_with_those_of_another_template(blunt, tmp_path):
    assert ask(load_engine(named("scenes")), [], tmp_path, Asking()) == []
    with pytest.raises(
        ValueError, match=r"other settings \(fingerprint: \S+ -> \S+ \(the same weights with another chat"
    ):
        ask(load_engine(named(blunt)), [], tmp_path, Asking())


def test_an_implicit_reward_of_one_model_with_two_templates_is_refused(blunt):
    of = {"name": "implicit", "model": {"model_name_or_path": str(blunt), "device": "cpu"},
          "reference": {"model_name_or_path": "scenes", "device": "cpu"}}  # fmt: skip
    with pytest.raises(ValueError, match="have the same weights, so every response would score 0"):
        _ = read_rewards([of]).entries[0].reward.engines

"""The cache of reference log-probs: equal to a live reference, found by content, resumed, and refused where it is another's."""

import logging
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from prefalign.config import ConfigError
from prefalign.images import ImageError, encode_png
from prefalign.losses import read_losses
from prefalign.negatives import Negative
from prefalign.training import reference as cache_module
from prefalign.training.preference import PreferenceTrainer
from prefalign.training.reference import ReferenceCache, StaleReference, cache_reference, row_key
from tests.equality import LOSSES, Bench, Case, compare, disturb, step
from tests.tiny_vlms import picture
from tests.training_runs import losses, make_pair

VIEWS = ("chosen", "rejected", "chosen_on_rejected_image")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench("llava", tmp_path_factory.mktemp("llava"))


def rows_of(count: int, **changed) -> Dataset:
    """Rows of text and pictures; `changed` replaces fields of the second pair."""
    pairs = [make_pair(number) for number in range(count)]
    if changed:
        pairs[1] = replace(pairs[1], **changed)
    return Dataset.from_list([pair.to_row() for pair in pairs])


def make(
    bench: Bench, rows: Dataset, *, entries: str = "text+visual", model=None, processor=None, negative=None, **settings
):
    arguments = bench.arguments(**{"per_device_train_batch_size": 2, **settings})
    named = [{"name": entry} if isinstance(entry, str) else entry for entry in LOSSES[entries]]
    return PreferenceTrainer(
        model if model is not None else bench.policy("frozen")[0],
        args=arguments,
        train_dataset=rows,
        processing_class=processor or bench.processor,
        losses=read_losses(named, beta=arguments.beta),
        reference="cached",
        negative=negative,
    )


def fill(trainer: PreferenceTrainer, folder: Path, *, reference: str = "tiny", verify: int = 2):
    return cache_reference(trainer, folder, reference=reference, verify=verify, progress=False)


@pytest.mark.parametrize("training", ["frozen", "lora"])
@pytest.mark.parametrize("entries", ["text", "visual", "six views"])
def test_cached_is_online(entries, training, bench):
    """Three rows at once online, two and then one when the cache is filled."""
    case = Case("llava", entries, training, "other size", 3, False, "online")
    outcomes = []
    for reference in ("cached", "online"):
        trainer = bench.ours(replace(case, reference=reference), fast_path="auto", per_device_train_batch_size=2)
        assert (trainer.ref_model is None) == (reference == "cached" or training == "lora")
        outcomes.append(step(trainer, trainer.train_dataset))
    difference = compare(*outcomes, lora=training == "lora")
    assert difference.holds(), difference


def test_what_is_kept_is_the_log_prob_of_each_token(bench, tmp_path):
    trainer = make(bench, rows_of(2))
    report = fill(trainer, tmp_path)
    assert (report.rows, report.found, report.computed, report.verified) == (2, 0, 2, 2)
    assert report.largest_difference < 1e-5
    entry = ReferenceCache(tmp_path, VIEWS)[row_key(trainer.train_dataset[1])]
    batch = trainer.data_collator([trainer.train_dataset[1]])
    plain = replace(trainer.data_collator, layout="plain", cache=None)([trainer.train_dataset[1]])["plain"]
    with torch.no_grad():
        pixels = {"input_ids": plain["input_ids"], "attention_mask": plain["attention_mask"]}
        logits = bench.model(**pixels, pixel_values=plain["pixel_values"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(2, plain["input_ids"][:, 1:, None])[..., 0]
    for number, view in enumerate(VIEWS):
        by_hand = logps[number][plain["completion_mask"][number, 1:].bool()]
        assert entry[view].dtype == torch.float32
        assert torch.allclose(entry[view], by_hand, atol=2e-5)
        assert torch.equal(batch["reference"][view][0], entry[view])


def test_an_interrupted_pass_goes_on_where_it_stopped(bench, tmp_path, monkeypatch):
    """The fourth of five pictures cannot be read; parts of one row each, so that three rows are kept."""
    monkeypatch.setattr(cache_module, "ROWS_PER_PART", 1)
    rows = rows_of(5)
    broken = rows.to_list()
    broken[3]["images"] = [{"bytes": b"no picture", "path": None}]
    with pytest.raises(ImageError):
        fill(make(bench, Dataset.from_list(broken), per_device_train_batch_size=1), tmp_path)
    assert len(list(tmp_path.glob("part-*.arrow"))) == 3
    report = fill(make(bench, rows, per_device_train_batch_size=1), tmp_path)
    assert (report.rows, report.found, report.computed) == (5, 3, 2)
    assert fill(make(bench, rows), tmp_path).computed == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
def test_a_part_that_cannot_be_read_is_computed_again(damage, bench, tmp_path, caplog):
    trainer = make(bench, rows_of(3))
    fill(trainer, tmp_path)
    (part,) = tmp_path.glob("part-*.arrow")
    whole = part.read_bytes()
    part.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "garbage": bytes(len(whole))}[damage])
    with caplog.at_level(logging.WARNING, logger="prefalign.training.reference"):
        report = fill(make(bench, rows_of(3)), tmp_path)
    assert "is damaged" in caplog.text
    assert "its rows are computed again" in caplog.text
    assert (report.found, report.computed) == (0, 3)
    assert part.read_bytes() == whole


@pytest.mark.parametrize(
    "name", ["reference", "dtype", "max_length", "negative", "seed", "template", "tokenizer", "picture size", "route"]
)
def test_a_cache_made_otherwise_is_refused(name, bench, tmp_path):
    rows = rows_of(2)
    if name in ("negative", "seed"):
        rows = rows.map(lambda row: {"rejected_images": []})
    negative = Negative() if name in ("negative", "seed") else None
    fill(make(bench, rows, negative=negative), tmp_path)
    other = make(bench, rows, negative=negative)
    collator, label, fingerprint = other.data_collator, name, "tiny"
    if name == "reference":
        fingerprint = "another"
    elif name == "dtype":
        other.model.to(torch.bfloat16)
    elif name == "max_length":
        collator.max_length = 500
    elif name == "negative":
        collator.negative, label = Negative(kind="blank"), "negative.kind"
    elif name == "seed":
        collator.seed, label = 1, "negative.seed"
    elif name == "route":
        other.route = replace(other.route, layout="plain")
    else:
        processor = Bench("llava", tmp_path / "again").processor
        if name == "template":
            processor.chat_template = processor.chat_template.replace("USER", "HUMAN")
        elif name == "tokenizer":
            processor.tokenizer.add_tokens(["dragonfly"])
        else:
            processor.image_processor.image_mean = [0.4, 0.5, 0.6]
        collator.processor, label = processor, "processor"
    message = (
        rf"holds reference log-probs that were made otherwise \({label}.*Give another `reference_folder`, or delete"
    )
    with pytest.raises(StaleReference, match=message):
        fill(other, tmp_path, reference=fingerprint)


@pytest.mark.parametrize(
    "changed",
    [
        {"chosen": make_pair(0).chosen},
        {"rejected": make_pair(5).rejected},
        {"prompt": make_pair(2).prompt},
        {"images": [encode_png(picture(77))]},
        {"rejected_images": [encode_png(picture(77))]},
        {"id": "another"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_row_that_changed_is_missing_and_is_computed(changed, bench, tmp_path):
    fill(make(bench, rows_of(3)), tmp_path)
    trainer = make(bench, rows_of(3, **changed))
    report = fill(trainer, tmp_path, verify=3)
    assert (report.rows, report.found, report.computed) == (3, 2, 1)
    assert report.largest_difference < 1e-5


def test_rows_may_be_shuffled_left_out_and_added(bench, tmp_path):
    rows = rows_of(6)
    fill(make(bench, rows.select(range(4))), tmp_path)
    assert fill(make(bench, rows.select([3, 0])), tmp_path).computed == 0
    assert fill(make(bench, rows.select(range(4)).shuffle(seed=1)), tmp_path).computed == 0
    report = fill(make(bench, rows), tmp_path)
    assert (report.found, report.computed) == (4, 2)
    assert len(list(tmp_path.glob("part-*.arrow"))) == 2


def test_other_losses_compute_the_views_that_are_missing_and_leave_the_rest(bench, tmp_path):
    fill(make(bench, rows_of(3), entries="six views"), tmp_path)
    assert fill(make(bench, rows_of(3), entries="text"), tmp_path).computed == 0
    fresh = tmp_path / "fresh"
    fill(make(bench, rows_of(3), entries="text"), fresh)
    assert fill(make(bench, rows_of(3), entries="text+visual"), fresh).computed == 3
    assert fill(make(bench, rows_of(3), entries="text"), fresh).computed == 0


def test_with_a_cut_losses_on_other_pictures_need_another_folder(bench, tmp_path):
    """Both prompts of a row have to fit, and the longest one decides where its answers end."""
    fill(make(bench, rows_of(2), max_length=100), tmp_path)
    with pytest.raises(
        StaleReference, match=r"made otherwise \(max_length.prompts with: \['images', 'rejected_images'\] -> "
    ):
        fill(make(bench, rows_of(2), entries="text", max_length=100), tmp_path)
    assert fill(make(bench, rows_of(2), entries="visual", max_length=100), tmp_path).computed == 0


def test_another_ld_alpha_needs_no_new_pass_and_gives_its_own_sums(bench, tmp_path):
    """TRL's own cache gives back the sums of the first."""
    case = Case("llava", "text", "frozen", "1", 3, False, "online")
    rows = bench.rows("1")[0]
    fill(make(bench, rows, entries="text"), tmp_path)
    found = []
    for ld_alpha in (None, 0.5):
        trainer = make(bench, rows, entries="text", ld_alpha=ld_alpha)
        assert fill(trainer, tmp_path).computed == 0
        disturb(trainer.model)
        online = bench.ours(case, fast_path="auto", ld_alpha=ld_alpha)
        found.append(step(trainer, rows))
        difference = compare(found[-1], step(online, rows))
        assert difference.holds(), difference
    assert abs(found[0].metrics["rewards/chosen"] - found[1].metrics["rewards/chosen"]) > 1e-4


def test_numbers_that_are_not_the_references_are_refused(bench, tmp_path):
    """One token of one view of one row is off by 0.1: all rows are verified here, random ones in a run."""
    fill(make(bench, rows_of(3)), tmp_path)
    (part,) = tmp_path.glob("part-*.arrow")
    columns = pa.ipc.open_file(pa.BufferReader(part.read_bytes())).get_batch(0).to_pydict()
    part.unlink()
    columns["rejected"][1][0] += 0.1
    views = [view for view in columns if view != "key"]
    entries = [
        (key, {view: torch.tensor(columns[view][row]) for view in views}) for row, key in enumerate(columns["key"])
    ]
    ReferenceCache(tmp_path, tuple(views)).write(entries)
    message = (
        "in 3 random rows a token differs by up to 0.1, where rounding explains 0.002.*Delete the folder and start"
    )
    with pytest.raises(StaleReference, match=message):
        fill(make(bench, rows_of(3)), tmp_path, verify=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_the_data_loader_read_it(workers, bench, tmp_path):
    """Pickled into two processes, a cached run is the online one."""
    settings = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "dataloader_num_workers": workers}
    trainer = make(bench, rows_of(4), **settings)
    fill(trainer, tmp_path)
    trainer.train()
    online = make(bench, rows_of(4), **settings | {"dataloader_num_workers": 0})
    online = PreferenceTrainer(
        bench.policy("frozen")[0],
        args=online.args,
        train_dataset=online.train_dataset,
        processing_class=bench.processor,
        losses=online.losses,
    )
    online.train()
    assert len(losses(trainer)) == 2
    assert losses(trainer) == pytest.approx(losses(online), abs=2e-6)


def test_held_out_rows_are_cached_too(bench, tmp_path):
    trainer = make(bench, rows_of(5).select(range(3)), max_steps=1)
    trainer.eval_dataset = rows_of(5).select(range(2, 5))
    report = fill(trainer, tmp_path)
    assert (report.rows, report.found, report.computed) == (6, 1, 5)
    assert trainer.evaluate()["eval_loss"] > 0


def test_training_without_its_rows_in_the_cache_stops(bench, tmp_path):
    trainer = make(bench, rows_of(2))
    with pytest.raises(
        RuntimeError, match="reference is 'cached' and no cache has been filled. Call `prefalign.training."
    ):
        step(trainer, trainer.train_dataset)
    fill(trainer, tmp_path)
    with pytest.raises(
        KeyError, match=r"no reference log-probs are cached for 1 rows \(pair-2\); the rows changed after"
    ):
        step(trainer, rows_of(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"entries": "logits"},
            "chip reads the reference's logits over the whole vocabulary, which are not stored. Set ref",
        ),
        (
            {"sync_ref_model": True},
            "the reference moves with the policy, so a cache of it would be wrong from the first sync",
        ),
        (
            {"precompute_ref_log_probs": True},
            "TRL's own cache is refused for pictures .* Set `reference: cached` instead",
        ),
    ],
    ids=["logits", "sync", "precompute"],
)
def test_what_no_cache_can_serve_is_refused(settings, message, bench):
    with pytest.raises(ConfigError, match=message):
        make(bench, rows_of(2), **settings)

"""The image-reliance probe: which picture is shown, and that the numbers tell an engine that looks from one that does not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from prefalign.engines import Completion, Request
from prefalign.engines.transformers import load_engine
from prefalign.evals import Item, Prediction, asking, reliance, scoring, summary
from prefalign.images import encode_png, open_image
from prefalign.models import ModelConfig
from prefalign.records import user_message

QUESTION = "Is the picture red?"


def colour_picture(red: bool, size=(24, 20)):
    return Image.new("RGB", size, (230, 20, 20) if red else (20, 20, 230))


def yes_no_items(count=12, question=QUESTION):
    return [
        Item("yesno", f"i{n}", f"g{n}", [encode_png(colour_picture(n % 2 == 0))], [user_message(question, 1)],
             label="yes" if n % 2 == 0 else "no", answer="Yes." if n % 2 == 0 else "No.")
        for n in range(count)
    ]  # fmt: skip


class Looking:
    """Says yes when the first picture is more red than blue; the gold reply's log-prob falls when that is not the label."""

    capabilities = frozenset({"logprobs"})
    fingerprint = "looking"

    def sees(self, request: Request) -> bool:
        pixels = np.asarray(request.images[0], dtype=float)
        return pixels[..., 0].mean() > pixels[..., 2].mean()

    def generate(self, requests, sampling):
        return [Completion(request.id, "Yes." if self.sees(request) else "No.", [1, 2]) for request in requests]

    def logprobs(self, requests, answers):
        right = [
            self.sees(request) == answer.startswith("Yes") for request, answer in zip(requests, answers, strict=True)
        ]
        return [torch.tensor([-0.1, -0.1, 0.0]) if good else torch.tensor([-3.1, -0.1, 0.0]) for good in right]


class Blind(Looking):
    """Answers by the parity of the item's number, whatever is shown: always right on these items."""

    fingerprint = "blind"

    def sees(self, request: Request) -> bool:
        return int(request.id.split("/")[-1].split("@")[0].removeprefix("i")) % 2 == 0


def probe(engine, items, folder, conditions=("blank", "mismatched")):
    variants = [reliance.Variant(item, gold_logprob=True) for item in items] + reliance.variants(items, conditions)
    replies = asking.ask(engine, variants, folder, asking.Asking())
    return summary.aggregate(scoring.score_all(items, variants, replies, {}), draws=200)


def test_engine_that_looks(tmp_path):
    """Every mismatched picture has the other colour: accuracy 1 -> 0, and the answer follows the picture shown."""
    found = probe(Looking(), yes_no_items(), tmp_path)
    assert found["accuracy"]["value"] == 1
    assert found["accuracy_mismatched"]["value"] == 0
    assert found["reliance"]["value"] == 1
    assert found["flip_rate_mismatched"]["value"] == 1
    assert found["follow_rate"]["value"] == 1
    assert found["follow_rate"]["n"] == 12
    # D = 1 and accuracy stands 1/2 above chance
    assert found["reliance_normalised"]["value"] == 2
    # the first of three tokens loses 3 nats
    assert found["logprob_drop_mismatched"]["value"] == pytest.approx(1.0)
    assert found["logprob_sum_drop_mismatched"]["value"] == pytest.approx(3.0)
    assert found["logprob_drop_positive_mismatched"]["value"] == 1
    # the mean colour of a one-coloured picture is the picture: blanking it takes nothing away
    assert found["reliance_blank"]["value"] == 0
    assert found["logprob_drop_blank"]["value"] == 0


def test_engine_that_does_not_look(tmp_path):
    found = probe(Blind(), yes_no_items(), tmp_path)
    assert found["accuracy"]["value"] == 1
    assert found["reliance"]["value"] == 0
    assert found["reliance"]["ci95"] == [0, 0]
    assert found["flip_rate_mismatched"]["value"] == 0
    assert found["follow_rate"]["value"] == 0
    assert found["logprob_drop_mismatched"]["value"] == 0


def test_normalised_drop_is_undefined_at_chance(tmp_path):
    class Always(Blind):
        def sees(self, request):
            return True

    found = probe(Always(), yes_no_items(), tmp_path)
    assert found["accuracy"]["value"] == 0.5
    assert found["reliance_normalised"]["value"] is None
    assert found["reliance_normalised"]["invalid"] == "not defined"


def test_multimodal_gain_worked_example():
    """Spec 9.10: accuracy .60 with and .41 without the picture gives a gain of .19: the drop of condition `none`."""
    scored = []
    for n in range(100):
        item = Item("yesno", str(n), str(n), [], [], label="yes")
        true, none = ("yes" if n < 60 else "no"), ("yes" if n < 41 else "no")
        replies = {
            name: Prediction("yesno", str(n), str(n), "?", text, condition=name)
            for name, text in (("true", true), ("none", none))
        }
        scored.append(reliance.score(item, replies))
    assert summary.aggregate(scored, draws=50)["reliance_none"]["value"] == pytest.approx(0.19)


def test_donors_are_a_fixed_derangement_with_another_label():
    items = yes_no_items(40)
    donors = reliance.donors(items, seed=3)
    assert len(donors) == 40
    assert sorted(donor.id for donor in donors.values()) == sorted(item.id for item in items)
    for item in items:
        assert donors["yesno", item.id].label != item.label
    shuffled = reliance.donors(items[::-1], seed=3)
    assert {key: donor.id for key, donor in shuffled.items()} == {key: donor.id for key, donor in donors.items()}
    other = reliance.donors(items, seed=4)
    assert {key: donor.id for key, donor in other.items()} != {key: donor.id for key, donor in donors.items()}


def test_donors_come_from_another_group_where_questions_differ():
    items = [
        Item(
            "attributes",
            str(n),
            f"g{n // 3}",
            [encode_png(colour_picture(True))],
            [user_message(f"Question {n}?", 1)],
            label="x",
        )
        for n in range(12)
    ]
    donors = reliance.donors(items)
    assert len(donors) == 12
    assert all(donors["attributes", item.id].group != item.group for item in items)


def test_one_group_alone_has_no_donors():
    items = [Item("yesno", str(n), "one", [], [user_message(QUESTION, 1)], label="yes") for n in range(4)]
    assert reliance.donors(items) == {}
    assert reliance.variants(items, ["mismatched"]) == []


def test_pictures_of_each_condition():
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8))
    item = Item("yesno", "a", "a", [encode_png(noisy)], [user_message(QUESTION, 1)], label="yes")
    donor = Item(
        "yesno", "b", "b", [encode_png(colour_picture(True, (48, 48)))], [user_message(QUESTION, 1)], label="no"
    )
    true = np.asarray(reliance.Variant(item).pictures()[0])
    assert (true == np.asarray(noisy)).all()
    (blank,) = reliance.Variant(item, "blank").pictures()
    assert blank.size == noisy.size
    assert len(blank.getcolors()) == 1
    assert np.abs(np.asarray(blank)[0, 0] - true.mean(axis=(0, 1))).max() < 1
    (noise,) = reliance.Variant(item, "noise").pictures(seed=1)
    assert noise.size == noisy.size
    assert (np.asarray(noise) != true).mean() > 0.5
    assert noise.tobytes() == reliance.Variant(item, "noise").pictures(seed=1)[0].tobytes()
    assert noise.tobytes() != reliance.Variant(item, "noise").pictures(seed=2)[0].tobytes()
    (other,) = reliance.Variant(item, "mismatched", donor).pictures()
    assert other.size == noisy.size
    assert other.getpixel((3, 3)) == open_image(donor.images[0]).getpixel((3, 3))
    assert reliance.Variant(item, "none").pictures() == []
    assert reliance.Variant(item, "none").messages() == [user_message(QUESTION)]
    assert item.messages == [user_message(QUESTION, 1)]


def test_unknown_condition_is_refused():
    with pytest.raises(ValueError, match="unknown condition 'blurred': the probe knows blank, noise, mismatched, none"):
        reliance.variants([], ["blurred"])


def test_empty_reply_under_a_condition_is_no_score():
    item = Item("yesno", "a", "a", [], [], label="yes")
    said = {
        name: Prediction("yesno", "a", "a", "?", text, condition=name)
        for name, text in (("true", "Yes"), ("blank", ""))
    }
    row = reliance.score(item, said)
    assert row.status == "error"
    assert "asked_blank" not in row.numbers
    assert reliance.score(item, {"true": said["blank"]}).status == "empty"


def test_condition_with_missing_replies_is_marked_invalid():
    rows = []
    for n in range(10):
        item = Item("yesno", str(n), str(n), [], [], label="yes")
        texts = {"true": "Yes", "blank": "" if n == 0 else "No", "noise": "No"}
        rows.append(
            reliance.score(
                item, {c: Prediction("yesno", str(n), str(n), "?", t, condition=c) for c, t in texts.items()}
            )
        )
    found = summary.aggregate(rows, draws=50)
    assert found["reliance_blank"]["invalid"] == "10.0% of what was asked has no score"
    assert "invalid" not in found["reliance_noise"]


def test_replies_with_unusual_line_ends_are_kept_whole(tmp_path):
    class Odd(Looking):
        def generate(self, requests, sampling):
            return [Completion(request.id, "Yes.\u2028\x85\n\u00e9 no") for request in requests]

    asking.ask(Odd(), [reliance.Variant(item) for item in yes_no_items(2)], tmp_path, asking.Asking())
    assert [reply.text for reply in asking.read_predictions(tmp_path)] == ["Yes.\u2028\x85\n\u00e9 no"] * 2


def test_engine_without_log_probs_is_refused(tmp_path):
    class Silent(Looking):
        capabilities = frozenset()

    with pytest.raises(ValueError, match="the image-reliance probe needs logprobs"):
        probe(Silent(), yes_no_items(2), tmp_path)


class Logged(Looking):
    """Keeps which ids each call asks for; a call number at which it is interrupted."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.calls, self.stop_at = [], stop_at

    def generate(self, requests, sampling):
        if len(self.calls) == self.stop_at:
            raise KeyboardInterrupt
        self.calls.append([request.id for request in requests])
        return super().generate(requests, sampling)


def test_an_interrupted_run_makes_the_same_blocks(tmp_path):
    variants = [reliance.Variant(item) for item in yes_no_items(10)]
    names = [variant.id for variant in variants]
    blocks = [names[0:4], names[4:8], names[8:]]
    how = asking.Asking(block_size=4)
    straight = Logged()
    asking.ask(straight, variants, tmp_path / "straight", how)
    assert straight.calls == blocks
    with pytest.raises(KeyboardInterrupt):
        asking.ask(Logged(stop_at=1), variants, tmp_path / "stopped", how)
    file = tmp_path / "stopped" / "predictions.jsonl"
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == blocks[0]
    # a write torn by a power cut: the last line of the first block is half there
    file.write_text(file.read_text()[:-20])
    again = Logged()
    asking.ask(again, variants, tmp_path / "stopped", how)
    assert again.calls == [names[3:4], *blocks[1:]]
    assert file.read_text() == (tmp_path / "straight" / "predictions.jsonl").read_text()


def test_a_block_is_on_the_disk_whole_before_the_next_one_is_asked(tmp_path):
    """Replies beyond any buffer's size: what another process sees is whole blocks."""
    seen = []

    class Wordy(Looking):
        def generate(self, requests, sampling):
            file = tmp_path / "predictions.jsonl"
            seen.append([json.loads(line)["id"] for line in file.read_text().splitlines()])
            return [Completion(request.id, "Yes. " * 1000) for request in requests]

    variants = [reliance.Variant(item) for item in yes_no_items(9)]
    asking.ask(Wordy(), variants, tmp_path, asking.Asking(block_size=3))
    names = [variant.id for variant in variants]
    assert seen == [[], names[:3], names[:6]]


def test_a_picture_is_hashed_once_however_many_questions_it_has(monkeypatch):
    hashed = []
    original = asking.sha256
    monkeypatch.setattr(asking, "sha256", lambda image: hashed.append(image["bytes"]) or original(image))
    one, other = ({"bytes": content, "path": None} for content in (b"one", b"other"))
    items = [Item("yesno", str(n), "p", [picture], [user_message(QUESTION, 1)], label="yes")
             for n, picture in enumerate([one, one, one, other])]  # fmt: skip
    first = asking.settings("", [reliance.Variant(item) for item in items], asking.Asking(), seed=0)
    assert hashed == [b"one", b"other"]
    items[0].images[0] = other
    assert asking.settings("", [reliance.Variant(item) for item in items], asking.Asking(), seed=0) != first


def test_swapping_the_picture_changes_log_probs_of_a_real_model(tiny_llava, tmp_path):
    """A random LLaVA sees: the same question about another picture has other log-probs; the same picture has the same."""
    rng = np.random.default_rng(0)
    pictures = [encode_png(Image.fromarray(rng.integers(0, 255, (30, 30, 3), dtype=np.uint8))) for _ in range(4)]
    items = [
        Item(
            "yesno",
            f"i{n}",
            f"g{n}",
            [pictures[n]],
            [user_message(QUESTION, 1)],
            label="yes" if n % 2 else "no",
            answer="Yes.",
        )
        for n in range(4)
    ]
    engine = load_engine(ModelConfig(str(tiny_llava), device="cpu"))
    variants = [reliance.Variant(item, gold_logprob=True) for item in items] + reliance.variants(
        items, ["mismatched", "none"]
    )
    replies = {
        reply.id: reply for reply in asking.ask(engine, variants, tmp_path, asking.Asking(short_answer_tokens=3))
    }
    for item in items:
        true, other = replies[item.id], replies[f"yesno/{item.id}@mismatched"]
        assert true.error is None
        assert abs(true.logp - other.logp) > 1e-4
        # all gold replies are "Yes.": the shown picture alone decides
        assert other.logp == pytest.approx(replies[other.shown].logp, abs=1e-4)
        assert abs(true.logp - replies[f"yesno/{item.id}@none"].logp) > 1e-4

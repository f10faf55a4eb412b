"""Curated instructions: the cascade from scores to examples, competing answers, style, baselines, pairs for reward models."""

import dataclasses
import json
import shutil
from collections import Counter

import numpy as np
import pytest

from prefalign import bundled, config, style_alignment
from prefalign.curation import turns_of
from prefalign.engines import Request
from prefalign.engines.transformers import load_engine
from prefalign.evidence import information_gain
from prefalign.images import encode_png, open_image, sha256
from prefalign.models import ModelConfig
from prefalign.records import (
    Candidates,
    Example,
    Pair,
    Prompt,
    assistant_message,
    message_text,
    placeholder_count,
    user_message,
)
from prefalign.scenes.export import export
from prefalign.store import OutputConfig, StoreError, read_records, write_records
from prefalign.style_alignment import Rewritten
from tests.tiny_vlms import picture

MODEL = {"model_name_or_path": "scenes", "device": "cpu"}

REWARDS = '''
"""Rewards with answers that can be counted by hand."""

import numpy as np

from prefalign.images import open_image


def words(responses):
    return [len(one.text.split()) for one in responses]


def few(responses):
    return [-len(one.text.split()) for one in responses]


def brightness(responses):
    return [float(np.asarray(open_image(one.images[0]) if isinstance(one.images[0], dict) else one.images[0]).mean())
            for one in responses]


def gaps(responses):
    return [None if "gap" in one.text else 1.0 for one in responses]


def context(responses):
    said = lambda message: [block["text"] for block in message["content"] if block["type"] == "text"]
    return [float(sum(len(" ".join(said(m)).split()) for m in one.messages)) for one in responses]


def asked(responses):
    return [float(one.messages[-1]["content"][-1]["text"] == "Ask a question about the picture.") for one in responses]
'''


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("curate_instructions")


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(REWARDS)
    return lambda name: [{"name": "function", "function": f"{file}:{name}"}]


def row(number, answer="one two three", question="What is it?", kind="detail", turns=1):
    """A conversation whose picture and id are those of its number."""
    messages = [user_message(question, 1)]
    for _ in range(turns - 1):
        messages += [assistant_message(answer), user_message(question)]
    return Prompt(f"row-{number:02}", [encode_png(picture(number), f"{number}.png")], messages, answer, {"type": kind})


def write(folder, records, kind=Prompt):
    write_records("t", records, output=OutputConfig(folder), record=kind, settings={}, seed=0)
    return folder


def settings(stage, data, folder, **changes):
    return config.build(stage.Config, {"data": {"path": data}, "output": {"path": folder, "block_size": 3}, **changes})


def run(stage, data, folder, *, record=Example, **changes):
    manifest = stage.main(settings(stage, data, folder, **changes))
    assert manifest.rows_in == manifest.rows_used + sum(manifest.dropped.values())
    return manifest, list(read_records(folder, record))


def lengths(count, start=1):
    return [row(number, " ".join(["word"] * (number + start))) for number in range(count)]


def parents(examples):
    return [int(example.meta["parent"][-2:]) for example in examples]


def test_a_cascade_keeps_its_share_of_each_type_at_each_stage(stage, rewards, tmp_path):
    rows = lengths(10) + [row(number, "word " * number, kind="short") for number in range(10, 15)]
    rows.append(dataclasses.replace(row(15), images=[], messages=[user_message("What?")]))
    rows.append(row(16, " "))
    stages = [
        {"name": "long", "rewards": rewards("words"), "keep": 0.5},
        {"name": "brief", "rewards": rewards("few"), "keep": 0.3},
    ]
    manifest, made = run(stage, write(tmp_path / "data", rows), tmp_path / "out", stages=stages)
    # long: 5 to 9 of the ten and 12 to 14 of the five; brief: the 2 and the 1 with the fewest words of these
    assert parents(made) == [5, 6, 12]
    assert manifest.dropped == {"below_brief": 5, "below_long": 7, "no_picture": 1, "no_reference": 1}
    assert made[0].messages == [*rows[5].messages, assistant_message(rows[5].answer)]
    assert made[0].images == rows[5].images
    assert made[0].meta["scores"] == {"long": 6, "brief": -6}
    table = json.loads((tmp_path / "out" / "cascade.json").read_text())
    assert [{name: one[name] for name in ("name", "scored", "kept")} for one in table["stages"]] == [
        {"name": "long", "scored": 15, "kept": 8}, {"name": "brief", "scored": 8, "kept": 3}]  # fmt: skip
    assert table["stages"][1]["mean_kept"] == pytest.approx(-(6 + 7 + 12) / 3, abs=1e-4)
    assert table["rows"][3] == {"id": "row-03", "type": "detail", "words": 4, "scores": {"long": 4}, "dropped": "below_long",
                                "new_answers": 0}  # fmt: skip


def test_order_of_rows_and_size_of_blocks_do_not_decide_ties(stage, rewards, tmp_path):
    rows = [row(number) for number in range(7)]
    stages = [{"name": "same", "rewards": rewards("words"), "keep": 0.3}]
    for name, given, size in (("a", rows, 3), ("b", rows[::-1], 2)):
        _, made = run(stage, write(tmp_path / name, given), tmp_path / f"{name}-out", stages=stages,
                      output={"path": tmp_path / f"{name}-out", "block_size": size})  # fmt: skip
        assert sorted(parents(made)) == [0, 1, 2]


def test_missing_scores_and_broken_pictures_are_counted(stage, rewards, tmp_path):
    broken = dataclasses.replace(row(3), images=[{"bytes": b"none", "path": "x.png"}])
    rows = [row(0), row(1, "a gap"), row(2), broken]
    stages = [{"name": "sure", "rewards": rewards("gaps"), "keep": 0.5}]
    manifest, made = run(stage, write(tmp_path / "data", rows), tmp_path / "out", stages=stages)
    assert parents(made) == [0]
    assert manifest.dropped == {"below_sure": 1, "not_an_image": 1, "unscored_sure": 1}
    assert manifest.quarantined == 1


def test_conversations_are_rated_question_by_question_and_answer_by_answer(stage, rewards, tmp_path):
    rows = [row(0, "a b", "Long question here?", turns=2), row(1, "a b c d", "Why?")]
    data = write(tmp_path / "data", rows)

    def scores(name, **changes):
        known = {"name": "s", "rewards": rewards(name), "keep": 1.0, **changes}
        _, made = run(stage, data, tmp_path / f"{name}-{len(changes)}", stages=[known])
        return [example.meta["scores"]["s"] for example in made]

    assert scores("words", rates="question") == [3, 1]
    assert scores("asked", rates="question") == [1, 1]
    assert scores("asked") == [0, 0]
    assert scores("words") == [2, 4]


def test_swapping_pictures_changes_what_is_kept(stage, rewards, tmp_path):
    rows = [row(number) for number in range(4)]
    stages = [{"name": "bright", "rewards": rewards("brightness"), "keep": 0.25}]
    _, [kept] = run(stage, write(tmp_path / "data", rows), tmp_path / "out", stages=stages)
    best = max(rows, key=lambda one: np.asarray(open_image(one.images[0])).mean())
    assert kept.meta["parent"] == best.id
    other = next(one for one in rows if one is not best)
    for one, image in ((best, other.images), (other, best.images)):
        rows[rows.index(one)] = dataclasses.replace(one, images=image)
    _, [kept] = run(stage, write(tmp_path / "swapped", rows), tmp_path / "again", stages=stages)
    assert kept.meta["parent"] == other.id


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "rows"
    export(folder, split="train_fair", kind="caption", start=0, stop=8)
    return folder


@pytest.fixture(scope="module")
def engine():
    return load_engine(ModelConfig("scenes", device="cpu"), batch_size=8)


def requests_of(rows):
    return [Request(one.id, one.messages, [open_image(image) for image in one.images]) for one in rows]


def test_information_gain_is_what_the_picture_adds_per_token(engine, scenes):
    rows = list(read_records(scenes, Prompt))
    answers = [str(one.answer) for one in rows]
    asked = requests_of(rows)
    gains = information_gain(engine, asked, answers, without="hidden")
    seen = engine.logprobs(asked, answers)
    hidden = [dataclasses.replace(one, image_mask=style_hidden()) for one in asked]
    blind = engine.logprobs(hidden, answers)
    assert gains == pytest.approx([float(a.mean() - b.mean()) for a, b in zip(seen, blind, strict=True)], abs=1e-4)
    assert min(gains) > 0  # true captions owe something to their pictures
    swapped = [
        dataclasses.replace(one, images=other.images) for one, other in zip(asked, asked[1:] + asked[:1], strict=True)
    ]
    others = information_gain(engine, swapped, answers, without="hidden")
    assert sum(others) < sum(gains) - 1
    marked = dataclasses.replace(asked[0], messages=[user_message("<image>", 1)])
    alone = Request("t", [user_message("What is it?")], [])
    assert information_gain(engine, [marked, alone], answers[:2], without="hidden") == [None, None]


def style_hidden():
    from prefalign.engines import ImageMask

    return ImageMask(1.0, 0)


def test_competing_answers_replace_worse_ones(stage, scenes, tmp_path):
    """The true caption cut to its first words loses against what the model writes, by the truth about the objects."""
    rows = [dataclasses.replace(one, answer="There is a picture.") for one in read_records(scenes, Prompt)]
    stages = [{"name": "best", "keep": 1.0, "num_generations": 2,
               "rewards": [{"name": "objects", "weight": {"precision": 1.0, "recall": 1.0}}]}]  # fmt: skip
    changes = {"stages": stages, "model": MODEL, "batch_size": 8, "sampling": {"max_new_tokens": 64}}
    manifest, made = run(stage, write(tmp_path / "data", rows), tmp_path / "out", **changes)
    assert manifest.rows_out == 8
    replaced = [example for example in made if example.meta["new_answers"]]
    assert len(replaced) >= 6
    for example in made:
        said = message_text(example.messages[-1:])
        assert (said != "There is a picture.") == bool(example.meta["new_answers"])
        assert example.meta["scores"]["best"] > 1 or not example.meta["new_answers"]
    assert manifest.models["model"]


def test_later_turns_are_answered_and_scored_after_the_answers_that_were_kept(stage, rewards, tmp_path):
    """The reward counts the conversation's own words, which the model's answers are not, so a stale context would show."""
    rows = [row(number, "one two three", turns=3) for number in range(3)]
    longer = {"name": "longer", "keep": 1.0, "num_generations": 2, "rewards": rewards("words")}
    context = {"name": "context", "keep": 1.0, "rewards": rewards("context")}
    changes = {"model": MODEL, "batch_size": 8, "sampling": {"max_new_tokens": 64}}
    _, made = run(stage, write(tmp_path / "data", rows), tmp_path / "out", stages=[longer, context], **changes)
    assert all(len(example.meta["new_answers"]) >= 2 for example in made)
    for example in made:
        words = [len(message_text([message]).split()) for message in example.messages]
        places = [place for place, message in enumerate(example.messages) if message["role"] == "assistant"]
        said = [sum(words[:place]) for place in places]
        assert example.meta["scores"]["context"] == pytest.approx(sum(said) / len(said))
        assert example.meta["scores"]["longer"] == pytest.approx(sum(words[place] for place in places) / 3)


def test_what_a_rewriting_may_do_to_a_row(stage, engine, scenes, tmp_path, monkeypatch):
    """Texts that were taken stand in the example, the others stay, and both log-probs are those of the answers themselves."""
    rows = list(read_records(scenes, Prompt))[:2]
    rows[1] = dataclasses.replace(
        rows[1], messages=[*rows[1].messages, assistant_message("A star."), user_message("More?")]
    )

    def scripted(engine, texts, config, *, seed):
        return [Rewritten(text.text.lower(), "taken") if text.part == "answer" or "More" in text.text
                else Rewritten(text.text, "refused") for text in texts]  # fmt: skip

    monkeypatch.setattr(stage, "align_style", scripted)
    known = settings(
        stage, scenes, tmp_path, stages=[{"name": "p", "score": "information_gain"}], model=MODEL, style={}
    )
    table = {one.id: stage.Rated("", 1) for one in rows}
    first, second = (outcome[0] for outcome in stage.process(rows, table, engine, known))
    assert first.messages == [*rows[0].messages, assistant_message(str(rows[0].answer).lower())]
    assert [message_text([turn]) for turn in second.messages[1:]] == ["a star.", "more?", str(rows[1].answer).lower()]
    assert placeholder_count(second.messages) == 1
    [verdicts] = first.meta["style"]
    assert (verdicts["question"], verdicts["answer"]) == ("refused", "taken")
    texts = [str(rows[0].answer), str(rows[0].answer).lower()]
    expected = [float(values.mean()) for values in engine.logprobs(requests_of(rows[:1]) * 2, texts)]
    assert verdicts["logprobs"] == pytest.approx(expected, abs=2e-3)
    assert [turn["turn"] for turn in second.meta["style"]] == [turn.place for turn in turns_of(rows[1])]


def test_style_through_the_whole_stage(stage, scenes, tmp_path):
    """Whatever the tiny model makes of it, a row holds the original unless its verdict says that the rewriting was taken."""
    stages = [{"name": "picture", "score": "information_gain", "keep": 0.5}]
    style = {"sampling": {"max_new_tokens": 16}}
    _, made = run(
        stage, scenes, tmp_path / "out", stages=stages, model=MODEL, style=style, without="hidden", batch_size=8
    )
    given = {one.id: one for one in read_records(scenes, Prompt)}
    assert len(made) == 4
    for example in made:
        prompt = given[example.meta["parent"]]
        [verdicts] = example.meta["style"]
        assert {verdicts["question"], verdicts["answer"]} <= set(style_alignment.Verdict.__args__)
        assert (example.messages[:1] == prompt.messages) == (verdicts["question"] != "taken")
        assert (example.messages[1:] == [assistant_message(prompt.answer)]) == (verdicts["answer"] != "taken")
        assert ("logprobs" in verdicts) == (verdicts["answer"] == "taken")


def test_baselines_keep_as_many_of_each_type(stage, rewards, tmp_path):
    rows = [*lengths(12), *(row(number, "word " * number, kind="short") for number in range(12, 20)), row(20, " ")]
    data = write(tmp_path / "data", rows)
    stages = [{"name": "long", "rewards": rewards("words"), "keep": 0.3}]
    _, kept = run(stage, data, tmp_path / "out", stages=stages)
    for kind in ("random", "length_matched"):
        baseline = {"like": tmp_path / "out", "kind": kind}
        manifest, made = run(stage, data, tmp_path / kind, produce="baseline", baseline=baseline)
        assert (
            Counter(one.meta["type"] for one in made)
            == Counter(one.meta["type"] for one in kept)
            == {"detail": 4, "short": 3}
        )
        assert manifest.dropped == {"no_reference": 1, "not_drawn": 13}
        assert parents(made) != parents(kept) if kind == "random" else parents(made)[0] >= 7
    assert not (tmp_path / "random" / "cascade.json").exists()
    with pytest.raises(
        ValueError, match=r"holds no cascade.json, so there is no cascade whose counts could be matched"
    ):
        run(stage, data, tmp_path / "x", produce="baseline", baseline={"like": tmp_path / "random"})
    with pytest.raises(StoreError, match="models.drawn"):
        run(stage, data, tmp_path / "random", produce="baseline", baseline={"like": tmp_path / "out"}, seed=1)


def test_a_stopped_cascade_goes_on_and_ends_with_the_same_rows(stage, rewards, tmp_path):
    data = write(tmp_path / "data", lengths(10))
    stages = [
        {"name": "long", "rewards": rewards("words"), "keep": 0.5},
        {"name": "bright", "rewards": rewards("brightness")},
    ]
    manifest, made = run(stage, data, tmp_path / "out", stages=stages)
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    for name in ("manifest.json", "cascade.json", "progress/00002.json", "survey/stage-long-00001.json"):
        (tmp_path / "cut" / name).unlink()
    done = (tmp_path / "cut" / "survey" / "stage-bright-00001.json").stat().st_mtime_ns
    assert run(stage, data, tmp_path / "cut", stages=stages) == (manifest, made)
    for name in ("cascade.json", "survey/stage-long-00001.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert (tmp_path / "cut" / "survey" / "stage-bright-00001.json").stat().st_mtime_ns == done
    with pytest.raises(StoreError, match="holds rows made with another config"):
        run(stage, data, tmp_path / "cut", stages=stages[:1])


def rated(number, ratings=(0.9, 0.5, 0.1)):
    responses = [{"text": f"Answer {number} {rating} of mine.", "scores": {"human": rating}} for rating in ratings]
    return Candidates(
        f"group-{number:02}", [encode_png(picture(number), f"{number}.png")], [user_message("What?", 1)], responses
    )


def test_comparisons_train_reward_models(stage, tmp_path):
    rows = [rated(number) for number in range(8)] + [rated(8, (None, None))]
    data = write(tmp_path / "data", rows, Candidates)
    manifest, pairs = run(stage, data, tmp_path / "out", record=Pair, produce="pairs", builder={"aug_prob": 1.0})
    assert manifest.dropped == {"unrated": 1}
    kinds = Counter(pair.meta["corruption"] for pair in pairs)
    assert kinds[None] == 24
    assert sum(kinds.values()) == 48 == len({pair.id for pair in pairs})
    given = {one.id: one for one in rows}
    pictures = {sha256(one.images[0]) for one in rows}
    for pair in pairs:
        pair.check()
        group = given[pair.meta["parent"]]
        chosen, rejected = message_text(pair.chosen), message_text(pair.rejected)
        assert chosen == group.responses[pair.meta["better"]]["text"]
        assert (pair.images, pair.prompt) == (group.images, group.messages)
        number = group.id[-2:].lstrip("0") or "0"
        if pair.meta["corruption"] is None:
            assert pair.margin == pytest.approx(0.4) or pair.margin == pytest.approx(0.8)
        elif pair.meta["corruption"] == "swap_image":
            assert chosen == rejected
            assert sha256(pair.rejected_images[0]) in pictures - {sha256(pair.images[0])}
        elif pair.meta["corruption"] == "swap_answer":
            assert not rejected.startswith(f"Answer {number} ")
        else:
            assert set(rejected.split()) <= set(chosen.split())
        assert bool(pair.rejected_images) == (pair.meta["corruption"] == "swap_image")
    assert set(kinds) == {None, "word_shuffle", "word_drop", "duplicate", "swap_image", "swap_answer"}
    _, backwards = run(stage, write(tmp_path / "back", rows[::-1], Candidates), tmp_path / "again", record=Pair, produce="pairs",
                       builder={"aug_prob": 1.0})  # fmt: skip
    assert {pair.id: pair.to_row() for pair in backwards} == {pair.id: pair.to_row() for pair in pairs}


def test_comparisons_of_questions_are_asked_for_as_the_cascade_asks(stage, tmp_path):
    data = write(tmp_path / "data", [rated(0)], Candidates)
    _, pairs = run(
        stage, data, tmp_path / "out", record=Pair, produce="pairs", rated="question", builder={"aug_prob": 0.0}
    )
    assert [pair.prompt for pair in pairs] == [[user_message(stage.QUESTION_PROMPT, 1)]] * 3
    alone = {"aug_prob": 1.0, "corruptions": ["swap_image"], "min_gap": 9.0}
    with pytest.raises(StoreError, match="made no row out of 1: 1 no_comparison"):  # there is no other picture
        run(stage, data, tmp_path / "alone", record=Pair, produce="pairs", builder=alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"stages are \[\]: a cascade needs at least one"),
        ({"stages": [{"name": "a", "score": "information_gain"}] * 2, "model": MODEL}, "each with a name of its own"),
        ({"stages": [{"name": "a b", "rewards": [{}]}]}, "stage 'a b' has no name to count rows under"),
        ({"stages": [{"name": "a", "rewards": [{}], "keep": 0}]}, r"stage a keeps 0.0; give a share above 0"),
        ({"stages": [{"name": "a"}]}, "stage a scores by rewards and names 0 rewards"),
        (
            {"stages": [{"name": "a", "rewards": [{}], "rates": "question", "num_generations": 2}]},
            "stage a rates questions, and",
        ),
        ({"stages": [{"name": "a", "rewards": [{}], "num_generations": -1}]}, "num_generations -1; give 0 or more"),
        ({"stages": [{"name": "a", "score": "information_gain"}]}, "information_gain need a model, and none is named"),
        ({"produce": "baseline"}, "nothing says like which cascade"),
    ],
)
def test_settings_that_make_no_sense_are_refused(stage, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(stage, "d", "o", **changes)

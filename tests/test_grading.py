"""Grading a reward: each source that it uses, or wrongly uses, shows in a number of its own."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from prefalign import bundled
from prefalign.config import ConfigError, build
from prefalign.images import encode_png, open_image
from prefalign.records import Pair, assistant_message, user_message
from prefalign.report.grades import write_grades
from prefalign.rewards import Combined, Weighted
from prefalign.rewards.grading import (
    LEAST_PAIRS,
    check_fit_for_rl,
    check_rewards,
    grade,
    weights_digest,
    write_grade,
)
from prefalign.rewards.learned import LearnedReward
from tests.reward_runs import make_reward_model, make_reward_pair, write_reward_pairs

COLOURS = ("red", "green", "blue")


def pair(number, *, longer=False):
    """The chosen answer names the picture's colour, the rejected one another."""
    from PIL import Image

    channel = number % 3
    level = [20, 20, 20]
    level[channel] = 200 + number % 30
    image = encode_png(Image.new("RGB", (16, 16), tuple(level)))
    more = " thing in the picture" if longer else ""
    return Pair(
        id=f"pair-{number}",
        images=[image],
        prompt=[user_message("what colour ?", 1)],
        chosen=[assistant_message(COLOURS[channel] + more)],
        rejected=[assistant_message(COLOURS[(channel + 1) % 3])],
        method="test",
        facts={"objects": [COLOURS[channel]], "captions": [f"a {COLOURS[channel]} thing"]},
    )


@dataclass
class Looks:
    """Scores 1 for naming the picture's strongest channel."""

    def score(self, responses):
        values = []
        for response in responses:
            levels = np.asarray(open_image(response.images[0]), dtype=float).mean(axis=(0, 1))
            strongest = COLOURS[int(levels.argmax())] if levels.max() - levels.min() > 1 else "none"
            wrong = sum(colour in response.text for colour in COLOURS if colour != strongest)
            values.append(float(strongest in response.text) - wrong)
        return {"total": torch.tensor(values)}


@dataclass
class ReadsFacts:
    """Scores 1 for naming an object of the facts."""

    def score(self, responses):
        found = [any(name in r.text for name in r.facts.get("objects", [])) for r in responses]
        return {"total": torch.tensor(found).float()}


@dataclass
class LikesLength:
    """Scores the number of words."""

    def score(self, responses):
        return {"total": torch.tensor([float(len(r.text.split())) for r in responses])}


@dataclass
class ByPlace:
    """Scores by the place in the batch: no property of the response."""

    def score(self, responses):
        return {"total": -torch.arange(len(responses)).float()}


def measured(reward, **more):
    return grade([pair(number, **more) for number in range(12)], reward, block_size=6)[0].metrics


def test_a_reward_that_looks_at_the_picture():
    found = measured(Looks())
    assert found["accuracy"].value == 1
    assert found["accuracy_shuffled_picture"].value < 0.6
    assert found["accuracy_blank_picture"].value == 0.5
    assert found["accuracy_without_facts"].value == 1
    assert found["swap_symmetry"].value == 1
    assert found["object_sensitivity"].value == 1


def test_a_reward_that_reads_the_facts_only():
    found = measured(ReadsFacts())
    assert found["accuracy"].value == 1
    assert found["accuracy_without_facts"].value == 0.5
    assert found["accuracy_blank_picture"].value == 1 == found["accuracy_shuffled_picture"].value


def test_a_reward_that_counts_words():
    longer = [pair(number, longer=number < 9) for number in range(12)]
    for one in longer[9:]:
        one.rejected = [assistant_message("some other " + one.rejected[0]["content"][0]["text"])]
    found = grade(longer, LikesLength(), block_size=6)[0].metrics
    assert found["accuracy"].value == 0.75
    assert found["accuracy_length_controlled"].value == 0.5
    assert found["length_correlation"].value == pytest.approx(1.0)


def test_a_reward_that_depends_on_the_order():
    assert measured(ByPlace())["swap_symmetry"].value < 1


def test_missing_scores_are_counted_and_never_counted_as_wrong():
    class Half(Looks):
        def score(self, responses):
            values = super().score(responses)["total"]
            missing = torch.tensor([int(r.id.split("-")[1]) % 2 == 0 for r in responses])
            return {"total": values.masked_fill(missing, float("nan"))}

    found, rows = grade([pair(number) for number in range(12)], Half(), block_size=6)
    assert (found.pairs, found.missing, len(rows)) == (12, 6, 12)
    assert found.metrics["accuracy"].value == 1
    assert found.metrics["accuracy"].n == 6


def test_a_calibrated_reward_has_a_smaller_error():
    @dataclass
    class Scaled:
        scale: float

        def score(self, responses):
            right = Looks().score(responses)["total"] > 0
            flipped = torch.tensor([int(r.id.split("-")[1]) % 4 == 0 for r in responses])
            return {"total": self.scale * (right ^ flipped).float()}

    pairs = [pair(number) for number in range(24)]
    errors = {scale: grade(pairs, Scaled(scale))[0].metrics["calibration_error"].value for scale in (1.0986, 20.0)}
    assert errors[1.0986] < 0.15 < errors[20.0] + 0.001
    assert errors[20.0] == pytest.approx(0.25, abs=0.02)


def test_an_unknown_term_is_named():
    with pytest.raises(ConfigError, match="the rewards give total, and none called 'score'"):
        grade([pair(0)], Looks(), term="score")


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "reward_model.json").write_text('{"attributes": ["reward"]}')
    (tmp_path / "reward_head.safetensors").write_bytes(b"weights")
    return tmp_path


def test_training_refuses_what_was_not_graded_or_is_below_the_floor(model_folder):
    with pytest.raises(ConfigError, match=r"never graded .* grade_reward_model"):
        check_fit_for_rl(model_folder)
    good, bad = (grade([pair(number) for number in range(30)], reward)[0] for reward in (Looks(), LikesLength()))
    write_grade(model_folder, {"held_out": good}, {"held_out": "in"})
    assert check_fit_for_rl(model_folder) == []
    write_grade(model_folder, {"held_out": good, "other": bad}, {"held_out": "in", "other": "out"})
    with pytest.raises(ConfigError, match=r"accuracy on 'other' \(out of domain\) is 0.500, below the floor of 0.6"):
        check_fit_for_rl(model_folder)
    assert len(check_fit_for_rl(model_folder, force=True)) == 1
    (model_folder / "reward_head.safetensors").write_bytes(b"others")
    with pytest.raises(ConfigError, match="of other weights"):
        check_fit_for_rl(model_folder)


def test_a_grade_counts_for_the_use_that_was_graded(model_folder):
    good = grade([pair(number) for number in range(LEAST_PAIRS)], Looks())[0]
    listed = {"name": "reward_model", "path": "there", "batch_size": 4, "facts": False}
    write_grade(model_folder, {"held_out": good}, {"held_out": "in"}, entry=listed)
    stored = json.loads((model_folder / "grade.json").read_text())
    assert (stored["reward"], stored["term"]) == ({"facts": False}, "total")
    assert stored["sets"]["held_out"]["pairs"] == LEAST_PAIRS
    used = {"name": "reward_model", "path": str(model_folder), "facts": False, "weight": 0.3}
    check_rewards([used], floor=0.6, force=False)
    for changed, said in [
        ({"facts": True}, "graded with facts False and is used with True"),
        ({"weight": -1.0}, r"graded with signs of weight {'reward': 1} and is used with {'reward': -1}"),
        ({"weights": {"reward": 2.0}}, r"graded with weights None and is used with {'reward': 2.0}"),
        ({"weight": {"other": 1.0}}, r"used with {'other': 1}"),
    ]:
        with pytest.raises(ConfigError, match=said):
            check_rewards([{"name": "judge", "rewards": [{**used, **changed}]}], floor=0.6, force=False)
        check_rewards([{**used, **changed}], floor=0.6, force=True)
    check_rewards([{**used, "normalise": False}], floor=0.6, force=False)  # one attribute: the same answer wins
    write_grade(model_folder, {"held_out": good}, {"held_out": "in"}, term="reward_model/reward")
    assert check_fit_for_rl(model_folder) == []
    two = {"facts": False, "weights": {"helpfulness": 1.0, "verbosity": -0.5}}
    write_grade(model_folder, {"held_out": good}, {"held_out": "in"}, entry={**listed, **two})
    check_rewards([{**used, **two, "normalise": True}], floor=0.6, force=False)
    with pytest.raises(ConfigError, match="graded with normalise True and is used with False"):
        check_rewards([{**used, **two, "normalise": False}], floor=0.6, force=False)


def test_a_grade_of_few_pairs_and_a_folder_that_is_not_there_are_refused(model_folder):
    few = grade([pair(number) for number in range(LEAST_PAIRS - 1)], Looks())[0]
    write_grade(model_folder, {"held_out": few}, {"held_out": "in"})
    with pytest.raises(ConfigError, match="graded on 29 scored pairs, fewer than the 30"):
        check_fit_for_rl(model_folder)
    for force in (False, True):
        with pytest.raises(ConfigError, match="nowhere: there is no such folder. Name the output of"):
            check_fit_for_rl(model_folder / "nowhere", force=force)


def test_calibration_is_that_of_the_raw_score(tiny_llava, tmp_path):
    """Scale and weight change no chance; a sum of several scores is none."""
    model = make_reward_model(tiny_llava)
    pairs = [pair(number) for number in range(4)]
    model.calibrate([one.to_row() for one in pairs])
    found = {}
    for name, normalise, weight in (("raw", False, 1.0), ("scaled", True, 1.0), ("weighted", True, -3.0)):
        reward = LearnedReward(tmp_path, normalise=normalise)
        reward.model = model
        found[name] = grade(pairs, Combined([Weighted("reward_model", reward, weight)]))
    wanted = [row.margins["own"] for row in found["raw"][1]]
    assert max(map(abs, wanted)) > 1e-3
    for name, (measured_grade, rows) in found.items():
        assert [row.logit for row in rows] == pytest.approx(wanted, abs=1e-5), name
        assert measured_grade.metrics["calibration_error"].value == pytest.approx(
            found["raw"][0].metrics["calibration_error"].value, abs=1e-5
        )
    several = Combined([Weighted("looks", Looks(), 1.0), Weighted("length", LikesLength(), 1.0)])
    assert grade(pairs, several)[0].metrics["calibration_error"].value is None


def test_the_stage_grades_a_reward_model_only_where_it_is_alone(tiny_llava, tmp_path, capsys):
    model = make_reward_model(tiny_llava)
    model.calibrate([make_reward_pair(number).to_row() for number in range(4)])
    model.save(tmp_path / "reward")
    pairs = write_reward_pairs(tmp_path / "pairs", 4)
    listed = {"name": "reward_model", "path": str(tmp_path / "reward"), "facts": False, "device": "cpu"}
    module = bundled.load_stage("grade_reward_model")
    values = {"sets": {"held_out": {"path": str(pairs)}}, "output": str(tmp_path / "out"), "floor": 0.0}
    for rewards, written, said in [
        ([listed, {"name": "length"}], False, "no reward model got a grade"),
        ([listed], True, "graded on 4 scored pairs, fewer than the 30"),
    ]:
        module.main(build(module.Config, {**values, "rewards": rewards}))
        shown = capsys.readouterr().out
        assert said in shown
        assert "fit to train against" not in shown
        assert (tmp_path / "reward" / "grade.json").exists() == written
    assert json.loads((tmp_path / "reward" / "grade.json").read_text())["reward"] == {"facts": False}


def test_the_digest_changes_with_the_settings(model_folder):
    before = weights_digest(model_folder)
    (model_folder / "reward_model.json").write_text('{"prompt": "other"}')
    assert weights_digest(model_folder) != before


def test_report(tmp_path):
    found = grade([pair(number) for number in range(6)], Looks())[0]
    file = write_grades(tmp_path, {"held out": found}, {"held out": "out"}, settings={"seed": 0}, problems=["too weak"])
    text = file.read_text(encoding="utf-8")
    assert "Not fit to train against: too weak" in text
    assert "Notices absent objects" in text
    assert "out of domain" in text
    json.dumps({name: estimate.value for name, estimate in found.metrics.items()}, allow_nan=False)


def test_pictures_of_one_size_only_are_exchanged():
    two = pair(1)
    two.images = two.images * 2
    two.prompt = [user_message("what colour ?", 2)]
    found, rows = grade([pair(0), two], Looks())
    assert np.isnan([row.margins["shuffled_picture"] for row in rows]).all()
    assert found.metrics["accuracy_shuffled_picture"].value is None


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("train_ppo", {"prompts": "prompts", "rewards": [{"name": "reward_model"}], "reward_model": "PATH"}),
        ("train_online", {"data": {"path": "prompts"}, "rewards": [{"name": "reward_model", "path": "PATH"}]}),
        ("train_online", {"data": {"path": "prompts"}, "annotator": {"name": "rewards",
                                                                     "rewards": [{"name": "reward_model", "path": "PATH"}]}}),
    ],
)  # fmt: skip
def test_recipes_refuse_an_ungraded_reward_model_before_anything_is_loaded(stage, changes, model_folder):
    text = json.dumps({**changes, "model": {"model_name_or_path": "scenes"}, "output": "out"})
    module = bundled.load_stage(stage)
    values = json.loads(text.replace("PATH", str(model_folder)))
    with pytest.raises(ConfigError, match=r"never graded .* force_reward"):
        module.main(build(module.Config, values))

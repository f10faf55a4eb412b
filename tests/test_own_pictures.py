"""Each request shows the picture of its own row: steps in which a blank picture, or another row's, would go unseen elsewhere."""

import json
import re
from pathlib import Path

import pytest

from prefalign import bundled, knowledge, responses
from prefalign.contradictions import Chosen, RejectedConfig, rejected_captions
from prefalign.engines import Completion, Sampling
from prefalign.engines.config import EngineConfig
from prefalign.images import encode_png
from prefalign.judge import RUBRIC
from prefalign.knowledge import Captioned, Probing
from prefalign.records import Candidates, Prompt, message_text, user_message
from prefalign.rewards import read_rewards, second_grades
from prefalign.scenes.probing import SceneAnnotator
from prefalign.sources import DataConfig
from prefalign.store import OutputConfig
from tests.tiny_vlms import picture

PICTURES = {"first": picture(1), "second": picture(2), "third": picture(3)}
ASKED = [user_message("What is it?", 1)]
DRAWN = Sampling(max_new_tokens=8, temperature=1.0)


class Seeing:
    """Replies by the end of a request's id, and keeps what it was shown: pixels by row and the rest of the id."""

    capabilities = frozenset({"sample"})

    def __init__(self, name, **replies):
        self.fingerprint, self.replies, self.requests = name, replies, []

    def generate(self, requests, sampling):
        self.requests += requests
        return [Completion(request.id, self.replies.get(request.id.split("/")[1], "Red.")) for request in requests]

    def shown(self):
        return {request.id: [image.tobytes() for image in request.images] for request in self.requests}


def own(*steps):
    """What has to be shown in these steps of every row."""
    return {f"{name}/{step}": [image.tobytes()] for name, image in PICTURES.items() for step in steps}


def test_the_pictures_differ():
    assert len({(image.size, image.tobytes()) for image in PICTURES.values()}) == 3


def prompts(**facts):
    return [Prompt(name, [encode_png(image)], ASKED, None, facts) for name, image in PICTURES.items()]


@pytest.mark.parametrize("draws", [1, 2])
def test_mpa_annotates_and_answers_from_the_rows_picture(draws):
    stage = bundled.load_stage("mpa")
    large = Seeing("large", annotation="Question: Which colour?\nAnswer: red")
    small = Seeing("small", small="Blue.")
    known = stage.Config(
        model=EngineConfig("small"),
        large=EngineConfig("large"),
        data=DataConfig(Path("rows")),
        output=OutputConfig(Path("out")),
        vote=stage.VoteConfig(num_generations=draws),
    )
    made = stage.process(prompts(), small, large, known)
    assert [len(rows) for rows in made] == [1, 1, 1]
    assert large.shown() == own("annotation", *(f"large/{number}" for number in range(draws)))
    assert small.shown() == own("small")


def test_knowada_probes_with_the_rows_picture_and_has_it_captioned():
    model = Seeing("model")
    caption = Captioned("", "There is a small red star at the top.", {"counts": {"star": 1}})
    items = [Captioned(name, caption.caption, caption.facts) for name in PICTURES]
    asked = [
        (item, [image], ["What colour is the star?"]) for item, image in zip(items, PICTURES.values(), strict=True)
    ]
    knowledge.probe(model, SceneAnnotator(), asked, Probing(2, DRAWN, 1, 1), seed=0)
    assert model.shown() == own("question 0/0", "question 0/1")

    model = Seeing("model")
    rows = [
        Chosen(item, "There is a star.", ASKED, [image]) for item, image in zip(items, PICTURES.values(), strict=True)
    ]
    wanted = RejectedConfig(original_share=0, num_generations=2)
    rejected_captions(rows, model, SceneAnnotator(), wanted, seed=0)
    assert model.shown() == own("own/0", "own/1")


def test_every_turn_of_a_conversation_shows_the_rows_picture():
    model = Seeing("model")
    rows = [
        (prompt, [image])
        for prompt, image in zip(
            prompts(rules={"questions": ["What is it?", "Where?"]}), PICTURES.values(), strict=True
        )
    ]
    held = responses.converse(rows, model, DRAWN, num_generations=2, method="m", seed=0)
    assert [len(row.responses) for row in held] == [2, 2, 2]
    assert model.shown() == own("0", "1", "0/1", "1/1")


def test_second_grades_are_of_the_rows_picture():
    class Judge(Seeing):
        def generate(self, requests, sampling):
            self.requests += requests
            return [Completion(request.id, json.dumps(dict.fromkeys(RUBRIC, 3))) for request in requests]

    judge = Judge("judge")
    rows = [
        (Candidates(name, [encode_png(image)], ASKED, [{"text": f"The {name} {number}"} for number in (0, 1)]), [image])
        for name, image in PICTURES.items()
    ]
    again = second_grades.asked_again(read_rewards([{"name": "judge", "engine": judge}]))
    graded = second_grades.grade_again(rows, again, share=1.0, seed=0)
    assert all("regraded" in response for row in graded for response in row.responses)
    shown = {
        re.search(r"Answer to grade:\nThe (\w+ \d)", message_text(request.messages))[1].replace(" ", "/"): [
            image.tobytes() for image in request.images
        ]
        for request in judge.requests
    }
    assert shown == own("0", "1")

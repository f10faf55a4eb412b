"""What the tests of `datagen/rlaif_v.py` share: its scenes settings on few rows, and answers by hand."""

import json

from test_claims import Labeller

from prefalign import bundled, config
from prefalign.engines import FirstToken
from prefalign.images import encode_png
from prefalign.records import Candidates, user_message
from tests.tiny_vlms import picture

SCENES = config.read_yaml(bundled.find("datagen/rlaif_v_scenes"))
SMALL = {"labeller": None, "divide": {"rules": {"claim": "There is something {where}.", "question": "What is {where}?"}},
         "conquer": {"yes": ["A"], "no": ["Nothing"]},  # the base as its own labeller; its yes and no hardly look
         "output": {"block_size": 2}, "batch_size": 16, "num_generations": 4, "pairs": {"length_balance": "off", "min_gap": 1.0},
         "sampling": {"max_new_tokens": 64, "temperature": 1.0}}  # fmt: skip
DRAGON = "A dragon sleeps. "
CAT = "A cat sits. "


class Absent(Labeller):
    """Labels by rules, and does not reply about the row `down`."""

    down = ""

    def first_token(self, requests, words):
        replies = super().first_token(requests, words)
        return [
            FirstToken({}, "HTTP 503") if self.down and self.down in request.id else one
            for request, one in zip(requests, replies, strict=True)
        ]


def settings(stage, rows, folder, **changes):
    known = config.merge(SMALL, {"data": {"path": rows}, "output": {"path": folder}})
    return config.build(stage.Config, config.merge(config.merge(SCENES, known), changes))


def survey_of(folder):
    files = sorted(folder.glob("survey/claims-*.json"))
    return [row for file in files for row in json.loads(file.read_text())["rows"]]


def candidates(texts, name="row", images=None, generators=("g",)):
    said = [
        {"text": text.strip(), "finish_reason": "stop", "tokens": 3, "settings": {"temperature": 0.7},
         "generator": generators[number % len(generators)]}
        for number, text in enumerate(texts)
    ]  # fmt: skip
    images = [encode_png(picture(1), "a.png")] if images is None else images
    return Candidates(name, images, [user_message("What is it?", len(images))], said)

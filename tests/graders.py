"""A judge that knows the truth of the pictures, and settings of `quality_pairs` on the embedded world."""

import hashlib
import json
import re

from prefalign import bundled, config
from prefalign.engines import Completion
from prefalign.images import open_image
from prefalign.judge import RUBRIC
from prefalign.records import message_text
from prefalign.rewards import Response
from prefalign.rewards.objects import Objects

ROWS = 6
SCENES = config.read_yaml(bundled.find("datagen/quality_pairs_scenes"))
FIVE = [f"judge/{name}" for name in RUBRIC]


def pixels(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


class Grader:
    """Knows the truth of pictures and replies with five grades: less for each thing that an answer invents or misses.

    `fickle`: an answer with an even number of letters gets one point less for what is asked first, as judges have it.
    `mute`: texts that it babbles about.
    """

    capabilities = frozenset({"sample"})
    fingerprint = "grader"

    def __init__(self, rows, fickle=False, mute=()):
        self.facts = {pixels(open_image(row.images[0])): row.facts for row in rows}
        self.fickle, self.mute, self.requests = fickle, mute, []

    def generate(self, requests, sampling):
        self.requests += requests
        return [Completion(request.id, self.reply(request)) for request in requests]

    def reply(self, request):
        text = message_text(request.messages)
        answer = re.search(r"Answer to grade:\n(.*)\n\n", text)[1]
        if answer in self.mute:
            return "I like it."
        facts = self.facts[pixels(request.images[0])]
        found = {
            name: value.item() for name, value in Objects().score([Response("", [], [], answer, facts=facts)]).items()
        }
        false, recall = -(found["invented"] + found["wrong"]), found["recall"]
        grades = {"helpfulness": round(4 * recall), "correctness": max(0, 4 - int(false)), "coherence": 4,
                  "complexity": 1, "verbosity": min(4, len(answer.split()) // 8)}  # fmt: skip
        first = re.search(r'"(\w+)": <0-4>', text)[1]
        if self.fickle and len(answer) % 2 == 0:
            grades[first] = max(0, grades[first] - 1)
        return json.dumps(grades)


def settings(stage, rows="rows", folder="out", grader=None, **changes):
    known = {"data": {"path": rows}, "output": {"path": folder, "block_size": 4}, "sampling": {"max_new_tokens": 40}}
    if grader is not None:
        known |= {"rewards": [{"name": "judge", "engine": grader}], "best": {"min_quality": None}, "regrade": 0.25}
    return config.build(stage.Config, config.merge(config.merge(SCENES, known), changes))

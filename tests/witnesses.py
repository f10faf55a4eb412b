"""Engines that stand for a judge's model: one that knows the truth of pictures, one with a script, one that fails at times."""

import hashlib
import json
import re

from prefalign.engines import Completion
from prefalign.images import encode_png
from prefalign.records import message_text, user_message
from prefalign.rewards import Response
from prefalign.rewards.objects import Objects
from prefalign.scenes import language, world

ASKED = [user_message("Describe the picture.", 1)]
FIVE = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}


class Witness:
    """An engine that recognises pictures, knows their truth, and answers what it is asked as it is asked to."""

    capabilities = frozenset({"sample"})
    fingerprint = "witness"

    def __init__(self, scenes):
        self.facts = {pixels(world.draw(scene)): language.facts(scene) for scene in scenes}
        self.requests = []

    def generate(self, requests, sampling):
        self.requests += requests
        return [Completion(request.id, self.reply(request)) for request in requests]

    def reply(self, request):
        text = message_text(request.messages)
        facts = self.facts[pixels(request.images[0])]
        if found := re.search(r"Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\n", text):
            first, second = (self.worth(answer, facts) for answer in found.groups())
            better = "tie" if first == second else "A" if first > second else "B"
            return json.dumps({"reason": "I looked.", "better": better, "confidence": 90 if better == "A" else 80})
        answer = re.search(r"Answer to grade:\n(.*)\n\n", text)[1]
        names = re.findall(r'"(\w+)": <0-4>', text)
        return "```json\n" + json.dumps(dict.fromkeys(names, 4 if self.worth(answer, facts) == 0 else 1)) + "\n```"

    def worth(self, answer, facts):
        found = Objects().score([Response("", [], [], answer, facts=facts)])
        return (found["invented"] + found["wrong"]).item()


class Scripted(Witness):
    """Says what it was told to, one line after the other, the last for ever."""

    fingerprint = "scripted"

    def __init__(self, *replies):
        self.replies, self.requests, self.samplings = list(replies), [], []

    def generate(self, requests, sampling):
        self.samplings.append(sampling)
        return super().generate(requests, sampling)

    def reply(self, request):
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


class Overloaded(Scripted):
    """Replies to no question about these texts, once each."""

    fingerprint = "overloaded"

    def __init__(self, *texts, reply):
        super().__init__(reply)
        self.texts = list(texts)

    def generate(self, requests, sampling):
        replies = super().generate(requests, sampling)
        for number, request in enumerate(requests):
            if found := [text for text in self.texts if text in message_text(request.messages)]:
                self.texts.remove(found[0])
                replies[number] = Completion(request.id, "", finish_reason="error", error=f"request {request.id}: busy")
        return replies


def pixels(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


def response(scene, text, **more):
    return Response("row", [encode_png(world.draw(scene))], ASKED, text, facts=language.facts(scene), **more)

"""The object-list reward: by hand, against the world's own parser and truth, and against CHAIR."""

import math
import random

import pytest
import torch

from prefalign.config import ConfigError
from prefalign.evals import chair
from prefalign.rewards import Response, read_rewards
from prefalign.rewards.objects import Objects, Reader
from prefalign.scenes import language, measure, world
from tests.test_chair import SYNONYMS

STREET = {"objects": ["dog", {"name": "car", "colour": "red"}, {"name": "car", "colour": "blue"}]}
NAMES = {"dog": ["puppy"], "cat": ["kitten"], "car": ["taxi"], "hot dog": [], "person": ["man", "woman"], "knife": []}


def scores(text, facts=STREET, **settings):
    reward = Objects(**{"objects": NAMES, **settings})
    return {name: values.item() for name, values in reward.score([Response("row", [], [], text, facts=facts)]).items()}


def kinds(text, **settings):
    return [mention.kind for mention in Objects(**{"objects": NAMES, **settings}).reader.mentions(text)]


def test_worked_numbers():
    assert scores("A puppy beside a cat and a cat.") == {
        "invented": -2,
        "wrong": 0,
        "precision": pytest.approx(1 / 3),
        "recall": 0.5,
    }
    assert scores("A dog and two cars.") == {"invented": 0, "wrong": 0, "precision": 1, "recall": 1}


def test_a_response_that_names_nothing_invents_nothing_and_recalls_nothing():
    assert scores("It is a nice day.") == {"invented": 0, "wrong": 0, "precision": 1, "recall": 0}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("A red car.", 0),
        ("A blue car and a red car.", 0),
        ("A green car.", 1),
        ("The car is green.", 1),
        ("The cars are red and wide.", 0),
        ("Three cars.", 1),
        ("Two red cars.", 1),
        ("2 taxis.", 0),
        ("There is no car.", 1),
        ("There are no green cars.", 0),
        ("I cannot see any dogs.", 1),
        ("I don't see a dog.", 1),
        ("There are no visible cars.", 1),
        ("No, there is a car.", 0),
        ("There isn't a cat.", 0),
        ("A large dog.", 0),  # the facts do not say how large it is
    ],
)
def test_what_is_said_of_objects_that_are_there(text, wrong):
    found = scores(text)
    assert found["wrong"] == -wrong
    assert found["invented"] == 0


def test_a_denied_object_is_neither_invented_nor_recalled():
    assert scores("There is no cat and no dog.") == {"invented": 0, "wrong": -1, "precision": 1, "recall": 0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A hot dog", ["hot dog"]),
        ("hot-dogs and puppies", ["hot dog", "dog"]),
        ("Two men, three women and some people", ["person"] * 3),
        ("A caravan in a category, doggedly", []),
        ("KNIVES", ["knife"]),
        ("cars, taxis", ["car", "car"]),
    ],
)
def test_words_become_kinds(text, expected):
    assert kinds(text) == expected


def test_an_object_of_the_facts_that_the_vocabulary_lacks_can_still_be_recalled():
    facts = {"objects": ["Zeppelin", "dog"]}
    assert scores("Two zeppelins.", facts)["recall"] == 0.5
    assert scores("Two zeppelins.", facts)["invented"] == 0


def test_reads_captions_as_chair_does():
    table = {"dog": ["dog", "puppy"], "chair": ["chair", "seat"], "toilet": ["toilet"], "wine glass": ["wine glass"],
             "hot dog": ["hot dog"], "person": ["person", "man", "child"], "bus": ["bus"], "knife": ["knife"],
             "elephant": ["elephant"], "train": ["train"], "cup": ["cup"]}  # fmt: skip
    words = chair.vocabulary(table)
    reader = Objects(objects=table).reader
    for text in (
        "Two puppies and a baby elephant near a passenger train.",
        "A toilet seat beside wine glasses, hot dogs and buses.",
        "Children and men with knives sit on seats at home plate.",
        "The dog. The dog! A dog-like cup; cups",
    ):
        assert [mention.kind for mention in reader.mentions(text)] == chair.mentions(text, words), text


def test_synonym_file(tmp_path):
    file = tmp_path / "synonyms.txt"
    file.write_text("dog, puppy\ncat, kitten\ncar, taxi\n")
    assert scores("A kitten and a taxi", synonyms=str(file), objects={})["invented"] == -1


def test_facts_without_objects_give_no_score():
    assert all(math.isnan(value) for value in scores("A cat.", {}).values())
    empty = scores("A cat.", {"objects": []})
    assert empty["invented"] == -1
    assert math.isnan(empty["recall"])


def test_of_several_pictures_the_objects_of_all_are_there():
    first, second = ({"world": "scenes", "objects": [{"shape": shape}]} for shape in ("star", "ring"))
    both = {**first, "pictures": [first, second]}
    assert scores("A star, a ring and a heart.", both)["invented"] == -1
    assert scores("A star.", both)["recall"] == 0.5
    assert all(math.isnan(value) for value in scores("A star.", {**both, "pictures": [first, {}]}).values())


def test_scenes_need_no_settings_and_true_texts_lose_nothing():
    reward = Objects()
    for index in range(20):
        picture = world.scene("test_fair", index)
        facts = language.facts(picture)
        said = [language.caption(picture, index), language.description(picture, index)]
        said += [question.answer for question in language.questions(picture, index)]
        found = reward.score([Response("row", [], [], text, facts=facts) for text in said])
        assert not found["invented"].any()
        assert not found["wrong"].any()
        assert (found["precision"] == 1).all()


def test_reads_scenes_as_the_world_reads_itself():
    reader = Objects().scenes_reader
    seen = 0
    for index in range(30):
        picture = world.scene("train_biased", index)
        questions = language.questions(picture, index)
        for text in (
            language.caption(picture, index),
            language.description(picture, index),
            *(question.text for question in questions),
            *(question.answer for question in questions),
        ):
            mine = [
                (m.kind, *(m.said.get(group) for group in ("colour", "size", "place")), m.denied)
                for m in reader.mentions(text)
            ]
            theirs = [(m.shape, m.colour, m.size, m.place, m.negated) for m in language.parse(text)]
            assert mine == theirs, text
            seen += len(mine)
    assert seen > 500


def test_sums_over_false_texts_are_the_worlds_own_measure():
    """CHAIRi and recall as `scenes.measure` counts them, for captions of other pictures."""
    pictures = [world.scene("test_fair", index) for index in range(60)]
    texts = [language.caption(world.scene("test_biased", index)) for index in range(60)]
    truth = measure.captioned(pictures, texts)
    reward = Objects()
    found = reward.score(
        [
            Response("", [], [], text, facts=language.facts(picture))
            for picture, text in zip(pictures, texts, strict=True)
        ]
    )
    affirmed = sum(not mention.denied for text in texts for mention in reward.scenes_reader.mentions(text))
    kinds = torch.tensor([len(picture.shapes) for picture in pictures])
    assert -found["invented"].sum().item() / affirmed == pytest.approx(truth["chair_i"], abs=1e-6)
    assert (found["recall"] * kinds).sum().item() / kinds.sum().item() == pytest.approx(truth["recall"], abs=1e-6)
    assert 0.2 < truth["chair_i"] < 0.8


@pytest.mark.parametrize("text", ["A star on the top left.", "At the top left there is a star."])
def test_places_with_another_preposition(text):
    (mention,) = Objects().scenes_reader.mentions(text)
    assert mention.said == {"place": "top left"}


def test_another_pictures_facts_change_the_number():
    one, other = world.scene("test_fair", 0), world.scene("test_adversarial", 0)
    assert one.shapes != other.shapes
    text = language.caption(one)
    own, swapped = (scores(text, language.facts(picture), objects={}) for picture in (one, other))
    assert own["invented"] == 0
    assert swapped["invented"] + swapped["wrong"] < 0


def test_real_pictures_without_names_are_refused():
    with pytest.raises(ValueError, match=r"response row: .*no names of objects are set.*Set `synonyms`"):
        scores("A cat.", objects={})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objects": NAMES, "synonyms": "a.txt"}, "both `synonyms` and `objects`"),
        ({"places": ["nearby"]}, "'nearby' has no 'the'"),
        ({"object": NAMES}, "did you mean 'objects'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        read_rewards([{"name": "objects", **settings}])


@pytest.mark.parametrize("thing", [3, {"colour": "red"}, {"name": None}])
def test_facts_that_name_no_object(thing):
    with pytest.raises(ValueError, match=r"response row: facts.objects holds .* which names no object"):
        scores("A cat.", {"objects": [thing]})


def test_reads_random_captions_as_chair_does(tmp_path):
    file = tmp_path / "synonyms.txt"
    file.write_text(SYNONYMS)
    words = chair.vocabulary(chair.read_synonyms(file))
    reader = Reader(words, {}, [])
    names = [*words.nodes, *words.merges]
    others = [
        "a",
        "the",
        "two",
        "of",
        "wooden",
        "table's",
        "with",
        ",",
        ";",
        "-",
        "blue",
        "dogs",
        "men",
        "buses",
        "knives",
        "no",
    ]
    draw = random.Random(0)

    def drawn():
        word = draw.choice(names if draw.random() < 0.6 else others)
        return word + "s" if draw.random() < 0.2 else word.replace(" ", "-") if draw.random() < 0.1 else word

    for _ in range(2000):
        text = " ".join(drawn() for _ in range(draw.randint(1, 6)))
        assert [mention.kind for mention in reader.mentions(text)] == chair.mentions(text, words), text


@pytest.mark.parametrize(
    ("text", "denied"),
    [
        ("There are no dogs or cats.", [True, True]),
        ("No cat, dog or car is here.", [True, True, True]),
        ("There is no dog, a cat sits there.", [True, False]),
        ("I do not see a dog or a cat.", [True, True]),
        ("I can't see a dog or a cat.", [True, True]),
        ("Neither a dog nor a cat is visible.", [True, True]),
        ("A cat is not visible in the picture.", [True]),
        ("A dog and a cat are not visible.", [True, True]),
        ("There is a dog and cats are not visible.", [False, True]),
        ("The cat is absent.", [True]),
        ("There is not a single cat.", [True]),
        ("The cat is missing a leg.", [False]),
        ("The dog is not brown.", [False]),
        ("A dog, but no cat or car.", [False, True, True]),
        ("No dogs and a cat.", [True, False]),
        ("Either a dog or a cat.", [False, False]),
    ],
)
def test_denials_reach_over_lists_and_from_behind(text, denied):
    assert [mention.denied for mention in Objects(objects=NAMES).reader.mentions(text)] == denied
    assert scores(text, {"objects": ["person"]})["invented"] == -denied.count(False)


def test_denials_in_scenes():
    assert [mention.denied for mention in Objects().scenes_reader.mentions("There are no stars or circles.")] == [
        True
    ] * 2


def test_objects_that_are_no_list():
    with pytest.raises(ValueError, match=r"response row: facts.objects is '5', which names no object. Write a list"):
        scores("A cat.", {"objects": 5})

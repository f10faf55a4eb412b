"""How rule sets read answers: what a denial reaches, and how many things a text lists."""

import pytest

from prefalign.rewards.rule_sets import RULE_SETS


@pytest.mark.parametrize(
    ("variable", "text", "category"),
    [
        ("diagnosis", "AML is not present.", None),
        ("diagnosis", "AML isn't present.", None),
        ("diagnosis", "AML and multiple myeloma are not present.", None),
        ("diagnosis", "No evidence of acute myeloid leukemia or multiple myeloma.", None),
        ("diagnosis", "Multiple myeloma is unlikely.", None),
        ("diagnosis", "AML can be ruled out.", None),
        ("diagnosis", "AML: not present.", None),
        ("diagnosis", "AML is out of the question.", None),
        ("diagnosis", "The findings are inconsistent with AML.", None),
        ("diagnosis", "The picture excludes AML.", None),
        ("diagnosis", "AML cannot be ruled out.", None),
        ("diagnosis", "There is no evidence that this is AML.", None),
        ("diagnosis", "There is no doubt that this is AML.", "AML"),
        ("diagnosis", "It is AML and plasma cells are absent.", "AML"),
        ("diagnosis", "AML is highly unlikely, this is multiple myeloma.", "MM"),
        ("cells", "There is no sign of an increase in plasma cells.", None),
        ("cells", "There are no plasma cells and myeloblasts.", None),
        ("cells", "There are no plasma cells, and myeloblasts are increased.", "myeloblasts"),
        ("analysis", "It is free of red blood cells and of any clots.", None),
        ("analysis", "The region is optimal because clots are not there.", "adequate"),
        ("abnormality", "Cancer is absent.", "normal"),
        ("quality", "The image quality is not good.", "bad"),
        ("quality", "The image isn't blurred, so it is suitable.", "good"),
        ("quality", "The image isn't blurred at all so it is suitable.", "good"),
    ],
)
def test_a_denial_is_no_affirmation(variable, text, category):
    assert RULE_SETS["bone_marrow"].parse(variable, text, {}) == category


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A dog, a cat and a bird are visible.", "3"),
        ("A dog and a cat are in the picture.", "2"),
        ("In the picture there are a dog, a cat, and a cow.", "3"),
        ("The objects in the image are a dog and a cat.", "2"),
        ("The picture shows three things: a dog, a cat and a bird.", "3"),
        ("A black and white cat.", "1"),
        ("A black, red and white flag and a cat.", "2"),
    ],
)
def test_things_are_counted_on_either_side_of_the_verb(text, number):
    assert RULE_SETS["count_list"].parse("list", text, {}) == number

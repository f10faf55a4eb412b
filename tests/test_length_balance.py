"""Length balance: worked by hand, against a slow loop over the pairs, and where it cannot balance."""

import random

import pytest

from prefalign.length_balance import STEPS, Cut, Lengths, step

SHORT = [(8, 10), (10, 10), (5, 10), (12, 10)]


def lengths(pairs):
    found = Lengths()
    for chosen, rejected in pairs:
        found.add(chosen, rejected)
    return found


def kept(pairs, cut):
    return [pair for pair in pairs if cut.keeps(*pair)]


def test_worked_by_hand():
    """r 0 keeps (10, 10) and (12, 10): means 11 and 10, gap 0.1. r 0.2 adds (8, 10): 10 and 10, gap 0. r 0.5 adds (5, 10)."""
    cut = lengths(SHORT).cut("published")
    assert (cut.side, cut.step) == ("chosen", 24)  # the largest r below 0.5
    assert kept(SHORT, cut) == [(8, 10), (10, 10), (12, 10)]
    assert lengths(SHORT).summary(cut) == {
        "short_side": "chosen", "share": 0.48,
        "before": {"pairs": 4, "chosen_words": 8.75, "rejected_words": 10.0},
        "after": {"pairs": 3, "chosen_words": 10.0, "rejected_words": 10.0},
    }  # fmt: skip
    assert lengths(SHORT).cut("both") == cut


def test_steps_are_exact_at_their_borders():
    """0.02 and 0.06 of 50 words are kept by r 0.02 and 0.06, whatever binary fractions make of them."""
    assert [step(short, 50) for short in (50, 49, 47, 1, 0)] == [0, 1, 3, 49, 50]
    assert step(9, 10) == 5
    assert step(29, 30) == 2  # 0.033
    assert (step(0, 0), step(3, 0)) == (0, 0)


def test_longer_chosen_answers_are_balanced_from_the_other_side():
    pairs = [(rejected, chosen) for chosen, rejected in SHORT]
    published = lengths(pairs).cut("published")
    assert kept(pairs, published) == pairs  # it can only drop pairs whose chosen answer is shorter
    both = lengths(pairs).cut("both")
    assert both.side == "rejected"
    left = kept(pairs, both)
    assert (10, 5) not in left
    assert abs(sum(c for c, _ in left) - sum(r for _, r in left)) < abs(
        sum(c for c, _ in pairs) - sum(r for _, r in pairs)
    )


def test_off_nothing_and_an_empty_remainder_keep_all():
    assert lengths(SHORT).cut("off") == Cut()
    assert lengths([]).cut() == Cut()
    assert lengths([]).summary(Cut())["after"] == {"pairs": 0, "chosen_words": 0.0, "rejected_words": 0.0}
    silent = [(0, 10), (0, 4)]
    assert lengths(silent).cut("published") == Cut()
    assert kept(silent, Cut()) == silent
    assert lengths([(1, 100)]).cut().side is None  # r 0.98 is the largest, and 0.99 is missing
    assert lengths([(2, 100)]).cut() == Cut("chosen", 49)


def test_a_cut_that_keeps_too_few_pairs_is_not_made_and_is_told_of(caplog):
    """One pair in twenty is even (r 0), ten are 0.2 short and nine 0.5: r 0 is best, 0.2 the best that keeps half of them."""
    pairs = [(10, 10)] + [(8, 10)] * 10 + [(5, 10)] * 9
    found = lengths(pairs)
    assert len(kept(pairs, found.cut())) == len(kept(pairs, found.cut(least_kept=0.05))) == 1
    assert len(kept(pairs, found.cut(least_kept=0.051))) == len(kept(pairs, found.cut(least_kept=0.55))) == 11
    assert len(kept(pairs, found.cut(least_kept=0.56))) == len(kept(pairs, found.cut(least_kept=1))) == 20
    cut, figures = found.balanced("both", 0.1)
    assert cut == found.cut(least_kept=0.1)
    assert figures["after"] == {"pairs": 11, "chosen_words": 8.182, "rejected_words": 10.0}
    assert figures["too_few"] == {"pairs": 1, "chosen_words": 10.0, "rejected_words": 10.0}
    (told,) = (record.getMessage() for record in caplog.records)
    assert "keeps 1 of 20 pairs, a smaller share than the least, 0.1. 11 are kept, with 8.182 words" in told
    caplog.clear()
    cut, figures = found.balanced("both", 0.05)
    assert (cut, "too_few" in figures, caplog.records) == (found.cut(), False, [])


def test_where_every_cut_keeps_too_few_all_stay():
    silent = [(0, 10)] * 9 + [(10, 10)]
    assert lengths(silent).cut().side == "chosen"
    assert lengths(silent).balanced(least_kept=0.2)[0] == Cut()


@pytest.mark.parametrize("seed", range(4))
def test_sums_give_what_a_loop_over_the_pairs_gives(seed):
    rng = random.Random(seed)
    pairs = [(rng.randint(1, 60), rng.randint(1, 90)) for _ in range(200)]
    cut = lengths(pairs).cut("published")

    def gap(number):
        left = [(c, r) for c, r in pairs if (r - c) * STEPS <= number * r]
        return abs(sum(c for c, _ in left) / sum(r for _, r in left) - 1) if left else float("inf")

    best = min(range(STEPS), key=lambda number: (gap(number), -number))
    assert cut.step == best
    left = kept(pairs, cut)
    assert lengths(pairs).summary(cut)["after"]["pairs"] == len(left)
    assert gap(best) < gap(STEPS - 1)

"""What is remembered of every row: ids met, ids that repeat, whose a picture is, and what memory that takes."""

import random
import tracemalloc

from prefalign.seen import Distinct, Owners, RepeatedIds, SeenIds


def test_seen_ids_tell_new_from_known_from_changed():
    """A full table of 500 ids: each is found with its content, with no other, and no other id is found."""
    seen = SeenIds(500)
    assert [seen.holds(f"row{number}", "a") for number in range(500)] == [None] * 500
    for number in range(500):
        seen.add(f"row{number}", f"content {number}")
    assert all(seen.holds(f"row{number}", f"content {number}") is True for number in range(500))
    assert all(seen.holds(f"row{number}", "content") is False for number in range(500))
    assert all(seen.holds(f"other{number}", "content 1") is None for number in range(500))


def test_repeated_ids():
    """Of 2,000 ids those of the even numbers come twice or three times, in any order; half a surrogate pair is an id too."""
    ids = [f"row{number}" for number in range(2000) for _ in range(1 + (number % 2 == 0) * (1 + number % 4 // 2))]
    random.Random(0).shuffle(ids)
    repeated = RepeatedIds([*ids, "\ud83d", "\ud83d"])
    assert len(repeated) == 1001
    assert [number for number in range(2000) if f"row{number}" in repeated] == list(range(0, 2000, 2))
    assert "\ud83d" in repeated
    assert "row2000" not in repeated
    assert len(RepeatedIds([])) == len(RepeatedIds(["1"])) == 0
    assert "1" not in RepeatedIds(["1"])


def test_different_things_are_counted_however_often_and_whenever_they_come():
    counted, things = Distinct(), [f"picture{number % 7000}" for number in range(30_000)]
    assert len(counted) == 0
    random.Random(0).shuffle(things)
    for place, thing in enumerate(things):
        counted.add(thing)
        if place in (0, 10, 9_999):
            assert len(counted) == len(set(things[: place + 1]))
    assert len(counted) == 7000


def test_one_row_owns_what_several_have_whatever_their_order():
    rows = [(f"picture{number % 300}", f"row{number}") for number in range(900)]
    owners = Owners(rows)
    assert len(owners) == 300
    held = {name for thing, name in rows if owners.owns(name, thing)}
    assert {int(name[3:]) % 300 for name in held} == set(range(300))
    assert len(held) == 300
    random.Random(0).shuffle(rows)
    again = Owners(rows)
    assert {name for thing, name in rows if again.owns(name, thing)} == held
    assert not owners.owns("row0", "picture1")
    assert not owners.owns("row0", "another")
    assert not Owners([]).owns("row0", "picture0")


def test_memory_a_row():
    """200,000 rows of pictures of their own: bytes that stay, and the most while they are made, as the docstrings say."""
    rows = 200_000
    RepeatedIds(["a"]), Owners([("a", "b")])
    found = {}
    for kind, make in {
        "seen": lambda: SeenIds(rows),
        "repeated": lambda: RepeatedIds(str(number) for number in range(rows)),
        "owners": lambda: Owners((f"p{number}", str(number)) for number in range(rows)),
    }.items():
        tracemalloc.start()
        kept = make()
        found[kind] = [round(size / rows) for size in tracemalloc.get_traced_memory()]
        tracemalloc.stop()
        del kept
    assert found["seen"][0] == 32
    assert found["repeated"][0] == 0
    assert found["repeated"][1] <= 24
    assert found["owners"][0] == 16
    assert found["owners"][1] <= 64


def test_memory_a_different_thing():
    """Whenever it is looked at, 8 to 16 bytes for each of 20,000 things that come three times, and 64 at most."""
    kept = Distinct()
    kept.add("")
    assert len(kept) == 1
    tracemalloc.start()
    for number in range(60_000):
        kept.add(str(number % 20_000))
    stays, most = (size / 20_000 for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert 8 <= stays <= 17  # of a list as it grows an eighth is empty
    assert most <= 66

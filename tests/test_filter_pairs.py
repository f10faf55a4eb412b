"""The filters decided by hand, and the stage: counts that add up, resume, order, and a model whose picture matters."""

import json
import shutil

import pytest
from PIL import Image
from test_duplicates import photo

from prefalign import bundled, config, sources
from prefalign.filtering import (
    DuplicateFilter,
    EvidenceFilter,
    Filters,
    LengthFilter,
    MarginFilter,
    Measured,
    RelianceFilter,
    TextFilter,
    decide,
    decide_unscored,
    unbalanced,
)
from prefalign.records import Pair, message_text
from prefalign.sources import files
from prefalign.store import StoreError, read_records
from tests.tiny_vlms import picture


@pytest.fixture(scope="module")
def stage():
    return bundled.load_stage("filter_pairs")


def reasons(rows, filters, scored=True):
    before = decide_unscored(rows, filters)
    return decide(rows, filters, before) if scored else before


def test_every_filter_in_its_order_by_hand():
    """One row fails all filters of its own; taking the first away names the next reason."""
    bad = {"similarity": 0.99, "ratio": 9.0, "margin": 0.1, "benchmark": True, "text_preference": 1.0, "evidence": -1.0,
           "claims": 0.4}  # fmt: skip
    filters = Filters(TextFilter(0.9), LengthFilter(max_ratio=3), MarginFilter(0.5), None, None, RelianceFilter(),
                      EvidenceFilter(), config.build(Filters, {"claims": {}}).claims)  # fmt: skip
    fixes = [("near_identical", {"similarity": 0.9}), ("length_ratio", {"ratio": 3.0}), ("low_margin", {"margin": 0.5}),
             ("benchmark_picture", {"benchmark": False}), ("text_only", {"text_preference": 0.0}),
             ("weak_evidence", {"evidence": 0.0}), ("claims_not_worse", {"claims": 0.5})]  # fmt: skip
    for reason, fix in fixes:
        assert reasons([Measured("a", **bad)], filters) == [reason]
        bad |= fix
    assert reasons([Measured("a", **bad)], filters) == [None]
    assert reasons([Measured("a", **{**bad, "margin": None})], filters) == ["no_margin"]
    filters.margin = MarginFilter(0.5, missing="keep")
    assert reasons([Measured("a", **{**bad, "margin": None})], filters) == [None]
    assert reasons([Measured("a", **{**bad, "evidence": -1.0})], filters, scored=False) == [None]
    assert reasons([Measured("a", ("huge_image", "..."), similarity=1.0)], filters) == ["huge_image"]
    assert reasons([Measured("a", similarity=None)], Filters(texts=TextFilter(0.0))) == [None]


def shown(name, digest, hash_, text="t", others=(), **more):
    return Measured(name, text=text, pictures=[(digest, hash_), *others], images=1, **more)


def test_duplicate_pairs_and_picture_limit_by_hand():
    """Hashes 0, 1 (one bit away) and 255 (eight bits): the first two are one picture at distance 4.

    b says the same on the same picture as a: a duplicate. c asks something else about it. d is another picture. e is the third
    kept pair of the first picture, one too many at two. f differs from a in its other picture only.
    """
    rows = [shown("a", "p0", 0), shown("b", "p1", 1), shown("c", "p1", 1, "u"), shown("d", "p2", 255),
            shown("e", "p0", 0, "v"), shown("f", "p2", 255, others=[("q", 255 << 20)])]  # fmt: skip
    assert reasons(rows, Filters(duplicates=DuplicateFilter(4))) == [None, "duplicate_pair", None, None, None, None]
    assert reasons(rows, Filters(duplicates=DuplicateFilter(4, per_picture=2))) == [
        None, "duplicate_pair", None, None, "picture_limit", None]  # fmt: skip
    assert reasons(rows, Filters(duplicates=DuplicateFilter(0))) == [None] * 6
    assert reasons(rows, Filters(duplicates=DuplicateFilter(-1, per_picture=1))) == [
        None, None, "picture_limit", None, "picture_limit", "picture_limit"]  # fmt: skip


def test_pairs_without_pictures_are_not_pairs_of_one_picture():
    """Three questions without a picture share none; the third pair of picture p is one too many."""
    rows = [Measured(f"text{number}", text=str(number)) for number in range(3)]
    rows += [shown(f"p{number}", "p", 0, f"u{number}") for number in range(3)]
    assert reasons(rows, Filters(duplicates=DuplicateFilter(-1, per_picture=2))) == [None] * 5 + ["picture_limit"]


def test_a_duplicate_of_a_pair_without_score_is_not_kept_unscored():
    """b repeats a, so only a is put to the verifier. It cannot be scored, and b has no number to be judged by."""
    rows = [shown("a", "p", 0), shown("b", "p", 0), shown("c", "p", 0, "u", evidence=2.0)]
    filters = Filters(duplicates=DuplicateFilter(-1), evidence=EvidenceFilter(1.0))
    before = decide_unscored(rows, filters)
    assert before == [None, "duplicate_pair", None]
    rows[0].verdict = ("not_scored", "...")
    assert decide(rows, filters, before) == ["not_scored", "duplicate_pair", None]


@pytest.mark.parametrize("name", ["reliance", "evidence", "claims"])
def test_no_pair_passes_the_verifier_without_its_number(name):
    filters = config.build(Filters, {name: {}})
    with pytest.raises(AssertionError, match="pair a reached .* without a (score|count)"):
        decide([Measured("a", similarity=0.1)], filters, [None])


def test_a_pair_that_goes_for_another_reason_takes_no_place():
    """a has too low a margin: its duplicate b is kept, and a picture's place is not used up by it."""
    rows = [shown("a", "p", 0, margin=0.0), shown("b", "p", 0, margin=1.0), shown("c", "p", 0, "u", margin=1.0)]
    filters = Filters(margin=MarginFilter(0.5), duplicates=DuplicateFilter(0, per_picture=1))
    assert reasons(rows, filters) == ["low_margin", None, "picture_limit"]


@pytest.mark.parametrize(
    ("differences", "rule", "tolerance", "dropped"),
    [
        ([5, 1, -1, 3], "mean", 0.0, [0, 3]),  # sum 8; without 5: 3; without 3: 0
        ([5, 1, -1, 3], "mean", 1.0, [0]),  # mean 2; without 5: 3 / 3 = 1
        ([5, 1, -1, 3], "mean", 2.0, []),
        ([-5, -1, 1, -3], "mean", 0.0, [0, 3]),  # the other side
        ([2, 2, 2, -2], "mean", 0.0, [1, 2]),  # the last of equal ones first
        ([9, -1, -1, -1], "mean", 0.0, [0]),  # 6 -> -3: one side only is dropped from
        ([9, -1, -1, -1], "median", 0.0, [2, 3]),  # three are shorter, one longer
        ([4, 3, 2, 0, -9], "median", 0.0, [0, 1]),
        ([0, 0], "median", 0.0, []),
        ([], "mean", 0.0, []),
    ],
)
def test_length_balance_by_hand(differences, rule, tolerance, dropped):
    assert unbalanced(differences, LengthFilter(balance=rule, tolerance=tolerance)) == dropped


def test_balance_counts_only_what_the_other_filters_left():
    rows = [Measured("a", difference=50, ratio=9.0), Measured("b", difference=2), Measured("c", difference=-2)]
    filters = Filters(length=LengthFilter(max_ratio=3, balance="mean", tolerance=0))
    assert reasons(rows, filters) == ["length_ratio", None, None]


def write_pairs(folder, *, shift=0):
    """Nine rows: two good ones, and one for each model-free reason."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        photo(number + shift).save(folder / f"{number}.png")
    photo(shift).resize((48, 32)).save(folder / "0-small.png")
    photo(3 + shift).save(folder / "COCO_val2014_000000000007.png")
    rows = [
        {"image": "0.png", "chosen": "A red star on a table.", "rejected": "A blue ring on a chair."},
        {"image": "0-small.png", "chosen": "A red star on a table.", "rejected": "A blue ring on a chair."},
        {"image": "1.png", "chosen": "A cat sits on the mat.", "rejected": "A cat sits on the mats."},
        {"image": "1.png", "chosen": "One two three four five six seven.", "rejected": "Eight."},
        {"image": "1.png", "chosen": "A dog runs.", "rejected": "No star here.", "margin": 0.1},
        {"image": "COCO_val2014_000000000007.png", "chosen": "A house.", "rejected": "Blue sky."},
        {"image": "2.png", "chosen": "A big green tree.", "rejected": "One small lake."},
        {"image": "2.png", "chosen": "It is very late now.", "rejected": "Nobody is there at all."},
        {"image": "gone.png", "chosen": "A house.", "rejected": "A sky."},
    ]
    for number, row in enumerate(rows):
        row |= {"id": f"row{number}", "question": "What is it?", "margin": row.get("margin", 1.0)}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pope.jsonl").write_text(json.dumps({"image": "COCO_val2014_000000000007.jpg", "question_id": 1}) + "\n")
    return folder


FREE = {"texts": {"max_similarity": 0.95}, "length": {"max_ratio": 3.0}, "margin": {"floor": 0.5},
        "duplicates": {"max_distance": 4, "per_picture": 1}}  # fmt: skip


def run(stage, rows, output, filters, *, block_size=2, data=None, **more):
    values = {"data": {"path": rows / "rows.jsonl", **(data or {})}, "output": {"path": output, "block_size": block_size},
              "filters": filters, **more}  # fmt: skip
    manifest = stage.main(config.build(stage.Config, values))
    return manifest, {pair.id: pair for pair in read_records(output, Pair)}


def gated(rows, **more):
    return {**FREE, "contamination": {"lists": [rows / "pope.jsonl"], **more}}


EXPECTED = {"benchmark_picture": 1, "duplicate_pair": 1, "length_ratio": 1, "low_margin": 1, "missing_image": 1,
            "near_identical": 1, "picture_limit": 1}  # fmt: skip


def test_every_reason_is_counted_and_pairs_stay_as_they_are(stage, tmp_path):
    rows = write_pairs(tmp_path / "rows")
    manifest, pairs = run(stage, rows, tmp_path / "out", gated(rows))
    assert manifest.dropped == EXPECTED
    assert manifest.rows_in == 9 == manifest.rows_used + sum(manifest.dropped.values())
    assert manifest.models == {}
    assert list(pairs) == ["row0", "row6"]
    given = json.loads((rows / "rows.jsonl").read_text().splitlines()[6])
    kept = pairs["row6"]
    assert (message_text(kept.chosen), message_text(kept.rejected)) == (given["chosen"], given["rejected"])
    assert kept.images[0]["bytes"] == (rows / "2.png").read_bytes()
    assert set(kept.meta) == {"filters", "layout"}
    assert kept.meta["filters"]["length_difference"] == 1
    assert 0 < kept.meta["filters"]["similarity"] < 0.95
    found = json.loads((tmp_path / "out" / "filters.json").read_text())
    assert (found["pairs"], found["kept"]) == (8, 2)
    assert found["dropped"] == {reason: count for reason, count in EXPECTED.items() if reason != "missing_image"}


def test_pairs_of_a_stage_keep_id_and_values(stage, tmp_path):
    rows = write_pairs(tmp_path / "rows")
    run(stage, rows, tmp_path / "once", {})
    before = {pair.id: pair for pair in read_records(tmp_path / "once", Pair)}
    values = {
        "data": {"path": tmp_path / "once"},
        "output": {"path": tmp_path / "twice"},
        "filters": {"length": {"max_ratio": 3}},
    }
    stage.main(config.build(stage.Config, values))
    after = {pair.id: pair for pair in read_records(tmp_path / "twice", Pair)}
    assert set(before) - set(after) == {"row3"}
    assert all(pair == before[name] for name, pair in after.items())


def test_no_filter_keeps_every_readable_pair(stage, tmp_path):
    manifest, pairs = run(stage, write_pairs(tmp_path / "rows"), tmp_path / "out", {})
    assert manifest.dropped == {"missing_image": 1}
    assert len(pairs) == 8


def test_rows_do_not_depend_on_blocks_and_a_killed_run_ends_with_the_same(stage, tmp_path, monkeypatch):
    rows = write_pairs(tmp_path / "rows")
    manifest, pairs = run(stage, rows, tmp_path / "straight", gated(rows))
    _, whole = run(stage, rows, tmp_path / "one block", gated(rows), block_size=64)
    assert whole == pairs
    folder = tmp_path / "killed"
    shutil.copytree(tmp_path / "straight", folder)
    (folder / "manifest.json").unlink()
    for name in ("progress/00003.json", "data/train-00003.parquet", "survey/rows-00002.json", "filters.json"):
        (folder / name).unlink()
    again, resumed = run(stage, rows, folder, gated(rows))
    assert (again, resumed) == (manifest, pairs)
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert files == sorted(
        f.relative_to(tmp_path / "straight") for f in (tmp_path / "straight").rglob("*") if f.is_file()
    )
    assert all((folder / file).read_bytes() == (tmp_path / "straight" / file).read_bytes() for file in files)


def test_measures_of_another_config_are_not_taken(stage, tmp_path):
    """A run that stopped before its first block leaves a survey; with another config in the same folder it is made anew."""
    rows = write_pairs(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"1 of 8 pairs show a benchmark picture \(first: row5\)"):
        run(stage, rows, tmp_path / "out", gated(rows, on_overlap="stop"))
    assert (tmp_path / "out" / "survey" / "rows-00000.json").is_file()
    manifest, _ = run(stage, rows, tmp_path / "out", {"length": {"max_ratio": 3.0, "unit": "characters"}})
    assert manifest.dropped == {"length_ratio": 1, "missing_image": 1}


def test_another_list_or_filter_refuses_the_folder(stage, tmp_path):
    rows = write_pairs(tmp_path / "rows")
    run(stage, rows, tmp_path / "out", gated(rows))
    (rows / "pope.jsonl").write_text(json.dumps({"image": "COCO_val2014_000000000008.jpg"}) + "\n")
    for filters in (gated(rows), FREE, {}):
        with pytest.raises(StoreError, match="another config"):
            run(stage, rows, tmp_path / "out", filters)


def test_the_gate_sees_names_contents_and_the_other_picture(stage, tmp_path):
    rows = write_pairs(tmp_path / "rows")
    (tmp_path / "mmhal").mkdir()
    photo(2).resize((90, 60)).save(tmp_path / "mmhal" / "renamed.jpg", quality=70)
    gate = {"contamination": {"lists": [tmp_path / "mmhal"]}}
    manifest, pairs = run(stage, rows, tmp_path / "out", gate)
    assert manifest.dropped == {"benchmark_picture": 2, "missing_image": 1}
    assert not {"row6", "row7"} & set(pairs)
    lines = [json.loads(line) for line in (rows / "rows.jsonl").read_text().splitlines()]
    lines[0]["rejected_images"] = ["2.png"]
    (rows / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest, pairs = run(stage, rows, tmp_path / "second", gate)
    assert "row0" not in pairs
    exact = {"contamination": {"lists": [tmp_path / "mmhal"], "max_distance": -1}}
    assert run(stage, rows, tmp_path / "third", exact)[0].dropped == {"missing_image": 1}


def test_a_picture_that_cannot_be_decoded_goes_to_quarantine(stage, tmp_path):
    rows = write_pairs(tmp_path / "rows")
    (rows / "2.png").write_bytes((rows / "2.png").read_bytes()[:200])
    manifest, _ = run(stage, rows, tmp_path / "out", {"duplicates": {}})
    assert manifest.dropped["truncated_image"] == 2
    assert manifest.quarantined == 3
    assert run(stage, rows, tmp_path / "bytes", {"duplicates": {"max_distance": -1}})[0].quarantined == 1


def test_a_filter_that_needs_a_model_says_so(stage, tmp_path):
    rows = write_pairs(tmp_path / "rows")
    for name in ("reliance", "evidence", "claims"):
        with pytest.raises(
            ValueError, match=r"filters\.claims score pairs with a model, and no model is named. Set model"
        ):
            run(stage, rows, tmp_path / "out", {name: {}})


def scored(stage, checkpoint, rows, output, filters, **more):
    return run(stage, rows, output, filters, model={"model_name_or_path": str(checkpoint), "device": "cpu"}, **more)


ALL = {"reliance": {"ceiling": 1e9}, "evidence": {"floor": -1e9, "prior_weight": 1.0}, "claims": {"floor": -99}}


@pytest.fixture(scope="module")
def measured(stage, tiny_llava, tmp_path_factory):
    folder = tmp_path_factory.mktemp("filters")
    rows = write_pairs(folder / "rows")
    manifest, pairs = scored(stage, tiny_llava, rows, folder / "out", ALL, without="hidden")
    return rows, manifest, {name: pair.meta["filters"] for name, pair in pairs.items()}


def test_thresholds_on_a_models_scores(stage, tiny_llava, measured, tmp_path):
    """Each threshold put between two measured values cuts exactly there."""
    rows, manifest, values = measured
    assert manifest.models["verifier"]
    assert len(values) == 8
    for section, key, bound, sign in (
        ("reliance", "text_preference", "ceiling", -1),
        ("evidence", "evidence_margin", "floor", 1),
    ):
        ordered = sorted(values.values(), key=lambda known: known[key])
        cut = (ordered[3][key] + ordered[4][key]) / 2
        reason = {"reliance": "text_only", "evidence": "weak_evidence"}[section]
        found, pairs = scored(stage, tiny_llava, rows, tmp_path / section, {section: {**ALL[section], bound: cut}},
                              without="hidden")  # fmt: skip
        assert found.dropped == {"missing_image": 1, reason: 4}
        assert set(pairs) == {name for name, known in values.items() if sign * (known[key] - cut) > 0}


def test_batches_and_resume_change_no_row(stage, tiny_llava, measured, tmp_path):
    rows, _, values = measured
    _, pairs = scored(stage, tiny_llava, rows, tmp_path / "out", ALL, without="hidden", batch_size=1)
    for name, pair in pairs.items():
        assert pair.meta["filters"] == pytest.approx(values[name], abs=2e-4)
    for name in ("manifest.json", "progress/00002.json", "survey/scores-00001.json"):
        (tmp_path / "out" / name).unlink()
    _, again = scored(stage, tiny_llava, rows, tmp_path / "out", ALL, without="hidden", batch_size=1)
    assert again == pairs


def test_another_picture_changes_the_evidence_and_not_the_text_preference(stage, tiny_llava, measured, tmp_path):
    rows = write_pairs(tmp_path / "rows", shift=20)
    _, pairs = scored(stage, tiny_llava, rows, tmp_path / "out", ALL, without="hidden")
    for name, known in measured[2].items():
        now = pairs[name].meta["filters"]
        assert now["text_preference"] == pytest.approx(known["text_preference"], abs=2e-4)
        assert abs(now["evidence_margin"] - known["evidence_margin"]) > 1e-3


def test_pairs_that_no_model_can_score(stage, tiny_llava, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    rows = [{"id": "mark", "image": "a.png", "question": "What?", "chosen": "A dog.", "rejected": "An <image> of a cat."},
            {"id": "text", "question": "What?", "chosen": "A dog.", "rejected": "A cat."},
            {"id": "good", "image": "a.png", "question": "What?", "chosen": "A dog.", "rejected": "A cat."}]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest, pairs = scored(stage, tiny_llava, folder, tmp_path / "out", {"evidence": {"floor": -1e9}}, block_size=64)
    assert manifest.dropped == {"no_picture": 1, "not_scored": 1}
    assert manifest.quarantined == 1
    assert set(pairs) == {"good"}
    assert "cannot be put to the verifier" in next((tmp_path / "out" / "quarantine").iterdir()).read_text()


def test_a_floor_that_nothing_reaches_keeps_nothing(stage, tiny_llava, tmp_path):
    """Pairs that cannot be scored come twice: an image mark, no picture, a truncated picture. No second one slips through."""
    folder = tmp_path / "rows"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    picture(1).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-40])
    kinds = [{"image": "a.png", "rejected": "An <image> of a cat."}, {"rejected": "A cat."},
             {"image": "cut.png", "rejected": "A cat."}]  # fmt: skip
    rows = [{"id": f"{place}{number}", "question": "What?", "chosen": "A dog.", **kind}
            for number in range(2) for place, kind in enumerate(kinds)]  # fmt: skip
    rows.append({"id": "weak", "image": "a.png", "question": "What?", "chosen": "A dog.", "rejected": "A cat."})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filters = {"evidence": {"floor": 1e6}, "duplicates": {"max_distance": -1}}
    with pytest.raises(StoreError, match="made no row out of 7: 3 duplicate_pair, "):
        scored(stage, tiny_llava, folder, tmp_path / "out", filters)
    found = json.loads((tmp_path / "out" / "filters.json").read_text())
    assert found["dropped"] == {"duplicate_pair": 3, "no_picture": 1, "not_scored": 1, "truncated_image": 1,
                                "weak_evidence": 1}  # fmt: skip


@pytest.mark.parametrize(("filters", "passes"), [(FREE, 2), (ALL, 3)])
def test_the_data_is_read_as_often_as_the_page_says(stage, tiny_llava, tmp_path, monkeypatch, filters, passes):
    """Rows: measured, scored if a model is asked, written. Ids: by the store and by the stage. Hashed once."""
    rows = write_pairs(tmp_path / "rows")
    reads, ids, block, fingerprint = [], sources.read_rows, sources.RowReader.read, sources.fingerprint

    def counted(data, columns=None):
        reads.append("rows" if columns is None else "ids")
        return ids(data, columns)

    def from_the_start(reader, first, count):
        if first == 0:
            reads.append("rows")
        return block(reader, first, count)

    def hashed(data):
        reads.append("hash")
        return fingerprint(data)

    for module in (sources, files):  # a survey reads in the module where it stands
        monkeypatch.setattr(module, "read_rows", counted)
    monkeypatch.setattr(sources.RowReader, "read", from_the_start)
    monkeypatch.setattr(sources, "fingerprint", hashed)
    scored(stage, tiny_llava, rows, tmp_path / "out", filters)
    assert {kind: reads.count(kind) for kind in reads} == {"rows": passes, "ids": 2, "hash": 1}


def test_pairs_of_pictures_with_one_text_are_judged_by_their_pictures(stage, tiny_llava, tmp_path):
    """The same row with its two pictures swapped has the opposite evidence, so one of the two goes at a floor of 0."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (40, 48), "red" if number else "blue").save(folder / f"{number}.png")
    rows = [{"id": f"r{n}", "image": f"{n}.png", "rejected_images": [f"{1 - n}.png"], "question": "What?", "chosen": "A dog.",
             "rejected": "A dog."} for n in range(2)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    filters = {"texts": {"max_similarity": 0.5}, "reliance": {"ceiling": -1e9}}
    _, pairs = scored(stage, tiny_llava, folder, tmp_path / "all", {**filters, "evidence": {"floor": -1e9}})
    margins = [pairs[f"r{n}"].meta["filters"]["evidence_margin"] for n in range(2)]
    assert margins[0] == pytest.approx(-margins[1], abs=1e-3) != 0
    assert pairs["r0"].meta["filters"]["similarity"] is None
    manifest, kept = scored(stage, tiny_llava, folder, tmp_path / "half", {**filters, "evidence": {"floor": 0.0}})
    assert manifest.dropped == {"weak_evidence": 1}
    assert set(kept) == {f"r{int(margins[1] > margins[0])}"}


def test_configs(stage):
    published = config.load(stage.Config, bundled.find("datagen/filter_pairs"))
    assert (published.without, published.filters.evidence.prior_weight) == ("blank", 0.5)
    assert published.filters.reliance is None
    scenes = config.load(stage.Config, bundled.find("datagen/filter_pairs_scenes"))
    claims = scenes.filters.claims.of(
        "There is a large red circle at the top left. On the right there is a small blue star."
    )
    asked = [scenes.filters.claims.question.format_map(claim) for claim in claims]
    told = [scenes.filters.claims.supported.format_map(claim) for claim in claims]
    assert list(zip(asked, told, strict=True)) == [("What is at the top left?", "A large red circle."),
                                                   ("What is on the right?", "A small blue star.")]  # fmt: skip

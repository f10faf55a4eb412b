"""Are rejected answers worse by the truth? Every data stage on the embedded world, before and after a blind verifier.

    python benchmarks/pair_truth.py [--json FILE] [--stages bdhs,povid] [--rows 256] [--start 1024] [--keep FOLDER]

For stages whose negative is a text on the same picture (`TEXT_STAGES`) the scenes' facts decide: an answer with more false
mentions is worse; with equally many, the one that names fewer of the objects is; a tie is not worse. A mention is false if no
object has the shape, colour, size and place that it says; `objects_worse_share` counts as CHAIR does, by shapes alone.
`verified_` figures are of the pairs that `datagen/filter_pairs.py` keeps with its scenes config: it sees pictures and texts, and
never the facts; it is not asked about `UNVERIFIED`. For `image_contrast` and `s_vco` what defines them is checked. Rows begin
at 1024: the verifier's thresholds were chosen on pictures below. For `knowada` the model is also asked again, with other draws:
what was removed it should still not know, and of what the captions still say it should know more than before. For `mpa` a
rejected answer must not be the true one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefalign import bundled, config
from prefalign.images import open_image
from prefalign.records import Pair, message_text
from prefalign.scenes import language
from prefalign.scenes.language import Mention
from prefalign.scenes.twins import true_of
from prefalign.store import read_records
from prefalign.text import normalised

TEXT_STAGES = {"bdhs": "train_biased", "povid": "train_biased", "m3id": "train_fair", "stic": "train_fair",
               "re_align": "train_biased", "mia_dpo": "train_biased", "quality_pairs": "train_fair",
               "clinical_rules": "train_biased", "rlaif_v": "train_fair"}  # fmt: skip
IN_A_FOLDER = {"quality_pairs": "pairs"}  # of the stage's output
UNVERIFIED = ("clinical_rules", "rlaif_v")
"""The verifier reads captions, and the first are answers to questions; the second were told apart by a model that sees more than
the verifier, to which both sides, its own samples, are equally likely: of 111 pairs it kept none."""
MAKE_PAIRS = {"knowada": {"produce": "pairs"}, "mpa": {"produce": "pairs"}}
STAGES = (*TEXT_STAGES, "image_contrast", "s_vco", *MAKE_PAIRS)
GOAL = 0.95
Row = dict[str, Any]
Thing = Mapping[str, Any]


@dataclass(frozen=True)
class Told:
    """What an answer says of a picture: its false statements, and the objects (numbers) or shapes that it names truly."""

    false: int
    named: frozenset[Any]


def told(text: str, facts: Mapping[str, Any], *, shapes: bool = False) -> Told:
    """Compare a text with the truth.

    Args:
        text: the answer.
        facts: `scenes.language.facts` of the picture.
        shapes: look at shapes only, as CHAIR does: a mention is false if its shape is absent, and shapes are what is named.
    """
    things: Sequence[Thing] = facts["objects"]
    false = 0
    named: set[Any] = set()
    for sentence in language.sentences(text):
        wrong = 0
        for mention in language.parse(sentence):
            fitting = {number for number, thing in enumerate(things) if _fits(mention, thing, shapes=shapes)}
            wrong += bool(fitting) if mention.negated else not fitting
            if not mention.negated:
                named |= {things[number]["shape"] for number in fitting} if shapes else fitting
        if not wrong and not shapes and not true_of(sentence, facts):
            wrong = 1  # a wrong number of things that are there
        false += wrong
    return Told(false, frozenset(named))


def _fits(mention: Mention, thing: Thing, *, shapes: bool) -> bool:
    if shapes:
        return bool(mention.shape == thing["shape"])
    said = {"shape": mention.shape, "colour": mention.colour, "size": mention.size, "place": mention.place}
    return all(value in (None, thing[name]) for name, value in said.items())


def worse(chosen: str, rejected: str, facts: Mapping[str, Any], *, shapes: bool = False) -> bool:
    """Whether the rejected answer has more false mentions, or as many and names fewer things."""
    good, bad = told(chosen, facts, shapes=shapes), told(rejected, facts, shapes=shapes)
    return bad.false > good.false or (bad.false == good.false and len(bad.named) < len(good.named))


def edit_distance(one: str, other: str) -> float:
    """Levenshtein distance over the longer length, in characters of the normalised texts: 0 equal, 1 nothing in common."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_distance(normalised(one), normalised(other))


def pixel_difference(pair: Pair) -> float:
    """Mean absolute difference between the first pictures of the two sides, in grey levels; 255 if their sizes differ."""
    import numpy as np

    one, other = (np.asarray(open_image(side[0]), dtype=np.float64) for side in (pair.images, pair.rejected_images))
    return float(np.abs(one - other).mean()) if one.shape == other.shape else 255.0


def two_sided(pair: Pair) -> bool:
    """Whether each text is true of its own picture and false of the other."""
    texts, facts = (message_text(pair.chosen), message_text(pair.rejected)), (pair.facts, pair.facts["rejected"])
    return [true_of(text, known) for text in texts for known in facts] == [True, False, False, True]


def texts_of(pair: Pair) -> tuple[str, str]:
    """The chosen and the rejected text."""
    return message_text(pair.chosen), message_text(pair.rejected)


def share(values: Sequence[bool]) -> float | None:
    """Share of true values; None of none."""
    return round(sum(values) / len(values), 4) if values else None


def score_texts(stage: str, pairs: Sequence[Pair], verified: Sequence[Pair] | None) -> list[Row]:
    """The figures of a stage whose negative is a text on the same picture; `verified` None: no verifier looked at it."""
    rows = [_row(stage, "pairs", len(pairs), "pairs")]
    raw = share([worse(*texts_of(pair), pair.facts) for pair in pairs])
    if verified is None:
        return [*rows, _row(stage, "worse_share", raw, "share", goal=GOAL), _edit_row(stage, pairs)]
    rows += [
        _row(stage, "worse_share", raw, "share"),
        _row(stage, "verified_pairs", len(verified), "pairs", baseline=len(pairs)),
        _row(stage, "verified_worse_share", share([worse(*texts_of(pair), pair.facts) for pair in verified]), "share",
             baseline=raw, goal=GOAL),
    ]  # fmt: skip
    objects = share([worse(*texts_of(pair), pair.facts, shapes=True) for pair in pairs])
    rows += [
        _row(stage, "objects_worse_share", objects, "share"),
        _row(stage, "verified_objects_worse_share",
             share([worse(*texts_of(pair), pair.facts, shapes=True) for pair in verified]), "share", baseline=objects),
        _edit_row(stage, pairs),
    ]  # fmt: skip
    return rows


def score_pictures(stage: str, pairs: Sequence[Pair]) -> list[Row]:
    """The figures of a stage whose negative is another picture."""
    differences = [pixel_difference(pair) for pair in pairs]
    rows = [
        _row(stage, "pairs", len(pairs), "pairs"),
        _row(stage, "different_share", share([value > 0 for value in differences]), "share", goal=1.0),
        _row(stage, "pixel_difference", round(sum(differences) / max(1, len(pairs)), 3), "grey levels"),
    ]
    if stage == "s_vco":
        rows.append(
            _row(stage, "two_sided_share", share([two_sided(pair) for pair in pairs]), "share", goal=1.0),
        )
    return [*rows, _edit_row(stage, pairs)]


def score_knowledge(stage: str, pairs: Sequence[Pair], rows_in: int) -> list[Row]:
    """Whether captions that KnowAda adapted leave out what the model does not know, by answers drawn anew."""
    from prefalign.engines import Sampling
    from prefalign.engines.config import EngineConfig
    from prefalign.engines.loading import load_engine
    from prefalign.knowledge import Captioned, Probing, probe
    from prefalign.scenes.probing import SceneAnnotator

    annotator = SceneAnnotator()
    known = pairs[0].meta["settings"]
    how = Probing(known["num_generations"], Sampling(**known["sampling"]), known["threshold"], known["least_judged"])
    rows = [
        (Captioned(pair.id, pair.meta["caption"], pair.facts), [open_image(image) for image in pair.images],
         [one["question"] for one in pair.meta["probes"]])
        for pair in pairs
    ]  # fmt: skip
    probed = probe(load_engine(EngineConfig("scenes"), batch_size=64), annotator, rows, how, seed=1)
    again = [probes for probes in probed if isinstance(probes, list)]
    asked = [(message_text(pair.chosen), one) for pair, probes in zip(pairs, again, strict=True) for one in probes]
    told = annotator.answerable([(caption, one.question) for caption, one in asked])
    stay = [one for (_, one), there in zip(asked, told, strict=True) if there]
    gone = [one for (_, one), there in zip(asked, told, strict=True) if not there]
    wrong = [share([score == 1 for one in probes for score in one.scores]) for probes in (gone, stay)]
    unknown = [share([bool(one.unknown) for one in probes]) for probes in (stay, [*stay, *gone])]
    return [
        _row(stage, "pairs", len(pairs), "pairs", baseline=rows_in),
        _row(stage, "worse_share", share([worse(*texts_of(pair), pair.facts) for pair in pairs]), "share"),
        _row(stage, "removed_wrong_share", wrong[0], "share of answers", baseline=wrong[1]),
        _row(stage, "told_unknown_share", unknown[0], "share of details", baseline=unknown[1]),
    ]


def score_short(stage: str, pairs: Sequence[Pair], rows_in: int) -> list[Row]:
    """How many pictures show a gap between the small model and the truth, and whether rejected answers are not the true one."""
    from prefalign.evals.attributes import normalise

    answers = [[normalise(text) for text in texts_of(pair)] for pair in pairs]
    return [
        _row(stage, "pairs", len(pairs), "pairs", baseline=rows_in),
        _row(stage, "rejected_wrong_share", share([one != other for one, other in answers]), "share", goal=1.0),
        _row(stage, "rejected_empty_share", share([other == "" for _, other in answers]), "share"),
    ]


def _edit_row(stage: str, pairs: Sequence[Pair]) -> Row:
    distances = [edit_distance(*texts_of(pair)) for pair in pairs]
    return _row(stage, "edit_distance", round(sum(distances) / max(1, len(pairs)), 4), "share of characters")


def _row(stage: str, what: str, value: float | None, unit: str, *, baseline: Any = None, goal: Any = None) -> Row:
    return {"name": f"truth/{stage}/{what}", "value": value, "unit": unit, "baseline": baseline, "goal": goal}


class Workshop:
    """Runs stages with their scenes configs in one folder; what is there already is taken as it is.

    Args:
        root: scratch folder.
        start: first picture of the split.
        rows: how many pictures.
    """

    def __init__(self, root: Path, start: int, rows: int):
        self.root, self.start, self.rows = root, start, rows

    def prompts(self, split: str, kind: str = "caption") -> Path:
        """Exported prompts (or twins) of a split."""
        from prefalign.scenes.export import export

        folder = self.root / f"{kind}-{split}"
        export(folder, split=split, kind=kind, start=self.start, stop=self.start + self.rows)
        return folder

    def run(self, stage: str, data: Path, name: str = "", **changes: Any) -> Path:
        """The output folder of a stage run on `data`, with settings besides those of its scenes config."""
        folder = self.root / (name or stage)
        values = config.merge(
            config.read_yaml(bundled.find(f"datagen/{stage}_scenes")),
            {"data": {"path": data}, "output": {"path": folder}, **MAKE_PAIRS.get(stage, {}), **changes},
        )
        module = bundled.load_stage(stage)
        module.main(config.build(module.Config, values, source=stage))
        return folder

    def pairs(self, stage: str) -> Path:
        """The pairs of a stage, from prompts of its split, from twins, or from POVID's pairs."""
        if stage == "s_vco":
            return self.run(stage, self.prompts("train_biased", "twin"))
        if stage == "image_contrast":
            return self.run(stage, self.pairs("povid"))
        if stage in MAKE_PAIRS:
            return self.run(stage, self.prompts("train_fair"))
        changes: dict[str, Any] = {"labeller": {"model_name_or_path": self.labeller()}} if stage == "rlaif_v" else {}
        return self.run(stage, self.prompts(TEXT_STAGES[stage]), **changes) / IN_A_FOLDER.get(stage, "")

    def labeller(self) -> str:
        """The folder of the labeller of claims, trained once."""
        from prefalign.scenes.labeller import build

        folder = self.root / "labeller"
        if not (folder / "README.md").is_file():
            print(f"labeller on held-out claims: {build(folder)}", flush=True)
        return str(folder)

    def figures(self, stage: str) -> list[Row]:
        """All figures of a stage."""
        folder = self.pairs(stage)
        pairs = list(read_records(folder, Pair))
        if stage in MAKE_PAIRS:
            return (score_knowledge if stage == "knowada" else score_short)(stage, pairs, self.rows)
        if stage not in TEXT_STAGES:
            return score_pictures(stage, pairs)
        if stage in UNVERIFIED:
            return score_texts(stage, pairs, None)
        from prefalign.store import StoreError

        try:
            verified = list(read_records(self.run("filter_pairs", folder, f"{stage}-verified"), Pair))
        except StoreError as nothing_left:
            print(nothing_left, flush=True)
            verified = []
        return score_texts(stage, pairs, verified)


def table(rows: Sequence[Row]) -> str:
    """The figures as lines for a terminal."""
    lines = []
    for row in rows:
        value = "none" if row["value"] is None else f"{row['value']:g}"
        goal = (
            ""
            if row["goal"] is None
            else f"   goal {row['goal']:g}" + ("" if (row["value"] or 0) >= row["goal"] else " MISSED")
        )
        lines.append(f"{row['name']:<48} {value:>8} {row['unit']}{goal}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--start", type=int, default=1024)
    parser.add_argument("--keep", type=Path, help="folder in which prompts and pairs stay")
    chosen = parser.parse_args()
    stages = [name for name in chosen.stages.split(",") if name]
    if unknown := sorted(set(stages) - set(STAGES)):
        parser.error(f"unknown stage {unknown[0]!r}: known are {', '.join(STAGES)}")
    with tempfile.TemporaryDirectory() as scratch:
        workshop = Workshop(chosen.keep or Path(scratch), chosen.start, chosen.rows)
        rows: list[Row] = []
        for stage in stages:
            found = workshop.figures(stage)
            rows += found
            print(table(found), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

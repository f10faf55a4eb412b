"""One training step on the shared path against the plain one and TRL's trainer, in every case: losses and gradients.

    make prove        both environments, then the table benchmarks/results/prove.md

The matrix and its tolerances are those of `tests/equality.py`, of which `make test` runs a part that covers every two
settings. Tiny models, float32, one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "prove.md"
AGAINST = {"plain": "the plain path", "trl": "TRL's DPOTrainer"}


def measure(families: Sequence[str], every: int = 1) -> list[dict[str, Any]]:
    """Every case of some families, or every so-many-th: {case, family, losses, training, against, loss, gradient, ..., holds}."""
    from tests.equality import Bench, all_cases

    found = []
    for family in families:
        begin, cases = time.monotonic(), all_cases([family])[::every]
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(family, Path(folder))
            for number, case in enumerate(cases, start=1):
                for against, difference in bench.differences(case).items():
                    found.append(
                        {
                            "case": str(case),
                            **asdict(case),
                            "every": every,
                            "against": against,
                            **asdict(difference),
                            "holds": difference.holds(),
                        }
                    )
                    if not difference.holds():
                        print(f"\n{case} against {against}: {difference}", flush=True)
                print(
                    f"\r{family}: {number} of {len(cases)}, {time.monotonic() - begin:.0f} s", end="", file=sys.stderr
                )
        print(file=sys.stderr)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The worst of each family, loss and way of training, as Markdown."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["losses"], row["training"], row["against"]), []).append(row)
    failed = [row["case"] for row in rows if not row["holds"]]
    parts: dict[int, list[str]] = {}
    for family, every in sorted({(row["family"], row.get("every", 1)) for row in rows}):
        parts.setdefault(every, []).append(family)
    which = [
        f"{'Every case' if every == 1 else f'Each {every}th case'} of {', '.join(parts[every])}."
        for every in sorted(parts)
    ]
    lines = [
        "# The shared path is the plain path",
        "",
        "One training step of tiny models, float32, against the same step without sharing and against TRL's `DPOTrainer`;",
        "made by `make prove`. Each line is the worst of its cells: pictures 1, 3, or of another size on the other side; 1 or 3",
        "pairs of different lengths; gradient checkpointing off and on; reference online and cached. `of allowed` is the",
        "difference of the losses over what rounding allows, 4 beta eps sum |log-probs|; gradients are the largest difference",
        "over the largest gradient, allowed 1e-5 and with an adapter 2e-5. In each cell the same tensors have a gradient and all",
        "metrics agree.",
        "",
        f"{' '.join(which)} {len(rows)} comparisons, {len(failed)} outside. {' '.join(failed)}".rstrip(),
        "",
        "| family | losses | trained | against | cells | loss difference | of allowed | gradients |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (family, losses, training, against), cells in groups.items():
        loss = max(cell["loss"] for cell in cells)
        share = max(cell["loss"] / cell["loss_allowed"] for cell in cells)
        gradient = max(cell["gradient"] for cell in cells)
        lines.append(
            f"| {family} | {losses} | {training} | {AGAINST[against]} | {len(cells)} | {loss:.1e} | {share:.2f} "
            f"| {gradient:.1e} |"
        )
    return "\n".join(lines) + "\n"


def _check_some(rows: Sequence[dict[str, Any]]) -> None:
    """End with an error where there is nothing to judge: no difference among no comparisons shows nothing."""
    if not rows:
        sys.exit(
            "nothing was compared: no case was run, or the files hold none, so no equality is shown. Check --families."
        )


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    from tests.tiny_vlms import PLAIN, WITH_VIDEO

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--families", default="plain", help="plain, with_video (needs torchvision), or names with commas"
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="each N-th case only; 5 meets every value of every axis"
    )
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help=f"write {RESULTS.name} from such files")
    chosen = parser.parse_args()
    if chosen.table:
        rows = [row for file in chosen.table for row in json.loads(file.read_text(encoding="utf-8"))]
        _check_some(rows)
        RESULTS.write_text(table(rows), encoding="utf-8")
        print(f"{len(rows)} comparisons in {RESULTS}")
    else:
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("prefalign").setLevel(logging.ERROR)
        torch.set_num_threads(1)
        names = {"plain": PLAIN, "with_video": WITH_VIDEO}.get(chosen.families, chosen.families.split(","))
        rows = measure(names, chosen.every)
        _check_some(rows)
        print(table(rows))
        if chosen.json:
            chosen.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(row["holds"] for row in rows) else 1)


if __name__ == "__main__":
    main()

"""Plans of data stages as a table to be read, with what a reader should know beneath it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from prefalign.planner import Plan

COLUMNS = (
    "stage",
    "rows",
    "rows out",
    "dropped",
    "calls",
    "text tok",
    "image tok",
    "new tok",
    "disk",
    "time",
    "loading",
)


def table(plans: Sequence[Plan]) -> str:
    """Plans as a table, with what a reader should know beneath it."""
    lines = [COLUMNS, *(_cells(made) for made in plans)]
    if len(plans) > 1:
        lines.append(_cells(_total(plans)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    shown = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]  # fmt: skip
    return "\n".join([*shown, "", *_notes(plans)])


def _cells(made: Plan) -> tuple[str, ...]:
    counts = (made.rows_in, made.rows_out, sum(made.dropped.values()), made.requests, made.text_tokens, made.image_tokens,
              made.new_tokens)  # fmt: skip
    return (made.stage, *(number(count) for count in counts), size(made.bytes), duration(made.seconds),
            duration(made.seconds_loading))  # fmt: skip


def _total(plans: Sequence[Plan]) -> Plan:
    summed = {entry.name: sum(getattr(made, entry.name) for made in plans) for entry in dataclasses.fields(Plan)
              if entry.type in ("int", "float")}  # fmt: skip
    dropped = {"all": sum(sum(made.dropped.values()) for made in plans)}
    return Plan(stage="all", dropped=dropped, **summed)


def _notes(plans: Sequence[Plan]) -> list[str]:
    notes = [_measured(plans)]
    for made in plans:
        if not made.sampled:
            notes.append(
                f"{made.stage}: not run, since the sample of {made.after} gave no row to read. Take more rows."
            )
            continue
        if not made.sampled_out:
            notes.append(
                f"{made.stage}: no row came out of the sample, so its calls, tokens, disk and time are too low. Take more."
            )
        if made.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in made.dropped.items())
            notes.append(
                f"{made.stage}: {made.sampled_out} rows came out of the {made.sampled} sampled; of all {made.rows_in} it is "
                f"expected to drop: {reasons}."
            )
        if made.failed > made.max_quarantine:
            notes.append(
                f"{made.stage}: {made.failed} rows are expected to fail; the run stops above --output.max_quarantine "
                f"{made.max_quarantine}. Mend the data or raise the limit."
            )
        if made.after:
            notes.append(f"{made.stage}: read the sample of {made.after}, whose output is not there yet.")
        for name in made.unkept:
            notes.append(
                f"{made.stage}: the sample's answers of the server in {name} are paid for and were not kept, so the run asks for "
                f"them again. To pay once, set {name}.server.cache to a file, here and in the run."
            )
        if made.pooled and made.sampled < made.rows_in:
            notes.append(
                f"{made.stage}: other pictures came from the sample alone; from all rows there are more, and nearer ones."
            )
        if made.conflict:
            notes.append(f"{made.stage}: its output folder holds rows of another config ({made.conflict}); the run will refuse "
                         "it. Give another output.path.")  # fmt: skip
        elif made.blocks_done and made.blocks_done >= made.blocks:
            notes.append(
                f"{made.stage}: finished already; the run keeps its rows. The figures are those of making them again."
            )
        elif made.blocks_done:
            notes.append(
                f"{made.stage}: {made.blocks_done} of {made.blocks} blocks are done already; the run does the others. "
                "The figures are of all."
            )
    return notes


def _measured(plans: Sequence[Plan]) -> str:
    """What the figures come from."""
    if all(made.sampled == made.rows_in for made in plans):
        return "Measured on all rows, of which nothing is kept; loading is paid at each start."
    rows = sorted({made.sampled for made in plans})
    sizes = str(rows[0]) if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
    whole = f"of {number(plans[0].rows_in)} rows" if len(plans) == 1 else "rows of each stage"
    return (
        f"Measured on the first {sizes} {whole} and scaled up to all; loading is as measured, and paid at each start. A small "
        "sample fills batches badly, so the time is rather too long (--rows of a block's size is close)."
    )


def number(count: int) -> str:
    """A count to be read."""
    return f"{count:,}" if count < 10_000_000 else f"{count / 1e6:,.0f} M"


def size(count: float) -> str:
    """Bytes to be read."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1000 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.1f} {units[0]}" if count < 10 else f"{count:.0f} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, to be read."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

"""What `prefalign run STAGE --help` prints: what the stage does, its settings with what each means, its configs."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import shutil
import textwrap
import typing
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from prefalign import bundled, running
from prefalign.config import dataclasses_in
from prefalign.execution import HELP

WIDEST = 110
Shown = dict[type, tuple[str, Mapping[str, Any]]]
"""Sections that were printed: where, and with which defaults."""


def describe(name: str, stage: ModuleType) -> str:
    """The help of a stage.

    Args:
        name: its name, or file.
        stage: its module.

    Returns:
        The stage's docstring; each setting with its default and what its `Attributes:` say, a section of settings that comes
        again by a reference to its first; who may work on its blocks; its bundled configs and a command with one of them.
    """
    lines = [inspect.getdoc(stage) or "", "", "settings (--config FILE sets them, --name VALUE overrides):"]
    lines += _settings(stage.Config, "", {}, _defaults(stage.Config))
    if running.is_shared_out(stage):
        lines += ["", HELP]
    configs = bundled.configs_of(Path(name).stem)
    if configs:
        usual = next((known for known in configs if Path(known).name == Path(name).stem), configs[0])
        lines += ["", *_wrapped(f"its configs (the head of each says what it needs): {', '.join(configs)}", "", "  ")]
        lines.append(f"example: prefalign run {shlex.quote(name)} --config {usual}")
    return "\n".join(lines)


def explanations(cls: type) -> dict[str, str]:
    """What the `Attributes:` in a class's docstring, and in those of its bases, say of each attribute, in one line each.

    Example:
        >>> class Crop:
        ...     '''Where to cut.
        ...
        ...     Attributes:
        ...         size: in pixels,
        ...             at least 1.
        ...         seed: draws the place.
        ...     '''
        >>> explanations(Crop)
        {'size': 'in pixels, at least 1.', 'seed': 'draws the place.'}
    """
    told: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        section = re.search(r"^Attributes:\n((?: .*\n?|\n)*)", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE)
        for entry in re.split(r"\n(?=    \S)", section[1].strip("\n")) if section else ():
            name, _, text = entry.partition(":")
            told[name.strip()] = " ".join(text.split())
    return told


def _settings(cls: type, prefix: str, shown: Shown, defaults: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    told, kinds = explanations(cls), typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        name, kind, default = prefix + entry.name, kinds[entry.name], defaults[entry.name]
        sections = [] if typing.get_origin(kind) in (list, tuple, dict) else dataclasses_in(kind)
        if sections != [kind]:
            lines.append(f"  --{name} {'(required)' if default is dataclasses.MISSING else f'= {default}'}")
        elif entry.name in told or kind in shown:
            lines.append(f"  {name}:")
        lines += _wrapped(told.get(entry.name, ""), "      ", "      ")
        for section in sections:
            inner = _defaults(section, default if isinstance(default, section) else None)
            if section in shown:
                lines += _wrapped(_as_before(name, inner, *shown[section]), "      ", "      ")
            else:
                shown[section] = name, inner
                lines += _settings(section, f"{name}.", shown, inner)
    return lines


def _defaults(cls: type, given: Any = None) -> dict[str, Any]:
    """The default of each field, `MISSING` where it has none; those of an object, if one is given."""
    made: dict[str, Any] = {}
    for entry in dataclasses.fields(cls):
        factory = entry.default_factory
        made[entry.name] = entry.default if factory is dataclasses.MISSING else factory()
        if given is not None:
            made[entry.name] = getattr(given, entry.name)
    return made


def _as_before(name: str, defaults: Mapping[str, Any], first: str, known: Mapping[str, Any]) -> str:
    others = [f"{key} = {value}" for key, value in defaults.items() if value != known[key]]
    return f"--{name}.NAME: as --{first}.NAME" + (f", but {', '.join(others)}" if others else "")


def _wrapped(text: str, first: str, then: str) -> list[str]:
    width = min(shutil.get_terminal_size().columns, WIDEST)
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=then,
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip

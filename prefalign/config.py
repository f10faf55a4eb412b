"""Strict YAML to dataclasses: unknown and duplicate keys fail with the nearest name, dotted overrides win.

Validation is pydantic's (`TypeAdapter` with extra keys forbidden); a config class is a plain standard dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

Config = TypeVar("Config")


BOOLEAN = "tag:yaml.org,2002:bool"
COMMAND_LINE = "command line"
_NULLS = ("null", "Null", "NULL", "~")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every problem found."""


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses a key written twice (plain YAML keeps the last one and says nothing).

    Only true and false are booleans, as in YAML 1.2: on, off, yes and no are words, such as `fast_path: off`.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise ConfigError(
                    f"key {key!r} is written twice (lines {seen[key]} and {key_node.start_mark.line + 1}); "
                    "only one can count. Delete one."
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in entries if tag != BOOLEAN]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(BOOLEAN, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no config at {path}. `prefalign list` names the bundled ones.")
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name} is not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path.name} must be a mapping of settings, got a {type(loaded).__name__}.")
    return loaded


def stated(path: str | Path, name: str) -> str:
    """What a YAML file says of a setting.

    Args:
        path: the file.
        name: of the setting, as in `model.dtype`.

    Returns:
        Its value: a text as it is, anything else as JSON; empty where the file does not name it, or says null.
    """
    value: Any = read_yaml(path)
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, default=str)


def parse_overrides(arguments: Sequence[str], cls: type | None = None) -> dict[str, Any]:
    """Turn `--section.field value` (or `--section.field=value`) into a nested mapping; values are read as YAML.

    A setting that `cls` declares a text or a path is what was written, whatever YAML would make of it: the commit 0123456 stays
    that, and is no number. Quotes around all of it are YAML's, and `null` is no value.

    Args:
        arguments: the words of a command line.
        cls: dataclass of the settings; None: every value is read as YAML.

    Raises:
        ConfigError: a word that is no flag, a flag without a value, or one within another's value.

    Example:
        >>> parse_overrides(["--trainer.beta", "0.2", "--seed=3"])
        {'trainer': {'beta': 0.2}, 'seed': 3}
    """
    nested: dict[str, Any] = {}
    pending = list(arguments)
    while pending:
        flag = pending.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"expected an override such as --seed 3, got {flag!r}.")
        dotted, equals, text = flag[2:].partition("=")
        if not equals:
            if not pending or (pending[0].startswith("--") and not _is_number(pending[0])):
                raise ConfigError(f"{flag} needs a value, as in `{flag} VALUE`.")
            text = pending.pop(0)
        *parents, leaf = keys = dotted.split(".")
        value = _value(text, _declared(cls, keys))
        target = nested
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{flag}: {parent!r} was already given a plain value on this command line.")
        target[leaf] = value
    return nested


def _value(text: str, declared: Any) -> Any:
    """What a word of the command line says for a setting of this type."""
    if text.strip() in _NULLS or (not text and declared is not str):
        return None
    try:
        # the scalars of the base loader are texts
        value = yaml.load(text, yaml.BaseLoader if _are_texts(declared) else _StrictLoader)
    except yaml.YAMLError:
        return text
    quoted = isinstance(value, str) and text[:1] in ("'", '"')
    return text if _is_text(declared) and not quoted else value


def _declared(cls: Any, keys: Sequence[str]) -> Any:
    """The type that a dataclass declares for a setting; None: it has none of that name, or several."""
    for key in keys:
        found = []
        for option in _options(cls):
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                found.append(typing.get_type_hints(option).get(key))
            elif typing.get_origin(option) in (dict, Mapping):
                found.append(typing.get_args(option)[1])
        known = [one for one in found if one is not None]
        cls = known[0] if known and all(one == known[0] for one in known) else None
    return cls


def _options(annotation: Any) -> list[Any]:
    """The types of a union without None."""
    together = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    options = typing.get_args(annotation) if together else (annotation,)
    return [option for option in options if option is not type(None)]


def _is_text(annotation: Any) -> bool:
    """Whether a type is that of a text, a path or one of several words, or None."""

    def one(option: Any) -> bool:
        if typing.get_origin(option) is typing.Literal:
            return all(isinstance(word, str) for word in typing.get_args(option))
        return isinstance(option, type) and issubclass(option, (str, Path))

    return all(map(one, _options(annotation)))


def _are_texts(annotation: Any) -> bool:
    """Whether a type is that of a list of texts, or None."""
    return all(
        typing.get_origin(option) is list and _is_text(typing.get_args(option)[0]) for option in _options(annotation)
    )


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of mappings; `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        current = merged.get(key)
        merged[key] = merge(current, value) if isinstance(current, Mapping) and isinstance(value, Mapping) else value
    return merged


def build(
    cls: type[Config], values: Mapping[str, Any], *, source: str = "config", typed: Mapping[str, Any] | None = None
) -> Config:
    """Validate a mapping into dataclass `cls`.

    Args:
        cls: dataclass of the settings.
        values: of its fields.
        source: where they come from.
        typed: those of `values` that were typed on the command line instead.

    Raises:
        ConfigError: one line per problem, each with the dotted key, the value and the nearest known name.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    _forbid_extra(cls, ConfigDict(extra="forbid"))
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        listed: set[type | None] = set()
        lines = [
            (_came_from(problem, typed or {}, source), _explain(cls, problem, listed)) for problem in error.errors()
        ]
        if len({place for place, _ in lines}) == 1:
            source, lines = lines[0][0], [("", line) for _, line in lines]
        told = [f"{place}: {line}" if place not in ("", source) else line for place, line in lines]
        raise ConfigError(f"{source}: " + "\n  ".join(["", *told] if len(told) > 1 else told)) from None


def load(cls: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (if given), apply command-line `overrides`, validate into `cls`."""
    typed = parse_overrides(overrides, cls)
    if not path:
        return build(cls, typed, source=COMMAND_LINE)
    return build(cls, merge(read_yaml(path), typed), source=Path(path).name, typed=typed)


def to_mapping(config: Any) -> dict[str, Any]:
    """The resolved config as plain JSON-able values."""
    from pydantic import TypeAdapter

    return cast(dict[str, Any], TypeAdapter(type(config)).dump_python(config, mode="json"))


def nearest(name: str, known: Sequence[str]) -> str:
    """A `did you mean` sentence, or the list of known names when nothing is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def dataclasses_in(annotation: Any) -> list[type]:
    """The dataclasses that a type annotation names, inside unions, lists and mappings too."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [found for argument in typing.get_args(annotation) for found in dataclasses_in(argument)]
    return []


def _forbid_extra(cls: type, pydantic_config: Any) -> None:
    """Mark `cls` and every dataclass inside it so that pydantic refuses unknown keys."""
    cls.__pydantic_config__ = pydantic_config  # type: ignore[attr-defined]
    for annotation in typing.get_type_hints(cls).values():
        for inner in dataclasses_in(annotation):
            if "__pydantic_config__" not in vars(inner):
                _forbid_extra(inner, pydantic_config)


def _explain(cls: type, problem: Any, listed: set[type | None]) -> str:
    """A line on a problem; the known keys of a section once, for the first unknown key that is near none of them."""
    location = [str(part) for part in problem["loc"]]
    dotted = ".".join(location)
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        owner: Any = cls
        for part in location[:-1]:
            inner = dataclasses_in(typing.get_type_hints(owner).get(part)) if owner else []
            owner = inner[0] if inner else None
        known = [field.name for field in dataclasses.fields(owner)] if owner else []
        hint = _elsewhere(cls, location, known) or nearest(location[-1], known)
        if hint.startswith("known: "):
            if owner in listed:
                return f"{dotted}: unknown key (value {problem['input']!r})."
            listed.add(owner)
        return f"{dotted}: unknown key (value {problem['input']!r}); {hint}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{dotted}: required, and not given."
    if (
        problem["type"] == "value_error"
    ):  # of a dataclass that checks itself: it says the value, and `input` is all of it
        return ": ".join([*([dotted] if dotted else []), str(problem["ctx"]["error"])])
    if problem["type"] in ("string_type", "path_type") and isinstance(problem["input"], (int, float, date)):
        return f"{dotted}: a text is wanted, and YAML takes what is written there for {problem['input']!r}. Put it in quotes."
    return f"{dotted}: {problem['msg']} (got {problem['input']!r})."


def _came_from(problem: Any, typed: Mapping[str, Any], source: str) -> str:
    """Where the value of a problem was written; both places for a section whose own check names a setting that was typed."""
    found: Any = typed
    for part in problem["loc"]:
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif found is typed or (
            isinstance(found, Mapping) and str(part)[:1].islower()
        ):  # else the name of a class in a union
            return source
    if not isinstance(found, Mapping):
        return COMMAND_LINE
    named = problem["type"] == "value_error" and {*found} & {*re.findall(r"\w+", problem["msg"])}
    return f"{source} with the {COMMAND_LINE}" if named else source


def _elsewhere(cls: type, location: Sequence[str], known: Sequence[str]) -> str:
    """A `did you mean` sentence where up to three other sections have a setting of this very name; else empty."""
    *parents, name = location
    named = [place for place in _settings(cls) if place.rpartition(".")[2] == name and place != ".".join(location)]
    if not 1 <= len(named) <= 3:
        return ""
    named += [".".join([*parents, near]) for near in difflib.get_close_matches(name, known, n=1, cutoff=0.6)]
    return f"did you mean {' or '.join(map(repr, named))}?"


def _settings(cls: Any) -> list[str]:
    """The dotted names of all settings of a dataclass, with those of the class that a mapping's `fields_of` names."""
    hints = typing.get_type_hints(cls)
    found: dict[str, None] = {}
    for entry in dataclasses.fields(cls):
        found[entry.name] = None
        below = [
            name
            for option in _options(hints[entry.name])
            if dataclasses.is_dataclass(option)
            for name in _settings(option)
        ]
        if "fields_of" in entry.metadata:
            module, _, name = entry.metadata["fields_of"].rpartition(".")
            with suppress(ImportError):  # of an extra that is not installed
                known = dataclasses.fields(getattr(importlib.import_module(module), name))
                below = [field.name for field in known if field.init]
        found.update(dict.fromkeys(f"{entry.name}.{name}" for name in below))
    return list(found)


def take_option(arguments: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of an option of a verb (None without it), and the other arguments; `ConfigError` for one without a value."""
    rest = list(arguments)
    if flag not in rest:
        return None, rest
    place = rest.index(flag)
    value = rest[place + 1 : place + 2]
    if not value or value[0].startswith("--"):
        raise ConfigError(f"{flag} needs a value.")
    del rest[place : place + 2]
    return value[0], rest


def take_file(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--config FILE` or `--config=FILE`, and the other arguments; `ConfigError` without a file, or with two."""
    named: list[str] = []
    rest: list[str] = []
    pending = list(arguments)
    while pending:
        flag, equals, value = pending.pop(0).partition("=")
        if flag != "--config":
            rest.append(flag + equals + value)
            continue
        if not equals and pending:
            value = pending.pop(0)
        if not value or value.startswith("--"):
            raise ConfigError("--config needs a file, as in `--config configs/datagen/bdhs.yaml`.")
        named.append(value)
    if len(named) > 1:
        raise ConfigError(f"--config is given {len(named)} times ({', '.join(named)}); only one can count.")
    return (named[0] if named else None), rest

"""Data sets that LLaMA-Factory's `dataset_info.json` names: which rows they are, and what their columns and roles mean.

`data.path: data/dataset_info.json@NAME`. A row becomes one of the layout `sharegpt` (with a thumb: `kto`) before anything else
reads it. Columns that the description does not name mean nothing, as there; those that we would read are kept under `undeclared`.

Source: the data set description in `data/README.md` of github.com/hiyouga/LLaMA-Factory. Pictures are looked for in the folder of
`dataset_info.json`, its `media_dir`. Not read: loading scripts, ModelScope, cloud storage, video, sound, turns of tools.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefalign.records import RecordError
from prefalign.sources.columns import CHOSEN, PICTURES, REJECTED
from prefalign.sources.config import DESCRIPTIONS, BadRow, DataConfig
from prefalign.sources.layouts import AUTO
from prefalign.sources.turns import ROLES

_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name", "formatting", "ranking",
         "subset", "split", "folder", "revision", "num_samples", "columns", "tags")  # fmt: skip
_TEXTS = ("hf_hub_url", "file_name", "subset", "split", "folder", "revision", "formatting")
_COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios", "chosen",
            "rejected", "kto_tag")  # fmt: skip
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system",
         "observation_tag": "observation", "function_tag": "function_call"}  # fmt: skip
_ELSEWHERE = {
    "script_url": "a loading script, and no code that comes with data is run here",
    "ms_hub_url": "a data set of ModelScope, which is not asked",
    "om_hub_url": "a data set of Modelers, which is not asked",
    "cloud_file_name": "a file in cloud storage, which is not asked",
}
_MEANT = {*PICTURES, *CHOSEN, *REJECTED, "conversations", "messages", "prompt", "instruction_prompt", "question", "problem",
          "rejected_images", "chosen_images", "responses", "answer", "system", "system_prompt", "completion", "completions",
          "label", "kto_tag", "output_1", "output_2", "preference", "reward_model", "gt", "text"}  # fmt: skip


@dataclass(frozen=True)
class Description:
    """One entry of a `dataset_info.json`.

    Attributes:
        file: the `dataset_info.json`.
        name: of the entry.
        given: the entry.
        columns: what a row's columns are, by what they mean.
        tags: names and values that turns have.
    """

    file: Path
    name: str
    given: Mapping[str, Any]
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def source(self, config: DataConfig) -> DataConfig:
        """Where the rows are, with what else `config` says."""
        limits = [limit for limit in (config.limit, self.given.get("num_samples")) if limit]
        found = replace(
            config, path=self.file.parent / (self.given.get("file_name") or ""), limit=min(limits, default=0)
        )
        if not self.given.get("hf_hub_url"):
            return replace(found, images=config.images or self.file.parent)
        return replace(
            found,
            path=Path(self.given["hf_hub_url"]),
            split=config.split or self.given.get("split"),
            config=config.config or self.given.get("subset"),
            revision=config.revision or self.given.get("revision"),
        )

    def row(self, raw: Mapping[str, Any] | BadRow) -> Mapping[str, Any] | BadRow:
        """A row as the layout `sharegpt` or `kto` has it."""
        if isinstance(raw, BadRow):
            return raw
        try:
            return self._translated(raw)
        except RecordError as error:
            return BadRow(error.reason, str(error))

    def _translated(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        turns = self._alpaca(raw) if self.given.get("formatting", "alpaca") == "alpaca" else self._sharegpt(raw)
        found: dict[str, Any] = {"conversations": turns}
        if (thumb := self._of(raw, "kto_tag")) is not None:
            if not turns or turns[-1]["from"] != "gpt":
                raise RecordError("missing_column", "a row with a thumb ends with an answer, and this one does not.")
            told = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
            found = {"prompt": told[:-1], "completion": turns[-1]["value"], "label": thumb}
        if (pictures := self._of(raw, "images")) is not None:
            found["images"] = pictures if isinstance(pictures, list) else [pictures]
        if self.given.get("ranking"):
            found |= {side: self._answer(self._of(raw, side)) for side in ("chosen", "rejected")}
        rest = {name: value for name, value in raw.items() if name not in self._used}
        undeclared = {name: value for name, value in rest.items() if name in _MEANT and value is not None}
        rest = {name: value for name, value in rest.items() if name not in _MEANT}
        return {**rest, **({"undeclared": undeclared} if undeclared else {}), **found}

    @property
    def _used(self) -> set[str]:
        return {column for meaning, column in self.columns.items() if meaning != "tools"}

    def _of(self, raw: Mapping[str, Any], meaning: str) -> Any:
        return raw.get(self.columns[meaning]) if meaning in self.columns else None

    def _system(self, raw: Mapping[str, Any], turns: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        told = self._of(raw, "system")
        wanted = isinstance(told, str) and told.strip() and not (turns and turns[0]["from"] == "system")
        return [{"from": "system", "value": told}] if wanted else []

    def _alpaca(self, raw: Mapping[str, Any]) -> list[dict[str, str]]:
        """`history`, then `prompt` and `query` on two lines; without a ranking the `response`."""
        turns = []
        for past in self._of(raw, "history") or []:
            if not (isinstance(past, (list, tuple)) and len(past) == 2):
                raise RecordError(
                    "bad_messages", f"`history` is a list of question and answer, got {str(past)[:120]!r}."
                )
            turns += [{"from": "human", "value": past[0]}, {"from": "gpt", "value": past[1]}]
        asked = [text for text in (self._of(raw, "prompt"), self._of(raw, "query")) if text]
        if not asked:
            raise self._missing(raw, "prompt")
        turns.append({"from": "human", "value": "\n".join(map(str, asked))})
        if not self.given.get("ranking") and isinstance(said := self._of(raw, "response"), str):
            turns.append({"from": "gpt", "value": said})
        return self._system(raw, turns) + turns

    def _sharegpt(self, raw: Mapping[str, Any]) -> list[dict[str, str]]:
        told = self._of(raw, "messages")
        if told is None:
            raise self._missing(raw, "messages")
        if not isinstance(told, list):
            raise RecordError("bad_messages", f"a conversation is a list of turns, got {str(told)[:120]!r}.")
        turns = [self._turn(turn) for turn in told]
        return self._system(raw, turns) + turns

    def _turn(self, turn: Any) -> dict[str, str]:
        role, content = self.tags["role_tag"], self.tags["content_tag"]
        roles = {self.tags["user_tag"]: "human", self.tags["assistant_tag"]: "gpt", self.tags["system_tag"]: "system"}
        if not isinstance(turn, Mapping) or turn.get(role) not in roles or not isinstance(turn.get(content), str):
            raise RecordError(
                "bad_messages",
                f"a turn of {self.name} has {role!r} ({', '.join(roles)}) and {content!r} with a text, as dataset_info.json "
                f"says; got {str(turn)[:120]}. Turns of tools are not read.",
            )
        return {"from": roles[turn[role]], "value": turn[content]}

    def _answer(self, said: Any) -> Any:
        return self._turn(said) if isinstance(said, Mapping) and self.tags["role_tag"] in said else said

    def _missing(self, raw: Mapping[str, Any], meaning: str) -> RecordError:
        return RecordError(
            "missing_column",
            f"{self.name} has its {meaning} in the column {self.columns.get(meaning)!r}, as dataset_info.json says; this row has "
            f"{', '.join(sorted(raw))}.",
        )


def described(config: DataConfig) -> Description | None:
    """The description that `config.path` names; None if it names rows.

    Raises:
        ValueError: there is none of that name, or what it describes cannot be read.
    """
    if not config.path.name.startswith(DESCRIPTIONS):
        return None
    name = config.path.name.partition("@")[2]
    file = config.path.with_name(config.path.name.partition("@")[0])
    if not file.is_file():
        raise ValueError(f"no {DESCRIPTIONS} at {file}. Give `data.path` as folder/{DESCRIPTIONS}@NAME.")
    if config.layout != AUTO:
        raise ValueError(
            f"data.layout is {config.layout!r}, and {DESCRIPTIONS} says itself what the columns mean. Leave it out."
        )
    return _description(file, name, file.stat().st_mtime_ns)


def source_of(config: DataConfig) -> DataConfig:
    """Where the rows are that `config` names: itself, or what a `dataset_info.json` says."""
    found = described(config)
    return config if found is None else found.source(config)


@functools.lru_cache(maxsize=64)
def _description(file: Path, name: str, changed: int) -> Description:
    try:
        known = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not complete JSON ({error}).") from error
    if not isinstance(known, dict):
        raise ValueError(f"{file} must map names to data sets, got a {type(known).__name__}.")
    entry = known.get(name)
    if not isinstance(entry, dict):
        near = difflib.get_close_matches(name, known, n=1)
        listed = ", ".join(sorted(known)[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        wrong = f"no data set {name!r}" if name else "several data sets, and `data.path` none of them"
        raise ValueError(
            f"{file} names {wrong}{f'; did you mean {near[0]!r}?' if near else '.'} Give folder/{DESCRIPTIONS}@NAME with one of "
            f"{listed}."
        )
    where = f"{file}, {name}"
    _check_keys(where, entry, _KEYS)
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    _check_keys(f"{where}: columns", columns, _COLUMNS)
    _check_keys(f"{where}: tags", tags, tuple(_TAGS))
    _check_texts(where, {key: entry.get(key) for key in _TEXTS})
    _check_texts(f"{where}: columns", columns)
    _check_texts(f"{where}: tags", tags)
    _check_source(where, entry)
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ValueError(f"{where}: formatting is {formatting!r}; there are alpaca, sharegpt and openai.")
    for medium in ("videos", "audios"):
        if columns.get(medium):
            raise ValueError(f"{where}: columns.{medium} is {columns[medium]!r}, and only pictures are read here.")
    ranking, rows = entry.get("ranking"), entry.get("num_samples")
    if not isinstance(ranking, (bool, type(None))):
        raise ValueError(f"{where}: ranking is {ranking!r}, not true or false. Write it without quotes.")
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 0):
        raise ValueError(
            f"{where}: num_samples is {rows!r}, and it is how many of the first rows are used. Give a whole number."
        )
    if ranking and (lacking := [side for side in ("chosen", "rejected") if not columns.get(side)]):
        raise ValueError(
            f"{where}: ranking is true, and `columns` does not say which one is {' and which '.join(lacking)}, so that there "
            'would be no pair. Add "chosen" and "rejected" to its columns.'
        )
    usual = {"messages": "conversations"} if formatting != "alpaca" else {} if columns else _ALPACA
    spoken = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    roles = {
        **_TAGS,
        **(spoken if formatting == "openai" else {}),
        **{key: value for key, value in tags.items() if value},
    }
    named = {**usual, **{key: value for key, value in columns.items() if value}}
    return Description(file, name, entry, named, roles)


def _check_keys(where: str, given: Any, known: Sequence[str]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where} is a {type(given).__name__}, not an object.")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"{where}: unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else ''} Known are {', '.join(known)}."
            )


def _check_texts(where: str, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{where}: {key} is {value!r}, not a text, so nothing has that name. Give one name in quotes."
            )


def _check_source(where: str, entry: Mapping[str, Any]) -> None:
    """Raise `ValueError` if the rows are where nothing is read, of several places the one that LLaMA-Factory takes."""
    if entry.get("hf_hub_url"):
        if entry.get("folder"):
            raise ValueError(
                f"{where}: folder is {entry['folder']!r}, and folders of a repository on the Hub are not told apart. Download "
                "the folder and give `file_name`."
            )
        return
    for key, what in _ELSEWHERE.items():
        if entry.get(key):
            raise ValueError(
                f"{where}: {key} is {entry[key]!r}, {what}. Save the rows as JSON, JSON lines or Parquet beside "
                f"{DESCRIPTIONS} and give `file_name`."
            )
    if not entry.get("file_name"):
        raise ValueError(
            f"{where} says neither `file_name` nor `hf_hub_url`, so there are no rows to read. Give one of them."
        )

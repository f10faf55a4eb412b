"""Any Python function as a reward."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefalign.rewards.reward import Response

if TYPE_CHECKING:
    import torch


@dataclass
class Function:
    """A function of yours.

    It is called with the list of responses (`prefalign.rewards.Response`); or, if one of its parameters is called
    `completions`, as TRL calls a `reward_funcs` entry: with lists `prompts` and `completions` of messages and the columns `id`,
    `images`, `answer` and `facts`, of which it gets those that it has parameters for (all with `**kwargs`).

    It returns one number for each response, or a mapping of term to such lists; None or NaN where a response has no score.

    Attributes:
        function: `package.module:name`, or `path/to/file.py:name`.
        arguments: further keyword arguments.
    """

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = inspect.signature(self.call).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
        unknown = sorted(set(self.arguments) - set(names))
        if unknown and not takes_all:
            raise ValueError(
                f"function {self.function!r} has no parameter {unknown[0]!r} that `arguments` could set; it takes "
                f"{', '.join(names)}."
            )
        if "completions" in names:
            columns = (*_trl_columns([]), *self.arguments)
            lacking = [
                name
                for name, parameter in names.items()
                if parameter.default is parameter.empty
                and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
                and name not in columns
            ]
            if lacking:
                raise ValueError(
                    f"function {self.function!r} needs {lacking[0]!r}, which it would not get: the columns here are "
                    f"{', '.join(_trl_columns([]))}. Give the parameter a default, or set it in `arguments`."
                )

    @property
    def version(self) -> str | None:
        """SHA-256 of the file that the function is written in; None without one."""
        place = self.function.rpartition(":")[0]
        module = inspect.getmodule(inspect.unwrap(self.call))
        file = place if place.endswith(".py") else inspect.getsourcefile(module) if module is not None else None
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file is not None else None

    @cached_property
    def call(self) -> Callable[..., Any]:
        """The function itself.

        Raises:
            ValueError: naming the module, file or name that is not there.
        """
        place, _, name = self.function.rpartition(":")
        if not place or not name:
            raise ValueError(
                f"function is {self.function!r}; name it as `package.module:name` or `path/to/file.py:name`, with a colon."
            )
        try:
            module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        except (ImportError, OSError, SyntaxError) as error:
            raise ValueError(
                f"function {self.function!r}: {place} could not be imported ({error}). Check the path, or that the package is "
                "installed where this runs."
            ) from error
        found = getattr(module, name, None)
        if not callable(found):
            known = [
                key
                for key, value in vars(module).items()
                if inspect.isfunction(value) and value.__module__ == module.__name__
            ]
            raise ValueError(
                f"function {self.function!r}: {place} has no function {name!r}; it has {', '.join(known) or 'none'}."
            )
        return found

    def score(self, responses: Sequence[Response]) -> dict[str, torch.Tensor]:
        """What the function returns, (N,) by term; the only term of a plain list is called `value`.

        Raises:
            ValueError: if it returns too few numbers, or something that is no number.
        """
        parameters = inspect.signature(self.call).parameters
        if "completions" in parameters:
            columns = _trl_columns(responses)
            takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
            given = {name: column for name, column in columns.items() if takes_all or name in parameters}
            returned = self.call(**given, **self.arguments)
        else:
            returned = self.call(list(responses), **self.arguments)
        terms = returned if isinstance(returned, Mapping) else {"value": returned}
        return {str(term): self._tensor(term, values, len(responses)) for term, values in terms.items()}

    def _tensor(self, term: str, values: Any, count: int) -> torch.Tensor:
        import torch

        if isinstance(values, torch.Tensor):
            values = values.detach().float().cpu().tolist()
        elif hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, (list, tuple)) or len(values) != count:
            size = f"{len(values)} values" if isinstance(values, (list, tuple)) else f"a {type(values).__name__}"
            raise ValueError(
                f"function {self.function!r} returned {size} ({term}) for {count} response(s), so that nobody knows whose they "
                "are. Return one number for each response, in order."
            )
        values = [one.item() if getattr(one, "ndim", None) == 0 else one for one in values]
        bad = next((one for one in values if not _is_score(one)), None)
        if bad is not None:
            raise ValueError(
                f"function {self.function!r} returned {bad!r} ({term}) as a score. Return finite numbers, and None where a "
                "response has no score."
            )
        return torch.tensor([math.nan if value is None else float(value) for value in values])


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not math.isinf(value))


def _trl_columns(responses: Sequence[Response]) -> dict[str, list[Any]]:
    return {
        "prompts": [one.messages for one in responses],
        "completions": [[{"role": "assistant", "content": one.text}] for one in responses],
        "id": [one.id for one in responses],
        "images": [one.images for one in responses],
        "answer": [one.answer for one in responses],
        "facts": [one.facts for one in responses],
    }


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.name!r} in {path.parent.name or '.'}/")
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]  # two files of one name are two modules
    spec = importlib.util.spec_from_file_location(f"prefalign_function_{path.stem}_{place}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module

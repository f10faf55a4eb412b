"""Find the stages and configs that travel with the package, in a checkout and in an installed wheel alike."""

from __future__ import annotations

import difflib
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from prefalign.config import ConfigError, load, parse_overrides, stated, take_file

STAGE_FOLDERS = ("datagen", "reward_models", "recipes")
PROFILES = {
    "accelerate": "configs/accelerate/*.yaml",
    "deepspeed": "configs/deepspeed/*.json",
    "ray": "recipes/ray/*.yaml",
    "slurm": "recipes/slurm/*.sbatch",
}
"""What a launcher reads, by name: not configs of a stage."""


def root() -> Path:
    """Folder that holds `datagen/`, `recipes/` and `configs/`."""
    inside = Path(__file__).parent / "_bundled"
    return inside if (inside / "configs").is_dir() else Path(__file__).parent.parent


def stages() -> dict[str, Path]:
    """Stage name to file, as in `{"bdhs": .../datagen/bdhs.py}`."""
    files = (file for folder in STAGE_FOLDERS for file in sorted((root() / folder).glob("*.py")))
    return {file.stem: file for file in files if file.stem != "__init__"}


def configs() -> dict[str, Path]:
    """Config name to file, as in `{"datagen/bdhs": .../configs/datagen/bdhs.yaml}`."""
    base = root() / "configs"
    files = {file.relative_to(base).with_suffix("").as_posix(): file for file in sorted(base.rglob("*.yaml"))}
    return {name: file for name, file in files.items() if name.split("/")[0] not in PROFILES}


def stage_of(file: Path) -> str | None:
    """The stage whose command in a config's head names the file; None where no command does (a config of one's own)."""
    head = file.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    named = re.search(rf"prefalign run (\w+) .*--config (?:\S*/)?{re.escape(file.stem)}(?:\.yaml)?(?!\S)", head)
    return named[1] if named else None


def configs_of(stage: str) -> list[str]:
    """Names of the configs for a stage."""
    return [name for name, file in configs().items() if file.stem == stage or stage_of(file) == stage]


def profiles() -> dict[str, Path]:
    """Profile name to file, as in `{"accelerate/zero3": .../configs/accelerate/zero3.yaml}`."""
    return {f"{kind}/{file.stem}": file for kind, files in PROFILES.items() for file in sorted(root().glob(files))}


def find(name: str) -> Path:
    """A stage, config or profile by name, or an existing file by path."""
    known = {**configs(), **profiles()}
    if not name.endswith(".yaml"):
        known = {**stages(), **known}
    return _found(name, known, "stage, config or file")


def find_config(name: str) -> Path:
    """A config by name, or an existing file by path: what `--config` takes."""
    return _found(name, configs(), "config or file")


def _found(name: str, known: Mapping[str, Path], kind: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    bare = name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".json")
    if bare in known:
        return known[bare]
    raise ConfigError(_missing(name, known, kind))


def _missing(name: str, known: Iterable[str], kind: str) -> str:
    """That there is nothing of a name, whether it is a file's or not, and what is near: a known name, or the last part of one."""
    names = {entry.rpartition("/")[2]: entry for entry in known} | {entry: entry for entry in known}
    bare = name.removeprefix("configs/").removesuffix(Path(name).suffix)
    close = [near for word in (bare, Path(bare).name) for near in difflib.get_close_matches(word, names, n=1)]
    hint = f"did you mean {names[close[0]]!r}? " if close else ""
    if Path(name).suffix in (".yaml", ".yml", ".py"):
        where = "" if Path(name).is_absolute() else " in the current folder"
        return f"no file {name!r}{where}, nor among the bundled ones; {hint}`prefalign list` names those."
    return f"no {kind} called {name!r}; {hint}`prefalign list` names the bundled ones."


def load_stage(name: str) -> ModuleType:
    """Import a stage by bundled name or file path. It has `Config`, `main(config)` and a docstring."""
    known = stages()
    path = known.get(name, Path(name))
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(_missing(name, known, "stage"))
    spec = importlib.util.spec_from_file_location(f"prefalign_stage_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def resolve(name: str, stage: ModuleType, arguments: Sequence[str], *, default_config: str | None = None) -> Any:
    """The config that the arguments of `prefalign run` ask for.

    A bundled config names rows and, where theirs are files, the folder of their pictures. Rows given in their place (`data.path`
    without `data.images`) do not have their pictures there, so that folder is left out. A file of one's own means what it says.

    Args:
        name: the stage's name or file.
        stage: its module.
        arguments: `--config FILE` and settings.
        default_config: read where no `--config` is given.

    Raises:
        ConfigError: it cannot be used; if it is another stage's, that is said too.
    """
    named, overrides = take_file(arguments)
    chosen = named or default_config
    file = find_config(chosen) if chosen else None
    data = parse_overrides(overrides, stage.Config).get("data")
    other_rows = isinstance(data, dict) and "path" in data and "images" not in data
    ours = root().resolve() / "configs"
    if file is not None and file.resolve().is_relative_to(ours) and other_rows and stated(file, "data.images"):
        overrides = [*overrides, "--data.images", "null"]
    try:
        return load(stage.Config, file, overrides)
    except ConfigError as error:
        other, asked = stage_of(file) if file else None, Path(name).stem
        if other == asked or other not in stages():
            raise
        lines = [f"{chosen} is a config of {other}, as its head says: `prefalign run {other} --config {chosen}`."]
        if own := configs_of(asked):
            lines.append(f"Configs of {asked}: {', '.join(own)}.")
        raise ConfigError("\n".join([str(error), *lines])) from None


def rows_folder(stage: ModuleType, config: Any) -> Path:
    """The folder of the rows whose manifest a stage's `main` returns: `output.path`, or what its own `rows_folder(config)` says,
    where that holds several (`quality_pairs`)."""
    own = getattr(stage, "rows_folder", None)
    return Path(own(config) if callable(own) else config.output.path)

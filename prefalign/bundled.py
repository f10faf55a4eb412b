"""Find the stages and configs that travel with the package, in a checkout and in an installed wheel alike."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from prefalign.config import Config, ConfigError, load, nearest, parse_overrides, stated

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


def profiles() -> dict[str, Path]:
    """Profile name to file, as in `{"accelerate/zero3": .../configs/accelerate/zero3.yaml}`."""
    return {f"{kind}/{file.stem}": file for kind, files in PROFILES.items() for file in sorted(root().glob(files))}


def find(name: str) -> Path:
    """A stage, config or profile by name, or an existing file by path."""
    if Path(name).is_file():
        return Path(name)
    known = {**stages(), **configs(), **profiles()}
    bare = name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".json")
    if bare in known:
        return known[bare]
    raise ConfigError(f"no stage, config or file called {name!r}; {nearest(bare, list(known))}")


def load_stage(name: str) -> ModuleType:
    """Import a stage by bundled name or file path. It has `Config`, `main(config)` and a docstring."""
    known = stages()
    path = known.get(name, Path(name))
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"no stage called {name!r}; {nearest(name, list(known))}")
    spec = importlib.util.spec_from_file_location(f"prefalign_stage_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def resolve(cls: type[Config], chosen: str | None, overrides: Sequence[str]) -> Config:
    """The config of a stage, from a file and the command line.

    A bundled config names rows and, where theirs are files, the folder of their pictures. Rows given in their place (`data.path`
    without `data.images`) do not have their pictures there, so that folder is left out. A file of one's own means what it says.

    Args:
        cls: the stage's `Config`.
        chosen: a bundled config by name, or a file; None: the command line says all.
        overrides: `--section.field VALUE`; they win.

    Raises:
        ConfigError: as `config.load` does.
    """
    if chosen is None:
        return load(cls, None, overrides)
    file = find(chosen)
    data = parse_overrides(overrides).get("data")
    other_rows = isinstance(data, dict) and "path" in data and "images" not in data
    if other_rows and file.resolve().is_relative_to(root().resolve() / "configs") and stated(file, "data.images"):
        overrides = [*overrides, "--data.images", "null"]
    return load(cls, file, overrides)


def rows_folder(stage: ModuleType, config: Any) -> Path:
    """The folder of the rows whose manifest a stage's `main` returns: `output.path`, or what its own `rows_folder(config)` says,
    where that holds several (`quality_pairs`)."""
    own = getattr(stage, "rows_folder", None)
    return Path(own(config) if callable(own) else config.output.path)

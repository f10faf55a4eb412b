"""Find the stages and configs that travel with the package, in a checkout and in an installed wheel alike."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from prefalign.config import ConfigError, nearest

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


def rows_folder(stage: ModuleType, config: Any) -> Path:
    """The folder of the rows whose manifest a stage's `main` returns: `output.path`, or what its own `rows_folder(config)` says,
    where that holds several (`quality_pairs`)."""
    own = getattr(stage, "rows_folder", None)
    return Path(own(config) if callable(own) else config.output.path)

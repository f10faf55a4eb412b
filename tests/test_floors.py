"""The oldest versions that pyproject.toml allows are those of constraints-floor.txt, which `make floor` installs."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def versions(lines, operator):
    """Package to the version that follows `operator`."""
    wanted = [Requirement(line) for line in lines]
    return {
        canonicalize_name(one.name): Version(bound.version)
        for one in wanted
        for bound in one.specifier
        if bound.operator == operator
    }


def test_each_floor_is_what_make_floor_installs():
    lines = (ROOT / "constraints-floor.txt").read_text().splitlines()
    installed = versions([line for line in lines if not line.startswith("#")], "==")
    elsewhere = {"torch"}  # as constraints-floor.txt says
    extras = [line for name, wanted in EXTRAS.items() if name not in ("vllm", "dev") for line in wanted]
    floors = versions([*PROJECT["dependencies"], *extras], ">=")
    assert {name: floor for name, floor in floors.items() if name not in elsewhere} == {
        name: version for name, version in installed.items() if name in floors
    }
    dev = versions(EXTRAS["dev"], ">=")
    assert {name: version for name, version in installed.items() if name not in floors}.items() <= dev.items()
    assert all(floors[name] == floor for name, floor in dev.items() if name in floors)

"""The wheel carries stages, configs and the base model, and puts one name only into site-packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "tree"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.split("\n")  # fmt: skip
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(source)],
                   check=True, capture_output=True, timeout=300)  # fmt: skip
    return next(target.glob("*.whl"))


def test_one_top_level_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"prefalign"}


def test_everything_that_runs_is_inside(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("datagen", "recipes"):
        for file in (ROOT / folder).glob("*.py"):
            assert f"prefalign/_bundled/{folder}/{file.name}" in names
    for file in [
        *(ROOT / "configs").rglob("*.*"),
        *(ROOT / "recipes").rglob("*.sbatch"),
        *(ROOT / "recipes" / "ray").iterdir(),
    ]:
        assert f"prefalign/_bundled/{file.relative_to(ROOT).as_posix()}" in names
    for file in (ROOT / "prefalign").rglob("*"):
        if file.is_file() and file.suffix != ".pyc" and "__pycache__" not in file.parts:
            assert file.relative_to(ROOT).as_posix() in names, file


def test_installed_wheel_finds_its_stages_from_an_empty_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
        "from prefalign import cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, "path", "datagen/bdhs_scenes"], cwd=tmp_path / "empty",
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "site" / "prefalign" / "_bundled")

"""What is written is true: the README's tree, table and commands, every config, the start-up time of the command."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prefalign import bundled, config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def tree_entries():
    block = re.search(r"## Tree\n+```\n(.*?)```", README, re.DOTALL).group(1)
    folder, entries = "", set()
    for line in block.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if line.startswith(" "):
            entries.update(folder + name for name in names)
        else:
            folder = names[0] if names[0].endswith("/") else ""
            entries.update(names)
    return entries


def test_tree_names_only_what_exists():
    missing = [entry for entry in tree_entries() if not (ROOT / entry).exists()]
    assert not missing


def test_tree_names_every_module_stage_and_folder():
    present = {"Makefile", "pyproject.toml", "constraints.txt", "CONTRIBUTING.md"}
    present |= {f"prefalign/{file.name}" for file in (ROOT / "prefalign").glob("*.py") if file.stem != "__init__"}
    present |= {f"prefalign/{folder.parent.name}/" for folder in (ROOT / "prefalign").glob("*/__init__.py")
                if folder.parent.name != "_bundled"}  # fmt: skip
    for folder in ("datagen", "recipes", "benchmarks"):
        present |= {f"{folder}/{file.name}" for file in (ROOT / folder).glob("*.py")}
    assert not present - tree_entries()


def paper_rows():
    lines = [line for line in README.splitlines() if line.startswith("| [")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("row", paper_rows(), ids=lambda row: row[0][1:10])
def test_paper_table(row):
    _, _, stage, config_file, command = (cell.strip("`") for cell in row)
    assert (ROOT / stage).is_file()
    assert (ROOT / config_file).is_file()
    words = command.split()
    assert words[:2] == ["prefalign", "run"]
    assert words[2] in bundled.stages()
    assert words[4] in bundled.configs()


def test_every_method_has_a_row_and_a_config():
    table = {row[2].strip("`") for row in paper_rows()}
    for name, path in bundled.stages().items():
        if path.parent.name == "datagen":
            assert f"datagen/{name}.py" in table
            assert f"datagen/{name}" in bundled.configs()


def stage_of(name):
    stem = name.split("/")[-1]
    known = [stage for stage in bundled.stages() if stem == stage or stem.startswith(f"{stage}_")]
    return {"evaluate_scenes": "evaluate_model", "evaluate_files": "evaluate_model"}.get(stem) or max(known, key=len)


def test_configs_were_found():
    assert len(bundled.configs()) >= 8
    profiles = {file for name, file in bundled.profiles().items() if not name.startswith(("ray/", "slurm/"))}
    assert profiles | set(bundled.configs().values()) == {
        file for file in (ROOT / "configs").rglob("*") if file.is_file()
    }


@pytest.mark.parametrize("name", bundled.configs())
def test_every_config_resolves_strictly_and_says_how_to_run_it(name):
    path = bundled.configs()[name]
    stage = bundled.load_stage(stage_of(name))
    values = config.read_yaml(path)
    config.build(stage.Config, values, source=name)
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"prefalign run {stage_of(name)}" in header or "prefalign demo" in header
    with pytest.raises(config.ConfigError, match="unknown key"):
        config.build(stage.Config, {**values, "no_such_key": 1}, source=name)


def test_readme_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(
        re.findall(r"(?:^|`)make ([a-z][a-z-]*)", README + (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"--config ([\w/.]+)", README):
        assert bundled.find(name).is_file()


def test_stages_import_only_the_library_and_have_a_main():
    for path in bundled.stages().values():
        module = ast.parse(path.read_text())
        assert ast.get_docstring(module)
        names = {node.name for node in module.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert {"Config", "main"} <= names
        assert not (path.parent / "__init__.py").exists()


def test_importing_and_helping_loads_nothing_heavy():
    code = (
        "import sys, prefalign.cli, prefalign.scenes\n"
        "try: prefalign.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'scipy', 'numpy', 'pyarrow', 'peft', 'huggingface_hub'}\n"
        "loaded = sorted(heavy & set(sys.modules))\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_no_machine_paths_or_stray_characters():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix not in (".py", ".md", ".yaml", ".toml", ".j2", ".css", ".js", "") or not path.is_file():
            continue
        text = path.read_text()
        if path.name != "LICENSE" and not name.startswith("tests/"):
            assert not re.search(r"(?<![\w.])/(work|root|tmp|farm)/", text), name
        if path.suffix == ".py":
            assert text.isascii(), name

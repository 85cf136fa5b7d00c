"""The wheel holds the tool and the packaged models, not how they are made."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("edit_cli", "backbones", "routers")
RECIPES = "backbones/tiny/recipes"
PLOT = "quality.png"
"""A bundle's plot for people, which no command reads."""


def test_nothing_in_the_product_imports_the_recipes():
    importing = re.compile(r"^\s*(from|import) backbones\.tiny\.recipes", re.MULTILINE)
    files = [file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [file for file in files if RECIPES not in str(file) and importing.search(file.read_text())] == []
    assert importing.search((ROOT / RECIPES / "export.py").read_text()), "the recipes import each other"


@pytest.mark.slow
def test_the_wheel_holds_models_and_configurations_but_no_recipes(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in PRODUCT:
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in names if name.startswith(RECIPES)]
    packaged = {
        str(file.relative_to(ROOT))
        for folder in PRODUCT
        for file in (ROOT / folder).rglob("*")
        if file.is_file()
        and "__pycache__" not in file.parts
        and RECIPES not in str(file)
        and file.name != PLOT
    }
    assert packaged <= names

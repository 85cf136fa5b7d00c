"""The docs say what the program does: commands run, references exist, generated pages are current."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BIN = Path(sys.executable).parent


def blocks(language: str, text: str = README) -> list[str]:
    """Fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def edit_lines() -> list[str]:
    """Every `edit ...` command of the README's tour, without comments."""
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [part for line in lines if line.startswith("edit ") for part in line.split(" && ")]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(command)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [BIN / program, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


def test_command_reference_is_current():
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == make_cli.page(), (
        "run: python docs/make_cli.py"
    )
    assert make_cli.TYPED.read_text(encoding="utf-8") == make_cli.typed_options()


def test_ci_runs_what_the_readme_tells():
    """Each step of both commands stands in .ci/run, in an environment of its own."""
    setup = [block.strip() for block in blocks("bash") if block.startswith("python3 -m venv")]
    assert len(setup) == 2
    assert not any("\n" in command for command in setup)
    ci = (ROOT / ".ci" / "run").read_text().replace('"', "").replace(" -q ", " ").replace(" < /dev/null", "")
    ci = ci.replace("$bin/", ".venv/bin/").replace("$work/", "")
    for command in setup:
        for step in command.split(" && "):
            if step not in (
                "python3 -m venv .venv",
                ".venv/bin/pip install -e .",
            ):  # CI installs [dev] for both
                assert step.replace('"', "") in ci.splitlines(), step


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in t]
    missing = [t for t in targets if not (page.parent / t).exists()]
    modules = set(re.findall(r"python -m ((?:benchmarks|backbones)[\w.]*\w)", text))
    missing += [name for name in modules if importlib.util.find_spec(name) is None]
    assert not missing


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / t).resolve() for t in re.findall(r"\]\(([^)#]+)\)", index.read_text("utf-8"))}
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "notes").glob("*.md")]
    assert [page for page in pages if page != index and page not in linked] == []


def test_architecture_names_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w-]+/)*\w+\.py)`", text)
    files = [
        path.as_posix()
        for top in ("edit_cli", "backbones", "routers", "tests")
        for path in (ROOT / top).rglob("*.py")
    ]
    assert len(named) > 20
    assert [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)] == []


def test_readme_shows_commands_that_exist():
    lines = edit_lines()
    assert len(lines) >= 4
    assert any("--compare" in line for line in lines)
    assert any("--dry-run" in line for line in lines)


@pytest.mark.slow
def test_readme_tour_runs_as_written(tmp_path):
    for line in edit_lines():
        done = run(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    several = {f"{prompt}-{seed}.png" for prompt in ("a-cat", "a-red-car") for seed in (0, 1)}
    assert {"half.png", "more.png", "car.png", "cat.png", "cat-3d.png"} | several <= made
    assert (tmp_path / "cat.glb").is_file()


@pytest.mark.slow
def test_readme_python_example_runs_as_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = blocks("python")
    names: dict[str, object] = {}
    exec(example, names)
    assert names["image"].size == (128, 128)
    spent = re.search(r"budget asked 0\.6, spent ([\d.]+)", capsys.readouterr().out)
    assert float(spent[1]) == pytest.approx(0.6, abs=0.01)

"""What spares a look into the docs: help, completion, presets, small options."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import EDIT, edit_environment

FAST = '[fast]\nbudget = 0.4\nnum-images = 2\n\n[default]\nmodel = "flux-tiny"\nsteps = 8\n'
"""A preset, and what holds always."""


def test_help_at_80_columns_cuts_no_option_and_tells_defaults(edit_bare, tmp_path):
    ran = edit_bare("generate", "--help", cwd=tmp_path, COLUMNS="80")
    assert ran.code == 0 and ran.imported is False and "…" not in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    text = " ".join(ran.out.split())
    for words in (
        "--steps, --num-inference-steps N", "--guidance, --guidance-scale, --true-cfg-scale X",
        "or random. (default 0)", "mps or cpu. (default auto)", "(default qwen-image-tiny)", "under [NAME]",
    ):  # fmt: skip
        assert words in text


def test_the_first_page_has_examples_and_every_command(edit_bare, tmp_path):
    ran = edit_bare(cwd=tmp_path)
    assert ran.code == 0 and ran.out == edit_bare("--help", cwd=tmp_path).out and ran.imported is False
    assert 'edit generate "a cat" --budget 0.6' in ran.out
    from edit_cli.commands.app import COMMANDS

    for name, command in COMMANDS.items():
        assert f"  {name} " in ran.out and command.run.__name__ == name.replace("-", "_")


def test_python_m_edit_cli_is_edit(tmp_path):
    command = [sys.executable, "-m", "edit_cli", "genrate"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=edit_environment())
    assert ran.returncode == 2 and "did you mean 'generate'?" in ran.stderr


COMPLETED = [
    ("edit generate -m flux-t", ["flux-tiny"]),
    ("edit generate --solver ", ["euler", "ab2", "dpm++2m"]),
    ("edit generate-3d --decode h", ["hierarchical"]),
    ("edit generate --preset f", ["fast"]),
    ("edit models qwen-image-t", ["qwen-image-tiny"]),
    ("edit gen", ["generate", "generate-3d"]),
]


@pytest.mark.parametrize(("typed", "words"), COMPLETED)
def test_completion(tmp_path, typed, words):
    (tmp_path / "edit.toml").write_text(FAST)
    environment = {"_EDIT_COMPLETE": "complete_bash", "COMP_WORDS": typed}
    environment["COMP_CWORD"] = str(len(typed.split(" ")) - 1)
    ran = subprocess.run(
        [EDIT], capture_output=True, text=True, cwd=tmp_path, env=edit_environment(**environment)
    )
    assert ran.stdout.split() == words


def dry(edit_here, cwd: Path, *arguments: object) -> dict:
    ran = edit_here("generate", "a cat", *arguments, "--dry-run", "--json", cwd=cwd)
    assert ran.code == 0, ran.err
    return ran.json


def test_presets(edit_here, tmp_path, monkeypatch):
    """The folder's file over the user's, what is typed over a preset, that over `default`."""
    user = tmp_path / "home" / "edit.toml"
    user.parent.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(user.parent))
    user.write_text("[fast]\nbudget = 0.9\nseed = 7\n\n[default]\nsteps = 3\n")
    (tmp_path / "edit.toml").write_text(FAST)
    plain = dry(edit_here, tmp_path, "--budget", "1")
    assert (plain["model"], plain["transformer_calls"], plain["seeds"]) == ("flux-tiny", 8, [0])
    fast = dry(edit_here, tmp_path, "--preset", "fast", "--steps", "5")
    assert (fast["budget"], fast["transformer_calls"], fast["seeds"]) == (0.4, 2, [7, 8])
    told = edit_here("generate", "a cat", "--preset", "fast", "--dry-run", cwd=tmp_path).err
    assert "from edit.toml: steps 8, model flux-tiny, budget 0.4, seed 7, count 2" in told.replace("\n", " ")
    shown = edit_here("config", cwd=tmp_path).out
    assert "budget = 0.4  # edit.toml" in shown and f"seed = 7  # {user}" in shown.replace("\n", "")
    assert edit_here("config", "--json", cwd=tmp_path).json["presets"]["fast"]["budget"]["value"] == 0.4


BAD = [
    ("[fast]\nbudgt = 0.4\n", [], "edit.toml: [fast] budgt is unknown; did you mean budget?"),
    ("budget = 0.4\n", [], "edit.toml: budget stands outside of a preset"),
    ("[fast]\nbudget = 3\n", [], "edit.toml: [fast] budget 3 is out of range"),
    ("[fast]\nbudget = [0.4]\nsteps = [1, 2]\n", [], "edit.toml: [fast] steps [1, 2] is a list"),
    ("[fast]\ncompile = 1\n", [], "edit.toml: [fast] compile 1 is not what it takes: true or false"),
    ("[fast]\nsteps = true\n", [], "edit.toml: [fast] steps True is not what it takes: a value, N"),
    ("[fast]\nbudget\n", [], "edit.toml is not TOML:"),
    ("[fast]\nreplay = 'a.png'\n", [], "edit.toml: [fast] replay is unknown"),
    ("[fast]\nbudget = 0.4\n", ["--preset", "slow"], "--preset 'slow' is unknown; known are fast"),
    (None, ["--preset", "fast"], "--preset 'fast': there is neither"),
]


@pytest.mark.parametrize(("text", "arguments", "message"), BAD)
def test_a_bad_preset_is_refused_in_one_line(edit_here, tmp_path, monkeypatch, text, arguments, message):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    if text is not None:
        (tmp_path / "edit.toml").write_text(text)
    ran = edit_here("generate", "a cat", *arguments, "--dry-run", cwd=tmp_path)
    assert ran.code == 2 and ran.err.startswith(f"error: {message}") and len(ran.err.splitlines()) == 1


def test_random_seeds_are_new_and_recorded(edit_here, tmp_path):
    seeds = {dry(edit_here, tmp_path, "--seed", "random", "-n", "2")["outputs"][0] for _ in range(3)}
    assert len(seeds) == 3 and all(re.fullmatch(r"a-cat-\d+\.png", Path(name).name) for name in seeds)


@pytest.mark.slow
def test_open_shows_the_result(edit, qwen_folder, tmp_path):
    viewer = tmp_path / "xdg-open"
    viewer.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    viewer.chmod(0o755)
    ran = edit(
        "generate", "a cat", "-m", qwen_folder, "--steps", "2", "--open", "-o", "cat.png", cwd=tmp_path,
        PATH=f"{tmp_path}:/usr/bin:/bin",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    for _ in range(100):
        if (tmp_path / "opened").exists():
            break
        subprocess.run(["sleep", "0.05"])
    assert (tmp_path / "opened").read_text().strip() == "cat.png"

"""Budgets below an eighth, on every packaged model: narrow evaluations, counted and shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.test_cli_3d import disc

MODELS = ("qwen-image-tiny", "flux-tiny", "hunyuan3d-tiny")
GRAIN = 0.025
"""Narrow plans of the packaged models lie no farther apart."""


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    disc().save(tmp_path / "disc.png")
    return tmp_path


def words(model: str, budget: float) -> list[str]:
    command = ["generate-3d", "disc.png"] if "3d" in model else ["generate", "a cat"]
    return [*command, "-m", model, "--budget", str(budget), "--json", "-q"]


@pytest.mark.parametrize("model", MODELS)
def test_little_budgets_buy_narrow_evaluations(model: str, edit_here, desk: Path) -> None:
    ran = edit_here(*words(model, 0.08), "--dry-run", cwd=desk)
    assert ran.code == 0, ran.err
    flops = ran.json["flops"]
    assert 0.08 - GRAIN < flops["spent"] / flops["dense"] <= 0.08
    assert ran.json["transformer_calls"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_they_are_made_and_spend_what_was_foretold(model: str, edit_here, desk: Path) -> None:
    told = edit_here(*words(model, 0.08), "--dry-run", cwd=desk).json["flops"]
    ran = edit_here(*words(model, 0.08), cwd=desk)
    assert ran.code == 0, ran.err
    assert ran.json["spent"] == [pytest.approx(told["spent"] / told["dense"], abs=0.002)]
    assert "with MLPs at width 0." in " ".join(ran.json["notes"])
    assert (desk / ran.json["outputs"][0]).is_file()


@pytest.mark.slow
def test_profile_shows_the_widths(edit_here, desk: Path) -> None:
    ran = edit_here(
        "profile", "a cat", "-m", "qwen-image-tiny", "--budget", "0.08", "--repeats", "1", "-o", "r", cwd=desk
    )
    assert ran.code == 0, ran.err
    assert "MLP width where computed" in ran.out, "widths are what is worth seeing"
    run = json.loads((desk / "r" / "trace.json").read_text())["runs"][1]
    codes = {code for sample in run["actions"] for rows in sample.values() for row in rows for code in row}
    assert codes & set("123"), codes
    assert np.mean(run["spent"]) == pytest.approx(0.08, abs=GRAIN)

"""The benchmarks of single bundles run from end to end at the smallest size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import memory, quality, strip, trained

pytestmark = pytest.mark.slow


def test_quality_measures_a_bundle_and_what_needs_none(flux_folder: Path, monkeypatch, capsys) -> None:
    words = ["--count", "2", "--seeds", "1", "--rows", "2", "--steps", "4", "--budgets", "0.5", "--markdown"]
    monkeypatch.setattr(sys, "argv", ["quality", "-m", str(flux_folder), *words])
    quality.main()
    printed = capsys.readouterr().out
    rows = {row["method"]: row for row in json.loads(printed.splitlines()[-1])["rows"]}
    assert set(rows) == set(quality.METHODS)
    assert all(rows[name]["spent"] == 0.5 for name in ("elastic", "elastic, no bundle", "fewer steps"))
    assert "| 0.5 | elastic, no bundle | 0.500 |" in printed


def test_trained_routers_beside_plans(qwen_folder: Path, tmp_path: Path, edit_here, capsys) -> None:
    words = ["--method", "train", "--train-steps", "1", "--samples", "2", "--batch-size", "2"]
    made = edit_here("calibrate", "-m", qwen_folder, "-o", "b", *words, "--budgets", "0.6:1:2", cwd=tmp_path)
    assert made.code == 0, made.err
    capsys.readouterr()
    trained.main([str(tmp_path / "b"), "--model", str(qwen_folder), "--rows", "2", "--budgets", "0.7", "0.9"])
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["table"]
    assert [row["method"] for row in table] == [*trained.METHODS] * 2
    plans = [row for row in table if row["method"] in ("packaged bundle", "no bundle")]
    assert all(row["spent"] == int(4 * row["budget"]) / 4 for row in plans), "whole evaluations of four steps"


def test_the_strip_has_a_column_for_each_budget(qwen_folder: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "strip.png"
    assert strip.main(["--model", str(qwen_folder), "--prompt", "a cat", "-o", str(target)]) == 0
    assert target.is_file() and "budget 0.5: spent 0.500" in capsys.readouterr().out


def test_memory_of_a_calibration_is_taken(flux_folder: Path) -> None:
    """The commands are those of `edit`, at the size that is compared."""
    generate, calibrate = memory.commands(str(flux_folder))
    assert memory.peak([*generate, "--steps", "2"]) > 100 < memory.peak([*calibrate, "--steps", "2"])

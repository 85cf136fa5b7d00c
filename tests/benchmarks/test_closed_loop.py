"""Plans in time as rivals: what they spend, and the command from end to end."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from benchmarks import closed_loop, pareto
from benchmarks.bench import Attached, run_quality
from benchmarks.pareto_store import Point
from tests.tiny_pipelines import make_flux


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory) -> Path:
    return make_flux(tmp_path_factory.mktemp("flux"))


def open_bench(folder: Path) -> pareto.Bench:
    """A bench of a random pipeline."""
    return pareto.open_bench(pareto.parse([str(folder), "--quick", "--steps", "6"]))


def test_a_budget_buys_whole_evaluations_and_they_are_what_is_spent(flux_folder: Path) -> None:
    bench = open_bench(flux_folder)
    ways = {way.name: way for way in closed_loop.ways([0.5], [1])}
    dense = run_quality(bench, Attached(bench.num_steps, nullcontext), 2)[1]
    for name in ("AB2, shift 2.2", "elastic, no bundle, exact", "closed loop, 1 sample, dense"):
        with ways[name].attached(bench, ways[name].settings[0]) as attached:
            results, flops = run_quality(bench, attached, 2, dense)
        assert flops == pytest.approx(0.5) and len(results) == len(bench.prompts)
    assert closed_loop.evaluations_of(bench, {"budget": 0.49}) == 2
    assert closed_loop.evaluations_of(bench, {"budget": 0.01}) == 1


def test_a_recorded_run_is_the_pipelines_own(flux_folder: Path) -> None:
    bench = open_bench(flux_folder)
    grid, path = closed_loop.recorded(bench, "dense", 2)
    latents = bench.workload(2, bench.calibration[:2]).run(0)
    assert np.array_equal(path.states[-1].numpy(), latents.numpy())
    assert np.allclose(path.times, grid) and not path.velocities
    assert closed_loop.recorded(bench, "dense", 2)[1] is path


def test_the_best_shift_is_named_per_budget() -> None:
    points = [
        Point(f"AB2, shift {shift}", {"budget": budget}, budget, {"psnr": [value - 1, value + 1]})
        for shift, budget, value in ((1, 0.3, 20), (1, 0.5, 31), (2.2, 0.3, 25), (2.2, 0.5, 30))
    ]
    _, rows = closed_loop.table({p.key: p for p in points}, [0.3, 0.5], "psnr")
    assert rows[-1] == ["AB2, best shift", "25.00", "31.00"]


def test_bad_input_is_one_line(tmp_path: Path, capsys) -> None:
    assert closed_loop.main([str(tmp_path), "--quick", "-o", str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_the_quick_command_compares_and_resumes(flux_folder: Path, tmp_path: Path, capsys) -> None:
    command = [str(flux_folder), "--quick", "--steps", "6", "-o", str(tmp_path / "results")]
    for _ in range(2):
        assert closed_loop.main(command) == 0
        printed = capsys.readouterr().out
        rows = json.loads(printed.splitlines()[-1])["points"]
        assert {row["way"] for row in rows if "budget" in row} == {
            w.name for w in closed_loop.ways([0.5], [1])
        }
        assert "psnr to the exact result" in printed and "AB2, best shift" in printed

"""The comparison: curves against hand-made truths, the results folder, bad input, every rival."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import forecasts, pareto, pareto_run, samplers, scores
from benchmarks.caches import unpack
from benchmarks.pareto_bars import all_bars, verdicts
from benchmarks.pareto_report import RATIOS, aimed, at_time, enough_lines, frontier, ratio_rows
from benchmarks.pareto_run import thinned, with_quality
from benchmarks.pareto_store import Point, Store, point_key
from benchmarks.rivals import Rival
from routers.planned.closed_loop import Recording
from routers.planned.follow import follow
from routers.planned.timeplan import euler

# -- what rivals work on ------------------------------------------------------------------------


def test_latents_are_unpacked_as_the_pipelines_do() -> None:
    from diffusers import FluxPipeline, QwenImagePipeline

    packed = torch.arange(2 * 6 * 8, dtype=torch.float32).view(2, 6, 8)  # 2 x 3 patches of 2 channels
    ours = torch.stack(unpack(packed, 2 / 3))
    assert torch.equal(ours, QwenImagePipeline._unpack_latents(packed, 32, 48, 8))
    assert torch.equal(ours[:, :, 0], FluxPipeline._unpack_latents(packed, 32, 48, 8))
    with pytest.raises(ValueError, match="6 tokens of 8 channels"):
        unpack(packed, 1.0)


# -- curves ------------------------------------------------------------------------------------


def point(rival: str, time: float, psnr: list[float], rows: int = 1) -> Point:
    return Point(rival, {"at": time}, time, {"psnr": psnr}, {rows: [time + 0.2, time, time - 0.1]})


def test_frontier_leaves_out_points_that_a_cheaper_one_beats() -> None:
    points = [point("a", 0.8, [30, 32]), point("a", 0.5, [20, 22]), point("a", 0.6, [18, 20])]
    curve = frontier(points, 1, "psnr")
    assert [time for time, _ in curve] == [0.5, 0.8]
    assert frontier(points, 8, "psnr") == []


def test_scores_between_points_are_linear_and_none_below_the_fastest() -> None:
    curve = frontier([point("a", 0.8, [30, 32]), point("a", 0.4, [20, 26])], 1, "psnr")
    assert at_time(curve, 0.3) is None
    assert at_time(curve, 0.4) == pytest.approx([20, 26])
    assert at_time(curve, 0.5) == pytest.approx([22.5, 27.5])
    assert at_time(curve, 0.9) == pytest.approx([30, 32])


def test_elastic_is_compared_prompt_by_prompt_and_its_largest_deficit_is_named() -> None:
    spread = np.linspace(10, 50, 8)
    ours = [Point("elastic", {"at": t}, t, {"psnr": list(spread + 20 * t)}, {8: [t]}) for t in (0.25, 0.8)]
    rival = [
        Point("rival", {"at": t}, t, {"psnr": list(spread + d)}, {8: [t]}) for t, d in ((0.4, 7), (0.6, 12.5))
    ]
    weak = [Point("elastic, no bundle", {}, 0.2, {"psnr": [90] * 8}, {8: [0.2]})]
    found = all_bars([*ours, *rival, *weak], "psnr")
    reached = (0.4, 0.5, 0.6, 0.8)
    assert [(bar.rows, bar.ratio) for bar in found] == [(n, r) for n in (8, None) for r in reached]
    assert [bar.lead for bar in found[:4]] == pytest.approx([1, 0.25, -0.5, 3.5])
    assert all((bar.low, bar.high) == pytest.approx((bar.lead,) * 2) for bar in found), "the spread cancels"
    assert {bar.rival for bar in found} == {"rival"}, "other ways of elastic are no rivals"
    text = verdicts(found, "psnr")[0]
    assert "at time, batch 8: ahead outside the interval at 3 of 4" in text
    assert "deficit 0.50 at 0.6, to rival" in text


def test_of_chamfer_distances_the_least_is_best() -> None:
    points = [Point(n, {"at": t}, t, {"chamfer": [v] * 4}, {1: [t]})
              for n, t, v in (("elastic", 0.3, 0.02), ("elastic", 0.6, 0.01), ("a", 0.4, 0.05))]  # fmt: skip
    assert [v.mean() for _, v in frontier(points, 1, "chamfer")] == pytest.approx([0.02, 0.01])
    assert all(bar.low > 0 for bar in all_bars(points, "chamfer"))
    _, rows = ratio_rows(points[:1] + points[2:], points[0], None, "chamfer")
    cells = dict(zip(("rival", *RATIOS), rows[0], strict=False))
    assert (cells["rival"], cells[0.25], cells[0.4]) == ("elastic", "-", "**0.0200**")


def test_a_point_with_a_target_counts_where_it_aims() -> None:
    scores_of = {"psnr": [30.0], "psnr_truth": [20.0]}
    points = [
        Point("a", {"target": t, "budget": b}, b, scores_of) for t in ("dense", "exact") for b in (0.3, 0.5)
    ]
    points.append(Point("b", {}, 0.4, scores_of))
    assert [p.rival for p in aimed(points, "psnr")] == ["a", "a", "b"]
    assert {p.setting.get("target") for p in aimed(points, "psnr_truth")} == {"exact", None}


def test_the_least_share_that_is_as_near_as_the_dense_run_is_named() -> None:
    points = [
        Point("a", {"at": t}, t, {"psnr_truth": [v]}) for t, v in ((0.3, 28.0), (0.4, 32.0), (0.6, 40.0))
    ]
    points.append(Point("b", {}, 0.5, {"psnr_truth": [29.0]}))
    dense = Point("dense", {}, 1.0, {"psnr_truth": [30.0]})
    assert [line[line.index("share") :] for line in enough_lines(points, dense, "psnr_truth")] == [
        "share of 0.35 on: a"
    ]


# -- samplers ----------------------------------------------------------------------------------


def gaussian(x: torch.Tensor, s: float) -> torch.Tensor:
    """The flow to Gaussian data, of another variance in each column."""
    variance = torch.tensor([0.05, 0.5, 3.0], dtype=torch.float64)
    return (s - (1 - s) * variance) / ((1 - s) ** 2 * variance + s**2) * x


NOISE = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRID = np.linspace(1, 0, 21)


@pytest.mark.parametrize("name", samplers.SOLVERS)
def test_samplers_converge_at_their_order(name: str) -> None:
    exact = follow(gaussian, NOISE, samplers.SOLVERS["AB2"](GRID, 600, 1.5))

    def error(solver: str, evaluations: int) -> float:
        end = follow(gaussian, NOISE, samplers.SOLVERS[solver](GRID, evaluations, 1.5))
        return float((end - exact).norm())

    assert error(name, 160) < error(name, 40) / 3
    assert name == "Euler" or error(name, 160) < error("Euler", 160) / 3


def test_dpm_solver_is_the_one_that_pipelines_get() -> None:
    from backbones.solvers import DpmSolver2M

    plan, own, x = samplers.SOLVERS["DPM++(2M)"](GRID, 8, 1.5), DpmSolver2M(), NOISE
    for now, then in itertools.pairwise(plan.times.tolist()):
        x = own.advance(x, gaussian(x, now), now, then)
    assert torch.allclose(follow(gaussian, NOISE, plan), x)


def test_optimal_steps_are_nearer_than_even_ones() -> None:
    recording = Recording(samplers.SOLVERS["AB2"](GRID, 100, 1.5))
    end = follow(gaussian, NOISE, recording)
    times = samplers.optimal_steps(recording.trajectory, 6)
    assert len(times) == 7 and (times[0], times[-1]) == (1.0, 0.0)
    near, even = (
        float((follow(gaussian, NOISE, euler(t)) - end).norm()) for t in (times, np.linspace(1, 0, 7))
    )
    assert near < even


def test_settings_are_thinned_evenly_with_both_ends() -> None:
    rival = Rival("r", tuple({"steps": n} for n in range(9)), lambda bench, setting: None)
    assert [s["steps"] for s in thinned(rival, 3).settings] == [0, 4, 8]
    assert [s["steps"] for s in thinned(rival, 1).settings] == [4]
    assert thinned(rival, None) is rival and thinned(rival, 20) is rival


def test_time_is_taken_where_quality_is_known(tmp_path: Path) -> None:
    store = Store(tmp_path, {"model": "m"})
    rivals = [Rival(name, tuple({"steps": n} for n in (4, 8)), lambda bench, setting: None) for name in "ab"]
    assert with_quality(store, rivals) == []
    store.add_point(Point("b", {"steps": 8}, 0.4, {"psnr": [30.0]}))
    (left,) = with_quality(store, rivals)
    assert left.name == "b" and left.settings == ({"steps": 8},)


def test_interval_is_the_mean_of_equal_values_and_shrinks_with_their_number() -> None:
    assert scores.mean_interval(np.full(5, 3.0)) == (3, 3, 3)
    random = np.random.default_rng(1).normal(size=1600)
    few, many = (scores.mean_interval(random[:n]) for n in (100, 1600))
    assert few[2] - few[1] == pytest.approx(4 * (many[2] - many[1]), rel=0.4)
    assert few[2] - few[1] == pytest.approx(2 * 1.96 / 10, rel=0.3)


# -- the results folder ------------------------------------------------------------------------


def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    asked = {"model": "m", "count": 2}
    store = Store(tmp_path / "r", asked)
    whole = Point("a", {"threshold": 0.1}, 0.5, {"psnr": [30.0, 31.0]})
    store.add_point(whole)
    store.add_time(whole.key, 8, 0, seconds=1.0, dense=2.0)
    with store.points.open("a") as file:
        file.write('{"rival": "b", "setting": {"thr')  # a kill in the middle of a line
    again = Store(tmp_path / "r", asked)
    found = again.load()
    assert list(found) == ["a threshold=0.1"] and found[whole.key].times == {8: [0.5]}
    assert again.timed() == {(whole.key, 8, 0)}
    again.add_point(Point("b", {}, 0.7, {"psnr": [1.0, 2.0]}))
    assert list(again.load()) == ["a threshold=0.1", "b"]
    again.forget(["a"])
    assert list(again.load()) == ["b"] and again.timed() == set()


def test_another_comparison_is_not_mixed_in(tmp_path: Path) -> None:
    Store(tmp_path, {"model": "m", "count": 2})
    with pytest.raises(ValueError, match=r"other count \(count 2, now 3\); give another folder with -o"):
        Store(tmp_path, {"model": "m", "count": 3})


def test_what_another_bundle_measured_counts_as_not_measured(tmp_path: Path) -> None:
    asked = {"model": "m"}
    old, rival = (
        Point(name, {}, 0.5, {"psnr": [30.0]}, bundle=b) for name, b in (("elastic", "a"), ("x", None))
    )
    store = Store(tmp_path, asked, bundle="a")
    for point in (old, rival):
        store.add_point(point)
        store.add_time(point.key, 1, 0, 1.0, 2.0, point.bundle)
    assert set(store.load()) == {"elastic", "x"}
    refitted = Store(tmp_path, asked, bundle="b")
    assert set(refitted.load()) == {"x"} and refitted.timed() == {("x", 1, 0)}
    new = Point("elastic", {}, 0.5, {"psnr": [33.0]}, bundle="b")
    refitted.add_point(new)
    refitted.add_time(new.key, 1, 0, 1.0, 4.0, new.bundle)
    assert refitted.load()["elastic"].scores == new.scores and refitted.load()["elastic"].times == {1: [0.25]}
    assert store.load()["elastic"].scores == old.scores, "nothing was lost"


def test_default_prompts_are_known_to_the_classifier_and_unseen_in_calibration() -> None:
    prompts = scores.default_prompts(160)
    assert len(set(prompts)) == 160
    assert not set(prompts) & set(scores.read_prompts(scores.CALIBRATION))
    from PIL import Image

    hits = scores.accuracy([Image.new("RGB", (64, 64))] * 160, prompts)
    assert hits is not None and hits[0].mean() <= hits[1].mean() < 0.1
    assert scores.accuracy([Image.new("RGB", (64, 64))], ["an unheard-of thing"]) is None


BAD = [
    (["--count", "0"], "--count is 0; allowed is 1 or more"),
    (["--rounds", "-1"], "--rounds is -1; allowed is 0 or more"),
    (["--settings", "0"], "--settings is 0; allowed is 1 or more"),
    (["--images", "missing"], "makes pictures: use `edit generate -m"),
    (["--steps", "2"], "--steps is 2; allowed is 4 or more"),
    (["--batch-sizes", "1", "0"], "--batch-sizes holds 0; allowed is 1 or more"),
    (["--count", "9999"], "--count 9999 exceeds the"),
    (["--prompts", "missing.txt"], "--prompts 'missing.txt' cannot be read"),
    (["--prompts", "two.txt", "--count", "3"], "'two.txt' holds 2 prompts, --count asks for 3; lower it"),
    (["--rivals", "nothing"], "unknown rival 'nothing'; known are elastic, "),
    (["--routers", "."], "is not a bundle folder: bundle.json is missing"),
    (["-o", "two.txt"], "results folder 'two.txt' cannot be made"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments, message, qwen_folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("a cat\n\na dog\n")
    try:
        code = pareto.main([str(qwen_folder), *arguments])
    except SystemExit as error:  # argparse
        code = error.code
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err and "Traceback" not in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["two.txt"]


def test_unknown_model_is_bad_input(capsys) -> None:
    assert pareto.main(["/no/such/folder"]) == 2
    assert "does not exist" in capsys.readouterr().err


# -- every rival -------------------------------------------------------------------------------


def open_bench(folder: Path, steps: int = 8):
    args = pareto.parse([str(folder), "--quick", "--steps", str(steps)])
    bench = pareto.open_bench(args)
    with torch.no_grad():
        for (
            parameter
        ) in bench.transformer.parameters():  # random modulations are near zero: make blocks matter
            if parameter.dim() == 1:
                parameter.add_(
                    0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                )
    return bench


def attributes(pipe) -> list[set[str]]:
    return [set(vars(part)) for part in (pipe, type(pipe), *pipe.transformer.modules())]


OURS = {
    "elastic", "elastic, no bundle", *samplers.SOLVERS, "OptimalSteps", "whole-step reuse", "random skip",
    "TeaCache-style", *forecasts.NAMES, "EasyCache",
}  # fmt: skip
"""Ways that run on every model."""
CACHES = ("FirstBlockCache", "MagCache", "TaylorSeer", "TaylorSeer lite", "SeaCache")
DIFFUSERS_CACHES = {*CACHES, *(f"{name} + AB2" for name in CACHES)}
"""diffusers' own, which know the blocks of the picture models."""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "flux", "mesh"])
def test_every_rival_saves_flops_and_leaves_no_trace(family: str, request: pytest.FixtureRequest) -> None:
    """Dense output is bit-identical before and after, and something is saved at one of two settings."""
    from benchmarks.bench import run_quality
    from benchmarks.rivals import all_rivals

    excuses = ["cache-dit is not installed"]
    if family == "mesh":
        args = ["hunyuan3d-tiny", "--images", "--quick", "--steps", "8", "--grid", "12"]
        with torch.no_grad():
            bench = pareto.open_bench(pareto.parse(args))
        excuses.append("does not know the blocks")
    else:
        bench = open_bench(request.getfixturevalue(f"{family}_folder"))
        bench.bundle.fingerprint = []
    workload = bench.workload(2)
    with torch.no_grad():
        before, marks = workload.run(0), attributes(bench.pipe)
        dense = dense_flops(bench)
    failed, able = [], set()
    for rival in all_rivals(bench):
        reason = rival.why_not(bench)
        if reason is not None:
            assert any(excuse in reason for excuse in excuses), f"{rival.name}: {reason}"
            continue
        able.add(rival.name)
        ratios = []
        for setting in (rival.settings[0], rival.settings[-1]):
            with torch.no_grad(), rival.attached(bench, setting) as attached:
                pictures, flops = run_quality(bench, attached, 2, dense_flops=dense)
            assert len(pictures) == len(bench.prompts)
            ratios.append(flops)
        if not 0 < min(ratios) < 0.95 or max(ratios) > 1.05:
            failed.append(f"{rival.name} spends {ratios}")
        with torch.no_grad():
            if not torch.equal(workload.run(0), before):
                failed.append(f"{rival.name} changes the dense model")
        if attributes(bench.pipe) != marks:
            failed.append(f"{rival.name} leaves attributes behind")
    assert not failed, "; ".join(failed)
    assert able >= OURS | (set() if family == "mesh" else DIFFUSERS_CACHES)


def dense_flops(bench) -> float:
    from contextlib import nullcontext

    from benchmarks.bench import Attached, run_quality

    if "dense flops" not in bench.memo:
        bench.memo["dense flops"] = run_quality(bench, Attached(bench.num_steps, nullcontext), 2)[1]
    return bench.memo["dense flops"]


@pytest.mark.slow
def test_a_quick_comparison_runs_and_resumes(qwen_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The whole command; a second call measures nothing anew and writes the same points."""
    monkeypatch.chdir(tmp_path)  # references are kept in the present folder
    folder = tmp_path / "results"
    rivals = ["elastic", "Euler", "OptimalSteps", "TeaCache-style"]
    command = [
        str(qwen_folder),
        "--quick",
        "--steps",
        "6",
        "-o",
        str(folder),
        "--rivals",
        *rivals,
        "--markdown",
    ]
    assert pareto.main(command) == 0
    assert "| elastic |" in capsys.readouterr().out
    assert pareto.main([*command, "--timing"]) == 0
    printed = capsys.readouterr().out
    assert "PSNR to exact, dB, at time, batch 2" in printed and "Fréchet distance to dense" in printed
    data = json.loads((folder / "pareto.json").read_text())
    assert [row["rival"] for row in data["points"]] == rivals
    assert set(data["points"][0]["time"]) == {"1", "2"}
    euler_point = data["points"][1]
    assert euler_point["flops"] == pytest.approx(
        int(euler_point["setting"]["budget"] * 6 + 1e-6) / 6, rel=1e-6
    )
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    (key,) = json.loads((folder / "chosen.json").read_text())
    assert key.startswith("shift of Euler")
    lines = (folder / "points.jsonl").read_text()
    monkeypatch.setattr(pareto_run, "run_quality", None)  # calling it again would fail
    monkeypatch.setattr(pareto_run, "run_timed", None)
    for more in ([], ["--timing"]):
        assert pareto.main([*command, *more]) == 0
    assert (folder / "points.jsonl").read_text() == lines
    assert point_key("dense", {}) in json.loads(lines.splitlines()[0])["rival"]

"""The comparison: curves against hand-made truths, the results folder, bad input, every rival."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import pareto, pareto_report, pareto_run, scores
from benchmarks.caches import unpack
from benchmarks.pareto_bars import accuracy_lines, all_bars, verdicts
from benchmarks.pareto_report import RATIOS, at_time, equal_time, frontier
from benchmarks.pareto_run import thinned, with_quality
from benchmarks.pareto_store import Point, Store, point_key
from benchmarks.rivals import Rival

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


def test_elastic_is_compared_prompt_by_prompt() -> None:
    spread = np.linspace(10, 50, 40)
    points = [
        point("elastic", 0.4, list(spread + 1.0)), point("slow", 0.9, list(spread + 5)),
        point("rival", 0.4, list(spread)), point("close", 0.4, list(spread + 1.0 + 0.5 * np.cos(spread * 9))),
    ]  # fmt: skip
    found = {(row.rival, row.ratio): row for row in equal_time(points, "psnr")}
    mean, low, high = found["rival", 0.5].behind
    assert (mean, low, high) == pytest.approx((1, 1, 1)), "the same prompts: their spread cancels"
    assert found["rival", 0.5].high - found["rival", 0.5].low > 4
    assert found["elastic", 0.5].behind is None and ("slow", 0.5) not in found
    behind = {row.rival: row.behind for row in found.values() if row.ratio == 0.5}
    assert behind["close"][1] < 0 < behind["close"][2]


def test_bars_count_ratios_outside_the_interval_and_name_the_largest_deficit() -> None:
    ours = [Point("elastic", {"at": t}, t, {"psnr": [20 + 20 * t] * 8, "top1": [1, 1, 1, 1, 1, 1, 1, 0]},
                  {8: [t]}) for t in (0.3, 0.9)]  # fmt: skip
    rival = [Point("rival", {"at": t}, t, {"psnr": [d] * 8}, {8: [t]}) for t, d in ((0.4, 27.0), (0.8, 36.5))]
    weak = [Point("elastic, plan alone", {}, 0.3, {"psnr": [90] * 8}, {8: [0.3]})]
    dense = Point("dense", {}, 1.0, {"psnr": [60] * 8, "top1": [1] * 8})
    found = all_bars([*ours, *rival, *weak], dense, "psnr")
    assert [(bar.rows, bar.ratio) for bar in found] == [(n, r) for n in (8, None) for r in RATIOS]
    assert [bar.lead for bar in found[:5]] == pytest.approx([1, 0.625, 0.25, -0.125, -0.5])
    assert {bar.rival for bar in found} == {"rival"}, "the bundle's own variations are no rivals"
    text = verdicts(found, "psnr")[0]
    assert "ahead outside the interval at 3 of 5" in text and "deficit 0.50 at 0.8, to rival" in text
    assert text.endswith("bar not met")
    assert verdicts([bar for bar in found if bar.ratio < 0.8], "psnr")[0].endswith("bar not met"), "3 of 5"
    lines = accuracy_lines(ours, dense)
    assert "top-1 87.5 %, dense 100.0 %, difference -12.5 points" in lines[0] and lines[0].endswith("not met")


def test_of_chamfer_distances_the_least_is_best() -> None:
    points = [Point(n, {"at": t}, t, {"chamfer": [v] * 4}, {1: [t]})
              for n, t, v in (("elastic", 0.3, 0.02), ("elastic", 0.6, 0.01), ("a", 0.4, 0.05))]  # fmt: skip
    assert [v.mean() for _, v in frontier(points, 1, "chamfer")] == pytest.approx([0.02, 0.01])
    first, second = (row for row in equal_time(points, "chamfer") if row.ratio == 0.4)
    assert (first.rival, second.rival) == ("elastic", "a") and second.behind[0] > 0


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
    (["--phase", "none"], "argument --phase: invalid choice: 'none'"),
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
    "elastic", "elastic, no bundle", "elastic, no bundle, exact", "fewer steps, Euler", "fewer steps, AB2",
    "fewer steps, DPM++(2M)", "whole-step reuse", "random skip", "TeaCache-style",
}  # fmt: skip
"""Ways that run on every model."""
DIFFUSERS_CACHES = {"FirstBlockCache", "MagCache", "TaylorSeer", "TaylorSeer lite", "SeaCache"}
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
    folder = tmp_path / "results"
    rivals = ["elastic", "fewer steps, Euler", "TeaCache-style"]
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
    printed = capsys.readouterr().out
    assert "| elastic |" in printed and "time, batch 2" in printed
    data = json.loads((folder / "pareto.json").read_text())
    assert [row["rival"] for row in data["points"]] == rivals
    assert set(data["points"][0]["time"]) == {"1", "2"}
    fewer = data["points"][1]
    assert fewer["flops"] == pytest.approx(fewer["setting"]["steps"] / 6, rel=1e-6)
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    lines = (folder / "points.jsonl").read_text()
    monkeypatch.setattr(pareto_run, "run_quality", None)  # calling it again would fail
    monkeypatch.setattr(pareto_run, "run_timed", None)
    assert pareto.main(command) == 0
    assert (folder / "points.jsonl").read_text() == lines
    assert point_key("dense", {}) in json.loads(lines.splitlines()[0])["rival"]
    assert pareto_report.batch_sizes(
        Store(folder, json.loads((folder / "run.json").read_text())).load().values()
    )

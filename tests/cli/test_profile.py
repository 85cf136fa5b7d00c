"""`edit profile` on random-weight pipelines, offline: what it measures, shows and writes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from edit_cli.profile.trace import CODES, check_trace
from tests.cli.test_cli_3d import disc

STEPS, BLOCKS, SAMPLES = 6, 4, 2
EVALUATIONS = {"dense": 6, "0.5": 3, "1": 6}
FILES = ["report.html", "heatmap.png", "heatmap.svg", "trace.json", "chrome-trace.json"]


@pytest.fixture(scope="module")
def profiled(edit_here, qwen_folder, tmp_path_factory):
    """One profile that several tests look at."""
    folder = tmp_path_factory.mktemp("profiled")
    ran = edit_here(
        "profile", "a cat", "a </script> dog", "-m", qwen_folder, "--budget", "0.5", "1", "--steps", STEPS,
        "--repeats", "2", "--metric", "reuse", "-o", "report", "--json", cwd=folder,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return folder, ran, json.loads((folder / "report" / "trace.json").read_text())


def test_the_json_object(profiled):
    folder, ran, trace = profiled
    assert len(ran.out.splitlines()) == 1
    found = ran.json
    assert found["outputs"] == [f"report/{name}" for name in FILES]
    assert all((folder / name).is_file() for name in found["outputs"])
    assert [run["name"] for run in found["runs"]] == ["dense", "0.5", "1"]
    assert found["runs"][1]["spent"] == 0.5
    assert found["runs"][2]["spent"] == 1.0
    assert found["warnings"] == trace["warnings"]


def test_the_trace_is_what_its_schema_says(profiled):
    _, _, trace = profiled
    check_trace(trace)
    assert trace["kind"] == "elastic"
    assert [block["kind"] for block in trace["blocks"]] == ["double"] * BLOCKS
    assert trace["branches"] == ["cond", "uncond"]
    for run in trace["runs"]:
        assert len(run["actions"]) == SAMPLES
        assert list(run["seconds"]) == ["load", "text", "denoise", "decode"]
        assert all(seconds > 0 for seconds in run["seconds"].values())
        assert len(run["denoise_repeats"]) == 2


def test_decisions_flops_and_times_agree(profiled):
    _, _, trace = profiled
    dense, elastic, full = trace["runs"]
    codes = "".join(row for sample in elastic["actions"] for rows in sample.values() for row in rows)
    assert len(codes) == SAMPLES * 2 * STEPS * BLOCKS
    assert codes.count("=") == codes.count(CODES[-1]) == len(codes) / 2, "three steps of six are left out"
    for run in (dense, full):
        assert {c for s in run["actions"] for rows in s.values() for row in rows for c in row} == {CODES[-1]}
        assert run["flops"]["spent"] == run["flops"]["dense"]
    assert np.mean(elastic["spent"]) == pytest.approx(
        elastic["flops"]["spent"] / dense["flops"]["spent"], abs=1e-5
    )
    for run in trace["runs"]:
        assert 0 < sum(run["block_flops"]) <= run["flops"]["spent"]
        inside = np.sum(run["block_seconds"])
        assert run["parts"]["cache"] <= inside <= run["parts"]["call"] * 1.5
        assert run["flop_per_second"] == pytest.approx(run["flops"]["spent"] / run["parts"]["call"])
    # a plan reads nothing back and keeps nothing of blocks
    assert elastic["host_reads"] == elastic["cache_bytes"] == dense["cache_bytes"] == 0


def test_the_dry_run_counts_what_is_measured(profiled, edit_here, qwen_folder):
    folder, _, trace = profiled
    words = [
        "generate",
        "a cat",
        "a </script> dog",
        "-m",
        qwen_folder,
        "-b",
        "0.5",
        "--steps",
        STEPS,
        "--dry-run",
    ]
    planned = edit_here(*words, "--json", cwd=folder).json["flops"]
    # the number of text tokens is an estimate before the prompt is tokenised
    assert planned == pytest.approx(trace["runs"][1]["flops"], rel=0.15)


def test_drift_is_zero_where_everything_ran(profiled):
    _, _, trace = profiled
    _, elastic, full = trace["runs"]
    assert np.max(full["drift"]) == 0
    drift = np.array(elastic["drift"], float)
    computed = np.isfinite(drift).all(axis=1)
    assert computed.sum() == EVALUATIONS["0.5"] and np.isnan(drift[~computed]).all()
    assert (drift[0] == 0).all()  # the first step is that of the dense run
    assert drift[computed][-1].min() > 0
    assert full["quality"]["psnr"] == [99.0] * SAMPLES
    assert max(elastic["quality"]["psnr"]) < 99


def test_spans_lie_inside_their_calls(profiled):
    _, _, trace = profiled
    for run in trace["runs"]:
        calls = {(s[1], s[2]): s for s in run["spans"] if s[0] == "call"}
        assert len(calls) == EVALUATIONS[run["name"]] * 2
        blocks = [s for s in run["spans"] if s[0] == "block"]
        assert len(blocks) == EVALUATIONS[run["name"]] * 2 * BLOCKS
        for _, step, branch, _, start, seconds in blocks:
            _, _, _, _, begun, lasted = calls[step, branch]
            assert begun - 1e-6 <= start and start + seconds <= begun + lasted + 1e-5
    timing = trace["timing"]
    assert timing["overhead"] == pytest.approx(
        len(trace["runs"][1]["spans"]) * timing["span_seconds"] / trace_denoise(trace), rel=1e-6
    )
    assert timing["method"] == "time.perf_counter_ns"


def trace_denoise(trace) -> float:
    return float(np.median(trace["runs"][1]["denoise_repeats"]))


def test_chrome_trace_has_complete_events(profiled):
    folder, _, trace = profiled
    events = json.loads((folder / "report" / "chrome-trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == sum(len(run["spans"]) for run in trace["runs"])
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {"dense", "budget 0.5", "budget 1"}
    first = next(event for event in spans if event["cat"] == "block")
    assert first["args"]["decisions"] == {"compute 4/4": SAMPLES}


def test_report_is_one_file_with_its_data(profiled):
    folder, _, _ = profiled
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 1  # the prompt's own is escaped
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    data = json.loads(re.search(r"const D = (.*);\n", page)[1])
    assert data["request"]["samples"][1]["label"] == "a </script> dog"
    assert all(picture.startswith("data:image/png;base64,") for picture in data["runs"][1]["pictures"])


def test_pictures_of_the_maps(profiled):
    folder, _, _ = profiled
    with Image.open(folder / "report" / "heatmap.png") as picture:
        assert picture.width > 800
        colours = picture.convert("RGB").getcolors(100_000)
    assert colours is not None and len(colours) > 20
    svg = (folder / "report" / "heatmap.svg").read_text()
    assert svg.count("<rect") > 2 * STEPS * BLOCKS
    assert "blocks reused" in svg


def test_terminal_view(profiled):
    _, ran, _ = profiled
    expected = (
        "blocks reused", "budget 0.5, spent", "double 0", "blocks by kind", "denoise", "host reads",
        "no budget can make the whole faster than", "time.perf_counter_ns", "profiling",
    )  # fmt: skip
    shown = " ".join(ran.err.split())  # where lines are wrapped depends on how long the figures are
    for words in expected:
        assert words in shown, words


@pytest.mark.parametrize("metric", ["skip", "width", "error", "time"])
def test_a_trace_is_shown_again(profiled, edit_here, metric):
    folder, _, trace = profiled
    ran = edit_here("profile", "--from", "report/trace.json", "--metric", metric, "--quiet", "-o",
                    f"again-{metric}", "--json", cwd=folder)  # fmt: skip
    assert ran.code == 0, ran.err
    again = json.loads((folder / f"again-{metric}" / "trace.json").read_text())
    assert again == trace
    maps = [(folder / name / "heatmap.png").read_bytes() for name in ("report", f"again-{metric}")]
    assert maps[0] != maps[1]
    kept = folder / f"again-{metric}" / trace["runs"][0]["pictures"][0]
    assert kept.read_bytes() == (folder / "report" / trace["runs"][0]["pictures"][0]).read_bytes()


def test_a_plan_that_needs_no_bundle_is_profiled(edit_here, flux_folder, tmp_path):
    ran = edit_here("profile", "a cat", "--routers", "none", "-m", flux_folder, "--steps", "4", "-b", "0.5",
                    "--repeats", "1", "-o", "report", "--json", cwd=tmp_path)  # fmt: skip
    assert ran.code == 0, ran.err
    trace = json.loads((tmp_path / "report" / "trace.json").read_text())
    check_trace(trace)
    assert (trace["bundle"], trace["runs"][1]["spent"]) == (None, [0.5])
    (rows,) = trace["runs"][1]["actions"][0].values()
    assert sorted(rows) == ["4" * 5] * 2 + ["=" * 5] * 2 and rows[0] == "4" * 5


def test_dense_profile_maps_redundancy(edit_here, flux_folder, tmp_path):
    ran = edit_here("profile", "--dense", "a cat", "--samples", "2", "-m", flux_folder, "--steps", "3",
                    "--repeats", "1", "-o", "map", "--metric", "cost", cwd=tmp_path)  # fmt: skip
    assert ran.code == 0, ran.err
    trace = json.loads((tmp_path / "map" / "trace.json").read_text())
    check_trace(trace)
    assert trace["kind"] == "dense"
    assert [run["name"] for run in trace["runs"]] == ["dense"]
    assert [block["kind"] for block in trace["blocks"]] == ["double"] * 2 + ["single"] * 3
    maps = {name: np.array(rows, float) for name, rows in trace["maps"].items()}
    assert all(values.shape == (3, 5) for values in maps.values())
    assert (maps["adds"] > 0).all() and (maps["cost"] > 0).all()
    assert np.isnan(maps["similarity"][0]).all()  # nothing before the first step
    assert (np.abs(maps["similarity"][1:]) <= 1 + 1e-6).all()
    assert trace["probed_steps"] == [0, 1, 2]
    assert "cost of skipping it alone" in ran.out


def test_meshes_are_profiled(edit_here, mesh_folder, tmp_path):
    disc().save(tmp_path / "cat.png")
    ran = edit_here("profile", "--images", "cat.png", "-m", mesh_folder, "-b", "0.5", "--steps", "4",
                    "--repeats", "1", "--octree-resolution", "16", "-o", "report", cwd=tmp_path)  # fmt: skip
    assert ran.code == 0, ran.err
    trace = json.loads((tmp_path / "report" / "trace.json").read_text())
    check_trace(trace)
    assert trace["branches"] == ["cond", "uncond"]  # two rows of one batched call
    assert list(trace["runs"][0]["seconds"])[:5] == ["load", "condition", "denoise", "decode", "extract"]
    assert trace["runs"][1]["spent"] == [0.5]
    assert set(trace["runs"][1]["quality"]) == {"chamfer", "f_score", "iou"}
    with Image.open(tmp_path / "report" / trace["runs"][1]["pictures"][0]) as picture:
        assert picture.size == (224, 224)
    assert trace["request"]["samples"][0]["label"] == "cat"

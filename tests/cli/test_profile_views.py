"""The views of `edit profile`, from a trace small enough to check by hand, and what it refuses."""

from __future__ import annotations

import copy
import errno
import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from edit_cli.errors import RunError
from edit_cli.profile import report as profile_report
from edit_cli.profile.heatmap import RAMP, colour_at, draw_heatmaps
from edit_cli.profile.terminal import heatmap, kinds
from edit_cli.profile.trace import check_trace, default_metric, grid, scale_of
from edit_cli.profile.warnings import limits, warnings_of
from tests.conftest import EDIT, edit_environment

MADE = {"device": "cpu", "device_name": "x", "dtype": "float32", "threads": 1}
TIMING = {
    "method": "m", "repeats": 2, "warm_up": "w", "statistic": "s", "spans": 1, "span_seconds": 1e-6,
    "overhead": 0.001, "overhead_compared": None,
}  # fmt: skip


def make_trace(**changes) -> dict:
    """A trace of 2 steps, 3 blocks and one sample, small enough to check by hand."""
    run = {
        "budget": 1.0, "spent": [1.0], "flops": {"dense": 100.0, "spent": 100.0},
        "seconds": {"load": 5.0, "text": 1.0, "denoise": 8.0, "decode": 1.0}, "denoise_repeats": [8.0, 8.0],
        "parts": {"call": 7.0, "decide": 0.1, "block": 6.0, "cache": 0.0, "router": 0.0},
        "flop_per_second": 14.0, "calls": 2, "host_reads": 2, "host_reads_per_step": 1.0, "cache_bytes": 0,
        "peak_bytes": 2**20, "actions": [{"main": ["444", "444"]}],
        "block_seconds": [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], "block_flops": [30.0, 30.0, 30.0],
        "drift": None, "quality": {}, "pictures": [], "spans": [],
    }  # fmt: skip
    elastic = copy.deepcopy(run) | {
        "name": "0.5", "budget": 0.5, "spent": [0.5], "cache_bytes": 3 * 2**20,
        "actions": [{"main": ["444", "-=2"]}], "drift": [[0.0, 0.0, 0.0], [0.1, 0.2, None]],
        "seconds": {"load": 5.0, "text": 1.0, "denoise": 5.0, "decode": 1.0}, "quality": {"psnr": [20.0]},
    }  # fmt: skip
    trace = {
        "format": "edit-trace", "version": 1, "kind": "elastic", "model": "toy", "family": "Toy",
        "made": MADE, "bundle": {"num_steps": 2, "guidance": 4.0},
        "maps": {}, "probed_steps": [],
        "request": {"steps": 2, "guidance": 4.0, "size": "8x8", "samples": [{"label": "a", "seed": 0}]},
        "blocks": [{"kind": "double"}, {"kind": "double"}, {"kind": "single"}], "branches": ["main"],
        "timing": TIMING, "limits": {"share": 0.6, "fastest": 2.5}, "warnings": [],
        "runs": [{"name": "dense", **run}, elastic],
    }  # fmt: skip
    trace["runs"][1] |= changes
    return trace


# -- what is said ------------------------------------------------------------------------------------


def test_amdahl():
    found = limits(make_trace())
    # 10 s after loading, 6 s of it in blocks
    assert found["share"] == pytest.approx(0.6)
    assert found["fastest"] == pytest.approx(10 / 4)
    assert found["at_0.5"] == pytest.approx(10 / 7)


SAID = [
    ({}, None),
    ({"actions": [{"main": ["444", "444"]}]}, "budget 0.5: nothing was skipped"),
    ({"seconds": {"load": 5.0, "text": 1.0, "denoise": 9.0, "decode": 1.0}}, "budget 0.5: slower than dense"),
    ({"cache_bytes": 65 * 2**20}, "the feature cache took 65 MiB, more than --cache-limit 64"),
    ({"denoise_repeats": [4.0, 8.0]}, "repeats differ by up to 67 %"),
]


@pytest.mark.parametrize(("changes", "message"), SAID, ids=[str(message)[:30] for _, message in SAID])
def test_warnings_of_a_run(changes, message):
    found = warnings_of(make_trace(**changes), cache_limit=64)
    assert len(found) == (message is not None)
    assert message is None or message.replace(" %", "%") in found[0].replace(" %", "%")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("bundle", "num_steps"), 20, "fitted at 20 steps and this profile runs 2"),
        (("bundle", "guidance"), 1.0, "fitted at guidance 1 and this profile uses 4"),
        (("timing", "overhead"), 0.05, "profiling itself took 5.0% of the denoising time"),
    ],
)
def test_warnings_of_the_whole(path, value, message):
    trace = make_trace()
    trace[path[0]] = trace[path[0]] | {path[1]: value}
    (found,) = warnings_of(trace, 64)
    assert message in found


def test_a_profile_of_nothing_left_out_is_named():
    full = {"budget": 1.0, "actions": [{"main": ["444", "444"]}]}
    (found,) = warnings_of(make_trace(**full) | {"bundle": None}, 64)
    assert found.startswith("budget 1 leaves nothing out: give a --budget below it")
    assert warnings_of(make_trace() | {"bundle": None}, 64) == []
    assert warnings_of(make_trace(budget=None) | {"bundle": None}, 64) == []


def test_a_slow_decoder_is_named():
    trace = make_trace()
    trace["runs"][0]["seconds"] = {"load": 1.0, "condition": 1.0, "denoise": 8.0, "decode": 11.0}
    (found,) = warnings_of(trace, 64)
    assert found.startswith("decode takes 55% of the time after loading and denoising 40%")


# -- maps --------------------------------------------------------------------------------------------


def test_grids():
    trace = make_trace()
    run = trace["runs"][1]
    assert grid(trace, run, "skip").tolist() == [[0, 0, 0], [1, 0, 0]]
    assert grid(trace, run, "reuse").tolist() == [[0, 0, 0], [0, 1, 0]]
    np.testing.assert_array_equal(grid(trace, run, "width"), [[1, 1, 1], [np.nan, np.nan, 0.5]])
    np.testing.assert_array_equal(grid(trace, run, "error")[1], [0.1, 0.2, np.nan])
    assert grid(trace, run, "time").tolist() == [[1000] * 3] * 2
    assert scale_of("skip", [grid(trace, run, "skip")]) == (0, 1)
    assert scale_of("error", [np.zeros((2, 2))]) == (0, 1)  # nothing to scale by


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [40, 80, 200])
def test_heatmap_fits_and_reads_without_colour(width, encoding):
    trace = make_trace()
    trace["request"]["steps"], trace["blocks"] = 100, [{"kind": "single"}] * 90
    row = "-" * 45 + "4" * 45
    trace["runs"][1]["actions"] = [{"main": [row] * 100}]
    console = Console(width=width, color_system=None, file=open_as(encoding))
    text = heatmap(trace, trace["runs"][1], "skip", (0.0, 1.0), console).plain
    lines = text.splitlines()
    rows = [line for line in lines if line.startswith("single")]
    assert len(rows) <= 32
    assert max(map(len, rows)) <= width
    full, none = ("█", "·") if encoding == "utf-8" else ("#", ".")
    assert rows[0].count(full) > 8 and rows[0].endswith("100 %") and none not in rows[0]
    assert rows[-1].count(none) > 8 and full not in rows[-1]
    text.encode(encoding)


def test_the_default_map_shows_something():
    assert default_metric(make_trace()) == "skip"
    assert default_metric(make_trace(actions=[{"main": ["444", "44="]}])) == "reuse"
    assert default_metric(make_trace(actions=[{"main": ["444", "444"]}])) == "skip"
    assert default_metric(make_trace() | {"kind": "dense"}) == "adds"


def open_as(encoding: str):
    import io

    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def test_colours_get_darker():
    lightness = [sum(colour_at(v, (0.0, 1.0))) for v in np.linspace(0, 1, 20)]
    assert lightness == sorted(lightness, reverse=True)
    assert colour_at(2.0, (0.0, 1.0)) == RAMP[-1]
    assert sum(colour_at(float("nan"), (0.0, 1.0))) == 3 * 224


def test_drawing_escapes_names():
    trace = make_trace()
    trace["model"] = "a<b&c"
    assert b"a&lt;b&amp;c" in draw_heatmaps(trace, "skip").svg()


# -- bad input -----------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path):
    """A folder with all the things that are refused."""
    trace = make_trace()
    check_trace(trace)
    text = json.dumps(trace)
    (tmp_path / "file").write_text("x")
    (tmp_path / "good.json").write_text(text)
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    (tmp_path / "foreign.json").write_text('{"traceEvents": []}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "newer.json").write_text(json.dumps(trace | {"version": 2}))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, path, value in (
        ("short", ("runs", 1, "actions", 0, "main"), ["444"]),
        ("code", ("runs", 1, "actions", 0, "main"), ["444", "4x4"]),
        ("words", ("runs", 0, "block_seconds"), [["a", 1, 1], [1, 1, 1]]),
        ("headless", ("runs",), []),
    ):
        broken = json.loads(text)
        at = broken
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        (tmp_path / f"{name}.json").write_text(json.dumps(broken))
    missing = json.loads(text)
    del missing["runs"][1]["spent"]
    (tmp_path / "missing.json").write_text(json.dumps(missing))
    (tmp_path / "cat.png").write_bytes(b"no picture")
    (tmp_path / "mixed.jsonl").write_text('{"prompt": "a", "steps": 2}\n{"prompt": "b", "steps": 3}\n')
    return tmp_path


NO_TRACE = [
    (["nowhere.json"], "--from 'nowhere.json' cannot be read: no such file"),
    (["cut.json"], "--from 'cut.json' is not complete JSON"),
    (["binary.json"], "--from 'binary.json' is not complete JSON"),
    (["foreign.json"], "--from 'foreign.json' is not a trace of edit profile"),
    (["list.json"], "--from 'list.json': expected object, got array"),
    (["newer.json"], "has trace version 2, this program reads 1; profile again"),
    (["short.json"], "is a damaged trace: run '0.5', branch 'main': decisions are not 2 x 3 codes"),
    (["code.json"], "decisions are not 2 x 3 codes; profile again"),
    (["words.json"], "runs[0].block_seconds[0][0]: expected float | null, got str"),
    (["headless.json"], "runs: expected array of length >= 1"),
    (["missing.json"], "is a damaged trace: runs[1]: missing required field spent"),
    (
        ["good.json", "--budget", "0.5"],
        "--from shows a trace as it was measured; leave --budget out",
    ),
    (["good.json", "--metric", "cost"], "--metric 'cost' is unknown here; allowed are skip, reuse"),
    (["good.json", "a cat"], "leave PROMPT out"),
    (["good.json", "-o", "file"], "--output 'file' is a file; give a folder"),
]

REFUSED = [
    (["a cat", "-o", "file"], "--output 'file' is a file; give a folder"),
    (["a cat", "-o", "/proc/report"], "--output '/proc/report' cannot be written"),
    (["a cat", "--metric", "beauty"], "--metric 'beauty' is unknown here; allowed are skip, reuse, width"),
    (["a cat", "--metric", "cost"], "add --dense for it"),
    (["a cat", "--dense", "--metric", "skip"], "leave --dense out for it"),
    (
        ["a cat", "--dense", "--budget", "0.5"],
        "--dense profiles the model without routers; leave --budget out",
    ),
    (
        ["a cat", "--dense", "--routers", "x"],
        "--dense profiles the model without routers; leave --routers out",
    ),
    (["a cat", "--budget", "0"], "--budget '0' is out of range"),
    (["a cat", "--budget", "0.5", "0.50"], "--budget 0.5 is given twice"),
    (["a cat", "--samples", "0"], "--samples '0' is out of range; allowed are whole numbers from 1"),
    (["a cat", "--repeats", "many"], "--repeats 'many' is not a whole number"),
    (["a cat", "--cache-limit", "-1"], "--cache-limit '-1' is out of range"),
    (["a cat", "--seed", "1", "--seed", "2"], "--seed takes one number here"),
    (["a cat", "--octree-resolution", "64"], "--octree-resolution is for models that make meshes"),
    (["a cat", "--images", "cat.png"], "--images is for models that make meshes and PROMPT for others"),
    (["--prompts", "mixed.jsonl"], "--prompts holds lines of different size, steps, guidance or budget"),
]


def check_refused(edit_here, desk, arguments, message):
    before = {path.name for path in desk.iterdir()}
    ran = edit_here("profile", *arguments, cwd=desk)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert ran.err.startswith("error: ")
    assert len(ran.err.splitlines()) == 1
    assert ran.out == ""
    assert {path.name for path in desk.iterdir()} == before


@pytest.mark.parametrize(("arguments", "message"), NO_TRACE, ids=[" ".join(a)[:40] for a, _ in NO_TRACE])
def test_what_is_no_trace_is_refused(desk, edit_here, arguments, message):
    check_refused(edit_here, desk, ["--from", *arguments], message)


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(a)[:40] for a, _ in REFUSED])
def test_bad_input(desk, edit_here, qwen_folder, arguments, message):
    check_refused(edit_here, desk, [*arguments, "-m", str(qwen_folder)], message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "makes meshes from pictures and none were given; add --images"),
        (["--images", "cat.png"], "IMAGE 'cat.png' is not a readable picture"),
        (["--images", "dog.png"], "IMAGE 'dog.png' is not a file"),
        (["--images", "cat.png", "--width", "64"], "--width is for models that make pictures; leave it out"),
    ],
)
def test_bad_mesh_input(desk, edit_here, mesh_folder, arguments, message):
    ran = edit_here("profile", *arguments, "-m", mesh_folder, cwd=desk)
    assert ran.code == 2, ran.err
    assert message in ran.err


def test_no_space_left_keeps_no_half_file(desk, edit_here, monkeypatch):
    def full(data, path):
        if len(list(Path(path).parent.iterdir())) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        Path(path).write_bytes(data)

    monkeypatch.setattr(profile_report, "put", full)
    trace = json.loads((desk / "good.json").read_text())
    with pytest.raises(RunError, match="no space left") as error:
        profile_report.write(desk / "report", trace, {}, None)
    assert error.value.exit_code == 1
    assert not [path for path in desk.iterdir() if "report" in path.name]


# -- what must not break ------------------------------------------------------------------------------


def test_the_scale_of_likeness_starts_where_the_map_does():
    """Blocks that hardly change would fill a scale from 0 with one colour."""
    assert scale_of("similarity", [np.array([[np.nan, np.nan], [0.96, 0.999]])]) == (0.95, 1.0)
    assert scale_of("similarity", [np.array([[-0.2, 0.5]])]) == (0.0, 1.0)
    assert scale_of("similarity", [np.full((2, 2), np.nan)]) == (0.0, 1.0)


@pytest.mark.parametrize("span", [["nonsense", 0, "main", 0, 0.0, 1.0], ["block", 0, "main", 3, 0.0, 1.0]])
def test_foreign_spans_are_damage(span):
    trace = make_trace(spans=[span])
    with pytest.raises(ValueError, match="a span of"):
        check_trace(trace)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_without_breaking_numbers(width):
    trace = make_trace()
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(kinds(trace, trace["runs"][1:], width))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert all(len(line) <= width for line in lines)
    assert len(lines) == 2 + 2 * len(trace["runs"]), "a line for the title, the head, and each run and kind"
    assert ("FLOP/s" in lines[1]) == (width == 120)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        command = [EDIT, "models", "--json"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=edit_environment())
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: no space left on device while writing output")
    assert len(ran.stderr.splitlines()) == 1

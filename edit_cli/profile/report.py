"""Run a profile or reopen one, and write its report, a folder that appears whole."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image
from rich.console import Console, Group, RenderableType
from rich.text import Text

from edit_cli.errors import EditError, Interrupted
from edit_cli.files import put, whole_folder
from edit_cli.profile.chrome import chrome_trace
from edit_cli.profile.heatmap import RAMP, draw_heatmaps
from edit_cli.profile.plan import ProfilePlan
from edit_cli.profile.terminal import as_view, limit_line, overhead_line
from edit_cli.profile.trace import (
    EXPLAINED,
    FIXED,
    TITLES,
    default_metric,
    grid,
    kinds_table,
    metrics_of,
    plain,
    read_trace,
    scale_of,
    write_trace,
)

PAGE = Path(__file__).with_name("report.html")
MAIN_FILES = ("report.html", "heatmap.png", "heatmap.svg", "trace.json", "chrome-trace.json")
PLACE = "/*DATA*/null"
EMBEDDED_SIDE = 320
"""Pictures are embedded in the page at most so large, px; the files beside it keep their size."""

Pictures = dict[str, Image.Image]
"""Example pictures by their path in the report."""


def run(plan: ProfilePlan, bars: Any) -> tuple[dict[str, Any], Pictures]:
    """Measure. Raises EditError for bad input, RunError for a failed run, Interrupted on Ctrl-C."""
    from edit_cli.profile.findings import build_trace
    from edit_cli.profile.measure import measure

    task = None if bars is None else bars.add_task("loading", total=None)
    begun = -1

    def step(what: str, total: int) -> None:
        nonlocal begun
        begun += 1
        if bars is not None:
            bars.update(task, description=what, completed=begun, total=total)

    try:
        measured = measure(plan, step)
    except KeyboardInterrupt:
        raise Interrupted from None
    trace = build_trace(measured)
    pictures: Pictures = {}
    for run_, variant in zip(trace["runs"], [measured.dense, *measured.variants], strict=True):
        shown = map(plan.generation.medium.thumbnail, variant.look.results)
        pictures |= dict(zip(run_["pictures"], shown, strict=True))
    return trace, pictures


def reopen(path: str) -> tuple[dict[str, Any], Pictures]:
    """A trace from its file, with the pictures that still lie beside it. Raises EditError."""
    trace, folder, pictures = read_trace(path), Path(path).expanduser().parent, {}
    for name in (name for run_ in trace["runs"] for name in run_["pictures"]):
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
        if not inside or not (folder / name).is_file():
            continue  # a trace may be kept without its pictures; names from outside are not followed
        try:
            with Image.open(folder / name) as file:
                pictures[name] = file.convert("RGB")
        except Exception as error:  # Pillow plugins raise anything on damaged files
            raise EditError(f"--from {path!r}: its picture {name!r} is damaged; delete it") from error
    return trace, pictures


def view(
    trace: Mapping[str, Any], metric: str | None, console: Console, files: Sequence[Path]
) -> RenderableType:
    """What the terminal shows."""
    shown = as_view(trace, metric or default_metric(trace), console)
    return Group(shown, Text(f"\nreport: {', '.join(map(str, files))}")) if files else shown


def write(folder: Path, trace: Mapping[str, Any], pictures: Pictures, metric: str | None) -> list[Path]:
    """Write the report; returns its main files, report.html first. Raises RunError."""
    drawing = draw_heatmaps(trace, metric or default_metric(trace))
    files = {
        "trace.json": write_trace(trace),
        "chrome-trace.json": chrome_trace(trace),
        "heatmap.svg": drawing.svg(),
        "heatmap.png": drawing.png(),
        "report.html": page(trace, pictures),
    }
    for name, picture in pictures.items():
        files[name] = _png(picture)
    with whole_folder(folder, {*MAIN_FILES, "pictures"}) as building:
        (building / "pictures").mkdir()
        for name, data in files.items():
            put(data, str(building / name))
    return [folder / name for name in MAIN_FILES]


def as_json(trace: Mapping[str, Any], files: Sequence[Path]) -> dict[str, Any]:
    """The object that `--json` prints: the trace's figures without its maps."""
    dense = trace["runs"][0]["seconds"]["denoise"]
    names = ("name", "budget", "flops", "seconds", "parts", "flop_per_second", "host_reads_per_step",
             "cache_bytes", "peak_bytes", "quality")  # fmt: skip
    return {
        "outputs": [str(path) for path in files],
        **{name: trace[name] for name in ("kind", "model", "request", "timing", "limits")},
        "runs": [
            {
                **{name: run_[name] for name in names},
                "spent": round(fmean(run_["spent"]), 5),
                "time_ratio": round(run_["seconds"]["denoise"] / dense, 4),
                "kinds": kinds_table(trace, run_),
            }
            for run_ in trace["runs"]
        ],
        "warnings": trace["warnings"],
    }


def page(trace: Mapping[str, Any], pictures: Pictures) -> bytes:
    """report.html: one file with its data, style and script inside."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(PLACE) == 1, "the page has one place for its data"
    data = json.dumps(_page_data(trace, pictures), ensure_ascii=False, allow_nan=False)
    # "</script>" in a prompt would end the script
    return text.replace(PLACE, data.replace("<", "\\u003c")).encode()


def _page_data(trace: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    kept = ("kind", "model", "family", "made", "bundle", "request", "blocks", "timing", "warnings", "maps",
            "probed_steps")  # fmt: skip
    runs = trace["runs"]
    shown = runs if trace["kind"] == "dense" else runs[1:]
    names = ("name", "budget", "spent", "flops", "seconds", "parts", "flop_per_second", "host_reads_per_step",
             "cache_bytes", "peak_bytes", "actions", "quality")  # fmt: skip
    metrics = {}
    for metric in metrics_of(trace):
        grids = [grid(trace, run_, metric) for run_ in shown]
        metrics[metric] = {
            "title": TITLES[metric],
            "explained": EXPLAINED[metric],
            "scale": scale_of(metric, grids),
            "open": metric not in FIXED,
            "grids": [plain(values) for values in grids],
        }
    return {
        **{name: trace[name] for name in kept},
        "runs": [
            {
                **{name: run_[name] for name in names},
                "kinds": kinds_table(trace, run_),
                "pictures": [_embedded(pictures.get(name)) for name in run_["pictures"]],
            }
            for run_ in runs
        ],
        "metrics": metrics,
        "metric": default_metric(trace),
        "ramp": RAMP,
        "limit": limit_line(trace),
        "overhead": overhead_line(trace),
    }


def _embedded(picture: Image.Image | None) -> str | None:
    """A picture as a data URI."""
    if picture is None:
        return None
    small = picture.copy()
    small.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE))
    return "data:image/png;base64," + base64.b64encode(_png(small)).decode()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

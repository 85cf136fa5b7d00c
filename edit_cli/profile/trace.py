"""The trace of a profile: one JSON object with a documented schema (docs/profile.md), made, read, checked.

Every view is made from it, so a trace read from a file shows the same as the run that wrote it.

Shapes: S steps, N blocks.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edit_cli.errors import EditError
from edit_cli.files import reason
from edit_cli.options import DENSE_METRICS, ELASTIC_METRICS

FORMAT, VERSION = "edit-trace", 1
CODES = "-=1234"
"""A sample's decision in one block: skip, reuse, or compute with 1 to 4 quarters of the MLP."""
TITLES = {
    "skip": "blocks skipped", "reuse": "blocks reused", "width": "MLP width where computed",
    "error": "drift from the dense run", "time": "time in the block", "adds": "what the block adds",
    "similarity": "likeness to the step before", "cost": "cost of skipping it alone",
}  # fmt: skip
EXPLAINED = {
    "skip": "share of samples and CFG branches that skipped the block",
    "reuse": "share that added what the block had added at an earlier step, or that a plan left out",
    "width": "mean share of the MLP's hidden units, where the block was computed",
    "error": "RMS difference of the image stream to the dense run's, over the dense RMS",
    "time": "ms per step, all samples and CFG branches together",
    "adds": "RMS of what the block adds, over the RMS of its input",
    "similarity": "cosine between what it adds and what it added a step before",
    "cost": "relative RMS change of the transformer's output in this step when only this block is skipped",
}
FIXED = {"skip": (0.0, 1.0), "reuse": (0.0, 1.0), "width": (0.0, 1.0), "similarity": (0.0, 1.0)}
"""Metrics with a scale of their own; the others end at their 95th percentile."""

Grid = NDArray[np.float64]


def write_trace(trace: Mapping[str, Any]) -> bytes:
    """The file's bytes: valid JSON, without NaN."""
    return (json.dumps(trace, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_trace(path: str) -> dict[str, Any]:
    """A trace.json. Raises EditError for what is missing, damaged, foreign, or of another version."""
    where = f"--from {path!r}"
    try:
        text = Path(path).expanduser().read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise EditError(f"{where} is not a text file; give a trace.json made by edit profile") from None
    except OSError as error:
        raise EditError(
            f"{where} cannot be read: {reason(error)}; give a trace.json made by edit profile"
        ) from None
    try:
        trace = json.loads(text)
    except ValueError as error:
        raise EditError(f"{where} is not a complete JSON file ({error}); profile again") from None
    if not isinstance(trace, dict) or trace.get("format") != FORMAT:
        raise EditError(f"{where} is not a trace of edit profile: it does not have format {FORMAT!r}")
    if trace.get("version") != VERSION:
        raise EditError(
            f"{where} has trace version {trace.get('version')!r}, this program reads {VERSION}; profile again"
        )
    try:
        check_trace(trace)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise EditError(f"{where} is a damaged trace: {what}; profile again") from None
    return trace


def check_trace(trace: Mapping[str, Any]) -> None:
    """Raises ValueError, TypeError or KeyError where a trace is not what docs/profile.md says."""
    steps, blocks = trace["request"]["steps"], len(trace["blocks"])
    if trace["kind"] not in ("elastic", "dense"):
        raise ValueError(f"kind {trace['kind']!r} is neither elastic nor dense")
    if not isinstance(steps, int) or steps < 1 or not blocks:
        raise ValueError(f"{steps!r} steps of {blocks} blocks")
    for block in trace["blocks"]:
        block["kind"].strip()
    if not trace["runs"] or trace["runs"][0]["name"] != "dense":
        raise ValueError("its first run is not the dense one")
    for run in trace["runs"]:
        _check_run(run, steps, blocks, len(trace["request"]["samples"]))
    for name in ("adds", "similarity", "cost") if trace["kind"] == "dense" else ():
        _check_grid(f"maps: {name}", trace["maps"][name], steps, blocks)
    for name in ("model", "made", "timing", "limits", "warnings", "bundle", "branches"):
        trace[name]


def _check_run(run: Mapping[str, Any], steps: int, blocks: int, samples: int) -> None:
    where = f"run {run['name']!r}"
    _check_grid(f"{where}: block_seconds", run["block_seconds"], steps, blocks)
    if run["drift"] is not None:
        _check_grid(f"{where}: drift", run["drift"], steps, blocks)
    if len(run["actions"]) != samples:
        raise ValueError(f"{where} has decisions of {len(run['actions'])} samples, not {samples}")
    for branch, rows in (each for sample in run["actions"] for each in sample.items()):
        if len(rows) != steps or any(len(row) != blocks or set(row) - set(CODES) for row in rows):
            raise ValueError(f"{where}, branch {branch!r}: decisions are not {steps} x {blocks} codes")
    for name in ("seconds", "flops", "parts"):
        if not all(isinstance(v, (int, float)) and v >= 0 for v in run[name].values()):
            raise ValueError(f"{where}: {name} holds values that are not numbers")
    for span in run["spans"]:
        if len(span) != 6:
            raise ValueError(f"{where}: a span has {len(span)} entries, not 6")
        if span[0] not in run["parts"] or not -1 <= span[3] < blocks:
            raise ValueError(f"{where}: a span of {span[0]!r}, block {span[3]!r}")
    for name in ("spent", "host_reads", "cache_bytes", "peak_bytes", "block_flops", "quality", "pictures"):
        run[name]


def _check_grid(where: str, rows: Any, steps: int, blocks: int) -> None:
    if len(rows) != steps or any(len(row) != blocks for row in rows):
        raise ValueError(f"{where} is not {steps} x {blocks}")
    if not all(value is None or isinstance(value, (int, float)) for row in rows for value in row):
        raise ValueError(f"{where} holds values that are not numbers")


def metrics_of(trace: Mapping[str, Any]) -> tuple[str, ...]:
    """What the heatmaps of this trace can show."""
    return DENSE_METRICS if trace["kind"] == "dense" else ELASTIC_METRICS


def default_metric(trace: Mapping[str, Any]) -> str:
    """The kind's first metric; of an elastic profile that skipped nothing, the widths if any is narrow, else
    the reuses if there are any.
    """
    first, *_ = metrics_of(trace)
    runs = shown_runs(trace)
    if first == "skip" and not any(grid(trace, run, "skip").any() for run in runs):
        if any((grid(trace, run, "width") < 1).any() for run in runs):
            return "width"
        return "reuse" if any(grid(trace, run, "reuse").any() for run in runs) else first
    return first


def shown_runs(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that get a heatmap: the elastic ones, or the dense run of a dense profile."""
    runs: list[dict[str, Any]] = trace["runs"]
    return runs if trace["kind"] == "dense" else runs[1:]


def map_title(trace: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """What stands above a run's heatmap."""
    return "dense" if trace["kind"] == "dense" else f"budget {run['name']}, spent {fmean(run['spent']):.3f}"


def grid(trace: Mapping[str, Any], run: Mapping[str, Any], metric: str, sample: int | None = None) -> Grid:
    """A metric `[S, N]`, NaN where there is nothing. sample None: all of them together.

    drift, time and the dense maps are measured over all samples.
    """
    if metric in ("adds", "similarity", "cost"):
        return _array(trace["maps"][metric])
    if metric == "error":
        return _array(run["drift"])
    if metric == "time":
        return 1e3 * _array(run["block_seconds"])
    chosen = run["actions"] if sample is None else [run["actions"][sample]]
    codes = np.array([[[*map(CODES.index, row)] for row in rows] for s in chosen for rows in s.values()])
    if metric in ("skip", "reuse"):
        share: Grid = (codes == (0 if metric == "skip" else 1)).mean(axis=0)
        return share
    computed = codes >= 2
    count = computed.sum(axis=0)
    width = np.where(computed, (codes - 1) / 4, 0.0).sum(axis=0)
    return np.where(count > 0, width / np.maximum(count, 1), np.nan)


def scale_of(metric: str, grids: Sequence[Grid]) -> tuple[float, float]:
    """Lowest and highest value of the colour scale that several maps share."""
    if metric == "similarity":
        lowest = min((float(g[np.isfinite(g)].min(initial=1.0)) for g in grids), default=0.0)
        # blocks that hardly change from step to step differ in the last few percent alone
        return max(0.0, math.floor(20 * lowest) / 20 if lowest < 1 else 0.0), 1.0
    if metric in FIXED:
        return FIXED[metric]
    known = np.concatenate([g[np.isfinite(g)] for g in grids] or [np.zeros(0)])
    top = float(np.percentile(known, 95)) if known.size else 0.0
    return 0.0, top or float(known.max(initial=0.0)) or 1.0


def percent(metric: str) -> bool:
    """Whether a metric is a share, shown in %."""
    return metric != "time"


def show(metric: str, value: float) -> str:
    """A value as text: "62 %", "3.1 ms"; nothing for NaN."""
    if not np.isfinite(value):
        return ""
    if not percent(metric):
        return f"{value:.3g} ms"
    return f"{100 * value:.0f} %" if abs(value) >= 0.1 or value == 0 else f"{100 * value:.2g} %"


def plain(values: Grid) -> list[list[float | None]]:
    """A map as JSON: NaN becomes null."""
    return [[None if not np.isfinite(v) else round(float(v), 7) for v in row] for row in values]


def _array(rows: Sequence[Sequence[float | None]] | None) -> Grid:
    if rows is None:
        return np.full((1, 1), np.nan)
    return np.array([[np.nan if v is None else v for v in row] for row in rows], np.float64)


def kinds_table(trace: Mapping[str, Any], run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per block kind: blocks, decisions, time, FLOPs and achieved FLOP/s."""
    kinds = np.array([block["kind"] for block in trace["blocks"]])
    maps = {name: grid(trace, run, name) for name in ("skip", "reuse", "width")}
    seconds, flops = np.array(run["block_seconds"], np.float64), np.array(run["block_flops"])
    rows = []
    for kind in dict.fromkeys(kinds.tolist()):
        at = kinds == kind
        widths, spent, blocks = maps["width"][:, at], float(seconds[:, at].sum()), int(at.sum())
        rows.append(
            {
                "kind": kind,
                "blocks": blocks,
                **{name: float(maps[name][:, at].mean()) for name in ("skip", "reuse")},
                "width": float(np.nanmean(widths)) if np.isfinite(widths).any() else None,
                "seconds": spent,
                "per_block": spent / blocks,
                "share": spent / max(float(seconds.sum()), 1e-12),
                "flops": float(flops[at].sum()),
                "flop_per_second": float(flops[at].sum()) / spent if spent else 0.0,
            }
        )
    return rows


def spread_of(values: Sequence[float]) -> float:
    """Range of repeats over their median; 0 for one."""
    return (max(values) - min(values)) / max(statistics.median(values), 1e-12)

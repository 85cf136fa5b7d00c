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
from routers import schema

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

NEEDED = {"seconds": ("load", "denoise"), "parts": ("call", "decide", "block", "cache", "router")}
"""Of every run."""

Grid = NDArray[np.float64]


def write_trace(trace: Mapping[str, Any]) -> bytes:
    """The file's bytes: valid JSON, without NaN."""
    return (json.dumps(trace, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_trace(path: str) -> dict[str, Any]:
    """A trace.json. Raises EditError for what is missing, damaged, foreign, or of another version."""
    where = f"--from {path!r}"
    try:
        text = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise EditError(
            f"{where} cannot be read: {reason(error)}; give a trace.json made by edit profile"
        ) from None
    try:
        trace = schema.decode(text, dict[str, Any], where)
        if trace.get("format") != FORMAT:
            raise ValueError(f"{where} is not a trace of edit profile: it does not have format {FORMAT!r}")
        if trace.get("version") != VERSION:
            raise ValueError(
                f"{where} has trace version {trace.get('version')!r:.20}, this program reads {VERSION}"
            )
        check_trace(trace, f"{where} is a damaged trace")
    except ValueError as error:
        raise EditError(f"{error}; profile again") from None
    return trace


def check_trace(trace: Mapping[str, Any], where: str = "trace") -> None:
    """Raises ValueError where a trace is not what docs/profile.md says; `where` begins the message."""
    from edit_cli.profile.traced import Traced

    read = schema.convert(trace, Traced, where)
    steps, blocks, dense = read.request.steps, len(read.blocks), read.runs[0]
    if dense.name != "dense":
        raise ValueError(f"{where}: runs[0]: its first run is not the dense one")
    if read.kind == "elastic" and len(read.runs) < 2:
        raise ValueError(f"{where}: runs: no run at a budget beside the dense one")
    for run in read.runs:
        at = f"{where}: run {run.name!r}"
        if len(run.actions) != len(read.request.samples):
            raise ValueError(f"{at} has decisions of {len(run.actions)} samples, not the request's")
        for branch, rows in (each for sample in run.actions for each in sample.items()):
            if len(rows) != steps or any(len(row) != blocks or set(row) - set(CODES) for row in rows):
                raise ValueError(f"{at}, branch {branch!r}: decisions are not {steps} x {blocks} codes")
        for name, maps in (("block_seconds", run.block_seconds), ("drift", run.drift)):
            if maps is not None and (len(maps) != steps or any(len(row) != blocks for row in maps)):
                raise ValueError(f"{at}: {name} is not {steps} x {blocks}")
        for name in ("seconds", "parts"):
            if not getattr(run, name).keys() >= {*getattr(dense, name), *NEEDED[name]}:
                raise ValueError(
                    f"{at}: {name} lacks {', '.join(NEEDED[name])} or another of the dense run's"
                )
        if len(run.block_flops) != blocks or not run.seconds["denoise"] or not all(run.quality.values()):
            raise ValueError(
                f"{at}: block_flops, seconds.denoise or quality are not of {blocks} blocks that ran"
            )
        for part, step, _, block, *_ in run.spans:
            if part not in run.parts or step >= steps or block >= blocks:
                raise ValueError(f"{at}: a span of {part!r}, step {step}, block {block}")
    if not read.limits.keys() >= {"share", "fastest"}:
        raise ValueError(f"{where}: limits lacks share or fastest")
    for name in ("adds", "similarity", "cost") if read.kind == "dense" else ():
        values = read.maps.get(name, [])
        if len(values) != steps or any(len(row) != blocks for row in values):
            raise ValueError(f"{where}: maps: {name} is not {steps} x {blocks}")


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

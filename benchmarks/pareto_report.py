"""Tables of a comparison: every point, and all rivals at equal measured time.

Shapes: P prompts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.pareto_store import Point
from benchmarks.scores import Values, mean_interval

RATIOS = (0.4, 0.5, 0.6, 0.7, 0.8)
"""Time ratios at which all rivals are compared."""
LABELS = {
    "psnr": "PSNR to dense, dB",
    "ssim": "SSIM to dense",
    "psnr_truth": "PSNR to many steps, dB",
    "ssim_truth": "SSIM to many steps",
    "iou": "IoU to dense",
    "chamfer": "Chamfer distance to dense, share of the box",
    "iou_truth": "IoU to many steps",
    "chamfer_truth": "Chamfer distance to many steps",
    "top1": "top-1",
    "top5": "top-5",
}
"""Score -> heading."""
EQUAL_SCORES = ("psnr", "psnr_truth", "iou", "chamfer", "iou_truth", "top5")
"""Scores that get a table at equal time."""
LOWER = ("chamfer", "chamfer_truth")
"""Scores where less is better."""
FIRST = "elastic"
"""The rival that the others are compared with; its variations are named "elastic, ..."."""


@dataclass(frozen=True)
class EqualTime:
    """A rival at a time ratio, between its neighbouring points.

    behind: by how much elastic's mean is better than this one's, and the 95 % interval of that difference
    over the same prompts; None for elastic itself, or without it.
    """

    rival: str
    rows: int
    ratio: float
    mean: float
    low: float
    high: float
    behind: tuple[float, float, float] | None


def is_ours(rival: str) -> bool:
    """Whether it runs a bundle: the first of all, or one of its variations."""
    return rival.startswith(FIRST)


def time_ratio(point: Point, rows: int) -> float | None:
    """Median over rounds of the denoising time to dense; None if it was not measured."""
    times = point.times.get(rows)
    return statistics.median(times) if times else None


def main_score(points: Sequence[Point]) -> str:
    """What rivals are compared by: PSNR of pictures, IoU of meshes."""
    return "psnr" if "psnr" in points[0].scores else "iou"


def curve(points: Iterable[Point], rows: int | None, score: str) -> list[tuple[float, Values]]:
    """(time ratio, scores [P]) of all points, by rising time. rows: batch size; None: by FLOPs."""
    rated = ((point, point.flops if rows is None else time_ratio(point, rows)) for point in points)
    timed = [(ratio, np.array(p.scores[score])) for p, ratio in rated if ratio is not None]
    return sorted(timed, key=lambda pair: pair[0])


def frontier(points: Iterable[Point], rows: int | None, score: str) -> list[tuple[float, Values]]:
    """(time ratio, scores [P]) of the points that no cheaper point of the rival equals, by rising time.

    rows: batch size; None: FLOPs ratios in place of time ratios.
    """
    sign = -1 if score in LOWER else 1
    best: list[tuple[float, Values]] = []
    for ratio, values in curve(points, rows, score):
        if not best or sign * values.mean() > sign * best[-1][1].mean():
            best.append((ratio, values))
    return best


def at_time(curve: Sequence[tuple[float, Values]], ratio: float) -> Values | None:
    """Scores [P] at a time ratio: between two points of a frontier linearly, its end beyond the last.

    None below the first point: the rival cannot be that fast.
    """
    if not curve or ratio < curve[0][0]:
        return None
    for (left, low), (right, high) in itertools.pairwise(curve):
        if ratio <= right:
            share = (ratio - left) / (right - left) if right > left else 1.0
            return low + share * (high - low)
    return curve[-1][1]


def equal_time(points: Sequence[Point], score: str) -> list[EqualTime]:
    """Every rival at every ratio and batch size, best first."""
    found = []
    for rows in batch_sizes(points):
        curves = {name: frontier(some, rows, score) for name, some in by_rival(points).items()}
        for ratio in RATIOS:
            here = {name: at_time(line, ratio) for name, line in curves.items()}
            ours = here.get(FIRST)
            rated = []
            for name, values in here.items():
                if values is not None:
                    sign = -1 if score in LOWER else 1
                    lead = None if ours is None else sign * (ours - values)
                    behind = None if lead is None or name == FIRST else mean_interval(lead)
                    rated.append(EqualTime(name, rows, ratio, *mean_interval(values), behind))
            found += sorted(rated, key=lambda row: row.mean if score in LOWER else -row.mean)
    return found


def batch_sizes(points: Iterable[Point]) -> list[int]:
    """Batch sizes that were timed."""
    return sorted({rows for point in points for rows in point.times})


def by_rival(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Points by rival, in the order of first appearance."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.rival, []).append(point)
    return groups


def point_rows(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of all points, by rival and FLOPs."""
    sizes = batch_sizes(points)
    scores = [name for name in LABELS if points and name in points[0].scores]
    head = [
        "rival",
        "setting",
        "FLOPs",
        *(f"time, batch {rows}" for rows in sizes),
        *(LABELS[s] for s in scores),
    ]
    rows = []
    for name, some in by_rival(points).items():
        for point in sorted(some, key=lambda point: point.flops):
            setting = ", ".join(f"{key} {_plain(value)}" for key, value in point.setting.items())
            times = [time_ratio(point, size) for size in sizes]
            rows.append(
                [
                    name,
                    setting,
                    f"{point.flops:.3f}",
                    *("" if t is None else f"{t:.3f}" for t in times),
                    *(_score(score, point.scores[score]) for score in scores),
                ]
            )
    return head, rows


def digits_of(score: str) -> int:
    """Decimals that are shown."""
    return 2 if score.startswith("psnr") else 4 if score.startswith(("iou", "chamfer")) else 3


def equal_rows(found: Sequence[EqualTime], score: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table at equal time."""
    digits = digits_of(score)
    head = ["batch", "time", "rival", "mean (95 % interval)", "elastic ahead by (95 % interval)"]
    rows = [
        [
            str(row.rows),
            f"{row.ratio:g}",
            row.rival,
            f"{row.mean:.{digits}f} ({row.low:.{digits}f} to {row.high:.{digits}f})",
            "" if row.behind is None else "{:+.{d}f} ({:+.{d}f} to {:+.{d}f})".format(*row.behind, d=digits),
        ]
        for row in found
    ]
    return head, rows


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(points: Sequence[Point], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything measured, summed up, as JSON data."""
    rows = [
        {
            "rival": point.rival,
            "setting": point.setting,
            "flops": point.flops,
            "time": {str(size): time_ratio(point, size) for size in sorted(point.times)},
            **{name: mean_interval(np.array(values)) for name, values in point.scores.items()},
        }
        for point in points
    ]
    return {
        **about,
        "points": rows,
        "equal_time": [vars(row) for row in equal_time(points, main_score(points))] if points else [],
    }


def _score(name: str, values: Sequence[float]) -> str:
    mean, low, high = mean_interval(np.array(values))
    if name.startswith("top"):
        return f"{100 * mean:.1f} %"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})" if name.startswith("psnr") else f"{mean:.4f}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

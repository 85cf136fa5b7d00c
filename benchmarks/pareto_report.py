"""Tables of a comparison: all rivals at equal cost, which is FLOPs or measured time, and every point.

Shapes: P prompts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.pareto_store import Point
from benchmarks.scores import Values, mean_interval

RATIOS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8)
"""Shares of the dense run's FLOPs or time at which all rivals are compared."""
LABELS = {
    "psnr": "PSNR to dense, dB",
    "ssim": "SSIM to dense",
    "psnr_truth": "PSNR to exact, dB",
    "ssim_truth": "SSIM to exact",
    "iou": "IoU to dense",
    "chamfer": "Chamfer distance to dense, share of the box",
    "iou_truth": "IoU to exact",
    "chamfer_truth": "Chamfer distance to exact, share of the box",
    "frechet": "Fréchet distance to dense",
    "frechet_truth": "Fréchet distance to exact",
    "top1": "top-1",
    "top5": "top-5",
}
"""Score -> heading."""
EQUAL_SCORES = (
    "psnr", "psnr_truth", "iou", "iou_truth", "chamfer", "chamfer_truth", "frechet", "frechet_truth", "top1",
)  # fmt: skip
"""Scores that get a table at equal cost."""
LOWER = ("chamfer", "chamfer_truth", "frechet", "frechet_truth")
"""Scores where less is better."""
FIRST = "elastic"
"""The rival that the others are compared with; its variations are named "elastic, ..."."""


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
    timed = [(ratio, values_of(p, score)) for p, ratio in rated if ratio is not None]
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


def aimed(points: Iterable[Point], score: str) -> list[Point]:
    """The points that count for a score: of those with a target, the ones that aim where the score looks."""
    target = "exact" if score.endswith("_truth") else "dense"
    return [p for p in points if p.setting.get("target", target) == target]


def at_ratios(points: Iterable[Point], rows: int | None, score: str) -> dict[str, dict[float, Values]]:
    """Of every rival its scores [P] (or one of all) at each of `RATIOS` that it reaches."""
    found = {}
    for name, some in by_rival(aimed(points, score)).items():
        line = frontier(some, rows, score)
        reached = {ratio: at_time(line, ratio) for ratio in RATIOS}
        found[name] = {ratio: values for ratio, values in reached.items() if values is not None}
    return found


def ratio_rows(
    points: Sequence[Point], dense: Point, rows: int | None, score: str
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: every rival's mean at each ratio, the best of a column in bold. rows: batch size whose
    time is meant, None: FLOPs.
    """
    digits, found = digits_of(score), at_ratios(points, rows, score)
    sign = -1 if score in LOWER else 1
    means = {name: {r: float(v.mean()) for r, v in values.items()} for name, values in found.items()}
    best = {r: max((sign * m[r] for m in means.values() if r in m), default=None) for r in RATIOS}

    def cell(mean: dict[float, float], ratio: float) -> str:
        if ratio not in mean:
            return "-"
        text = f"{mean[ratio]:.{digits}f}"
        return f"**{text}**" if sign * mean[ratio] == best[ratio] else text

    table = [[name, *(cell(mean, ratio) for ratio in RATIOS), ""] for name, mean in means.items() if mean]
    whole = f"{float(values_of(dense, score).mean()):.{digits}f}"
    return ["rival", *map(str, RATIOS), "1"], [*table, ["dense", *["" for _ in RATIOS], whole]]


def values_of(point: Point, score: str) -> Values:
    """A score's values: one per prompt [P], or one of all prompts [1]."""
    return np.array(point.scores[score] if score in point.scores else [point.whole[score]])


def enough_lines(points: Sequence[Point], dense: Point, score: str) -> list[str]:
    """The least share of the FLOPs at which each rival is as near to the exact result as the dense run is."""
    goal, found = float(values_of(dense, score).mean()), []
    for name, some in by_rival(aimed(points, score)).items():
        line = [(ratio, float(values.mean())) for ratio, values in frontier(some, None, score)]
        for (left, low), (right, high) in itertools.pairwise([(0.0, -np.inf), *line]):
            if high >= goal:
                share = right if not np.isfinite(low) else left + (right - left) * (goal - low) / (high - low)
                found.append((share, name))
                break
    return [f"As near to the exact result as the dense run from a share of {share:.2f} on: {name}"
            for share, name in sorted(found)]  # fmt: skip


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
    scores = [n for n in LABELS if points and (n in points[0].scores or n in points[0].whole)]
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
                    *(_score(score, values_of(point, score)) for score in scores),
                ]
            )
    return head, rows


def digits_of(score: str) -> int:
    """Decimals that are shown."""
    return 2 if score.startswith(("psnr", "frechet")) else 4 if score.startswith(("iou", "chamfer")) else 3


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
            **point.whole,
        }
        for point in points
    ]
    return {**about, "points": rows}


def _score(name: str, values: Values) -> str:
    mean, low, high = mean_interval(values)
    if name.startswith("top"):
        return f"{100 * mean:.1f} %"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})" if name.startswith("psnr") else f"{mean:.4f}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Tables and the plot of a comparison: every point, and all rivals at equal measured time.

Shapes: P prompts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pareto_store import Point, write_whole
from benchmarks.scores import Values, mean_interval

RATIOS = (0.4, 0.5, 0.6, 0.7, 0.8)
"""Time ratios at which all rivals are compared."""
LABELS = {
    "psnr": "PSNR to dense, dB",
    "ssim": "SSIM to dense",
    "psnr_truth": "PSNR to many steps, dB",
    "ssim_truth": "SSIM to many steps",
    "top1": "top-1",
    "top5": "top-5",
}
"""Score -> heading."""
FIRST = "elastic"
"""The rival that the others are compared with."""


@dataclass(frozen=True)
class EqualTime:
    """A rival at a time ratio, between its neighbouring points.

    behind: elastic's mean minus this one's, and
    the 95 % interval of that difference over the same prompts; None for
    elastic itself, or without it.
    """

    rival: str
    rows: int
    ratio: float
    mean: float
    low: float
    high: float
    behind: tuple[float, float, float] | None


def time_ratio(point: Point, rows: int) -> float | None:
    """Median over rounds of the denoising time to dense; None if it was not measured."""
    times = point.times.get(rows)
    return statistics.median(times) if times else None


def frontier(points: Iterable[Point], rows: int, score: str) -> list[tuple[float, Values]]:
    """(time ratio, scores [P]) of the points that no cheaper point of the rival equals, by rising time."""
    timed = [(ratio, np.array(p.scores[score])) for p in points if (ratio := time_ratio(p, rows)) is not None]
    best: list[tuple[float, Values]] = []
    for ratio, values in sorted(timed, key=lambda pair: pair[0]):
        if not best or values.mean() > best[-1][1].mean():
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


def equal_time(points: Sequence[Point], score: str = "psnr") -> list[EqualTime]:
    """Every rival at every ratio and batch size, best first."""
    found = []
    for rows in batch_sizes(points):
        curves = {name: frontier(some, rows, score) for name, some in by_rival(points).items()}
        for ratio in RATIOS:
            here = {name: at_time(curve, ratio) for name, curve in curves.items()}
            ours = here.get(FIRST)
            rated = []
            for name, values in here.items():
                if values is not None:
                    behind = None if ours is None or name == FIRST else mean_interval(ours - values)
                    rated.append(EqualTime(name, rows, ratio, *mean_interval(values), behind))
            found += sorted(rated, key=lambda row: -row.mean)
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


def equal_rows(found: Sequence[EqualTime], digits: int = 2) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table at equal time."""
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


def verdicts(found: Sequence[EqualTime]) -> list[str]:
    """One line per batch size and ratio: whether elastic is ahead of the best other, and by how much."""
    lines = []
    for rows, ratio in sorted({(row.rows, row.ratio) for row in found}):
        here = [row for row in found if (row.rows, row.ratio) == (rows, ratio)]
        others = [row for row in here if not row.rival.startswith(FIRST) and row.behind is not None]
        if not others:
            lines.append(f"batch {rows}, time {ratio:g}: elastic is not there to compare")
            continue
        best = max(others, key=lambda row: row.mean)
        assert best.behind is not None
        mean, low, high = best.behind
        state = "ahead of" if low > 0 else "behind" if high < 0 else "level with"
        lines.append(
            f"batch {rows}, time {ratio:g}: elastic is {state} {best.rival}, {mean:+.2f} dB "
            f"({low:+.2f} to {high:+.2f})"
        )
    return lines


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
    return {**about, "points": rows, "equal_time": [vars(row) for row in equal_time(points)]}


def plot(points: Sequence[Point], target: Path, title: str) -> None:
    """Quality over measured time, one column per batch size; elastic in front. Raises ImportError."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes, scores = batch_sizes(points), [s for s in ("psnr", "psnr_truth") if s in points[0].scores]
    figure, axes = pyplot.subplots(
        len(scores),
        len(sizes),
        figsize=(5.2 * len(sizes) + 2.6, 3.9 * len(scores)),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    colours = pyplot.get_cmap("tab20").colors
    for row, score in enumerate(scores):
        for column, size in enumerate(sizes):
            axis = axes[row][column]
            for number, (name, some) in enumerate(by_rival(points).items()):
                ours = name == FIRST
                curve = frontier(some, size, score)
                style: dict[str, Any] = {
                    "color": "black" if ours else colours[(number * 2 + number // 10) % 20],
                    "linewidth": 2.6 if ours else 1.2,
                    "marker": "o" if ours else "oxs^vD+*P"[number % 9],
                    "markersize": 5,
                    "zorder": 3 if ours else 2,
                }
                axis.plot([t for t, _ in curve], [v.mean() for _, v in curve], label=name, **style)
            axis.grid(alpha=0.25)
            axis.set_title(f"batch {size}" if row == 0 else "")
            if column == 0:
                axis.set_ylabel(LABELS[score])
            if row == len(scores) - 1:
                axis.set_xlabel("measured denoising time / dense")
            axis.set_xlim(0.2, 1.1)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(title)
    write_whole(target, lambda path: figure.savefig(path, dpi=130))
    pyplot.close(figure)


def _score(name: str, values: Sequence[float]) -> str:
    mean, low, high = mean_interval(np.array(values))
    if name.startswith("top"):
        return f"{100 * mean:.1f} %"
    return f"{mean:.2f} ({low:.2f} to {high:.2f})" if name.startswith("psnr") else f"{mean:.4f}"


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

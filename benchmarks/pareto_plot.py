"""The plot of a comparison: quality over cost, every line named where it ends.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; rivals of one kind share a
colour and differ in their marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pareto_report import (
    FIRST,
    LABELS,
    aimed,
    batch_sizes,
    by_rival,
    frontier,
    is_ours,
    main_score,
)
from benchmarks.pareto_store import Point
from routers.files import write_whole

KINDS = (
    ("Euler", "#D55E00"),
    ("Heun", "#D55E00"),
    ("AB2", "#D55E00"),
    ("DPM++", "#D55E00"),
    ("UniPC", "#D55E00"),
    ("OptimalSteps", "#E69F00"),
    ("DBCache", "#009E73"),
    ("TaylorSeer", "#CC79A7"),
    ("TeaCache", "#7A6A00"),
    ("paper", "#7A6A00"),
    ("FirstBlock", "#0072B2"),
    ("MagCache", "#0072B2"),
    ("SeaCache", "#0072B2"),
)
"""Beginning of a rival's name -> its colour; the engine's own naive plans are grey."""
OWN, REST = "#000000", "#777777"
MARKS = "osD^vPX<>d*"
LEFT, RIGHT = 0.18, 0.82
"""Ratios that are drawn."""
WIDE, HIGH, DPI = 8.0, 4.6, 200
"""Inches, and pixels per inch: readable when shown 800 px wide."""
FLOORS = {"psnr": 14.0, "psnr_truth": 20.0, "iou": 0.95, "iou_truth": 0.95}
"""Scores below this are not drawn: random skipping would squeeze all else. PSNR in dB."""

End = tuple[float, float, str, str]
"""Where a line ends: ratio, score, rival, colour."""


def plot(points: Sequence[Point], target: Path, title: str, score: str | None = None) -> None:
    """One panel per batch size, or one over FLOPs where no time was measured. Raises ImportError.

    score: what is drawn, default the main one: likeness to the dense result.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list[Any](batch_sizes(points)) or [None]
    score = score or main_score(points)
    points = aimed(points, score)
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(WIDE, HIGH), squeeze=False, sharey=True)
    for axis, size in zip(axes[0], sizes, strict=True):
        ends = draw(axis, points, size, score)
        axis.set_title(f"batch {size}" if size else "", fontsize=10)
        axis.set_xlabel("measured denoising time / dense" if size else "FLOPs / dense", fontsize=10)
        axis.set_xlim(LEFT, RIGHT)
        axis.set_xticks((0.2, 0.4, 0.6, 0.8))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.tick_params(labelsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(LABELS[score], fontsize=10)
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    figure.subplots_adjust(left=0.09, right=0.77, top=0.87, bottom=0.12, wspace=0.06)
    figure.canvas.draw()
    name_lines(axes[0][-1], ends)
    write_whole({target: lambda path: figure.savefig(path, format=target.suffix[1:], dpi=DPI)})
    pyplot.close(figure)


def style_of(name: str, number: int) -> tuple[str, str]:
    """Colour and mark of a rival. number: its place among all."""
    if is_ours(name):
        return OWN, "o" if name == FIRST else "s"
    colour = next((colour for start, colour in KINDS if name.startswith(start)), REST)
    return colour, MARKS[number % len(MARKS)]


def draw(
    axis: Any, points: Sequence[Point], size: int | None, score: str
) -> list[tuple[float, float, str, str]]:
    """Lines of all rivals; returns where each ends: ratio, score, name, colour."""
    ends = []
    for number, (name, some) in enumerate(by_rival(points).items()):
        line = [(x, float(v.mean())) for x, v in frontier(some, size, score)]
        line = [(x, y) for x, y in line if LEFT <= x <= RIGHT and y >= FLOORS.get(score, -np.inf)]
        if not line:
            continue
        x, y = np.array(line).T
        colour, mark = style_of(name, number)
        ours = is_ours(name)
        axis.plot(
            x, y, color=colour, marker=mark, linewidth=2.6 if ours else 1.1, markersize=5.5 if ours else 4,
            markerfacecolor=colour if ours else "white", zorder=3 if ours else 2,
        )  # fmt: skip
        ends.append((float(x[-1]), float(y[-1]), name, colour))
    return ends


def name_lines(axis: Any, ends: Sequence[End]) -> None:
    """Names beside the panel in the order of their lines' ends, joined to them by thin lines."""
    low, high = axis.get_ylim()
    gap = (high - low) / 21
    ordered = sorted(ends, key=lambda end: -end[1])
    places: list[float] = []
    for _, y, _, _ in ordered:
        places.append(min(y, places[-1] - gap) if places else min(y, high))
    shift = max(0.0, low - min(places, default=low))  # what fell below the panel moves all up
    for n, place in enumerate(places):
        places[n] = min(place + shift, high - n * gap)
    for (x, y, name, colour), place in zip(ordered, places, strict=True):
        axis.annotate(
            name, (x, y), (RIGHT + 0.03 * (RIGHT - LEFT), place), color=colour, fontsize=9, va="center",
            annotation_clip=False, weight="bold" if is_ours(name) else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.5, "relpos": (0, 0.5)},
        )  # fmt: skip

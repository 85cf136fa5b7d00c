"""The bars of the comparison: elastic against the best rival at equal time, and at equal FLOPs.

A bar is met at a ratio if elastic is ahead with the whole 95 % interval of the difference over the prompts.
A rival that reaches a ratio is interpolated there between its own points; one that cannot be so cheap at all
does not count. The bundle's own variations ("elastic, ...") are no rivals.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.pareto_report import (
    FIRST,
    RATIOS,
    at_time,
    batch_sizes,
    by_rival,
    curve,
    digits_of,
    frontier,
    is_ours,
)
from benchmarks.pareto_store import Point
from benchmarks.scores import mean_interval

NEEDED = 4
"""Of five ratios, so many must be outside the intervals."""
DEFICIT = {"psnr": 0.3}
"""Score -> by how much elastic may be behind anywhere."""
ACCURACY_LOSS = 0.01
"""Of prompt accuracy at time 0.5, as a share."""


@dataclass(frozen=True)
class Bar:
    """Elastic against the best rival at one ratio.

    rows: batch size, None: ratio is one of FLOPs. elastic: its mean score. rival, best: the best other
    and its mean. lead, low, high: elastic's mean difference to it and its 95 % interval.
    """

    rows: int | None
    ratio: float
    rival: str
    elastic: float
    best: float
    lead: float
    low: float
    high: float


def all_bars(points: Sequence[Point], dense: Point, score: str) -> list[Bar]:
    """A bar for every batch size that was timed, then FLOPs, at each ratio that elastic and a rival reach."""
    found = []
    for rows in (*batch_sizes(points), None):
        curves = {name: frontier(some, rows, score) for name, some in by_rival(points).items()}
        for ratio in RATIOS:
            here = {name: at_time(line, ratio) for name, line in curves.items()}
            ours = here.pop(FIRST, None)
            others = {n: v for n, v in here.items() if v is not None and not is_ours(n)}
            if ours is None or not others:
                continue
            name = max(others, key=lambda other: float(others[other].mean()))
            found.append(
                Bar(
                    rows,
                    ratio,
                    name,
                    float(ours.mean()),
                    float(others[name].mean()),
                    *mean_interval(ours - others[name]),
                )
            )
    return found


def bar_rows(found: Sequence[Bar], score: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of bars."""
    d = digits_of(score)
    head = ["at equal", "ratio", "elastic", "best rival", "its score", "lead (95 % interval)", "verdict"]
    rows = [
        [
            _what(bar.rows),
            f"{bar.ratio:g}",
            f"{bar.elastic:.{d}f}",
            bar.rival,
            f"{bar.best:.{d}f}",
            f"{bar.lead:+.{d}f} ({bar.low:+.{d}f} to {bar.high:+.{d}f})",
            "ahead" if bar.low > 0 else "behind" if bar.high < 0 else "level",
        ]
        for bar in found
    ]
    return head, rows


def verdicts(found: Sequence[Bar], score: str) -> list[str]:
    """A line per batch size, and one for FLOPs: ratios ahead, the largest deficit, met or not."""
    lines, d = [], digits_of(score)
    for rows, group in itertools.groupby(found, key=lambda bar: bar.rows):
        bars = list(group)
        ahead = sum(bar.low > 0 for bar in bars)
        worst = min(bars, key=lambda bar: bar.lead)
        allowed = DEFICIT.get(score, 0.0)
        met = ahead >= NEEDED and worst.lead >= -allowed
        behind = (
            f"largest deficit {-worst.lead:.{d}f} at {worst.ratio:g}, to {worst.rival}"
            if worst.lead < 0
            else "never behind"
        )
        lines.append(
            f"{_what(rows)}: ahead outside the interval at {ahead} of {len(RATIOS)} ratios "
            f"({len(bars)} comparable), {behind}: bar {'met' if met else 'not met'}"
        )
    return lines


def accuracy_lines(points: Sequence[Point], dense: Point) -> list[str]:
    """Prompt accuracy at half of the dense time (and FLOPs) against dense; empty without a classifier."""
    lines = []
    for rows in (*batch_sizes(points), None):
        for score, label in (("top1", "top-1"), ("top5", "top-5")):
            ours = [p for p in points if p.rival == FIRST and score in p.scores]
            values = at_time(curve(ours, rows, score), 0.5)
            if values is None:
                continue
            loss, low, high = mean_interval(values - dense.scores[score])
            lines.append(
                f"{_what(rows)} 0.5: {label} {100 * float(values.mean()):.1f} %, dense "
                f"{100 * sum(dense.scores[score]) / len(dense.scores[score]):.1f} %, difference "
                f"{100 * loss:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}): "
                f"bar {'met' if loss >= -ACCURACY_LOSS else 'not met'}"
            )
    return lines


def _what(rows: int | None) -> str:
    return "FLOPs" if rows is None else f"time, batch {rows}"

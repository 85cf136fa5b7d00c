"""Elastic against the best rival at equal time, and at equal FLOPs.

Ahead at a ratio means: with the whole 95 % interval of the difference over the prompts. A rival that reaches
a ratio is interpolated there between its own points; one that cannot be so cheap at all does not count.
Other ways of elastic ("elastic, ...") are no rivals.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.pareto_report import (
    FIRST,
    LABELS,
    LOWER,
    RATIOS,
    at_ratios,
    batch_sizes,
    digits_of,
    is_ours,
)
from benchmarks.pareto_store import Point
from benchmarks.scores import mean_interval


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


def all_bars(points: Sequence[Point], score: str) -> list[Bar]:
    """A bar for every batch size that was timed, then FLOPs, at each ratio that elastic and a rival reach."""
    found = []
    for rows in (*batch_sizes(points), None):
        curves = at_ratios(points, rows, score)
        ours = curves.pop(FIRST, {})
        for ratio in RATIOS:
            others = {n: v[ratio] for n, v in curves.items() if ratio in v and not is_ours(n)}
            if ratio not in ours or not others:
                continue
            sign = -1 if score in LOWER else 1
            name = max(others, key=lambda other: sign * float(others[other].mean()))
            lead = mean_interval(sign * (ours[ratio] - others[name]))
            means = float(ours[ratio].mean()), float(others[name].mean())
            found.append(Bar(rows, ratio, name, *means, *lead))
    return found


def bar_rows(found: Sequence[Bar], score: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of bars."""
    d = digits_of(score)
    head = ["at equal", "ratio", "elastic", "best rival", "its score", "lead (95 % interval)", "verdict"]
    rows = [
        [
            what(bar.rows),
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
    """A line per batch size, and one for FLOPs: at how many ratios ahead, and the largest deficit."""
    lines, d = [], digits_of(score)
    for rows, group in itertools.groupby(found, key=lambda bar: bar.rows):
        bars = list(group)
        ahead, worst = sum(bar.low > 0 for bar in bars), min(bars, key=lambda bar: bar.lead)
        behind = (
            f"largest deficit {-worst.lead:.{d}f} at {worst.ratio:g}, to {worst.rival}"
            if worst.lead < 0
            else "never behind"
        )
        lines.append(
            f"{LABELS[score]}, at {what(rows)}: ahead outside the interval at {ahead} of {len(bars)} ratios, "
            f"first at {sum(bar.lead > 0 for bar in bars)}, {behind}"
        )
    return lines


def what(rows: int | None) -> str:
    """What is equal: FLOPs, or the time of a batch size."""
    return "FLOPs" if rows is None else f"time, batch {rows}"

"""The terminal view of a trace: heatmaps that read without colour, tables, and the limits.

Shapes: S steps, N blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from edit_cli.console import two_columns
from edit_cli.generation.report import flops
from edit_cli.profile.trace import (
    EXPLAINED,
    TITLES,
    Grid,
    grid,
    kinds_table,
    map_title,
    scale_of,
    show,
    shown_runs,
)  # fmt: skip

SHADES, ASCII_SHADES = "·░▒▓█", ".-+x#"
"""Nothing, then a quarter of the scale each. The second set where the terminal knows no other characters."""
COLOURS = ("dim", "#4c6ef5", "#0ca678", "#e8890c", "#e03131")
"""One per shade, of a lightness that shows on dark and on light terminals."""
KINDS_NEED = (92, 78, 66)
"""The table of kinds drops FLOP/s, then the share of blocks, then the time per block below these widths."""
MAX_ROWS, MAX_CELL = 32, 4
"""More blocks than rows are shown several to a row; a step is at most so many characters wide."""


def as_view(trace: Mapping[str, Any], metric: str, console: Console) -> RenderableType:
    """Everything the terminal shows, fitted to the console's width."""
    runs = shown_runs(trace)
    parts: list[RenderableType] = [two_columns(_summary(trace)), Text()]
    scale = scale_of(metric, [grid(trace, run, metric) for run in runs])
    for run in runs:
        parts += [heatmap(trace, run, metric, scale, console), Text()]
    parts += [kinds(trace, runs, console.width), Text(), stages(trace), Text(), two_columns(costs(trace))]
    return Group(*parts)


def heatmap(
    trace: Mapping[str, Any],
    run: Mapping[str, Any],
    metric: str,
    scale: tuple[float, float],
    console: Console,
) -> Text:
    """One map: a row per block (or per few), a column per step (or per few), the row's mean beside it."""
    values = grid(trace, run, metric)
    shades = SHADES if _draws(console, SHADES) else ASCII_SHADES
    names = [block["kind"] for block in trace["blocks"]]
    per_row = math.ceil(len(names) / MAX_ROWS)
    starts = range(0, len(names), per_row)
    lasts = [min(start + per_row, len(names)) - 1 for start in starts]
    labels = [
        f"{names[first]} {first}" + (f"-{last}" if last > first else "")
        for first, last in zip(starts, lasts, strict=True)
    ]
    margin = max(map(len, labels)) + 1
    room = max(8, console.width - margin - 9)
    per_column = math.ceil(len(values) / room)
    columns = range(0, len(values), per_column)
    cell = max(1, min(MAX_CELL, room // len(columns)))
    text = Text(no_wrap=True)
    text.append(f"{TITLES[metric]}", "bold").append(f"  {map_title(trace, run)}\n")
    for label, start in zip(labels, starts, strict=True):
        text.append(label.rjust(margin - 1) + " ", "dim")
        for column in columns:
            part = values[column : column + per_column, start : start + per_row]
            level = _level(_mean(part), scale)
            text.append((" " if level is None else shades[level]) * cell, COLOURS[level or 0])
        text.append(f" {show(metric, _mean(values[:, start : start + per_row])):>8}\n")
    text.append(_axis(margin, len(columns), per_column, cell) + "\n", "dim")
    text.append_text(_legend(metric, scale, shades))
    return text


def _draws(console: Console, characters: str) -> bool:
    try:
        characters.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _mean(part: Grid) -> float:
    return float(np.nanmean(part)) if np.isfinite(part).any() else math.nan


def _level(value: float, scale: tuple[float, float]) -> int | None:
    if not math.isfinite(value):
        return None
    low, high = scale
    share = (value - low) / (high - low)
    return 0 if share < 0.005 else min(4, math.ceil(min(share, 1.0) * 4))


def _axis(margin: int, columns: int, per_column: int, cell: int) -> str:
    """Step numbers under the map, as many as fit."""
    line = [" "] * (columns * cell)
    free = 0
    for column in range(columns):
        label, at = str(column * per_column), column * cell
        regular = columns * cell < 30 or (column * per_column) % 5 == 0
        if regular and at >= free and at + len(label) <= len(line):
            line[at : at + len(label)] = label
            free = at + len(label) + 1
    return "step".rjust(margin - 1) + " " + "".join(line)


def _legend(metric: str, scale: tuple[float, float], shades: str) -> Text:
    low, high = scale
    text = Text()
    text.append(shades[0], COLOURS[0]).append(f" {show(metric, low) if metric != 'time' else '0'}")
    for level in range(1, 5):
        edge = low + (high - low) * level / 4
        more = " and more" if level == 4 and metric not in ("skip", "reuse", "width", "similarity") else ""
        text.append(f"   {shades[level] * 2}", COLOURS[level]).append(f" to {show(metric, edge)}{more}")
    text.append(f"\n{EXPLAINED[metric]}", "dim")
    return text


def kinds(trace: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], width: int = 120) -> Table:
    """A row per run and block kind. width: of the terminal; a narrow one leaves out the last columns."""
    left_out = sum(width < needed for needed in KINDS_NEED)
    table = Table(box=None, pad_edge=False, title="blocks by kind", title_justify="left", title_style="bold")
    table.add_column("run", style="dim")
    table.add_column("kind")
    names = ("blocks", "skip", "reuse", "width", "FLOPs", "per block", "of blocks", "FLOP/s")
    for name in names[: len(names) - left_out]:
        table.add_column(name, justify="right", no_wrap=True)
    for run in [trace["runs"][0], *(r for r in runs if r is not trace["runs"][0])]:
        for row in kinds_table(trace, run):
            cells = (
                run["name"], row["kind"], str(row["blocks"]), f"{row['skip']:.0%}", f"{row['reuse']:.0%}",
                "" if row["width"] is None else f"{row['width']:.2f}", flops(row["flops"]),
                seconds(row["per_block"]), f"{row['share']:.0%}", _rate(row["flop_per_second"]),
            )  # fmt: skip
            table.add_row(*cells[: len(cells) - left_out])
    return table


def stages(trace: Mapping[str, Any]) -> Table:
    """Seconds per stage, and inside denoising per part, a column per run."""
    runs = trace["runs"]
    count = len(trace["request"]["samples"])
    title = f"time for {count} sample{'s' if count > 1 else ''}"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("stage", style="dim")
    for run in runs:
        table.add_column(run["name"], justify="right")
    for name in runs[0]["seconds"]:
        table.add_row(name, *(seconds(run["seconds"][name]) for run in runs))
        if name == "denoise":
            for part, title in (
                ("block", "  in blocks"), ("cache", "  of it feature cache"), ("router", "  routers"),
                ("decide", "  policy"),
            ):  # fmt: skip
                table.add_row(title, *(seconds(run["parts"][part]) for run in runs))
    return table


def _summary(trace: Mapping[str, Any]) -> dict[str, str]:
    request, made, timing = trace["request"], trace["made"], trace["timing"]
    labels = ", ".join(sample["label"] for sample in request["samples"][:4])
    more = len(request["samples"]) - 4
    return {
        "model": f"{trace['model']}, {request['size']}, {request['steps']} steps, "
        f"guidance {request['guidance']:g}",
        "samples": labels + (f" and {more} more" if more > 0 else ""),
        "machine": f"{made['device']} ({made['device_name']}), {made['dtype']}, {made['threads']} threads",
        "timing": f"{timing['method']}; {timing['statistic']} ({timing['repeats']}); "
        f"before, {timing['warm_up']}",
    }


def costs(trace: Mapping[str, Any]) -> dict[str, str]:
    """Compute, memory and host reads per run, the cost of profiling, and Amdahl's limit."""
    lines: dict[str, str] = {}
    dense = trace["runs"][0]
    for run in trace["runs"]:
        name = run["name"] if run is dense or run["budget"] is None else f"budget {run['name']}"
        ratio = run["seconds"]["denoise"] / dense["seconds"]["denoise"]
        line = (
            f"{flops(run['flops']['spent'])} at {_rate(run['flop_per_second'])}; peak memory "
            f"{run['peak_bytes'] / 2**20:.0f} MiB, feature cache {run['cache_bytes'] / 2**20:.1f} MiB; "
            f"{run['host_reads_per_step']:.2g} host reads per step"
        )
        if run is not dense:
            line += f"; denoising takes {ratio:.2f} of the dense time"
            line += "".join(f", {name_} {fmean(v):.4g}" for name_, v in run["quality"].items())
        lines[name] = line
    lines["profiling"] = overhead_line(trace)
    lines["limit"] = limit_line(trace)
    return lines


def overhead_line(trace: Mapping[str, Any]) -> str:
    """What measuring cost: counted, and as the difference between runs with and without it."""
    timing = trace["timing"]
    line = (
        f"{timing['spans']} spans of {1e6 * timing['span_seconds']:.2g} us: "
        f"{timing['overhead']:.2%} of the denoising time"
    )
    both = timing["overhead_compared"]
    if both is not None:
        line += (
            f"; runs with and without it differ by {both['median']:+.1%} "
            f"({both['low']:+.1%} to {both['high']:+.1%} over repeats)"
        )
    return line


def limit_line(trace: Mapping[str, Any]) -> str:
    """Amdahl's law in a sentence."""
    limits = trace["limits"]
    line = (
        f"blocks are {limits['share']:.0%} of the time after loading: no budget can make the whole faster "
        f"than {limits['fastest']:.3g}x"
    )
    rest = [f"{n.removeprefix('at_')} at most {x:.3g}x" for n, x in limits.items() if n.startswith("at_")]
    return line + (f"; budget {', '.join(rest)}" if rest else "")


def seconds(value: float) -> str:
    """0.0123 -> "12.3 ms"."""
    if value == 0:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _rate(value: float) -> str:
    return f"{flops(value)}/s"

"""The measuring half of the comparison: quality of every setting, then time, each resumable on its own.

Quality may run on a busy machine, time may not: the phases share nothing but the results folder. Time
by itself is taken of the settings whose quality is there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import recorded
from benchmarks.bench import Attached, Bench, run_quality, run_timed
from benchmarks.pareto_store import Point, Store, point_key
from benchmarks.rivals import Rival, Setting

GROUP = 6
"""Settings timed between two dense runs."""
TYPICAL = 0.6
"""Share of the dense model's FLOPs that a setting spends on average, to estimate durations."""

console = Console(highlight=False)


def thinned(rival: Rival, most: int | None) -> Rival:
    """The rival with at most `most` settings, evenly spread over its range, both ends among them."""
    if most is None or len(rival.settings) <= most:
        return rival
    chosen = np.linspace(0, len(rival.settings) - 1, most).round().astype(int)
    if most == 1:
        chosen = np.array([len(rival.settings) // 2])
    return replace(rival, settings=tuple(rival.settings[i] for i in chosen))


def with_quality(store: Store, rivals: Sequence[Rival]) -> list[Rival]:
    """The rivals with those of their settings whose quality is known: time alone makes no point."""
    known = set(store.load())
    kept = [
        replace(r, settings=tuple(s for s in r.settings if point_key(r.name, s) in known)) for r in rivals
    ]
    return [rival for rival in kept if rival.settings]


def todo_quality(store: Store, rivals: Sequence[Rival]) -> list[tuple[Rival, Setting]]:
    """Settings whose quality the store lacks."""
    done = set(store.load())
    return [(r, s) for r, s in settings_of(rivals) if point_key(r.name, s) not in done]


def todo_time(
    store: Store, rivals: Sequence[Rival], rows: int, turn: int, rounds: int
) -> list[tuple[Rival, Setting]]:
    """Settings whose time the store lacks in one round; each round starts elsewhere."""
    every, done = list(settings_of(rivals)), store.timed()
    shift = turn * len(every) // max(rounds, 1)
    order = every[shift:] + every[:shift]
    return [(r, s) for r, s in order if (point_key(r.name, s), rows, turn) not in done]


def announce(bench: Bench, store: Store, rivals: Sequence[Rival], args: argparse.Namespace) -> None:
    """One line per phase: what is left to do, and how long that takes at the speed of one measured step."""
    if not args.timing:
        left, count = len(todo_quality(store, rivals)), len(bench.prompts)
        references = 0 if store.references.is_file() else 1 + args.reference_steps / bench.num_steps
        pictures = count * (TYPICAL * left + references)
        seconds = pictures / args.rows * bench.num_steps * step_seconds(bench, args.rows)
        console.print(
            f"quality: {left} settings of {len(rivals)} rivals, {count} {bench.things}, "
            f"{bench.num_steps} steps: about {_minutes(seconds)} at the present load"
        )
    if args.timing and args.rounds:
        seconds, runs = 0.0, 0
        for rows in args.batch_sizes:
            left = sum(len(todo_time(store, rivals, rows, n, args.rounds)) for n in range(args.rounds))
            if left:
                dense = bench.num_steps * step_seconds(bench, rows)
                seconds, runs = seconds + left * dense * (TYPICAL + 2 / GROUP), runs + left
        sizes = ", ".join(map(str, args.batch_sizes))
        console.print(
            f"time: {runs} runs of {len(rivals)} rivals, batch {sizes}, {args.rounds} rounds: "
            f"about {_minutes(seconds)} at the present load"
        )


def step_seconds(bench: Bench, rows: int) -> float:
    """Seconds of one more dense step of a batch: four steps less one, after the first has warmed up."""
    workload, taken = bench.workload(rows), []
    for steps in (1, 1, 4):
        start = time.perf_counter()
        workload.run(0, num_steps=steps)
        taken.append(time.perf_counter() - start)
    return max((taken[2] - taken[1]) / 3, 1e-6)


def _minutes(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{max(1, round(seconds / 60))} min"


def references(bench: Bench, store: Store, args: argparse.Namespace) -> tuple[dict[str, list[Any]], float]:
    """Dense results, results of many steps, and dense FLOPs; kept in the store."""
    kept = store.load_references()
    if kept is None:
        dense, flops = run_quality(bench, Attached(bench.num_steps, nullcontext), args.rows)
        with recorded.planned(bench, lambda grid: recorded.exact_plan(bench, grid, args.reference_steps)):
            truth = bench.results(args.rows, bench.num_steps)
        store.save_references({"dense": bench.pack(dense), "truth": bench.pack(truth)}, flops)
        kept = store.load_references()
        assert kept is not None, "just saved"
    arrays, flops = kept
    return {name: bench.unpack(array) for name, array in arrays.items()}, flops


def measure_quality(bench: Bench, store: Store, rivals: Sequence[Rival], args: argparse.Namespace) -> None:
    """Results, FLOPs and scores of every setting that the store lacks."""
    todo = todo_quality(store, rivals)
    bench.chosen.update(store.load_chosen())
    if not todo and point_key("dense", {}) in store.load():
        return
    known, dense_flops = references(bench, store, args)
    if point_key("dense", {}) not in store.load():
        dense = known["dense"]
        store.add_point(
            Point("dense", {}, 1.0, bench.judge(dense, known), whole=bench.judge_all(dense, known))
        )
    for number, (rival, setting) in enumerate(todo, 1):
        start = time.monotonic()
        with rival.attached(bench, setting) as attached:
            results, flops = run_quality(bench, attached, args.rows, dense_flops)
        scores, whole = bench.judge(results, known), bench.judge_all(results, known)
        point = Point(rival.name, dict(setting), flops, scores, bundle=rival.bundle(bench), whole=whole)
        store.add_point(point)
        store.save_chosen(bench.chosen)
        mean = statistics.mean(point.scores[bench.score])
        console.print(
            f"quality {number}/{len(todo)}  {point.key}: FLOPs {flops:.3f}, {bench.score} {mean:.3f}, "
            f"{time.monotonic() - start:.0f} s"
        )


def measure_times(bench: Bench, store: Store, rivals: Sequence[Rival], args: argparse.Namespace) -> None:
    """Seconds of every setting, batch size and round that the store lacks."""
    workloads = {rows: bench.workload(rows) for rows in args.batch_sizes}
    bench.chosen.update(store.load_chosen())
    for turn in range(args.rounds):
        for rows in args.batch_sizes:
            todo = todo_time(store, rivals, rows, turn, args.rounds)
            for start in range(0, len(todo), GROUP):
                time_group(bench, store, todo[start : start + GROUP], workloads[rows], turn)
            if todo:
                console.print(f"time, round {turn + 1}/{args.rounds}, batch {rows}: {len(todo)} settings")


def time_group(
    bench: Bench, store: Store, group: Sequence[tuple[Rival, Setting]], workload: Any, turn: int
) -> None:
    """A few settings between two dense runs, all on the same prompts; nothing is kept of half a group."""
    batch, dense = turn % workload.num_batches, Attached(bench.num_steps, nullcontext)
    before, seconds = run_timed(bench, dense, workload, batch), []
    for rival, setting in group:
        with rival.attached(bench, setting) as attached:
            seconds.append(run_timed(bench, attached, workload, batch))
    reference = (before + run_timed(bench, dense, workload, batch)) / 2
    for (rival, setting), taken in zip(group, seconds, strict=True):
        key = point_key(rival.name, setting)
        store.add_time(key, workload.rows, turn, taken, reference, rival.bundle(bench))


def settings_of(rivals: Sequence[Rival]) -> Iterator[tuple[Rival, Setting]]:
    """Every rival with every one of its settings."""
    for rival in rivals:
        for setting in rival.settings:
            yield rival, setting

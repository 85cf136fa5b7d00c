"""Interleaved timing: all variants take turns, so that a busy or throttled machine slows them alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

Run = Callable[[], Iterator[None]]
"""Starts one run of a variant; every `next` does one slice of its work (a denoising step, or all of it)."""


def interleaved(variants: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds per variant and round: slices interleaved, order rotated, one more round first to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds + 1):
        shift = turn % len(names)
        total = _one_round(variants, names[shift:] + names[:shift])
        for name in names if turn else ():
            seconds[name].append(total[name])
    return seconds


def _one_round(variants: Mapping[str, Run], order: list[str]) -> dict[str, float]:
    gc.collect()
    total = dict.fromkeys(order, 0.0)
    running = {name: variants[name]() for name in order}
    while running:
        for name in [name for name in order if name in running]:
            start = time.perf_counter()
            done = next(running[name], _DONE)
            total[name] += time.perf_counter() - start
            if done is _DONE:
                del running[name]
    return total


_DONE = object()


def ratio_of_medians(seconds: list[float], reference: list[float]) -> float:
    """median(seconds) / median(reference)."""
    return statistics.median(seconds) / statistics.median(reference)

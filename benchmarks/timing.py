"""Interleaved timing: all variants take turns, so that a busy or throttled machine slows them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

Run = Callable[[], Iterator[None]]
"""Starts one run of a variant; every `next` does one slice of its work (a denoising step, or all of it)."""


def interleaved(variants: Mapping[str, Run], rounds: int) -> dict[str, NDArray[np.float64]]:
    """Seconds [rounds, slices] per variant: slices interleaved, order rotated, one round first to warm up."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds + 1):
        shift = turn % len(names)
        measured = _one_round(variants, names[shift:] + names[:shift])
        for name in names if turn else ():
            seconds[name].append(measured[name])
    return {name: np.array(rows) for name, rows in seconds.items()}


def _one_round(variants: Mapping[str, Run], order: list[str]) -> dict[str, list[float]]:
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in order}
    running = {name: variants[name]() for name in order}
    while running:
        for name in [name for name in order if name in running]:
            start = time.perf_counter()
            done = next(running[name], _DONE)
            took = time.perf_counter() - start
            if done is _DONE:
                seconds[name][-1] += took  # what a run does after its last slice belongs to it
                del running[name]
            else:
                seconds[name].append(took)
    return seconds


_DONE = object()


def typical(seconds: NDArray[np.float64]) -> float:
    """Seconds of a run: the medians over rounds of its slices, added up.

    Other work on the machine disturbs a slice here and there: hardly a long run is free of it, but most
    rounds of every slice are. seconds: [rounds, slices].
    """
    return float(np.median(seconds, axis=0).sum())

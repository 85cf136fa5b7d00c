"""Watch the dense model: what every block adds, and how wrong each cheaper way to get it would have been.

Shapes: R rows, L tokens (a fixed sample of them), D dim, E time embedding dim, K ages, N blocks, S steps,
G branches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..elastic import Computed, Elastic
from ..policy import OpenPolicy
from ..spec import WIDTHS
from .workload import Workload

AGES = 4
"""Oldest reuse measured, in steps."""
TOKENS = 64
"""Tokens per row whose deltas are compared; errors are means, so a sample of tokens estimates them."""
WIDTH_EVERY = 4
"""Widths are measured on every fourth step and interpolated between them."""


@dataclass
class Record:
    """Local mean squared errors of one workload, and the routers' inputs.

    reuse [R, G, S, N, K, 2]: by age 1..K and order 0/1, NaN before the first pass of that age.
    skip [R, G, S, N]. width [R, G, S, N, 3], NaN on steps that were not measured.
    pooled [G, S, N]: per entry `[R, D]` float16. modulation [G, S]: per entry `[R, E]` float16.
    latents: `[R, ...]` final latents of the dense runs. times [S]: the sampler's times.
    """

    reuse: NDArray[np.float32]
    skip: NDArray[np.float32]
    width: NDArray[np.float32]
    pooled: list[list[list[Tensor]]]
    modulation: list[list[Tensor | None]]
    latents: Tensor
    times: list[float]


class Recorder:
    """Observer of one dense batch. Keeps 2 x AGES deltas per block of a sample of tokens, nothing more."""

    def __init__(self, workload: Workload, blocks: int, measure_widths: bool) -> None:
        shape = (workload.rows, len(workload.branches), workload.num_steps, blocks)
        self.branches = workload.branches
        self.reuse = np.full((*shape, AGES, 2), np.nan, np.float32)
        self.skip = np.full(shape, np.nan, np.float32)
        self.width = np.full((*shape, 3), np.nan, np.float32)
        self.pooled: dict[tuple[int, int, int], Tensor] = {}
        self.modulation: dict[tuple[int, int], Tensor] = {}
        self.times = [0.0] * workload.num_steps
        self.measure_widths = measure_widths
        self._history: dict[tuple[int, int], deque[tuple[Tensor, Tensor]]] = {}

    def __call__(self, seen: Computed) -> None:
        """A block was computed for every row of the batch."""
        g = self.branches.index(seen.call.info.branch)
        s, n = seen.call.info.step, seen.block.index
        before, after = seen.before[0], seen.after[0]
        index = torch.linspace(0, before.shape[1] - 1, min(TOKENS, before.shape[1])).long().to(before.device)
        delta = (after[:, index] - before[:, index]).float()
        time = seen.call.time.reshape(-1, 1, 1)
        past = self._history.setdefault((g, n), deque(maxlen=2 * AGES))
        for age in range(1, min(AGES, len(past)) + 1):
            last, last_time = past[-age]
            self.reuse[:, g, s, n, age - 1, 0] = _mse(last, delta)
            guess = last
            if 2 * age <= len(past):
                first, first_time = past[-2 * age]
                guess = last + (last - first) * ((time - last_time) / (last_time - first_time))
            self.reuse[:, g, s, n, age - 1, 1] = _mse(guess, delta)
        past.append((delta, time))
        if g == n == 0:
            self.times[s] = float(time.flatten()[0])
        self.skip[:, g, s, n] = _mse(torch.zeros_like(delta), delta)
        self.pooled[g, s, n] = before.mean(dim=1).half().cpu()
        name = seen.block.spec.modulation
        if n == 0 and name:
            self.modulation[g, s] = seen.inputs[name][: before.shape[0]].half().cpu()
        if self.measure_widths and s % WIDTH_EVERY == 0 and seen.block.slicers:
            self._widths(seen, g, index)

    def _widths(self, seen: Computed, g: int, index: Tensor) -> None:
        exact = seen.after[0][:, index].float()
        for i, width in enumerate(WIDTHS[:-1]):
            with seen.block.narrowed(width):
                narrow = seen.block.unpack(seen.forward(**seen.inputs))[0][:, index].float()
            self.width[:, g, seen.call.info.step, seen.block.index, i] = _mse(narrow, exact)


def record(
    elastic: Elastic, workload: Workload, report: Callable[[int, int], None] = lambda done, total: None
) -> Record:
    """Run the workload densely and measure. report(done, total) is called after every batch."""
    recorders, latents = [], []
    for batch in range(workload.num_batches):
        recorder = Recorder(workload, len(elastic.blocks), measure_widths=batch == 0)
        elastic.observer = recorder
        try:
            with torch.no_grad(), elastic.scope(policy=OpenPolicy(), num_steps=workload.num_steps):
                latents.append(workload.run(batch).cpu())
        finally:
            elastic.observer = None
        recorders.append(recorder)
        report(batch + 1, workload.num_batches)
    branches, steps, blocks = len(workload.branches), workload.num_steps, len(elastic.blocks)
    return Record(
        reuse=np.concatenate([r.reuse for r in recorders]),
        skip=np.concatenate([r.skip for r in recorders]),
        width=recorders[0].width,
        pooled=[
            [[torch.cat([r.pooled[g, s, n] for r in recorders]) for n in range(blocks)] for s in range(steps)]
            for g in range(branches)
        ],
        modulation=[
            [
                torch.cat([r.modulation[g, s] for r in recorders])
                if (g, s) in recorders[0].modulation
                else None
                for s in range(steps)
            ]
            for g in range(branches)
        ],
        latents=torch.cat(latents),
        times=recorders[0].times,
    )


def _mse(a: Tensor, b: Tensor) -> NDArray[np.float32]:
    return (a - b).square().mean(dim=(1, 2)).cpu().numpy()

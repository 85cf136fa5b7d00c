"""Watch the dense model: what its blocks add together at every step.

Shapes: R rows, L tokens (a fixed sample of them), D dim, S steps, G branches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..elastic import Computed, Elastic
from ..policy import OpenPolicy
from .state import State
from .workload import NotFiniteError, Workload, run_patched

TOKENS = 256
"""Tokens per row whose deltas are compared; products are means, so a sample of tokens estimates them."""


@dataclass
class Record:
    """Second moments of one workload.

    gram [R, G * S, G * S]: per row, mean product of the residual deltas that all blocks together add to the
    first stream at two (branch, step)s, branch-major. latents: `[R, ...]` final latents of the dense runs.
    times [S]: the sampler's times.
    """

    gram: NDArray[np.float64]
    latents: Tensor
    times: list[float]

    @classmethod
    def join(cls, batches: Sequence[Mapping[str, Tensor]]) -> Record:
        """All batches together, each as `Recorder.tensors` gave it."""
        gram, latents = (torch.cat([batch[name] for batch in batches]) for name in ("gram", "latents"))
        return cls(gram.numpy(), latents, batches[0]["times"].tolist())


class Recorder:
    """Observer of one dense batch: keeps the stack's deltas of a sample of tokens, nothing more.

    Raises NotFiniteError at the step where the blocks add NaN or an infinity.
    """

    def __init__(self, workload: Workload, segments: tuple[tuple[int, int], ...], batch: int = 0) -> None:
        self.branches, self._workload, self._batch = workload.branches, workload, batch
        self.times = [0.0] * workload.num_steps
        self._starts = {first for first, _ in segments}
        self._ends = {last for _, last in segments}
        self._entry: Tensor | None = None
        self._deltas: dict[tuple[int, int], list[Tensor]] = {}

    def __call__(self, seen: Computed) -> None:
        """A block was computed for every row of the batch."""
        info, n = seen.call.info, seen.block.index
        s, before, after = info.step, seen.before[0], seen.after[0]
        if n in self._starts:
            self._entry = _sampled(before)
        if n in self._ends:
            assert self._entry is not None
            delta = _sampled(after) - self._entry
            if not bool(delta.isfinite().all()):
                at = f"step {s + 1} of {len(self.times)}"
                raise NotFiniteError(f"in batch {self._batch + 1} of {self._workload.num_batches}, {at}")
            for g, rows in self.parts(info.branch, info.rows):
                self._deltas.setdefault((g, s), []).append(delta[rows])
        if n == 0:
            self.times[s] = float(seen.call.time.flatten()[0])

    def parts(self, branch: str, rows: int) -> list[tuple[int, slice]]:
        """Which CFG branches a call holds, and which of its rows are theirs."""
        if branch in self.branches:
            return [(self.branches.index(branch), slice(None))]
        samples = self._workload.rows
        if rows != samples * len(self.branches):
            raise ValueError(
                f"a call of branch {branch!r} has {rows} rows, which are not {samples} samples in the "
                f"branches {', '.join(self.branches)}"
            )
        return [(g, slice(g * samples, (g + 1) * samples)) for g in range(len(self.branches))]

    def tensors(self, latents: Tensor) -> dict[str, Tensor]:
        """All that is kept of the batch, for `Record.join`; the deltas behind `gram` are freed."""
        times = torch.tensor(self.times, dtype=torch.float64)
        kept = {"gram": torch.from_numpy(self.gram()), "latents": latents, "times": times}
        self._deltas.clear()
        self._entry = None
        return kept

    def gram(self) -> NDArray[np.float64]:
        """[R, G * S, G * S] of this batch, in float64 on the host."""
        keys = [(g, s) for g in range(len(self.branches)) for s in range(len(self.times))]
        rows = [torch.cat([d.flatten(1) for d in self._deltas[key]], dim=1) for key in keys]
        deltas_RKX = torch.stack(rows, dim=1)
        products_RKK = torch.einsum("rkx,rlx->rkl", deltas_RKX, deltas_RKX) / deltas_RKX.shape[2]
        return products_RKK.double().cpu().numpy()  # type: ignore[no-any-return]


def record(
    elastic: Elastic,
    workload: Workload,
    report: Callable[[int, int], None] = lambda done, total: None,
    state: State | None = None,
) -> Record:
    """Run the workload densely and measure. report(done, total) is called after every batch.

    state: keeps every finished batch, and gives back those of an earlier attempt. Raises NotFiniteError.
    """
    batches: list[dict[str, Tensor]] = []
    for batch in range(workload.num_batches):
        done = None if state is None else state.batch(batch)
        if done is None:
            elastic.observer = recorder = Recorder(workload, elastic.segments, batch)
            try:
                latents = run_patched(elastic, workload, batch, OpenPolicy(), "record")
            finally:
                elastic.observer = None
            done = recorder.tensors(latents)
            if state is not None:
                state.keep_batch(batch, done)
        batches.append(done)
        report(batch + 1, workload.num_batches)
    return Record.join(batches)


def _sampled(stream: Tensor) -> Tensor:
    """Up to TOKENS evenly spaced tokens of a stream `[R, L, D]`, float32."""
    tokens = stream.shape[1]
    index = torch.linspace(0, tokens - 1, min(TOKENS, tokens)).long().to(stream.device)
    return stream.index_select(1, index).float()

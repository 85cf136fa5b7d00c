"""Feature cache: what blocks added when they were last computed, per sample, and what they will add next.

Blocks are cached in *units* of consecutive blocks; by default each is a unit of its own. While all rows of
a batch compute a unit together, its pass is remembered as references to the residual streams before and
after it: nothing is copied while a model runs densely, a unit's `after` is the next one's `before`, and
the difference is taken only when a reuse asks for it, once for a whole stretch of consecutive reused
units. Once rows go separate ways, their deltas are kept in one table per unit.

A policy may give the weights with which the remembered deltas are added up (planned/prediction.py). Else
order 0 adds the last residual delta again (the E-DiT release), order 1 continues its change linearly in the
sampler's time (first-order Taylor, as in TaylorSeer, arXiv 2503.06923), from the last two passes.

Shapes: R rows (samples, or cond/uncond rows of a batched call), R' some of them, L tokens, D dim, P passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rows import same

Streams = tuple[Tensor, ...]
Rows = Sequence[int]
Weights = tuple[float, ...] | Tensor


@dataclass(frozen=True, eq=False)
class Pass:
    """One computed pass of one unit for every row: streams `[R, L, D]` before and after, at time `[R]`."""

    time: Tensor
    before: Streams
    after: Streams

    def delta(self, end: Pass | None = None) -> Streams:
        """What was added from this unit's input to its output, or to that of a later unit."""
        return tuple(a - b for a, b in zip((end or self).after, self.before, strict=True))


@dataclass(eq=False)
class RowTable:
    """Deltas of one unit whose rows were computed at different steps, newest first: per depth, per stream.

    A row with fewer passes than the depth repeats its oldest one, a unit of time apart, so that an
    extrapolation from equal deltas gives just these. count [R]: passes each row really has.
    """

    deltas: list[Streams]
    times: list[Tensor]
    count: NDArray[np.int64]

    def put(self, rows: Rows, index: Tensor, time: Tensor, delta: Streams) -> None:
        """Add the newest pass of `rows`, at `index [R']` on the device: delta `[R', L, D]`, time `[R']`."""
        fresh = self.count[list(rows)] == 0
        for depth in range(len(self.deltas) - 1, 0, -1):
            newer, older = self.deltas[depth - 1], self.deltas[depth]
            for new, old in zip(newer, older, strict=True):
                old.index_copy_(0, index, new.index_select(0, index))
            self.times[depth].index_copy_(0, index, self.times[depth - 1].index_select(0, index))
        chosen = torch.from_numpy(np.flatnonzero(fresh)).to(index.device) if fresh.any() else None
        for depth, streams in enumerate(self.deltas):
            if depth == 0:
                _write(streams, index, delta)
                self.times[0].index_copy_(0, index, time)
            elif chosen is not None:
                _write(streams, index[chosen], tuple(d[chosen] for d in delta))
                self.times[depth].index_copy_(0, index[chosen], time[chosen] + depth)
        self.count[list(rows)] = np.minimum(self.count[list(rows)] + 1, len(self.deltas))


def _write(streams: Streams, index: Tensor, values: Streams) -> None:
    for stream, value in zip(streams, values, strict=True):
        stream.index_copy_(0, index, value.detach())


class ResidualCache:
    """The last `depth` passes of every unit for every row of one CFG branch. Depth 0 stores nothing."""

    def __init__(self, num_units: int, num_rows: int, depth: int) -> None:
        self.num_rows = num_rows
        self.depth = depth
        self._passes: list[list[Pass]] = [[] for _ in range(num_units)]  # of all rows, most recent first
        self._tables: list[RowTable | None] = [None] * num_units
        self._shares = [False] * num_units  # whether a unit's newest `before` is the last one's `after`
        self._bytes: int | None = None  # of all passes, None where what is held has changed in kind

    def store(
        self,
        unit: int,
        rows: Rows | None,
        index: Tensor | None,
        time: Tensor,
        before: Streams,
        after: Streams,
        graphed: bool = False,
    ) -> None:
        """Remember a computed pass. rows: which rows the tensors hold, None for all; index: the same on the
        device; time: `[R']`. graphed: what the block gives may be overwritten by its next call.
        """
        if self.depth == 0:
            return
        if graphed:  # a CUDA graph's outputs lie in its own memory, and the next replay writes over them
            before, after = tuple(x.clone() for x in before), tuple(x.clone() for x in after)
        table = self._table(unit, before) if rows is not None else self._tables[unit]
        if rows is None:
            passes = self._passes[unit]
            ahead = self._passes[unit - 1] if unit else []
            shares = bool(ahead) and ahead[0].after[0] is before[0]
            if len(passes) < self.depth or table is not None or shares is not self._shares[unit]:
                self._bytes, self._shares[unit] = None, shares
            self._passes[unit] = [Pass(time, before, after), *passes[: self.depth - 1]]
            if len(self._passes[unit]) == self.depth:
                self._tables[unit] = table = None
        else:
            self._passes[unit], self._bytes = [], None
        if table is not None:
            rows = range(self.num_rows) if rows is None else rows
            index = torch.arange(self.num_rows, device=time.device) if index is None else index
            table.put(rows, index, time, Pass(time, before, after).delta())

    def _table(self, unit: int, like: Streams) -> RowTable:
        """The unit's row table, made from the passes so far. like: streams of any rows, for their shapes."""
        table = self._tables[unit]
        if table is None:
            passes, rows, self._bytes = self._passes[unit], self.num_rows, None
            deltas = [tuple(d.detach() for d in p.delta()) for p in passes]
            times = [p.time.clone() for p in passes]
            if not passes:
                deltas = [tuple(x.new_zeros(rows, *x.shape[1:]) for x in like)]
                times = [torch.zeros(rows, device=like[0].device)]
            while len(deltas) < self.depth:
                deltas.append(tuple(d.clone() for d in deltas[-1]))
                times.append(times[-1] + 1)
            table = self._tables[unit] = RowTable(deltas, times, np.full(rows, len(passes)))
        return table

    def available(self, unit: int, row: int) -> int:
        """How many passes of `unit` are remembered for `row`, at most `depth`."""
        table = self._tables[unit]
        return len(self._passes[unit]) if table is None else int(table.count[row])

    def passes(self, unit: int) -> NDArray[np.int64] | int:
        """As `available`, of every row: `[R, 1]`, or one number for all."""
        table = self._tables[unit]
        return len(self._passes[unit]) if table is None else table.count[:, None]

    def chained(self, first: int, last: int) -> bool:
        """Whether units first..last fed each other directly in the remembered passes.

        False as soon as something was added between two units (ControlNet), or passes of different
        steps would be mixed: their deltas must then be added unit by unit.
        """
        if any(table is not None for table in self._tables[first : last + 1]):
            return False
        for unit in range(first, last):
            here, after = self._passes[unit], self._passes[unit + 1]
            if len(here) != len(after):
                return False
            for a, b in zip(here, after, strict=True):
                if len(a.after) != len(b.before):
                    return False
                if not all(same(x, y) for x, y in zip(a.after, b.before, strict=True)):
                    return False
        return True

    def delta(
        self,
        first: int,
        last: int,
        rows: Rows | None,
        index: Tensor | None,
        time: Tensor,
        order: int,
        weights: Weights | None,
    ) -> Streams:
        """What units first..last together add for `rows` (None: all) at `time [R']`: streams `[R', L, D]`.

        The units must be chained. index: `rows` on the device. weights: of the passes, newest first, for all
        rows alike or `[R', P]`; None extrapolates in time, with as high an order as the passes allow.
        """
        if not all(self.available(first, row) for row in (range(self.num_rows) if rows is None else rows)):
            raise RuntimeError(f"unit {first} has nothing cached for rows {rows}")
        passes, keep = self._passes[first], order + 1 if weights is None else self.depth
        if rows is None and self._tables[first] is None:
            ends = self._passes[last]
            deltas = [start.delta(end) for start, end in zip(passes[:keep], ends, strict=False)]
            times = [start.time for start in passes[:keep]]
        else:
            table = self._table(first, passes[0].before if passes else ())
            pick = (lambda x: x) if index is None else (lambda x: x.index_select(0, index))
            deltas = [tuple(pick(d) for d in streams) for streams in table.deltas[:keep]]
            times = [pick(t) for t in table.times[:keep]]
        return _extrapolate(deltas, times, time) if weights is None else _weighted(deltas, weights)

    def nbytes(self) -> int:
        """Bytes held alive by the remembered passes, shared tensors counted once."""
        if self._bytes is None:
            self._bytes = self._count_bytes()
        return self._bytes

    def _count_bytes(self) -> int:
        held = [t for passes in self._passes for p in passes for t in (*p.before, *p.after)]
        held += [t for table in self._tables if table for streams in table.deltas for t in streams]
        return sum({id(t): t.nbytes for t in held}.values())


def _extrapolate(deltas: list[Streams], times: list[Tensor], time: Tensor) -> Streams:
    """From one delta: itself. From two, newest first: on the straight line through them."""
    if len(deltas) == 1:
        return deltas[0]
    weight = (time - times[1]) / (times[0] - times[1])
    # older + weight * (newest - older): weight 1 repeats the newest, beyond 1 extrapolates.
    return tuple(torch.lerp(o, n, _per_row(weight, n)) for n, o in zip(*deltas, strict=True))


def _per_row(weights: Tensor, x: Tensor) -> Tensor:
    """Weights `[R']` in the shape and dtype to multiply streams `[R', ..., D]` with."""
    return weights.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def _weighted(deltas: list[Streams], weights: Weights) -> Streams:
    """The weighted sum of deltas, newest first; weights of passes that are not there must be 0."""
    if isinstance(weights, Tensor):
        factors = weights[:, : len(deltas)].unbind(1)
        streams_P = zip(*deltas, strict=True)
        return tuple(
            _sum([d * _per_row(w, d) for d, w in zip(stream_P, factors, strict=True)])
            for stream_P in streams_P
        )
    known = [(streams, w) for streams, w in zip(deltas, weights, strict=False) if w] or [(deltas[0], 0.0)]
    totals = [d * known[0][1] for d in known[0][0]]
    for streams, w in known[1:]:
        totals = [total.add_(d, alpha=w) for total, d in zip(totals, streams, strict=True)]
    return tuple(totals)


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total

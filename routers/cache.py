"""Feature cache: what each block added when it was last computed, per sample, and its extrapolation in time.

A pass of a block is remembered as references to the residual streams before and after it, so nothing
is copied while a model runs densely: a block's `after` is the next block's `before`. The difference
is taken only when a reuse asks for it, and consecutive reused blocks cost one addition in all.

Order 0 adds the last residual delta again (the E-DiT release); order 1 continues its change linearly
in the sampler's time (first-order Taylor, as in TaylorSeer, arXiv 2503.06923), from the last two passes.

Shapes: R rows (samples, or cond/uncond rows of a batched call), L tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Streams = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Pass:
    """One computed pass of one block: streams `[R', L, D]` before and after, at time `[R']`."""

    time: Tensor
    before: Streams
    after: Streams
    position: dict[int, int] | None  # row -> index in the tensors; None: every row, in order

    def covers(self, row: int) -> bool:
        """Whether this pass computed `row`."""
        return self.position is None or row in self.position

    def index(self, rows: Sequence[int]) -> list[int]:
        """Positions of `rows` in the tensors."""
        return list(rows) if self.position is None else [self.position[row] for row in rows]


class ResidualCache:
    """The last `depth` passes of every block for every row of one CFG branch. Depth 0 stores nothing."""

    def __init__(self, num_blocks: int, num_rows: int, depth: int) -> None:
        self.num_rows = num_rows
        self.depth = depth
        self._passes: list[list[Pass]] = [[] for _ in range(num_blocks)]  # most recent first

    def store(
        self, block: int, rows: Sequence[int] | None, time: Tensor, before: Streams, after: Streams
    ) -> None:
        """Remember a computed pass. rows: which rows the tensors hold, None for all; time: `[R']`."""
        if self.depth == 0:
            return
        position = None if rows is None else {row: i for i, row in enumerate(rows)}
        passes = [Pass(time, before, after, position), *self._passes[block]]
        if all(p.position is None for p in passes):
            self._passes[block] = passes[: self.depth]
            return
        kept, need = [], dict.fromkeys(range(self.num_rows), self.depth)
        for candidate in passes:
            useful = [row for row, missing in need.items() if missing and candidate.covers(row)]
            if useful:
                kept.append(candidate)
                for row in useful:
                    need[row] -= 1
        self._passes[block] = kept

    def available(self, block: int, row: int) -> int:
        """How many passes of `block` are remembered for `row`, at most `depth`."""
        return sum(p.covers(row) for p in self._passes[block])

    def chained(self, first: int, last: int) -> bool:
        """Whether blocks first..last fed each other directly in the remembered passes.

        False as soon as something was added between two blocks (ControlNet), or passes of different
        steps would be mixed: their deltas must then be added block by block.
        """
        for block in range(first, last):
            here, after = self._passes[block], self._passes[block + 1]
            if len(here) != len(after):
                return False
            for a, b in zip(here, after, strict=True):
                if a.position != b.position or len(a.after) != len(b.before):
                    return False
                if any(x is not y for x, y in zip(a.after, b.before, strict=True)):
                    return False
        return True

    def delta(self, first: int, last: int, rows: Sequence[int] | None, time: Tensor, order: int) -> Streams:
        """What blocks first..last together add for `rows` (None: all) at `time [R']`, per stream `[R', L, D]`.

        The blocks must be chained. Uses as high an order as the remembered passes allow.
        """
        wanted = list(range(self.num_rows)) if rows is None else list(rows)
        histories: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(wanted):
            picks = [k for k, p in enumerate(self._passes[first]) if p.covers(row)][: order + 1]
            histories.setdefault(tuple(picks), []).append(i)
        if len(histories) == 1:
            return self._extrapolate(first, last, next(iter(histories)), wanted, time)
        pieces = []
        for picks, members in histories.items():
            chosen = torch.tensor(members, device=time.device)
            streams = self._extrapolate(first, last, picks, [wanted[i] for i in members], time[chosen])
            pieces.append((chosen, streams))
        total = tuple(s.new_empty(len(wanted), *s.shape[1:]) for s in pieces[0][1])
        for chosen, streams in pieces:
            for out, stream in zip(total, streams, strict=True):
                out.index_copy_(0, chosen, stream)
        return total

    def _extrapolate(
        self, first: int, last: int, picks: tuple[int, ...], rows: list[int], time: Tensor
    ) -> Streams:
        if not picks:
            raise RuntimeError(f"block {first} has nothing cached for rows {rows}")
        newest, latest = self._residual(first, last, picks[0], rows)
        if len(picks) == 1:
            return newest
        older, earlier = self._residual(first, last, picks[1], rows)
        weight = ((time - earlier) / (latest - earlier)).reshape(-1, 1, 1)
        # older + weight * (newest - older): weight 1 repeats the newest, beyond 1 extrapolates.
        return tuple(torch.lerp(o, n, weight.to(n.dtype)) for o, n in zip(older, newest, strict=True))

    def _residual(self, first: int, last: int, pick: int, rows: list[int]) -> tuple[Streams, Tensor]:
        start, end = self._passes[first][pick], self._passes[last][pick]
        index = start.index(rows)
        if index == list(range(start.time.shape[0])):
            return tuple(a - b for a, b in zip(end.after, start.before, strict=True)), start.time
        chosen = torch.tensor(index, device=start.time.device)
        streams = tuple(a[chosen] - b[chosen] for a, b in zip(end.after, start.before, strict=True))
        return streams, start.time[chosen]

    def nbytes(self) -> int:
        """Bytes held alive by the remembered passes, shared tensors counted once."""
        tensors = {
            id(t): t.numel() * t.element_size()
            for passes in self._passes
            for p in passes
            for t in (*p.before, *p.after)
        }
        return sum(tensors.values())

"""Sample a decoder's field on a grid: everywhere, or only near the surface with the same mesh as result.

Hierarchical decoding evaluates a coarse grid, then halves the cells again and again, each time only where
the surface may be. Three rules make its mesh equal to the dense one:

- a cell is refined if its corners differ in sign, or if a corner is so close to the level that the
  variation seen around the cell could carry the field across it (thin parts between grid nodes);
- after each refinement the surface is followed: a cell not yet refined that touches evaluated nodes of
  both signs is refined too, until no such cell is left, so no part of a surface is left open;
- random cells that nobody wanted are checked; if they hold surface, the field is too rough for a coarse
  grid to tell anything, and it is evaluated everywhere.

What it can miss is a separate piece smaller than a coarse cell that the variation around does not betray.

Points not evaluated take the value of a neighbouring coarse point: right in sign, not in magnitude.
Grids follow the published convention: `resolution` cells and one sample more per axis, in the order x, y, z.
"""

# mypy: no-warn-return-any
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

Field = Callable[[Tensor], Tensor]
"""Points `[Q, 3]` float32 to logits `[Q]`, positive inside."""

Progress = Callable[[int, int], None]
"""Called with (evaluations so far, evaluations now known to be needed)."""

MIN_COARSE, MAX_COARSE = 32, 64
NEAR_FACTOR = 0.5
"""Refine cells whose smallest |logit - level| is within this share of the variation over their neighbourhood.
In a linear field the centre of a cell differs from the nearest corner by at most half the cell's range."""

PROBES, ROUGH_PROBES, ROUGH_SHARE = 500, 0.005, 0.4
"""After each refinement so many cells that nobody wanted are evaluated too. A surface in one of them is
followed. If more than ROUGH_PROBES of them hold one, or more than ROUGH_SHARE of all cells were wanted, the
field is rough on the scale of the cells (an untrained decoder, say), and everything is evaluated."""

_CORNERS = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
_NEIGHBOURS = np.concatenate([np.eye(3, dtype=int), -np.eye(3, dtype=int)])


@dataclass(frozen=True)
class Volume:
    """A sampled field: `logits [R + 1, R + 1, R + 1]` float32, its box `[2, 3]`, and what it cost.

    evaluations: decoder evaluations spent, at most one per grid point.
    """

    logits: np.ndarray
    box: np.ndarray
    evaluations: int

    @property
    def resolution(self) -> int:
        """Cells per axis."""
        return self.logits.shape[0] - 1

    @property
    def evaluated_share(self) -> float:
        """Decoder evaluations over grid points."""
        return self.evaluations / self.logits.size


def box_array(bounds: float | Sequence[float]) -> np.ndarray:
    """`[2, 3]` float32 corners from a half side b ([-b, b]^3) or six numbers (minima, then maxima)."""
    if isinstance(bounds, int | float):
        box = np.array([[-bounds] * 3, [bounds] * 3], np.float32)
    else:
        box = np.asarray(bounds, np.float32).reshape(2, 3)
    if not (box[0] < box[1]).all():
        raise ValueError(f"bounds {bounds!r} leave an empty box; give a positive number or minima and maxima")
    return box


def decode_dense(
    field: Field,
    bounds: float | Sequence[float] = 1.01,
    resolution: int = 256,
    chunk: int = 8000,
    progress: Progress | None = None,
) -> Volume:
    """Evaluate every grid point, `chunk` points at a time."""
    box = box_array(bounds)
    sampler = _Sampler(field, box, resolution, chunk, progress)
    side = resolution + 1
    logits = sampler.evaluate(np.arange(side**3), side, stride=1)
    return Volume(logits.reshape(side, side, side), box, sampler.evaluations)


def decode_hierarchical(
    field: Field,
    bounds: float | Sequence[float] = 1.01,
    resolution: int = 256,
    chunk: int = 8000,
    level: float = 0.0,
    coarse: int | None = None,
    progress: Progress | None = None,
) -> Volume:
    """Evaluate a coarse grid everywhere and finer ones only where the surface may be.

    level: logit of the surface. coarse: least number of coarse cells per axis; by default a quarter of the
    resolution, within 32 and 64.
    """
    box = box_array(bounds)
    sampler = _Sampler(field, box, resolution, chunk, progress)
    stride = _coarse_stride(resolution, coarse)
    side = _side(resolution, stride)
    values = sampler.evaluate(np.arange(side**3), side, stride).reshape(side, side, side)
    grid = _Grid(values, np.ones((side,) * 3, bool), np.ones((side - 1,) * 3, bool), level)
    chance = np.random.default_rng(0)
    rough = False
    while stride > 1:
        wanted = np.ones_like(grid.cells) if rough else grid.cells_to_refine()
        stride //= 2
        grid = grid.refined(wanted, _side(resolution, stride))
        if not rough and wanted.mean() <= ROUGH_SHARE:
            probes = grid.want_probes(chance)
            grid.evaluate_and_follow(sampler, stride)
            rough = grid.crossing_share(probes) > ROUGH_PROBES
        else:
            rough = True
        if rough:
            grid.evaluate_all(sampler, stride)
    return Volume(grid.values, box, sampler.evaluations)


def _coarse_stride(resolution: int, coarse: int | None) -> int:
    least = coarse if coarse is not None else min(max(resolution // 4, MIN_COARSE), MAX_COARSE)
    if resolution < 1 or least < 1:
        raise ValueError(f"resolution {resolution} and coarse {coarse} must be at least 1")
    stride = 1
    while resolution // (2 * stride) >= least:
        stride *= 2
    return stride


def _side(resolution: int, stride: int) -> int:
    """Nodes per axis at a stride; if it does not divide the resolution, the last cell is smaller."""
    return -(-resolution // stride) + 1


class _Sampler:
    """Evaluates the field at grid nodes and counts."""

    def __init__(
        self, field: Field, box: np.ndarray, resolution: int, chunk: int, progress: Progress | None
    ) -> None:
        if resolution < 1 or chunk < 1:
            raise ValueError(f"resolution {resolution} and chunk {chunk} must be at least 1")
        self.field, self.resolution, self.chunk, self.progress = field, resolution, chunk, progress
        self.axes = [
            torch.linspace(float(low), float(high), resolution + 1) for low, high in zip(*box, strict=True)
        ]
        self.evaluations = 0

    def evaluate(self, nodes: np.ndarray, side: int, stride: int) -> np.ndarray:
        """Logits float32 of flat node numbers of the grid with `side` nodes per axis."""
        out = np.empty(len(nodes), np.float32)
        needed = self.evaluations + len(nodes)
        for start in range(0, len(nodes), self.chunk):
            part = torch.from_numpy(nodes[start : start + self.chunk])
            index = (part // (side * side), part // side % side, part % side)
            points = torch.stack(
                [
                    axis[(i * stride).clamp(max=self.resolution)]
                    for axis, i in zip(self.axes, index, strict=True)
                ],
                dim=-1,
            )
            logits = self.field(points).float().cpu().numpy()
            if not np.isfinite(logits).all():
                raise ValueError("the decoder returned NaN or infinite logits; try --dtype fp32")
            out[start : start + len(part)] = logits
            self.evaluations += len(part)
            if self.progress is not None:
                self.progress(self.evaluations, needed)
        return out


class _Grid:
    """One level: values at all nodes (where `exact`, else right only in sign) and cells evaluated so far."""

    def __init__(self, values: np.ndarray, exact: np.ndarray, cells: np.ndarray, level: float) -> None:
        self.values, self.exact, self.cells, self.level = values, exact, cells, level
        self.side = values.shape[0]

    def corners(self, cells_X3: np.ndarray) -> np.ndarray:
        """Flat node numbers `[X, 8]` of the corners of cells."""
        nodes = cells_X3[:, None, :] + _CORNERS
        return (nodes[..., 0] * self.side + nodes[..., 1]) * self.side + nodes[..., 2]

    def cells_to_refine(self) -> np.ndarray:
        """Mask of evaluated cells that the surface crosses, or may cross between nodes."""
        cells = np.argwhere(self.cells)
        offsets = self.values.reshape(-1)[self.corners(cells)] - np.float32(self.level)
        low, high = offsets.min(axis=1), offsets.max(axis=1)
        variation = np.zeros(self.cells.shape, np.float32)
        at = tuple(cells.T)
        variation[at] = high - low
        variation = ndimage.maximum_filter(variation, size=3, mode="constant")
        nearest = np.abs(offsets).min(axis=1)
        crossing = (low <= 0) & (high > 0)
        wanted = np.zeros_like(self.cells)
        wanted[at] = crossing | (nearest <= NEAR_FACTOR * variation[at])
        return wanted

    def refined(self, wanted: np.ndarray, side: int) -> _Grid:
        """The next level: nodes carried over, the others filled with a coarse neighbour's value."""
        source = np.arange(side) // 2
        source[-1] = self.side - 1
        carried = np.zeros(side, bool)
        carried[np.minimum(2 * np.arange(self.side), side - 1)] = True
        values = self.values[np.ix_(source, source, source)]
        on_coarse = carried[:, None, None] & carried[None, :, None] & carried[None, None, :]
        exact = self.exact[np.ix_(source, source, source)] & on_coarse
        parent = np.arange(side - 1) // 2
        return _Grid(values, exact, wanted[np.ix_(parent, parent, parent)], self.level)

    def want_probes(self, chance: np.random.Generator) -> np.ndarray:
        """Add random cells to the wanted ones; returns them `[X, 3]`."""
        unwanted = np.flatnonzero(~self.cells)
        if not len(unwanted):
            return np.empty((0, 3), np.int64)
        chosen = np.unique(chance.choice(unwanted, PROBES))
        self.cells.reshape(-1)[chosen] = True
        return np.stack(np.unravel_index(chosen, self.cells.shape), axis=1)

    def crossing_share(self, cells_X3: np.ndarray) -> float:
        """Share of cells with corners of both signs, in [0, 1]."""
        return float(self._crossing(self.corners(cells_X3)).mean()) if len(cells_X3) else 0.0

    def evaluate_all(self, sampler: _Sampler, stride: int) -> None:
        """Evaluate every node that is not known yet."""
        self._evaluate(np.flatnonzero(~self.exact.reshape(-1)), sampler, stride)
        self.cells[...] = True

    def evaluate_and_follow(self, sampler: _Sampler, stride: int) -> None:
        """Evaluate the corners of all wanted cells, then follow the surface into cells not wanted before."""
        fresh = np.argwhere(self.cells)
        while len(fresh):
            nodes = self.corners(fresh)
            missing = np.zeros(self.values.size, bool)
            missing[nodes.reshape(-1)] = True
            missing &= ~self.exact.reshape(-1)
            self._evaluate(np.flatnonzero(missing), sampler, stride)
            fresh = self._cells_left_open(fresh[self._crossing(nodes)])

    def _evaluate(self, nodes: np.ndarray, sampler: _Sampler, stride: int) -> None:
        self.values.reshape(-1)[nodes] = sampler.evaluate(nodes, self.side, stride)
        self.exact.reshape(-1)[nodes] = True

    def _crossing(self, nodes_X8: np.ndarray) -> np.ndarray:
        inside = self.values.reshape(-1)[nodes_X8] > self.level
        return inside.any(axis=1) & ~inside.all(axis=1)

    def _cells_left_open(self, crossing_X3: np.ndarray) -> np.ndarray:
        """Neighbours of crossing cells, not evaluated yet, with corners of both signs; marks them wanted."""
        near = (crossing_X3[:, None, :] + _NEIGHBOURS).reshape(-1, 3)
        near = near[((near >= 0) & (near < self.side - 1)).all(axis=1)]
        near = near[~self.cells[tuple(near.T)]]
        if not len(near):
            return near
        near = np.unique(near, axis=0)
        open_ = near[self._crossing(self.corners(near))]
        self.cells[tuple(open_.T)] = True
        return open_

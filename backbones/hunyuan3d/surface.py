"""Sample a decoder's field on a grid: everywhere, or only near the surface with the same mesh as result.

Hierarchical decoding evaluates a coarse grid, then halves the cells again and again, each time only where
the surface may be. Three rules make its mesh equal to the dense one:

- a cell is refined if its corners differ in sign, or if a corner is so close to the level that the
  variation seen around the cell could carry the field across it (thin parts between grid nodes);
- after each refinement the surface is followed: a cell not yet refined whose corners turned out to differ in
  sign is refined too, until no such cell is left, so no part of a surface is left open;
- random cells that nobody wanted are checked; if they hold surface, the field is too rough for a coarse
  grid to tell anything, and it is evaluated everywhere.

What it can miss is a separate piece smaller than a coarse cell that the variation around does not betray.

Points not evaluated take the value of a neighbouring coarse point: right in sign, not in magnitude.
The grid stays on the decoder's device: index arithmetic, masks and all, and comes to the host once, whole.
Grids follow the published convention: `resolution` cells and one sample more per axis, in the order x, y, z.

Shapes: S nodes per axis of a level, C = S - 1 cells, Q points, X cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
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

_CORNERS = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]


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
        return len(self.logits) - 1

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
    device: torch.device | str = "cpu",
) -> Volume:
    """Evaluate every grid point, `chunk` points at a time. device: where points are given and logits come."""
    box = box_array(bounds)
    sampler = _Sampler(field, box, resolution, chunk, progress, torch.device(device))
    side = resolution + 1
    logits = sampler.evaluate(torch.arange(side**3, device=device), side, stride=1)
    return Volume(logits.reshape(side, side, side).cpu().numpy(), box, sampler.evaluations)


def decode_hierarchical(
    field: Field,
    bounds: float | Sequence[float] = 1.01,
    resolution: int = 256,
    chunk: int = 8000,
    level: float = 0.0,
    coarse: int | None = None,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Volume:
    """Evaluate a coarse grid everywhere and finer ones only where the surface may be.

    level: logit of the surface. coarse: least number of coarse cells per axis; by default a quarter of the
    resolution, within 32 and 64. device: where points are given and logits come, and where the grid lies.
    """
    box = box_array(bounds)
    sampler = _Sampler(field, box, resolution, chunk, progress, torch.device(device))
    stride = _coarse_stride(resolution, coarse)
    side = _side(resolution, stride)
    values = sampler.evaluate(torch.arange(side**3, device=device), side, stride).reshape(side, side, side)
    everywhere = torch.ones_like(values, dtype=torch.bool)
    grid = _Grid(values, everywhere, everywhere[1:, 1:, 1:], level)
    chance = torch.Generator().manual_seed(0)
    rough = False
    while stride > 1:
        wanted = torch.ones_like(grid.cells) if rough else grid.cells_to_refine()
        stride //= 2
        grid, missing = grid.refined(wanted, _side(resolution, stride))
        turned = grid.evaluate(missing, sampler, stride)
        if not rough and int(wanted.sum()) <= ROUGH_SHARE * wanted.numel():
            probes = grid.want_probes(chance)
            grid.follow(probes, turned, sampler, stride)
            rough = grid.crossing_share(probes) > ROUGH_PROBES
        else:
            rough = True
        if rough:
            grid.evaluate_all(sampler, stride)
    return Volume(grid.values.cpu().numpy(), box, sampler.evaluations)


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
        self, field: Field, box: np.ndarray, resolution: int, chunk: int, progress: Progress | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        if resolution < 1 or chunk < 1:
            raise ValueError(f"resolution {resolution} and chunk {chunk} must be at least 1")
        self.field, self.chunk, self.progress = field, chunk, progress
        self.axes = [
            torch.linspace(float(low), float(high), resolution + 1).to(device)
            for low, high in zip(*box, strict=True)
        ]
        self.evaluations = 0

    def evaluate(self, nodes: Tensor, side: int, stride: int) -> Tensor:
        """Logits float32 of flat node numbers of the grid with `side` nodes per axis."""
        last = len(self.axes[0]) - 1
        places = (torch.arange(side, device=nodes.device) * stride).clamp(max=last)
        x, y, z = (axis[places] for axis in self.axes)
        out = torch.empty(len(nodes), device=nodes.device)
        needed = self.evaluations + len(nodes)
        for part, logits in zip(nodes.split(self.chunk), out.split(self.chunk), strict=True):
            line = part // side
            layer = line // side
            points = torch.stack([x[layer], y[line - layer * side], z[part - line * side]], dim=-1)
            logits.copy_(self.field(points))
            self.evaluations += len(part)
            if self.progress is not None:
                self.progress(self.evaluations, needed)
        if not bool(out.isfinite().all()):
            raise ValueError("the decoder returned NaN or infinite logits; try --dtype fp32")
        return out


class _Grid:
    """One level: values at all nodes (where `exact`, else right only in sign) and cells evaluated so far."""

    def __init__(self, values: Tensor, exact: Tensor, cells: Tensor, level: float) -> None:
        self.values, self.exact, self.cells, self.level = values, exact, cells, level
        self.side = len(values)

    def cells_to_refine(self) -> Tensor:
        """Mask `[C, C, C]` of evaluated cells that the surface crosses, or may cross between nodes."""
        low, high = _over_corners(self.values, torch.minimum), _over_corners(self.values, torch.maximum)
        if self.level:
            low, high = low.sub_(self.level), high.sub_(self.level)
        variation = (high - low).mul_(self.cells)
        for dim in range(3):
            variation = _around(variation, dim)
        # the corner nearest to the level: below 0 where the corners differ in sign
        nearest = torch.maximum(low, high.neg_())
        mask: Tensor = (nearest <= variation.mul_(NEAR_FACTOR)).logical_and_(self.cells)
        return mask

    def refined(self, wanted: Tensor, side: int) -> tuple[_Grid, Tensor]:
        """The next level: nodes carried over, the others filled with a coarse neighbour's value. And the flat
        numbers of the nodes of wanted cells that are not known yet, which are to be evaluated first.
        """
        values, touched = _doubled(self.values, 2 * self.side - 1), wanted
        cells = _doubled(wanted, 2 * len(wanted))
        for dim in (2, 1, 0):
            touched = _nodes_of(touched, dim)
        carried = touched[::2, ::2, ::2]
        carried.logical_and_(~self.exact)
        if side < len(values):  # the last cell is smaller: it has no middle
            keep = torch.arange(side, device=values.device)
            keep[-1] = side
            values, touched = values[keep][:, keep][..., keep], touched[keep][:, keep][..., keep]
            cells = cells[: side - 1, : side - 1, : side - 1].contiguous()
            missing = _flat(touched)
            at = (2 * torch.arange(self.side, device=values.device)).clamp(max=side - 1)
            touched[at[:, None, None], at[:, None], at] |= self.exact
        else:
            missing = _flat(touched)
            carried.logical_or_(self.exact)
        return _Grid(values, touched, cells, self.level), missing

    def want_probes(self, chance: torch.Generator) -> Tensor:
        """Add random cells to the wanted ones; returns their flat numbers `[X]`."""
        drawn = torch.randint(self.cells.numel(), (2 * PROBES,), generator=chance).to(self.cells.device)
        probes: Tensor = drawn[~self.cells.view(-1)[drawn]][:PROBES].unique()  # type: ignore[no-untyped-call]
        self.cells.view(-1)[probes] = True
        return probes

    def crossing_share(self, cells: Tensor) -> float:
        """Share of cells with corners of both signs, in [0, 1]."""
        return float(self._crossing(cells).float().mean()) if len(cells) else 0.0

    def evaluate_all(self, sampler: _Sampler, stride: int) -> None:
        """Evaluate every node that is not known yet."""
        self.evaluate(_flat(~self.exact), sampler, stride)
        self.cells.fill_(True)

    def follow(self, probes: Tensor, turned: Tensor, sampler: _Sampler, stride: int) -> None:
        """Evaluate the corners of probes, and follow the surface into cells that nobody wanted: only nodes
        whose sign turned, from what it was filled with, can have opened one.
        """
        fresh = torch.cat([probes, self._opened(turned)])
        while len(fresh):
            nodes = self._corners(fresh).unique()
            fresh = self._opened(self.evaluate(nodes[~self.exact.view(-1)[nodes]], sampler, stride))

    def evaluate(self, nodes: Tensor, sampler: _Sampler, stride: int) -> Tensor:
        """Evaluate nodes. Returns those whose sign was another."""
        logits, values = sampler.evaluate(nodes, self.side, stride), self.values.view(-1)
        turned = (values[nodes] > self.level) != (logits > self.level)
        values[nodes] = logits
        self.exact.view(-1)[nodes] = True
        return nodes[turned]

    def _opened(self, nodes: Tensor) -> Tensor:
        """Flat numbers of cells around nodes, not evaluated yet, with corners of both signs; marks them."""
        side, line = self.side, nodes // self.side
        layer = line // side
        at, found = (layer, line - layer * side, nodes - line * side), []
        for corner in _CORNERS:
            cell = [i - back for i, back in zip(at, corner, strict=True)]
            inside = torch.stack([(i >= 0) & (i < side - 1) for i in cell]).all(dim=0)
            i, j, k = (axis[inside] for axis in cell)
            number = (i * (side - 1) + j) * (side - 1) + k
            found.append(number[~self.cells.view(-1)[number]])
        near: Tensor = torch.cat(found).unique()  # type: ignore[no-untyped-call]
        opened: Tensor = near[self._crossing(near)]
        self.cells.view(-1)[opened] = True
        return opened

    def _corners(self, cells: Tensor) -> Tensor:
        """Flat node numbers `[8, X]` of the corners of cells."""
        side, line = self.side, cells // (self.side - 1)
        layer = line // (side - 1)
        first = (layer * side + line - layer * (side - 1)) * side + cells - line * (side - 1)
        return torch.stack([first + (i * side + j) * side + k for i, j, k in _CORNERS])

    def _crossing(self, cells: Tensor) -> Tensor:
        inside = self.values.view(-1)[self._corners(cells)] > self.level
        return inside.any(dim=0) & ~inside.all(dim=0)


def _over_corners(values: Tensor, better: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """From nodes `[S, S, S]` to cells `[C, C, C]`."""
    for dim in range(3):
        cells = values.shape[dim] - 1
        values = better(values.narrow(dim, 0, cells), values.narrow(dim, 1, cells))
    return values


def _around(values: Tensor, dim: int) -> Tensor:
    """The largest of each cell and its two neighbours on an axis (several times as fast as max_pool3d)."""
    out, many = values.clone(), values.shape[dim] - 1
    for ours, theirs in ((0, 1), (1, 0)):
        part = out.narrow(dim, ours, many)
        torch.maximum(part, values.narrow(dim, theirs, many), out=part)
    return out


def _doubled(values: Tensor, side: int) -> Tensor:
    """A grid of half the spacing, `[side] * 3`: everything twice on each axis, as far as there is room."""
    rows = values.repeat_interleave(2, dim=2)[..., :side]
    out = values.new_empty(side, side, side)
    for i in (0, 1):
        for j in (0, 1):
            part = out[i::2, j::2]
            part.copy_(rows[: part.shape[0], : part.shape[1]])
    return out


def _nodes_of(cells: Tensor, dim: int) -> Tensor:
    """From cells to the nodes of half the spacing on an axis that belong to them."""
    size, many = list(cells.shape), cells.shape[dim]
    size[dim] = 2 * many + 1
    out = cells.new_empty(size)

    def nodes(first: int, last: int | None = None) -> Tensor:
        return out[(*[slice(None)] * dim, slice(first, last, 2))]

    nodes(1).copy_(cells)
    nodes(0, 1).copy_(cells.narrow(dim, 0, 1))
    nodes(2 * many).copy_(cells.narrow(dim, many - 1, 1))
    torch.logical_or(cells.narrow(dim, 0, many - 1), cells.narrow(dim, 1, many - 1), out=nodes(2, -1))
    return out


def _flat(mask: Tensor) -> Tensor:
    """Flat numbers of what a mask holds. numpy finds them thrice as fast on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero()[:, 0]

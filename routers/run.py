"""The state of one run: its CFG branches and their caches, what is decided for each call, the trace.

Nothing of it is stored in the model, so an exception or Ctrl-C leaves nothing behind, and the next run
starts empty. Which run a call belongs to is told by routers/runs.py.

Shapes: R rows, N blocks, U units of blocks, P cached passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block import Block, Shapes
from .cache import ResidualCache, Streams
from .cost import CallCost
from .forward import Group, all_full, place, plan_groups
from .policy import CallInfo, Policy, RunInfo, Units
from .rows import same
from .spec import WIDTHS
from .trace import FULL, Actions, CallRecord, Trace, feasible

if TYPE_CHECKING:
    from .router import RouterStack

ATTACH_AGAIN = (
    "a hook was removed, a forward replaced, or another cache works under the routers: "
    "take that off, detach the routers and attach them again"
)


@dataclass
class Branch:
    """One CFG branch of a run ("cond", "uncond", or the only one), known by its name and its calls' shapes.

    units: what the cache keeps together. starts: their first blocks.
    """

    name: str
    rows: int
    shapes: Shapes
    step: int = 0
    cache: ResidualCache = field(default_factory=lambda: ResidualCache(0, 0, 0))
    units: Units = ()
    starts: frozenset[int] = frozenset()
    logits: Tensor | None = None
    spent: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def keep(self, units: Units, depth: int) -> None:
        """Make the cache of these units, unless it is there."""
        if self.units != units:
            self.units, self.starts = units, frozenset(first for first, _ in units)
            self.cache = ResidualCache(len(units), self.rows, depth)

    def available(self, blocks: int) -> NDArray[np.int64]:
        """[R, N]: passes in the cache, per row and block."""
        available = np.zeros((self.rows, blocks), np.int64)
        if self.cache.depth:
            for unit, (first, last) in enumerate(self.units):
                available[:, first : last + 1] = self.cache.passes(unit)
        return available


@dataclass
class Call:
    """One transformer call while it runs."""

    info: CallInfo
    branch: Branch
    time: Tensor
    actions: Actions
    groups: list[list[Group] | None]
    """Per block; None: the block is decided when it is reached (routers/paper/blockwise.py)."""
    order: int = 0
    """Of reuses that extrapolate in time."""
    started: float = field(default_factory=perf_counter)
    gate: NDArray[np.float32] | None = None
    reads: bool = False
    """Whether the routers are to be read."""
    pooled: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """Then, per block: its input pooled over tokens `[R, D]`, and its modulation."""
    entry: Streams = ()
    """Streams of all rows at the start of the unit that is being run, plus what was added between its blocks
    from outside (ControlNet): a unit's delta is what its own blocks add."""
    left: Streams = ()
    """Streams of all rows as the last block left them."""
    entered: int = 0
    """Blocks that came by their patch so far."""
    whole: bool = False
    """Whether every row computes every block in full, as was decided before the first one runs."""

    @property
    def passes(self) -> bool:
        """Of such a call: whether nothing of it is kept or read."""
        return not self.reads and not self.branch.cache.depth

    @property
    def routed(self) -> bool:
        """Whether the routers run in this call: all together, for every row."""
        return bool(self.pooled)

    def decide(self, block: Block, inputs: dict[str, Any], before: Streams) -> list[Group]:
        """Decide a block that is not yet."""
        raise AssertionError("every block is decided before the first one runs")

    def require_all_entered(self) -> None:
        """Raises RuntimeError where a block ran, or did not, behind the back of what was decided."""
        if self.entered != len(self.groups):
            missed = len(self.groups) - self.entered
            raise RuntimeError(
                f"{missed} of {len(self.groups)} blocks did not run as decided; {ATTACH_AGAIN}"
            )

    def enter(self, block: int, before: Streams) -> None:
        """A block starts, with these streams of all rows."""
        self.entered += 1
        if block in self.branch.starts:
            self.entry = before
        elif not all(same(now, then) for now, then in zip(before, self.left, strict=True)):
            moved = zip(self.entry, before, self.left, strict=True)
            self.entry = tuple(entry + (now - then) for entry, now, then in moved)

    def remember(
        self, block: int, group: Group, time: Tensor, before: Streams, after: Streams, graphed: bool = False
    ) -> None:
        """A block ends that `group` computed, given its rows' streams: keep the unit's pass if it ends here.

        Only for rows that computed every block of the unit. graphed: see `ResidualCache.store`.
        """
        first, last = self.branch.units[group.unit]
        if block != last:
            return
        rows, index = group.rows, group.index
        if first < last:
            before = self.entry if index is None else tuple(x.index_select(0, index) for x in self.entry)
            numbers = np.arange(self.info.rows) if rows is None else np.array(rows)
            whole = (self.actions[numbers, first : last + 1] >= 0).all(axis=1)
            if not whole.any():
                return
            if not whole.all():
                some = torch.from_numpy(np.flatnonzero(whole)).to(time.device)
                before = tuple(x.index_select(0, some) for x in before)
                after = tuple(x.index_select(0, some) for x in after)
                time, rows = time.index_select(0, some), numbers[whole].tolist()
                index = some if index is None else index.index_select(0, some)
        group.cache.store(group.unit, rows, index, time, before, after, graphed)


class Run:
    """One way from noise to latents: hands out calls, keeps the branches, fills the trace.

    ragged: per block, whether rows of different widths can run in one call of it. samples: see
    `Elastic.scope`. The trace may be one that earlier runs of the same scope have begun.
    """

    def __init__(
        self, policy: Policy, info: RunInfo, trace: Trace, ragged: Sequence[bool], samples: int | None = None
    ) -> None:
        self.policy, self.info, self.trace = policy, info, trace
        self.ragged, self.samples = ragged, samples
        self.routers: RouterStack | None = None
        self.step_of: Callable[[int], int] = lambda call: call
        self.branches: dict[str, Branch] = {}
        trace.begin(info.num_steps)
        policy.start(info)

    def branch(self, name: str, shapes: Shapes, rows: int) -> Branch:
        """The branch's state; with changed shapes its caches start afresh, so that no stale delta is met."""
        branch = self.branches.get(name)
        if branch is None or branch.shapes != shapes:
            step = 0 if branch is None else branch.step
            spent = branch.spent if branch is not None and branch.rows == rows else np.zeros(rows)
            branch = self.branches[name] = Branch(name, rows, shapes, step, spent=spent)
        return branch

    def begin(self, branch: Branch, time_: Tensor, cost: CallCost) -> Call:
        """Decide a call. time_: `[R]` on the device.

        Where blocks fill an object that later calls read, all of them run. Where rows cannot be told apart,
        they do what was decided for the first one.
        """
        info = self._call_info(branch, cost)
        decision = self.policy.decide(info, self._read(branch))
        branch.keep(decision.units or single_blocks(info), decision.depth)
        actions = feasible(decision.actions, info.available)
        if any(block.fills for block in cost.blocks):
            actions = np.full_like(actions, FULL)
        if cost.together:
            if (actions != actions[:1]).any():
                self.trace.note(f"the rows of a call did as its first one: {cost.together}")
            time_, decision = time_.amax(0, keepdim=True), decision.of_all()
            actions = np.repeat(actions[:1], info.rows, axis=0)
        groups = plan_groups(
            actions, branch.cache, self.ragged, branch.units, decision.weights, self.info.skips
        )
        place([group for block in groups for group in block], time_.device)
        reads, whole = self.policy.reads_routers, all_full(actions)
        return Call(info, branch, time_, actions, [*groups], decision.order, reads=reads, whole=whole)

    def _call_info(self, branch: Branch, cost: CallCost) -> CallInfo:
        rows, samples = branch.rows, self.samples
        return CallInfo(
            step=self.step_of(branch.step),
            branch=branch.name,
            branches=tuple(self.branches),
            rows=rows,
            costs=cost.blocks,
            outside=cost.outside,
            overhead=cost.router if self.policy.reads_routers else 0.0,
            available=branch.available(len(cost.blocks)),
            spent=branch.spent.copy(),
            signature=branch.shapes,
            parts=rows // samples if samples and rows % samples == 0 else 1,
        )

    def end(self, call: Call) -> None:
        """Book the call: FLOPs per row, decisions, cache size, and the step count of its branch."""
        call.require_all_entered()
        branch, info, trace = call.branch, call.info, self.trace
        dense = info.outside + sum(cost.dense for cost in info.costs)
        if call.whole:
            flops = np.full(info.rows, dense)
        else:
            table = np.array([[cost.at(w) for w in WIDTHS] for cost in info.costs])
            paid = table[np.arange(len(info.costs)), np.maximum(call.actions, 0)]
            flops = info.outside + np.where(call.actions >= 0, paid, 0.0).sum(1)
        if call.routed:
            flops += info.overhead * len(info.costs)
        branch.spent += flops
        branch.step += 1
        trace.samples = self.samples or max(trace.samples, info.rows)
        trace.cache_bytes = max(trace.cache_bytes, sum(cache.nbytes() for cache in self.caches()))
        # elsewhere the work goes on when a call returns
        seconds = perf_counter() - call.started if call.time.device.type == "cpu" else 0.0
        trace.calls.append(CallRecord(info.step, info.branch, call.actions, flops, dense, seconds, call.gate))

        if all(branch.step >= self.info.num_steps for branch in self.branches.values()):
            self.release()

    def release(self) -> None:
        """Let go of the caches: the run is over."""
        for branch in self.branches.values():
            branch.keep((), 0)

    def caches(self) -> list[ResidualCache]:
        """Every cache of the run."""
        return [branch.cache for branch in self.branches.values()]

    def _read(self, branch: Branch) -> NDArray[np.float32] | None:
        """The branch's last logits [R, N, 5], in one device-to-host copy."""
        if not self.policy.reads_routers or branch.logits is None:
            return None
        self.trace.host_syncs += 1
        host: NDArray[np.float32] = branch.logits.transpose(0, 1).contiguous().float().cpu().numpy()
        return host


def single_blocks(info: CallInfo) -> Units:
    """Every block a unit of its own."""
    return tuple((block, block) for block in range(len(info.costs)))

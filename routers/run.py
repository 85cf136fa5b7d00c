"""The state of one run: steps and CFG branches counted, cached passes, costs per input shape, the trace.

A run lives as long as its scope. Nothing of it is stored in the model, so an exception or Ctrl-C
leaves nothing behind, and the next run starts empty.

Shapes: R rows, N blocks, U units of blocks, P cached passes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cache import ResidualCache, Streams
from .cost import BlockCost
from .groups import Group, place, plan_groups, shared_weights, split_rows
from .policy import CallInfo, Policy, RunInfo, Units
from .router import RouterStack
from .spec import WIDTHS
from .trace import FULL, REUSE, Actions, CallRecord, Trace

ATTACH_AGAIN = "a hook was removed, or a forward replaced, under the routers: detach and attach them again"


@dataclass
class Clock:
    """The sampler's time in one branch, to tell one run from the next where no scope says so."""

    last: float | None = None
    direction: float = 0.0

    def tick(self, now: float) -> bool:
        """Move on to `now`; False if that does not continue the run."""
        if self.last is not None:
            step = now - self.last
            if step == 0.0 or step * self.direction < 0.0:
                return False
            self.direction = step
        self.last = now
        return True


@dataclass
class Branch:
    """One CFG branch of a run ("cond", "uncond", or the only one).

    units: what the cache keeps together. starts: their first blocks.
    """

    name: str
    rows: int
    cache: ResidualCache
    units: Units = ()
    starts: frozenset[int] = frozenset()
    step: int = 0
    logits: list[Tensor | None] = field(default_factory=list)
    fetched: NDArray[np.float32] | None = None
    spent: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    dense: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    shape: tuple[int, ...] = ()


@dataclass
class Call:
    """One transformer call while it runs. groups[b] is None until an immediate policy has decided block b."""

    info: CallInfo
    branch: Branch
    time: Tensor
    actions: Actions
    groups: list[list[Group] | None]
    started: float
    dense: float
    immediate: bool = False
    gate: NDArray[np.float32] | None = None
    pooled: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    """Per computed block: its input pooled over tokens `[R, D]`, and its modulation, for the routers."""
    entry: Streams = ()
    """Streams of all rows at the start of the unit that is being run, plus what was added between its blocks
    from outside (ControlNet): a unit's delta is what its own blocks add."""
    left: Streams = ()
    """Streams of all rows as the last block left them."""
    entered: int = 0
    """Blocks that came by their patch so far."""

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
        elif any(now is not then for now, then in zip(before, self.left, strict=True)):
            moved = zip(self.entry, before, self.left, strict=True)
            self.entry = tuple(entry + (now - then) for entry, now, then in moved)

    def remember(self, block: int, group: Group, time: Tensor, before: Streams, after: Streams) -> None:
        """A block ends that `group` computed, given its rows' streams: keep the unit's pass if it ends here.

        Only for rows that computed every block of the unit.
        """
        first, last = (block, block) if self.immediate else self.branch.units[group.unit]
        if block != last:
            return
        rows, index = group.rows, group.index
        if first < last:
            before = self.entry if index is None else tuple(x.index_select(0, index) for x in self.entry)
            asked = np.arange(self.info.rows) if rows is None else np.array(rows)
            whole = (self.actions[asked, first : last + 1] >= 0).all(axis=1)
            if not whole.any():
                return
            if not whole.all():
                some = torch.from_numpy(np.flatnonzero(whole)).to(time.device)
                before = tuple(x.index_select(0, some) for x in before)
                after = tuple(x.index_select(0, some) for x in after)
                time, rows = time.index_select(0, some), asked[whole].tolist()
                index = some if index is None else index.index_select(0, some)
        group.cache.store(block if self.immediate else group.unit, rows, time, before, after, index)


class Run:
    """One scope: hands out calls, keeps the branches, fills the trace."""

    def __init__(
        self,
        policy: Policy,
        budget: float | None,
        num_steps: int,
        kinds: list[str],
        samples: int | None,
        ragged: Sequence[bool] = (),
        segments: Units = (),
        skips: bool = False,
    ) -> None:
        """ragged: per block, whether rows of different widths can run in one call of it.

        segments: stretches of blocks with the same residual streams. skips: see `TransformerSpec`.
        """
        self.policy = policy
        self.ragged = ragged or [False] * len(kinds)
        self.routers: RouterStack | None = None
        self.samples = samples
        self.num_steps = num_steps
        self.branches: dict[str, Branch] = {}
        self.clocks: defaultdict[str, Clock] = defaultdict(Clock)
        self.stores: dict[Hashable, ResidualCache] = {}
        self.trace = Trace(requested=budget, num_steps=num_steps, kinds=kinds)
        segments = segments or ((0, len(kinds) - 1),)
        policy.start(RunInfo(len(kinds), num_steps, 1.0 if budget is None else budget, segments, skips))

    def set_num_steps(self, num_steps: int) -> None:
        """Correct the number of steps before the first decision depends on it (after step 0 at latest)."""
        self.num_steps = self.trace.num_steps = num_steps
        set_policy = getattr(self.policy, "set_num_steps", None)
        if set_policy is not None:
            set_policy(num_steps)

    def branch(self, name: str, shape: tuple[int, ...]) -> Branch:
        """The branch's state; a changed shape starts it afresh, so that no stale delta is ever met."""
        branch = self.branches.get(name)
        if branch is None or branch.shape != shape:
            rows, blocks = shape[0], len(self.trace.kinds)
            cache = ResidualCache(0, rows, 0)  # made when the policy's first answer has set the units
            branch = Branch(name, rows, cache, logits=[None] * blocks, shape=shape)
            branch.spent, branch.dense = np.zeros(rows), np.zeros(rows)
            self.branches[name] = branch
        return branch

    def begin(
        self,
        branch: Branch,
        time_: Tensor,
        costs: list[BlockCost],
        outside: float,
        overhead: float,
        signature: Hashable = (),
    ) -> Call:
        """Decide a call. time_: `[R]` on the device; costs in FLOPs per block and row; signature: shapes."""
        blocks = len(costs)
        info = CallInfo(
            step=branch.step,
            branch=branch.name,
            branches=tuple(self.branches),
            rows=branch.rows,
            costs=costs,
            outside=outside,
            overhead=overhead if self.policy.reads_routers or self.policy.immediate else 0.0,
            available=self._available(branch, blocks),
            spent=branch.spent.copy(),
            dense=branch.dense.copy(),
            signature=signature,
            parts=branch.rows // self.samples if self.samples and branch.rows % self.samples == 0 else 1,
        )
        dense = outside + sum(cost.dense for cost in costs)
        started = time.perf_counter()
        if self.policy.immediate:
            self._keep_units(branch, blocks)
            actions = np.full((branch.rows, blocks), FULL, np.int8)
            groups: list[list[Group] | None] = [None] * blocks
        else:
            actions = self._feasible(self.policy.decide(info, self._read(branch)), info.available)
            self._keep_units(branch, blocks)
            planned = plan_groups(actions, branch.cache, self.ragged, branch.units, self.policy.weights)
            self._add_peer(planned, branch.units)
            place([group for block in planned for group in block], time_.device)
            groups = [*planned]
        return Call(info, branch, time_, actions, groups, started, dense, self.policy.immediate)

    def decide_block(self, call: Call, block: int, gate: Tensor, widths: Tensor) -> list[Group]:
        """Ask an immediate policy for one block, from its own logits: gate [R], widths [R, 4]."""
        self.trace.host_syncs += 1
        logits = torch.cat([gate[:, None], widths], dim=1).float().cpu().numpy()
        codes = self.policy.decide_block(call.info, block, logits[:, 0], logits[:, 1:])
        caches = [call.branch.cache] * len(codes)
        if self.policy.stores is not None:
            caches = [self._store(store, call.info) for store in self.policy.stores]
        available = np.array([cache.available(block, row) for row, cache in enumerate(caches)])
        call.actions[:, block] = codes = self._feasible(codes, available)
        if call.gate is None:
            call.gate = np.full(call.actions.shape, np.nan, np.float32)
        call.gate[:, block] = logits[:, 0]
        split = split_rows([*zip(codes.tolist(), caches, strict=True)])
        groups = [Group(code, rows, block, cache, block) for (code, cache), rows in split]
        call.groups[block] = groups
        place(groups, gate.device)
        return groups

    def _add_peer(self, groups: list[list[Group]], units: Units) -> None:
        """Let reuses look at the passes of the CFG branch that the policy names, weighted as it says."""
        if self.policy.peer is None:
            return
        name, weights = self.policy.peer
        cache = self.branches[name].cache
        for first, _ in units:
            for group in groups[first]:
                if group.code == REUSE and group.last >= 0:
                    group.peer = cache
                    group.peer_weights = shared_weights(weights[:, group.unit], group.rows)

    def _keep_units(self, branch: Branch, blocks: int) -> None:
        """Give the branch a cache of the policy's units, unless it has one."""
        units = self.policy.units or tuple((block, block) for block in range(blocks))
        if branch.units != units:
            branch.units, branch.starts = units, frozenset(first for first, _ in units)
            branch.cache = ResidualCache(len(units), branch.rows, self.policy.cache_depth)

    def _store(self, store: int, info: CallInfo) -> ResidualCache:
        """The cache of a policy's numbered store, one for each set of shapes it is used with."""
        key = int(store), info.signature
        if key not in self.stores:
            self.stores[key] = ResidualCache(len(info.costs), info.rows, self.policy.cache_depth)
        return self.stores[key]

    def read_routers(self, call: Call, routers: RouterStack) -> None:
        """Logits of the blocks and rows that this call computed, for the branch's next decision."""
        first, modulation = next(iter(call.pooled.values()))
        blank = torch.zeros_like(first)
        seen = [call.pooled.get(block, (blank, modulation)) for block in range(len(call.groups))]
        x = torch.stack([pooled.to(first.device) for pooled, _ in seen])
        if modulation is not None and any(m is not modulation for _, m in seen):
            modulation = torch.stack([m.to(first.device) for _, m in seen if m is not None])
        new = routers(x, modulation)
        computed = (call.actions >= 0) | self.policy.reads_skipped
        if not computed.all():
            old = torch.stack([torch.zeros_like(new[0]) if x is None else x for x in call.branch.logits])
            mask = torch.from_numpy(computed.T.copy())
            if new.device.type == "cuda":
                mask = mask.pin_memory().to(new.device, non_blocking=True)
            new = torch.where(mask.to(new.device)[..., None], new, old)
        for block, logits in enumerate(new.unbind()):
            if block in call.pooled:
                call.branch.logits[block] = logits

    def end(self, call: Call) -> None:
        """Book the call: FLOPs per row, decisions, cache size, and the step count of its branch."""
        branch, info = call.branch, call.info
        flops = np.full(info.rows, info.outside)
        table = np.array([[cost.at(w) for w in WIDTHS] for cost in info.costs])
        computed = call.actions >= 0
        flops += np.where(computed, table[np.arange(len(info.costs)), np.maximum(call.actions, 0)], 0.0).sum(
            1
        )
        # Routers that decide their own block, or are read together, run for every row.
        flops += info.overhead * (computed | self.policy.immediate | bool(call.pooled)).sum(1)
        branch.spent += flops
        branch.dense += call.dense
        branch.step += 1
        trace = self.trace
        trace.samples = self.samples or max(trace.samples, info.rows)
        caches = [*(b.cache for b in self.branches.values()), *self.stores.values()]
        trace.cache_bytes = max(trace.cache_bytes, sum(cache.nbytes() for cache in caches))
        seconds = time.perf_counter() - call.started
        trace.calls.append(
            CallRecord(info.step, info.branch, call.actions, flops, call.dense, seconds, call.gate)
        )

    def _available(self, branch: Branch, blocks: int) -> NDArray[np.int64]:
        available = np.zeros((branch.rows, blocks), np.int64)
        if self.policy.cache_depth:
            for unit, (first, last) in enumerate(branch.units):
                passes = [branch.cache.available(unit, row) for row in range(branch.rows)]
                available[:, first : last + 1] = np.array(passes)[:, None]
        return available

    def read_time(self, time_: Tensor, name: str) -> float:
        """The sampler's time `[R]` on the host, and in the same copy the logits this branch decides from."""
        self.trace.host_syncs += 1
        branch = self.branches.get(name)
        logits = None if branch is None else self._pending(branch)
        if branch is None or logits is None:
            return float(time_[0])
        values = torch.cat([time_[:1], logits.flatten()]).cpu().numpy()
        branch.fetched = values[1:].reshape(logits.shape)
        return float(values[0])

    def _read(self, branch: Branch) -> NDArray[np.float32] | None:
        """The branch's last logits [R, N, 5], in one device-to-host copy unless they are here already."""
        fetched, branch.fetched = branch.fetched, None
        logits = self._pending(branch)
        if fetched is not None or logits is None:
            return fetched
        self.trace.host_syncs += 1
        host: NDArray[np.float32] = logits.cpu().numpy()
        return host

    def _pending(self, branch: Branch) -> Tensor | None:
        if not self.policy.reads_routers or any(x is None for x in branch.logits):
            return None
        return torch.stack([x for x in branch.logits if x is not None], dim=1).float()

    @staticmethod
    def _feasible(actions: Actions, available: NDArray[np.int64]) -> Actions:
        """A reuse with nothing cached computes instead."""
        return np.where((actions == REUSE) & (available == 0), FULL, actions).astype(np.int8)

"""From step, budget and costs to decisions. Pure: no module, no device, no state of a model.

A policy answers once per transformer call, before its first block, for every row and block. The only
device data it may ask for are the logits that the routers gave in the branch's *previous* call, so that no
block waits for the host. (The paper's policy decides block by block: see routers/paper/blockwise.py.)

Shapes: R rows, N blocks, U units of blocks, P cached passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .cost import BlockCost
from .spec import WIDTHS
from .trace import FULL, SKIP, Actions

Units = tuple[tuple[int, int], ...]
"""(first, last) block of each unit, in order, together all blocks."""


@dataclass(frozen=True)
class RunInfo:
    """What a policy knows when a run starts."""

    num_steps: int
    budget: float
    segments: Units = ()
    """Stretches of blocks that work on the same residual streams; a unit lies within one."""
    skips: bool = False
    """Whether later blocks read what earlier ones gave: a block then needs every one before it computed."""


@dataclass(frozen=True)
class CallInfo:
    """What a policy knows of a transformer call.

    step: from 0. branches: all CFG branches seen so far in the run. rows: batch rows of the call.
    costs: FLOPs per block and row; outside: FLOPs per row around the blocks; overhead: FLOPs per row of
    one router, where routers are read. available [R, N]: cached passes per row and block. spent [R]: FLOPs so
    far in this branch. signature: equal for calls with equal shapes. parts: CFG branches that share the
    call's batch, their rows one branch after the other; 1 where each branch has calls of its own.
    """

    step: int
    branch: str
    branches: tuple[str, ...]
    rows: int
    costs: list[BlockCost]
    outside: float
    overhead: float
    available: NDArray[np.int64]
    spent: NDArray[np.float64]
    signature: Any = ()
    parts: int = 1


@dataclass(frozen=True)
class Decision:
    """What a policy answers to a call.

    actions: codes int8 [R, N]. units: blocks that are cached together, the same in every call of a run;
    None: each alone. depth: passes per unit to keep for reuses, 0 for none. weights [R, U, P]: of the cached
    passes, newest first, for each row's reuse of a unit; None: reuses extrapolate in time, with `order` 0
    (repeat) or 1 (linear).
    """

    actions: Actions
    units: Units | None = None
    depth: int = 0
    weights: NDArray[np.float32] | None = None
    order: int = 0

    def of_all(self) -> Decision:
        """What was decided for the first row, for every row."""

        def first(x: NDArray[Any]) -> NDArray[Any]:
            return np.repeat(x[:1], len(x), axis=0)

        return replace(
            self,
            actions=first(self.actions),
            weights=None if self.weights is None else first(self.weights),
        )


class Policy(Protocol):
    """Decides which rows of a call do what in which block."""

    reads_routers: bool
    """Whether `decide` wants the previous call's logits (one host read per call); settled by `start`."""

    def start(self, run: RunInfo) -> None:
        """A new run begins: forget everything."""

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """Logits [R, N, 5] (gate, 4 widths): the branch's last call; None in its first, or if not read."""
        ...


class OpenPolicy:
    """Everything open: the dense model, run through the elastic path."""

    cache_depth = 0
    reads_routers = False

    def start(self, run: RunInfo) -> None:
        """Nothing to forget."""

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """Compute every block at full width."""
        return Decision(np.full((call.rows, len(call.costs)), FULL, np.int8), depth=self.cache_depth)


class WidthPolicy(OpenPolicy):
    """All blocks at one width in each call. widths [T]: by step, each one of `WIDTHS`; whole beyond them."""

    def __init__(self, widths: Sequence[float] = ()) -> None:
        self.widths = widths

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """The width of this step, for every block and row."""
        code = WIDTHS.index(self.widths[call.step]) if call.step < len(self.widths) else FULL
        return Decision(np.full((call.rows, len(call.costs)), code, np.int8))


class FixedPolicy(OpenPolicy):
    """A given plan: for tests, benchmarks and frozen exports.

    plan: action codes [T, N] or [T, R, N] for the steps of a run (the last entry repeats), or [N].
    """

    def __init__(self, plan: Actions, order: int = 1) -> None:
        plan = np.asarray(plan, np.int8)
        if plan.ndim not in (1, 2, 3) or plan.min(initial=0) < SKIP or plan.max(initial=0) > FULL:
            raise ValueError(
                f"a plan holds codes {SKIP}..{FULL} as [N], [T, N] or [T, R, N], not {plan.shape}"
            )
        self.plan = plan[None] if plan.ndim == 1 else plan
        self.order = order
        self.cache_depth = order + 1

    def decide(self, call: CallInfo, logits: NDArray[np.float32] | None) -> Decision:
        """The plan's row for this step."""
        step = self.plan[min(call.step, len(self.plan) - 1)]
        actions = np.broadcast_to(step, (call.rows, len(call.costs))).copy()
        return Decision(actions, depth=self.cache_depth, order=self.order)

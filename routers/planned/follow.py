"""A run along a plan: each step goes along a weighted sum of the last outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from .timeplan import Array

Velocity = Callable[[Tensor, float], Tensor]
"""The guided velocity at (x, s)."""


class Steps(Protocol):
    """What a run can follow: a `TimePlan`, or what fits or records one (`closed_loop.py`)."""

    @property
    def times(self) -> Array:
        """[n + 1]."""
        ...

    @property
    def passes(self) -> int:
        """Outputs that a step is made from."""
        ...

    def row(self, step: int, x: Tensor, outputs: Sequence[Tensor]) -> tuple[Array, float]:
        """Weights of the outputs, newest first, and of x, for the step from times[step]."""
        ...


Planner = Callable[[Array], Steps | None]
"""From the times of a run's own grid [N + 1] to what is done instead; None: the run's own steps."""


class Follower:
    """One run of a plan: keeps the outputs that its next steps are made from."""

    def __init__(self, plan: Steps) -> None:
        self.plan = plan
        self._outputs: list[Tensor] = []

    def step(self, index: int, x: Tensor, v: Tensor, size: float) -> Tensor:
        """The next state, at least in float32: a step of a (negative) size from x, where v is the output."""
        exact = torch.promote_types(x.dtype, torch.float32)
        x = x.to(exact)
        # a copy: what a CUDA graph gives lies in its own memory, and the next replay writes over it
        self._outputs = [v.to(exact, copy=True), *self._outputs][: self.plan.passes]
        row, state = self.plan.row(index, x, self._outputs)
        return advance(x, self._outputs, row, state, size)


def follower(plan: Steps) -> Any:
    """One run of a plan; plans for each row bring a kind of their own (`apart.py`)."""
    own = getattr(plan, "follower", None)
    return Follower(plan) if own is None else own()


def follow(velocity: Velocity, x: Tensor, plan: Steps) -> Tensor:
    """A whole run on a velocity given as a function, from x at times[0] to times[-1]."""
    run = Follower(plan)
    for step, (start, end) in enumerate(pairwise(plan.times.tolist())):
        x = run.step(step, x, velocity(x, start), end - start)
    return x


def advance(x: Tensor, outputs: Sequence[Tensor], weights: Array, state: float, size: float) -> Tensor:
    """Returns x + size (sum of weights times outputs + state x)."""
    total: Tensor | None = None
    for weight, v in zip(weights.tolist(), outputs, strict=False):
        if weight:
            part = v if weight == 1 else weight * v
            total = part if total is None else total + part
    if state:
        total = state * x if total is None else total + state * x
    return x if total is None else x + size * total

"""What a run of all steps teaches about cheaper ones, with no evaluation of its own.

The states of a dense run are a plan's target, and its outputs stand in for the plan's: the weights of each
step are fitted as in closed loop (`closed_loop.py`), at the state that the steps before have led to, but with
the outputs that the dense run gave at that time. What the difference of the states does to the outputs is
left out; `edit calibrate` runs the plan itself, and knows it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bundle import Bundle
from ..identity import architecture, fingerprint
from ..spec import TransformerSpec
from .closed_loop import StageFit, Trajectory
from .follow import follow
from .timeplan import Array, TimePlan, moving
from .universal import Warp, universal_plan

BUDGETS = 19
"""Plans at most: from 0.05 to 0.95."""


class Observation:
    """Dense runs of a pipeline that were watched. pipe: asked for its transformer and its scheduler's warps.

    grid [N + 1]: times of the runs. Only whole runs count that are like the first: of its times and shapes.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.warps: dict[str, Warp] = getattr(pipe.scheduler, "warps", {})
        self._runs: list[tuple[Array, list[Tensor], list[Tensor]]] = []
        self._split = False

    def begin(self, grid: Array) -> None:
        """A run begins."""
        self._runs.append((grid, [], []))

    def see(self, number: int, x: Tensor, v: Tensor) -> None:
        """An evaluation, from 1: the state `[B, ...]` and the flow's velocity there."""
        _, states, velocities = self._runs[-1]
        self._split |= number != len(states) + 1
        states.append(x.detach().float().cpu())
        velocities.append(v.detach().float().cpu())

    @property
    def runs(self) -> int:
        """Whole runs that were alike."""
        return len(self._whole())

    def plans(self) -> dict[int, TimePlan]:
        """For each number of evaluations, `BUDGETS` at most, the plan to the dense result.

        Raises ValueError where no whole run was seen, or one whose copies of a scheduler went apart.
        """
        runs = self._whole()
        if self._split or not runs:
            raise ValueError("no whole run of all steps was seen: nothing is learned from it")
        path, outputs = _joined(runs)
        grid, steps = moving(runs[0][0]), len(runs[0][0]) - 1
        at = dict(zip(path.times, outputs, strict=False))
        numbers = sorted({max(1, i * steps // (BUDGETS + 1)) for i in range(1, BUDGETS + 1)} - {steps})
        plans = {}
        for number in numbers:
            near = universal_plan(grid, number, "dense", self.warps.get("dense"))
            stages = StageFit(near.times, path, prior=near)
            follow(lambda _, time: at[time], path.states[0], stages)
            plans[number] = stages.plan
        return plans

    def bundle(
        self, base_model: str = "", guidance: float = 1.0, spec: TransformerSpec | None = None
    ) -> Bundle:
        """A bundle of `plans`. base_model: its name for people. guidance: of the runs, for the record. spec:
        where the transformer's blocks are; a plan does without. Raises ValueError as `plans`.
        """
        plans, transformer = self.plans(), self.pipe.transformer
        rows = sum(len(run[1][0]) for run in self._whole())
        transformer = getattr(transformer, "_orig_mod", transformer)
        grid = self._whole()[0][0]
        return Bundle(
            spec=spec or TransformerSpec(type(transformer).__name__, ()),
            base_model=base_model or type(transformer).__name__,
            architecture=architecture(transformer),
            fingerprint=fingerprint(transformer),
            num_steps=len(grid) - 1,
            guidance=guidance,
            times=grid.tolist(),
            plans={"dense": plans},
            metadata={
                "method": "observe",
                "rows": rows,
                "generations": 1.0,
            },
        )

    def _whole(self) -> list[tuple[Array, list[Tensor], list[Tensor]]]:
        whole = [run for run in self._runs if len(run[1]) >= len(moving(run[0])) - 1]
        like = whole[:1]
        for run in whole[1:]:
            if np.array_equal(run[0], like[0][0]) and run[1][0].shape[1:] == like[0][1][0].shape[1:]:
                like.append(run)
        return like


def _joined(runs: list[tuple[Array, list[Tensor], list[Tensor]]]) -> tuple[Trajectory, list[Tensor]]:
    """All runs' rows as one trajectory of straight pieces, and the outputs along it."""
    times = moving(runs[0][0]).tolist()
    states = [torch.cat([run[1][i] for run in runs]) for i in range(len(times) - 1)]
    outputs = [torch.cat([run[2][i] for run in runs]) for i in range(len(times) - 1)]
    end = states[-1] + (times[-1] - times[-2]) * outputs[-1]
    return Trajectory(times, [*states, end]), outputs

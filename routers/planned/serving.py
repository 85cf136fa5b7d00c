"""Where a run from a picture begins: answered for every pipeline that shares a replaced scheduler."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .apart import RowFollower
from .follow import Follower, Planner, Steps

OnStep = Callable[[int], Steps | None]
"""Called at each evaluation of a run with its number, from 1; returns what is followed from here, if that is
something else than so far."""


Watch = Callable[[int, Tensor, Tensor], None]
"""Called at each evaluation with its number, from 1, the state and the flow's velocity there."""


def uncounted(number: int) -> None:
    """An evaluation that nobody counts."""


def own_steps(grid: object) -> None:
    """The planner of a scheduler that follows no plan any more: a pipeline made meanwhile may hold it."""


class LiveTimes(Tensor):
    """A scheduler's timesteps for a loop that asks for one after the other: they may change meanwhile."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    owner: Any

    @classmethod
    def of(cls, owner: Any, times: Tensor) -> LiveTimes:
        """Of a scheduler, whose `timesteps` may be replaced by others."""
        live = times.as_subclass(cls)
        live.owner = owner
        return live

    def __len__(self) -> int:
        return int(self._now().shape[0])

    def __getitem__(self, at: Any) -> Any:
        return self._now()[at]

    def __iter__(self) -> Iterator[Tensor]:
        self.owner.read = 0
        while self.owner.read < len(self):
            self.owner.read += 1
            yield self._now()[self.owner.read - 1]

    def _now(self) -> Tensor:
        return self.owner.timesteps.as_subclass(Tensor)  # type: ignore[no-any-return]


class Serving:
    """Part of a scheduler that takes another's place.

    live: whether a run's times may change on the way. read: how many of them its loop has asked for.
    """

    live = False
    read = 0
    watch: Watch | None = None
    """Of a run of all steps, where a scheduler follows a flow."""
    planner: Planner
    on_step: OnStep
    timesteps: Tensor
    _steps: int
    """Of the pipeline's own run."""
    _offer: Callable[[int], None]
    """Plan the own run from this step on, and offer the plan's times."""
    _follow: Callable[[Steps], None]
    """Offer the times of something else, of which those up to the present one are as they were."""
    _patched: list[Any]
    _run: Follower | RowFollower
    own: Any
    """The scheduler whose place is taken, where it is still asked."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """For pipelines with a copy of their scheduler for every frame: each has a past of its own."""
        twin = copy.copy(self)
        twin._patched = []
        if "step" in vars(self):  # wrapped
            twin.__dict__["step"] = MethodType(vars(self)["step"].__func__, twin)
        if "_run" in vars(self):
            twin._run = copy.copy(self._run)  # its outputs are replaced, never changed
        if "own" in vars(self):
            twin.own = copy.deepcopy(self.own, memo)
        return twin

    def begin_at(self, strength: float) -> Tensor:
        """A run that begins at the step of its own grid that `strength` means; returns its times."""
        self._offer(int(max(self._steps - min(self._steps * strength, self._steps), 0)))
        return self.timesteps

    def evaluated(self, number: int, x: Tensor | None = None, v: Tensor | None = None) -> None:
        """An evaluation was made, of a flow's velocity v at the state x; what follows may change."""
        if self.watch is not None and x is not None and v is not None:
            self.watch(number, x, v)
        steps = self.on_step(number)
        if steps is not None:
            self._run.plan = steps
            self._follow(steps)

    def offered(self, times: Tensor) -> Tensor:
        """Timesteps for the pipeline."""
        return LiveTimes.of(self, times) if self.live else times

    def serve(self) -> None:
        """Answer for the pipeline that sets timesteps where a run from a picture begins, until `leave`."""
        pipe = _caller(self)
        if self.planner is own_steps or not hasattr(pipe, "get_timesteps"):
            return
        if any(pipe is other for other in self._patched):
            return

        signature, own = inspect.signature(pipe.get_timesteps), pipe.get_timesteps

        def get_timesteps(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            if "strength" not in given:
                return own(*args, **kwargs)
            times = self.begin_at(given["strength"])
            return times, len(times)

        pipe.get_timesteps = get_timesteps
        self._patched.append(pipe)

    def leave(self) -> None:
        """Give pipelines back what `serve` replaced, and make the own steps from now on."""
        self.planner, self.on_step = own_steps, uncounted
        for pipe in self._patched:
            del pipe.get_timesteps
        self._patched.clear()


def check_free(scheduler: Any) -> None:
    """Raises ValueError for a scheduler that follows a plan."""
    if getattr(scheduler, "planner", own_steps) is not own_steps:
        raise ValueError("this pipeline already follows a plan: detach it first")


def _caller(scheduler: Any) -> Any:
    """The pipeline whose method is setting this scheduler's timesteps; None outside of one."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            pipe = frame.f_locals.get("self")
            if getattr(pipe, "__dict__", {}).get("scheduler") is scheduler:
                return pipe
        frame = frame.f_back  # type: ignore[assignment]
    return None

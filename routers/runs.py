"""Which run a transformer call belongs to, how many steps that run has, and which CFG branch the call is.

A run is known by its sampler: it begins where the scheduler of the pipeline that makes the call sets its
timesteps, and these say how many steps it has. Nothing is guessed and nothing need be told, whatever came
before: an interrupt, an exception, another pipeline on the same transformer, another scheduler.

A transformer that is called without any pipeline has no sampler to ask. Then the number of steps is what was
told, a scope is one run, and outside of a scope a run ends where time turns back.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from .patching import COMPILED_WHOLE
from .run import Run

HALF_ULP = 2.0**-8
"""Times in bfloat16 are this far, relatively, from those in the sampler's list."""


class Sampler(NamedTuple):
    """What is about to call: a pipeline (or whatever holds a scheduler) and its timesteps of this run."""

    owner: Any
    scheduler: Any
    timesteps: Tensor


@dataclass
class Names:
    """Tells CFG branches apart: by their name, or by being called again before the sampler moves on.

    Calls of the first step show which unnamed branches there are; from then on they come in this order.
    """

    order: list[str] = field(default_factory=list)
    turn: int = 0
    moment: Any = None
    settled: bool = False

    def next(self, moment: Callable[[], Any]) -> str:
        """The name of an unnamed call. moment: the same for calls of one step."""
        if not self.settled:
            now = moment()
            if not self.order or now == self.moment:
                self.order.append(f"main {len(self.order) + 1}" if self.order else "main")
                self.moment = now
                return self.order[-1]
            self.settled = True
        name = self.order[self.turn % len(self.order)]
        self.turn += 1
        return name


@dataclass
class Followed:
    """A run and how it is followed. timesteps, owner: weak, None without a sampler.

    times: in each branch the time of the last call and the direction it moved in, without a sampler.
    """

    run: Run
    timesteps: weakref.ref[Tensor] | None = None
    owner: weakref.ref[Any] | None = None
    names: Names = field(default_factory=Names)
    times: dict[str, tuple[float, float]] = field(default_factory=dict)

    def goes_on(self, name: str, now: float) -> bool:
        """Without a sampler: whether a branch's call at this time continues the run. It then does."""
        last, direction = self.times.get(name, (now, 0.0))
        step = now - last
        if step * direction < 0.0:
            return False
        self.times[name] = now, step or direction
        return True


class Runs:
    """The runs of an attached transformer, or of several that make one run (Wan 2.2: one after the other).

    start: makes a run of so many steps (None: as told). pipe: a pipeline whose scheduler is asked where a
    call comes from outside of any pipeline; like any other that calls, an object with `.transformer` and with
    a `.scheduler` whose `timesteps` are a tensor that each run sets anew.
    """

    def __init__(self, transformer: nn.Module, start: Callable[[int | None], Run], pipe: Any = None) -> None:
        self.transformers, self.start, self.pipe = [transformer], start, pipe
        self._stale = timesteps_of(pipe)
        self.in_scope = False
        self._followed: list[Followed] = []
        self._name: str | None = None

    def forget(self, in_scope: bool = False) -> None:
        """A scope begins or ends: what comes next is another run."""
        self._followed, self.in_scope = [], in_scope

    @contextmanager
    def cache_context(
        self, original: Callable[..., Any], name: str, *args: Any, **kwargs: Any
    ) -> Iterator[None]:
        """Replaces the transformer's `cache_context`, by which pipelines name the branches of their calls."""
        self._name = name
        try:
            with original(name, *args, **kwargs):
                yield
        finally:
            self._name = None

    def of_call(self, time: Tensor) -> tuple[Run, str]:
        """The run and the branch of a call at time `[R]`, named by the pipeline or not."""
        sampler, name = self._sampler(time), self._name
        if sampler is None:
            return self._without_sampler(time, name)
        followed = self._with_sampler(sampler, time)
        if name is None and hasattr(sampler.scheduler, "step_index"):
            name = followed.names.next(lambda: sampler.scheduler.step_index)
        return followed.run, name or followed.names.next(lambda: _read(followed.run, time))

    def _with_sampler(self, sampler: Sampler, time: Tensor) -> Followed:
        alive = [f for f in self._followed if f.timesteps is not None and f.timesteps() is not None]
        followed = next((f for f in alive if f.timesteps and f.timesteps() is sampler.timesteps), None)
        if followed is None:
            steps = len(sampler.timesteps) - first_step(sampler, time)
            followed = Followed(self.start(steps), weakref.ref(sampler.timesteps), weakref.ref(sampler.owner))
            self._followed = [*alive, followed]
        elif followed.owner is not None and followed.owner() is not sampler.owner:
            raise RuntimeError(
                "two pipelines take turns with one scheduler, so neither makes its own steps; "
                "give each a scheduler of its own, or run one after the other"
            )
        elif self.in_scope and followed is not self._followed[-1]:
            raise RuntimeError(
                "two runs take turns in one scope, which is for one run at a time; run one after the other, "
                "or without a scope"
            )
        return followed

    def _without_sampler(self, time: Tensor, name: str | None) -> tuple[Run, str]:
        """A call from nowhere: the number of steps is what was told, and times are read from the device."""
        followed = self._followed[-1] if self._followed else None
        if followed is None or followed.timesteps is not None:
            followed = Followed(self.start(None))
        self._followed, run = [followed], followed.run
        if self.in_scope:
            return run, name or followed.names.next(lambda: _read(run, time))
        now = _read(run, time)
        branch = name or followed.names.next(lambda: now)
        if followed.goes_on(branch, now):
            return run, branch
        self._followed = []
        return self._without_sampler(time, name)

    def _sampler(self, time: Tensor) -> Sampler | None:
        """The sampler of the pipeline that is calling, or else of the one that was attached to."""
        owner = calling_pipeline(self.transformers)
        if owner is not None:
            return Sampler(owner, owner.scheduler, owner.scheduler.timesteps)
        timesteps = timesteps_of(self.pipe)
        if timesteps is None or timesteps is self._stale:
            return None
        sampler = Sampler(self.pipe, self.pipe.scheduler, timesteps)
        return None if position(sampler, time) is None else sampler


def _read(run: Run, time: Tensor) -> float:
    """A call's time on the host."""
    run.trace.host_syncs += 1
    return float(time[0])


def calling_pipeline(transformers: Sequence[nn.Module]) -> Any:
    """The object with a scheduler whose method is calling one of the transformers; None if there is none.

    Pipelines of one transformer may be many, and a pipeline's scheduler may be replaced at any time: what
    calls is known only while it calls. Raises RuntimeError for one that has compiled the transformer.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            held = getattr(frame.f_locals.get("self"), "__dict__", {})
            if isinstance(getattr(held.get("scheduler"), "timesteps", None), Tensor):
                for value in held.values():
                    if any(value is transformer for transformer in transformers):
                        return frame.f_locals["self"]
                    whole = getattr(value, "_orig_mod", None) if isinstance(value, nn.Module) else None
                    if any(whole is transformer for transformer in transformers):
                        raise RuntimeError(COMPILED_WHOLE)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def timesteps_of(pipe: Any) -> Tensor | None:
    """The timesteps that a pipeline's scheduler has set; None if there are none."""
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return timesteps if isinstance(timesteps, Tensor) else None


def first_step(sampler: Sampler, time: Tensor) -> int:
    """The number of the timestep that a run begins with: image-to-image takes the last ones only."""
    begin = getattr(sampler.scheduler, "begin_index", None)
    return int(begin) if begin is not None else position(sampler, time) or 0


def position(sampler: Sampler, time: Tensor) -> int | None:
    """Where a call's time `[R]` lies in the sampler's list; None if it is not there.

    Pipelines pass a time as the scheduler counts it, or as a share of the training's timesteps.
    """
    config = getattr(sampler.scheduler, "config", sampler.scheduler)
    now, times = float(time[0]), sampler.timesteps.detach().float().cpu().numpy()
    for scale in (getattr(config, "num_train_timesteps", 1000), 1):
        distance = np.abs(times / scale - now)
        if len(times) and distance.min() <= HALF_ULP * abs(now) + 1e-6:
            return int(distance.argmin())
    return None

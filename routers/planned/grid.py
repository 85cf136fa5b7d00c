"""A plan on a sampler's own steps, for whatever cannot be given other times.

A transformer without a pipeline, a pipeline with a loop, a solver or a noise of its own: its steps stay as
they are, and at those that are left out the transformer returns what its last two outputs tend to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..block import argument_names, by_name
from ..patching import Patches, check_call, check_whole
from ..runs import Runs
from .spent import PlanTrace, evaluations_for
from .universal import grid_steps, usual_warp

TIMES = ("timestep", "timesteps", "t", "vision_timesteps", "audio_timestep")
"""What transformers call the time of a call."""


@dataclass
class Past:
    """What one CFG branch has given: its last two outputs, newest first, each with its time."""

    step: int = 0
    outputs: list[tuple[float, Any]] = field(default_factory=list)

    def keep(self, time: float, output: Any) -> None:
        """Remember a copy of an output: a CUDA graph writes the next one over it."""
        copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, output)
        self.outputs = [(time, copied), *self.outputs][:2]

    def at(self, time: float) -> Any:
        """The outputs continued to a time."""
        newest, last = self.outputs[0], self.outputs[-1]
        span = newest[0] - last[0]
        if not span:
            return newest[1]
        share = (time - newest[0]) / span
        return tree_map(lambda new, old: _along(new, old, share), newest[1], last[1])


def _along(new: Any, old: Any, share: float) -> Any:
    if not isinstance(new, Tensor) or not new.is_floating_point():
        return new
    exact = torch.promote_types(new.dtype, torch.float32)
    return (new.to(exact) + share * (new.to(exact) - old.to(exact))).to(new.dtype)


class GridRun:
    """A run under way. computed: the steps at which the transformer is run."""

    def __init__(self, trace: PlanTrace, steps: int) -> None:
        self.trace, self.pasts = trace, dict[str, Past]()
        trace.steps, trace.planned = steps, evaluations_for(trace.requested, steps)
        warp = usual_warp("dense", trace.planned, steps)
        self.computed = frozenset(grid_steps(steps, trace.planned, *warp))


class OnGrid:
    """Made by `routers.attach`. budget: ratio of dense FLOPs. num_steps: of runs whose sampler is not known.

    trace: of the last run, None before the first. Raises ValueError for a transformer with a cache of its
    own, or without an argument for the time.
    """

    def __init__(self, transformer: nn.Module, budget: float, num_steps: int = 20, pipe: Any = None) -> None:
        if "_edit_elastic" in transformer.__dict__:
            raise ValueError("routers are already attached to this transformer: detach them first")
        check_call(transformer)
        check_whole(transformer)
        self.transformer, self.budget, self.num_steps = transformer, budget, num_steps
        self.names = argument_names(transformer)
        self.time = next((name for name in TIMES if name in self.names), "")
        if not self.time:
            names = ", ".join(TIMES)
            raise ValueError(f"{type(transformer).__name__} takes none of {names}: its steps look all alike")
        self.trace: PlanTrace | None = None
        self._scope: PlanTrace | None = None
        self._runs = Runs(transformer, self._start_run, pipe)  # type: ignore[arg-type]
        self._patches = Patches()
        self._patches.add(transformer, self._forward)
        if hasattr(transformer, "cache_context"):
            self._patches.add(transformer, self._runs.cache_context, "cache_context")
        transformer.__dict__["_edit_elastic"] = self

    @contextmanager
    def scope(
        self, *, budget: float | None = None, num_steps: int | None = None, samples: int = 1, **_: Any
    ) -> Iterator[PlanTrace]:
        """A run with wishes of its own: its trace. samples: pictures that it makes.

        Raises RuntimeError if a scope is open, ValueError for a budget that does not exist.
        """
        if self._scope is not None:
            raise RuntimeError("a scope is already open on this transformer; scopes do not nest")
        trace = PlanTrace(self.budget if budget is None else budget, samples=samples, steps=num_steps or 0)
        evaluations_for(trace.requested, 1)
        self._scope = trace
        self._runs.forget(in_scope=True)
        try:
            yield trace
        finally:
            self._scope, self.trace = None, trace
            self._runs.forget()

    def evaluations(self, steps: int, budget: float | None = None) -> int:
        """How many steps of a run are computed."""
        return evaluations_for(self.budget if budget is None else budget, steps)

    def summary(self) -> str:
        """One paragraph on the last run."""
        return "no run yet" if self.trace is None else self.trace.summary()

    def detach(self) -> None:
        """Put the transformer back exactly as it was. Safe to call twice."""
        self._patches.close()
        self.transformer.__dict__.pop("_edit_elastic", None)

    def _start_run(self, num_steps: int | None) -> GridRun:
        check_call(self.transformer)
        check_whole(self.transformer)
        self.trace = trace = self._scope or PlanTrace(self.budget)
        return GridRun(trace, num_steps or trace.steps or self.num_steps)

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        time = torch.as_tensor(by_name(self.names, args, kwargs)[self.time]).float().flatten()
        run, name = self._runs.of_call(time)
        assert isinstance(run, GridRun)
        past = run.pasts.setdefault(name, Past())
        step, past.step = past.step, past.step + 1
        run.trace.of += 1
        now = float(time[0])
        if step < run.trace.steps and step not in run.computed and past.outputs:
            return past.at(now)
        output = original(*args, **kwargs)
        run.trace.made += 1
        past.keep(now, output)
        return output

"""A loaded pipeline with its routers: open once, run many batches."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backbones import loading, registry
from backbones.describe import described
from backbones.solvers import check_solver, solver
from edit_cli.errors import EditError, bad_input, memory_errors
from edit_cli.generate.medium import Job, OnStep
from edit_cli.generate.plan import Plan
from edit_cli.generate.result import StageClock
from edit_cli.generate.routers import RouterSource
from routers.attachment import attach
from routers.elastic import Elastic
from routers.paper import checkpoint as release
from routers.paper import policy as release_policy

RELEASE_NOTE = (
    "routers in the paper's released layout: exact mode with fixed compute; "
    "the MLP activation was switched to x * sigmoid(1.702 x)"
)


@dataclass
class Batch:
    """What one pipeline call gave: results in job order (a RunError for one that failed by itself).

    trace: what was spent and decided; None for a run with nothing attached.
    """

    jobs: tuple[Job, ...]
    results: list[Any]
    trace: Any = None


@dataclass
class Session:
    """A pipeline on its device. elastic None: dense, nothing attached."""

    plan: Plan
    pipe: Any
    clock: StageClock
    source: RouterSource
    elastic: Any = None
    notes: list[str] = field(default_factory=list)
    pipes: dict[str, Any] = field(default_factory=dict)
    """Other pipelines around the same components."""
    _release_routers: Any = None

    @classmethod
    def open(cls, plan: Plan, source: RouterSource, clock: StageClock) -> Session:
        """Load what a plan names. source: its routers (`routers.settle`). Raises EditError, RunError."""
        release_routers, transformer, notes = None, None, []
        if source.release is not None and plan.backbone.file is not None:
            raise EditError(
                f"--routers {str(source.release)!r} brings its own transformer and so does --model "
                f"{str(plan.backbone.file.path)!r}; give the base model's folder as --model"
            )
        for name in plan.medium.imports:  # their import is not what a stage costs
            importlib.import_module(name)
        with bad_input(), memory_errors("while loading the model", plan.medium.smaller):
            if source.release is not None:
                transformer, release_routers = _load_release(plan, source.release)
                notes.append(RELEASE_NOTE)
            pipe = loading.load(plan.backbone, plan.placement, transformer)
            for name in filter(None, {job.solver for job in plan.jobs}):
                check_solver(pipe, name)
            if source.release is not None:
                release.use_sigmoid_gelu(pipe.transformer, plan.backbone.family.transformer)
        session = cls(plan, pipe, clock, source, notes=notes, _release_routers=release_routers)
        if plan.backbone.family not in registry.FAMILIES:
            session._describe()
        return session

    def _describe(self) -> None:
        """Learn what nobody wrote down, blocks and arguments, from a first call that is cut short."""
        backbone, jobs = self.plan.backbone, self.plan.jobs[:1]
        pipe = self.plan.medium.pipe(self, jobs[0])
        run = functools.partial(self.plan.medium.call, self, pipe, jobs, lambda: None)
        quiet, spare = loading.quiet_libraries(), StageClock(self.clock.seconds)
        with bad_input(), quiet, self.timed_by(spare):
            family, found = described(backbone.family, pipe.transformer, run)
        self.notes += [f"{path} runs in full: {reason}" for path, reason in found.left_in_full.items()]
        self.plan = replace(self.plan, backbone=replace(backbone, family=family))

    @property
    def device(self) -> str:
        """Type of the device that computes; with offloading a pipeline's weights lie elsewhere."""
        device = getattr(self.pipe, "_execution_device", self.pipe.device)
        return str(device.type)

    def attach(self) -> None:
        """Put the blocks under control of the routers; without routers, open and only counted."""
        transformer, spec = self.pipe.transformer, self.plan.backbone.family.transformer
        with bad_input():
            if self._release_routers is not None:
                policy = functools.partial(release_policy.ReleasePolicy, dtype=transformer.dtype)
                self.elastic = Elastic(transformer, spec, policy, list(self._release_routers))
            else:
                self.elastic = attach(transformer, self.source.bundle, spec=spec, force=self.plan.force)

    def detach(self) -> None:
        """Leave a clean model. Safe to call twice."""
        if self.elastic is not None:
            self.elastic.detach()
            self.elastic = None

    def run(self, jobs: Sequence[Job], on_step: OnStep = lambda: None) -> Batch:
        """One pipeline call for jobs of one group. Raises RunError when memory runs out."""
        first, medium = jobs[0], self.plan.medium
        scope: Any = nullcontext()
        if self.elastic is not None:
            scope = self.elastic.scope(
                budget=first.budget, num_steps=first.denoising_steps, samples=len(jobs)
            )
        pipe = medium.pipe(self, first)
        stepping = nullcontext() if first.solver is None else solver(pipe, first.solver)
        size = f"at {medium.size(jobs)}, batch {len(jobs)}"
        with memory_errors(size, medium.smaller), loading.quiet_libraries(), stepping, scope as trace:
            results = medium.call(self, pipe, jobs, on_step)
        return Batch(tuple(jobs), results, trace)

    def warm_up(self, jobs: Sequence[Job]) -> None:
        """One denoising step whose result and time are thrown away, so that comparisons start warm."""
        with self.timed_by(StageClock(self.clock.seconds)):
            self.run([self.plan.medium.shortest(jobs[0])])

    @contextmanager
    def timed_by(self, clock: StageClock) -> Iterator[None]:
        """Inside, stages are timed by another clock."""
        usual, self.clock = self.clock, clock
        try:
            yield
        finally:
            self.clock = usual

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, the model is clean and nothing is attached."""
        self.detach()
        yield
        self.attach()


def _load_release(plan: Plan, file: Path) -> tuple[Any, Any]:
    """The fine-tuned transformer of a checkpoint of the paper's, and its routers."""
    import diffusers

    spec = plan.backbone.family.transformer
    config = dict(registry.component_configs(plan.backbone)["transformer"])
    transformer_class = getattr(diffusers, spec.transformer_class)
    device = loading.pick_device(plan.placement.device)
    dtype = loading.pick_dtype(plan.placement.dtype, plan.backbone, device)
    loaded: tuple[Any, Any] = release.load_release(
        file, lambda: transformer_class.from_config(config), spec, dtype=dtype
    )
    return loaded


def at_budget(jobs: Sequence[Job], budget: float | None) -> tuple[Job, ...]:
    """The same jobs at another budget."""
    return tuple(replace(job, budget=budget) for job in jobs)

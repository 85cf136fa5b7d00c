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
from backbones.lora import TooStrongError
from backbones.model_files import ModelError
from backbones.noise import seeded
from backbones.solvers import check_solver, solver
from edit_cli.errors import EditError, RunError, bad_input, memory_errors
from edit_cli.generation.medium import Job, OnStep
from edit_cli.generation.plan import Plan
from edit_cli.generation.result import StageClock, job_flops
from edit_cli.generation.routers import RouterSource
from routers.attachment import attach
from routers.elastic import Elastic
from routers.paper import checkpoint as release
from routers.paper import policy as release_policy
from routers.planned.sampled import Sampled, each_of
from routers.planned.scheduler import elastic_scheduler
from routers.planned.seconds import TooFewSecondsError
from routers.planned.spent import PlanTrace
from routers.planned.universal import exact_planner, fewer_steps
from routers.trace import Trace

PROBED = 2
"""Evaluations by which the seconds of a size are known: the first of a process is slow."""
RELEASE_NOTE = (
    "routers in the paper's released layout: exact mode with fixed compute; "
    "the MLP activation was switched to x * sigmoid(1.702 x)"
)


@dataclass
class Batch:
    """What one pipeline call gave: results in job order (a RunError for one that failed by itself).

    trace: what was spent and decided; None for a run with nothing attached. flops: of all jobs together.
    """

    jobs: tuple[Job, ...]
    results: list[Any]
    trace: Any = None
    flops: dict[str, float] = field(default_factory=dict)


@dataclass
class Session:
    """A pipeline on its device. elastic: what `routers.attach` gave, None while nothing is attached."""

    plan: Plan
    pipe: Any
    clock: StageClock
    source: RouterSource
    elastic: Any = None
    notes: list[str] = field(default_factory=list)
    sampler: str = ""
    """Class of the pipeline's own scheduler, which a plan replaces."""
    pipes: dict[str, Any] = field(default_factory=dict)
    """Other pipelines around the same components."""
    preview: Any = None
    """A `preview.Preview`, where one is asked for."""
    _release_routers: Any = None
    _seen: Any = None

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
        with bad_input(), overflows(), memory_errors("while loading the model", plan.medium.smaller):
            if source.release is not None:
                transformer, release_routers = _load_release(plan, source.release)
                notes.append(RELEASE_NOTE)
            pipe = loading.load(plan.backbone, plan.placement, transformer, notes)
            for name in filter(None, {job.solver for job in plan.jobs}):
                check_solver(pipe, name)
            if source.release is not None:
                release.use_sigmoid_gelu(pipe.transformer, plan.backbone.family.transformer)
        sampler = type(pipe.scheduler).__name__
        session = cls(
            plan, pipe, clock, source, notes=notes, sampler=sampler, _release_routers=release_routers
        )
        if plan.backbone.family not in registry.FAMILIES:
            session._describe()
        return session

    def _describe(self) -> None:
        """Learn what nobody wrote down, blocks and arguments, from a first call that is cut short."""
        backbone, jobs = self.plan.backbone, self.plan.jobs[:1]
        pipe = self.plan.medium.pipe(self, jobs[0])
        run = functools.partial(self.plan.medium.call, self, pipe, jobs, lambda: None)
        quiet, spare = loading.quiet_libraries(), StageClock(self.clock.seconds)
        try:
            with quiet, self.timed_by(spare):
                family, found = described(backbone.family, pipe.transformer, run)
        except ModelError as error:  # a plan does without; routers say so when they are attached
            self.notes.append(f"FLOPs are not counted: {error}")
            return
        self.notes += [f"{path} runs in full: {reason}" for path, reason in found.left_in_full.items()]
        self.plan = replace(self.plan, backbone=replace(backbone, family=family))

    @property
    def device(self) -> str:
        """Type of the device that computes; with offloading a pipeline's weights lie elsewhere."""
        device = getattr(self.pipe, "_execution_device", self.pipe.device)
        return str(device.type)

    def attach(self, watched: bool = False) -> None:
        """Make the pipeline keep to budgets: by a plan, or by routers that decide over its blocks.

        watched: with its blocks in sight, for `edit profile`.
        """
        transformer, spec = self.pipe.transformer, self.plan.backbone.family.transformer
        with bad_input():
            if self._release_routers is not None:
                policy = functools.partial(release_policy.ReleasePolicy, dtype=transformer.dtype)
                self.elastic = Elastic(transformer, spec, policy, list(self._release_routers))
            else:
                self.elastic = attach(self.pipe, self.source.bundle, force=self.plan.force)
            if watched and isinstance(self.elastic, Sampled):
                from routers.watch.planned import WatchedPlan

                plans = self.elastic
                plans.detach()
                self.elastic = WatchedPlan(
                    self.pipe, plans.planner_for, each_of(plans.budget)[0], plans.target, spec, plans.narrow
                )

    def detach(self) -> None:
        """Leave a clean model. Safe to call twice."""
        if self.elastic is not None:
            self.elastic.detach()
            self.elastic = None

    def run(self, jobs: Sequence[Job], on_step: OnStep = lambda: None, size: Any = None) -> Batch:
        """One pipeline call for jobs of one group. size: what it takes is kept for others of this size.

        Raises RunError when memory runs out.
        """
        first, medium = jobs[0], self.plan.medium
        pipe = medium.pipe(self, first)
        pipe.scheduler = self.pipe.scheduler
        scope = nullcontext() if self.elastic is None else self._scope(jobs, size)
        seeds = [job.seed for job in jobs]
        stepping = seeded(pipe.scheduler, seeds) if first.solver is None else solver(pipe, first.solver)
        room = f"at {medium.size(jobs)}, batch {len(jobs)}"
        with memory_errors(room, medium.smaller), loading.quiet_libraries(), stepping, scope as trace:
            try:
                results = medium.call(self, pipe, jobs, on_step)
            except TooFewSecondsError as error:
                raise EditError(str(error)) from error
        if first.time is not None and trace is not None:
            turns = _settled(trace, self.elastic)
            jobs = [replace(job, budget=trace.share, turns=turns) for job in jobs]
        return Batch(tuple(jobs), results, trace, {} if trace is None else self._flops(jobs, trace))

    def batches(self) -> Iterator[tuple[tuple[Job, ...], Sequence[int]]]:
        """The plan's batches, once something is attached; rows have budgets of their own where they can."""
        return self.plan.batches(self._shares)

    def _shares(self, job: Job) -> bool:
        return isinstance(self.elastic, Sampled) and self.source.shares(job)

    @contextmanager
    def observing(self) -> Iterator[Any]:
        """Inside, runs are watched: what they teach (`routers.planned.observed`). Raises EditError."""
        if not isinstance(self.elastic, Sampled):
            raise EditError(
                f"--observe needs a sampler that a plan can take the place of, and this model's "
                f"({self.sampler}) keeps its steps; leave it out"
            )
        with bad_input():
            self._seen = self.elastic.observation()
        try:
            yield self._seen
        finally:
            self._seen = None

    def _scope(self, jobs: Sequence[Job], size: Any = None) -> Any:
        job, samples = jobs[0], len(jobs)
        wishes: dict[str, Any] = {"budget": _budgets(jobs), "samples": samples}
        if self._seen is not None:
            wishes["seen"] = self._seen
        if not isinstance(self.elastic, Sampled):
            return self.elastic.scope(num_steps=job.denoising_steps, **wishes)
        if job.solver is not None:
            wishes["planner_for"] = lambda budget, *_: fewer_steps(budget)
        if job.time is not None:
            wishes["seconds"], size = job.time * samples, self._size(jobs)
        return self.elastic.scope(target=job.target, turns=job.turns, size=size, **wishes)

    def _size(self, jobs: Sequence[Job]) -> Any:
        """Batches of equal size take equal seconds."""
        plain = [replace(job, time=None, budget=None, turns=()) for job in jobs]
        return self.plan.group(plain[0]), self.plan.medium.size(plain), len(plain)

    def probe(self, jobs: Sequence[Job]) -> None:
        """Two evaluations of a batch that is to end in time, to know what a batch of this size takes.

        Raises EditError where no plan takes the sampler's place.
        """
        job = jobs[0]
        if job.time is None:
            return
        if not isinstance(self.elastic, Sampled):
            raise EditError(
                f"--time needs a sampler that a plan can take the place of, and this model's "
                f"({self.sampler}) keeps its steps; give --budget instead"
            )
        if self._size(jobs) in self.elastic.pace.known:
            return
        few = ((0, min(PROBED, job.denoising_steps)),)
        with self.timed_by(StageClock(self.clock.seconds)):
            self.run([replace(job, time=None, turns=few) for job in jobs], size=self._size(jobs))

    def _flops(self, jobs: Sequence[Job], trace: Any) -> dict[str, float]:
        """Routers count what they decide; of a plan it is the share of what the dense run takes."""
        if isinstance(trace, Trace):
            return trace.flops
        if not self.plan.backbone.family.transformer.blocks:
            return {}
        dense = [job_flops(self.plan, job) for job in jobs]
        spent = sum(count * share for count, share in zip(dense, trace.spent, strict=True))
        return {"dense": sum(dense), "spent": spent}

    def evaluations(self, jobs: Sequence[Job]) -> int:
        """How often a batch calls its `on_step`, at most."""
        steps = jobs[0].denoising_steps
        if not isinstance(self.elastic, Sampled):
            return steps
        return self.elastic.evaluations(steps, _budgets(jobs), jobs[0].target)

    def run_exact(self, jobs: Sequence[Job], on_step: OnStep = lambda: None) -> Batch:
        """The solution that ever more steps tend to. Raises EditError for a sampler that takes no others."""
        with self.dense(), bad_input(), elastic_scheduler(self.pipe, exact_planner):
            return self.run([replace(job, solver=None) for job in jobs], on_step)

    def warm_up(self, jobs: Sequence[Job]) -> None:
        """One denoising step whose result and time are thrown away, so that comparisons start warm."""
        with self.timed_by(StageClock(self.clock.seconds)):
            self.run([replace(self.plan.medium.shortest(jobs[0]), time=None, turns=())])

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


@contextmanager
def overflows() -> Iterator[None]:
    """A LoRA that numbers cannot hold is a failed run: it might do at another precision."""
    try:
        yield
    except TooStrongError as error:
        raise RunError(str(error)) from error


def _budgets(jobs: Sequence[Job]) -> Any:
    """The budget of all, or each one's own."""
    each = [job.budget for job in jobs]
    return each[0] if len(set(each)) == 1 else each


def _settled(trace: PlanTrace, elastic: Sampled) -> tuple[tuple[int, int], ...]:
    """How a plan came about, if its share of the dense FLOPs does not tell."""
    (_, only), *others = trace.turns
    told = not others and only < trace.steps and elastic.narrow is None
    return () if told else tuple(trace.turns)


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

"""What a run gave: finished jobs, files, seconds by stage, budgets spent, decisions, comparison, notes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli import console
from edit_cli.generation.medium import Job
from routers.planned.spent import PlanTrace

if TYPE_CHECKING:
    from edit_cli.generation.plan import Plan
    from edit_cli.generation.session import Batch
    from routers.trace import Trace


class StageClock:
    """Adds up seconds per stage over a whole command. Total is wall time since the command began."""

    def __init__(self, stages: Iterable[str]) -> None:
        self.started = console.began()
        self.seconds = dict.fromkeys(stages, 0.0)

    @contextmanager
    def stage(self, name: str, device: str = "cpu") -> Iterator[None]:
        """Add the context's wall time to a stage; waits for the device before it stops."""
        start = time.perf_counter()
        try:
            yield
            waiter(device)()
        finally:
            self.seconds[name] += time.perf_counter() - start

    def report(self) -> dict[str, float]:
        """Rounded seconds per stage and in total."""
        total = time.perf_counter() - self.started
        return {name: round(value, 4) for name, value in {**self.seconds, "total": total}.items()}


def waiter(device: str) -> Callable[[], None]:
    """A function that returns when a device's queued work is done."""
    if device == "cpu":
        return lambda: None
    import torch

    wait: Callable[[], None] = getattr(torch, device).synchronize
    return wait


def job_flops(plan: Plan, job: Job) -> float:
    """FLOPs of one result's denoising, dense: counted on the meta device. Raises ModelError."""
    from backbones.loading import call_flops

    calls = plan.medium.calls(job, plan.backbone)
    return job.denoising_steps * sum(call_flops(plan.backbone, size) for size in calls)


PARTS = ("spent", "took", "facts", "flops", "decisions", "evaluations", "calls", "comparison")
"""Of a result, what adds up over processes."""


@dataclass
class Result:
    """Finished jobs in order, with what was spent on each and facts about each; sums over all of them.

    asked: whether somebody named a budget. shown, strips: of a sweep, pictures by job and where they stand
    side by side. took: seconds of each, None where it was given none. decisions, calls: of routers over
    blocks, where they decide. evaluations: of plans, made and of the dense run.
    """

    plan: Plan
    jobs: list[Job] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    flops: dict[str, float] = field(default_factory=lambda: {"dense": 0.0, "spent": 0.0})
    decisions: dict[str, Any] | None = None
    evaluations: dict[str, int] = field(default_factory=lambda: {"made": 0, "dense": 0})
    took: list[float | None] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    comparison: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    asked: bool = False
    shown: dict[int, Any] = field(default_factory=dict)
    strips: list[Path] = field(default_factory=list)

    def add(self, batch: Batch, rows: Sequence[int]) -> None:
        """Add a batch's measurements. rows: which of its results were asked for."""
        trace = batch.trace
        self.jobs += [batch.jobs[row] for row in rows]
        self.spent += [trace.spent[row] for row in rows]
        timed = isinstance(trace, PlanTrace) and trace.seconds is not None  # routers know no --time
        self.took += [trace.took / len(batch.jobs) if timed else None for _ in rows]
        self.facts += [self.plan.medium.facts(batch.results[row]) for row in rows]
        for name, value in batch.flops.items():
            self.flops[name] += value
        if isinstance(trace, PlanTrace):
            self.evaluations = _together(self.evaluations, {"made": trace.made, "dense": trace.of})
        else:
            self._add_decisions(trace)
        self.note(*trace.notes)
        if len(rows) < len(batch.jobs):
            self.note(f"replayed in its batch of {len(batch.jobs)}: FLOPs and seconds are the batch's")

    def _add_decisions(self, trace: Trace) -> None:
        decisions: Any = trace.decisions
        self.decisions = self.decisions or {"skip": 0, "reuse": 0, "compute": {}}
        for name in ("skip", "reuse"):
            self.decisions[name] += decisions[name]
        compute = self.decisions["compute"]
        for width, count in decisions["compute"].items():
            compute[width] = compute.get(width, 0) + count
        self.calls += trace.num_calls

    def note(self, *notes: str) -> None:
        """Say something once."""
        self.notes += [note for note in notes if note not in self.notes]

    def part(self) -> dict[str, Any]:
        """What was made so far as plain data: for the process that reports (`join`)."""
        jobs, written = [job.index for job in self.jobs], [str(path) for path in self.written]
        return {**{name: getattr(self, name) for name in (*PARTS, "notes")}, "jobs": jobs, "written": written}

    def join(self, part: Mapping[str, Any]) -> None:
        """Take in the part of a process that made some of the plan's jobs."""
        jobs = {job.index: job for job in self.plan.jobs}
        self.jobs += [jobs[index] for index in part["jobs"]]
        self.written += [Path(path) for path in part["written"]]
        for name in PARTS:
            setattr(self, name, _together(getattr(self, name), part[name]))
        self.note(*part["notes"])

    def finish(self, seconds: dict[str, float], dense: dict[str, float]) -> None:
        """Put in the seconds of the run and of the dense runs beside it; sort by the plan's order."""
        self.seconds, comparison = seconds, self.comparison
        order = sorted(range(len(self.jobs)), key=lambda i: self.jobs[i].index)
        lists = [(vars(self), name) for name in ("jobs", "spent", "facts", "took")]
        lists += [(comparison, name) for name in comparison] if comparison else []
        for owner, name in lists:
            owner[name] = [owner[name][i] for i in order]
        if comparison is None:
            return
        show = self.plan.medium.compared_seconds
        comparison |= {"dense_seconds": show(dense), "elastic_seconds": show(seconds)}
        if not dense["denoise"]:  # another process made them all
            return
        comparison["time_ratio"] = round(seconds["denoise"] / dense["denoise"], 4)
        if seconds["denoise"] > dense["denoise"] and self.flops["spent"] < 0.999 * self.flops["dense"]:
            self.note(
                f"elastic was slower than dense here ({seconds['denoise']:.2f} s against "
                f"{dense['denoise']:.2f} s of denoising): the model is too small or the run too short for "
                "the saved FLOPs to show"
            )


def _together(ours: Any, theirs: Any) -> Any:
    """Sums, of all that is in them for objects; one list after the other. None is nothing."""
    if ours is None or theirs is None:
        return theirs if ours is None else ours
    if isinstance(ours, dict):
        return {name: _together(ours.get(name), theirs.get(name)) for name in {**ours, **theirs}}
    return ours + theirs

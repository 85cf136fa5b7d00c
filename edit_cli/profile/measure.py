"""Measure what `edit profile` shows: rounds of generations, dense and at every budget, taking turns.

First every variant runs once to look: pictures, drift from the dense run, redundancy. That is also the
warm-up. Then every repeat times every variant in turn, so that a machine that slows down slows all alike.

Shapes: S steps, N blocks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from edit_cli.generation.session import Batch
from edit_cli.profile.plan import ProfilePlan
from edit_cli.profile.subject import Round, Subject
from routers.policy import CallInfo, OpenPolicy
from routers.trace import Trace
from routers.trained.policy import cost_table
from routers.watch.redundancy import Redundancy, Streams, drift, watch_streams
from routers.watch.timing import Clock, Span, Timeline, clock_for, cost_of_a_span

PROBES = 512
"""Single skips measured by --dense at most: with more blocks x steps, only every k-th step is probed."""


@dataclass
class Timed:
    """One timed round: its stages, and spans and calls of every pipeline call."""

    round: Round
    spans: list[list[Span]]
    calls: list[list[CallInfo]]

    @property
    def denoise(self) -> float:
        """Seconds of denoising."""
        return self.round.seconds["denoise"]

    def seconds_in(self, part: str) -> float:
        """Seconds in all spans of a part."""
        return sum(span.seconds for spans in self.spans for span in spans if span.part == part)

    def block_seconds(self, steps: int, blocks: int) -> Any:
        """Seconds `[S, N]` in each block, all samples and CFG branches together."""
        seconds = np.zeros((steps, blocks))
        for spans, calls in zip(self.spans, self.calls, strict=True):
            for span in spans:
                if span.part == "block":
                    seconds[calls[span.call].step, span.block] += span.seconds
        return seconds

    def block_flops(self, traces: list[Trace], blocks: int) -> Any:
        """FLOPs `[N]` spent in each block, routers included. traces: of the same calls."""
        flops = np.zeros(blocks)
        for infos, trace in zip(self.calls, traces, strict=True):
            # steps that were left out come last in a trace, and no call was made for them
            for info, record in zip(infos, trace.calls, strict=False):
                spent = cost_table(info)[np.arange(blocks), np.maximum(record.actions, 0)] + info.overhead
                flops += np.where(record.actions >= 0, spent, 0.0).sum(axis=0)
        return flops


@dataclass
class Variant:
    """One budget (None: fixed by the routers), or the dense model. drift [S, N]: NaN where unknown."""

    name: str
    budget: float | None
    look: Round
    drift: Any = None
    peak_bytes: int = 0
    timed: list[Timed] = field(default_factory=list)
    plain: list[Round] = field(default_factory=list)
    """Repeats without a timer: dense with nothing attached; the first budget's show what the timer costs."""

    @property
    def traces(self) -> list[Trace]:
        """Per pipeline call."""
        return self.look.traces

    @property
    def middle(self) -> Timed:
        """The repeat whose denoising took the median time (of two, the faster)."""
        ranked = sorted(self.timed, key=lambda timed: timed.denoise)
        return ranked[(len(ranked) - 1) // 2]


@dataclass
class Measured:
    """Everything a trace is made from. maps: of --dense, `[S, N]` by name; probed: its probed steps."""

    plan: ProfilePlan
    subject: Subject
    dense: Variant
    variants: list[Variant]
    clock: Clock
    span_seconds: float
    maps: dict[str, Any] = field(default_factory=dict)
    probed: list[int] = field(default_factory=list)


def measure(plan: ProfilePlan, step: Callable[[str, int], None] = lambda what, total: None) -> Measured:
    """Load the model and run everything. step(what, total) is called before every round.

    Raises EditError for bad input, RunError for a failed run.
    """
    subject = Subject(plan)
    budgets = () if plan.dense else subject.budgets
    total = 1 + len(budgets) + plan.repeats * (len(budgets) + (3 if budgets else 2))
    maps: dict[str, Any] = {}
    probed: list[int] = []
    streams: list[Streams] = []
    try:
        subject.session.attach(watched=True)
        clock = clock_for(torch.device(subject.session.device))
        step("looking, dense", total)
        with _dense_policy(subject):
            if plan.dense:
                maps, probed, look = _redundancy(subject)
            else:
                look, streams = _watched(subject, 1.0)
        dense, variants = Variant("dense", 1.0, look), []
        for budget in budgets:
            step(f"looking, budget {_name(budget)}", total)
            _forget_peak(subject)
            look, elastic_streams = _watched(subject, budget)
            drifts = [drift(a, b) for a, b in zip(elastic_streams, streams, strict=True)]
            drift_map = _drift_map(drifts, look, subject)
            variants.append(Variant(_name(budget), budget, look, drift_map, _peak_bytes(subject)))
        for number in range(1, plan.repeats + 1):

            def tell(what: str, number: int = number) -> None:
                step(f"{what}, run {number}", total)

            _repeat(subject, clock, dense, variants, tell)
    finally:
        subject.session.detach()
    return Measured(plan, subject, dense, variants, clock, cost_of_a_span(clock), maps, probed)


def _watched(subject: Subject, budget: float | None) -> tuple[Round, list[Streams]]:
    """A round, and the streams of every pipeline call in it."""
    streams: list[Streams] = []

    def call(run: Callable[[], Batch]) -> Batch:
        with watch_streams(subject.elastic) as seen:
            result = run()
        streams.append(seen)
        return result

    return subject.run(budget, call), streams


def _repeat(
    subject: Subject, clock: Clock, dense: Variant, variants: list[Variant], step: Callable[[str], None]
) -> None:
    step("dense")
    subject.session.detach()
    _forget_peak(subject)
    dense.plain.append(_without_results(subject.run(1.0)))
    dense.peak_bytes = max(dense.peak_bytes, _peak_bytes(subject))
    subject.session.attach(watched=True)
    step("dense, timed")
    with _dense_policy(subject):
        dense.timed.append(_timed(subject, clock, 1.0))
    for variant in variants:
        step(f"budget {variant.name}, timed")
        variant.timed.append(_timed(subject, clock, variant.budget))
    for variant in variants[:1]:
        step(f"budget {variant.name}")
        variant.plain.append(_without_results(subject.run(variant.budget)))


def _timed(subject: Subject, clock: Clock, budget: float | None) -> Timed:
    elastic, spans, calls = subject.elastic, [], []

    def call(run: Callable[[], Batch]) -> Batch:
        line = elastic.timer = Timeline(clock)
        try:
            result = run()
        finally:
            elastic.timer = None
        spans.append(line.finish())
        calls.append(line.calls)
        return result

    return Timed(_without_results(subject.run(budget, call)), spans, calls)


def _without_results(done: Round) -> Round:
    """Repeats make the same results again, and a mesh's volume is large."""
    done.results = []
    return done


@contextmanager
def _dense_policy(subject: Subject) -> Iterator[None]:
    """Inside, runs of the attached transformer compute everything."""
    elastic = subject.elastic
    usual, elastic.make_policy = elastic.make_policy, OpenPolicy
    try:
        yield
    finally:
        elastic.make_policy = usual


def _name(budget: float | None) -> str:
    return "fixed" if budget is None else f"{budget:g}"


def _redundancy(subject: Subject) -> tuple[dict[str, Any], list[int], Round]:
    """Maps `[S, N]` over samples, branches and batches; which steps were probed; the dense round."""
    elastic, steps = subject.elastic, subject.steps
    every = max(1, -(-steps * len(elastic.blocks) // PROBES))
    probed = list(range(0, steps, every))
    rows: dict[str, list[Any]] = {"adds": [], "similarity": [], "cost": []}

    def call(run: Callable[[], Batch]) -> Batch:
        watch = Redundancy(elastic, steps, probed)
        with watch.watching():
            result = run()
        for maps in watch.maps.values():
            for name, value in zip(rows, (maps.adds, maps.similarity, maps.skip_cost), strict=True):
                rows[name] += [*value.transpose(1, 0, 2)]
        return result

    look = subject.run(1.0, call)
    return {name: np.mean(values, axis=0) for name, values in rows.items()}, probed, look


def _drift_map(drifts: list[dict[tuple[str, int, int], Any]], look: Round, subject: Subject) -> Any:
    """Mean drift `[S, N]`. Blocks reused one after the other are added in one go, and share its drift."""
    blocks = len(subject.elastic.blocks)
    total, count = np.zeros((2, subject.steps, blocks))
    for rows in drifts:
        for (_, step, block), values in rows.items():
            total[step, block] += values.sum()
            count[step, block] += len(values)
    total = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    reused = np.ones((subject.steps, blocks), bool)
    for trace in look.traces:
        for call in trace.calls:
            reused[call.step] &= (call.actions == -1).all(axis=0)
    for block in range(blocks - 2, -1, -1):
        both = reused[:, block] & reused[:, block + 1]
        total[both, block] = total[both, block + 1]
    return total


def _forget_peak(subject: Subject) -> None:
    if subject.session.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes(subject: Subject) -> int:
    """Most memory in use so far: of the GPU since the last reset, else of this process."""
    device = subject.session.device
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    if device == "mps":
        return int(torch.mps.driver_allocated_memory())
    if os.name == "nt":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, others KiB

"""When things happened in a run: one interface over CUDA events, MPS events and the host's clock.

Marks are set while the pipeline runs and read after it, so that nothing waits for a device inside the
loop; on a CPU a mark is the host's clock itself. A `Timeline` goes into `Elastic.timer`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch

from ..policy import CallInfo

PARTS = ("call", "decide", "block", "cache", "router")
"""call: a transformer call as a whole. decide: the policy, and the host's read of the routers' logits.
block: one block, whatever it did. cache: inside a block, keeping or adding a cached delta. router: pooling
for the routers, and the routers."""
CALIBRATION_SPANS = 512
"""Empty spans that are timed to learn what one span costs."""


class Clock(Protocol):
    """Marks points in the work of a device, and says how far two of them are apart once the work is done."""

    method: str

    def mark(self) -> Any:
        """A point in time; never waits."""

    def settle(self) -> None:
        """Wait until every mark can be read."""

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another; only after `settle`."""


class HostClock:
    """The host's monotonic clock: exact where work is done when its call returns."""

    method = "time.perf_counter_ns"

    def mark(self) -> int:
        """Nanoseconds."""
        return time.perf_counter_ns()

    def settle(self) -> None:
        """Nothing to wait for."""

    def between(self, start: int, end: int) -> float:
        """Seconds."""
        return (end - start) / 1e9


class EventClock:
    """Events recorded in a device's own queue. Modules: torch.cuda, torch.mps."""

    def __init__(self, module: Any, event: Any, method: str) -> None:
        self._module, self._event, self.method = module, event, method

    def mark(self) -> Any:
        """An event in the current queue."""
        event = self._event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        """One synchronisation for all events."""
        self._module.synchronize()

    def between(self, start: Any, end: Any) -> float:
        """Seconds; events count in milliseconds."""
        return float(start.elapsed_time(end)) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock that sees a device's work."""
    if device.type == "cuda":
        return EventClock(torch.cuda, torch.cuda.Event, "CUDA events, read after the run")
    if device.type == "mps":
        return EventClock(torch.mps, torch.mps.Event, "MPS events, read after the run")
    return HostClock()


@dataclass(frozen=True)
class Span:
    """A part of a run. call: index into `Timeline.calls`. block: -1 for the whole call. Times in s."""

    part: str
    call: int
    block: int
    start: float
    seconds: float


class _Open:
    __slots__ = ("block", "part", "started", "timeline")

    def __init__(self, timeline: Timeline, part: str, block: int) -> None:
        self.timeline, self.part, self.block = timeline, part, block

    def __enter__(self) -> None:
        self.started = self.timeline.clock.mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        line = self.timeline
        line.marks.append((self.part, len(line.calls), self.block, self.started, line.clock.mark()))


class Timeline:
    """The spans of one pipeline call, and what each transformer call in it was."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.calls: list[CallInfo] = []
        self.marks: list[tuple[str, int, int, Any, Any]] = []
        self._origin = clock.mark()

    def span(self, part: str, block: int = -1) -> _Open:
        """A context that is one span. part: one of PARTS."""
        return _Open(self, part, block)

    def finish(self) -> list[Span]:
        """All spans in order of their end, times since the timeline was made. Waits for the device once."""
        self.clock.settle()
        between, origin = self.clock.between, self._origin
        return [
            Span(part, call, block, between(origin, start), between(start, end))
            for part, call, block, start, end in self.marks
        ]


def cost_of_a_span(clock: Clock) -> float:
    """Host seconds that one span takes from the run it measures: median of batches of empty spans."""
    costs = []
    for _ in range(5):
        line = Timeline(clock)
        start = time.perf_counter()
        for _ in range(CALIBRATION_SPANS):
            with line.span("block", 0):
                pass
        costs.append((time.perf_counter() - start) / CALIBRATION_SPANS)
    clock.settle()
    return statistics.median(costs)

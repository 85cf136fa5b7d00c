"""A run that ends in time: evaluations are timed, and what is left of the plan is chosen by them."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

KEPT_BACK = 0.02
"""Share of the seconds that no evaluation is planned into: evaluations differ by so much."""
SLACK = 0.3
"""Of an evaluation: so much more than its time has to be left before a run is made longer by it."""
RECENT = 5
"""Evaluations by whose median the next ones are forecast."""


class TooFewSecondsError(ValueError):
    """Less than one evaluation and what comes before and after it."""


class Watch:
    """Seconds of a run. device: type of what computes; a GPU is asked by events, and never waited for."""

    def __init__(self, device: str) -> None:
        self.device, self._marks = device, list[Any]()
        self._start = time.perf_counter()
        self._first = self._event()

    def begin(self) -> None:
        """The first mark, whatever was marked before."""
        self._marks.clear()
        self.mark()

    def mark(self) -> None:
        """Something has been asked for: remember when it is done."""
        if self.device not in ("cpu", "cuda"):
            getattr(torch, self.device).synchronize()
        self._marks.append(self._event() or self.now())

    def done(self, wait: bool = False) -> list[float]:
        """Seconds from the start to each mark that has been reached. wait: until all are."""
        if self.device != "cuda":
            return list(self._marks)
        if wait:
            self._marks[-1].synchronize()
        reached = [mark for mark in self._marks if mark.query()]
        return [self._first.elapsed_time(mark) / 1000 for mark in reached]

    def now(self) -> float:
        """Seconds from the start, of the host."""
        return time.perf_counter() - self._start

    def _event(self) -> Any:
        if self.device != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Known:
    """What runs of one size took, the newest last: seconds of an evaluation, and after the last of them."""

    each: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    afterwards: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def learn(self, seconds: float) -> None:
        """Another evaluation. The very first warms up what later ones find warm."""
        if not self.afterwards and len(self.each) == 1 and seconds < self.each[0]:
            self.each.clear()
        self.each.append(seconds)

    def typical(self) -> float:
        """Seconds that the next evaluation will take."""
        return statistics.median(self.each)

    @property
    def after(self) -> float:
        """Seconds from the last evaluation to the result: 0 before the first run has shown it."""
        return statistics.median(self.afterwards) if self.afterwards else 0.0


class Pace:
    """Of one pipeline: what runs of each size took, and how far the present one has come.

    Marks of the watch: where denoising begins, then each evaluation.
    """

    def __init__(self, device: Callable[[], str]) -> None:
        self.device = device
        self.known: dict[Hashable, Known] = {}
        self.watch: Watch | None = None
        self.asked = 0.0
        self._size: Known | None = None
        self._learned = 0

    @property
    def running(self) -> bool:
        """Whether a run is timed."""
        return self._size is not None

    def start(self) -> None:
        """A call of the pipeline begins."""
        self.watch, self._size = Watch(self.device()), None

    def begin(self, size: Hashable, seconds: float) -> None:
        """Denoising begins. seconds: for the whole call, infinity for as many as it takes.

        Raises TooFewSecondsError for fewer than the least possible, where that is known.
        """
        if self.watch is None:
            self.start()
        assert self.watch is not None
        self.watch.begin()
        self._size, self._learned, self.asked = self.known.setdefault(size, Known()), 0, seconds
        if self._size.each:
            least = self.watch.now() + self._size.typical() + self._size.after
            if seconds < least:
                raise TooFewSecondsError(
                    f"a time of {seconds:.3g} s is less than the least possible, about {least:.3g} s "
                    "here: one evaluation, and what comes before and after it"
                )

    def evaluated(self) -> None:
        """Another evaluation has been asked for."""
        assert self.watch is not None and self._size is not None
        self.watch.mark()
        self._learn(wait=not self._size.each)

    def _learn(self, wait: bool = False) -> None:
        assert self.watch is not None and self._size is not None
        done = self.watch.done(wait)
        for number in range(self._learned + 1, len(done)):
            self._size.learn(done[number] - done[number - 1])
        self._learned = max(len(done) - 1, 0)

    def room(self, made: int) -> float:
        """How many more evaluations end in time, once so many have been asked for; infinity where no
        evaluation is known yet.
        """
        assert self.watch is not None and self._size is not None
        if not self._size.each:
            return float("inf")
        each, done = self._size.typical(), self.watch.done()
        reached = done[-1] if done else self.watch.now()
        then = reached + (made - max(len(done) - 1, 0)) * each
        return (self.asked * (1 - KEPT_BACK) - self._size.after - then) / each

    def finish(self) -> float:
        """The call has ended, its result is on the host: the seconds it took."""
        if self.watch is None:
            return 0.0
        took = self.watch.now()
        if self._size is not None and self.watch.done():
            self._learn(wait=True)
            self._size.afterwards.append(took - self.watch.done()[-1])
        self.drop()
        return took

    def drop(self) -> None:
        """The call came to nothing."""
        self.watch = self._size = None


def fitting(room: float, left: int, most: int) -> int:
    """Evaluations that are planned from here on, where `left` are planned now and there is room for
    another number: fewer if need be, more where that is sure.
    """
    if room < left:
        return max(int(room), 0)
    longer = int(min(room - SLACK, most)) if room < float("inf") else most
    return min(max(left, longer), most)

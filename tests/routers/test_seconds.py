"""Runs that end in time, by a clock that only the tests move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UniPCMultistepScheduler

import routers
from backbones.solvers import solver
from routers.planned import seconds
from routers.planned.course import Course, joined
from routers.planned.sampled import Sampled
from routers.planned.seconds import Watch, fitting
from routers.planned.timeplan import TimePlan, adams_bashforth, euler
from routers.planned.universal import fewer_steps, universal_planner
from tests.routers.packaged import ALL, FLUX, MESH, QWEN, image_to_image, load, make, sketch

EACH, DECODING = 1.0, 3.0
by_name = pytest.mark.parametrize("folder", ALL, ids=lambda folder: folder.name)


class Clock:
    """Seconds that pass where evaluations are made and latents are decoded."""

    def __init__(self) -> None:
        self.now, self.made, self.cost = 0.0, 0, lambda number: EACH

    def begin(self, cost: Callable[[int], float] = lambda number: EACH) -> None:
        self.made, self.cost = 0, cost

    def evaluation(self, branches: int) -> Callable[..., None]:
        def passed(*_: object) -> None:
            self.now += self.cost(self.made // branches + 1) / branches
            self.made += 1

        return passed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(seconds, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def timed(clock: Clock) -> Iterator[Callable[..., tuple[Any, Sampled]]]:
    undo: list[Callable[[], None]] = []

    def attach(folder: Any, **options: Any) -> tuple[Any, Sampled]:
        pipe = load(folder)
        sampled = routers.attach(pipe, **options)
        assert isinstance(sampled, Sampled)
        passed = clock.evaluation(2 if folder == QWEN else 1)
        handle = pipe.transformer.register_forward_pre_hook(passed)
        undo.extend((sampled.detach, handle.remove))
        return pipe, sampled

    yield attach
    for each in undo:
        each()


# -- in time ------------------------------------------------------------------------------------


@by_name
def test_a_run_ends_in_time_and_is_made_again_by_what_it_came_to(
    folder: Any, clock: Clock, timed: Any
) -> None:
    pipe, sampled = timed(folder)
    with sampled.scope(seconds=6.5) as trace:
        picture = make(pipe, 12)
    assert (trace.made, trace.took, trace.share) == (6, 6.0, 0.5)
    assert trace.notes == [] and "took 6 s" in trace.summary()
    with sampled.scope(budget=trace.share) as again:
        assert torch.equal(make(pipe, 12), picture)
    assert (again.made, again.took, again.seconds) == (6, 6.0, None)


COSTS = {
    "slower": (lambda number: 1.0 if number < 4 else 2.0, range(6, 9)),
    "faster": (lambda number: 1.0 if number < 4 else 0.5, range(13, 21)),
    "uneven": (lambda number: 1.3 if number % 2 else 0.7, range(9, 13)),
}


SLOW = [pytest.param(f, k, marks=pytest.mark.slow) for f in (QWEN, FLUX) for k in COSTS if k != "slower"]


@pytest.mark.parametrize(
    ("folder", "kind"), [*((MESH, kind) for kind in COSTS), (QWEN, "slower"), (FLUX, "slower"), *SLOW]
)
def test_a_plan_changes_where_evaluations_turn_out_otherwise(
    folder: Any, kind: str, clock: Clock, timed: Any
) -> None:
    cost, expected = COSTS[kind]
    pipe, sampled = timed(folder)
    clock.begin(cost)
    with sampled.scope(seconds=12) as trace:
        picture = make(pipe, 20)
    assert 9 <= trace.took <= 12.5 and trace.made in expected and len(trace.turns) > 1
    with sampled.scope(turns=trace.turns) as again:
        assert torch.equal(make(pipe, 20), picture)
    assert again.made == trace.made and again.turns == trace.turns


def test_what_comes_after_the_last_evaluation_is_known_from_the_run_before(clock: Clock, timed: Any) -> None:
    pipe, sampled = timed(QWEN)
    ended = []
    for _ in range(3):
        with sampled.scope(seconds=8.5) as trace:
            make(pipe, 12)
            clock.now += DECODING
        ended.append((trace.made, trace.took, len(trace.notes)))
    assert ended == [(8, 11.0, 1), (5, 8.0, 0), (5, 8.0, 0)]


def test_seconds_of_an_attach_are_of_whole_calls(clock: Clock, timed: Any) -> None:
    """Between the first thing and the last that a pipeline does."""
    pipe, sampled = timed(FLUX, seconds=8.5)
    names = {"check_inputs", "maybe_free_model_hooks"}
    assert names <= set(vars(pipe))
    made = []
    for _ in range(2):
        clock.now += 100  # what happens between two calls is nobody's
        make(pipe, 12)
        assert sampled.trace is not None
        made.append((sampled.trace.made, sampled.trace.took))
    assert made == [(8, 8.0), (8, 8.0)]
    sampled.detach()
    assert not names & set(vars(pipe))


@pytest.mark.parametrize("when", ["scope", "attach"])
def test_the_smaller_of_budget_and_seconds_is_kept(when: str, clock: Clock, timed: Any) -> None:
    pipe, sampled = timed(QWEN, **({"budget": 0.25, "seconds": 6.5} if when == "attach" else {}))
    for budget, made in ((0.25, 2), (1.0, 6)):
        with sampled.scope(budget=budget, seconds=6.5) as trace:
            make(pipe, 8)
        assert trace.made == made
    if when == "attach":
        make(pipe, 8)
        assert sampled.trace is not None and sampled.trace.made == 2


def test_less_than_the_least_possible_is_refused_once_it_is_known(clock: Clock, timed: Any) -> None:
    pipe, sampled = timed(QWEN)
    with sampled.scope(seconds=0.5) as trace:
        make(pipe, 8)
    assert trace.made == 1 and trace.notes == ["asked 0.5 s, took 1 s"]
    least = "less than the least possible, about 1 s"
    with pytest.raises(ValueError, match=least), sampled.scope(seconds=0.5):
        make(pipe, 8)
    with sampled.scope(seconds=2.1) as trace:
        make(pipe, 8)
    assert trace.made == 2, "what was refused leaves nothing behind"


@pytest.mark.parametrize("given", [0.0, -1.0, float("nan"), float("inf")])
def test_seconds_that_do_not_exist_are_refused(given: float) -> None:
    with pytest.raises(ValueError, match="no time to make anything in"):
        routers.attach(load(QWEN), seconds=given)


def test_seconds_are_refused_where_no_plan_takes_the_samplers_place() -> None:
    with pytest.raises(ValueError, match="give a budget"):
        routers.attach(load(QWEN).transformer, seconds=5)


# -- whatever the pipeline is asked -------------------------------------------------------------


@pytest.mark.parametrize("own", [DDIMScheduler, UniPCMultistepScheduler])
def test_other_samplers_end_in_time(own: Any, clock: Clock) -> None:
    scheduler, pipe = own(), SimpleNamespace(transformer=torch.nn.Linear(1, 1), device="cpu")
    pipe.scheduler = scheduler
    sampled = routers.attach(pipe)
    assert isinstance(sampled, Sampled)

    def run(x: torch.Tensor) -> torch.Tensor:
        pipe.scheduler.set_timesteps(12)
        for t in pipe.scheduler.timesteps:
            clock.now += EACH if clock.made < 3 else 2 * EACH
            clock.made += 1
            x = pipe.scheduler.step(pipe.scheduler.scale_model_input(x, t) * 0.3, t, x).prev_sample
        return x

    with sampled.scope(seconds=9.5) as trace:
        made = run(torch.ones(1, 4))
    assert (
        trace.made == 6
        and trace.took == 9.0
        and trace.target == ("exact" if own != DDIMScheduler else "dense")
    )
    with sampled.scope(turns=trace.turns):
        assert torch.equal(run(torch.ones(1, 4)), made)


@pytest.mark.parametrize("name", ["euler", "ab2", "dpm++2m"])
def test_a_solver_ends_in_time(name: str, clock: Clock, timed: Any) -> None:
    pipe, sampled = timed(QWEN)
    few = {"planner_for": lambda budget, *_: fewer_steps(budget)}
    with sampled.scope(seconds=5.5, **few) as trace, solver(pipe, name):
        picture = make(pipe, 10)
    assert trace.made == 5
    with sampled.scope(budget=0.5, **few), solver(pipe, name):
        assert torch.equal(make(pipe, 10), picture)


def test_a_run_from_a_picture_ends_in_time(clock: Clock, timed: Any) -> None:
    pipe, sampled = timed(QWEN)
    painter = image_to_image(pipe)
    with sampled.scope(seconds=3.5) as trace:
        make(painter, 10, image=sketch(), strength=0.6)
    assert (trace.made, trace.steps, trace.took) == (3, 6, 3.0)


def test_a_loop_that_took_its_times_at_once_keeps_them(clock: Clock) -> None:
    pipe = load(FLUX)
    sampled = routers.attach(pipe)
    assert isinstance(sampled, Sampled)
    try:
        for asked, expected in ((4.5, 10), (4.5, 4)):  # nothing is known, then the size is
            with sampled.scope(seconds=asked) as trace:
                pipe.scheduler.set_timesteps(10, mu=0.5)
                x = torch.ones(1, 4)
                for t in list(pipe.scheduler.timesteps):
                    clock.now += EACH
                    x = pipe.scheduler.step(x * 0.1, t, x).prev_sample
            assert trace.made == expected == trace.planned
    finally:
        sampled.detach()


# -- parts --------------------------------------------------------------------------------------


def test_a_plan_that_is_joined_to_another_keeps_weights_where_they_were_fitted() -> None:
    times = np.linspace(1, 0, 9)
    fitted = TimePlan(times, np.tril(np.arange(32.0).reshape(8, 4)) + np.eye(8, 4))
    near = adams_bashforth
    same = joined(times[:3], fitted, near)
    assert np.array_equal(same.times, fitted.times) and np.array_equal(same.weights, fitted.weights)
    other = joined(np.array([1.0, 0.8, 0.55]), fitted, near)
    assert other.times.tolist() == [1.0, 0.8, 0.55, 0.5, 0.375, 0.25, 0.125, 0.0]
    assert np.array_equal(other.weights[6], fitted.weights[7]), "its four outputs are the plan's own"
    stands_in = near(other.times)
    assert np.array_equal(other.weights[:6, :2], stands_in.weights[:6]) and not other.weights[:6, 2:].any()


def test_courses_find_the_plan_that_has_so_many_evaluations_to_come() -> None:
    grid = np.linspace(1, 0, 21)
    for target in ("dense", "exact"):
        course = Course(grid, target, lambda n, target=target: universal_planner(n / 20, target)(grid), 10)
        for made in (1, 4, 9):
            for left in (0, 1, 3, 6, 10):
                found = course.ahead(made, course.plan_with(made, left))
                assert found == max(n for n in (course.ahead(made, e) for e in range(1, 21)) if n <= left)
    assert Course(grid, "dense", lambda n: None, 20).plan.evaluations == 20
    assert np.array_equal(Course(grid, "dense", lambda n: None, 20).plan.weights[:, :1], euler(grid).weights)


@pytest.mark.parametrize(
    ("room", "left", "most", "expected"),
    [(5.9, 6, 9, 5), (6.0, 6, 9, 6), (7.2, 6, 9, 6), (7.4, 6, 9, 7), (99, 6, 9, 9), (-2, 6, 9, 0),
     (float("inf"), 6, 9, 9)],
)  # fmt: skip
def test_a_plan_is_shortened_at_once_and_made_longer_where_that_is_sure(
    room: float, left: int, most: int, expected: int
) -> None:
    assert fitting(room, left, most) == expected


class Event:
    """A GPU's: reached when `reached` says so."""

    reached, waited, recorded = 0, 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.number, Event.recorded = Event.recorded, Event.recorded + 1

    def query(self) -> bool:
        return self.number <= Event.reached

    def synchronize(self) -> None:
        Event.waited, Event.reached = Event.waited + 1, self.number

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "asked before it is there"
        return (end.number - self.number) * 500.0


def test_a_gpu_is_asked_by_events_and_not_waited_for(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Watch("cuda")
    watch.mark()
    watch.mark()
    assert watch.done() == []
    Event.reached = 1
    assert watch.done() == [0.5] and Event.waited == 0
    assert watch.done(wait=True) == [0.5, 1.0] and Event.waited == 1


@by_name
def test_without_seconds_nothing_is_timed(folder: Any, timed: Any) -> None:
    pipe, sampled = timed(folder, budget=0.5)
    make(pipe, 6)
    assert type(pipe.scheduler.timesteps) is torch.Tensor and sampled.pace.known == {}
    assert folder == MESH or "check_inputs" not in vars(pipe)

"""The block engine knows a run by its sampler: on the packaged models, and no scope anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import routers
from backbones import registry
from routers.elastic import Elastic
from routers.policy import CallInfo, Decision, FixedPolicy, RunInfo
from routers.trace import FULL, REUSE
from tests.block_kinds import CASES
from tests.routers.packaged import (
    FLUX,
    MESH,
    QWEN,
    StopError,
    contexts,
    image_to_image,
    load,
    make,
    seeded,
    sketch,
    stop_at,
)


class FirstHalf(FixedPolicy):
    """Computes the first half of a run's steps: a run that is taken for longer or shorter spends another
    share, and one that meets another's cache makes another picture.
    """

    def __init__(self) -> None:
        super().__init__(np.full(1, FULL))

    def start(self, run: RunInfo) -> None:
        self.computed = (run.num_steps + 1) // 2

    def decide(self, call: CallInfo, logits: Any) -> Decision:
        self.plan = np.full((1, len(call.costs)), FULL if call.step < self.computed else REUSE, np.int8)
        return super().decide(call, logits)


def check_made(elastic: Elastic, steps: int) -> None:
    """A run of so many steps, of which the first half was computed."""
    trace = elastic.trace
    assert trace is not None and trace.num_steps == steps and trace.notes == []
    last = trace.calls[trace._first :]
    computed = {call.step for call in last if (call.actions == FULL).all()}
    reused = {call.step for call in last if (call.actions == REUSE).all()}
    assert computed == set(range((steps + 1) // 2)) and computed | reused == set(range(steps))


@contextmanager
def attached(folder: Path, model: Any = None, **options: Any) -> Iterator[tuple[Any, Elastic]]:
    """A packaged model with its blocks under control."""
    pipe, spec = load(folder), registry.rows()[folder.name.replace("_", "-")].family.transformer
    elastic = routers.attach(model or pipe, spec=spec, budget=0.6, **options)
    assert isinstance(elastic, Elastic)
    elastic.make_policy = FirstHalf
    try:
        yield pipe, elastic
    finally:
        elastic.detach()


def alone(folder: Path, make_one: Any) -> torch.Tensor:
    """What a freshly attached model makes."""
    with attached(folder) as (pipe, _):
        return make_one(pipe)


@pytest.mark.parametrize("folder", [pytest.param(QWEN, marks=pytest.mark.slow), MESH])
def test_pictures_in_turn_equal_those_of_a_fresh_model(folder: Path) -> None:
    """Of the pipeline, and of its transformer alone: the pipeline that calls it is known all the same."""
    expected = {steps: alone(folder, lambda pipe, steps=steps: make(pipe, steps)) for steps in (6, 4)}
    pipe = load(folder)
    for model in (pipe, pipe.transformer):
        with attached(folder, model) as (_, elastic):
            for steps in (6, 4, 4, 6):
                assert torch.equal(make(pipe, steps), expected[steps])
                check_made(elastic, steps)


@pytest.mark.parametrize(
    ("folder", "how"), [(QWEN, "interrupt"), pytest.param(FLUX, "exception", marks=pytest.mark.slow)]
)
def test_a_run_that_was_stopped_leaves_nothing_behind(folder: Path, how: str) -> None:
    def repaint(pipe: Any) -> torch.Tensor:
        return make(image_to_image(pipe), 20, image=sketch(), strength=0.3)

    expected = alone(folder, repaint)
    with attached(folder) as (pipe, elastic):
        try:
            make(pipe, 12, prompt="a dog", callback_on_step_end=stop_at(5, how))
        except StopError:
            assert how == "exception"
        assert elastic.trace is not None and "6 steps were made where 12" in " ".join(elastic.trace.notes)
        assert torch.equal(repaint(pipe), expected)
        check_made(elastic, 6)


def test_a_mesh_run_that_was_stopped_leaves_nothing_behind() -> None:
    def stop(done: int, _total: int, _latents: torch.Tensor) -> None:
        if done == 4:
            raise StopError

    expected = alone(MESH, lambda pipe: make(pipe, 8))
    with attached(MESH) as (pipe, elastic):
        with pytest.raises(StopError):
            make(pipe, 8, on_step=stop)
        assert torch.equal(make(pipe, 8), expected)
        check_made(elastic, 8)


@pytest.mark.parametrize(("folder", "strength"), [(QWEN, 0.4), (FLUX, 0.6), (QWEN, 1.0)])
def test_image_to_image_counts_the_steps_it_takes(folder: Path, strength: float) -> None:
    with attached(folder) as (pipe, elastic):
        make(image_to_image(pipe), 10, image=sketch(), strength=strength)
        check_made(elastic, round(10 * strength))


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_pipeline_with_a_scheduler_of_its_own(when: str) -> None:
    """It is asked for its scheduler, not the one that was attached."""
    import diffusers

    def other(pipe: Any) -> Any:
        again = image_to_image(pipe)
        again.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        return again

    expected = alone(QWEN, lambda pipe: make(pipe, 9))
    pipe = load(QWEN)
    painter = other(pipe) if when == "before" else None
    with attached(QWEN) as (pipe, elastic):
        painter = painter or other(pipe)
        make(painter, 20, image=sketch(), strength=0.3)
        check_made(elastic, 6)
        assert torch.equal(make(pipe, 9), expected)
        check_made(elastic, 9)


def test_a_scheduler_that_is_replaced_while_attached() -> None:
    import diffusers

    with attached(QWEN) as (pipe, elastic):
        before, expected = pipe.scheduler, make(pipe, 8)
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(before.config)
        try:
            assert torch.equal(make(pipe, 8), expected)
        finally:
            pipe.scheduler = before
        check_made(elastic, 8)


def test_sigmas_of_ones_own() -> None:
    with attached(QWEN) as (pipe, elastic):
        make(pipe, 50, sigmas=[1.0, 0.9, 0.75, 0.5, 0.3, 0.2, 0.1])
        check_made(elastic, 7)


def test_a_scope_may_hold_two_pictures_and_be_told_other_steps() -> None:
    with attached(QWEN) as (pipe, elastic):
        with elastic.scope(num_steps=20) as trace:
            make(pipe, 10)
            make(pipe, 10)
        assert trace.num_calls == 40
        assert {call.step for call in trace.calls if (call.actions == FULL).all()} == set(range(5))
        assert trace.notes == ["20 steps were told, the sampler makes 10: planned for those"]


# -- runs that take turns --------------------------------------------------------------------------


def test_runs_that_take_turns_keep_their_caches_apart() -> None:
    """Two pipelines, each with its scheduler: one picture is made inside of another's callback."""
    import diffusers

    def dog(pipe: Any) -> torch.Tensor:
        return make(pipe, 6, prompt="a dog", generator=seeded(3))

    expected = alone(QWEN, lambda pipe: make(pipe, 9)), alone(QWEN, dog)
    made: list[torch.Tensor] = []
    with attached(QWEN) as (pipe, elastic):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        second = type(pipe)(**{**pipe.components, "scheduler": scheduler})
        second.set_progress_bar_config(disable=True)

        def between(_pipe: Any, index: int, _time: Any, _tensors: Any) -> dict[str, Any]:
            if index == 4:
                made.append(dog(second))
            return {}

        first = make(pipe, 9, callback_on_step_end=between)
        assert torch.equal(first, expected[0]) and torch.equal(made[0], expected[1])
        with pytest.raises(RuntimeError, match="take turns in one scope"), elastic.scope():
            make(pipe, 9, callback_on_step_end=between)


def test_two_pipelines_with_one_scheduler_cannot_take_turns() -> None:
    with attached(QWEN) as (pipe, _):
        second = type(pipe)(**pipe.components)
        second.set_progress_bar_config(disable=True)

        def between(_pipe: Any, index: int, _time: Any, _tensors: Any) -> dict[str, Any]:
            if index == 4:
                make(second, 6)
            return {}

        with pytest.raises(RuntimeError, match="give each a scheduler of its own"):
            make(pipe, 9, callback_on_step_end=between)


# -- without a pipeline ----------------------------------------------------------------------------


@pytest.mark.parametrize("scoped", [False, True])
def test_two_unnamed_calls_of_a_step_are_two_branches(scoped: bool) -> None:
    """Also where later times are equal, as rounded ones may be; prompts may be of unequal length."""
    case = next(case for case in CASES if case.name == "flux")
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    elastic.make_policy = lambda: FixedPolicy(np.full(len(elastic.blocks), FULL))
    with elastic.scope() if scoped else nullcontext():
        for t in (1.0, 0.9, 0.9, 0.8):
            case.run(model, t=t)
            case.run(model, t=t)
    assert elastic.trace is not None
    assert [call.branch for call in elastic.trace.calls] == ["main", "main 2"] * 4
    assert [call.step for call in elastic.trace.calls] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("made", "noted"), [(9, False), (6, True), (12, True)])
def test_a_loop_of_ones_own_keeps_the_steps_it_was_told(made: int, noted: bool) -> None:
    with attached(MESH, load(MESH).transformer, num_steps=9) as (pipe, elastic), torch.no_grad():
        for step in range(made):
            time = torch.full((2,), step / made)
            pipe.transformer(pipe.noise(2, seeded()), time, contexts(pipe, rows=2))
        trace = elastic.trace
        assert trace is not None and trace.num_calls == made and trace.num_steps == 9
        assert any("where 9 were planned" in note for note in trace.notes) == noted
        if not noted:
            check_made(elastic, 9)


def test_a_loop_with_the_attached_pipelines_scheduler() -> None:
    """No pipeline calls, but the one that was attached has set its timesteps."""
    with attached(MESH, num_steps=30) as (pipe, elastic), torch.no_grad():
        pipe.scheduler.set_timesteps(8)
        for time in pipe.scheduler.timesteps:
            pipe.transformer(pipe.noise(1, seeded()), time.expand(1) / 1000, contexts(pipe))
        check_made(elastic, 8)

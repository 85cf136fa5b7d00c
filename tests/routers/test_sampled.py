"""`routers.attach` on a pipeline: its sampler follows a plan, budgets are met, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, hooks

import routers
from backbones.hunyuan3d.schedulers import FlowMatchEulerScheduler
from backbones.solvers import solver
from routers.planned.sampled import Sampled
from routers.planned.spent import evaluations_for
from routers.planned.timeplan import euler, resampled
from tests.routers.packaged import (
    ALL,
    FLUX,
    MESH,
    QWEN,
    StopError,
    image_to_image,
    load,
    make,
    sketch,
    stop_at,
)

SLOW_FLUX = pytest.param(FLUX, "after", marks=pytest.mark.slow)
by_name = pytest.mark.parametrize("folder", ALL, ids=lambda folder: folder.name)


@contextmanager
def attached(folder: Path, budget: float = 0.6, **options: Any) -> Iterator[tuple[Any, Sampled]]:
    """The README's line on a packaged model, with nothing measured."""
    pipe = load(folder)
    sampled = routers.attach(pipe, budget=budget, **options)
    assert isinstance(sampled, Sampled)
    try:
        yield pipe, sampled
    finally:
        sampled.detach()


def alone(folder: Path, make_one: Any, **options: Any) -> torch.Tensor:
    """What a freshly attached pipeline makes."""
    with attached(folder, **options) as (pipe, _):
        return make_one(pipe)


class Calls:
    """Counts what a transformer is really asked."""

    def __init__(self, pipe: Any) -> None:
        self.made, self.branches = 0, 2 if "Qwen" in type(pipe).__name__ else 1
        self.handle = pipe.transformer.register_forward_pre_hook(self.count)

    def count(self, *_: object) -> None:
        self.made += 1

    def evaluations(self) -> float:
        """Since the last time."""
        made, self.made = self.made, 0
        return made / self.branches


@contextmanager
def counted(pipe: Any) -> Iterator[Calls]:
    calls = Calls(pipe)
    try:
        yield calls
    finally:
        calls.handle.remove()


def check_spent(sampled: Sampled, calls: Calls, budget: float, steps: int) -> None:
    """What the trace says is what the transformer was asked, and what the budget buys."""
    trace, bought = sampled.trace, evaluations_for(budget, steps)
    assert trace is not None and trace.steps == trace.of == steps
    assert calls.evaluations() == trace.made == trace.planned == bought == sampled.evaluations(steps, budget)
    assert trace.spent == [bought / steps] and trace.requested == budget
    assert len(trace.notes) == (abs(bought / steps - budget) > 0.005)


# -- budgets ------------------------------------------------------------------------------------

EVERY = [pytest.param(n, marks=() if n in (4, 9) else pytest.mark.slow) for n in range(4, 51)]


@pytest.mark.parametrize("steps", EVERY)
@by_name
def test_any_number_of_steps_meets_the_budget(folder: Path, steps: int) -> None:
    with attached(folder) as (pipe, sampled), counted(pipe) as calls:
        for target in ("dense", "exact") if steps == 9 else ("dense",):
            with sampled.scope(target=target):
                make(pipe, steps)
            check_spent(sampled, calls, 0.6, steps)


@by_name
def test_all_of_the_budget_is_the_pipelines_own_run_bit_for_bit(folder: Path) -> None:
    dense = make(load(folder), 5)
    with attached(folder, 1.0) as (pipe, sampled):
        assert torch.equal(make(pipe, 5), dense)
        assert sampled.trace is not None and (sampled.trace.share, sampled.trace.notes) == (1.0, [])
        with sampled.scope(budget=0.6):
            assert not torch.equal(make(pipe, 5), dense)
    assert torch.equal(make(load(folder), 5), dense)


def test_a_model_is_attached_at_all_of_its_budget_by_default() -> None:
    sampled = routers.attach(load(QWEN))
    assert isinstance(sampled, Sampled) and (sampled.budget, sampled.target) == (1.0, "dense")
    sampled.detach()


@pytest.mark.parametrize("budget", [0.0, 1.5, -0.1, float("nan")])
@pytest.mark.parametrize("scoped", [False, True])
def test_a_budget_that_does_not_exist_is_refused(budget: float, scoped: bool) -> None:
    pipe = load(QWEN)
    own = pipe.scheduler
    message = r"give one in \(0, 1\]"
    if scoped:
        with (
            attached(QWEN) as (_, sampled),
            pytest.raises(ValueError, match=message),
            sampled.scope(budget=budget),
        ):
            pass
    else:
        with pytest.raises(ValueError, match=message):
            routers.attach(pipe, budget=budget)
    assert pipe.scheduler is own


def test_a_target_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^target 'sharp' is not one of dense, exact$"):
        routers.attach(load(QWEN), budget=0.5, target="sharp")
    with (
        attached(QWEN) as (_, sampled),
        pytest.raises(ValueError, match="'sharp'"),
        sampled.scope(target="sharp"),
    ):
        pass


def test_the_target_is_where_the_picture_ends_up() -> None:
    pipe = load(QWEN)
    dense = make(pipe, 20)
    with solver(pipe, "ab2"):
        exact = make(pipe, 40)
    with attached(QWEN, 0.5) as (pipe, sampled):
        ends = {}
        for target in ("dense", "exact"):
            with sampled.scope(target=target):
                ends[target] = make(pipe, 20)

    def far(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).square().mean())

    assert far(ends["dense"], dense) < far(ends["exact"], dense)
    assert far(ends["exact"], exact) < far(ends["dense"], exact)


# -- whatever the pipeline is asked -------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.25, 0.6, 1.0])
@pytest.mark.parametrize(("folder", "when"), [(QWEN, "before"), (QWEN, "after"), SLOW_FLUX])
def test_strength_means_the_same_with_a_plan(folder: Path, when: str, strength: float) -> None:
    """Of a pipeline made before the attach, and attached itself; and of one made after."""
    pipe = load(folder)
    painter, asked = image_to_image(pipe), {"image": sketch(), "strength": strength}
    own, dense = painter.scheduler, make(painter, 8, **asked)
    sampled = routers.attach(painter if when == "before" else pipe, budget=0.5)
    try:
        painter = painter if when == "before" else image_to_image(pipe)
        with counted(pipe) as calls:
            cheap = make(painter, 8, **asked)
            check_spent(sampled, calls, 0.5, round(8 * strength))
            with sampled.scope(budget=1.0):
                assert torch.equal(make(painter, 8, **asked), dense)
    finally:
        sampled.detach()
    assert not torch.equal(cheap, dense) and "get_timesteps" not in vars(painter)
    assert torch.equal(make(painter, 8, **asked), dense), "also where it still has the plan's scheduler"
    assert when == "after" or painter.scheduler is own


def test_sigmas_of_ones_own() -> None:
    sigmas = [1.0, 0.9, 0.75, 0.5, 0.3, 0.2, 0.1]
    dense = make(load(QWEN), 50, sigmas=sigmas)
    with attached(QWEN, 0.58) as (pipe, sampled), counted(pipe) as calls:
        make(pipe, 50, sigmas=sigmas)
        check_spent(sampled, calls, 0.58, 7)
        with sampled.scope(budget=1.0):
            assert torch.equal(make(pipe, 50, sigmas=sigmas), dense)


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_pipeline_that_shares_the_scheduler(when: str) -> None:
    """One made before the attach keeps the scheduler it has; one made after follows the plan."""
    pipe = load(QWEN)
    dense, own = make(pipe, 6), pipe.scheduler
    second = type(pipe)(**pipe.components)
    with attached(QWEN, 0.5) as (pipe, sampled), counted(pipe) as calls:
        cheap = make(pipe, 6)
        calls.evaluations()
        if when == "after":
            second = type(pipe)(**pipe.components)
        second.set_progress_bar_config(disable=True)
        assert torch.equal(make(second, 6), dense if when == "before" else cheap)
        assert calls.evaluations() == (6 if when == "before" else 3)
    assert torch.equal(make(second, 6), dense)
    assert sampled.trace is not None and sampled.trace.made == 3, "what comes after is not counted"
    again = routers.attach(second, budget=0.5)
    assert torch.equal(make(second, 6), cheap)
    again.detach()
    assert pipe.scheduler is own


def test_a_solver_that_is_asked_for_steps_along_the_plan() -> None:
    """As `edit generate --solver` does: its own weights at the plan's times, every evaluation counted."""
    with attached(QWEN, 0.5) as (pipe, sampled), counted(pipe) as calls:
        with (
            sampled.scope(planner_for=lambda *_: lambda grid: euler(resampled(grid, 4))),
            solver(pipe, "ab2"),
        ):
            made = make(pipe, 8)
        check_spent(sampled, calls, 0.5, 8)
        with sampled.scope(planner_for=lambda *_: lambda grid: euler(resampled(grid, 4))):
            assert not torch.equal(make(pipe, 8), made)


# -- nothing is left behind ---------------------------------------------------------------------


@pytest.mark.parametrize("folder", [QWEN, MESH], ids=lambda folder: folder.name)
def test_pictures_in_turn_equal_those_of_a_fresh_attach(folder: Path) -> None:
    expected = {steps: alone(folder, lambda pipe, steps=steps: make(pipe, steps)) for steps in (7, 4)}
    with attached(folder) as (pipe, sampled):
        for steps in (7, 4, 4, 7):
            with sampled.scope() as trace:
                assert torch.equal(make(pipe, steps), expected[steps])
            assert trace is sampled.trace and trace.steps == steps
            assert torch.equal(make(pipe, steps), expected[steps]), "a scope changes nothing"
            assert sampled.trace is not trace and sampled.trace == trace


@pytest.mark.parametrize("how", ["interrupt", "exception"])
@pytest.mark.parametrize("folder", [QWEN, pytest.param(FLUX, marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_leaves_nothing_behind(folder: Path, how: str) -> None:
    def repaint(pipe: Any) -> torch.Tensor:
        return make(image_to_image(pipe), 10, image=sketch(), strength=0.5)

    expected = alone(folder, repaint), alone(folder, lambda pipe: make(pipe, 6))
    with attached(folder) as (pipe, sampled), counted(pipe) as calls:
        try:
            make(pipe, 12, prompt="a dog", callback_on_step_end=stop_at(3, how))
        except StopError:
            assert how == "exception"
        trace = sampled.trace
        assert trace is not None and (trace.made, trace.planned) == (4, 7), "what was made is what is counted"
        assert calls.evaluations() == 4 and trace.share == 4 / 12
        assert torch.equal(repaint(pipe), expected[0])
        check_spent(sampled, calls, 0.6, 5)
        assert torch.equal(make(pipe, 6), expected[1])


def test_a_mesh_run_that_was_stopped_leaves_nothing_behind() -> None:
    def stop(done: int, _total: int, _latents: torch.Tensor) -> None:
        if done == 2:
            raise StopError

    expected = alone(MESH, lambda pipe: make(pipe, 6))
    with attached(MESH) as (pipe, sampled), counted(pipe) as calls:
        with pytest.raises(StopError):
            make(pipe, 8, on_step=stop)
        calls.evaluations()
        assert torch.equal(make(pipe, 6), expected)
        check_spent(sampled, calls, 0.6, 6)


def test_an_exception_closes_the_scope() -> None:
    with attached(QWEN) as (pipe, sampled):
        with pytest.raises(StopError), sampled.scope(budget=0.9):
            make(pipe, 4, callback_on_step_end=stop_at(0, "exception"))
        assert sampled.trace is not None and sampled.trace.requested == 0.9
        make(pipe, 4)
        assert sampled.trace.requested == 0.6


@by_name
def test_detach_gives_the_scheduler_back(folder: Path) -> None:
    pipe = load(folder)
    own, dense, clean = pipe.scheduler, make(pipe, 4), set(vars(pipe.transformer))
    assert isinstance(own, FlowMatchEulerScheduler if folder == MESH else FlowMatchEulerDiscreteScheduler)
    sampled = routers.attach(pipe, budget=0.5)
    assert pipe.scheduler is sampled.scheduler is not own
    assert set(vars(pipe.transformer)) == clean, "the transformer is left alone"
    make(pipe, 4)
    sampled.detach()
    sampled.detach()
    assert pipe.scheduler is own and set(vars(pipe.transformer)) == clean
    assert torch.equal(make(pipe, 4), dense)


def test_a_scheduler_that_was_put_there_meanwhile_stays() -> None:
    pipe = load(QWEN)
    own = pipe.scheduler
    other = FlowMatchEulerDiscreteScheduler.from_config(own.config)
    sampled = routers.attach(pipe, budget=0.5)
    pipe.scheduler = other
    try:
        sampled.detach()
        assert pipe.scheduler is other
    finally:
        pipe.scheduler = own


# -- what is refused, and what is not -----------------------------------------------------------


def test_scopes_do_not_nest() -> None:
    with attached(QWEN) as (pipe, sampled), sampled.scope(budget=0.5):
        with pytest.raises(RuntimeError, match="scopes do not nest"), sampled.scope():
            pass
        make(pipe, 4)
        assert sampled.trace is not None and sampled.trace.made == 2, "the open scope is unharmed"


@by_name
def test_a_second_attach_is_refused(folder: Path) -> None:
    from backbones import registry

    spec = registry.rows()[folder.name.replace("_", "-")].family.transformer
    with attached(folder) as (pipe, sampled):
        for options in ({"budget": 0.5}, {}, {"spec": spec}):
            with pytest.raises(ValueError, match=r"^this pipeline already follows a plan: detach it first$"):
                routers.attach(pipe, **options)
        assert pipe.scheduler is sampled.scheduler
    elastic = routers.attach(load(folder).transformer, spec=spec)
    try:
        with pytest.raises(ValueError, match="already attached to this transformer: detach them first"):
            routers.attach(load(folder), budget=0.5)
    finally:
        elastic.detach()
    routers.attach(load(folder), budget=0.5).detach()


CACHES = {
    "its own": (
        lambda model: model.enable_cache(hooks.FirstBlockCacheConfig(threshold=0.2)),
        "FirstBlockCacheConfig",
    ),
    "by a function": (
        lambda model: hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=0.2)),
        "fbc_.*_hook",
    ),
    "another library's": (lambda model: setattr(model, "_is_cached", True), "another library's cache"),
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_is_refused_before_and_after_attach(kind: str) -> None:
    """Beside it no count of evaluations would say what was spent."""
    enable, message = CACHES[kind]
    pipe = load.__wrapped__(FLUX)
    sampled = routers.attach(pipe, budget=0.5)
    make(pipe, 4)
    enable(pipe.transformer)
    with pytest.raises(ValueError, match=message) as error:
        make(pipe, 4)
    assert "\n" not in str(error.value)
    sampled.detach()
    own = pipe.scheduler
    with pytest.raises(ValueError, match=message):
        routers.attach(pipe, budget=0.5)
    assert pipe.scheduler is own


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_transformer_works(how: str) -> None:
    pipe = load.__wrapped__(FLUX)
    expected = alone(FLUX, lambda pipe: make(pipe, 4), budget=0.5)
    if how == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    sampled = routers.attach(pipe, budget=0.5)
    assert torch.allclose(make(pipe, 4), expected, atol=1e-5)
    assert sampled.trace is not None and sampled.trace.made == 2

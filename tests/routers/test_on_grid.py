"""A budget where a sampler's steps have to stay: bare transformers, and other solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, hooks
from torch import Tensor, nn

import routers
from routers.planned.follow import follow
from routers.planned.grid import OnGrid
from routers.planned.sampled import Sampled
from routers.planned.timeplan import TimePlan, adams_bashforth, euler, moving
from routers.planned.universal import grid_steps, universal_planner, usual_warp
from tests.block_kinds import CASES, Case
from tests.routers.packaged import MESH, QWEN, contexts, image_to_image, load, make, seeded, sketch

STEPS = 8
GRID = np.linspace(1, 0, STEPS + 1)


@pytest.fixture
def case() -> Case:
    return next(case for case in CASES if case.name == "flux")


@contextmanager
def attached(model: Any, budget: float = 0.5, **options: Any) -> Iterator[OnGrid]:
    on_grid = routers.attach(model, budget=budget, **options)
    assert isinstance(on_grid, OnGrid)
    try:
        yield on_grid
    finally:
        on_grid.detach()


@contextmanager
def own_calls(model: nn.Module) -> Iterator[list[float]]:
    """Counts the evaluations that are really made: by what runs inside the transformer's first block."""
    calls: list[float] = []
    block = model.transformer_blocks[0] if hasattr(model, "transformer_blocks") else model.double_blocks[0]
    handle = block.register_forward_pre_hook(lambda *_: calls.append(1.0))
    try:
        yield calls
    finally:
        handle.remove()


def velocity(case: Case, model: nn.Module, seed: int = 0) -> Callable[[Tensor, float], Tensor]:
    """The model as a function of the state and the time; seed: of the prompt."""

    def at(x: Tensor, s: float) -> Tensor:
        inputs = {**case.inputs(1, s, seed), "hidden_states": x}
        with torch.no_grad():
            return model(**inputs)[0]

    return at


def start(case: Case) -> Tensor:
    return case.inputs(1, 1.0, 0)["hidden_states"]


def loop(x: Tensor, *velocities: Callable[[Tensor, float], Tensor], grid: np.ndarray = GRID) -> Tensor:
    """A sampler of one's own: Euler's steps along the first output, guided by the second if there is one."""
    for s, t in pairwise(grid.tolist()):
        v, *others = (at(x, s) for at in velocities)
        for other in others:
            v = 3 * v - 2 * other
        x = x + (t - s) * v
    return x


# -- a loop of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.25, 0.5, 0.8, 1.0])
def test_an_euler_loop_ends_where_the_plan_in_time_does(case: Case, budget: float) -> None:
    """The steps left out add up to the plan's longer steps."""
    model = case.transformer()
    planned = follow(
        velocity(case, model), start(case), universal_planner(budget, "dense")(GRID) or euler(GRID)
    )
    dense = loop(start(case), velocity(case, model))
    with attached(model, budget, num_steps=STEPS) as on_grid, own_calls(model) as calls:
        made = loop(start(case), velocity(case, model))
        trace = on_grid.trace
    assert torch.allclose(made, planned, atol=2e-5)
    assert torch.equal(made, dense) == (budget == 1.0)
    assert trace is not None and trace.spent == [len(calls) / STEPS] == [int(budget * STEPS) / STEPS]
    assert (trace.of, trace.made, trace.steps) == (STEPS, len(calls), STEPS) and trace.target == "dense"


@pytest.mark.parametrize("scoped", [False, True])
def test_two_unnamed_branches_have_a_past_each(case: Case, scoped: bool) -> None:
    model = case.transformer()
    cond, uncond = velocity(case, model, 1), velocity(case, model, 2)
    guided = lambda x, s: 3 * cond(x, s) - 2 * uncond(x, s)  # noqa: E731
    planned = follow(guided, start(case), universal_planner(0.5, "dense")(GRID))
    with attached(model, num_steps=STEPS) as on_grid, own_calls(model) as calls:
        with on_grid.scope() if scoped else nullcontext():
            made = loop(start(case), cond, uncond)
        assert on_grid.trace is not None and (on_grid.trace.made, on_grid.trace.of) == (STEPS, 2 * STEPS)
    assert torch.allclose(made, planned, atol=5e-5) and len(calls) == STEPS


def test_branches_may_be_named_and_come_in_any_order() -> None:
    """As pipelines name them; a named branch is known whatever was called before it."""
    case = next(case for case in CASES if case.name == "qwen")
    model = case.transformer()
    inputs = {name: case.inputs(1, 1.0, seed) for name, seed in (("cond", 1), ("uncond", 2))}

    def call(name: str, s: float) -> Tensor:
        with torch.no_grad(), model.cache_context(name):
            return model(**{**inputs[name], "timestep": torch.tensor([s])})[0]

    computed = set(grid_steps(4, 2, *usual_warp("dense", 2, 4)))
    with attached(model, num_steps=4):
        for step, s in enumerate((1.0, 0.8, 0.6, 0.4)):
            names = ("cond", "uncond") if step % 2 else ("uncond", "cond")
            outputs = {name: call(name, s) for name in names}
            if step in computed:
                last = outputs
            else:
                assert not torch.equal(outputs["cond"], outputs["uncond"])
                if step == 1:  # one output is all there is
                    assert all(torch.equal(outputs[name], last[name]) for name in names)


def test_steps_left_out_continue_the_last_two_outputs(case: Case) -> None:
    model, budget = case.transformer(), 0.75
    computed = grid_steps(4, 3, *usual_warp("dense", 3, 4))
    left_out = next(step for step in range(4) if step not in computed)
    times, x = (0.9, 0.7, 0.4, 0.1), start(case)
    dense = [velocity(case, model)(x, s) for s in times]
    with attached(model, budget, num_steps=4):
        made = [velocity(case, model)(x, s) for s in times]
    assert left_out > 1 and all(torch.equal(made[step], dense[step]) for step in computed)
    a, b = dense[left_out - 2], dense[left_out - 1]
    share = (times[left_out] - times[left_out - 1]) / (times[left_out - 1] - times[left_out - 2])
    assert torch.allclose(made[left_out], b + share * (b - a), atol=1e-5)


def test_half_precision_stays_half_precision_and_what_is_no_tensor_is_handed_on() -> None:
    case = next(case for case in CASES if case.name == "qwen")
    model = case.transformer().to(torch.bfloat16)

    def call(s: float) -> Any:
        inputs = {n: v.bfloat16() if isinstance(v, Tensor) else v for n, v in case.inputs(1, s, 0).items()}
        with torch.no_grad():
            return model(**{**inputs, "return_dict": True})

    with attached(model, num_steps=STEPS):
        kinds = {(type(out), out.sample.dtype) for out in map(call, GRID[:-1].tolist())}
    assert len(kinds) == 1 and kinds.pop()[1] == torch.bfloat16


def test_runs_follow_one_another_and_a_scope_may_be_of_other_steps(case: Case) -> None:
    """Without a scope a run ends where time turns back."""
    model = case.transformer()
    with attached(model, num_steps=STEPS) as on_grid:
        first = loop(start(case), velocity(case, model))
        assert torch.equal(loop(start(case), velocity(case, model)), first)
        with on_grid.scope(budget=0.75, num_steps=4, samples=2) as trace:
            loop(start(case), velocity(case, model), grid=np.linspace(1, 0, 5))
        assert trace.spent == [0.75, 0.75] and trace is on_grid.trace
        assert "budget asked 0.75, spent 0.750 of dense FLOPs: 3 evaluations of 4" in on_grid.summary()
        assert torch.equal(loop(start(case), velocity(case, model)), first)


def test_a_loop_that_breaks_off_leaves_nothing_behind(case: Case) -> None:
    model = case.transformer()
    with attached(model, num_steps=STEPS) as on_grid:
        expected = loop(start(case), velocity(case, model))
        with suppress(ZeroDivisionError), on_grid.scope():
            loop(2 * start(case), velocity(case, model), grid=GRID[:4])
            raise ZeroDivisionError
        assert torch.equal(loop(start(case), velocity(case, model)), expected)


# -- pipelines ----------------------------------------------------------------------------------


class Steady:
    """A scheduler of somebody's own: neither diffusers' class nor a relative of it."""

    order = 1

    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def set_timesteps(self, *args: Any, sigmas: Any = None, mu: Any = None, **kwargs: Any) -> None:
        self.own.set_timesteps(*args, sigmas=sigmas, mu=mu, **kwargs)


def steady(pipe: Any) -> Any:
    return Steady(pipe.scheduler)


def test_on_a_transformer_alone_a_pipelines_picture_is_that_of_the_plan_in_time() -> None:
    """Its sampler is asked for its steps: nothing need be told, whatever the strength."""
    pipe = load(QWEN)
    painter, asked = image_to_image(pipe), {"image": sketch(), "strength": 0.6, "true_cfg_scale": 1.0}
    sampled = routers.attach(pipe, budget=0.5)
    assert isinstance(sampled, Sampled)
    expected = make(pipe, STEPS, true_cfg_scale=1.0)
    repainted = make(image_to_image(pipe), 10, **asked)
    sampled.detach()
    with attached(pipe.transformer, num_steps=50) as on_grid:
        made = make(pipe, STEPS, true_cfg_scale=1.0)
        assert on_grid.trace is not None and on_grid.trace.spent == [0.5]
        assert torch.allclose(made, expected, atol=1e-4)
        assert torch.allclose(make(painter, 10, **asked), repainted, atol=1e-4)
        assert on_grid.trace.steps == 6 and on_grid.trace.spent == [0.5]


def noisy(pipe: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)


@pytest.mark.parametrize("other", [steady, noisy])
def test_another_solver_keeps_its_steps(other: Callable[[Any], Any]) -> None:
    pipe = load(QWEN)
    own, pipe.scheduler = pipe.scheduler, other(pipe)
    try:
        torch.manual_seed(0)
        dense = make(pipe, STEPS)
        replaced = pipe.scheduler
        with attached(pipe) as on_grid, own_calls(pipe.transformer) as calls:
            assert pipe.scheduler is replaced
            torch.manual_seed(0)
            cheap = make(pipe, STEPS)
            assert on_grid.trace is not None and on_grid.trace.spent == [0.5]
            assert len(calls) == on_grid.trace.made == STEPS, "of two branches"
            with on_grid.scope(budget=1.0):
                torch.manual_seed(0)
                assert torch.equal(make(pipe, STEPS), dense)
        assert not torch.equal(cheap, dense) and torch.isfinite(cheap).all()
        signal = dense.square().mean() / (cheap - dense).square().mean()
        assert other is noisy or signal > 5, "near to the dense picture"
    finally:
        pipe.scheduler = own


def test_the_mesh_models_transformer_alone() -> None:
    """Both branches share its calls, and the last step of its sampler has size zero."""
    pipe, computed = load(MESH), grid_steps(STEPS, 4, *usual_warp("dense", 4, STEPS))

    def planner(grid: np.ndarray) -> TimePlan:
        return adams_bashforth(moving(grid)[[*computed, -1]], 2, moving(grid))

    sampled = routers.attach(pipe, budget=0.5)
    assert isinstance(sampled, Sampled)
    with sampled.scope(planner_for=lambda *_: planner):
        planned = make(pipe, STEPS)
    sampled.detach()
    with attached(pipe.transformer) as on_grid, own_calls(pipe.transformer) as calls:
        assert torch.allclose(make(pipe, STEPS), planned, atol=1e-4)
        assert on_grid.trace is not None and on_grid.trace.spent == [0.5] and len(calls) == 4
        with torch.no_grad(), on_grid.scope(num_steps=2):
            for time in (0.0, 0.5):
                pipe.transformer(pipe.noise(1, seeded()), torch.tensor([time]), contexts(pipe))
        assert on_grid.trace.made == 1


# -- attach and detach --------------------------------------------------------------------------


def test_detach_leaves_the_transformer_as_it_was(case: Case) -> None:
    model = case.transformer()
    clean, dense = set(vars(model)), case.run(model)
    on_grid = routers.attach(model, budget=0.5, num_steps=2)
    for t in (0.9, 0.5):
        case.run(model, t=t)
    on_grid.detach()
    on_grid.detach()
    assert set(vars(model)) == clean and torch.equal(case.run(model), dense)


def test_what_is_refused(case: Case) -> None:
    model = case.transformer()
    for options, message in (
        ({"budget": 0.0}, r"give one in \(0, 1\]"),
        ({"budget": 1.5}, r"give one in \(0, 1\]"),
        ({"budget": 0.5, "target": "sharp"}, "'sharp' is not one of dense, exact"),
    ):
        with pytest.raises(ValueError, match=message):
            routers.attach(model, **options)
    with attached(model) as on_grid:
        for again in (
            lambda: routers.attach(model, budget=0.5),
            lambda: routers.attach(model, spec=case.spec),
        ):
            with pytest.raises(ValueError, match="already attached to this transformer: detach them first"):
                again()
        with pytest.raises(ValueError, match=r"give one in \(0, 1\]"), on_grid.scope(budget=2.0):
            pass
        with on_grid.scope(), pytest.raises(RuntimeError, match="do not nest"), on_grid.scope():
            pass
    with pytest.raises(ValueError, match=r"^Linear takes none of timestep, .*: its steps look all alike$"):
        routers.attach(nn.Linear(2, 2), budget=0.5)


def test_a_cache_is_refused_before_and_after_attach(case: Case) -> None:
    model, config = case.transformer(), hooks.FirstBlockCacheConfig(threshold=0.2)
    on_grid = routers.attach(model, budget=0.5)
    model.enable_cache(config)
    with pytest.raises(ValueError, match=r"FirstBlockCacheConfig.*disable_cache\(\)"):
        case.run(model)
    on_grid.detach()
    with pytest.raises(ValueError, match=r"FirstBlockCacheConfig.*disable_cache\(\)"):
        routers.attach(model, budget=0.5)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_transformer_compiled_as_a_whole_is_refused_in_one_line(case: Case, wrapped: bool) -> None:
    model = case.transformer()
    if wrapped:
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.raises(ValueError, match="compile its blocks"):
        routers.attach(model, budget=0.5)

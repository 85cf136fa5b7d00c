"""A run is known by its sampler: `routers.attach` on the packaged models, and no scope anywhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import backbones
import routers
from routers.elastic import Elastic
from routers.policy import FixedPolicy
from routers.trace import FULL
from tests.block_kinds import CASES

TINY = Path(backbones.__file__).parent / "tiny"
QWEN, FLUX, MESH = (TINY / name for name in ("qwen_image_tiny", "flux_tiny", "hunyuan3d_tiny"))
SIZE = {"width": 64, "height": 64, "output_type": "latent"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def load(folder: Path) -> Any:
    """A packaged model's pipeline, shared by the tests: what one run leaves behind meets the next."""
    if folder == MESH:
        from backbones.hunyuan3d.checkpoints import load_pipeline

        return load_pipeline(folder, dtype=torch.float32, device=torch.device("cpu"))
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(pipe: Any, steps: int = 8, **changes: Any) -> torch.Tensor:
    """Final latents of a picture or a mesh, by the pipeline's own call."""
    if hasattr(pipe, "vae") and hasattr(pipe, "conditioner"):
        width = pipe.transformer.cond_in.in_features
        contexts = {"main": torch.randn(1, 20, width, generator=seeded(1))}
        return pipe.denoise(contexts, pipe.noise(1, seeded()), steps, **changes)
    if "Qwen" in type(pipe).__name__:
        changes = {"negative_prompt": " ", **changes}
    arguments = {"prompt": "a cat", "num_inference_steps": steps, "generator": seeded(), **SIZE, **changes}
    return pipe(**arguments).images


def sketch() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def image_to_image(pipe: Any, **components: Any) -> Any:
    import diffusers

    kind = getattr(diffusers, type(pipe).__name__.replace("Pipeline", "Img2ImgPipeline"))
    again = kind.from_pipe(pipe, **components)
    again.set_progress_bar_config(disable=True)
    return again


def check_spent(elastic: Elastic, budget: float, steps: int) -> None:
    trace = elastic.trace
    assert trace is not None and trace.num_steps == steps
    assert 1 + max(call.step for call in trace.calls) == steps and trace.notes == []
    # what a partial step can buy: half of one block, in one of the steps
    grain = 0.5 / len(elastic.blocks) / steps
    assert trace.spent == pytest.approx([budget] * len(trace.spent), abs=max(0.01, grain))


@contextmanager
def attached(folder: Path, budget: float = 0.6, **options: Any) -> Iterator[tuple[Any, Elastic]]:
    """The README's line, on a packaged model."""
    pipe = load(folder)
    elastic = routers.attach(pipe, folder / "routers", budget=budget, **options)
    try:
        yield pipe, elastic
    finally:
        elastic.detach()


def alone(folder: Path, make_one: Any, budget: float = 0.6) -> torch.Tensor:
    """What a freshly attached model makes."""
    with attached(folder, budget) as (pipe, _):
        return make_one(pipe)


class StopError(Exception):
    pass


def stop_at(step: int, how: str) -> Any:
    """A callback that ends a diffusers run after a step."""

    def callback(pipe: Any, index: int, _time: Any, _tensors: Any) -> dict[str, Any]:
        if index == step and how == "exception":
            raise StopError
        pipe._interrupt = index >= step
        return {}

    return callback


EVERY = [pytest.param(n, marks=() if n in (4, 9) else pytest.mark.slow) for n in range(4, 51)]


@pytest.mark.parametrize("steps", EVERY)
@pytest.mark.parametrize("folder", [QWEN, FLUX, MESH], ids=lambda folder: folder.name)
def test_any_number_of_steps_meets_the_budget(folder: Path, steps: int) -> None:
    with attached(folder) as (pipe, elastic):
        make(pipe, steps)
        check_spent(elastic, 0.6, steps)


@pytest.mark.parametrize("folder", [QWEN, FLUX, MESH], ids=lambda folder: folder.name)
def test_pictures_in_turn_equal_those_of_a_fresh_model(folder: Path) -> None:
    """Of the pipeline, and of its transformer alone: the pipeline that calls it is known all the same."""
    expected = {steps: alone(folder, lambda pipe, steps=steps: make(pipe, steps)) for steps in (6, 5)}
    pipe = load(folder)
    for model in (pipe, pipe.transformer):
        elastic = routers.attach(model, folder / "routers", budget=0.6)
        try:
            for steps in (6, 5, 5, 6):
                assert torch.equal(make(pipe, steps), expected[steps])
                check_spent(elastic, 0.6, steps)
        finally:
            elastic.detach()


@pytest.mark.parametrize("how", ["interrupt", pytest.param("exception", marks=pytest.mark.slow)])
@pytest.mark.parametrize("folder", [QWEN, FLUX], ids=lambda folder: folder.name)
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
        check_spent(elastic, 0.6, 6)


def test_a_mesh_run_that_was_stopped_leaves_nothing_behind() -> None:
    def stop(done: int, _total: int, _latents: torch.Tensor) -> None:
        if done == 4:
            raise StopError

    expected = alone(MESH, lambda pipe: make(pipe, 8))
    with attached(MESH) as (pipe, elastic):
        with pytest.raises(StopError):
            make(pipe, 8, on_step=stop)
        assert torch.equal(make(pipe, 8), expected)
        check_spent(elastic, 0.6, 8)


@pytest.mark.parametrize("folder", [QWEN, FLUX], ids=lambda folder: folder.name)
@pytest.mark.parametrize(
    "strength", [0.3, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.6, 1.0))]
)
def test_image_to_image_counts_the_steps_it_takes(folder: Path, strength: float) -> None:
    with attached(folder) as (pipe, elastic):
        make(image_to_image(pipe), 20, image=sketch(), strength=strength)
        check_spent(elastic, 0.6, round(20 * strength))


@pytest.mark.parametrize("when", ["before", "after"])
def test_another_pipeline_with_a_scheduler_of_its_own(when: str) -> None:
    """It is asked for its scheduler, not the one that was attached."""
    import diffusers

    def other(pipe: Any) -> Any:
        again = image_to_image(pipe)
        again.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        return again

    expected = alone(FLUX, lambda pipe: make(pipe, 9))
    pipe = load(FLUX)
    painter = other(pipe) if when == "before" else None
    with attached(FLUX) as (pipe, elastic):
        painter = painter or other(pipe)
        make(painter, 20, image=sketch(), strength=0.3)
        check_spent(elastic, 0.6, 6)
        assert torch.equal(make(pipe, 9), expected)
        check_spent(elastic, 0.6, 9)


def test_a_scheduler_that_is_replaced_while_attached() -> None:
    import diffusers

    with attached(QWEN) as (pipe, elastic):
        before, expected = pipe.scheduler, make(pipe, 8)
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(before.config)
        try:
            assert torch.equal(make(pipe, 8), expected)
        finally:
            pipe.scheduler = before
        check_spent(elastic, 0.6, 8)


def test_sigmas_of_ones_own() -> None:
    with attached(FLUX) as (pipe, elastic):
        make(pipe, 50, sigmas=[1.0, 0.9, 0.75, 0.5, 0.3, 0.2, 0.1])
        check_spent(elastic, 0.6, 7)


def test_a_scope_may_hold_two_pictures_and_be_told_other_steps() -> None:
    with attached(FLUX) as (pipe, elastic):
        with elastic.scope(num_steps=20) as trace:
            make(pipe, 10)
            make(pipe, 10)
        assert trace.spent == pytest.approx([0.6], abs=0.01) and trace.num_calls == 20
        assert trace.notes == ["20 steps were told, the sampler makes 10: planned for those"]


# -- runs that take turns --------------------------------------------------------------------------


def test_runs_that_take_turns_keep_their_caches_apart() -> None:
    """Two pipelines, each with its scheduler: one picture is made inside of another's callback."""
    import diffusers

    def dog(pipe: Any) -> torch.Tensor:
        return make(pipe, 6, prompt="a dog", generator=seeded(3))

    expected = alone(FLUX, lambda pipe: make(pipe, 9)), alone(FLUX, dog)
    made: list[torch.Tensor] = []
    with attached(FLUX) as (pipe, elastic):
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
    with attached(FLUX) as (pipe, _):
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
    pipe = load(MESH)
    model, width = pipe.transformer, pipe.transformer.cond_in.in_features
    elastic = routers.attach(model, MESH / "routers", budget=0.6, num_steps=9)
    try:
        contexts = {"main": torch.ones(2, 20, width)}
        with torch.no_grad():
            for step in range(made):
                model(pipe.noise(2, seeded()), torch.full((2,), step / made), contexts)
        trace = elastic.trace
        assert trace is not None and trace.num_calls == made and trace.num_steps == 9
        assert any("where 9 were planned" in note for note in trace.notes) == noted
        if not noted:
            check_spent(elastic, 0.6, 9)
    finally:
        elastic.detach()


def test_a_loop_with_the_attached_pipelines_scheduler() -> None:
    """No pipeline calls, but the one that was attached has set its timesteps."""
    with attached(MESH, num_steps=30) as (pipe, elastic), torch.no_grad():
        pipe.scheduler.set_timesteps(8)
        contexts = {"main": torch.ones(1, 20, pipe.transformer.cond_in.in_features)}
        for time in pipe.scheduler.timesteps:
            pipe.transformer(pipe.noise(1, seeded()), time.expand(1) / 1000, contexts)
        check_spent(elastic, 0.6, 8)

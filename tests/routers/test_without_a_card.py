"""What a GPU does differently, shown on a CPU by stand-ins: memory that is written over, times in bf16,
values that must not be asked for, attention kernels of other packages, tokens shared out over two processes.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import routers
from routers.cost import block_cost
from routers.elastic import Elastic
from routers.meta import transformer_flops
from routers.planned.follow import Follower
from routers.planned.grid import OnGrid
from routers.planned.sampled import Sampled
from routers.policy import FixedPolicy
from routers.trace import FULL, REUSE
from routers.train.trajectory import CallRecorder
from tests.block_kinds import CASES
from tests.routers.packaged import FLUX, PICTURES, QWEN, load, make

CASE = next(case for case in CASES if case.name == "flux")
BLOCKS = 5
by_name = pytest.mark.parametrize("folder", PICTURES, ids=lambda folder: folder.name)
SHIFT = 25.0  # of FLUX at 2048 px: several of 28 times are equal in bfloat16


class Replayed:
    """A forward whose outputs lie in one buffer that its next call writes over, as a CUDA graph's do."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.original, self.pool = module, module.forward, dict[Any, Tensor]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        several = isinstance(output, tuple)
        kept = tuple(self.keep(i, x) for i, x in enumerate(output if several else (output,)))
        return kept if several else kept[0]

    def keep(self, index: int, x: Tensor) -> Tensor:
        buffer = self.pool.setdefault((index, x.shape), torch.empty_like(x))
        return buffer.copy_(x)

    def __enter__(self) -> None:
        self.module.forward = self  # type: ignore[method-assign,assignment]

    def __exit__(self, *_: object) -> None:
        del self.module.forward


def test_a_plan_keeps_its_outputs_though_a_graph_writes_over_them() -> None:
    pipe = load(FLUX)
    elastic = routers.attach(pipe, budget=0.5)
    try:
        expected = make(pipe, steps=4)
        with Replayed(pipe.transformer):
            assert torch.equal(make(pipe, steps=4), expected)
    finally:
        elastic.detach()


def test_steps_left_out_go_on_from_outputs_that_a_graph_writes_over() -> None:
    pipe = load(FLUX)
    results = []
    for replayed in (False, True):
        elastic = routers.attach(pipe.transformer, budget=0.5, num_steps=4)
        assert isinstance(elastic, OnGrid)
        try:
            if replayed:
                original = elastic._patches  # the graph lies under the patch
                assert original is not None
                patch = pipe.transformer.forward
                patch.original = Replayed(type("Inner", (), {"forward": staticmethod(patch.original)})())
            results.append(make(pipe, steps=4))
        finally:
            elastic.detach()
    assert torch.equal(*results)


def test_cached_blocks_survive_a_graph() -> None:
    model, results = CASE.transformer(), []
    plan = [[FULL] * BLOCKS, [FULL] * BLOCKS, [REUSE] * BLOCKS]
    for replayed in (False, True):
        if replayed:
            for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                block._compiled_call_impl = Replayed(block)
        elastic = Elastic(model, CASE.spec)
        with elastic.scope(policy=FixedPolicy(plan), num_steps=3):
            results.append([CASE.run(model, 1, 1 - step / 4, step) for step in range(3)][-1])
        elastic.detach()
    assert torch.allclose(*results, atol=1e-5)  # copies are added block by block


@pytest.mark.parametrize("folder", [FLUX, pytest.param(QWEN, marks=pytest.mark.slow)], ids=["flux", "qwen"])
def test_a_run_in_bfloat16_is_one_run_though_times_repeat(folder: Path) -> None:
    """Blocks under control, where calls are told apart: each step's call belongs to the same run."""
    pipe = load(folder)
    transformer = pipe.transformer
    usual = pipe.scheduler
    pipe.scheduler = type(usual).from_config(usual.config, shift=SHIFT, use_dynamic_shifting=False)
    started: list[Any] = []
    try:
        elastic = routers.attach(transformer, budget=0.5, num_steps=28)
        assert isinstance(elastic, OnGrid)
        begin = elastic._runs.start
        elastic._runs.start = lambda *args: started.append(1) or begin(*args)  # type: ignore[func-returns-value]
        calls: list[float] = []
        handle = transformer.register_forward_pre_hook(
            lambda _m, _a, k: calls.append(float(k["timestep"].bfloat16()[0])), with_kwargs=True
        )
        pipe.to(torch.bfloat16)
        make(pipe, steps=28)
    finally:
        handle.remove()
        elastic.detach()
        pipe.to(torch.float32)
        pipe.scheduler = usual
    assert len(set(calls)) < 28, "no two times are equal: the test shows nothing"
    assert len(started) == 1


@by_name
def test_a_step_of_a_plan_asks_the_device_for_nothing(folder: Path) -> None:
    pipe = load(folder)
    elastic = routers.attach(pipe, budget=0.5)
    assert isinstance(elastic, Sampled)
    try:
        scheduler = elastic.scheduler
        scheduler.set_timesteps(8, mu=1.0)
        scheduler.set_begin_index(0)
        scheduler.sigmas = scheduler.sigmas.to("meta")  # has no values to ask for
        x = torch.randn(1, 4, 8)
        for time in scheduler.timesteps:
            x = scheduler.step(torch.randn(1, 4, 8), time, x).prev_sample
    finally:
        elastic.detach()
    assert x.isfinite().all()


class Waits(TorchDispatchMode):
    """Counts copies between the host and the meta device, which stands in for a card: each waits there."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [value.device.type for value in args if isinstance(value, Tensor)]
        self.count += isinstance(made, Tensor) and any(kind != made.device.type for kind in given)
        return made


@by_name
def test_times_are_laid_out_with_no_more_waits_than_without_a_plan(folder: Path) -> None:
    pipe = load(folder)
    with Waits() as without:
        pipe.scheduler.set_timesteps(8, device="meta", mu=1.0)
    elastic = routers.attach(pipe, budget=0.5)
    assert isinstance(elastic, Sampled)
    try:
        with Waits() as planned:  # the meta device has no values: to ask for one fails
            elastic.scheduler.set_timesteps(8, device="meta", mu=1.0)
        assert elastic.scheduler.timesteps.device.type == elastic.scheduler.sigmas.device.type == "meta"
        assert len(elastic.scheduler.timesteps) == 4
    finally:
        elastic.detach()
    assert 1 <= planned.count <= without.count


def test_outputs_in_bfloat16_are_combined_in_float32() -> None:
    """Weights may be large and of both signs, so that rounding their terms would cost much of the sum."""

    class Steep:
        times, passes = np.array([1.0, 0.5, 0.0]), 2

        def row(self, step: int, x: Tensor, outputs: Any) -> tuple[Any, float]:
            return np.array([11.0, -10.0][: len(outputs)]), 0.0

    x, first, second = (torch.randn(1, 64).bfloat16() for _ in range(3))
    run = Follower(Steep())
    middle = run.step(0, x, first, -0.5)
    made = run.step(1, middle, second, -0.5)
    x, first, second = x.double(), first.double(), second.double()
    exact = x - 0.5 * 11 * first - 0.5 * (11 * second - 10 * first)
    assert made.dtype == torch.float32
    assert torch.allclose(made.double(), exact, atol=1e-4)


def test_router_inputs_beyond_float16_stay_finite() -> None:
    """Late blocks of large models have channels above 65504."""
    seen = SimpleNamespace(
        call=SimpleNamespace(info=SimpleNamespace(step=0, branch="main", rows=1), time=torch.ones(1)),
        block=SimpleNamespace(index=0, spec=SimpleNamespace(modulation="")),
        before=[torch.full((1, 2, 3), 1e6)],
    )  # fmt: skip
    recorder = CallRecorder(SimpleNamespace(num_steps=1, rows=1, branches=["main"]))
    recorder.observe(seen)
    assert recorder.tensors["pooled.0.0"].isfinite().all()


def test_flops_do_not_depend_on_the_attention_backend() -> None:
    """Kernels of other packages have no formula, and some ask a meta tensor which card it is on."""
    from diffusers.models import attention_dispatch as dispatch

    def unknown(*_: Any, **__: Any) -> Tensor:
        raise TypeError("list indices must be integers or slices, not NoneType")

    model, inputs = CASE.transformer(), CASE.inputs(1, 0.5, 0)
    usual = transformer_flops(model, inputs)
    name = dispatch.AttentionBackendName.SAGE
    registry, known = dispatch._AttentionBackendRegistry, dict(dispatch._AttentionBackendRegistry._backends)
    registry._backends[name] = unknown
    registry._supported_arg_names.setdefault(name, set())
    try:
        for module in model.modules():
            if hasattr(getattr(module, "processor", None), "_attention_backend"):
                module.processor._attention_backend = name
        assert transformer_flops(model, inputs) == usual
        with pytest.raises(TypeError):
            model(**inputs)  # the stand-in is in use
        block = model.transformer_blocks[0]
        seen: dict[str, Any] = {}
        hook = block.register_forward_pre_hook(
            lambda _m, a, k: seen.update(args=a, kwargs=k), with_kwargs=True
        )
        with pytest.raises(TypeError):
            model(**inputs)
        hook.remove()
        cost = block_cost(block, (), seen["args"], seen["kwargs"], 1, 1)
        assert cost.dense > 0 and not cost.note
    finally:
        registry._backends.clear()
        registry._backends.update(known)


def test_blocks_of_a_model_over_several_devices_are_refused() -> None:
    pipe = load(FLUX)
    pipe.transformer._parallel_config = object()
    try:
        with pytest.raises(ValueError, match=r"split over several devices.*without routers"):
            Elastic(pipe.transformer, CASE.spec)
        routers.attach(pipe, budget=0.5).detach()  # a plan leaves the blocks alone
    finally:
        del pipe.transformer._parallel_config


@pytest.mark.slow
@pytest.mark.parametrize("order", ["attached first", "split first"])
def test_a_plan_on_tokens_shared_out_over_two_processes(order: str, tmp_path: Path) -> None:
    import torch.multiprocessing as processes

    pipe = load(FLUX)
    elastic = routers.attach(pipe, budget=0.5)
    try:
        torch.save(make(pipe, steps=4), tmp_path / "expected.pt")
    finally:
        elastic.detach()
    processes.spawn(_half_of_the_tokens, (order, str(tmp_path)), nprocs=2)
    expected = torch.load(tmp_path / "expected.pt")
    for rank in range(2):
        assert torch.allclose(torch.load(tmp_path / f"{rank}.pt"), expected, atol=0.01)


def _half_of_the_tokens(rank: int, order: str, folder: str) -> None:
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    class Processor:
        type = "cpu"

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613", "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch._C._get_accelerator = lambda *_, **__: Processor  # diffusers asks for an accelerator
    torch.accelerator.device_count = lambda: 1
    try:
        pipe = load(FLUX)

        def split() -> None:
            pipe.transformer.set_attention_backend("native")
            pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))

        if order == "split first":
            split()
        elastic = routers.attach(pipe, budget=0.5)
        if order == "attached first":
            split()
        made = make(pipe, steps=4)
        assert elastic.trace.made == 2
        torch.save(made, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()

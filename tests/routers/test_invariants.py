"""The invariants of elastic execution, on every transformer and block class the registry knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from routers.elastic import Elastic
from routers.policy import FixedPolicy, OpenPolicy
from routers.router import Router
from routers.trace import FULL, REUSE, SKIP
from tests.block_kinds import CASES, Case

TIMES = (0.9, 0.7, 0.5, 0.3)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


class ReadingOpenPolicy(OpenPolicy):
    """All gates open, but the routers run and are read."""

    cache_depth, reads_routers = 2, True


def routers_for(case: Case, model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> list[Router]:
    torch.manual_seed(1)
    probe = Elastic(model, case.spec)
    count = len(probe.blocks)
    probe.detach()
    routers = [Router(48, 48 if case.spec.blocks[0].modulation else 0, 8) for _ in range(count)]
    for router in routers:
        torch.nn.init.normal_(router.gate.weight)
    return routers


def trajectory(case: Case, model: torch.nn.Module, rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.stack([case.run(model, rows, t, seed) for t in TIMES])


def mixed_plan(blocks: int, rows: int, steps: int = len(TIMES), seed: int = 0) -> np.ndarray:
    """Different decisions per step, row and block; the first step computes so that reuse has something."""
    plan = np.random.default_rng(seed).integers(SKIP, FULL + 1, (steps, rows, blocks)).astype(np.int8)
    plan[0] = FULL
    return plan


def test_detached_equals_never_attached(case: Case) -> None:
    model = case.transformer()
    modules = dict(model.named_modules())
    before, attributes = trajectory(case, model), {k: dict(m.__dict__) for k, m in modules.items()}
    elastic = Elastic(model, case.spec)
    with elastic.scope(policy=FixedPolicy(np.full(len(elastic.blocks), SKIP))):
        closed = trajectory(case, model)
    elastic.detach()
    assert not torch.equal(before, closed), "the plan must have had an effect"
    assert torch.equal(before, trajectory(case, model))
    assert {k: set(m.__dict__) for k, m in modules.items()} == {k: set(v) for k, v in attributes.items()}


def test_open_gates_equal_dense_bit_for_bit(case: Case) -> None:
    model = case.transformer()
    dense = trajectory(case, model)
    elastic = Elastic(model, case.spec, routers=routers_for(case, model), budget=1.0)
    with elastic.scope(policy=ReadingOpenPolicy()) as trace:
        assert torch.equal(dense, trajectory(case, model))
    assert trace.decisions["compute"]["1.0"] == len(TIMES) * 2 * len(elastic.blocks)
    # logits once in each call but the first, and two times, to see whether a call is another CFG branch
    assert trace.host_syncs <= trace.num_calls + 1


def test_closed_gate_is_identity_on_every_stream(case: Case) -> None:
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    for block in elastic.blocks:
        seen: dict[str, tuple] = {}

        def record(module, args, kwargs, output, block=block, seen=seen):
            seen["before"] = block.streams(block.bind(args, kwargs))
            seen["after"] = block.unpack(output)

        handle = block.module.register_forward_hook(record, with_kwargs=True)
        plan = np.full(len(elastic.blocks), FULL)
        plan[block.index] = SKIP
        with elastic.scope(policy=FixedPolicy(plan)):
            case.run(model)
        handle.remove()
        assert all(torch.equal(a, b) for a, b in zip(seen["before"], seen["after"], strict=True))


@pytest.mark.parametrize("order", [0, 1])
def test_row_of_a_batch_equals_the_request_alone(case: Case, order: int) -> None:
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    plan = mixed_plan(len(elastic.blocks), rows=3)
    with elastic.scope(policy=FixedPolicy(plan, order)) as together:
        batch = trajectory(case, model, rows=3)
    for row in range(3):
        with elastic.scope(policy=FixedPolicy(plan[:, row : row + 1], order)) as alone:
            single = trajectory(case, model, rows=1, seed=row)
        assert (single[:, 0] - batch[:, row]).abs().max() <= 1e-5
        assert alone.spent[0] == pytest.approx(together.spent[row], abs=1e-6)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_width_equals_zeroing_the_other_units(case: Case, code: int) -> None:
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    for block in elastic.blocks:
        plan = np.full(len(elastic.blocks), FULL)
        plan[block.index] = code
        with elastic.scope(policy=FixedPolicy(plan)):
            narrow = case.run(model)
        for slicer in block.slicers:
            outer = block.module.get_submodule(slicer.spec.out_linear)
            keep = slicer.column_offset + slicer.units((0.25, 0.5, 0.75)[code])
            saved = outer.weight.data.clone()
            outer.weight.data[:, keep:] = 0
            with elastic.scope(policy=OpenPolicy()):
                zeroed = case.run(model)
            outer.weight.data.copy_(saved)
            assert block.slicers and (narrow - zeroed).abs().max() <= 1e-5


def test_second_run_equals_the_first(case: Case) -> None:
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    policy = FixedPolicy(mixed_plan(len(elastic.blocks), rows=2))
    results = []
    for seed in (0, 7, 0):
        with elastic.scope(policy=policy):
            results.append(trajectory(case, model, seed=seed))
    assert torch.equal(results[0], results[2])
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117 - interrupted after some work
        with elastic.scope(policy=policy):
            case.run(model, t=0.9)
            raise KeyboardInterrupt
    with elastic.scope(policy=policy):
        assert torch.equal(results[0], trajectory(case, model))


def test_cost_model_equals_the_flop_counter(case: Case) -> None:
    model = case.transformer()
    elastic = Elastic(model, case.spec, routers=routers_for(case, model))
    case.run(model)  # the first call of a shape also counts what it costs
    for rows in (1, 3):
        policy = FixedPolicy(mixed_plan(len(elastic.blocks), rows, seed=rows))
        policy.reads_routers = True
        case.run(model, rows=rows)
        # the counter has no formula for the CPU's fused attention, so attention runs as two matmuls here
        counter = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), elastic.scope(policy=policy) as trace, counter:
            trajectory(case, model, rows=rows)
        assert trace.flops["spent"] == pytest.approx(counter.get_total_flops(), rel=0.01)
        assert trace.flops["spent"] < 0.95 * trace.flops["dense"]


def test_reuse_repeats_and_extrapolates_what_a_block_added(case: Case) -> None:
    """Reusing every block at the same input adds the same total; in time it continues linearly."""
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    blocks = len(elastic.blocks)
    plan = np.full((2, blocks), FULL)
    plan[1] = REUSE
    with elastic.scope(policy=FixedPolicy(plan)):
        first, second = case.run(model, t=0.5), case.run(model, t=0.4999999)
    assert (first - second).abs().max() <= 1e-5
    with elastic.scope(policy=FixedPolicy(plan)) as trace:
        case.run(model, t=0.5)
        case.run(model, t=0.4)
    assert trace.decisions["reuse"] == 2 * blocks


def test_changed_shape_meets_no_stale_delta(case: Case) -> None:
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    plan = np.full((2, len(elastic.blocks)), FULL)
    plan[1] = REUSE
    with elastic.scope(policy=FixedPolicy(plan)):
        case.run(model, rows=2)
        assert torch.equal(case.run(model, rows=1), case_dense(case))


def case_dense(case: Case) -> torch.Tensor:
    return case.run(case.transformer(), rows=1)


def test_without_a_scope_runs_are_told_apart_by_time(case: Case) -> None:
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    plan = mixed_plan(len(elastic.blocks), rows=2)
    elastic.make_policy = lambda: FixedPolicy(plan)
    with elastic.scope(policy=FixedPolicy(plan)):
        scoped = trajectory(case, model)
    assert torch.equal(scoped, trajectory(case, model))
    assert torch.equal(scoped, trajectory(case, model)), "the second picture starts afresh"
    assert elastic.trace is not None and elastic.trace.num_calls == len(TIMES)


def test_scopes_do_not_nest_and_attach_is_not_repeated(case: Case) -> None:
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    with elastic.scope(), pytest.raises(RuntimeError, match="do not nest"), elastic.scope():
        pass
    with pytest.raises(ValueError, match="already attached"):
        Elastic(model, case.spec)

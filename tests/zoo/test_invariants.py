"""Every transformer of diffusers under a derived description: what must hold whatever the class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import routers
from routers.derive import derive
from routers.elastic import Elastic
from routers.policy import FixedPolicy, OpenPolicy
from routers.spec import WIDTHS
from routers.trace import FULL, REUSE, SKIP
from tests.zoo.catalogue import PARAMS
from tests.zoo.model import Model

TIMES = (0.9, 0.7, 0.5, 0.3)
HALF_WIDTH = WIDTHS.index(0.5)
Outputs = list[list[Tensor]]


@dataclass
class Case:
    """A built model with routers on its blocks."""

    model: Model
    transformer: nn.Module
    elastic: Elastic

    def run(self, times: Sequence[float] = TIMES, rows: int = 2, seed: int = 0) -> Outputs:
        """All tensors that each call returns."""
        with torch.no_grad():
            return [_tensors(self.transformer(**self.model.call(rows, t, seed))) for t in times]

    def follow(self, plan: Any, order: int = 1, **run: Any) -> Outputs:
        """A run under a given plan."""
        with self.elastic.scope(policy=FixedPolicy(np.asarray(plan, np.int8), order)):
            return self.run(**run)

    @property
    def blocks(self) -> int:
        return len(self.elastic.blocks)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return (
        [tensor for inner in value for tensor in _tensors(inner)] if isinstance(value, (list, tuple)) else []
    )


def equal(a: Outputs, b: Outputs) -> bool:
    """Bit for bit."""
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


def near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max()))


@cache
def _built(model: Model) -> Case:
    """Detached; what calls cost is counted once for all tests."""
    transformer = model.build()
    elastic = Elastic(transformer, derive(transformer, model.call()).spec)
    elastic.detach()
    return Case(model, transformer, elastic)


@pytest.fixture(params=PARAMS)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    case = _built(request.param)
    case.elastic.attach()
    yield case
    case.elastic.detach()


def test_open_gates_equal_dense_bit_for_bit(case: Case) -> None:
    with case.elastic.scope(policy=OpenPolicy()) as trace:
        opened = case.run()
    case.elastic.detach()
    assert equal(opened, case.run())
    assert trace.decisions["compute"]["1.0"] == len(TIMES) * trace.samples * case.blocks


def test_detached_is_as_before(case: Case) -> None:
    with_patches = {path: set(vars(module)) for path, module in case.transformer.named_modules()}
    case.follow(np.full(case.blocks, SKIP))
    case.elastic.detach()
    dense = case.run()
    fresh = case.model.build()
    clean = {path: set(vars(module)) for path, module in fresh.named_modules()}
    left = {path: set(vars(module)) - clean[path] for path, module in case.transformer.named_modules()}
    assert with_patches != clean
    assert not {path: names for path, names in left.items() if names & {"forward", "_edit_elastic"}}
    with torch.no_grad():
        assert equal(dense, [_tensors(fresh(**case.model.call(2, t))) for t in TIMES])


def test_reusing_every_block_adds_the_same_again(case: Case) -> None:
    plan = np.full((3, case.blocks), FULL)
    plan[1:] = REUSE
    first, _, last = case.follow(plan, order=0, times=(0.5, 0.5, 0.5))
    assert all(near(a, b) for a, b in zip(last, first, strict=True))


def test_reusing_every_other_block_computes_the_rest(case: Case) -> None:
    plan = np.full((4, case.blocks), FULL)
    plan[1:, ::2] = REUSE
    assert all(near(a, b) for a, b in zip(*case.follow(plan, 0, times=(0.5, 0.5)), strict=True))
    moved = case.follow(plan)
    assert all(bool(torch.isfinite(x).all()) for call in moved for x in call)
    assert not equal(moved[1:], case.follow(np.full(case.blocks, FULL))[1:])


def test_a_skipped_block_is_the_identity_on_its_streams(case: Case) -> None:
    dense = case.run(times=(0.5,))
    for block in case.elastic.blocks:
        seen: dict[str, Any] = {}

        def record(
            module: Any, args: Any, kwargs: Any, output: Any, block: Any = block, seen: Any = seen
        ) -> None:
            seen["before"] = block.streams(block.bind(args, kwargs))
            seen["after"] = block.unpack(output, seen["before"])

        handle = block.module.register_forward_hook(record, with_kwargs=True)
        plan = np.full(case.blocks, FULL)
        plan[block.index] = SKIP
        skipped = case.follow(plan, times=(0.5,))
        handle.remove()
        assert all(torch.equal(a, b) for a, b in zip(seen["before"], seen["after"], strict=True))
        assert not equal(skipped, dense), f"block {block.index} has no effect"


def test_a_row_of_a_batch_equals_the_request_alone(case: Case) -> None:
    plan = np.random.default_rng(0).choice([SKIP, REUSE, FULL], (len(TIMES), 3, case.blocks))
    plan[0] = FULL
    spec, sample = case.elastic.spec, case.model.call(3)[case.elastic.spec.sample]
    if not spec.per_row:
        plan = plan[:, 0]
    together = case.follow(plan, rows=3)
    for row in range(min(3, len(sample))):
        alone = case.follow(plan[:, row : row + 1] if spec.per_row else plan, rows=1, seed=row)
        for one, all_rows in zip(alone, together, strict=True):
            if spec.listed_sample:
                single, batched = one, all_rows[row : row + 1]
            else:
                single, batched = one, [x.unflatten(0, (3, -1))[row] for x in all_rows]
            assert all(near(a, b) for a, b in zip(single, batched, strict=True))


@pytest.mark.parametrize("model", PARAMS)
def test_a_budget_is_kept_without_knowing_the_blocks(model: Model) -> None:
    """A bare transformer of any class: what is left out looks like what is computed."""
    transformer, calls = _built(model).transformer, 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    dense = [_tensors(transformer(**model.call(1, t, 0))) for t in TIMES]
    inner = next(m for m in transformer.modules() if isinstance(m, nn.Linear))
    handle = inner.register_forward_pre_hook(count)
    on_grid = routers.attach(transformer, budget=0.5, num_steps=len(TIMES))
    try:
        transformer(**model.call(1, TIMES[0], 0))
        once, calls = calls, 0
        with torch.no_grad(), on_grid.scope() as trace:
            made = [_tensors(transformer(**model.call(1, t, 0))) for t in TIMES]
    finally:
        on_grid.detach()
        handle.remove()
    assert trace.spent == [0.5] and calls == 2 * once > 0
    assert [[x.shape for x in call] for call in made] == [[x.shape for x in call] for call in dense]
    still = all(equal([call], dense[:1]) for call in dense)
    assert equal(made[:1], dense[:1]) and equal(made, dense) == still


def test_a_width_equals_zeroing_the_other_units(case: Case) -> None:
    if not any(block.spec.mlps for block in case.elastic.blocks):
        pytest.skip("every width of this class is fixed")
    dense, narrow = (case.follow(np.full(case.blocks, code), times=(0.5,)) for code in (FULL, HALF_WIDTH))
    assert case.elastic.trace is not None
    assert case.elastic.trace.spent[0] < 1.0
    saved = []
    for block in case.elastic.blocks:
        for slicer in block.slicers:
            weight = slicer.linears[1].weight
            assert isinstance(weight, Tensor)
            saved.append((weight, weight.clone()))
            weight[:, slicer.column_offset + slicer.units(WIDTHS[HALF_WIDTH]) :] = 0
    zeroed = case.follow(np.full(case.blocks, FULL), times=(0.5,))
    for weight, before in saved:
        weight.copy_(before)
    assert not equal(narrow, dense)
    assert all(near(a, b) for a, b in zip(narrow[0], zeroed[0], strict=True))

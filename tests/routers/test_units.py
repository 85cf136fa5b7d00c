"""Blocks that are computed, cached and predicted together, on every backbone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from routers.elastic import Elastic
from routers.policy import CallInfo, Decision, FixedPolicy, RunInfo, Units
from routers.trace import FULL, REUSE, Actions
from tests.block_kinds import CASES, Case

TIMES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


class UnitPolicy(FixedPolicy):
    """A plan [T, R, N] whose reuses take the same weights everywhere, in units cut before block `cut`."""

    def __init__(self, plan: Actions, weights: tuple[float, ...], cut: int | None = None) -> None:
        super().__init__(plan)
        self.shared, self.cut, self.cache_depth = weights, cut, len(weights)

    def start(self, run: RunInfo) -> None:
        cut = self.cut
        self.cut_units = tuple(
            part
            for first, last in run.segments
            for part in (
                [(first, cut - 1), (cut, last)]
                if cut is not None and first < cut <= last
                else [(first, last)]
            )
        )

    def decide(self, call: CallInfo, logits: Any) -> Decision:
        weights = np.tile(np.array(self.shared, np.float32), (call.rows, len(self.cut_units), 1))
        for unit, (first, _) in enumerate(self.cut_units):
            short = call.available[:, first] < len(self.shared)
            weights[short, unit] = np.eye(len(self.shared), dtype=np.float32)[0]  # repeat the newest
        return replace(super().decide(call, logits), units=self.cut_units, weights=weights)


class Watch:
    """What enters the first and leaves the last block of every unit, call by call."""

    def __init__(self, elastic: Elastic, units: Units) -> None:
        self.units, self.flows = units, [[] for _ in units]
        self._handles = []
        for unit, (first, last) in enumerate(units):
            self._watch(elastic, unit, first, entering=True)
            self._watch(elastic, unit, last, entering=False)

    def _watch(self, elastic: Elastic, unit: int, index: int, *, entering: bool) -> None:
        block = elastic.blocks[index]

        def enter(_module: Any, args: Any, kwargs: Any) -> None:
            self.flows[unit].append([block.streams(block.bind(args, kwargs))])

        def leave(_module: Any, _args: Any, output: Any) -> None:
            self.flows[unit][-1].append(block.unpack(output))

        if entering:
            self._handles.append(block.module.register_forward_pre_hook(enter, with_kwargs=True))
        else:
            self._handles.append(block.module.register_forward_hook(leave))

    def delta(self, unit: int, call: int) -> tuple[torch.Tensor, ...]:
        before, after = self.flows[unit][call]
        return tuple(b - a for a, b in zip(before, after, strict=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def plan_of(pattern: str, blocks: int, rows: int = 2) -> Actions:
    """One letter a step: F computes all blocks, r reuses all."""
    return np.stack([np.full((rows, blocks), FULL if letter == "F" else REUSE) for letter in pattern])


def test_a_reuse_adds_the_weighted_deltas_of_the_whole_stack(case: Case) -> None:
    model = case.transformer()
    case.run(model)
    elastic = Elastic(model, case.spec)
    case.run(model)  # costs of this shape
    weights = (1.75, -1.0, 0.25)
    policy = UnitPolicy(plan_of("FFFr", len(elastic.blocks)), weights)
    policy.start(RunInfo(4, 0.5, elastic.segments))
    assert policy.cut_units == elastic.segments
    watch = Watch(elastic, elastic.segments)
    with elastic.scope(policy=policy, num_steps=4):
        for t in TIMES[:4]:
            case.run(model, t=t)
    watch.remove()
    for unit in range(len(elastic.segments)):
        expected = [
            sum(w * d for w, d in zip(weights, newest_first, strict=True))
            for newest_first in zip(*(watch.delta(unit, call) for call in (2, 1, 0)), strict=True)
        ]
        for got, want in zip(watch.delta(unit, 3), expected, strict=True):
            assert (got - want).abs().max() <= 2e-5 * want.abs().max().clamp_min(1.0)


def test_units_hold_a_fraction_of_what_single_blocks_hold(case: Case) -> None:
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    sizes = []
    plan = plan_of("FFFr", len(elastic.blocks))
    for policy in (UnitPolicy(plan, (1.0, 0.0, 0.0)), FixedPolicy(plan, order=1)):
        policy.cache_depth = 3
        with elastic.scope(policy=policy, num_steps=4) as trace:
            for t in TIMES[:4]:
                case.run(model, t=t)
        sizes.append(trace.cache_bytes)
    streams = 2 * len(elastic.segments) / (len(elastic.blocks) + 1)
    assert sizes[0] <= 1.01 * max(streams, 0.5) * sizes[1]


@pytest.mark.parametrize("cut", [None, 1, 3])
def test_rows_that_go_separate_ways_equal_the_rows_alone(case: Case, cut: int | None) -> None:
    """Different steps per row, one partial step: every row as if it were the only one."""
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    blocks = len(elastic.blocks)
    plan = np.concatenate([plan_of(row, blocks, rows=1) for row in ("FFrFrr", "FrFFrF", "FFFrFr")], axis=1)
    if cut is not None:
        plan[4, 0, cut:] = FULL
        plan[3, 2, cut:] = FULL
    weights = (1.6, -0.8, 0.2)
    with elastic.scope(policy=UnitPolicy(plan, weights, cut), num_steps=6) as together:
        batch = torch.stack([case.run(model, 3, t) for t in TIMES])
    for row in range(3):
        policy = UnitPolicy(plan[:, row : row + 1], weights, cut)
        with elastic.scope(policy=policy, num_steps=6) as alone:
            single = torch.stack([case.run(model, 1, t, seed=row) for t in TIMES])
        assert (single[:, 0] - batch[:, row]).abs().max() <= 2e-5
        assert alone.spent[0] == pytest.approx(together.spent[row], abs=1e-6)


@pytest.mark.parametrize("cut", [None, 2])
def test_what_is_added_between_blocks_is_added_once(cut: int | None) -> None:
    """ControlNet residuals of a reused step are its own: a cached delta holds only what the blocks added."""
    case = CASES[0]
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    blocks = len(elastic.blocks)

    def run(t: float, scale: float) -> torch.Tensor:
        inputs = case.inputs(2, t, 0)
        shape = (2, inputs["hidden_states"].shape[1], 48)
        residuals = [torch.full(shape, scale * (i + 1)) for i in range(blocks)]
        with torch.no_grad():
            return model(**inputs, controlnet_block_samples=residuals)[0]

    run(0.9, 0.1)
    plan = plan_of("FFr", blocks)
    units = ((0, blocks - 1),) if cut is None else ((0, cut - 1), (cut, blocks - 1))
    watch = Watch(elastic, units)
    with elastic.scope(policy=UnitPolicy(plan, (1.0, 0.0), cut), num_steps=3):
        for t, scale in zip(TIMES, (0.1, 0.1, 0.3), strict=False):
            run(t, scale)
    watch.remove()
    for unit, (first, last) in enumerate(units):
        # residuals after a unit's last block come after it was left
        inside = sum(i + 1 for i in range(first, last))
        own = watch.delta(unit, 1)[0] - 0.1 * inside
        assert (watch.delta(unit, 2)[0] - (own + 0.3 * inside)).abs().max() <= 1e-4

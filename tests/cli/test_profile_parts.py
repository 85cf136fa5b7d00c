"""What `edit profile` measures with: clocks, the timer, redundancy, drift; on every block class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from routers.elastic import Elastic
from routers.policy import FixedPolicy
from routers.trace import FULL, REUSE, SKIP
from routers.watch.redundancy import Redundancy, drift, watch_streams
from routers.watch.timing import EventClock, HostClock, Timeline, cost_of_a_span
from tests.block_kinds import CASES

by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# -- clocks ---------------------------------------------------------------------------------------


class Queue:
    """A device whose events happen only when it is waited for."""

    def __init__(self):
        self.waits, self.now, self.done = 0, 0.0, False

    def synchronize(self):
        self.waits, self.done = self.waits + 1, True


def make_event(queue):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.now += 2.0
            self.at = queue.now

        def elapsed_time(self, end):
            assert queue.done, "read before the device was waited for"
            return end.at - self.at

    return Event


def test_events_wait_for_the_device_once():
    queue = Queue()
    line = Timeline(EventClock(queue, make_event(queue), "events"))
    with line.span("call"):
        for block in range(3):
            with line.span("block", block):
                pass
    assert queue.waits == 0
    spans = line.finish()
    assert queue.waits == 1
    assert [(s.part, s.block) for s in spans] == [("block", 0), ("block", 1), ("block", 2), ("call", -1)]
    assert [s.seconds for s in spans] == pytest.approx([0.002, 0.002, 0.002, 0.014])
    assert spans[0].start == pytest.approx(0.004)


def test_a_span_on_the_host_costs_little():
    assert 0 < cost_of_a_span(HostClock()) < 1e-4


@by_case
def test_timer_sees_every_block_and_changes_nothing(case):
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    blocks = len(elastic.blocks)
    plan = np.full((2, blocks), FULL, np.int8)
    plan[1, ::2] = REUSE
    results = []
    for timer in (None, Timeline(HostClock())):
        elastic.timer = timer
        with elastic.scope(policy=FixedPolicy(plan, order=0), num_steps=2):
            case.run(model, t=0.9)
            results.append(case.run(model, t=0.5))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    spans = timer.finish()
    assert [s.block for s in spans if s.part == "block"] == [*range(blocks)] * 2
    assert [s.call for s in spans if s.part == "call"] == [0, 1]
    assert [info.step for info in timer.calls] == [0, 1]
    assert sum(s.part == "cache" for s in spans) == 2 * blocks  # kept or added, once per block


# -- redundancy and drift ---------------------------------------------------------------------------


@by_case
def test_cost_of_a_skip_equals_a_run_with_that_skip(case):
    model = case.transformer()
    dense = case.run(model)
    elastic = Elastic(model, case.spec)
    watch = Redundancy(elastic, steps=1, probe_steps=[0])
    with elastic.scope(num_steps=1) as trace, watch.watching():
        torch.testing.assert_close(case.run(model), dense, rtol=0, atol=0)
    assert trace.num_calls == 1  # probes are not booked
    (maps,) = watch.maps.values()
    for block in range(len(elastic.blocks)):
        plan = np.full(len(elastic.blocks), FULL, np.int8)
        plan[block] = SKIP
        with elastic.scope(policy=FixedPolicy(plan), num_steps=1):
            changed = case.run(model)
        gap = (changed - dense).flatten(1).square().mean(1).sqrt() / dense.flatten(1).square().mean(1).sqrt()
        np.testing.assert_allclose(maps.skip_cost[0, :, block], gap.numpy(), rtol=1e-4, atol=1e-7)
    assert (maps.adds > 0).all()
    assert np.isnan(maps.similarity).all()  # there is no step before
    elastic.detach()
    torch.testing.assert_close(case.run(model), dense, rtol=0, atol=0)


def test_the_same_input_twice_adds_the_same():
    case = CASES[0]
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    watch = Redundancy(elastic, steps=2)
    with elastic.scope(num_steps=2), watch.watching():
        for _ in range(2):
            with model.cache_context("cond"):  # unnamed, the second would be another branch of the same step
                case.run(model)
    (maps,) = watch.maps.values()
    np.testing.assert_allclose(maps.similarity[1], 1.0, rtol=1e-5)
    assert np.isnan(maps.skip_cost).all()  # no step was to be probed


def test_drift_starts_where_a_run_leaves_the_dense_one():
    case = CASES[0]
    model = case.transformer()
    elastic = Elastic(model, case.spec)
    plan = np.full(len(elastic.blocks), FULL, np.int8)
    plan[1] = SKIP
    seen = []
    for policy in (FixedPolicy(np.full_like(plan, FULL)), FixedPolicy(plan)):
        with watch_streams(elastic) as streams, elastic.scope(policy=policy, num_steps=1):
            case.run(model)
        seen.append(streams)
    apart = drift(seen[1], seen[0])
    assert (apart["main", 0, 0] == 0).all()
    assert all((apart["main", 0, n] > 0).all() for n in range(1, len(plan)))

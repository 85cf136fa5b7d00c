"""The simulated cluster against cases that can be worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.cluster import Cluster, Measured, simulate

STEADY = Measured(load=10.0, batches=(2.0,))


@pytest.mark.parametrize(
    ("workers", "batches", "end"), [(1, 5, 20.0), (5, 5, 12.0), (4, 6, 14.0), (8, 1, 12.0)]
)
def test_workers_that_never_fail_take_turns(workers: int, batches: int, end: float) -> None:
    outcome = simulate(Cluster(workers, 0.0, 0.0, 1.0), batches, STEADY)
    assert outcome.hours * 3600 == pytest.approx(end)
    assert outcome.useful == pytest.approx(2.0 * batches / (end * workers))
    assert outcome.made_again == 0


def test_slow_workers_take_fewer_batches() -> None:
    all_slow = simulate(Cluster(4, 0.0, 1.0, 3.0), 400, STEADY)
    none_slow = simulate(Cluster(4, 0.0, 0.0, 3.0), 400, STEADY)
    some_slow = simulate(Cluster(4, 0.0, 0.5, 3.0), 400, STEADY, seed=1)
    assert all_slow.hours == pytest.approx(3 * none_slow.hours)
    assert none_slow.hours < some_slow.hours < all_slow.hours


def test_lost_batches_are_made_again_and_every_one_is_kept() -> None:
    outcome = simulate(Cluster(20, 20.0, 0.0, 1.0), 5000, STEADY)
    assert outcome.made_again > 10
    assert outcome.useful * outcome.hours * 3600 * 20 == pytest.approx(2.0 * 5000)

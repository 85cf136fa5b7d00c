"""Rounding alone puts two runs in bfloat16 as far apart as a plan and the dense run are."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import rounding


def test_a_nudge_is_of_half_a_spacing_and_ends_with_the_block() -> None:
    class Scheduler:
        def step(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(prev_sample=x)

    scheduler, x = Scheduler(), torch.randn(4096).bfloat16()
    with rounding.nudged(scheduler, seed=0):
        moved = scheduler.step(x).prev_sample
    changed = (moved != x).float().mean()
    assert 0.2 < changed < 0.9
    assert ((moved.float() - x.float()).abs() <= torch.finfo(x.dtype).eps * x.float().abs() * 1.01).all()
    assert scheduler.step(x).prev_sample is x


@pytest.mark.slow
def test_a_plan_in_bfloat16_is_as_near_as_rounding_lets_it_be(capsys) -> None:
    rounding.main(["flux-tiny", "--rows", "2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["plan, fp32"] > found["dense nudged"], "rounding is more than what the plan leaves out"
    assert found["plan, bf16"] > found["expected"] - 1.5

"""`elastic.observe()`: a run of all steps teaches plans for every budget, and costs nothing besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

import routers
from routers.planned.observed import Observation
from routers.planned.sampled import Sampled
from tests.routers.packaged import MESH, QWEN, StopError, load, make, seeded, stop_at
from tests.routers.test_row_budgets import batch, counted_rows


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean())


@pytest.mark.parametrize("folder", [QWEN, MESH], ids=["qwen", "mesh"])
def test_a_dense_run_teaches_plans_that_serve_other_results(folder: Path, tmp_path: Path) -> None:
    pipe = load(folder)
    dense = {row: batch(pipe, [row], 12) for row in (0, 1, 2)}
    universal = routers.attach(pipe, budget=0.5)
    assert isinstance(universal, Sampled)
    with counted_rows(pipe) as rows, universal.observe() as seen:
        assert torch.equal(batch(pipe, [0], 12), dense[0]), "the run is the pipeline's own, bit for bit"
        branches = rows.made // 12
        bundle = seen.bundle("a model", 4.0)
        assert rows.made == 12 * branches, "no evaluation beside"
    without = {row: batch(pipe, [row], 12) for row in (1, 2)}
    universal.detach()
    assert (bundle.num_steps, sorted(bundle.plans["dense"])[0]) == (12, 1)
    bundle.save(tmp_path / "bundle")
    taught = routers.attach(pipe, tmp_path / "bundle", budget=0.5)
    with_it = {row: batch(pipe, [row], 12) for row in (1, 2)}
    assert isinstance(taught, Sampled) and taught.trace is not None and taught.trace.spent == [0.5]
    taught.detach()
    for row in (1, 2):
        assert error(with_it[row], dense[row]) < 0.7 * error(without[row], dense[row])


def test_several_runs_are_put_together_and_half_ones_do_not_count() -> None:
    pipe = load(QWEN)
    elastic = routers.attach(pipe, budget=0.5, seconds=60)
    assert isinstance(elastic, Sampled)
    try:
        with elastic.observe() as seen:
            batch(pipe, [0, 1], 4)
            with pytest.raises(StopError):
                make(pipe, 4, callback_on_step_end=stop_at(1, "exception"))
            batch(pipe, [2], 4)
            make(pipe, 3, generator=seeded())
        assert seen.runs == 2 and seen.bundle().metadata["rows"] == 3
        assert sorted(seen.plans()) == [1, 2, 3]
    finally:
        elastic.detach()
    with pytest.raises(ValueError, match="no whole run of all steps was seen"):
        Observation(pipe).plans()


def test_a_sampler_that_follows_no_flow_is_refused() -> None:
    pipe: Any = load(QWEN)
    own, pipe.scheduler = pipe.scheduler, DDIMScheduler()
    try:
        elastic = routers.attach(pipe, budget=0.5)
        assert isinstance(elastic, Sampled)
        with pytest.raises(ValueError, match="runs of this sampler teach nothing by themselves"):
            elastic.observation()
        elastic.detach()
    finally:
        pipe.scheduler = own

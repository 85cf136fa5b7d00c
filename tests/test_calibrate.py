"""Calibration on a random pipeline of the real classes: it measures what happens, and the bundle works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import routers
from backbones import qwen_image
from backbones.workload import PipelineWorkload
from routers.calibrate.evaluate import Quality, evaluate, recommend
from routers.calibrate.fit import FitSettings, build_tables, fit
from routers.calibrate.gains import ProbePolicy, smooth
from routers.calibrate.record import Record, record
from routers.elastic import Elastic
from routers.policy import FixedPolicy
from routers.trace import FULL, REUSE
from tests.tiny_pipelines import make_qwen_image

STEPS, ROWS = 6, 2


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> PipelineWorkload:
    from diffusers import QwenImagePipeline

    folder = make_qwen_image(tmp_path_factory.mktemp("pipeline") / "qwen")
    pipe = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for (
            parameter
        ) in pipe.transformer.parameters():  # random modulations are near zero: make blocks matter
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    prompts = ["a cat", "a red car", "a tree", "the sun"]
    return PipelineWorkload(pipe, qwen_image.FAMILY, prompts, ROWS, STEPS, 4.0, 64, 64)


@pytest.fixture(scope="module")
def recorded(workload: PipelineWorkload) -> Record:
    elastic = Elastic(workload.pipe.transformer, qwen_image.TRANSFORMER)
    try:
        return record(elastic, workload)
    finally:
        elastic.detach()


def test_workload_is_repeatable_and_counts_branches(workload: PipelineWorkload) -> None:
    assert (workload.num_batches, workload.branches) == (2, ("cond", "uncond"))
    assert torch.equal(workload.run(1), workload.run(1))
    assert not torch.equal(workload.run(0), workload.run(1))


def test_recorded_reuse_error_is_the_error_a_reuse_makes(
    workload: PipelineWorkload, recorded: Record
) -> None:
    """Reuse one block at one step and compare its output there with the dense one."""
    step, block = 3, 2
    elastic = Elastic(workload.pipe.transformer, qwen_image.TRANSFORMER)
    module, outputs = elastic.blocks[block].module, []
    handle = module.register_forward_hook(
        lambda _m, _a, _k, out: outputs.append(elastic.blocks[block].unpack(out)[0]), with_kwargs=True
    )
    plan = np.full((STEPS, len(elastic.blocks)), FULL)
    plan[step, block] = REUSE
    try:
        for order in (0, 1):
            runs = []
            for codes in (np.full_like(plan, FULL), plan):
                outputs.clear()
                with torch.no_grad(), elastic.scope(policy=FixedPolicy(codes, order), num_steps=STEPS):
                    workload.run(0)
                probes = (
                    len(outputs) - 2 * STEPS
                )  # the first call of a shape also passes once with blocks closed
                runs.append(outputs[probes + 2 * step])
            error = (runs[0] - runs[1]).square().mean(dim=(1, 2)).numpy()
            assert recorded.reuse[:ROWS, 0, step, block, 0, order] == pytest.approx(error, rel=1e-3)
    finally:
        handle.remove()
        elastic.detach()


def test_tables_are_finite_positive_and_age_monotone(recorded: Record, workload: PipelineWorkload) -> None:
    gains = np.ones((2, STEPS, 4))
    for order in (0, 1):
        tables = build_tables(recorded, gains, workload.branches, order)
        for name in ("reuse", "width", "skip", "gain"):
            table = getattr(tables, name)
            assert np.isfinite(table).all() and (table > 0).all()
        assert (np.diff(tables.reuse, axis=3) >= 0).all()
        assert (np.diff(tables.width, axis=3) <= 0).all(), "a wider MLP is closer to the full one"


def test_probe_policy_reuses_exactly_its_cell(workload: PipelineWorkload) -> None:
    elastic = Elastic(workload.pipe.transformer, qwen_image.TRANSFORMER)
    policy = ProbePolicy([(0, 2, 1), (1, 3, 0)], workload.branches, order=0)
    try:
        with torch.no_grad(), elastic.scope(policy=policy, num_steps=STEPS) as trace:
            workload.run(0)
    finally:
        elastic.detach()
    reused = [
        (call.branch, call.step, row, block)
        for call in trace.calls
        for row, block in np.argwhere(call.actions == REUSE).tolist()
    ]
    assert reused == [("cond", 2, 0, 1), ("uncond", 3, 1, 0)]


def test_gains_are_recovered_from_a_sample() -> None:
    """A log-additive truth is found from a third of its cells, in noise."""
    random = np.random.default_rng(0)
    truth = random.normal(0, 1, (2, 10, 1)).cumsum(axis=1) * 0.3 + random.normal(0, 1, (2, 1, 6)) - 4
    cells = [(g, s, n) for g in range(2) for s in range(1, 10) for n in range(6)]
    picked = [cells[i] for i in random.permutation(len(cells))[:36]]
    found = [(cell, truth[cell] + 0.1 * random.normal()) for cell in picked]
    estimate = smooth(found, truth.shape)
    assert np.corrcoef(estimate[:, 1:].ravel(), truth[:, 1:].ravel())[0, 1] > 0.9


def test_fit_gives_a_bundle_that_keeps_budgets(workload: PipelineWorkload, tmp_path: Path) -> None:
    phases = set()
    settings = FitSettings(probes=16, hidden=8, steps=20)
    before = [p.clone() for p in workload.pipe.transformer.parameters()]
    bundle = fit(
        workload.pipe.transformer, qwen_image.TRANSFORMER, workload, "random", 4.0, settings,
        lambda phase, done, total: phases.add(phase),
    )  # fmt: skip
    assert phases == {"record", "gains", "routers"}
    assert all(torch.equal(a, b) for a, b in zip(before, workload.pipe.transformer.parameters(), strict=True))
    assert len(bundle.times) == STEPS and bundle.times[0] > bundle.times[-1]
    bundle.save(tmp_path / "b")
    rows = evaluate(
        workload.pipe.transformer, routers.load_bundle(tmp_path / "b"), workload, [0.5, 0.75, 1.0]
    )
    assert [row.budget for row in rows] == [0.5, 0.75, 1.0]
    # 48 cells of 4 blocks x 6 steps x 2 branches: half a block is 1 %
    assert all(abs(row.spent - row.budget) < 0.02 for row in rows)
    assert rows[2].snr > rows[1].snr > rows[0].snr > 0
    assert "_edit_elastic" not in workload.pipe.transformer.__dict__


def test_recommended_budget_is_the_smallest_without_loss() -> None:
    def row(budget: float, snr: float) -> Quality:
        return Quality(budget, budget, budget, budget, snr, budget)

    assert recommend([row(0.4, 20), row(0.6, 33), row(0.8, 40), row(1.0, 120)]) == 0.6
    assert recommend([row(0.4, 35), row(0.6, 25), row(0.8, 40), row(1.0, 120)]) == 0.8
    assert recommend([row(0.4, 5), row(1.0, 20)]) == 1.0

"""Calibration on a random pipeline of the real classes: it measures what happens, and the bundle works."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import routers
from backbones import qwen_image, registry
from backbones.workloads import PipelineWorkload
from routers.calibrate.evaluate import Quality, evaluate, recommend
from routers.calibrate.fit import FitSettings, first_moments, fit
from routers.calibrate.gains import ProbePolicy, measure_gains, prediction_error, smooth
from routers.calibrate.record import Record, record
from routers.elastic import Elastic
from routers.planned.plan import Planner
from routers.trace import FULL, REUSE
from tests.tiny_pipelines import make_moments, make_qwen_image

STEPS, ROWS = 6, 2


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> PipelineWorkload:
    from diffusers import QwenImagePipeline

    folder = make_qwen_image(tmp_path_factory.mktemp("pipeline") / "qwen")
    pipe = QwenImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        # random modulations are near zero: make blocks matter
        for parameter in pipe.transformer.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    prompts = ["a cat", "a red car", "a tree", "the sun"]
    return PipelineWorkload(pipe, registry.resolve(str(folder)), ROWS, STEPS, 4.0, prompts, 64, 64)


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


def test_recorded_moments_are_products_of_what_the_stack_adds(
    workload: PipelineWorkload, recorded: Record
) -> None:
    """Watch the model's first and last block from outside."""
    blocks, deltas, entry = workload.pipe.transformer.transformer_blocks, [], []
    handles = [
        blocks[0].register_forward_pre_hook(
            lambda _m, _a, kwargs: entry.append(kwargs["hidden_states"]), with_kwargs=True
        ),
        blocks[-1].register_forward_hook(lambda _m, _a, out: deltas.append(out[1] - entry[-1])),
    ]
    try:
        with torch.no_grad():
            workload.run(1)
    finally:
        for handle in handles:
            handle.remove()
    stacked = torch.stack([*deltas[0::2], *deltas[1::2]], dim=1).flatten(2).double()  # branch-major
    gram = torch.einsum("rkx,rlx->rkl", stacked, stacked) / stacked.shape[2]
    assert recorded.gram.shape == (4, 2 * STEPS, 2 * STEPS)
    assert recorded.gram[ROWS:] == pytest.approx(gram.numpy(), rel=1e-4, abs=1e-7)


def test_probe_policy_predicts_all_blocks_of_its_step(workload: PipelineWorkload, recorded: Record) -> None:
    moments = first_moments(recorded, workload.branches, 4.0)
    elastic = Elastic(workload.pipe.transformer, qwen_image.TRANSFORMER)
    policy = ProbePolicy([2, 4], Planner(moments))
    try:
        with torch.no_grad(), elastic.scope(policy=policy, num_steps=STEPS) as trace:
            workload.run(0)
    finally:
        elastic.detach()
    for call in trace.calls:
        for row, step in enumerate([2, 4]):
            assert (call.actions[row] == (REUSE if call.step == step else FULL)).all()


def test_gains_say_what_an_error_does_to_the_latents(workload: PipelineWorkload, recorded: Record) -> None:
    """The last step's error goes straight into the latents: its gain is known from the sampler's step."""
    moments = first_moments(recorded, workload.branches, 4.0)
    elastic = Elastic(workload.pipe.transformer, qwen_image.TRANSFORMER)
    try:
        gain = measure_gains(elastic, workload, recorded, moments, probes=20)
    finally:
        elastic.detach()
    assert gain.shape == (STEPS,) and (gain > 0).all() and np.isfinite(gain).all()


def test_prediction_error_of_an_exact_process_is_small() -> None:
    """Deltas linear in time are predicted from two passes."""
    at = np.arange(6.0)
    line = 1 + np.outer(at, at)
    moments = replace(make_moments(("main",), 6), gram=line, gain=np.ones(6))
    assert prediction_error(Planner(moments), 4, line) < 1e-3 * line[4, 4]


def test_gains_are_recovered_from_noisy_probes() -> None:
    random = np.random.default_rng(0)
    truth = np.cumsum(random.normal(0, 0.4, 20)) - 3
    found = [(s, truth[s] + 0.1 * random.normal()) for s in range(1, 20) for _ in range(3)]
    estimate = smooth(found, 20)
    assert np.abs(estimate[1:] - truth[1:]).max() < 0.3
    assert estimate[0] == pytest.approx(estimate[1], abs=1e-6), "step 0 is never predicted and follows step 1"


def test_fit_gives_a_bundle_that_keeps_budgets(workload: PipelineWorkload, tmp_path: Path) -> None:
    phases = set()
    settings = FitSettings(probes=16, tried=ROWS)
    before = [p.clone() for p in workload.pipe.transformer.parameters()]
    bundle = fit(
        workload.pipe.transformer, qwen_image.TRANSFORMER, workload, "random", 4.0, settings,
        lambda phase, done, total: phases.add(phase),
    )  # fmt: skip
    assert phases == {"record", "gains", "plans"}
    assert all(torch.equal(a, b) for a, b in zip(before, workload.pipe.transformer.parameters(), strict=True))
    assert len(bundle.times) == STEPS and bundle.times[0] > bundle.times[-1]
    bundle.save(tmp_path / "b")
    rows = evaluate(
        workload.pipe.transformer, routers.load_bundle(tmp_path / "b"), workload, [0.5, 0.75, 1.0]
    )
    assert [row.budget for row in rows] == [0.5, 0.75, 1.0]
    # 4 blocks x 6 steps: half a block is 2 %
    assert all(abs(row.spent - row.budget) < 0.025 for row in rows)
    assert rows[2].snr > rows[1].snr > rows[0].snr > 0
    assert "_edit_elastic" not in workload.pipe.transformer.__dict__


def test_recommended_budget_is_the_smallest_without_loss() -> None:
    def row(budget: float, snr: float) -> Quality:
        return Quality(budget, budget, budget, budget, snr, budget)

    assert recommend([row(0.4, 20), row(0.6, 33), row(0.8, 40), row(1.0, 120)]) == 0.6
    assert recommend([row(0.4, 35), row(0.6, 25), row(0.8, 40), row(1.0, 120)]) == 0.8
    assert recommend([row(0.4, 5), row(1.0, 20)]) == 1.0

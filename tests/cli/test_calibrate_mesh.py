"""Calibration of both Hunyuan3D transformers, whose guidance runs as one doubled batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import routers
from backbones import registry
from backbones.hunyuan3d.dit_v21 import HunYuanDiTPlain
from backbones.hunyuan3d.family import TRANSFORMER_2, TRANSFORMER_21
from backbones.hunyuan3d.image_processor import ImageProcessor
from backbones.hunyuan3d.pipeline import Hunyuan3DPipeline
from backbones.hunyuan3d.schedulers import FlowMatchEulerScheduler
from backbones.workloads import MeshWorkload, embed
from routers.calibrate.evaluate import evaluate
from routers.calibrate.fit import FitSettings, first_moments, fit
from routers.calibrate.gains import ProbePolicy
from routers.calibrate.record import record
from routers.elastic import Elastic
from routers.planned.plan import Planner
from routers.trace import FULL, REUSE
from tests.hunyuan3d_tiny import components

STEPS, ROWS = 6, 2
SPECS = {"2.0": TRANSFORMER_2, "2.1": TRANSFORMER_21}


def picture(colour: str) -> Image.Image:
    image = Image.new("RGBA", (40, 40))
    ImageDraw.Draw(image).ellipse((6, 9, 33, 30), fill=colour)
    return image


def make_workload(version: str, guidance: float = 5.0) -> MeshWorkload:
    parts = components()
    if version == "2.1":
        torch.manual_seed(0)
        parts["model"] = HunYuanDiTPlain(
            in_channels=8, hidden_size=32, context_dim=24, depth=5, num_heads=4, num_moe_layers=1,
            num_experts=4, qk_norm=True, qkv_bias=False,
        )  # fmt: skip
    with torch.no_grad():
        for parameter in parts["model"].parameters():  # random modulations are near zero: make blocks matter
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    pipe = Hunyuan3DPipeline(
        parts["model"], parts["vae"], parts["conditioner"], FlowMatchEulerScheduler(), ImageProcessor(32)
    )
    contexts = embed(pipe, [picture("red"), picture("blue"), picture("lime")])
    return MeshWorkload(pipe, registry.rows()["hunyuan3d-tiny"], ROWS, STEPS, guidance, contexts, 4, seed=3)


@pytest.fixture(scope="module", params=SPECS)
def case(request: pytest.FixtureRequest):
    """(spec, workload) of each transformer."""
    return SPECS[request.param], make_workload(request.param)


def test_a_row_of_a_batch_is_the_same_shape_alone(case) -> None:
    _, workload = case
    assert (workload.num_batches, workload.branches) == (2, ("cond", "uncond"))
    latents = workload.run(1)
    assert latents.dtype == torch.float32 and latents.shape == (ROWS, 12, 8)
    assert torch.equal(latents, workload.run(1))
    noise = workload.pipe.noise(1, torch.Generator("cpu").manual_seed(3 + 2))
    third = {name: c[2:3] for name, c in workload.contexts.items()}
    alone = workload.pipe.denoise(third, noise, STEPS, 5.0)
    torch.testing.assert_close(latents[:1], alone, atol=1e-5, rtol=1e-4)


def test_rows_of_a_doubled_call_become_the_branches_of_a_sample(case) -> None:
    """Each half of the batch, watched from outside, against the recorded matrix."""
    spec, workload = case
    model = workload.pipe.transformer
    first = (model.double_blocks if spec is TRANSFORMER_2 else model.blocks)[0]
    last = (model.single_blocks if spec is TRANSFORMER_2 else model.blocks)[-1]
    seen: dict[str, list[torch.Tensor]] = {"in": [], "mid": [], "joined": [], "out": []}
    tensor = lambda x: x[0] if isinstance(x, tuple) else x  # noqa: E731
    handles = [
        first.register_forward_pre_hook(
            lambda _m, a, kw: seen["in"].append(a[0] if a else kw[spec.blocks[0].streams[0]]),
            with_kwargs=True,
        ),
        last.register_forward_hook(lambda _m, _a, out: seen["out"].append(tensor(out))),
    ]
    if spec is TRANSFORMER_2:  # two stretches of blocks: before and after the streams are joined
        handles += [
            model.double_blocks[-1].register_forward_hook(lambda _m, _a, out: seen["mid"].append(out[0])),
            model.single_blocks[0].register_forward_pre_hook(
                lambda _m, a, kw: seen["joined"].append(a[0] if a else kw["x"]), with_kwargs=True
            ),
        ]
    try:
        with torch.no_grad():
            workload.run(1)
    finally:
        for handle in handles:
            handle.remove()
    if spec is TRANSFORMER_2:
        deltas = [
            torch.cat([(m - i).flatten(1), (o - j).flatten(1)], dim=1)
            for i, m, j, o in zip(seen["in"], seen["mid"], seen["joined"], seen["out"], strict=True)
        ]
    else:
        deltas = [(o - i).flatten(1) for i, o in zip(seen["in"], seen["out"], strict=True)]
    halves = [d[:ROWS] for d in deltas] + [d[ROWS:] for d in deltas]  # branch-major
    stacked = torch.stack(halves, dim=1).double()
    gram = torch.einsum("rkx,rlx->rkl", stacked, stacked) / stacked.shape[2]
    elastic = Elastic(model, spec)
    try:
        recorded = record(elastic, workload)
    finally:
        elastic.detach()
    assert recorded.gram.shape == (4, 2 * STEPS, 2 * STEPS)
    assert recorded.gram[ROWS:] == pytest.approx(gram.numpy(), rel=1e-3, abs=1e-7)
    assert not np.allclose(recorded.gram[:, :STEPS, :STEPS], recorded.gram[:, STEPS:, STEPS:], rtol=1e-3)
    moments = first_moments(recorded, workload.branches, 5.0)
    assert moments.branches == ("cond", "uncond") and moments.mixing.tolist() == [5.0, -4.0]
    assert recorded.times == sorted(recorded.times), "time rises from noise to data"


def test_both_rows_of_a_sample_probe_the_same_step_with_their_own_weights(case) -> None:
    spec, workload = case
    elastic = Elastic(workload.pipe.transformer, spec)
    try:
        moments = first_moments(record(elastic, workload), workload.branches, 5.0)
        planner = Planner(moments)
        policy = ProbePolicy([2, 4], planner)
        weights = {}
        decide = policy.decide

        def watched(call, logits):
            decision = decide(call, logits)
            weights[call.step] = decision.weights
            return decision

        policy.decide = watched  # type: ignore[method-assign]
        with torch.no_grad(), elastic.scope(policy=policy, num_steps=STEPS, samples=ROWS) as trace:
            workload.run(0)
    finally:
        elastic.detach()
    for call in trace.calls:
        for row, step in enumerate([2, 4, 2, 4]):
            assert (call.actions[row] == (REUSE if call.step == step else FULL)).all()
    for branch in (0, 1):
        assert weights[4][1 + 2 * branch, 0] == pytest.approx(planner.weights(branch, 4, (3, 2, 1)), rel=1e-5)
    assert len(trace.spent) == ROWS


def test_a_bundle_of_a_mesh_model_keeps_budgets(case, tmp_path: Path) -> None:
    spec, workload = case
    bundle = fit(workload.pipe.transformer, spec, workload, "random", 5.0, FitSettings(probes=16, tried=ROWS))
    gain = bundle.moments.gain
    assert gain[-1] < 1e-5 * gain[:-1].min(), "the published schedule ends with a step of size 0"
    bundle.min_budget = 0.3
    bundle.save(tmp_path / "b")
    loaded = routers.load_bundle(tmp_path / "b")
    assert loaded.moments.branches == ("cond", "uncond")
    rows = evaluate(workload.pipe.transformer, loaded, workload, [0.5, 0.75, 1.0])
    # the partial step lands on a whole block: half the dearest one of one step in six
    assert all(abs(row.spent - row.budget) < 0.06 for row in rows)
    assert rows[0].spent_low == pytest.approx(rows[0].spent_high, abs=0.02)
    assert rows[2].snr > 80 > rows[1].snr > rows[0].snr > 0
    assert rows[0].predicted < rows[1].predicted and rows[2].predicted is None


def test_rows_of_a_doubled_call_use_the_weights_of_their_branch(case) -> None:
    spec, workload = case
    bundle = fit(workload.pipe.transformer, spec, workload, "random", 5.0, FitSettings(probes=8, tried=ROWS))
    policy = bundle.policy()
    elastic = routers.attach(workload.pipe.transformer, bundle, budget=0.5)
    used = []
    decide = policy.decide

    def watched(call, logits):
        decision = decide(call, logits)
        used.append((call.parts, decision.weights, (decision.actions == REUSE).all(axis=1)))
        return decision

    policy.decide = watched  # type: ignore[method-assign]
    try:
        with torch.no_grad(), elastic.scope(policy=policy, num_steps=STEPS, samples=ROWS):
            workload.run(0)
    finally:
        elastic.detach()
    assert all(parts == 2 for parts, _, _ in used)
    reused = [weights for _, weights, all_reused in used if all_reused.all()]
    assert reused, "half of the steps are predicted"
    assert all(np.array_equal(w[0], w[1]) and np.array_equal(w[2], w[3]) for w in reused)
    assert any(not np.allclose(w[0], w[2], rtol=1e-3) for w in reused)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_there_is_one_branch(guidance: float) -> None:
    workload = make_workload("2.0", guidance)
    assert workload.branches == ("main",)
    elastic = Elastic(workload.pipe.transformer, TRANSFORMER_2)
    try:
        recorded = record(elastic, workload)
    finally:
        elastic.detach()
    assert recorded.gram.shape == (4, STEPS, STEPS)


@pytest.mark.slow
def test_edit_calibrate_then_generate_3d(edit, mesh_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for colour in ("red", "blue"):
        picture(colour).save(tmp_path / "pictures" / f"{colour}.png")
    ran = edit(
        "calibrate", "-m", mesh_folder, "--images", "pictures", "-o", "b", "--samples", "4", "--probes", "8",
        "--budgets", "0.5:1:3", "--batch-size", "2", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert [row["budget"] for row in ran.json["quality"]] == [0.5, 0.75, 1.0]
    described = json.loads((tmp_path / "b" / "bundle.json").read_text())
    assert described["branches"] == ["cond", "uncond"] and described["metadata"]["images"] == 2
    assert not list(tmp_path.glob(".*.calibrate-state")), "the state is removed on success"
    ran = edit(
        "generate-3d", "pictures/red.png", "-m", mesh_folder, "--routers", "b", "-b", "0.6", "-o", "red.glb",
        "--steps", "8", "--seed", "3", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["spent"][0] == pytest.approx(0.6, abs=0.05)
    assert ran.json["decisions"]["reuse"] > 0

"""Calibration of both Hunyuan3D transformers, whose guidance runs as one doubled batch."""

from __future__ import annotations

import json
from pathlib import Path

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
from routers.calibrate.fit import FitSettings, fit
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


def test_a_bundle_of_a_mesh_model_keeps_budgets(case, tmp_path: Path) -> None:
    """Both rows of a doubled call come together before the sampler sees them, so one plan serves both."""
    spec, workload = case
    bundle = fit(workload.pipe.transformer, spec, workload, "random", 5.0)
    assert bundle.times[-2:] == [0, 0], "the published schedule ends with a step of size 0"
    assert sorted(bundle.plans["dense"]) == [1, 2, 3, 4, 5]
    bundle.save(tmp_path / "b")
    loaded = routers.load_bundle(tmp_path / "b")
    rows = evaluate(loaded, workload, [0.5, 5 / 6, 1.0])
    assert [row.spent for row in rows] == pytest.approx([0.5, 5 / 6, 1.0])
    assert rows[0].spent_low == rows[0].spent_high
    # the last step goes nowhere: five of six evaluations are the whole run
    assert rows[2].snr > 80 and rows[1].snr > 80 > rows[0].snr > 10


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance_there_is_one_branch(guidance: float) -> None:
    workload = make_workload("2.0", guidance)
    assert workload.branches == ("main",)
    settings = FitSettings(budgets=(0.5,))
    bundle = fit(workload.pipe.transformer, TRANSFORMER_2, workload, "random", guidance, settings)
    assert [*bundle.plans["dense"]] == [3]


@pytest.mark.slow
def test_edit_calibrate_then_generate_3d(edit, mesh_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for colour in ("red", "blue"):
        picture(colour).save(tmp_path / "pictures" / f"{colour}.png")
    ran = edit(
        "calibrate", "-m", mesh_folder, "--images", "pictures", "-o", "b", "--samples", "2", "--steps", "8",
        "--budgets", "0.5:1:3", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert [row["budget"] for row in ran.json["quality"]] == [0.5, 0.75, 1.0]
    described = json.loads((tmp_path / "b" / "bundle.json").read_text())
    assert described["num_steps"] == 8 and described["metadata"]["images"] == 2
    assert not list(tmp_path.glob(".*.calibrate-state")), "the state is removed on success"
    ran = edit(
        "generate-3d", "pictures/red.png", "-m", mesh_folder, "--routers", "b", "-b", "0.75", "-o", "red.glb",
        "--steps", "8", "--seed", "3", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert (ran.json["spent"], ran.json["evaluations"]) == ([0.75], {"made": 6, "dense": 8})
    assert "notes" not in ran.json

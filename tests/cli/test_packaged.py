"""What a user gets from the packaged models: recognisable pictures and meshes, near the asked budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image, ImageDraw

from backbones.spec import PACKAGE_FOLDER
from backbones.tiny.recipes.shapes.dataset import BOX
from backbones.tiny.recipes.shapes.silhouettes import outline_iou, wanted_silhouette, with_alpha
from benchmarks.classifier import load_classifier

PROMPTS = {"a cat": "cat", "a red car": "car", "a pizza": "pizza", "a rocket": "rocket", "a heart": "heart"}
BOX_SIDE = 96  # px of the compared outlines


@pytest.mark.parametrize("model", ["qwen-image-tiny", pytest.param("flux-tiny", marks=pytest.mark.slow)])
def test_pictures_show_what_was_asked_for(edit_here, model, tmp_path):
    options = ("-m", model, "--budget", "0.6", "-o", "{prompt}.png", "--json")
    ran = edit_here("generate", *PROMPTS, *options, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert all(abs(spent - 0.6) <= 0.01 for spent in ran.json["spent"])
    pictures = [Image.open(tmp_path / name) for name in ran.json["outputs"]]
    guesses = load_classifier().top_k(pictures, 5)
    seen = [word in guess for word, guess in zip(PROMPTS.values(), guesses, strict=True)]
    assert sum(seen) >= len(seen) - 1, guesses


def silhouette(mesh: trimesh.Trimesh) -> np.ndarray:
    """What the viewer sees of a mesh in the box, from the front: (side, side) bool, top row first."""
    flat = mesh.triangles[:, :, :2] * (1, -1)
    corners = (flat / BOX + 1) / 2 * (BOX_SIDE - 1)
    picture = Image.new("1", (BOX_SIDE, BOX_SIDE))
    draw = ImageDraw.Draw(picture)
    for triangle in corners:
        draw.polygon([tuple(corner) for corner in triangle], fill=1)
    return np.asarray(picture)


def test_from_a_prompt_to_a_mesh(edit_here, tmp_path: Path):
    drawn = edit_here("generate", "a cat", "--budget", "0.6", "-o", "cat.png", "--quiet", cwd=tmp_path)
    assert drawn.code == 0, drawn.err
    options = ("--budget", "0.6", "--octree-resolution", "96", "-o", "cat.glb", "--json")
    made = edit_here("generate-3d", "cat.png", *options, cwd=tmp_path)
    assert made.code == 0, made.err
    assert made.json["model"] == "hunyuan3d-tiny"
    assert made.json["spent"][0] == pytest.approx(0.6, abs=0.01)
    assert made.json["watertight"] == [True]
    mesh = trimesh.load(tmp_path / "cat.glb", force="mesh")
    wanted = wanted_silhouette(with_alpha(Image.open(tmp_path / "cat.png")), BOX_SIDE)
    assert outline_iou(silhouette(mesh), wanted) >= 0.8


def test_models_lists_what_is_packaged(edit_here, tmp_path):
    ran = edit_here("models", "--json", cwd=tmp_path)
    packaged = [row["name"] for row in ran.json["models"] if row["packaged"]]
    turbo = ["flux-tiny-turbo"] if (PACKAGE_FOLDER / "tiny" / "flux_tiny_turbo").is_dir() else []
    assert packaged == ["qwen-image-tiny", "flux-tiny", *turbo, "hunyuan3d-tiny"]

"""Every export format goes round for every packaged model: written, loaded again, used."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

pytestmark = pytest.mark.slow
MODELS = ("qwen-image-tiny", "flux-tiny", "hunyuan3d-tiny")


@pytest.fixture
def used(edit, tmp_path: Path):
    """Generate with exported files: `used(*options)` -> the JSON object."""

    def run(model: str, *options: str) -> dict:
        command = ["generate", "a cat", "-o", "cat.png"]
        if model == "hunyuan3d-tiny":
            picture = Image.new("RGBA", (64, 64))
            ImageDraw.Draw(picture).ellipse((12, 8, 52, 56), fill="red")
            picture.save(tmp_path / "ball.png")
            command = ["generate-3d", "ball.png", "--octree-resolution", "32", "-o", "ball.glb"]
        ran = edit(*command, *options, "--json", cwd=tmp_path)
        assert ran.code == 0, ran.err
        return ran.json

    return run


@pytest.mark.parametrize("model", MODELS)
def test_routers_in_one_file(edit, used, model, tmp_path):
    ran = edit("export", model, "--format", "bundle", "-o", "routers", "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    made = used(model, "-m", model, "--routers", "routers", "-b", "0.5")
    assert made["spent"][0] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("model", MODELS)
def test_a_folder_for_stock_libraries(edit, used, model, tmp_path):
    ran = edit("export", model, "--format", "diffusers", "-o", "plain", "--json", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert ran.json["difference"] <= 1e-5
    assert used(model, "-m", "plain", "-b", "0.5")["spent"][0] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("model", MODELS)
def test_a_smaller_model_and_its_program(edit, used, model, tmp_path):
    options = ("--format", "static", "--budget", "0.8", "-o", "small", "--json")
    ran = edit("export", model, *options, cwd=tmp_path)
    assert ran.code == 0, ran.err
    rows = {row["variant"]: row for row in ran.json["measured"]}
    assert ran.json["flops"] == pytest.approx(0.8, abs=0.03)
    assert rows["static"]["snr"] > 5
    assert used(model, "-m", "small")["spent"] == [1.0]
    options = ("--format", "torch-export", "--budget", "1", "-o", "program", "--json")
    ran = edit("export", "small", *options, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert ran.json["difference"] <= 1e-4
    assert (tmp_path / "program" / "transformer.pt2").is_file()

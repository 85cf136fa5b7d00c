"""A mesh of a red car is red: colours from the picture, in the file and in the preview."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from edit_cli.generation.colours import colour, linear
from edit_cli.generation.turntable import turntable


def halves(left: str, right: str, side: int = 96) -> Image.Image:
    """A square of two colours on nothing."""
    picture = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    picture.paste(left, (side // 4, side // 4, side // 2, 3 * side // 4))
    picture.paste(right, (side // 2, side // 4, 3 * side // 4, 3 * side // 4))
    return picture


@pytest.fixture
def ball() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=4)


def at(mesh: trimesh.Trimesh, *place: float) -> list[int]:
    """The colour of the vertex next to a place."""
    nearest = np.linalg.norm(mesh.vertices - np.array(place), axis=1).argmin()
    return np.asarray(mesh.visual.vertex_colors)[nearest, :3].tolist()


def test_colours_are_the_pictures_on_both_sides_and_mixed_between(ball):
    before = ball.vertices.copy()
    colour(ball, {"front": halves("red", "blue")})
    for z in (0.8, -0.8):  # x right as in the picture, seen from the front and through to the back
        assert at(ball, -0.6, 0, z) == [255, 0, 0] and at(ball, 0.6, 0, z) == [0, 0, 255]
    red, green, blue = at(ball, 0.05, 1, 0)
    assert min(red, blue) > 60 and green == 0, "edge on, colours are mixed; the background never is"
    assert (ball.vertices == before).all()


def test_a_picture_of_the_back_colours_the_back(ball):
    colour(ball, {"front": halves("red", "red"), "back": halves("lime", "blue")})
    assert at(ball, -0.6, 0, 0.8) == [255, 0, 0]
    assert at(ball, 0.6, 0, -0.8) == [0, 255, 0], "seen from behind, x runs to the left"


def test_colours_are_linear_in_a_glb_and_in_the_preview(ball):
    colour(ball, {"front": halves("#808080", "#808080")})
    assert at(ball, 0, 0, 1) == [128] * 3 and at(linear(ball), 0, 0, 1) == [55] * 3
    colour(ball, {"front": halves("red", "red")})
    middle = np.asarray(turntable(ball, 64))[32, 32]
    assert middle[0] > 100 and middle[1] < 10


def tree(file: Path) -> dict:
    data = file.read_bytes()
    (length,) = struct.unpack("<I", data[12:16])
    return json.loads(data[20 : 20 + length])


def test_files_have_colours_and_a_matte_material(edit_here, mesh_folder, tmp_path):
    halves("red", "red").save(tmp_path / "red.png")
    made = ["-m", mesh_folder, "--octree-resolution", "16", "--steps", "2", "-b", "1", "-q"]
    for suffix in ("glb", "ply"):
        ran = edit_here("generate-3d", "red.png", "-o", f"red.{suffix}", *made, cwd=tmp_path)
        assert ran.code == 0, ran.err
    found = tree(tmp_path / "red.glb")
    (material,) = found["materials"]
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0
    primitives = [primitive for mesh in found["meshes"] for primitive in mesh["primitives"]]
    assert all(p["material"] == 0 and "COLOR_0" in p["attributes"] for p in primitives)
    ply = trimesh.load(tmp_path / "red.ply", process=False)
    glb = trimesh.load(tmp_path / "red.glb", force="mesh", process=False)
    assert (np.asarray(ply.visual.vertex_colors) == [255, 0, 0, 255]).all()
    assert len(ply.vertices) == len(glb.vertices)

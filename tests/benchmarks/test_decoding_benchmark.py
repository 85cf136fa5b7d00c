"""The decoding benchmark runs on a mesh folder, and its distance measures."""

import numpy as np
import pytest
import trimesh

from benchmarks import decoding
from tests.cli.test_calibrate_mesh import picture


def test_distance_of_two_spheres_is_the_difference_of_their_radii():
    a, b = (trimesh.creation.icosphere(4, radius) for radius in (0.5, 0.6))
    assert decoding.mesh_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert decoding.mesh_distance(a, b) == pytest.approx(0.1 / 2.02, rel=0.02)


def test_both_ways_of_decoding_are_measured(mesh_folder, tmp_path, capsys):
    for i, colour in enumerate(("red", "blue", "green", "black")):
        picture(colour).save(tmp_path / f"{i}.png")
    arguments = ["-m", str(mesh_folder), "--images", str(tmp_path), "--count", "2", "--rounds", "1"]
    assert decoding.main([*arguments, "--resolutions", "20", "24", "--steps", "2", "--markdown"]) == 0
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == list(decoding.HEADERS)
    assert len(rows) == 2
    found = [row.strip("|").split("|") for row in rows]
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in found)
    assert np.allclose([float(row[5]) for row in found], 0, atol=1e-3)  # small grids: the same points

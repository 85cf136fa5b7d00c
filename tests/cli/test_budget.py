"""A budget without anything calibrated: any model, both targets, solvers; made again from its record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from edit_cli.generation.record import read_picture
from tests.cli.test_cli_both import draw_objects
from tests.conftest import _once
from tests.tiny_zoo import MAKE


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    draw_objects(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """`zoo(name)` -> a folder of a model that nothing was written for."""
    return lambda name: _once(tmp_path_factory, f"zoo-{name}", MAKE[name])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


FAMILIES = {
    "qwen_folder": ("generate", "a cat", "--routers", "none"),
    "flux_folder": ("generate", "a cat", "--routers", "none"),
    "mesh_folder": ("generate-3d", "cat.png", "--routers", "none", "--octree-resolution", "24"),
    "sd3": ("generate", "a cat"),
    "wan": ("generate", "a cat", "--frames", "5", "-o", "cat.gif"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_any_model_keeps_a_budget_that_nobody_calibrated(name, request, zoo, edit_here, desk):
    folder = zoo(name) if name in MAKE else request.getfixturevalue(name)
    words = [*FAMILIES[name], "-m", folder, "--steps", "6", "-b", "0.5", "--json", "-q"]
    ran = edit_here(*words, cwd=desk)
    assert ran.code == 0, ran.err
    assert ran.json["spent"] == [0.5]
    made, dense = ran.json["evaluations"].values()
    assert (made, dense) == (3, 6) or (name == "wan" and 2 * made == dense)
    assert ran.json["flops"]["spent"] == pytest.approx(0.5 * ran.json["flops"]["dense"])
    assert (desk / ran.json["outputs"][0]).is_file()
    assert "notes" not in ran.json


def test_a_budget_that_whole_evaluations_miss_says_what_it_bought(qwen_folder, edit_here, desk):
    words = ["generate", "a cat", "--routers", "none", "-m", qwen_folder, "--steps", "5", "--json"]
    ran = edit_here(*words, "-b", "0.5", cwd=desk)
    assert ran.code == 0, ran.err
    note = "a budget of 0.5 buys 2 of 5 evaluations, which is 0.40 of the dense FLOPs"
    assert (ran.json["notes"], ran.json["spent"]) == ([note], [0.4])
    assert note in " ".join(ran.err.split())
    assert "notes" not in edit_here(*words, "-b", "0.4", cwd=desk).json


def test_the_exact_target_comes_nearer_to_the_exact_solution_than_all_steps(qwen_folder, edit_here, desk):
    words = ["generate", "a cat", "--routers", "none", "-m", qwen_folder, "--steps", "8", "--json", "-q"]
    ran = edit_here(*words, "--target", "exact", "--compare", "exact", "-o", "exact.png", cwd=desk)
    assert ran.code == 0, ran.err
    assert (ran.json["spent"], ran.json["evaluations"]) == ([1.0], {"made": 8, "dense": 8})
    compare = ran.json["compare"]
    assert compare["psnr"][0] > compare["dense_psnr"][0]
    assert read_picture(desk / "exact.png")["target"] == "exact"


def test_a_target_is_replayed_and_stands_in_lines(qwen_folder, edit_here, desk):
    words = ["-m", qwen_folder, "--steps", "8", "-b", "0.5", "--json", "-q"]
    lines = [
        {"prompt": "a cat", "target": "exact", "output": "aimed.png"},
        {"prompt": "a cat", "output": "usual.png"},
    ]
    ran = edit_here("generate", "--prompts", "-", *words, cwd=desk, stdin="\n".join(map(json.dumps, lines)))
    assert ran.code == 0, ran.err
    exact, dense = (desk / name for name in ran.json["outputs"])
    assert [read_picture(path)["target"] for path in (exact, dense)] == ["exact", None]
    assert (pixels(exact) != pixels(dense)).any()
    for options, same in (((), exact), (("--target", "dense"), dense)):
        again = edit_here(
            "generate", "--from", exact.name, *options, "-o", "again.png", "--overwrite", cwd=desk
        )
        assert again.code == 0, again.err
        np.testing.assert_array_equal(pixels(desk / "again.png"), pixels(same))
        assert read_picture(desk / "again.png")["budget"] == 0.5
    bad = edit_here("generate", "--prompts", "-", *words, cwd=desk, stdin='{"prompt": "a", "target": "near"}')
    assert (bad.code, bad.err.split("; ")[0]) == (2, "error: stdin line 1: target 'near' is unknown")


@pytest.mark.parametrize("solver", ["euler", "ab2", "dpm++2m"])
def test_a_solver_with_a_budget_makes_fewer_steps_at_the_models_own_times(
    solver, qwen_folder, edit_here, desk
):
    words = ["generate", "a cat", "-m", qwen_folder, "--solver", solver, "--json", "-q"]
    half = edit_here(*words, "--steps", "8", "-b", "0.5", "-o", "half.png", cwd=desk)
    assert half.code == 0, half.err
    assert half.json["evaluations"] == {"made": 4, "dense": 8}
    few = edit_here(*words, "--steps", "4", "-b", "1", "-o", "few.png", cwd=desk)
    assert few.code == 0, few.err
    assert np.abs(pixels(desk / "half.png") - pixels(desk / "few.png")).max() <= 1


def test_a_solver_with_a_budget_makes_fewer_steps_of_a_mesh(mesh_folder, edit_here, desk):
    """The last of a mesh sampler's steps goes nowhere, and no budget is spent on it."""
    words = ["generate-3d", "cat.png", "-m", mesh_folder, "--solver", "ab2", "--octree-resolution", "24"]
    for name, options in (("half", "--steps 8 -b 0.5"), ("few", "--steps 5 -b 1")):
        ran = edit_here(*words, *options.split(), "-o", f"{name}.glb", "-q", cwd=desk)
        assert ran.code == 0, ran.err
    half, few = (
        trimesh.load(desk / f"{name}.glb", force="mesh", process=False).vertices for name in ("half", "few")
    )
    np.testing.assert_allclose(half, few, atol=1e-3)


def test_a_run_from_a_picture_keeps_its_strength_and_its_budget(qwen_folder, flux_folder, edit_here, desk):
    """The share is of the steps that the run would make; all of them leave the picture that no plan makes."""
    start = desk / "start.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(start)
    for folder in (qwen_folder, flux_folder):
        words = [
            "generate",
            "a cat",
            "--image",
            start,
            "--strength",
            "0.5",
            "--routers",
            "none",
            "-m",
            folder,
        ]
        whole = edit_here(
            *words, "--steps", "8", "-b", "1", "-o", "whole.png", "--json", "-q", "--overwrite", cwd=desk
        )
        ran = edit_here(
            *words, "--steps", "8", "-b", "0.5", "-o", "half.png", "--json", "-q", "--overwrite", cwd=desk
        )
        assert ran.code == 0, ran.err
        assert whole.json["evaluations"] == {"made": 4, "dense": 4}
        assert ran.json["evaluations"] == {"made": 2, "dense": 4}
        far = np.abs(pixels(desk / "whole.png") - pixels(start)).mean()
        assert np.abs(pixels(desk / "half.png") - pixels(desk / "whole.png")).mean() < far


def test_a_bundle_that_does_not_serve_a_run_from_a_picture_says_so(qwen_folder, edit_here, desk):
    """Its plans were fitted for runs from noise."""
    words = ["generate", "a cat", "-m", qwen_folder, "--steps", "4", "-b", "0.5", "--json", "-q", "-o"]
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(desk / "start.png")
    assert "notes" not in edit_here(*words, "noise.png", cwd=desk).json
    ran = edit_here(*words, "half.png", "--image", "start.png", "--strength", "0.5", cwd=desk)
    assert ran.code == 0, ran.err
    assert ran.json["notes"] == ["calibrated at 4 steps; at 2 the plan is the one that needs no calibration"]


def test_a_mesh_is_compared_with_the_exact_one(mesh_folder, edit_here, desk):
    words = ["generate-3d", "cat.png", "-m", mesh_folder, "--steps", "6", "--octree-resolution", "24"]
    ran = edit_here(*words, "-b", "0.5", "--target", "exact", "--compare", "exact", "--json", cwd=desk)
    assert ran.code == 0, ran.err
    compare = ran.json["compare"]
    assert compare["outputs"] == ["cat-exact.glb"] and (desk / "cat-exact.glb").is_file()
    assert 0 < compare["iou"][0] <= 1 and 0 < compare["dense_iou"][0] <= 1


def test_a_video_model_is_calibrated_and_profiled(zoo, edit_here, desk):
    wan, quick = zoo("wan"), ("--steps", "4", "--budgets", "0.5", "--samples", "1", "--json")
    made = edit_here("calibrate", "-m", wan, "-o", "b", *quick, cwd=desk)
    assert made.code == 0, made.err
    (row,) = made.json["quality"]
    assert (row["spent"], row["snr"] > 10) == (0.5, True)
    ran = edit_here("profile", "a cat", "-m", wan, "--routers", "b", "-b", "0.5", "--steps", "4", "--repeats",
                    "1", "--json", cwd=desk)  # fmt: skip
    assert ran.code == 0, ran.err
    assert [run["spent"] for run in ran.json["runs"]] == [1.0, 0.5]

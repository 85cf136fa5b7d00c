"""`--observe BUNDLE` (`--learn`): the first result with all steps, and the rest with what that run taught."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edit_cli.generation.record import read_picture
from tests.cli.test_budget import desk, pixels  # noqa: F401 - a fixture

WORDS = ("--steps", "12", "--json", "-q")
PROMPTS = ("a cat", "a dog", "a red star")


@pytest.fixture(scope="module")
def learnt(edit_here, qwen_folder, tmp_path_factory):
    """Three prompts at half of the budget, the first of which teaches the others."""
    folder = tmp_path_factory.mktemp("learn")
    asked = ["generate", *PROMPTS, "-m", qwen_folder, "-b", "0.5", *WORDS, "--learn", "bundle", "-o", "out/"]
    ran = edit_here(*asked, "--batch-size", "2", cwd=folder)
    assert ran.code == 0, ran.err
    return folder, asked, ran.json


def test_the_first_is_dense_and_teaches_the_others(learnt, edit_here, qwen_folder, tmp_path):
    folder, _, report = learnt
    assert report["spent"] == [1.0, 0.5, 0.5] and report["budget"] == [1.0, 0.5, 0.5]
    assert report["notes"] == ["bundle holds what the dense run of 1 taught; use it with --routers bundle"]
    described = json.loads((folder / "bundle" / "bundle.json").read_text())
    assert described["metadata"]["method"] == "observe" and described["num_steps"] == 12
    dense = edit_here(
        "generate", *PROMPTS, "-m", qwen_folder, "-b", "1", *WORDS, "-o", "dense/", "--batch-size", "1",
        cwd=tmp_path,
    )  # fmt: skip
    plain = edit_here(
        "generate", *PROMPTS, "-m", qwen_folder, "--routers", "none", "-b", "0.5", *WORDS, "-o", "plain/",
        cwd=tmp_path,
    )  # fmt: skip
    assert dense.code == plain.code == 0, dense.err + plain.err
    for name, taught in (("a-cat", False), ("a-dog", True), ("a-red-star", True)):
        target = pixels(tmp_path / "dense" / f"{name}.png")
        ours = np.abs(pixels(folder / "out" / f"{name}.png") - target).mean()
        assert ours == 0 or (
            taught and ours < np.abs(pixels(tmp_path / "plain" / f"{name}.png") - target).mean()
        )


def test_a_picture_that_was_taught_is_made_again_from_its_record(learnt, edit_here, tmp_path):
    folder, _, _ = learnt
    dog = folder / "out" / "a-dog.png"
    record = read_picture(folder / "out" / "a-dog.png")
    assert record["routers"] == str((folder / "bundle").resolve()) and record["budget"] == 0.5
    assert read_picture(folder / "out" / "a-cat.png")["routers"] == "none"
    again = edit_here("generate", "--from", dog, "-o", "again.png", "-q", cwd=tmp_path)
    assert again.code == 0, again.err
    np.testing.assert_array_equal(pixels(dog), pixels(tmp_path / "again.png"))


def test_a_bundle_that_is_there_stays(learnt, edit_here):
    folder, asked, _ = learnt
    before = (folder / "bundle" / "bundle.json").read_bytes()
    refused = edit_here(*asked, cwd=folder)
    assert refused.code == 2 and "--observe 'bundle' exists" in " ".join(refused.err.split())
    assert (folder / "bundle" / "bundle.json").read_bytes() == before


def test_meshes_at_budget_one_are_watched(edit_here, mesh_folder, desk):  # noqa: F811
    ran = edit_here(
        "generate-3d", "cat.png", "-m", mesh_folder, "-b", "1", "--octree-resolution", "24",
        "--observe", "mesh-bundle", "-o", "cat.glb", *WORDS, cwd=desk,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    again = edit_here(
        "generate-3d", "cat.png", "-m", mesh_folder, "-b", "0.5", "--octree-resolution", "24",
        "--routers", "mesh-bundle", "-o", "half.glb", *WORDS, cwd=desk,
    )  # fmt: skip
    assert again.code == 0 and again.json["spent"] == [0.5] and "notes" not in again.json, again.err


BAD = {
    "routers": (("--routers", "somewhere"), "--routers 'somewhere' does not exist"),
    "time": (("--time", "5s"), "not with --time"),
    "exact": (("--target", "exact"), "not with --target exact"),
    "solver": (("--solver", "ab2"), "not with --solver"),
    "ray": (("--engine", "ray"), "not with --engine ray"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_it_does_not_go_together_with(name, edit_here, qwen_folder, tmp_path):
    words, message = BAD[name]
    ran = edit_here("generate", "a cat", "-m", qwen_folder, "--observe", "bundle", *words, cwd=tmp_path)
    assert ran.code == 2 and message in " ".join(ran.err.split())
    assert not (tmp_path / "bundle").exists()


def test_it_is_offered_for_many_results(edit_here, qwen_folder, tmp_path):
    words = [
        "-m",
        qwen_folder,
        "--routers",
        "none",
        "-b",
        "0.25",
        "--steps",
        "4",
        "--json",
        "-q",
        "-o",
        "out/",
    ]
    many = edit_here("generate", "a cat", "-n", "8", *words, cwd=tmp_path)
    assert "--learn BUNDLE makes the first of many with all steps" in many.json["notes"][0]
    few = edit_here("generate", "a cat", "-n", "2", *words, cwd=tmp_path)
    assert "notes" not in few.json

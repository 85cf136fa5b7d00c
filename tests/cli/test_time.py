"""`--time`: by a clock that goes on a tenth of a second whenever it is read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trimesh
from PIL import Image

from edit_cli.generation.record import read_mesh, read_picture
from routers.planned import seconds
from tests.cli.test_cli_both import draw_objects


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Read once for each evaluation, twice before the first, and once at the end of a run."""
    ticks = itertools.count()
    monkeypatch.setattr(seconds, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


def words(folder, *more):
    return ["generate", "a cat", "-m", folder, "--steps", "8", "--json", "-o", "cat.png", *more]


@pytest.mark.parametrize("solver", [(), ("--solver", "ab2")])
def test_a_picture_that_ends_in_time_is_made_again_from_its_record(solver, qwen_folder, edit_here, tmp_path):
    ran = edit_here(*words(qwen_folder, "--time", "800ms", *solver), cwd=tmp_path)
    assert ran.code == 0, ran.err
    (took,) = ran.json["time"]["spent"]
    assert ran.json["time"]["asked"] == 0.8 and 0.6 <= took <= 0.8
    made, dense = ran.json["evaluations"].values()
    assert 3 <= made < dense == 8 and ran.json["budget"] == made / dense
    assert "took" not in "".join(ran.json.get("notes", []))
    record = read_picture(tmp_path / "cat.png")
    assert record["budget"] == made / dense and "time" not in record
    for options in (), ("--budget", str(made / dense)):
        again = edit_here("generate", "--from", "cat.png", "-o", "again.png", *options, cwd=tmp_path)
        assert again.code == 0, again.err
        if not options or "turns" not in record:
            np.testing.assert_array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "cat.png"))
    if not solver:
        plain = words(qwen_folder, "--time", "0.8s")
        plain.remove("--json")
        assert "0.8 s for each, took 0." in edit_here(*plain, cwd=tmp_path).out


def test_a_plan_that_was_chosen_on_the_way_is_followed_again(qwen_folder, edit_here, tmp_path, monkeypatch):
    """Evaluations become slower after the third."""
    ticks = itertools.accumulate(itertools.chain([0.1] * 12, itertools.repeat(0.25)))
    monkeypatch.setattr(seconds, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    ran = edit_here(*words(qwen_folder, "--time", "1.2"), cwd=tmp_path)
    assert ran.code == 0, ran.err
    record = read_picture(tmp_path / "cat.png")
    assert len(record["turns"]) > 1
    for name, options in (("same", ()), ("other", ("--budget", "0.75"))):
        again = edit_here("generate", "--from", "cat.png", "-o", f"{name}.png", *options, cwd=tmp_path)
        assert again.code == 0, again.err
    np.testing.assert_array_equal(pixels(tmp_path / "same.png"), pixels(tmp_path / "cat.png"))
    assert read_picture(tmp_path / "same.png")["turns"] == record["turns"]
    assert "turns" not in read_picture(tmp_path / "other.png")


def test_a_mesh_ends_in_time(mesh_folder, edit_here, tmp_path):
    draw_objects(tmp_path)
    asked = [
        "generate-3d",
        "cat.png",
        "-m",
        mesh_folder,
        "--steps",
        "8",
        "--octree-resolution",
        "24",
        "--json",
    ]
    ran = edit_here(*asked, "--time", "0.75s", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert ran.json["time"]["spent"][0] <= 0.75 and 3 <= ran.json["evaluations"]["made"] < 8
    assert "time" not in read_mesh(tmp_path / "cat.glb")
    again = edit_here("generate-3d", "--from", "cat.glb", "-o", "again.glb", cwd=tmp_path)
    assert again.code == 0, again.err
    shapes = [trimesh.load(tmp_path / f"{name}.glb", force="mesh").vertices for name in ("cat", "again")]
    np.testing.assert_array_equal(*shapes)
    refused = edit_here(*asked, "--time", "100ms", cwd=tmp_path)
    assert refused.code == 2 and "less than the least possible, about" in " ".join(refused.err.split())


def test_lines_have_times_of_their_own_and_a_batch_has_the_time_of_its_pictures(
    qwen_folder, edit_here, tmp_path
):
    lines = [
        {"prompt": "a cat", "time": "700ms"},
        {"prompt": "a dog", "time": 0.7},
        {"prompt": "a cow", "budget": 0.25, "time": "1m"},
        {"prompt": "a pig", "budget": 1.0},
    ]
    ran = edit_here(
        "generate", "--prompts", "-", *words(qwen_folder)[2:-2], "--batch-size", "2", cwd=tmp_path,
        stdin="\n".join(map(json.dumps, lines)),
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["time"]["asked"] == [0.7, 0.7, 60.0, None]
    cat, dog, cow, pig = ran.json["time"]["spent"]
    assert cat == dog <= 0.7 and cow > 0 and pig is None
    assert ran.json["spent"][2:] == [0.25, 1.0] and ran.json["spent"][0] == 1.0, "1.4 s for the two of them"


BAD = {
    "unknown unit": (("--time", "5h"), "--time '5h' is no time; write a number with its unit"),
    "nothing": (("--time", "0s"), "--time '0s' is no time"),
    "too little": (("--time", "100ms"), "a time of 0.1 s is less than the least possible, about"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_time_that_cannot_be_kept_is_refused(kind, qwen_folder, edit_here, tmp_path):
    options, message = BAD[kind]
    ran = edit_here(*words(qwen_folder, *options), cwd=tmp_path)
    assert ran.code == 2 and message in " ".join(ran.err.split()), ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("turns", ["far", [[1]], [[0, 9]], [], [[-1, 2]]])
def test_a_record_whose_turns_are_no_plans_is_refused(turns, qwen_folder, edit_here, tmp_path, monkeypatch):
    from edit_cli.generation import picture

    ran = edit_here(*words(qwen_folder, "-b", "0.5"), cwd=tmp_path)
    assert ran.code == 0, ran.err
    record = {**read_picture(tmp_path / "cat.png"), "turns": turns or [[]]}
    monkeypatch.setattr(picture, "read_record", lambda path: record)
    ran = edit_here("generate", "--from", "cat.png", "-o", "again.png", cwd=tmp_path)
    assert ran.code == 2 and "turns are not those of a plan" in " ".join(ran.err.split()), ran.err


def test_a_dry_run_says_what_it_cannot_know(qwen_folder, edit_here, tmp_path):
    asked = words(qwen_folder, "--time", "5s", "--dry-run")
    asked.remove("--json")
    ran = edit_here(*asked, cwd=tmp_path)
    assert ran.code == 0 and "5 s asked for each" in ran.out

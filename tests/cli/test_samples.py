"""What profile, calibrate and export try a model on: chosen by the model, the same way for all commands."""

from __future__ import annotations

import pytest

from edit_cli.errors import EditError
from edit_cli.generation.mesh import MESH
from edit_cli.generation.picture import PICTURE
from edit_cli.generation.samples import medium_of, sample_plan, take
from edit_cli.request import Request
from tests.cli.test_calibrate_mesh import picture


@pytest.fixture
def desk(tmp_path):
    (tmp_path / "pictures").mkdir()
    for colour in ("red", "blue"):
        picture(colour).save(tmp_path / "pictures" / f"{colour}.png")
    return tmp_path


@pytest.mark.parametrize("model", ["tencent/Hunyuan3D-2mini", "hunyuan3d-2mini", "./nowhere", "{folder}"])
def test_one_model_means_the_same_to_every_command(model, desk, edit_here, monkeypatch):
    """A hub id, a registry name, a missing folder and a damaged one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(desk))
    (desk / "damaged").mkdir()
    (desk / "damaged" / "config.yaml").write_text("model: {}\n")
    model = model.replace("{folder}", "damaged")
    image = desk / "pictures" / "red.png"
    errors = set()
    for command in (
        ["generate-3d", image, "-o", "red.glb"],
        ["profile", "--images", image],
        ["calibrate", "--images", "pictures", "-o", "bundle"],
        ["export", model, "--images", "pictures", "--format", "diffusers", "-o", "out"],
    ):
        named = [] if command[0] == "export" else ["-m", model]
        ran = edit_here(*command, *named, cwd=desk)
        assert ran.code == 2
        errors.add(tuple(ran.said))
    assert len(errors) == 1, errors


def test_the_model_decides_what_is_made(qwen_folder, mesh_folder):
    assert medium_of(Request()) is PICTURE
    assert medium_of(Request(images=["a.png"])) is MESH
    assert medium_of(Request(model=str(qwen_folder))) is PICTURE
    assert medium_of(Request(model=str(mesh_folder))) is MESH
    with pytest.raises(EditError, match="--strength is for models that make pictures; leave it out"):
        medium_of(Request(model=str(mesh_folder), strength=0.5))
    with pytest.raises(EditError, match="--faces is for models that make meshes; leave it out"):
        medium_of(Request(model=str(qwen_folder), faces=100))


def test_samples_come_in_turn_with_noise_of_their_own(qwen_folder, desk):
    request = Request(model=str(qwen_folder), prompt=["a cat", "a dog"], seed=[7], output="nowhere/at/all")
    plan = sample_plan(request, PICTURE)
    jobs = take(plan.jobs, 5, 100)
    assert [job.prompt for job in jobs] == ["a cat", "a dog", "a cat", "a dog", "a cat"]
    assert [job.seed for job in jobs] == [100, 101, 102, 103, 104]
    assert PICTURE.identity(jobs[0]) != PICTURE.identity(jobs[1])


def test_without_samples_a_mesh_model_brings_its_own(mesh_folder, desk):
    with pytest.raises(EditError, match="makes meshes from pictures and none were given"):
        sample_plan(Request(model=str(mesh_folder)), MESH)
    plan = sample_plan(Request(model="hunyuan3d-tiny"), MESH)
    assert len(plan.jobs) > 4
    assert len({MESH.identity(job) for job in plan.jobs}) == len(plan.jobs)

"""`edit generate-3d` on a random-weight checkpoint, offline: results, metadata, comparison, bad input."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
import yaml
from PIL import Image, ImageDraw

from edit_cli.generation import mesh as mesh_medium
from edit_cli.generation.cutout import cut_out, open_rgba, read_object
from edit_cli.generation.record import read_mesh as read_record
from edit_cli.generation.turntable import render, turntable, vertex_normals
from tests.hunyuan3d_tiny import CONFIG, save_folder

KEYS = [
    "outputs",
    "model",
    "seeds",
    "budget",
    "spent",
    "flops",
    "seconds",
    "evaluations",
    "faces",
    "vertices",
]
STAGES = ["load", "condition", "denoise", "decode", "extract", "clean", "total"]


def disc(mode: str = "RGBA", background: object = (0, 0, 0, 0), size: int = 48) -> Image.Image:
    picture = Image.new(mode, (size, size), background)
    ImageDraw.Draw(picture).ellipse((10, 8, 38, 40), fill="red" if mode != "L" else 30)
    return picture


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    disc().save(tmp_path / "alpha.png")
    disc("RGB", "white").save(tmp_path / "plain.png")
    return tmp_path


@pytest.fixture(scope="module")
def made(edit_here, mesh_folder, tmp_path_factory):
    """One run that several tests look at."""
    folder = tmp_path_factory.mktemp("made")
    disc().save(folder / "cat.png")
    ran = edit_here(
        "generate-3d", "cat.png", "-m", mesh_folder, "-b", "0.6", "--steps", "8", "--seed", "3",
        "-o", "cat.glb", "--preview", "view.png", "--compare", "--json", "-v", cwd=folder,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return folder, ran


def test_the_json_object(made, mesh_folder):
    folder, ran = made
    found = ran.json
    assert len(ran.out.splitlines()) == 1
    assert list(found)[: len(KEYS)] == KEYS
    assert found["outputs"] == ["cat.glb"]
    assert found["previews"] == ["view.png"]
    assert (found["model"], found["seeds"], found["budget"]) == (mesh_folder.name, [3], 0.6)
    assert (found["spent"], found["evaluations"]) == ([0.5], {"made": 4, "dense": 8})
    assert "a budget of 0.6 buys 4 of 8 evaluations, which is 0.50 of the dense FLOPs" in found["notes"]
    assert list(found["seconds"]) == STAGES
    assert sum(found["seconds"][name] for name in STAGES[:-1]) <= found["seconds"]["total"]
    mesh = trimesh.load_mesh(folder / "cat.glb")
    assert [len(mesh.faces)] == found["faces"]
    assert [mesh.is_watertight] == found["watertight"]
    assert found["volume"][0] == pytest.approx(mesh.volume, rel=1e-3)
    np.testing.assert_allclose(mesh.bounds, found["bounds"][0], atol=1e-3)


def test_comparison_measures_the_dense_mesh(made):
    folder, ran = made
    compare = ran.json["compare"]
    assert compare["outputs"] == ["cat-dense.glb"]
    assert (folder / "cat-dense.glb").is_file()
    assert 0 < compare["iou"][0] <= 1 and 0 <= compare["f_score"][0] <= 1 and compare["chamfer"][0] >= 0
    assert list(compare["dense_seconds"]) == STAGES[2:-1] == list(compare["elastic_seconds"])


def test_the_table_shows_where_the_time_went(made):
    _, ran = made
    for words in ("conditioning", "denoising", "volume decoding", "extraction", "clean-up", "a lower budget"):
        assert words in ran.err


def test_preview_is_a_turntable(made):
    folder, _ = made
    with Image.open(folder / "view.png") as sheet:
        assert sheet.size == (1024, 512)
        pixels = np.asarray(sheet.convert("RGB"), int)
    for row in range(2):
        for column in range(4):
            view = pixels[row * 256 : (row + 1) * 256, column * 256 : (column + 1) * 256]
            assert (np.abs(view - view[0, 0]).max(axis=-1) > 20).mean() > 0.1


@pytest.mark.parametrize("suffix", ["obj", "ply", "stl"])
def test_formats_and_simplification(desk, edit_here, mesh_folder, suffix):
    ran = edit_here(
        "generate-3d",
        "plain.png",
        "-m",
        mesh_folder,
        "--format",
        suffix,
        "--faces",
        "400",
        "--json",
        cwd=desk,
    )
    assert ran.code == 0, ran.err
    assert ran.json["outputs"] == [f"plain.{suffix}"]
    assert ran.json["background"] == ["plain colour"]
    mesh = trimesh.load_mesh(desk / f"plain.{suffix}")
    assert len(mesh.faces) == ran.json["faces"][0] <= 400


def test_several_pictures_and_seeds_give_several_meshes(desk, edit_here, mesh_folder):
    (desk / "out").mkdir()
    ran = edit_here(
        "generate-3d", "alpha.png", "plain.png", "--seed", "1", "2", "-m", mesh_folder, "-o", "out/",
        "--json", "--octree-resolution", "16", "--steps", "2", "--routers", "none", cwd=desk,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    names = ["alpha-1.glb", "alpha-2.glb", "plain-1.glb", "plain-2.glb"]
    assert [Path(name).name for name in ran.json["outputs"]] == names
    assert ran.json["seeds"] == [1, 2, 1, 2]
    assert ran.json["spent"] == [1.0] * 4


def test_dry_run_counts_what_a_run_counts_and_writes_nothing(desk, edit_here, mesh_folder):
    before = sorted(desk.iterdir())
    arguments = ["generate-3d", "alpha.png", "-m", mesh_folder, "-b", "0.5", "--json"]
    planned = edit_here(*arguments, "--dry-run", cwd=desk).json
    assert sorted(desk.iterdir()) == before
    ran = edit_here(*arguments, cwd=desk).json
    assert planned["outputs"] == ran["outputs"]
    assert planned["flops"] == pytest.approx(ran["flops"])
    assert planned["flops"]["spent"] == pytest.approx(0.5 * planned["flops"]["dense"])
    assert planned["transformer_calls"] == ran["evaluations"]["made"] == 2


def test_published_models_are_dry_run_without_a_download(desk, edit_here):
    found = edit_here(
        "generate-3d", "alpha.png", "-m", "hunyuan3d-2mini", "--dry-run", "--json", cwd=desk
    ).json
    assert 1e13 < found["flops"]["dense"] < 1e15
    listed = edit_here("models", "--json", cwd=desk).json["models"]
    meshes = {row["name"] for row in listed if row["makes"] == "meshes"}
    assert {"hunyuan3d-2", "hunyuan3d-2mini-turbo", "hunyuan3d-2mv-fast", "hunyuan3d-2.1"} <= meshes


def test_a_dense_grid_that_does_not_fit_becomes_hierarchical(desk, edit_here, mesh_folder, monkeypatch):
    points = 41**3
    monkeypatch.setattr(mesh_medium, "available_bytes", lambda: points * 20)
    arguments = ["generate-3d", "alpha.png", "-m", mesh_folder, "--decode", "dense", "--json"]
    ran = edit_here(*arguments, "--octree-resolution", "40", cwd=desk)
    assert ran.code == 0, ran.err
    assert any("too little memory for a dense grid" in note for note in ran.json["notes"])
    refused = edit_here(*arguments, "--octree-resolution", "200", "-o", "no.glb", cwd=desk)
    assert refused.code == 1
    assert "at most" in refused.err and not (desk / "no.glb").exists()


def save_picture(kind: str, path: Path) -> None:
    """One of the pictures that are handled, not refused; each shows the same upright disc."""
    flat = disc("RGB", "white")
    if kind == "16-bit":
        Image.fromarray(np.asarray(flat.convert("L")).astype(np.uint16) * 257).save(path.with_suffix(".png"))
    elif kind == "CMYK":
        flat.convert("CMYK").save(path.with_suffix(".jpg"), quality=95)
    elif kind == "animated":
        flat.save(path.with_suffix(".gif"), save_all=True, append_images=[Image.new("RGB", (48, 48), "blue")])
    elif kind == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees when shown
        flat.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".jpg"), exif=exif, quality=95)
    else:
        flat.convert(kind).save(path.with_suffix(".png"))


@pytest.mark.parametrize("kind", ["16-bit", "CMYK", "animated", "EXIF", "L", "LA", "P", "1"])
def test_unusual_pictures_are_handled(kind, tmp_path):
    save_picture(kind, tmp_path / "a")
    (file,) = tmp_path.iterdir()
    picture, _ = cut_out(open_rgba(str(file)), "yes", file.name)
    assert picture.mode == "RGBA"
    seen = np.asarray(picture)[..., 3] > 0
    rows, columns = np.nonzero(seen)
    box = (columns.min(), rows.min(), columns.max(), rows.max())
    assert np.abs(np.subtract(box, (10, 8, 38, 40))).max() <= 2


def test_background_removal_keeps_what_the_border_does_not_reach(tmp_path):
    ring = Image.new("RGB", (60, 60), "white")
    draw = ImageDraw.Draw(ring)
    draw.ellipse((5, 5, 55, 55), fill="navy")
    draw.ellipse((20, 20, 40, 40), fill="white")
    ring.save(tmp_path / "ring.png")
    picture, found = cut_out(open_rgba(str(tmp_path / "ring.png")), "auto", "ring.png")
    alpha = np.asarray(picture)[..., 3]
    assert found == "plain colour"
    assert (alpha[0, 0], alpha[30, 10], alpha[30, 30]) == (0, 255, 255)
    kept, found = cut_out(open_rgba(str(tmp_path / "ring.png")), "no", "ring.png")
    assert found == "kept" and np.asarray(kept)[..., 3].min() == 255


@pytest.mark.parametrize("alpha", [254, 240, 150])
def test_an_alpha_channel_that_cuts_nothing_out_is_none(alpha):
    picture = np.asarray(disc("RGB", "white").convert("RGBA")).copy()
    picture[..., 3] = alpha  # all over, and a transparent corner as of a rounded one
    picture[0, 0, 3] = 0
    cut, found = cut_out(Image.fromarray(picture), "auto", "x.png")
    assert found == "plain colour"
    assert (np.asarray(cut)[..., 3] > 0).mean() < 0.5


def test_turntable_starts_at_the_front_and_goes_around():
    big, small = trimesh.creation.icosphere(3, 0.5), trimesh.creation.icosphere(3, 0.3)
    small.apply_translation([0.9, 0, 0])
    sheet = np.asarray(turntable(trimesh.util.concatenate([big, small]), side=96).convert("L"), int)
    covered = (sheet < 240).reshape(2, 96, 4, 96).sum(axis=1)  # [row, view, column]
    places = (covered * np.arange(96)).sum(axis=2) / covered.sum(axis=2)
    assert places[0, 0] < 45, "the small ball at +x is on the right, the mass on the left"
    assert places[1, 0] > 51, "and the other way round from behind"
    assert abs(places[0, 2] - 48) < 3 and abs(places[1, 2] - 48) < 3, "from the sides all lies in line"


def test_rendering_hides_what_lies_behind():
    front, back = trimesh.creation.icosphere(3, 0.5), trimesh.creation.icosphere(3, 0.3)
    front.apply_translation([0, 0, 0.2])
    back.apply_translation([0, 0, -0.4])

    def seen(mesh: trimesh.Trimesh) -> np.ndarray:
        vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
        return np.asarray(render(vertices, faces, vertex_normals(vertices, faces), 64))

    alone = seen(front)
    np.testing.assert_array_equal(seen(trimesh.util.concatenate([back, front])), alone)
    assert (alone != seen(back)).any()


@pytest.fixture
def bad(desk: Path, mesh_folder: Path) -> Path:
    (desk / "text.png").write_text("no picture")
    Image.new("RGBA", (1, 1), "red").save(desk / "one.png")
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(desk / "clear.png")
    Image.new("RGB", (20, 20), "white").save(desk / "white.png")
    noise = np.random.default_rng(0).integers(0, 255, (30, 30, 3)).astype(np.uint8)
    Image.fromarray(noise).save(desk / "noise.png")
    (desk / "empty").mkdir()
    shutil.copytree(mesh_folder, desk / "evil")
    (desk / "evil" / "model.safetensors").unlink()
    torch.save({"model": print}, desk / "evil" / "model.ckpt")
    shutil.copytree(mesh_folder, desk / "other")
    (desk / "other" / "config.yaml").write_text(yaml.safe_dump({"model": {"target": "x.OtherDiT"}}))
    (desk / "old.glb").write_bytes(trimesh.creation.box().export(file_type="glb"))
    return desk


BAD = [
    ([], "no picture given; try: edit generate-3d"),
    (["nowhere.png"], "IMAGE 'nowhere.png' is not a file"),
    (["text.png"], "IMAGE 'text.png' is not a readable picture"),
    (["one.png"], "IMAGE 'one.png' is 1x1 px; give at least 2x2 px"),
    (["clear.png"], "IMAGE 'clear.png' is fully transparent"),
    (["white.png"], "IMAGE 'white.png' has no foreground"),
    (["alpha.png", "-o", "a.fbx"], "has suffix '.fbx'; allowed are .glb, .obj, .ply, .stl"),
    (["alpha.png", "-o", "a.glb", "--format", "obj"], "disagree; leave one out"),
    (["alpha.png", "--format", "fbx"], "--format 'fbx' is unknown; allowed are glb, obj, ply, stl"),
    (["alpha.png", "--preview", "a.bmp"], "--preview 'a.bmp' has suffix '.bmp'; allowed are .png"),
    (["alpha.png", "--octree-resolution", "4"], "--octree-resolution '4' is out of range"),
    (["alpha.png", "--octree-resolution", "9999"], "allowed are whole numbers from 8 to 1024"),
    (["alpha.png", "--faces", "3"], "--faces '3' is out of range"),
    (["alpha.png", "--decode", "fast"], "--decode 'fast' is unknown; allowed are auto, dense, hierarchical"),
    (["alpha.png", "--remove-background", "maybe"], "allowed are auto, yes, no"),
    (["alpha.png", "--views", "front"], "--views needs a multi-view model"),
    (["alpha.png", "-b", "0"], "--budget '0' is out of range"),
    (["alpha.png", "--target", "near"], "--target 'near' is unknown; allowed are dense, exact"),
    (["alpha.png", "--routers", "empty"], "is not a bundle folder"),
    (["alpha.png", "--device", "tpu"], "--device 'tpu' is unknown"),
    (["alpha.png", "--offload", "model", "--device", "cpu"], "needs a GPU to offload from"),
    (["alpha.png", "--offload", "group"], "--offload 'group' is unknown; allowed are none, model"),
    (["alpha.png", "-m", "hunyuan3d-3"], "did you mean hunyuan3d-"),
    (["alpha.png", "-m", "qwen-image"], "'qwen-image' makes pictures: use `edit generate"),
    (["alpha.png", "-m", "./no"], "model folder './no' does not exist"),
    (["alpha.png", "-m", "empty"], "it has neither model_index.json nor config.yaml"),
    (["alpha.png", "-m", "other"], "holds OtherDiT, which `edit` cannot run"),
    (["alpha.png", "-m", "evil"], "it holds more than tensors, so loading could run code"),
    (["alpha.png", "-m", "hunyuan3d-2"], "is not in the local cache and the hub cannot be reached"),
    (["--from", "nowhere.glb"], "--from 'nowhere.glb' does not exist"),
    (["--from", "alpha.png"], "--from 'alpha.png' is not a readable GLB"),
    (["--from", "old.glb"], "--from 'old.glb' has no `edit` metadata"),
    (["noise.png"], "background of several colours, which needs rembg"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(bad, edit_here, mesh_folder, arguments, message):
    if "rembg" in message and importlib.util.find_spec("rembg"):
        pytest.skip("rembg is installed, so this background can be removed")
    before = sorted(bad.rglob("*"))
    model = [] if "-m" in arguments else ["-m", mesh_folder]
    ran = edit_here("generate-3d", *arguments, *model, cwd=bad)
    assert ran.code == 2, ran.err
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in ran.err
    assert sorted(bad.rglob("*")) == before


def test_no_surface_says_so_and_writes_nothing(desk, edit_here):
    """A decoder that answers the same everywhere has no surface."""
    from safetensors.torch import load_file, save_file

    folder = save_folder(desk / "flat")
    weights = load_file(folder / "model.safetensors")
    weights["vae.geo_decoder.output_proj.weight"].zero_()
    weights["vae.geo_decoder.output_proj.bias"].fill_(-1.0)
    save_file(weights, folder / "model.safetensors")
    ran = edit_here("generate-3d", "alpha.png", "-m", folder, "-o", "a.glb", "--preview", "a.png", cwd=desk)
    assert ran.code == 1
    assert "alpha.png: no surface at level 0" in ran.err and "try another --seed" in ran.err
    assert not (desk / "a.glb").exists() and not (desk / "a.png").exists()


def test_views_of_one_object_make_one_mesh(desk, edit_here):
    views = {
        "image_processor": {"target": "MVImageProcessorV2", "params": {"size": 32}},
        "conditioner": {
            "target": "SingleImageEncoder",
            "params": {
                "main_image_encoder": {
                    **CONFIG["conditioner"]["params"]["main_image_encoder"], "type": "DinoImageEncoderMV"
                }
            },
        },
    }  # fmt: skip
    folder = save_folder(desk / "views", **views)
    arguments = ["generate-3d", "alpha.png", "plain.png", "-m", folder, "--views", "front", "left"]
    ran = edit_here(*arguments, "-o", "a.glb", "--json", "--steps", "2", cwd=desk)
    assert ran.code == 0, ran.err
    assert ran.json["outputs"] == ["a.glb"]
    assert read_record(desk / "a.glb")["views"] == ["front", "left"]
    wrong = edit_here(*arguments, "back", cwd=desk)
    assert wrong.code == 2 and "must name each of the 2 pictures once" in wrong.err


def test_record_is_plain_json(made):
    folder, _ = made
    record = read_record(folder / "cat.glb")
    assert json.loads(json.dumps(record)) == record
    assert record["model_hash"] and record["routers_hash"] and len(record["image_hashes"]) == 1


def test_a_picture_is_read_again_once_it_is_another(tmp_path, monkeypatch):
    """By its relative name in another folder, or because it was written anew."""
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Image.new("RGBA", (9, 9), colour).save("x.png")
        assert read_object("x.png", "no")[0].getpixel((0, 0)) == Image.new("RGBA", (1, 1), colour).getpixel(
            (0, 0)
        )
    assert read_object("x.png", "no")[0] is read_object("x.png", "no")[0]

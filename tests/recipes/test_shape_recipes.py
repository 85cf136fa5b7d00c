"""The recipe of hunyuan3d-tiny: shapes are what they claim to be, and its steps run, resume and export."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbones import registry
from backbones.hunyuan3d.checkpoints import load_pipeline, read_weights
from backbones.tiny.recipes.shapes import (
    codes,
    dataset,
    export,
    inflate,
    render,
    sdf,
    silhouettes,
    solids,
    store,
)
from edit_cli.generation.samples import model_pictures

rng = np.random.default_rng(0)


def disc(side: int = 128, radius: float = 0.8, white: bool = False) -> np.ndarray:
    axis = np.linspace(-1, 1, side)
    inside = np.hypot(*np.meshgrid(axis, axis)) < radius
    picture = np.zeros((side, side, 4), np.uint8)
    picture[inside] = (255, 255, 255, 255) if white else (200, 40, 40, 255)
    return picture


@pytest.mark.parametrize(
    ("field", "point", "expected"),
    [
        (sdf.sphere(0.5), (1, 0, 0), 0.5),
        (sdf.box(0.5, 0.2, 0.1), (0, 0.5, 0), 0.3),
        (sdf.cylinder(0.5, 0.2), (0, 0, 0.8), 0.3),
        (sdf.torus(0.5, 0.1), (0, 0.3, 0.5), 0.2),
        (sdf.frustum(0.5, 0.5, 0.2), (0, 0, 0), -0.2),
        (sdf.revolve([(0, -1), (0.5, -1), (0.5, 1), (0, 1)]), (0.1, 0, 0), -0.4),
        (sdf.extrude(sdf.regular(4, 1.0), 0.3), (0, 0, 0.5), 0.2),
        (sdf.turn(sdf.move(sdf.sphere(0.1), x=1), "y", 90), (0, 0, -1), -0.1),
        (sdf.around(sdf.move(sdf.sphere(0.1), z=1), 4), (1, 0, 0), -0.1),
        (sdf.cut(sdf.sphere(1.0), sdf.sphere(0.5)), (0, 0, 0), 0.5),
    ],
)
def test_distances_match_hand_computed_ones(field, point, expected):
    assert field(np.array([point], float))[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["mug", "house", "quadruped"])
def test_solids_fill_the_box_and_are_the_same_every_time(name):
    solid, again = solids.make_solid(name, 3), solids.make_solid(name, 3)
    points = rng.uniform(-1, 1, (4000, 3))
    assert np.array_equal(solid.distance(points), again.distance(points))
    grid = dataset.grid_points()
    inside = grid[solid.distance(grid) < 0]
    extent = inside.max(0) - inside.min(0)
    assert 1.6 < extent.max() < 1.95
    assert np.abs(inside.max(0) + inside.min(0)).max() < 0.15
    # A distance never grows faster than the point moves; blends and ellipsoids may be off by a little.
    step = 0.05 * rng.standard_normal((4000, 3))
    change = np.abs(solid.distance(points + step) - solid.distance(points))
    assert (change <= 1.3 * np.linalg.norm(step, axis=1) + 1e-6).mean() > 0.99


def test_every_kind_builds_parts():
    kinds = solids.kinds()
    assert len(kinds) >= 50
    for name, builder in kinds.items():
        parts = builder(solids.Draw(name))
        values = np.min([field(rng.uniform(-1, 1, (2000, 3))) for field, _ in parts], axis=0)
        assert np.isfinite(values).all() and (values < 0).any(), name
        assert all(0 <= channel <= 1 for _, colour in parts for channel in colour), name


def test_a_rendered_ball_is_round_lit_from_above_and_transparent_around():
    ball = solids.place("ball", [(sdf.sphere(1.0), (1.0, 0.2, 0.2))], 0.0)
    picture = render.render_solid(ball, side=48)
    covered = picture[..., 3] > 0
    expected = np.pi * (24 * solids.HALF_EXTENT / render.VIEW_HALF) ** 2
    assert covered.sum() == pytest.approx(expected, rel=0.06)
    assert picture[16, 24, :3].sum() > picture[31, 24, :3].sum()
    assert not picture[0, 0].any()


def test_a_volume_is_drawn_the_right_way_round():
    axis = np.linspace(-1, 1, 24)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    values = 0.3 - np.sqrt((x - 0.6) ** 2 + (y - 0.6) ** 2 + z**2)
    drawn = (render.render_volume(values, side=32) < 250).any(-1)
    rows, columns = np.nonzero(drawn)
    assert rows.mean() < 16 < columns.mean()  # up and to the right


def test_an_inflated_disc_is_an_oblate_ball_and_its_mesh_is_closed():
    import trimesh

    puff = inflate.inflate(disc())
    vertices, faces = puff.mesh()
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight and mesh.volume > 0
    expected = 4 / 3 * np.pi * solids.HALF_EXTENT**3 * inflate.HEIGHT
    assert mesh.volume == pytest.approx(expected, rel=0.08)
    assert mesh.bounds[1] == pytest.approx([0.9, 0.9, 0.9 * inflate.HEIGHT], abs=0.04)
    centre_and_far = puff.sign_field(np.array([[0, 0, 0], [0, 0, 0.7], [0.95, 0, 0]]))
    assert (centre_and_far > 0).tolist() == [True, False, False]


def test_holes_are_filled_white_art_counts_and_scattered_art_is_refused():
    ring = disc(radius=0.8)
    ring[disc(radius=0.4)[..., 3] > 0] = 0
    assert inflate.canvas_mask(ring)[48, 48] == 1
    assert inflate.inflate(disc(white=True)) is not None
    two = np.concatenate([disc(64), disc(64)], axis=1)
    assert inflate.inflate(two) is None


def test_the_front_view_of_a_puff_is_its_picture():
    picture = disc()
    picture[:40, :64] = 0  # not symmetric: up and left is missing
    puff = inflate.inflate(picture)
    field = puff.sign_field(dataset.grid_points(40)).reshape(40, 40, 40)
    made, wanted = silhouettes.front_silhouette(field), silhouettes.wanted_silhouette(picture, 40)
    assert silhouettes.outline_iou(made, wanted) > 0.93
    assert silhouettes.outline_iou(made[:, ::-1], wanted) < 0.9
    on_white = Image.new("RGBA", (128, 128), "white")
    on_white.alpha_composite(Image.fromarray(picture))
    cut = silhouettes.with_alpha(on_white.convert("RGB"))
    assert np.array_equal(cut[..., 3] > 0, picture[..., 3] > 0)


def test_puff_distances_have_the_right_sign_and_size():
    puff = inflate.inflate(disc())
    _, points, normal, distance = dataset.puff_samples(puff, 0)
    for offset in (-0.1, -0.03, 0.03, 0.1):
        assert np.median(distance(points + offset * normal)) == pytest.approx(offset, abs=0.012)


def test_free_codes_are_the_noise_and_anchor_codes_are_matched():
    noise = torch.randn(3, 32, 8, generator=torch.Generator().manual_seed(0))
    own, same = codes.pair("free", noise)
    assert torch.equal(same, noise) and torch.equal(own, noise[..., -3:])
    places, matched = codes.pair("anchors", noise)
    assert torch.equal(matched.sum(1), noise.sum(1)) or torch.allclose(
        matched.sum(1), noise.sum(1), atol=1e-4
    )
    before = (places - noise[..., -3:]).square().sum()
    after = (places - matched[..., -3:]).square().sum()
    assert after < 0.5 * before
    assert codes.positions(codes.anchor_codes()).abs().max() == pytest.approx(0.75 * codes.SPREAD, abs=1e-5)
    with pytest.raises(ValueError, match="32 latents"):
        codes.pair("anchors", noise[:, :8])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Eight solids and four puffs on disk, made through shards as the step makes them."""
    folder = tmp_path_factory.mktemp("shapes")
    jobs = [dataset.Job("solid", "ball", i, "train" if i < 5 else "held-out") for i in range(8)]
    paths = []
    for number, part in enumerate((jobs[:4], jobs[4:])):
        paths.append(folder / f"{number}.npz")
        assert dataset.run_shard((part, folder, paths[-1])) == 4
    assert dataset.merge(paths, folder) == 8
    rows = json.loads((folder / "index.json").read_text())["rows"]
    assert rows == [asdict(job) for job in jobs]
    return folder


def test_stored_balls_are_balls_and_mirroring_moves_everything_together(data):
    shapes = store.ShapeSet(data, "train", seed=1)
    assert len(shapes) == 5
    rows = shapes.rows["solid"]
    batch = shapes.batch(rows, 512, 1024, augment=False)
    radius = batch.surface[..., :3].norm(dim=-1)
    assert torch.allclose(radius, torch.full_like(radius, solids.HALF_EXTENT), atol=0.02)
    gap = batch.points.norm(dim=-1) - solids.HALF_EXTENT - batch.distance
    assert gap[batch.distance.abs() < 0.2].abs().max() < 0.03
    volume = shapes.occupancy(rows).mean(1) * (2 * dataset.BOX) ** 3
    expected = 4 / 3 * np.pi * solids.HALF_EXTENT**3 * ((dataset.GRID - 1) / dataset.GRID) ** 3
    assert volume == pytest.approx(np.full(5, expected), rel=0.05)
    assert batch.image.shape == (5, 3, dataset.IMAGE_SIDE, dataset.IMAGE_SIDE)
    assert batch.image[:, :, 0, 0].min() > 0.98  # white around
    jittered = shapes.batch(rows, 512, 1024)
    assert jittered.image[:, :, 0, 0].min() > 0.98
    assert torch.allclose(jittered.surface[..., :3].norm(dim=-1), radius, atol=0.03)


def options(data: Path, out: Path, **more) -> argparse.Namespace:
    base = {
        "data": data, "out": out, "minutes": 1e-4, "batch": 4, "lr": 2e-3, "seed": 0, "puff_share": 0.5,
        "compile": False, "check_minutes": 60.0, "log_every": 1, "points": 64, "ema": 0.999, "max_steps": 0,
    }  # fmt: skip
    return argparse.Namespace(**{**base, **more})


@pytest.mark.slow
def test_the_steps_train_resume_evaluate_and_export(data, tmp_path, capsys, monkeypatch):
    from backbones.tiny.recipes.shapes import dit, evaluate, model, vae

    monkeypatch.setitem(vae.VAE_PARAMS, "width", 32)
    monkeypatch.setitem(vae.VAE_PARAMS, "num_decoder_layers", 1)
    monkeypatch.setitem(vae.VAE_PARAMS, "pc_size", 64)
    monkeypatch.setitem(model.DIT_PARAMS, "depth_single_blocks", 1)
    vae_options = {"codes": "free", "latents": 8, "encoder_layers": 0}
    vae.train(options(data, tmp_path / "vae", **vae_options))
    first = torch.load(tmp_path / "vae/last.pt", weights_only=True)["step"]
    vae.train(options(data, tmp_path / "vae", minutes=0.01, **vae_options))
    assert torch.load(tmp_path / "vae/last.pt", weights_only=True)["step"] > first
    assert "held-out IoU" in capsys.readouterr().out

    tail = {"vae": tmp_path / "vae/model.pt", "field_weight": 0.5, "field_from": 0.0, "check_shapes": 1}
    dit.train(options(data, tmp_path / "dit", **tail))
    assert "chain IoU" in capsys.readouterr().out

    trained, stats, scheme = vae.load_vae(tmp_path / "vae/model.pt")
    assert scheme == "free" and stats[1].min() > 0
    chained = model.load_model(tmp_path / "dit/last.pt")
    folder = tmp_path / "package"
    params = {**vae.VAE_PARAMS, "num_latents": 8, "num_encoder_layers": 0}
    ball = {"ball.png": render.render_solid(solids.make_solid("ball", 0), 64)}
    size = export.write_folder(folder, chained, trained, stats, params, ball)
    assert size < export.MAX_BYTES
    names = ["calibration", "config.yaml", "edit.json", "model.fp16.safetensors"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert registry.resolve(str(folder)).defaults.steps == model.STEPS
    assert [Path(picture).name for picture in model_pictures(registry.resolve(str(folder)))] == ["ball.png"]
    assert set(read_weights(folder / "model.fp16.safetensors")) == {"model", "vae", "conditioner"}
    gaps = export.largest_difference(folder, chained, trained, stats)
    assert max(gaps.values()) < export.MAX_DIFFERENCE
    assert load_pipeline(folder).dtype == torch.float16

    held_out, train = store.ShapeSet(data, "held-out"), store.ShapeSet(data, "train")
    assert evaluate.baseline_iou(train, held_out, 2)["solid"] > 0.95  # one ball is like another
    sheet = tmp_path / "sheet.png"
    evaluate.contact_sheet(chained, trained, stats, held_out, 1, sheet, steps=2, guidance=2.0)
    assert sheet.stat().st_size > 1000


def test_thin_solids_are_one_piece_and_are_sampled_where_they_are_thin():
    from backbones.tiny.recipes.shapes import dataset, evaluate, solids
    from backbones.tiny.recipes.shapes.solids_thin import THIN

    assert set(THIN) < set(solids.kinds())
    for name in ("door_key", "thin_chair", "spectacles"):
        solid = solids.make_solid(name, 1)
        inside, points, normal, distance = dataset.solid_samples(solid, 0)
        assert evaluate.pieces(inside[None]).tolist() == [1], name
        thin = dataset.thin_places(points, normal, distance)
        assert thin.mean() > 0.05, name
        volume = dataset.volume_samples(points, normal, distance, np.random.default_rng(0))
        assert volume.shape == (dataset.VOLUME_POINTS, 4)
    egg = solids.make_solid("egg", 0)
    _, points, normal, distance = dataset.solid_samples(egg, 0)
    assert dataset.thin_places(points, normal, distance).mean() < 0.02


def test_pieces_are_counted_and_crumbs_are_not():
    from backbones.tiny.recipes.shapes import dataset, evaluate

    grid = np.zeros((2, dataset.GRID, dataset.GRID, dataset.GRID), bool)
    grid[:, 2:8, 2:8, 2:8] = True
    grid[1, 20:24, 20:24, 20:24] = True
    grid[1, 40, 40, 40] = True
    assert evaluate.pieces(grid.reshape(2, -1)).tolist() == [1, 2]

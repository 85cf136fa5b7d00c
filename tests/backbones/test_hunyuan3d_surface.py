"""Hierarchical decoding gives the dense mesh for less; meshes come out closed, outward and small."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from backbones.hunyuan3d import mesh as meshes
from backbones.hunyuan3d.checkpoints import build_component
from backbones.hunyuan3d.mesh import NoSurfaceError
from backbones.hunyuan3d.surface import Volume, box_array, decode_dense, decode_hierarchical
from tests.golden.runner import Case

DATA = Path(__file__).parents[1] / "golden" / "data"


def sphere(radius=0.8, center=(0.0, 0.0, 0.0)):
    return lambda p: radius - (p - torch.tensor(center)).norm(dim=-1)


def torus(p):
    return 0.15 - torch.stack([p[:, :2].norm(dim=-1) - 0.6, p[:, 2]], dim=-1).norm(dim=-1)


def plate(half_thickness):
    """A thin slanted plate, as a signed distance."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]

    def field(p):
        d = (p @ turn).abs() - torch.tensor([0.7, 0.6, half_thickness])
        return -(d.clamp(min=0).norm(dim=-1) + d.amax(dim=-1).clamp(max=0))

    return field


def truncated(field, width=0.1):
    """What a trained decoder looks like: the distance, cut off at `width` from the surface."""
    return lambda p: (field(p) / width).clamp(-1, 1)


FIELDS = {
    "sphere": sphere(),
    "truncated sphere": truncated(sphere()),
    "truncated torus": truncated(torus),
    "small sphere": truncated(sphere(0.04, (0.3, 0.31, 0.2))),
    "thin plate": truncated(plate(0.008)),
    "two spheres": lambda p: torch.maximum(sphere(0.3, (0.5, 0, 0))(p), sphere(0.3, (-0.5, 0, 0.1))(p)),
}


def same_surface(a: Volume, b: Volume, level: float = 0.0) -> bool:
    first, second = meshes.extract_surface(a, level), meshes.extract_surface(b, level)
    return np.array_equal(first.vertices, second.vertices) and np.array_equal(first.faces, second.faces)


@pytest.mark.parametrize("resolution", [64, 100, 127])
@pytest.mark.parametrize("name", FIELDS)
def test_hierarchical_equals_dense(name, resolution):
    dense = decode_dense(FIELDS[name], 1.01, resolution, chunk=50_000)
    sparse = decode_hierarchical(FIELDS[name], 1.01, resolution, chunk=50_000)
    assert same_surface(dense, sparse)
    assert dense.evaluations == (resolution + 1) ** 3
    assert sparse.evaluated_share < 0.4


@pytest.mark.parametrize("level", [-0.2, 0.15])
def test_other_levels_and_boxes(level):
    bounds = [-1.0, -0.9, -1.1, 1.2, 1.0, 0.9]
    dense = decode_dense(sphere(0.6), bounds, 64, chunk=50_000)
    assert same_surface(dense, decode_hierarchical(sphere(0.6), bounds, 64, 50_000, level), level)


@pytest.mark.parametrize(
    "name", ["thin plate", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sphere", "truncated torus"))]
)
def test_a_tenth_of_the_evaluations_at_256(name):
    calls = []

    def counted(points):
        calls.append(len(points))
        return FIELDS[name](points)

    volume = decode_hierarchical(counted, 1.01, 256, chunk=100_000)
    assert sum(calls) == volume.evaluations < 0.1 * 257**3
    assert max(calls) <= 100_000
    assert meshes.extract_surface(volume).to_trimesh().is_watertight


def test_the_surface_is_followed_where_the_coarse_grid_saw_nothing():
    """A thin rod: between coarse nodes for most of its length, yet found whole once any part of it is."""
    rod = lambda p: torch.where(p[:, 0].abs() < 0.8, 0.02 - (p[:, 1:] - 0.017).norm(dim=-1), -0.05)  # noqa: E731
    steep = lambda p: (200 * rod(p)).clamp(-1, 1)  # noqa: E731
    bulge = lambda p: torch.maximum(steep(p), (20 * sphere(0.1)(p)).clamp(-1, 1))  # noqa: E731
    dense = decode_dense(bulge, 1.01, 128, chunk=50_000)
    assert same_surface(dense, decode_hierarchical(bulge, 1.01, 128, chunk=50_000))


@pytest.mark.parametrize("case", ["volume_decode", "shapevae_decode_turbo"])
@torch.no_grad()
def test_a_decoder_too_rough_for_a_coarse_grid_is_still_right(case):
    recorded = Case.read(DATA / case)
    vae = build_component(
        "vae", {"target": "ShapeVAE", "params": recorded.config["params"]}, recorded.weights
    )
    field = vae.field(vae(vae.unscale(recorded.inputs["latents"]))[0])
    dense, sparse = decode_dense(field, 1.01, 40), decode_hierarchical(field, 1.01, 40, coarse=10)
    first, second = meshes.extract_surface(dense), meshes.extract_surface(sparse)
    assert first.faces.shape == second.faces.shape
    assert np.abs(first.vertices - second.vertices).max() < 1e-3 * 2.02


def test_bad_arguments_and_bad_fields():
    for bounds in (-1.0, [0, 0, 0, 1, 1, 0]):
        with pytest.raises(ValueError, match="empty box"):
            decode_dense(sphere(), bounds, 4)
    for decode in (decode_dense, decode_hierarchical):
        with pytest.raises(ValueError, match="resolution 0"):
            decode(sphere(), 1.0, 0)
        with pytest.raises(ValueError, match="NaN"):
            decode(lambda p: p[:, 0] * float("nan"), 1.0, 8)


def test_no_surface_says_so():
    volume = decode_dense(sphere(0.5), 1.0, 8)
    with pytest.raises(NoSurfaceError, match="all outside"):
        meshes.extract_surface(volume, level=3.0)
    with pytest.raises(NoSurfaceError, match="all inside"):
        meshes.extract_surface(volume, level=-3.0)


def test_exact_scale_hits_the_sphere_and_the_published_one_is_off_by_one_cell():
    volume = decode_dense(sphere(0.5), 1.0, 40)
    exact = meshes.extract_surface(volume, published_scale=False).to_trimesh()
    published = meshes.extract_surface(volume).to_trimesh()
    assert np.abs(np.linalg.norm(exact.vertices, axis=1) - 0.5).max() < 2e-3
    assert np.allclose(published.vertices, (np.asarray(exact.vertices) + 1) * 40 / 41 - 1, atol=1e-6)
    assert exact.volume > 0


def test_a_shape_cut_by_the_box_is_capped():
    volume = decode_dense(sphere(0.7, (0.6, 0, 0)), 1.0, 32)
    assert not meshes.extract_surface(volume).to_trimesh().is_watertight
    capped = meshes.extract_surface(volume, published_scale=False, cap_box=True).to_trimesh()
    assert capped.is_watertight
    assert capped.is_winding_consistent
    assert capped.volume > 0
    assert capped.bounds[1, 0] == pytest.approx(1.0, abs=1e-3)


def marched(field, resolution=48) -> trimesh.Trimesh:
    return meshes.extract_surface(
        decode_dense(field, 1.01, resolution, 50_000), published_scale=False
    ).to_trimesh()


def test_floaters_go_and_large_parts_stay():
    crumbs = lambda p: torch.maximum(FIELDS["two spheres"](p), sphere(0.05, (0, 0.8, 0.8))(p))  # noqa: E731
    mesh = marched(crumbs)
    assert mesh.body_count == 3
    cleaned = meshes.clean(mesh, floater_ratio=0.05)
    assert cleaned.body_count == 2
    assert cleaned.is_watertight
    assert meshes.clean(mesh, floater_ratio=0.0).body_count == 3
    assert mesh.body_count == 3  # the input is left alone


def test_clean_merges_and_reorients():
    mesh = marched(torus)
    soup = trimesh.Trimesh(
        mesh.triangles.reshape(-1, 3)[:, :], np.arange(3 * len(mesh.faces)).reshape(-1, 3), process=False
    )
    soup.faces = np.vstack([soup.faces[:, ::-1], soup.faces[:5, ::-1]])
    assert not soup.is_watertight
    cleaned = meshes.clean(soup)
    assert cleaned.is_watertight
    assert len(cleaned.vertices) == len(mesh.vertices)
    assert cleaned.volume == pytest.approx(mesh.volume, rel=1e-5)


def test_a_cavity_keeps_its_inward_shell():
    hollow = lambda p: torch.minimum(sphere(0.8)(p), -sphere(0.4)(p))  # noqa: E731
    cleaned = meshes.clean(marched(hollow))
    expected = 4 / 3 * np.pi * (0.8**3 - 0.4**3)
    assert cleaned.volume == pytest.approx(expected, rel=0.02)


def test_cleaning_is_what_trimesh_does_step_by_step():
    crumbs = lambda p: torch.maximum(FIELDS["two spheres"](p), sphere(0.05, (0, 0.8, 0.8))(p))  # noqa: E731
    mesh = marched(crumbs)
    mesh.vertices[mesh.faces[7]] = mesh.vertices[mesh.faces[7, 0]]  # a face of one point
    mesh.faces = np.vstack([mesh.faces, mesh.faces[:5]])
    slow = mesh.copy()
    slow.merge_vertices(merge_tex=True, merge_norm=True)
    slow.update_faces(slow.nondegenerate_faces() & slow.unique_faces())
    labels = trimesh.graph.connected_component_labels(slow.face_adjacency, node_count=len(slow.faces))
    counts = np.bincount(labels)
    slow.update_faces((counts >= 0.05 * counts.max())[labels])
    slow.remove_unreferenced_vertices()
    cleaned = meshes.clean(mesh, floater_ratio=0.05)
    assert np.array_equal(cleaned.vertices, slow.vertices)
    assert np.array_equal(cleaned.faces, slow.faces)


def test_the_grid_stays_where_the_decoder_is():
    """No point or logit passes through the host: the only values read there are sizes and yes or no."""
    seen = []

    class OnlyTensors(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._local_scalar_dense.default:
                seen.append(args[0].numel())
            return out

    with OnlyTensors():
        volume = decode_hierarchical(FIELDS["truncated torus"], 1.01, 128, chunk=1000)
    rounds = volume.evaluations / 1000
    assert rounds > 100
    assert len(seen) < 40  # not one for every chunk


@pytest.mark.parametrize("field", [torus, FIELDS["two spheres"]], ids=["torus", "two spheres"])
@pytest.mark.parametrize("faces", [300, 1000])
def test_simplified_meshes_are_small_closed_and_alike(field, faces):
    mesh = meshes.clean(marched(field))
    small = meshes.simplify(mesh, faces)
    assert 0.9 * faces <= len(small.faces) <= faces
    assert small.is_watertight
    assert small.volume == pytest.approx(mesh.volume, rel=0.05)
    assert meshes.simplify(small, 10**6) is small
    with pytest.raises(ValueError, match="at least 4"):
        meshes.simplify(mesh, 3)


@pytest.mark.parametrize("faces", [10, 20, 40])
def test_a_ring_is_rather_closed_than_small(faces):
    """A ring takes at least 14 faces, and a collapse that tears or flattens it is not taken."""
    ring = trimesh.creation.torus(1.0, 0.12, 48, 16)
    small = meshes.simplify(ring, faces)
    assert small.is_watertight and len(small.faces) <= 60
    assert small.volume > 0.3 * ring.volume


def test_box_from_a_number_or_six():
    assert box_array(1.5).tolist() == [[-1.5] * 3, [1.5] * 3]
    assert box_array([0, 1, 2, 3, 4, 5]).tolist() == [[0, 1, 2], [3, 4, 5]]

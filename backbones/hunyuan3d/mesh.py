"""From a sampled field to a clean triangle mesh.

Marching cubes by scikit-image, then everything on trimesh objects; simplification by fast-simplification.
Coordinates stay those of the field; nothing is rotated or swapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .surface import Volume


class NoSurfaceError(RuntimeError):
    """The field does not cross the level anywhere."""


if TYPE_CHECKING:
    import trimesh

FLOATER_RATIO = 0.005
"""Drop components with fewer faces than this share of the largest; the published clean-up's value."""


@dataclass(frozen=True)
class Surface:
    """vertices `[V, 3]` float32, faces `[F, 3]` int64 with outward normals."""

    vertices: np.ndarray
    faces: np.ndarray

    def to_trimesh(self) -> trimesh.Trimesh:
        """The same triangles as a trimesh, nothing merged or reordered."""
        import trimesh

        return trimesh.Trimesh(self.vertices, self.faces, process=False)


def extract_surface(
    volume: Volume, level: float = 0.0, published_scale: bool = True, cap_box: bool = False
) -> Surface:
    """Marching cubes (Lewiner) at `level`.

    published_scale: divide indices by resolution + 1, as the published code does; it shrinks and shifts the
    mesh by one part in resolution + 1. False places vertices where the field was sampled.
    cap_box: close a shape that reaches the border of the box; it would otherwise be open there.
    Raises NoSurfaceError if the field lies on one side of the level.
    """
    from skimage.measure import marching_cubes

    logits, shift = volume.logits, 0
    low, high = float(np.nanmin(logits)), float(np.nanmax(logits))
    if not low <= level < high:
        side = "outside" if high <= level else "inside"
        raise NoSurfaceError(
            f"no surface at level {level:g}: the field lies in [{low:.3g}, {high:.3g}], all {side}; "
            "try another seed, more steps, or a level in that range"
        )
    if cap_box and _reaches_border(logits, level):
        # Far below the level, so that the cap lies within a thousandth of a cell of the border.
        logits, shift = np.pad(logits, 1, constant_values=level - 1e3 * (high - low)), 1
    index_vertices, faces, _, _ = marching_cubes(logits, level, method="lewiner")
    # The order of these float32 operations is the published one.
    size = volume.resolution + 1 if published_scale else volume.resolution
    box_min, box_max = volume.box
    vertices = (index_vertices - shift) / size * (box_max - box_min) + box_min
    return Surface(vertices.astype(np.float32), faces[:, ::-1].astype(np.int64))


def _reaches_border(logits: np.ndarray, level: float) -> bool:
    return any((np.take(logits, end, axis=axis) > level).any() for axis in range(3) for end in (0, -1))


def clean(mesh: trimesh.Trimesh, floater_ratio: float = FLOATER_RATIO) -> trimesh.Trimesh:
    """A tidied copy: vertices merged, degenerate, double and floating faces removed, normals outward."""
    mesh = mesh.copy()
    mesh.merge_vertices(merge_tex=True, merge_norm=True)
    mesh.update_faces(mesh.nondegenerate_faces() & mesh.unique_faces())
    mesh = remove_floaters(mesh, floater_ratio)
    mesh.remove_unreferenced_vertices()
    return orient(mesh)


def remove_floaters(mesh: trimesh.Trimesh, ratio: float = FLOATER_RATIO) -> trimesh.Trimesh:
    """Keep the connected components with at least `ratio` of the largest one's faces; ratio in [0, 1]."""
    from trimesh.graph import connected_component_labels

    if not 0 <= ratio <= 1:
        raise ValueError(f"floater ratio {ratio} must be in [0, 1]")
    if not len(mesh.faces):
        return mesh
    labels = connected_component_labels(mesh.face_adjacency, node_count=len(mesh.faces))
    counts = np.bincount(labels)
    keep = counts >= ratio * counts.max()
    if not keep.all():
        mesh = mesh.copy()
        mesh.update_faces(keep[labels])
        mesh.remove_unreferenced_vertices()
    return mesh


def orient(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Make the winding consistent and the volume positive, in place; cavities keep their inward shells."""
    from trimesh import repair

    if not mesh.is_winding_consistent:
        repair.fix_winding(mesh)
    if mesh.volume < 0:
        mesh.invert()
    return mesh


def simplify(mesh: trimesh.Trimesh, faces: int) -> trimesh.Trimesh:
    """At most `faces` triangles by quadric edge collapse, watertight if the mesh was.

    Tries gentler collapses if one tears the mesh; returns the best. A mesh already small enough is returned
    as it is. Raises ValueError for fewer than 4 faces.
    """
    import fast_simplification
    import trimesh

    if faces < 4:
        raise ValueError(f"faces {faces} must be at least 4, the faces of a tetrahedron")
    if len(mesh.faces) <= faces:
        return mesh
    best: trimesh.Trimesh | None = None
    for aggression in (7, 5, 3, 1):
        vertices, triangles = fast_simplification.simplify(
            np.asarray(mesh.vertices, np.float32),
            np.asarray(mesh.faces, np.int32),
            target_count=faces,
            agg=aggression,
        )
        candidate = trimesh.Trimesh(vertices, triangles, process=False)
        candidate.update_faces(candidate.nondegenerate_faces() & candidate.unique_faces())
        candidate.remove_unreferenced_vertices()
        if mesh.is_watertight and not candidate.is_watertight:
            candidate.fill_holes()
        fits = len(candidate.faces) <= faces
        if best is None or (fits and candidate.is_watertight > best.is_watertight):
            best = candidate
        if fits and candidate.is_watertight >= mesh.is_watertight:
            break
    assert best is not None
    return orient(best)

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

FLAT = 0.05
"""A closed mesh with a smaller share of the volume that it had has collapsed into itself."""
MORE = 20
"""Where so many times the faces that were asked for are closed, the way on from there is tried."""


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
    """A tidied copy: vertices merged, degenerate, double and floating faces removed, normals outward.

    On plain arrays with one table of edges: a trimesh hashes and sorts its arrays anew for every question.
    """
    import trimesh
    from trimesh import grouping, triangles, util

    if not 0 <= floater_ratio <= 1:
        raise ValueError(f"floater ratio {floater_ratio} must be in [0, 1]")
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    digits = util.decimal_to_digits(trimesh.constants.tol.merge)
    first, merged = grouping.unique_rows(vertices, digits=digits, keep_order=True)
    vertices, faces = vertices[first], merged[faces]
    good = triangles.nondegenerate(vertices[faces])
    good[good] = _first_of_each(np.sort(faces[good], axis=1))
    faces = faces[good]
    edges = shared_edges(faces)
    keep = _of_large_parts(edges, len(faces), floater_ratio)
    consistent = bool(edges.opposite[keep[edges.faces[:, 0]]].all())
    tidy = trimesh.Trimesh(vertices, faces[keep], process=False)
    tidy.remove_unreferenced_vertices()
    return orient(tidy, consistent)


@dataclass(frozen=True)
class SharedEdges:
    """Edges of two faces. faces `[E, 2]`; opposite `[E]`: whether the two run along it in opposite ways."""

    faces: np.ndarray
    opposite: np.ndarray


def shared_edges(faces_F3: np.ndarray) -> SharedEdges:
    """Pairs of faces that share an edge which no third face has."""
    start, end = faces_F3.reshape(-1), np.roll(faces_F3, -1, axis=1).reshape(-1)
    keys = np.minimum(start, end) * (faces_F3.max(initial=0) + 1) + np.maximum(start, end)
    order = np.argsort(keys)
    change = np.flatnonzero(np.diff(keys[order], prepend=-1, append=-1))
    pairs = order[change[:-1][np.diff(change) == 2][:, None] + [0, 1]]
    upward = (start < end)[pairs]
    return SharedEdges(pairs // 3, upward[:, 0] != upward[:, 1])


def _first_of_each(rows: np.ndarray) -> np.ndarray:
    """Mask of the first of equal rows."""
    from trimesh import grouping

    mask = np.zeros(len(rows), bool)
    mask[grouping.unique_rows(rows)[0]] = True
    return mask


def _of_large_parts(edges: SharedEdges, faces: int, ratio: float) -> np.ndarray:
    """Mask of the faces in connected components with at least `ratio` of the largest one's faces."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not faces:
        return np.zeros(0, bool)
    joined = coo_array((np.ones(len(edges.faces), bool), edges.faces.T), shape=(faces, faces))
    labels = connected_components(joined, directed=False)[1]
    counts = np.bincount(labels)
    mask: np.ndarray = (counts >= ratio * counts.max())[labels]
    return mask


def orient(mesh: trimesh.Trimesh, consistent: bool | None = None) -> trimesh.Trimesh:
    """Make the winding consistent and the volume positive, in place; cavities keep their inward shells.

    consistent: whether the winding is known to be.
    """
    from trimesh import repair

    if not (mesh.is_winding_consistent if consistent is None else consistent):
        repair.fix_winding(mesh)
    corner_F3, second_F3, third_F3 = np.asarray(mesh.vertices)[np.asarray(mesh.faces).T]
    if np.einsum("fi,fi->", corner_F3, np.cross(second_F3, third_F3)) < 0:  # six times the volume
        mesh.invert()
    return mesh


def simplify(mesh: trimesh.Trimesh, faces: int) -> trimesh.Trimesh:
    """At most `faces` triangles by quadric edge collapse; a watertight mesh stays watertight.

    Where so few tear it (a ring takes 14 at least), tries gentler collapses, then keeps more faces than were
    asked for: the fewest found that are closed. A mesh already small enough is returned as it is. Raises
    ValueError for fewer than 4 faces.
    """
    if faces < 4:
        raise ValueError(f"faces {faces} must be at least 4, the faces of a tetrahedron")
    if len(mesh.faces) <= faces:
        return mesh
    for aggression in (7, 5, 3, 1):
        found = _collapse(mesh, faces, aggression)
        if not mesh.is_watertight or (_closed(found, mesh) and len(found.faces) <= faces):
            return orient(found)
    coarse = _collapse(mesh, MORE * faces, 7)  # many tries on a fine mesh would take minutes
    start, target = coarse if _closed(coarse, mesh) else mesh, faces + 1
    while target < len(start.faces):
        for aggression in (7, 5, 3):
            found = _collapse(start, target, aggression)
            if _closed(found, mesh) and len(found.faces) <= target + 2:
                return orient(found)
        target = int(target * 1.1) + 1
    return orient(start)


def _closed(found: trimesh.Trimesh, mesh: trimesh.Trimesh) -> bool:
    """Whether a simplified mesh is closed, and not by lying flat."""
    return bool(found.is_watertight) and abs(found.volume) > FLAT * abs(mesh.volume)


def _collapse(mesh: trimesh.Trimesh, faces: int, aggression: int) -> trimesh.Trimesh:
    """About so many of the faces, without empty and double ones; small holes are filled."""
    import fast_simplification
    import trimesh

    vertices, triangles = fast_simplification.simplify(
        np.asarray(mesh.vertices, np.float32),
        np.asarray(mesh.faces, np.int32),
        target_count=faces,
        agg=aggression,
    )
    found = trimesh.Trimesh(vertices, triangles, process=False)
    found.update_faces(found.nondegenerate_faces() & found.unique_faces())
    found.remove_unreferenced_vertices()
    if mesh.is_watertight and not found.is_watertight:
        found.fill_holes()
    return found

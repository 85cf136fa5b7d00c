"""A lit turntable of a mesh as one picture, rendered in NumPy: no display, no GPU. Torch-free.

Axes: x right, y up, z towards the viewer, as the meshes have them. Shapes: V vertices, F faces, S side in px.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLUMNS, ROWS = 4, 2
SIDE = 256
OVERSAMPLING = 2
ELEVATION = 18.0  # degrees above the horizon
MARGIN = 0.9  # of the half side that the bounding ball fills
BATCH = 2_000_000  # candidate pixels at a time
KEY = np.array([-0.45, 0.75, 0.55]) / np.linalg.norm([-0.45, 0.75, 0.55])
FILL = np.array([0.8, 0.1, 0.5]) / np.linalg.norm([0.8, 0.1, 0.5])
CLAY = np.array([0.86, 0.80, 0.72])
PAPER = (246, 246, 244)

Floats = NDArray[np.float64]


def turntable(mesh: Any, side: int = SIDE) -> Image.Image:
    """Eight views around a trimesh, the front first, on one sheet of 4 x 2 pictures of `side` px."""
    vertices = np.asarray(mesh.vertices, np.float64)
    centre = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    radius = float(np.linalg.norm(vertices - centre, axis=1).max()) or 1.0
    placed = (vertices - centre) / radius * MARGIN
    normals = vertex_normals(placed, np.asarray(mesh.faces))
    colours = surface_colours(mesh)
    sheet = Image.new("RGB", (COLUMNS * side, ROWS * side), PAPER)
    for i in range(COLUMNS * ROWS):
        turn = view_matrix(360.0 * i / (COLUMNS * ROWS), ELEVATION)
        view = render(placed @ turn.T, np.asarray(mesh.faces), normals @ turn.T, side, colours)
        sheet.paste(view, (i % COLUMNS * side, i // COLUMNS * side))
    return sheet


def surface_colours(mesh: Any) -> Floats | None:
    """Of each vertex [V, 3] in 0 to 1, where a trimesh has them."""
    if mesh.visual.kind != "vertex":
        return None
    return np.asarray(mesh.visual.vertex_colors, np.float64)[:, :3] / 255


def view_matrix(azimuth: float, elevation: float) -> Floats:
    """Rotation that turns an object by azimuth and tips its top towards the viewer; degrees."""
    a, e = np.radians([azimuth, elevation])
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    tip = np.array([[1, 0, 0], [0, np.cos(e), -np.sin(e)], [0, np.sin(e), np.cos(e)]])
    matrix: Floats = tip @ turn
    return matrix


def vertex_normals(vertices: Floats, faces: NDArray[Any]) -> Floats:
    """Unit normals [V, 3], means over the faces around, weighted by area."""
    corners = vertices[faces]
    face = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.zeros_like(vertices)
    for corner in range(3):
        for axis in range(3):
            normals[:, axis] += np.bincount(faces[:, corner], face[:, axis], len(vertices))
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.asarray(normals / np.maximum(length, 1e-12))


def render(
    vertices: Floats, faces: NDArray[Any], normals: Floats, side: int, colours: Floats | None = None
) -> Image.Image:
    """One orthographic view from +z of vertices inside the unit ball, `side` px after oversampling.

    colours: of each vertex [V, 3], 0 to 1; None: clay.
    """
    n = side * OVERSAMPLING
    colours = np.broadcast_to(CLAY, vertices.shape) if colours is None else colours
    xy = np.stack([(vertices[:, 0] + 1) / 2 * n, (1 - vertices[:, 1]) / 2 * n], axis=1)
    corners = xy[faces]
    area = _cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    facing = area < -1e-9  # pixel rows run downwards
    faces, corners, area = faces[facing], corners[facing], area[facing]
    depth, normal, colour = np.full(n * n, -np.inf), np.zeros((n * n, 3)), np.zeros((n * n, 3))
    low = np.floor(corners.min(axis=1)).astype(int)
    size = (np.ceil(corners.max(axis=1)).astype(int) - low).max(axis=1, initial=1)
    size = np.where(size > 8, 1 << np.ceil(np.log2(np.maximum(size, 1))).astype(int), size)
    # faces of like size together: each tests a square of pixels that covers it
    for square in np.unique(size):
        chosen = np.flatnonzero(size == square)
        step = max(1, BATCH // int(square) ** 2)
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            triangle, index, weight = _cover(corners[part], area[part], low[part], int(square), n)
            triangle = faces[part[triangle]]
            height = (weight * vertices[triangle, 2]).sum(axis=1)
            np.maximum.at(depth, index, height)
            front = height >= depth[index]
            for given, seen in ((normals, normal), (colours, colour)):
                seen[index[front]] = (weight[front, :, None] * given[triangle[front]]).sum(axis=1)
    shaded = _shade(depth.reshape(n, n), normal.reshape(n, n, 3), colour.reshape(n, n, 3))
    return shaded.resize((side, side), Image.Resampling.BOX)


def _cover(
    corners: Floats, area: Floats, low: NDArray[Any], square: int, n: int
) -> tuple[NDArray[Any], NDArray[Any], Floats]:
    """Which pixels of its square each triangle covers: triangle [X], pixel [X], barycentric [X, 3]."""
    down, right = (g.reshape(1, -1) for g in np.indices((square, square)))
    a, b, c = (corners[:, i] for i in range(3))
    first = low + 0.5

    def weight(p: Floats, q: Floats) -> Floats:
        """Edge function of p -> q over the area: linear in the pixel, so three numbers a triangle do."""
        edge = (q - p) / area[:, None]
        start = _cross(edge, first - p)
        return np.asarray(start[:, None] - edge[:, 1:] * right + edge[:, :1] * down)

    of_a, of_b = weight(b, c), weight(c, a)
    which, where = np.nonzero((of_a >= -1e-9) & (of_b >= -1e-9) & (of_a + of_b <= 1 + 1e-9))
    chosen = np.stack([of_a[which, where], of_b[which, where]], axis=1)
    weights = np.concatenate([chosen, 1 - chosen.sum(axis=1, keepdims=True)], axis=1)
    row, column = low[which, 1] + down[0, where], low[which, 0] + right[0, where]
    return which, row * n + column, weights


def _cross(u: Floats, v: Floats) -> Floats:
    return np.asarray(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])


def _shade(depth: Floats, normal: Floats, colour: Floats) -> Image.Image:
    """Matte surfaces under a key light, a weak fill light and the sky, on paper."""
    normal = normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    light = 0.30 + 0.12 * normal[..., 1]
    light = light + 0.62 * np.maximum(normal @ KEY, 0) + 0.16 * np.maximum(normal @ FILL, 0)
    lit = (colour * light[..., None]).clip(0, 1) * 255
    seen = np.isfinite(depth)[..., None]
    return Image.fromarray(np.where(seen, lit, PAPER).round().astype(np.uint8), "RGB")

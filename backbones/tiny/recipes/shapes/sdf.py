"""Signed distance fields in NumPy: primitives, moves and Boolean operations, negative inside.

A field is a function from points (N, 3) to distances (N,). Formulas of the primitives are the well-known
exact ones (collected by Inigo Quilez, "Distance functions"); ellipsoids and cuts are bounds.

Axes: x right, y up, z towards the viewer. Sizes named half_* are half extents.
"""

from collections.abc import Callable, Sequence

import numpy as np

Field = Callable[[np.ndarray], np.ndarray]
Point2 = tuple[float, float]


def sphere(radius: float) -> Field:
    """A ball around the origin."""
    return lambda p: np.linalg.norm(p, axis=-1) - radius


def ellipsoid(half_x: float, half_y: float, half_z: float) -> Field:
    """An ellipsoid; first-order distance, exact at the surface."""
    axes = np.array([half_x, half_y, half_z])

    def field(p: np.ndarray) -> np.ndarray:
        near = np.linalg.norm(p / axes, axis=-1)
        slope = np.linalg.norm(p / axes**2, axis=-1)
        return np.where(slope > 1e-6, near * (near - 1) / np.maximum(slope, 1e-6), -axes.min())

    return field


def box(half_x: float, half_y: float, half_z: float, rounding: float = 0.0) -> Field:
    """A box with rounded edges; the half extents include the rounding."""
    half = np.array([half_x, half_y, half_z]) - rounding

    def field(p: np.ndarray) -> np.ndarray:
        q = np.abs(p) - half
        return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(axis=-1), 0) - rounding

    return field


def cylinder(radius: float, half_height: float, rounding: float = 0.0) -> Field:
    """A cylinder along y."""

    def field(p: np.ndarray) -> np.ndarray:
        q = np.stack([np.hypot(p[:, 0], p[:, 2]) - radius, np.abs(p[:, 1]) - half_height], axis=-1) + rounding
        return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(axis=-1), 0) - rounding

    return field


def torus(radius: float, tube: float) -> Field:
    """A ring around the y axis."""
    return lambda p: np.hypot(np.hypot(p[:, 0], p[:, 2]) - radius, p[:, 1]) - tube


def capsule(start: Sequence[float], end: Sequence[float], radius: float) -> Field:
    """A rod with round ends between two points."""
    a, ba = np.asarray(start, float), np.asarray(end, float) - np.asarray(start, float)

    def field(p: np.ndarray) -> np.ndarray:
        along = np.clip((p - a) @ ba / max(ba @ ba, 1e-9), 0, 1)
        return np.linalg.norm(p - a - along[:, None] * ba, axis=-1) - radius

    return field


def polygon(corners: Sequence[Point2]) -> Callable[[np.ndarray], np.ndarray]:
    """Exact distance of points (N, 2) to a closed polygon, negative inside."""
    a = np.asarray(corners, float)
    b = np.roll(a, -1, axis=0)

    def field(q: np.ndarray) -> np.ndarray:
        edge, gap = b - a, q[:, None] - a
        along = np.clip((gap * edge).sum(-1) / np.maximum((edge**2).sum(-1), 1e-12), 0, 1)
        distance = np.sqrt((((gap - along[..., None] * edge) ** 2).sum(-1)).min(1))
        above = q[:, 1, None] >= a[:, 1], q[:, 1, None] >= b[:, 1]
        left = edge[:, 0] * gap[..., 1] > edge[:, 1] * gap[..., 0]
        crossings = (above[0] & ~above[1] & ~left) | (~above[0] & above[1] & left)
        return np.where(crossings.sum(1) % 2 == 1, -distance, distance)

    return field


def revolve(profile: Sequence[Point2], rounding: float = 0.0) -> Field:
    """A solid of revolution around y; profile: (radius, height) corners, closed along the axis."""
    # Mirrored, so that the axis itself is no edge of the polygon.
    right = list(profile)
    flat = polygon(right + [(-r, y) for r, y in reversed(right)])
    return lambda p: flat(np.stack([np.hypot(p[:, 0], p[:, 2]), p[:, 1]], axis=-1)) - rounding


def frustum(low: float, high: float, half_height: float) -> Field:
    """A cone cut off at both ends: radii at the bottom and at the top."""
    return revolve([(low, -half_height), (high, half_height)])


def extrude(corners: Sequence[Point2], half_depth: float, rounding: float = 0.0) -> Field:
    """A polygon in the x-y plane given a thickness along z."""
    flat = polygon(corners)

    def field(p: np.ndarray) -> np.ndarray:
        q = np.stack([flat(p[:, :2]), np.abs(p[:, 2]) - half_depth + rounding], axis=-1)
        return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(axis=-1), 0) - rounding

    return field


def regular(sides: int, radius: float, inner: float | None = None) -> list[Point2]:
    """Corners of a regular polygon, or of a star when an inner radius is given; one corner points up."""
    count = sides if inner is None else 2 * sides
    angles = np.pi / 2 + 2 * np.pi * np.arange(count) / count
    radii = np.where(np.arange(count) % 2 == 0, radius, radius if inner is None else inner)
    return [(r * np.cos(a), r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]


def move(field: Field, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Field:
    """The field shifted by (x, y, z)."""
    offset = np.array([x, y, z])
    return lambda p: field(p - offset)


def rotation(axis: str, degrees: float) -> np.ndarray:
    """The 3 x 3 matrix that turns points about an axis, counter-clockwise seen from its tip."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def turn(field: Field, axis: str, degrees: float) -> Field:
    """The field turned about an axis through the origin."""
    matrix = rotation(axis, degrees)
    return lambda p: field(p @ matrix)


def around(field: Field, count: int, offset: float = 0.0) -> Field:
    """`count` copies of a field that lies around +z, spread evenly about the y axis; offset in degrees."""

    def repeated(p: np.ndarray) -> np.ndarray:
        radius, step = np.hypot(p[:, 0], p[:, 2]), 2 * np.pi / count
        angle = np.arctan2(p[:, 0], p[:, 2]) - np.radians(offset)
        angle -= step * np.round(angle / step)
        return field(np.stack([radius * np.sin(angle), p[:, 1], radius * np.cos(angle)], axis=-1))

    return repeated


def corners(field: Field, x: float, z: float) -> Field:
    """Four copies at (+-x, +-z): the legs of a table. The field must be symmetric in x and z."""
    offset = np.array([x, 0.0, z])
    return lambda p: field(np.stack([np.abs(p[:, 0]), p[:, 1], np.abs(p[:, 2])], axis=-1) - offset)


def pair(field: Field, x: float) -> Field:
    """Two copies, at +x and (mirrored) at -x."""
    return lambda p: field(np.stack([np.abs(p[:, 0]) - x, p[:, 1], p[:, 2]], axis=-1))


def union(*fields: Field) -> Field:
    """Everything that is in any of the fields."""
    return lambda p: np.min([field(p) for field in fields], axis=0)


def common(*fields: Field) -> Field:
    """Everything that is in all of the fields."""
    return lambda p: np.max([field(p) for field in fields], axis=0)


def cut(field: Field, *tools: Field) -> Field:
    """A field without the tools."""
    return lambda p: np.max([field(p), *(-tool(p) for tool in tools)], axis=0)


def blend(radius: float, first: Field, *others: Field) -> Field:
    """A union with soft seams `radius` wide (polynomial smooth minimum)."""

    def field(p: np.ndarray) -> np.ndarray:
        total = first(p)
        for other in others:
            d = other(p)
            h = np.clip(0.5 + 0.5 * (d - total) / radius, 0, 1)
            total = d + h * (total - d) - radius * h * (1 - h)
        return total

    return field

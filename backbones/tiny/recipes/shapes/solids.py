"""Procedural solids: named kinds with random proportions, colours and yaw, and exact inside/outside tests.

Axes: x right, y up, z towards the viewer.
"""

from dataclasses import dataclass

import numpy as np

from backbones.tiny.recipes.shapes.part import Builder, Draw, Part
from backbones.tiny.recipes.shapes.sdf import rotation
from backbones.tiny.recipes.shapes.solids_home import HOME
from backbones.tiny.recipes.shapes.solids_outdoors import OUTDOORS
from backbones.tiny.recipes.shapes.solids_thin import THIN

HALF_EXTENT = 0.9  # the longest side of every shape spans [-0.9, 0.9], inside the published box of +-1.01
YAW_RANGE = (-50.0, 50.0)  # degrees; a mirrored picture is then also a picture of this kind


@dataclass(frozen=True)
class Solid:
    """A placed solid.

    parts: fields in the builder's own coordinates, with colours. matrix, centre, scale: a point p of the box
    corresponds to (p @ matrix) / scale + centre there.
    """

    name: str
    parts: list[Part]
    matrix: np.ndarray
    centre: np.ndarray
    scale: float

    def _local(self, points_N3: np.ndarray) -> np.ndarray:
        return points_N3 @ self.matrix / self.scale + self.centre

    def distance(self, points_N3: np.ndarray) -> np.ndarray:
        """Signed distance (N,), negative inside."""
        local = self._local(points_N3)
        return self.scale * np.min([field(local) for field, _ in self.parts], axis=0)

    def colour(self, points_N3: np.ndarray) -> np.ndarray:
        """Colour (N, 3) of the nearest part."""
        local = self._local(points_N3)
        nearest = np.argmin([field(local) for field, _ in self.parts], axis=0)
        return np.array([colour for _, colour in self.parts])[nearest]


def _bounds(parts: list[Part], matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounding box after the yaw, to a hundredth of the shape: a coarse grid over +-2.4, then a finer one."""
    low, high = np.full(3, -2.4), np.full(3, 2.4)
    for cells in (36, 56):
        axes = [np.linspace(a, b, cells) for a, b in zip(low, high, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        values = np.min([field(grid @ matrix) for field, _ in parts], axis=0)
        spacing = (high - low) / (cells - 1)
        # A point is near the surface when the distance is below one spacing: thin parts count too.
        inside = grid[values <= (spacing.max() if cells == 36 else 0.25 * spacing.max())]
        low, high = inside.min(0), inside.max(0)
    return low, high


def place(name: str, parts: list[Part], yaw: float) -> Solid:
    """Turn by `yaw` degrees about the vertical, centre, and scale the longest side to the standard extent."""
    matrix = rotation("y", yaw)
    low, high = _bounds(parts, matrix)
    scale = 2 * HALF_EXTENT / float((high - low).max())
    return Solid(name, parts, matrix, (low + high) / 2 @ matrix, scale)


def kinds() -> dict[str, Builder]:
    """All builders by name."""
    return {**HOME, **OUTDOORS, **THIN}


def make_solid(name: str, seed: int) -> Solid:
    """The solid of one kind that this seed draws. KeyError names nothing but an unknown kind."""
    draw = Draw(f"{name}-{seed}")
    parts = kinds()[name](draw)
    return place(name, parts, draw(*YAW_RANGE))

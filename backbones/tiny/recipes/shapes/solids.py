"""Procedural solids: named kinds with random proportions, colours and yaw, and exact inside/outside tests.

Axes: x right, y up, z towards the viewer.
"""

import colorsys
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from backbones.tiny.recipes.shapes.sdf import Field, rotation

HALF_EXTENT = 0.9  # the longest side of every shape spans [-0.9, 0.9], inside the published box of +-1.01
YAW_RANGE = (-50.0, 50.0)  # degrees; a mirrored picture is then also a picture of this kind
Colour = tuple[float, float, float]  # sRGB in [0, 1]
Part = tuple[Field, Colour]
Builder = Callable[["Draw"], list[Part]]


class Draw:
    """Seeded random proportions and colours for the builders."""

    def __init__(self, seed: str):
        self.rng = random.Random(seed)

    def __call__(self, low: float, high: float) -> float:
        """A uniform number."""
        return self.rng.uniform(low, high)

    def count(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return self.rng.randint(low, high)

    def flip(self, share: float = 0.5) -> bool:
        """True with this probability."""
        return self.rng.random() < share

    def colour(self) -> Colour:
        """Any clear colour; now and then a grey."""
        if self.flip(0.12):
            grey = self(0.25, 0.9)
            return (grey, grey, grey)
        return colorsys.hsv_to_rgb(self(0, 1), self(0.45, 0.95), self(0.5, 0.98))

    def near(self, hue: float, saturation: float, value: float) -> Colour:
        """A colour close to the named one; one in six is any colour."""
        if self.flip(1 / 6):
            return self.colour()
        return colorsys.hsv_to_rgb(
            (hue + self(-0.04, 0.04)) % 1,
            min(1.0, saturation * self(0.8, 1.2)),
            min(1.0, value * self(0.8, 1.2)),
        )

    def wood(self) -> Colour:
        """Browns."""
        return self.near(0.08, 0.6, 0.6)

    def leaf(self) -> Colour:
        """Greens."""
        return self.near(0.32, 0.65, 0.6)

    def steel(self) -> Colour:
        """Greys."""
        return self.near(0.6, 0.08, 0.65)


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
    from backbones.tiny.recipes.shapes.solids_home import HOME
    from backbones.tiny.recipes.shapes.solids_outdoors import OUTDOORS

    return {**HOME, **OUTDOORS}


def make_solid(name: str, seed: int) -> Solid:
    """The solid of one kind that this seed draws. KeyError names nothing but an unknown kind."""
    draw = Draw(f"{name}-{seed}")
    parts = kinds()[name](draw)
    return place(name, parts, draw(*YAW_RANGE))

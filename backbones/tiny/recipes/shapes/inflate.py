"""Silhouettes inflated to closed puffy solids: the front view of every picture of flat art has a shape.

The height over the mask is HEIGHT * sqrt(u) where laplacian(u) = -4 inside and u = 0 on the outline: a disc
becomes an oblate ball, a strip an elliptic rod, without the creases of a distance transform.

Axes: x right, y up, z towards the viewer. Shapes: n side of the mask's square, px; C its canvas in [-1, 1].
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve
from skimage.measure import marching_cubes

from backbones.hunyuan3d.image_processor import ImageProcessor
from backbones.tiny.recipes.shapes.solids import HALF_EXTENT

BORDER = 0.15  # the image processor's: the object spans 85 % of the canvas
CANVAS_HALF = HALF_EXTENT / (1 - BORDER)  # what the canvas spans in the box
HEIGHT = 0.65  # one factor for all: a random one could not be told from the picture
MASK_SIDE = 96  # px; finer than a token of the conditioner, coarse enough for 20 ms a shape
MIN_AREA, MIN_THICKNESS = 0.04, 0.045  # of the canvas; sparks and hairlines are no shapes
MIN_MAIN = 0.9  # share of the area that the largest piece must have


def canvas_mask(rgba: np.ndarray, side: int = MASK_SIDE) -> np.ndarray:
    """Coverage (n, n) float32 in [0, 1] on the processor's canvas: alpha, recentred, holes filled.

    Alpha, not colour: white art on white would leave an outline only. Holes are filled because a picture on
    white does not tell a hole from white paint.
    """
    _, mask = ImageProcessor(side, BORDER).recenter(rgba)
    small = Image.fromarray(mask[..., 0]).resize((side, side), Image.Resampling.BOX)
    soft = np.asarray(small, np.float32) / 255
    filled = ndimage.binary_fill_holes(soft > 0.5)
    return np.where(filled & (soft <= 0.5), 1.0, soft)


def main_piece(soft: np.ndarray) -> np.ndarray | None:
    """The mask of the largest piece, or None when the art is in several pieces, tiny or thin."""
    labels, count = ndimage.label(soft > 0.5)
    if count == 0:
        return None
    areas = np.bincount(labels.ravel())[1:]
    mask = labels == 1 + int(areas.argmax())
    thickness = ndimage.distance_transform_edt(mask).max() / len(soft)
    if areas.max() < MIN_MAIN * areas.sum() or mask.mean() < MIN_AREA or thickness < MIN_THICKNESS:
        return None
    return mask


def solve_height(mask: np.ndarray) -> np.ndarray:
    """Solution u (n, n) of laplacian(u) = -4 inside the mask, u = 0 outside, in box units squared."""
    index = np.full(mask.shape, -1)
    index[mask] = np.arange(mask.sum())
    count, spacing = int(mask.sum()), 2 * CANVAS_HALF / len(mask)
    rows, columns = [], []
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        neighbour = np.roll(index, step, axis)[mask]
        inside = neighbour >= 0
        rows.append(np.flatnonzero(inside))
        columns.append(neighbour[inside])
    row, column = np.concatenate(rows), np.concatenate(columns)
    system = sparse.csc_matrix((-np.ones(len(row)), (row, column)), (count, count)) + 4 * sparse.eye(count)
    u = np.zeros(mask.shape)
    u[mask] = spsolve(system.tocsc(), np.full(count, 4 * spacing**2))
    return u


@dataclass(frozen=True)
class Puff:
    """An inflated silhouette. level (n, n): HEIGHT^2 u inside, negative outside; row 0 is the top."""

    level: np.ndarray

    def sign_field(self, points_N3: np.ndarray) -> np.ndarray:
        """level(x, y) - z^2 at points: positive inside, zero on the surface, no distance."""
        side = len(self.level)
        column = (points_N3[:, 0] / CANVAS_HALF + 1) / 2 * side - 0.5
        row = (1 - points_N3[:, 1] / CANVAS_HALF) / 2 * side - 0.5
        level = ndimage.map_coordinates(self.level, [row, column], order=1, mode="nearest")
        return level - points_N3[:, 2] ** 2

    def mesh(self, layers: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Closed triangles of the surface: vertices (V, 3), faces (F, 3), normals outward."""
        top = 1.15 * np.sqrt(max(float(self.level.max()), 1e-4))
        z = np.linspace(-top, top, layers)
        # Axes in the order x, y, z; rows of a picture run downwards.
        volume = self.level.T[:, ::-1, None] - z[None, None, :] ** 2
        spacing = 2 * CANVAS_HALF / len(self.level)
        padded = np.pad(volume, 1, constant_values=float(volume.min()))
        vertices, faces, _, _ = marching_cubes(padded, 0.0)
        edge = np.array([-CANVAS_HALF + spacing / 2, -CANVAS_HALF + spacing / 2, -top])
        scale = np.array([spacing, spacing, z[1] - z[0]])
        return ((vertices - 1) * scale + edge).astype(np.float32), faces[:, ::-1]


def inflate(rgba: np.ndarray) -> Puff | None:
    """The puffy solid of an RGBA picture, or None when its silhouette is not one clear piece."""
    soft = canvas_mask(rgba)
    mask = main_piece(soft)
    if mask is None:
        return None
    level = HEIGHT**2 * ndimage.gaussian_filter(solve_height(mask), 0.6)
    # Outside, the slope of u at the outline goes on, so that the zero level lies between pixels.
    spacing = 2 * CANVAS_HALF / len(mask)
    away = ndimage.distance_transform_edt(~mask) * spacing
    outside = -0.25 * np.minimum(away, 0.5) * HEIGHT**2
    level = np.where(mask, np.maximum(level, 1e-5), outside)
    return Puff(level)


def warp(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random turn, stretch and slant of a picture, whole inside a larger transparent square."""
    turn, stretch = np.radians(rng.uniform(-30, 30)), np.exp(rng.uniform(-0.35, 0.35))
    slant = rng.uniform(-0.3, 0.3)
    rotate = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    forward = rotate @ np.array([[stretch, slant], [0, 1 / stretch]])
    side = int(1.9 * max(rgba.shape[:2]))
    backward = np.linalg.inv(forward)
    source_centre = np.array([rgba.shape[1], rgba.shape[0]]) / 2
    offset = source_centre - backward @ np.array([side, side]) / 2
    data = (*backward[0], offset[0], *backward[1], offset[1])
    # Colours are premultiplied while resampling, or transparent black would bleed into the outline.
    picture = (
        Image.fromarray(rgba)
        .convert("RGBa")
        .transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
    )
    return np.asarray(picture.convert("RGBA"))

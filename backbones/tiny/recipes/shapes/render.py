"""Pictures of solids without a display: sphere tracing of distance fields, and first hits in sampled volumes.

Camera: before the object on +z, raised by an elevation, mild perspective. Shapes: S side of the picture, px.
"""

import numpy as np
from scipy import ndimage

from backbones.tiny.recipes.shapes.sdf import rotation
from backbones.tiny.recipes.shapes.solids import Solid

DISTANCE = 6.0  # of the camera from the centre
VIEW_HALF = 1.5  # half side of the picture's square at the centre
REACH = 1.65  # radius of the ball that holds every placed solid
MAX_STEPS = 64
HIT = 3e-3
LIGHT = np.array([-0.45, 0.75, 0.55]) / np.linalg.norm([-0.45, 0.75, 0.55])
_TETRAHEDRON = np.array([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], float)


def rays(side: int, elevation: float) -> tuple[np.ndarray, np.ndarray]:
    """Camera position (3,) and unit directions (S * S, 3), row by row; elevation in degrees."""
    # Seen from a raised camera, the object tips towards the viewer: the rays turn the other way.
    tilt = rotation("x", -elevation)
    steps = (np.arange(side) + 0.5) / side * 2 - 1
    rows, columns = np.meshgrid(-steps, steps, indexing="ij")
    aim = np.stack([columns * VIEW_HALF, rows * VIEW_HALF, np.full_like(rows, -DISTANCE)], axis=-1)
    aim = aim.reshape(-1, 3) / np.linalg.norm(aim.reshape(-1, 3), axis=-1, keepdims=True)
    return tilt @ np.array([0.0, 0.0, DISTANCE]), aim @ tilt.T


def trace(solid: Solid, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First hits: indices (H,) of the rays that hit, and the points (H, 3)."""
    middle = -directions @ origin
    miss2 = (origin**2).sum() - middle**2
    alive = np.flatnonzero(miss2 < REACH**2)
    half_chord = np.sqrt(REACH**2 - miss2[alive])
    depth, end = middle[alive] - half_chord, middle[alive] + half_chord
    hits, points = [], []
    for _ in range(MAX_STEPS):
        p = origin + depth[:, None] * directions[alive]
        distance = solid.distance(p)
        hit = distance < HIT
        hits.append(alive[hit])
        points.append(p[hit])
        # Ellipsoids and blends overestimate a little, so steps are shortened.
        depth = depth + 0.9 * distance
        keep = ~hit & (depth < end)
        alive, depth, end = alive[keep], depth[keep], end[keep]
        if not len(alive):
            break
    return np.concatenate(hits), np.concatenate(points)


def normals(solid: Solid, points: np.ndarray, step: float = 2e-3) -> np.ndarray:
    """Unit outward normals (N, 3) by four differences."""
    total = sum(k * solid.distance(points + step * k)[:, None] for k in _TETRAHEDRON)
    return total / np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), 1e-9)


def shade(normal: np.ndarray, to_eye: np.ndarray, colour: np.ndarray, open_sky: np.ndarray) -> np.ndarray:
    """Colours (N, 3), sRGB in [0, 1]: sky light, one lamp, a soft highlight. open_sky (N,) dims corners."""
    sky = 0.5 + 0.5 * normal[:, 1]
    lamp = np.clip(normal @ LIGHT, 0, 1)
    half = LIGHT + to_eye
    half = half / np.linalg.norm(half, axis=-1, keepdims=True)
    gloss = np.clip((normal * half).sum(-1), 0, 1) ** 32
    light = open_sky * (0.36 + 0.22 * sky) + 0.62 * lamp
    return np.clip(colour * light[:, None] + 0.12 * gloss[:, None], 0, 1)


def render_solid(solid: Solid, side: int = 112, elevation: float = 22.0) -> np.ndarray:
    """A shaded picture (S, S, 4) uint8 RGBA on a transparent background."""
    origin, directions = rays(side, elevation)
    index, points = trace(solid, origin, directions)
    picture = np.zeros((side * side, 4), np.uint8)
    if len(index):
        normal = normals(solid, points)
        probe = 0.12
        open_sky = np.clip(solid.distance(points + probe * normal) / probe, 0.3, 1)
        colour = shade(normal, -directions[index], solid.colour(points), open_sky)
        picture[index, :3] = np.rint(255 * colour)
        picture[index, 3] = 255
    return picture.reshape(side, side, 4)


def render_volume(
    values_RRR: np.ndarray, yaw: float = 0.0, elevation: float = 15.0, side: int = 96
) -> np.ndarray:
    """A shaded picture (S, S, 3) uint8 on white of the zero level of a cubic grid, positive inside.

    The grid's axes are x, y, z; yaw and elevation turn the object, in degrees. Parallel projection.
    """
    resolution = values_RRR.shape[0]
    turned = rotation("x", elevation) @ rotation("y", yaw)
    # affine_transform maps output to input, so it needs the inverse turn: the transpose.
    scale = 1.25 * resolution / side
    centre_in, centre_out = (resolution - 1) / 2, (side - 1) / 2
    matrix = turned.T * scale
    offset = centre_in - matrix @ np.full(3, centre_out)
    outside = float(min(values_RRR.min(), -1e-3))
    volume = ndimage.affine_transform(
        values_RRR.astype(np.float32), matrix, offset, (side,) * 3, order=1, cval=outside
    )
    inside = volume[:, :, ::-1] > 0  # nearest to the viewer first
    hit = inside.any(axis=2)
    depth = side - 1 - inside.argmax(axis=2)
    slopes = np.gradient(ndimage.gaussian_filter(volume, 1.0))
    x, y = np.nonzero(hit)
    normal = -np.stack([slope[x, y, depth[x, y]] for slope in slopes], axis=-1)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-9)
    colour = shade(normal, np.array([[0.0, 0.0, 1.0]]), np.array([[0.72, 0.74, 0.8]]), np.ones(len(x)))
    picture = np.full((side, side, 3), 255, np.uint8)
    picture[side - 1 - y, x] = np.rint(255 * colour)
    return picture

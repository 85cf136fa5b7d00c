"""Colours of a mesh from the picture it was made of, laid on its front and, mirrored, on its back.

Axes as the meshes have them: x right, y up, z towards the viewer. Shapes: V vertices, H, W rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edit_cli.generation.turntable import vertex_normals

SIDE = 512
"""Px of the picture's longer side that colours are read from."""
EDGE, SOFT = 0.015, 0.05
"""Of that side: what is left out along the outline, where the background shines through; how far colours of
surfaces that are seen edge on are mixed."""
GRAZING, FACING = 0.15, 0.6
"""Between these cosines of a normal to the line of sight, mixed colours become the picture's own."""
MATTE = {"baseColorFactor": [1.0, 1.0, 1.0, 1.0], "metallicFactor": 0.0, "roughnessFactor": 1.0}

Floats = NDArray[np.float64]


def colour(mesh: Any, pictures: Mapping[str, Image.Image]) -> None:
    """Give a trimesh vertex colours (sRGB). pictures: RGBA by view; without "back" it has the front's."""
    vertices = np.asarray(mesh.vertices, np.float64)
    normals = vertex_normals(vertices, np.asarray(mesh.faces))
    front = next(iter(pictures.values())) if "front" not in pictures else pictures["front"]
    colours = project(vertices, normals[:, 2], front)
    if "back" in pictures:
        behind = project(vertices * [-1, 1, -1], -normals[:, 2], pictures["back"])
        share = smooth(normals[:, 2], -GRAZING, GRAZING)[:, None]
        colours = share * colours + (1 - share) * behind
    opaque = np.full((len(vertices), 1), 255.0)
    mesh.visual.vertex_colors = np.hstack([colours, opaque]).round().clip(0, 255).astype(np.uint8)


def project(vertices: Floats, facing: Floats, picture: Image.Image) -> Floats:
    """Colours [V, 3] in 0 to 255 that a picture [H, W] of RGBA gives to vertices [V, 3] seen from +z.

    The box around the vertices is laid on the box around the picture's foreground. facing: normals' z [V].
    """
    from scipy import ndimage

    sharp = foreground(picture)
    size = np.array(sharp.shape[:2])
    soft = ndimage.gaussian_filter(sharp, (SOFT * size.max(), SOFT * size.max(), 0), mode="nearest")
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    across = (vertices - low) / np.maximum(high - low, 1e-12)
    places = np.stack([(1 - across[:, 1]) * (size[0] - 1), across[:, 0] * (size[1] - 1)])
    own, mixed = (
        np.stack([ndimage.map_coordinates(of[..., c], places, order=1, mode="nearest") for c in range(3)], 1)
        for of in (sharp, soft)
    )
    share = smooth(np.abs(facing), GRAZING, FACING)[:, None]
    return np.asarray(share * own + (1 - share) * mixed)


def foreground(picture: Image.Image) -> Floats:
    """The box around what is opaque [H, W, 3]; everything else has the nearest opaque pixel's colour."""
    from scipy import ndimage

    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    cut = picture.crop(box) if box else picture
    cut.thumbnail((SIDE, SIDE))
    rgba = np.asarray(cut, np.float64)
    inside = rgba[..., 3] > 127
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    kept = depth > min(EDGE * max(inside.shape), depth.max() / 2)
    nearest = ndimage.distance_transform_edt(~kept, return_distances=False, return_indices=True)
    return np.asarray(rgba[..., :3][tuple(nearest)])


def smooth(values: Floats, low: float, high: float) -> Floats:
    """From 0 at `low` to 1 at `high` without a kink."""
    x = ((values - low) / (high - low)).clip(0, 1)
    return np.asarray(x * x * (3 - 2 * x))


def linear(mesh: Any) -> Any:
    """A copy with its vertex colours in linear light, as glTF 2.0 wants COLOR_0 (section 3.9.2)."""
    copy = mesh.copy()
    colours = np.asarray(mesh.visual.vertex_colors, np.float64)
    x = colours[:, :3] / 255
    colours[:, :3] = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) * 255
    copy.visual.vertex_colors = colours.round().astype(np.uint8)
    return copy


def add_matte(tree: dict[str, Any]) -> None:
    """Give the meshes of a glTF tree a material that does not shine: the default one is metal."""
    tree["materials"] = [{"name": "matte", "pbrMetallicRoughness": dict(MATTE)}]
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            primitive["material"] = 0

"""From a picture with alpha to the square tensor the conditioner takes.

The published processor uses OpenCV. Its three resamplings are written out here in NumPy and PyTorch, so
OpenCV is not needed; values differ by at most 2 of 255 levels.

Shapes: H, W rows and columns of the picture, S side of the result; all in px.
"""

# mypy: no-warn-return-any
from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse import csr_array
from torch import Tensor

from .alpha import solid
from .conditioner import VIEW_INDEX


def resample_weights(n_in: int, n_out: int, shrink: bool) -> csr_array:
    """Weights `[n_out, n_in]` of OpenCV's INTER_AREA along one axis, nearly all of them 0.

    shrink: exact fractional box average. Otherwise (either axis grows): OpenCV's linear variant, in which
    each output sample mixes the source samples it starts and ends in.
    """
    ratio, rows = n_in / n_out, np.arange(n_out)
    if shrink:
        columns = np.floor(rows * ratio).astype(int)[:, None] + np.arange(int(np.ceil(ratio)) + 1)
        overlap = np.minimum((rows[:, None] + 1) * ratio, columns + 1)
        overlap -= np.maximum(rows[:, None] * ratio, columns)
        weights = np.clip(overlap, 0.0, None) / ratio
    else:
        first = np.minimum(np.floor(rows * ratio).astype(int), n_in - 1)
        mix = (rows + 1) - (first + 1) / ratio
        mix = np.where((mix > 0) & (first < n_in - 1), mix - np.floor(mix), 0.0)
        columns, weights = np.stack([first, first + 1], 1), np.stack([1.0 - mix, mix], 1)
    at = np.broadcast_to(rows[:, None], columns.shape)
    used = (weights > 0) & (columns < n_in)
    return csr_array((weights[used].astype(np.float32), (at[used], columns[used])), (n_out, n_in))


def resize_area(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's INTER_AREA for uint8 pictures."""
    rows, columns, channels = image_HWC.shape
    shrink = height <= rows and width <= columns
    vertical, horizontal = resample_weights(rows, height, shrink), resample_weights(columns, width, shrink)
    out = np.empty((height, width, channels), np.uint8)
    for channel in range(channels):  # one at a time, which takes a quarter of the memory
        values = horizontal @ (vertical @ image_HWC[..., channel].astype(np.float32)).T
        out[..., channel] = np.rint(values, out=values).clip(0, 255, out=values).T
    return out


def resize_cubic(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """OpenCV's INTER_CUBIC for uint8 pictures: bicubic with A = -0.75, no antialiasing."""
    x = torch.from_numpy(image_HWC.astype(np.float32)).permute(2, 0, 1)[None]
    x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()


def resize_nearest(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """OpenCV's INTER_NEAREST: source index floor(i * n / size)."""
    rows, columns = image_HWC.shape[:2]
    index = np.arange(size)
    return image_HWC[(index * rows // size)[:, None], (index * columns // size)[None, :]]


class ImageProcessor:
    """Cut out the foreground, centre it on a white square with a border, resize to `size` px.

    size: side of the result. border_ratio: share of the canvas left free, in [0, 1). The background must
    have been removed already: the foreground is where alpha is more than faint (`solid`).
    """

    def __init__(self, size: int = 512, border_ratio: float | None = 0.15) -> None:
        border = 0.15 if border_ratio is None else border_ratio
        if not 0 <= border < 1 or size < 1:
            raise ValueError(f"size {size} must be at least 1 and border_ratio {border} in [0, 1)")
        self.size, self.border_ratio = size, border

    def recenter(self, rgba_HW4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 RGBA to uint8 rgb `[n, n, 3]` on white and mask `[n, n, 1]`, n = max(H, W).

        The last row and column of the bounding box are dropped, as published.
        Raises ValueError if nothing, or only a line of one pixel, is opaque.
        """
        mask = solid(rgba_HW4[..., 3])
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = (int(np.ptp(each)) if each.size else 0 for each in (rows, columns))
        if height == 0 or width == 0:
            raise ValueError(
                "the picture has no foreground: its alpha channel is empty or one pixel thin; "
                "remove the background or check the alpha"
            )
        crop = rgba_HW4[rows[0] : rows[0] + height, columns[0] : columns[0] + width]
        side = max(rgba_HW4.shape[:2])
        scale = int(side * (1 - self.border_ratio)) / max(height, width)
        new_height, new_width = max(1, int(height * scale)), max(1, int(width * scale))
        top, left = (side - new_height) // 2, (side - new_width) // 2
        place = slice(top, top + new_height), slice(left, left + new_width)
        placed = resize_area(crop, new_height, new_width)
        alpha = placed[..., 3:].astype(np.float32) / 255
        rgb, full = np.full((side, side, 3), 255, np.uint8), np.zeros((side, side, 1), np.uint8)
        rgb[place] = (placed[..., :3] * alpha + 255 * (1 - alpha)).clip(0, 255)
        full[place] = (alpha * 255).clip(0, 255)
        return rgb, full

    def __call__(self, image: Image.Image) -> dict[str, Tensor]:
        """A PIL picture to `image [1, 3, S, S]` and `mask [1, 1, S, S]`, both float32 in [-1, 1]."""
        rgb, mask = self.recenter(np.asarray(image.convert("RGBA")))
        return {
            "image": _to_tensor(resize_cubic(rgb, self.size)),
            "mask": _to_tensor(resize_nearest(mask, self.size)),
        }


class Views(NamedTuple):
    """The views of one object: `image [1, V, 3, S, S]`, `mask [1, V, 1, S, S]` and the V view indices."""

    image: Tensor
    mask: Tensor
    indices: list[int]


class MultiViewImageProcessor(ImageProcessor):
    """The same for named views: `{"front": picture, "left": ...}`, sorted by view index."""

    def views(self, images: Mapping[str, Image.Image]) -> Views:
        """Process the views of one object. Raises ValueError on unknown names."""
        unknown = set(images) - set(VIEW_INDEX)
        if unknown or not images:
            raise ValueError(f"views {sorted(images)}: give at least one of {', '.join(VIEW_INDEX)}")
        ordered = sorted(images, key=VIEW_INDEX.__getitem__)
        done = [self(images[name]) for name in ordered]
        image, mask = (torch.stack([item[key] for item in done], dim=1) for key in ("image", "mask"))
        return Views(image, mask, [VIEW_INDEX[name] for name in ordered])


def _to_tensor(image_HWC: np.ndarray) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(image_HWC)).float() / 255 * 2 - 1
    return x.permute(2, 0, 1)[None]

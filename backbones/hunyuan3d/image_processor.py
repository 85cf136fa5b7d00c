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
from torch import Tensor

from .conditioner import VIEW_INDEX


def resample_weights(n_in: int, n_out: int, shrink: bool) -> np.ndarray:
    """Weights `[n_out, n_in]` of OpenCV's INTER_AREA along one axis.

    shrink: exact fractional box average. Otherwise (either axis grows): OpenCV's linear variant, in which
    each output sample mixes the source samples it starts and ends in.
    """
    weights = np.zeros((n_out, n_in))
    ratio = n_in / n_out
    for row in range(n_out):
        if shrink:
            starts = np.arange(n_in)
            overlap = np.minimum((row + 1) * ratio, starts + 1) - np.maximum(row * ratio, starts)
            weights[row] = np.clip(overlap, 0.0, None) / ratio
            continue
        first = int(np.floor(row * ratio))
        mix = (row + 1) - (first + 1) / ratio
        mix = mix - np.floor(mix) if mix > 0 else 0.0
        if first >= n_in - 1:
            first, mix = n_in - 1, 0.0
        weights[row, first] = 1.0 - mix
        if mix:
            weights[row, first + 1] = mix
    return weights


def resize_area(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's INTER_AREA for uint8 pictures."""
    rows, columns = image_HWC.shape[:2]
    shrink = height <= rows and width <= columns
    vertical = resample_weights(rows, height, shrink)
    horizontal = resample_weights(columns, width, shrink)
    out = np.einsum("hr,rcx,wc->hwx", vertical, image_HWC.astype(np.float64), horizontal, optimize=True)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


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
    have been removed already: the foreground is where alpha is not 0.
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
        rows, columns = np.nonzero(rgba_HW4[..., 3])
        height = int(np.ptp(rows)) if rows.size else 0
        width = int(np.ptp(columns)) if rows.size else 0
        if height == 0 or width == 0:
            raise ValueError(
                "the picture has no foreground: its alpha channel is empty or one pixel thin; "
                "remove the background or check the alpha"
            )
        crop = rgba_HW4[rows.min() : rows.min() + height, columns.min() : columns.min() + width]
        side = max(rgba_HW4.shape[:2])
        scale = int(side * (1 - self.border_ratio)) / max(height, width)
        new_height, new_width = max(1, int(height * scale)), max(1, int(width * scale))
        top, left = (side - new_height) // 2, (side - new_width) // 2
        canvas = np.zeros((side, side, 4), np.uint8)
        canvas[top : top + new_height, left : left + new_width] = resize_area(crop, new_height, new_width)
        alpha = canvas[..., 3:].astype(np.float32) / 255
        rgb = canvas[..., :3] * alpha + 255 * (1 - alpha)
        return rgb.clip(0, 255).astype(np.uint8), (alpha * 255).clip(0, 255).astype(np.uint8)

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

"""How near two results are: pictures by PSNR, SSIM and side by side, meshes by distance and volume."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.float64]

POINTS = 20_000
"""Points drawn on each surface."""
F_SCORE_DISTANCE = 0.01
"""A point counts as found within this share of the box's side."""


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over RGB, peak 255; infinite for equal pictures."""
    error = float(np.mean((_pixels(a) - _pixels(b)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Structural similarity, mean over RGB: 11-tap Gaussian window, sigma 1.5 (Wang et al. 2004)."""
    x, y = _pixels(a), _pixels(b)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (
        (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    )
    return float(score.mean())


def side_by_side(pictures: dict[str, Image.Image]) -> Image.Image:
    """Pictures in a row, captions above, on white. Small pictures are enlarged so that captions fit."""
    first = next(iter(pictures.values()))
    scale = max(1, math.ceil(256 / first.width))
    width, height, gap = first.width * scale, first.height * scale, 12
    band = 28 + width // 64
    canvas = Image.new("RGB", (len(pictures) * (width + gap) + gap, height + band + gap), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=band * 0.5)
    for i, (caption, picture) in enumerate(pictures.items()):
        left = gap + i * (width + gap)
        canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, band))
        draw.text((left, band / 2), caption, fill="black", font=font, anchor="lm")
    return canvas


def compare_meshes(mesh: Any, reference: Any, volume: Any, reference_volume: Any) -> dict[str, float]:
    """Distances of a mesh to a reference, both with the volume they were cut from (equal grids).

    chamfer: mean distance to the other's nearest point, mean of both ways, as a share of the box's side.
    f_score: harmonic mean of the shares of points within 1 % of the box's side. iou: of the inside, 0 to 1.
    """
    from scipy.spatial import cKDTree
    from trimesh.sample import sample_surface

    side = float((volume.box[1] - volume.box[0]).max())
    a, b = (np.asarray(sample_surface(m, POINTS, seed=0)[0]) / side for m in (mesh, reference))
    there, back = cKDTree(b).query(a)[0], cKDTree(a).query(b)[0]
    precision, recall = ((d <= F_SCORE_DISTANCE).mean() for d in (there, back))
    inside, truly = volume.logits > 0, reference_volume.logits > 0
    union = int((inside | truly).sum())
    return {
        "chamfer": round(float(there.mean() + back.mean()) / 2, 5),
        "f_score": round(float(2 * precision * recall / max(precision + recall, 1e-9)), 4),
        "iou": round(float((inside & truly).sum()) / union, 4) if union else 1.0,
    }


def _pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture.convert("RGB"), dtype=np.float64)


def _blur(x: Pixels) -> Pixels:
    """Separable Gaussian over the first two axes, without padding."""
    taps = min(11, *x.shape[:2])
    at = np.arange(taps) - (taps - 1) / 2
    kernel = np.exp(-(at**2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    rows = sum(k * x[i : x.shape[0] - taps + 1 + i] for i, k in enumerate(kernel))
    return np.asarray(sum(k * rows[:, i : rows.shape[1] - taps + 1 + i] for i, k in enumerate(kernel)))

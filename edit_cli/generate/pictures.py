"""Compare pictures: PSNR, SSIM, side by side. NumPy and Pillow only."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

Pixels = NDArray[np.float64]


def open_rgb(path: str) -> Image.Image:
    """A picture as RGB, upright by its EXIF, transparency on white."""
    with Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


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

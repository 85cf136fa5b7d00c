"""Heatmaps as pictures: one list of shapes, drawn as SVG and, by Pillow, as PNG.

Lightness falls steadily along the scale, so that the maps read in grey too.

Shapes: S steps, N blocks.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edit_cli.profile.trace import EXPLAINED, TITLES, grid, map_title, scale_of, show, shown_runs

RAMP = ((247, 247, 240), (186, 222, 200), (102, 178, 178), (46, 112, 158), (30, 40, 92))
"""Light to dark: paper, green, teal, blue, navy."""
NOTHING, INK, SOFT, PAPER = (224, 224, 224), (28, 28, 32), (110, 110, 118), (255, 255, 255)
CELL, LEFT, TOP, GAP, BAND = (16, 14), 92, 66, 30, 54
"""Width and height of a cell; margins, px."""
PNG_SCALE = 2

Colour = tuple[int, int, int]


@dataclass
class Drawing:
    """Rectangles (x, y, width, height, colour) and texts (x, y, text, size, colour, anchor), in px."""

    width: float
    height: float
    boxes: list[tuple[float, float, float, float, Colour]] = field(default_factory=list)
    texts: list[tuple[float, float, str, float, Colour, str]] = field(default_factory=list)

    def svg(self) -> bytes:
        """A standalone SVG file."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" font-family="sans-serif">',
            f'<rect width="100%" height="100%" fill="{_hex(PAPER)}"/>',
        ]
        for x, y, w, h, colour in self.boxes:
            parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{_hex(colour)}"/>')
        anchors = {"l": "start", "m": "middle", "r": "end"}
        for x, y, text, size, colour, anchor in self.texts:
            parts.append(
                f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{_hex(colour)}" '
                f'text-anchor="{anchors[anchor]}" dominant-baseline="central">{html.escape(text)}</text>'
            )
        return ("\n".join([*parts, "</svg>"]) + "\n").encode()

    def png(self) -> bytes:
        """The same as PNG, twice as large."""
        size = (round(self.width * PNG_SCALE), round(self.height * PNG_SCALE))
        picture = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(picture)
        fonts: dict[float, Any] = {}
        for x, y, w, h, colour in self.boxes:
            corners = [round(v * PNG_SCALE) for v in (x, y, x + w, y + h)]
            draw.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill=colour)
        for x, y, text, points, colour, anchor in self.texts:
            font = fonts.setdefault(points, ImageFont.load_default(size=points * PNG_SCALE))
            draw.text((x * PNG_SCALE, y * PNG_SCALE), text, fill=colour, font=font, anchor=f"{anchor}m")
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
        return buffer.getvalue()


def draw_heatmaps(trace: Mapping[str, Any], metric: str) -> Drawing:
    """Maps of every run side by side, with axes and a scale."""
    runs, names = shown_runs(trace), [block["kind"] for block in trace["blocks"]]
    grids = [grid(trace, run, metric) for run in runs]
    scale = scale_of(metric, grids)
    steps, blocks = grids[0].shape
    wide, tall = CELL
    map_width, map_height = steps * wide, blocks * tall
    width = max(LEFT + len(runs) * (map_width + GAP), 560)
    drawing = Drawing(width, TOP + map_height + BAND + 30)
    drawing.texts += [
        (LEFT, 20, f"{trace['model']}: {TITLES[metric]}", 16, INK, "l"),
        (LEFT, 38, EXPLAINED[metric], 10, SOFT, "l"),
    ]
    for i, (run, values) in enumerate(zip(runs, grids, strict=True)):
        x = LEFT + i * (map_width + GAP)
        drawing.texts.append((x, TOP - 11, map_title(trace, run), 12, INK, "l"))
        for step in range(steps):
            for block in range(blocks):
                colour = colour_at(values[step, block], scale)
                drawing.boxes.append((x + step * wide, TOP + block * tall, wide - 1, tall - 1, colour))
        for step in range(0, steps, 5 if steps > 8 else 1):
            drawing.texts.append((x + (step + 0.5) * wide, TOP + map_height + 9, str(step), 10, SOFT, "m"))
        drawing.texts.append((x + map_width / 2, TOP + map_height + 24, "step", 10, SOFT, "m"))
    every = math.ceil(blocks / 40)
    for block in range(0, blocks, every):
        label = f"{names[block]} {block}"
        drawing.texts.append((LEFT - 6, TOP + (block + 0.5) * tall, label, 10, SOFT, "r"))
    _scale_bar(drawing, metric, scale, TOP + map_height + BAND)
    return drawing


def _scale_bar(drawing: Drawing, metric: str, scale: tuple[float, float], y: float) -> None:
    low, high = scale
    for i in range(100):
        value = low + (high - low) * (i + 0.5) / 100
        drawing.boxes.append((LEFT + 2 * i, y, 2, 10, colour_at(value, scale)))
    drawing.texts.append((LEFT - 6, y + 5, show(metric, low), 10, SOFT, "r"))
    drawing.texts.append((LEFT + 206, y + 5, show(metric, high), 10, SOFT, "l"))
    drawing.boxes.append((LEFT + 280, y, 10, 10, NOTHING))
    drawing.texts.append((LEFT + 296, y + 5, "nothing measured or computed", 10, SOFT, "l"))


def colour_at(value: float, scale: tuple[float, float]) -> Colour:
    """A value's colour on a scale from low to high."""
    if not np.isfinite(value):
        return NOTHING
    low, high = scale
    at = min(max((value - low) / (high - low), 0.0), 1.0) * (len(RAMP) - 1)
    index = min(int(at), len(RAMP) - 2)
    a, b, t = RAMP[index], RAMP[index + 1], at - index
    red, green, blue = (round(p + (q - p) * t) for p, q in zip(a, b, strict=True))
    return red, green, blue


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)

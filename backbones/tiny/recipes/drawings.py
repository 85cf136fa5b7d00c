"""Our own drawings of everyday things that emoji sets lack, from `drawings.txt`, in three looks. Torch-free.

The looks stand in for the emoji styles: "flat" has plain colours, "noto" shades every shape from top to
bottom, "twemoji" is the mirror image in cooler colours.
"""

import colorsys
from functools import cache
from pathlib import Path

DRAWINGS_FILE = Path(__file__).parent / "drawings.txt"
SIDE = 128
PALETTE = {
    "w": "#b5763a", "W": "#7b4a21", "t": "#e3c08f", "k": "#33363d", "g": "#9aa3ad", "G": "#5b6470",
    "l": "#d6dce2", "x": "#f4f6f8", "r": "#de2f3a", "R": "#9e1c2a", "o": "#f58a1f", "O": "#c9641a",
    "y": "#fcc934", "Y": "#d99a16", "n": "#4caf50", "N": "#2e7d32", "b": "#3b88e8", "B": "#1f4fa0",
    "c": "#a9dcf6", "a": "#4fb3ea", "p": "#8e4ec6", "P": "#6a3399", "i": "#f48fb1", "I": "#d65a8a",
    "s": "#ffcc4d",
}  # fmt: skip
LOOKS = ("noto", "fluent-emoji-flat", "twemoji")


@cache
def load_drawings(path: Path = DRAWINGS_FILE) -> dict[str, str]:
    """Name -> shapes as written; '#' starts a comment line."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return {name.strip(): shapes for name, _, shapes in (line.partition(":") for line in lines)}


def shift(colour: str, light: float = 1.0, hue: float = 0.0, saturation: float = 1.0) -> str:
    """A hex colour with scaled lightness and saturation and a moved hue (in turns)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    h, lightness, s = colorsys.rgb_to_hls(red, green, blue)
    lightness = min(1.0, lightness * light)
    rgb = colorsys.hls_to_rgb((h + hue) % 1, lightness, min(1.0, s * saturation))
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def shape_svg(shape: str, paint: dict[str, str]) -> str:
    """One shape of the file's language as SVG. ValueError names a shape that is not in the language."""
    kind, *words = shape.split()
    if kind not in ("r", "c", "e", "p", "d", "l", "s"):
        raise ValueError(f"{shape!r} starts with none of r, c, e, p, d, l, s")
    if kind == "r":
        x, y, width, height, radius, c = words
        return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{paint[c]}"/>'
    if kind == "c":
        return f'<circle cx="{words[0]}" cy="{words[1]}" r="{words[2]}" fill="{paint[words[3]]}"/>'
    if kind == "e":
        x, y, rx, ry, c = words
        return f'<ellipse cx="{x}" cy="{y}" rx="{rx}" ry="{ry}" fill="{paint[c]}"/>'
    if kind == "p":
        return f'<polygon points="{" ".join(words[1:])}" fill="{paint[words[0]]}"/>'
    if kind == "d":
        return f'<path d="{" ".join(words[1:])}" fill="{paint[words[0]]}"/>'
    line = f'fill="none" stroke="{paint[words[0]]}" stroke-width="{words[1]}" stroke-linecap="round"'
    if kind == "l":
        return f'<polyline points="{" ".join(words[2:])}" {line} stroke-linejoin="round"/>'
    return f'<path d="{" ".join(words[2:])}" {line}/>'


def drawing_svg(name: str, look: str, colours: dict[str, str] | None = None) -> str:
    """A drawing as SVG. colours: other paint for some letters of the palette, as hex."""
    palette = {**PALETTE, **(colours or {})}
    shapes = [shape.strip() for shape in load_drawings()[name].split(";") if shape.strip()]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {SIDE}" width="{SIDE}" height="{SIDE}">'
    )
    if look == "noto":
        stops = "".join(
            f'<linearGradient id="{letter}" x1="0" y1="0" x2="0" y2="{SIDE}" gradientUnits="userSpaceOnUse">'
            f'<stop offset="0" stop-color="{shift(colour, 1.14)}"/>'
            f'<stop offset="1" stop-color="{shift(colour, 0.82)}"/></linearGradient>'
            for letter, colour in palette.items()
        )
        paint = {letter: f"url(#{letter})" for letter in palette}
        return f"{head}<defs>{stops}</defs>{''.join(shape_svg(s, paint) for s in shapes)}</svg>"
    if look == "twemoji":
        paint = {letter: shift(colour, 0.96, -0.012, 0.9) for letter, colour in palette.items()}
        body = "".join(shape_svg(s, paint) for s in shapes)
        return f'{head}<g transform="matrix(-1 0 0 1 {SIDE} 0)">{body}</g></svg>'
    return head + "".join(shape_svg(s, palette) for s in shapes) + "</svg>"

"""Pictures inside a terminal that can show them, by kitty's, iTerm2's or the sixel protocol."""

from __future__ import annotations

import base64
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SIDE = 256
"""Px of the longer side, at most."""
MOST = 4
"""Pictures that are shown of a run."""
CHUNK = 4096  # bytes of base64 that kitty takes at once
SIXEL_TERMS = ("foot", "mlterm", "contour", "yaft", "sixel")
COLOURS = 128
"""Of a picture in sixels."""


def protocol(environment: Mapping[str, str], is_terminal: bool) -> str:
    """Which one ("kitty", "iterm", "sixel") the environment tells of; "" where nothing can be shown."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not is_terminal or "TMUX" in environment or term.startswith("screen"):
        return ""
    if "kitty" in term or "ghostty" in term or "KITTY_WINDOW_ID" in environment:
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "vscode") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "sixel" if any(name in term for name in SIXEL_TERMS) else ""


def show(files: Sequence[Path]) -> None:
    """Show the first pictures on stdout where it is such a terminal; nothing otherwise."""
    how = protocol(os.environ, sys.stdout.isatty())
    if not how:
        return
    from PIL import Image, UnidentifiedImageError

    for file in files[:MOST]:
        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
        except (OSError, UnidentifiedImageError):  # a sound, a video
            continue
        picture.thumbnail((SIDE, SIDE))
        sys.stdout.write({"kitty": kitty, "iterm": iterm, "sixel": sixel}[how](picture) + "\n")
    sys.stdout.flush()


def kitty(picture: Image.Image) -> str:
    """A PNG in base64, in chunks (sw.kovidgoyal.net/kitty/graphics-protocol)."""
    data = base64.b64encode(_png(picture)).decode()
    parts = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    head = [f"m={int(part is not parts[-1])}" for part in parts]
    head[0] = f"a=T,f=100,{head[0]}"
    return "".join(f"\x1b_G{keys};{part}\x1b\\" for keys, part in zip(head, parts, strict=True))


def iterm(picture: Image.Image) -> str:
    """A file in base64 (iterm2.com/documentation-images.html)."""
    data = _png(picture)
    text = base64.b64encode(data).decode()
    return f"\x1b]1337;File=inline=1;size={len(data)};width={picture.width}px:{text}\a"


def sixel(picture: Image.Image) -> str:
    """Six rows of pixels a line, one colour after the other (DEC STD 070); repeats as !COUNT."""
    import numpy as np

    few = picture.quantize(COLOURS)
    palette = np.asarray(few.getpalette(), int).reshape(-1, 3)
    index_HW = np.asarray(few)
    lines = [f'\x1bPq"1;1;{picture.width};{picture.height}']
    lines += [f"#{i};2;" + ";".join(str(round(v / 2.55)) for v in palette[i]) for i in np.unique(index_HW)]
    for top in range(0, len(index_HW), 6):
        band = index_HW[top : top + 6]
        weight = 1 << np.arange(len(band))
        for i in np.unique(band):
            bits = ((band == i) * weight[:, None]).sum(axis=0) + 63
            starts = np.flatnonzero(np.diff(bits, prepend=-1))
            counts = np.diff(starts, append=len(bits))
            runs = zip(bits[starts], counts, strict=True)
            lines.append(f"#{i}" + "".join(f"!{n}{chr(b)}" if n > 3 else chr(b) * n for b, n in runs) + "$")
        lines.append("-")
    return "".join(lines) + "\x1b\\"


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

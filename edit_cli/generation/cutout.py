"""Input pictures: any mode Pillow reads, upright, 8 bits; for meshes with the background removed. Torch-free.

Shapes: H, W rows and columns of the picture in px.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from backbones.hunyuan3d.alpha import solid
from backbones.model_files import LFS, is_pointer
from edit_cli.errors import EditError

TOLERANCE = 24
"""Largest difference to the background's colour, per channel of 255, that flood fill still takes for it."""
PLAIN_SHARE = 0.8
"""A border counts as plain when so many of its pixels are within the tolerance of their median."""
CUT_SHARE = 0.01
"""An alpha channel that leaves out a smaller share cuts nothing out: rounded corners, specks."""
MIN_SHARE = 1e-4
"""A foreground of a smaller share of the picture is taken for none."""

Bytes = NDArray[np.uint8]


def open_picture(path: str, where: str) -> Image.Image:
    """Any picture Pillow reads: its first frame, upright by its EXIF, 8 bits a channel, as RGB or RGBA.

    where: what messages call it ("--image"). Raises EditError for what cannot be read to its end.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.seek(0)
                file.load()
                picture = _eight_bit(ImageOps.exif_transpose(file) or file)
    except Image.DecompressionBombError:
        limit = (Image.MAX_IMAGE_PIXELS or 0) * 2
        raise EditError(
            f"{where} {path!r} has too many pixels to be opened; allowed are {limit}, scale it down"
        ) from None
    except Exception as error:  # Pillow plugins raise anything on damaged files
        reason = f": {LFS}" if is_pointer(Path(path)) else "; give a PNG, JPEG or WebP file"
        raise EditError(f"{where} {path!r} is not a readable picture{reason}") from error
    transparent = picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info
    return picture.convert("RGBA" if transparent else "RGB")


def open_rgb(path: str, where: str = "--image") -> Image.Image:
    """A picture as RGB, transparency on white."""
    picture = open_picture(path, where)
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def open_rgba(path: str) -> Image.Image:
    """A picture of an object as RGBA."""
    return open_picture(path, "IMAGE").convert("RGBA")


def _eight_bit(picture: Image.Image) -> Image.Image:
    """16-bit and float grey pictures, which Pillow would clip instead of scaling."""
    if not picture.mode.startswith("I") and picture.mode != "F":
        return picture
    grey = np.asarray(picture).astype(np.float64)
    top = 65535.0 if picture.mode.startswith("I") else max(float(grey.max(initial=0)), 1e-9)
    return Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8), "L")


def read_object(path: str, how: str) -> tuple[Image.Image, str]:
    """`cut_out` of a file, remembered: it is checked before a model is loaded, and used afterwards."""
    file = Path(path)
    return _read_object(path, how, file.resolve(), file.stat().st_mtime_ns if file.exists() else 0)


@functools.lru_cache(maxsize=256)
def _read_object(path: str, how: str, _file: Path, _changed: int) -> tuple[Image.Image, str]:
    return cut_out(open_rgba(path), how, path)


def cut_out(picture: Image.Image, how: str, name: str) -> tuple[Image.Image, str]:
    """The picture with its background transparent, and in a word how.

    how: "no" takes the alpha channel as it is; "auto" removes a background only where alpha cuts out none;
    "yes" always. A plain background is flood filled from the border; any other needs rembg.
    Raises EditError if nothing is left, or if it cannot be done.
    """
    rgba = np.asarray(picture).copy()
    if min(rgba.shape[:2]) < 2:
        raise EditError(f"IMAGE {name!r} is {picture.width}x{picture.height} px; give at least 2x2 px")
    if not rgba[..., 3].any():
        raise EditError(f"IMAGE {name!r} is fully transparent; give a picture with something in it")
    opaque = solid(rgba[..., 3])
    has_alpha, cuts = not opaque.all(), (~opaque).mean() >= CUT_SHARE
    if how == "no" or (how == "auto" and cuts):
        done, way = rgba, "alpha" if has_alpha else "kept"
    else:
        plain = flood_background(rgba)
        if plain is not None:
            rgba[..., 3] = np.where(plain, 0, rgba[..., 3])
            done, way = rgba, "plain colour"
        elif how == "auto" and has_alpha:
            done, way = rgba, "alpha"
        else:
            done, way = _rembg(picture, how, name)
    _check_foreground(done, name)
    return Image.fromarray(done, "RGBA"), way


def flood_background(rgba_HW4: Bytes) -> NDArray[np.bool_] | None:
    """Pixels of a plain-coloured background that touch the border [H, W]; None if the border is not plain."""
    from scipy import ndimage

    rgb = rgba_HW4[..., :3].astype(np.int16)
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    colour = np.median(border, axis=0)
    if (np.abs(border - colour).max(axis=1) <= TOLERANCE).mean() < PLAIN_SHARE:
        return None
    labels, _ = ndimage.label(np.abs(rgb - colour).max(axis=2) <= TOLERANCE)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    mask: NDArray[np.bool_] = np.isin(labels, np.setdiff1d(edge, 0))
    return mask


def _rembg(picture: Image.Image, how: str, name: str) -> tuple[Bytes, str]:
    try:
        import rembg  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        keep = " or keep it with --remove-background no" if how == "auto" else ""
        raise EditError(
            f"IMAGE {name!r} has a background of several colours, which needs rembg to be removed: "
            f'pip install "elastic-dit[rembg]"; or give a picture with alpha,{keep}'.rstrip(",")
        ) from None
    return np.asarray(rembg.remove(picture).convert("RGBA")).copy(), "rembg"


def _check_foreground(rgba_HW4: Bytes, name: str) -> None:
    """The conditioner crops to the foreground's bounding box, so that must have two sides."""
    opaque = solid(rgba_HW4[..., 3])
    if opaque.mean() < MIN_SHARE or min(opaque.any(0).sum(), opaque.any(1).sum()) < 2:
        raise EditError(
            f"IMAGE {name!r} has no foreground: nothing but background was found; give a picture of one "
            "object, or keep everything with --remove-background no"
        )

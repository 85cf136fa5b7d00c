"""Metadata in pictures, for people and to replay: `parameters` text and `edit` JSON. Torch-free.

PNG: two text chunks. JPEG and WebP: EXIF UserComment, where web UIs look, and an XMP packet.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli.errors import EditError

if TYPE_CHECKING:
    from PIL import Image

EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
UNICODE_COMMENT = b"UNICODE\x00"  # EXIF 2.3: character code of a UserComment; UTF-16 follows
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
    'xmlns:edit="urn:edit:1" edit:request="{}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
QUALITY = 95


def parameters_text(record: Mapping[str, Any]) -> str:
    """The usual web-UI form: prompt, negative prompt, then one line of settings."""
    settings = {
        "Steps": record["steps"],
        "Sampler": record.get("sampler", "Euler"),
        "CFG scale": record["guidance"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": record.get("model_hash"),
        "Model": record["model"],
        "Denoising strength": record.get("strength"),
        "Budget": record.get("budget"),
        "Spent": record.get("spent"),
        "Version": f"edit {record['versions']['edit']}",
    }
    lines = [record["prompt"]]
    if (record.get("negative_prompt") or "").strip():
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def encode(picture: Image.Image, suffix: str, record: Mapping[str, Any]) -> bytes:
    """The picture as a file's bytes, with its record inside. suffix: .png, .jpg, .jpeg or .webp."""
    from PIL import Image, PngImagePlugin

    data, buffer = json.dumps(record, ensure_ascii=False), io.BytesIO()
    if suffix.lower() == ".png":
        chunks = PngImagePlugin.PngInfo()
        # plain tEXt chunks are Latin-1, iTXt carries any script
        chunks.add_itxt("parameters", parameters_text(record))
        chunks.add_itxt("edit", data)
        picture.save(buffer, "PNG", pnginfo=chunks)
        return buffer.getvalue()
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE_COMMENT + parameters_text(record).encode("utf-16-be")
    options = {"exif": exif.tobytes(), "xmp": XMP.format(html.escape(data, quote=True)).encode()}
    kind = "WEBP" if suffix.lower() == ".webp" else "JPEG"
    picture.convert("RGB").save(buffer, kind, quality=QUALITY, **options)
    return buffer.getvalue()


def encode_plain(picture: Image.Image) -> bytes:
    """A PNG without a record."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def read(path: str | Path) -> dict[str, Any]:
    """The record of a picture made by `edit`. Raises EditError if there is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.load()
            info = dict(picture.info)
    except FileNotFoundError:
        raise EditError(
            f"--from {str(path)!r} does not exist; give a picture made by `edit generate`"
        ) from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        raise EditError(
            f"--from {str(path)!r} is no readable picture; give one made by `edit generate`"
        ) from None
    text = info.get("edit")
    xmp = info.get("xmp")
    if text is None and xmp is not None:
        packet = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp)
        found = re.search(r'edit:request="([^"]*)"', packet)
        text = html.unescape(found[1]) if found else None
    try:
        record = json.loads(text) if text is not None else None
    except ValueError:
        record = None
    if not isinstance(record, dict) or "prompt" not in record:
        raise EditError(
            f"--from {str(path)!r} holds no `edit` metadata; it was not made by `edit`, or was re-saved"
        )
    return record

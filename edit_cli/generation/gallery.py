"""A folder's pictures on one page: `index.html`, whole in itself, for a phone too."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from edit_cli.errors import EditError
from edit_cli.files import reason, write_files

if TYPE_CHECKING:
    from edit_cli.generation.plan import Plan
    from edit_cli.generation.result import Result

PAGE = Path(__file__).with_name("gallery.html")
NAME = "index.html"
MARK = b'<meta name="generator" content="edit gallery">'
SIDE, QUALITY = 420, 82
"""Of the copies on the page: px, and of their JPEG."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")


def check_gallery(plan: Plan) -> None:
    """A page that is not ours is not replaced. Raises EditError."""
    for folder in folders(plan):
        page = folder / NAME
        try:
            ours = not page.exists() or MARK in page.read_bytes()
        except OSError as error:
            raise EditError(f"--gallery {str(page)!r} cannot be read: {reason(error)}") from error
        if not ours:
            raise EditError(f"--gallery would replace {str(page)!r}, which is another page; move it")


def folders(plan: Plan) -> list[Path]:
    """Where a plan's results go."""
    return list(dict.fromkeys(job.path.parent for job in plan.jobs))


def write_galleries(result: Result) -> list[Path]:
    """A page for each folder that results went to, with all pictures of `edit` in it. Raises RunError."""
    likeness = _likeness(result)
    pages = [folder / NAME for folder in folders(result.plan)]
    for page in pages:
        write_files({page: gallery(page.parent, likeness)})
    return pages


def gallery(folder: Path, likeness: Mapping[Path, str]) -> bytes:
    """The page of a folder's pictures that have a record, by name. likeness: to the dense run, by file."""
    from edit_cli.generation.record import read_picture

    cards = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in SUFFIXES:
            continue
        try:
            record = read_picture(file)
        except EditError:  # somebody else's picture, or one beside the results
            continue
        cards.append(_card(file, record, likeness.get(file, "")))
    count = "1 picture" if len(cards) == 1 else f"{len(cards)} pictures"
    page = Template(PAGE.read_text(encoding="utf-8"))
    title = html.escape(folder.resolve().name or "pictures")
    return page.substitute(title=title, count=count, cards="\n".join(cards)).encode("utf-8", "replace")


def _likeness(result: Result) -> dict[Path, str]:
    """What was measured beside the dense run, in words."""
    compared = result.comparison or {}
    rows = zip(compared.get("psnr", ()), compared.get("ssim", ()), strict=False)
    words = [f"{psnr:.1f} dB, SSIM {ssim:.3f} to {result.plan.compare}" for psnr, ssim in rows]
    return dict(zip((job.path for job in result.jobs), words, strict=False))


def _card(file: Path, record: Mapping[str, Any], likeness: str) -> str:
    """One picture with what it was made of; every value is somebody's text."""
    beside = file.with_name(f"{file.stem}-compare.png")
    told = [f"seed {record.get('seed')}", _budget(record), str(record.get("model", "")), likeness]
    lines = "".join(f"<span>{html.escape(text[:200])}</span>" for text in told if text)
    if beside.is_file():
        lines += f'<span><a href="{quote(beside.name)}">side by side</a></span>'
    prompt = html.escape(str(record.get("prompt", ""))[:1000])
    source, width, height = _small(file)
    return (
        f'<figure><a href="{quote(file.name)}"><img src="{source}" width="{width}" height="{height}" '
        f'loading="lazy" alt="{prompt}"></a><figcaption><b>{prompt}</b>{lines}</figcaption></figure>'
    )


def _budget(record: Mapping[str, Any]) -> str:
    budget, spent = record.get("budget"), record.get("spent")
    if not isinstance(budget, (int, float)):
        return ""
    same = not isinstance(spent, (int, float)) or abs(spent - budget) < 0.005
    return f"budget {budget:g}" if same else f"budget {budget:g}, spent {spent:.2f}"


def _small(file: Path) -> tuple[str, int, int]:
    """A copy as a data URI, and its size in px."""
    from PIL import Image

    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", *picture.size

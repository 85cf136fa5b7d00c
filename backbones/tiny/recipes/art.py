"""The pictures of a concept, as SVG: from the public icon packages, or our own drawings. Torch-free."""

import io
import json
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from backbones.tiny.recipes.concepts import STYLES, Concept
from backbones.tiny.recipes.drawings import LOOKS, drawing_svg

PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/mdi": "1.2.3",
    "emoji-datasource": "16.0.0",
    "emojilib": "4.0.3",
}
# What a one-colour icon is painted with, per look of drawings.LOOKS.
PAINTS = ("#8d5a34", "#455a64", "#3b6fb5")


def install_packages(out: Path) -> Path:
    """Install the pinned npm packages under `out` and return their node_modules folder."""
    specs = [f"{name}@{version}" for name, version in PACKAGES.items()]
    subprocess.run(
        ["npm", "install", "--prefix", str(out), "--ignore-scripts", "--no-audit", *specs], check=True
    )
    return out / "node_modules"


def check_versions(packages: Path) -> None:
    """Raise ValueError when a package is missing or is not the pinned version."""
    for name, version in PACKAGES.items():
        manifest = packages / name / "package.json"
        present = json.loads(manifest.read_text())["version"] if manifest.exists() else "missing"
        if present != version:
            raise ValueError(
                f"{name} is {present}, the recipe is pinned to {version}: npm install {name}@{version}"
            )


class IconSet:
    """One iconify set: SVG text by code point, or by the set's own icon name."""

    def __init__(self, packages: Path, prefix: str):
        folder = packages / "@iconify-json" / prefix
        data = json.loads((folder / "icons.json").read_text())
        chars = json.loads((folder / "chars.json").read_text())
        self.side = data.get("width", 16)
        self.bodies = dict(data["icons"].items())
        self.name_of = {code.replace("-fe0f", ""): name for code, name in chars.items()}

    def svg(self, code: str) -> str | None:
        """The SVG text of the icon for a code point, or None when the set lacks it."""
        return self.named(self.name_of.get(code, ""))

    def named(self, name: str) -> str | None:
        """The SVG text of the icon of this name, or None when the set lacks it."""
        icon = self.bodies.get(name)
        if icon is None:
            return None
        width, height = icon.get("width", self.side), icon.get("height", self.side)
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {names} viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'


class Art:
    """Every picture of a concept, by style."""

    def __init__(self, packages: Path):
        self.packages = packages
        self.sets = {prefix: IconSet(packages, prefix) for prefix in STYLES}
        self.others: dict[str, IconSet] = {}

    def pictures(self, concept: Concept) -> dict[int, str]:
        """SVG text by style index; styles without a picture are left out."""
        if concept.emoji:
            # The shaded set has no code points; its names are those of the flat set.
            names = self.sets["fluent-emoji-flat"].name_of
            svgs = [
                icons.svg(concept.code) or icons.named(names.get(concept.code, ""))
                for icons in self.sets.values()
            ]
            return {style: svg for style, svg in enumerate(svgs) if svg is not None}
        drawn = [self.drawing(concept.art, number) for number in range(len(LOOKS))]
        return {list(STYLES).index(look): svg for look, svg in zip(LOOKS, drawn, strict=True)}

    def drawing(self, art: str, number: int) -> str:
        """A picture without an emoji in look `number`: our drawing, or the icon that `art` names."""
        source, _, name = art.partition(":")
        if source == "own":
            return drawing_svg(name, LOOKS[number])
        if source not in self.others:
            self.others[source] = IconSet(self.packages, source)
        svg = self.others[source].named(name)
        if svg is None:
            raise ValueError(f"the icon set {source} does not have {name!r}")
        return svg.replace("currentColor", PAINTS[number])


def render(svg: str, box: int) -> np.ndarray:
    """Rasterise to (h, w, 4) uint8 RGBA that fits a `box` px square."""
    import resvg_py

    icon = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg, width=box)))).convert("RGBA")
    if icon.height > box:
        tall = bytes(resvg_py.svg_to_bytes(svg, height=box))
        icon = Image.open(io.BytesIO(tall)).convert("RGBA")
    return np.asarray(icon)

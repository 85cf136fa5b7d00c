"""Step `data`: obtain the public icon packages and render every core concept, plus recoloured copies.

    python -m backbones.tiny.recipes.data [--packages node_modules] [--out runs/data]

Writes `pictures.npy` (N, 128, 128, 3) uint8 on white and `pictures.json`: the concepts and one row
[concept index, style index, colour name or null, variant] per picture. About two minutes on two cores.
"""

import argparse
import io
import json
import random
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from backbones.tiny.recipes.concepts import COLOURS, STYLES, Concept, add_keywords, load_concepts

SIZE = 128  # picture side, px
PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/twemoji": "1.2.5",
    "emoji-datasource": "16.0.0",
    "emojilib": "4.0.3",
}
# Icon box side in px per variant (0 is the plain, centred picture); others are shifted at random inside.
VARIANT_BOXES = (116, (100, 120), (100, 120))
RECOLOUR_VARIANTS = 2
MIN_DOMINANT = 0.33  # share of the object that one hue must cover for a recoloured copy


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
        found = json.loads((packages / name / "package.json").read_text())["version"]
        if found != version:
            raise ValueError(
                f"{name} is {found}, the recipe is pinned to {version}: npm install {name}@{version}"
            )


class IconSet:
    """One iconify set: SVG text by code point."""

    def __init__(self, packages: Path, prefix: str):
        folder = packages / "@iconify-json" / prefix
        data = json.loads((folder / "icons.json").read_text())
        chars = json.loads((folder / "chars.json").read_text())
        self.side = data["width"]
        self.bodies = dict(data["icons"].items())
        self.name_of = {code.replace("-fe0f", ""): name for code, name in chars.items()}

    def svg(self, code: str) -> str | None:
        """The icon's SVG text, or None when the set lacks it."""
        icon = self.bodies.get(self.name_of.get(code, ""))
        if icon is None:
            return None
        width, height = icon.get("width", self.side), icon.get("height", self.side)
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {names} viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'


def render(svg: str, box: int) -> np.ndarray:
    """Rasterise to (h, w, 4) uint8 RGBA that fits a `box` px square."""
    import resvg_py

    return np.asarray(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg, width=box)))).convert("RGBA"))


def on_white(icon: np.ndarray, left: int, top: int) -> np.ndarray:
    """Paste an RGBA icon at (left, top) px on a white SIZE square: (SIZE, SIZE, 3) uint8."""
    canvas = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 255))
    layer = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    layer.paste(Image.fromarray(icon), (left, top))
    return np.asarray(Image.alpha_composite(canvas, layer).convert("RGB"))


def dominant_mask(icon: np.ndarray) -> np.ndarray | None:
    """Where the icon has its dominant hue: (h, w) in [0, 1], or None when no hue (or grey) dominates.

    Hue is cut into 18 bins of 20 degrees; the best window of three neighbours counts. Colourless mid-tones
    are a bin of their own, so that a grey elephant can be recoloured too.
    """
    hsv = np.asarray(Image.fromarray(icon[..., :3]).convert("HSV")).astype(np.float32) / 255
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    alpha = icon[..., 3].astype(np.float32) / 255
    coloured = alpha * ((saturation > 0.22) & (value > 0.2))
    bins = np.minimum((hue * 18).astype(int), 17)
    weight = np.bincount(bins.ravel(), coloured.ravel(), minlength=18)
    windows = weight + np.roll(weight, 1) + np.roll(weight, -1)
    centre = int(windows.argmax())
    near = np.isin(bins, [(centre - 1) % 18, centre, (centre + 1) % 18])
    hue_mask = near * (saturation > 0.22) * (value > 0.12)
    grey_mask = (saturation <= 0.22) & (value > 0.35) & (value < 0.985)
    mask = hue_mask if (hue_mask * alpha).sum() >= (grey_mask * alpha).sum() else grey_mask
    if (mask * alpha).sum() < MIN_DOMINANT * max(alpha.sum(), 1.0):
        return None
    return mask.astype(np.float32)


def recolour(icon: np.ndarray, mask: np.ndarray, target: tuple[int, int, int]) -> np.ndarray:
    """Tint the masked pixels to `target`, keeping each pixel's lightness relative to the region's median.

    A tint, not a hue rotation: pale yellow and dark brown things must both come out as the named colour.
    """
    rgb = icon[..., :3].astype(np.float32)
    light = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
    inside = (mask > 0) & (icon[..., 3] > 200)
    ratio = (light / max(float(np.median(light[inside])), 1.0))[..., None]
    goal = np.array(target, np.float32)
    darker = goal * np.clip(ratio, 0.35, 1) ** 0.9
    lighter = goal + (255 - goal) * np.clip(ratio - 1, 0, 0.6)
    tinted = np.where(ratio <= 1, darker, lighter)
    out = icon.copy()
    out[..., :3] = np.where(mask[..., None] > 0, tinted, rgb).clip(0, 255).astype(np.uint8)
    return out


def place(svg: str, variant: int, rng: random.Random) -> tuple[np.ndarray, int, int]:
    """Render one variant: the RGBA icon and its (left, top) position in px."""
    box = VARIANT_BOXES[variant]
    side = box if isinstance(box, int) else rng.randint(*box)
    icon = render(svg, side)
    slack_x, slack_y = SIZE - icon.shape[1], SIZE - icon.shape[0]
    if variant == 0:
        return icon, slack_x // 2, slack_y // 2
    return (
        icon,
        rng.randint(slack_x // 4, slack_x - slack_x // 4),
        rng.randint(slack_y // 4, slack_y - slack_y // 4),
    )


def render_concept(job: tuple[int, int, str, int]) -> list[tuple[list, np.ndarray]]:
    """All pictures of one concept in one style: [(row, (SIZE, SIZE, 3) uint8), ...]."""
    concept, style, svg, seed = job
    rng = random.Random(f"{seed}-{concept}-{style}")
    pictures = []
    for variant in range(len(VARIANT_BOXES)):
        icon, left, top = place(svg, variant, rng)
        pictures.append(([concept, style, None, variant], on_white(icon, left, top)))
    for colour, target in COLOURS.items():
        for variant in range(RECOLOUR_VARIANTS):
            icon, left, top = place(svg, variant, rng)
            mask = dominant_mask(icon)
            if mask is not None:
                pictures.append(
                    ([concept, style, colour, variant], on_white(recolour(icon, mask, target), left, top))
                )
    return pictures


def build(packages: Path, out: Path, seed: int, workers: int) -> None:
    """Render everything and write pictures.npy and pictures.json to `out`."""
    started = time.time()
    sets = [IconSet(packages, prefix) for prefix in STYLES]
    concepts: list[Concept] = add_keywords(load_concepts(), packages)
    jobs = []
    for index, concept in enumerate(concepts):
        found = [(style, icons.svg(concept.code)) for style, icons in enumerate(sets)]
        missing = [list(STYLES)[style] for style, svg in found if svg is None]
        if missing:
            print(f"data: {concept.name} has no picture in {', '.join(missing)}")
        jobs += [(index, style, svg, seed) for style, svg in found if svg is not None]
    rows, pictures = [], []
    with ProcessPoolExecutor(workers) as pool:
        for done, batch in enumerate(pool.map(render_concept, jobs, chunksize=8), 1):
            rows += [row for row, _ in batch]
            pictures += [picture for _, picture in batch]
            if done % 200 == 0:
                print(
                    f"data: {done}/{len(jobs)} icons, {len(rows)} pictures, {time.time() - started:.0f} s",
                    flush=True,
                )
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "pictures.npy", np.stack(pictures))
    index = {"concepts": [asdict(concept) for concept in concepts], "styles": list(STYLES), "rows": rows}
    (out / "pictures.json").write_text(json.dumps(index, ensure_ascii=False))
    print(f"data: {len(rows)} pictures of {len(concepts)} concepts in {time.time() - started:.0f} s -> {out}")


def main() -> None:
    """Parse the command line and build the data set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages", type=Path, help="a node_modules folder; default: npm install under --out"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/data"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    packages = args.packages or install_packages(args.out)
    check_versions(packages)
    build(packages, args.out, args.seed, args.workers)


if __name__ == "__main__":
    main()

"""Step `data`: obtain the public icon packages and render every concept, plus recoloured copies.

    python -m backbones.tiny.recipes.data [--packages node_modules] [--out runs/data]

Writes `pictures.npy` (N, 128, 128, 3) uint8 on white and `pictures.json`: the concepts and one row
[concept index, style index, colour name or null, variant] per picture. Things always stand in the middle at
one size: a model of this size then draws them whole, where one that has seen them a few px apart mixes the
two (a third eye between two). About two minutes on two cores.
"""

import argparse
import json
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from backbones.tiny.recipes.art import Art, check_versions, install_packages, render
from backbones.tiny.recipes.concepts import COLOURS, STYLES, Concept, add_keywords, load_concepts

SIZE = 128  # picture side, px
BOX = 116  # icon box side, px
MIN_DOMINANT = 0.33  # share of the object that one hue must cover for a recoloured copy
# Colours are applied in the first three styles, one picture per colour and two for the first part of the
# file.
RECOLOURED_STYLES, COMMON_CONCEPTS = 3, 308
# People keep their own colours: a tinted skin is not what anyone means by "a blue princess".
NOT_RECOLOURED = {
    "baby", "boy", "girl", "man", "woman", "old man", "old woman", "princess", "santa claus",
    "police officer", "wizard", "mouth", "ear", "nose", "hand", "thumbs up", "clown", "brain", "eyes",
    "rainbow", "earth", "fried egg",
}  # fmt: skip
PLAIN_SECTIONS = {"people", "body", "faces"}  # never recoloured


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


def centred(icon: np.ndarray) -> np.ndarray:
    """An RGBA icon in the middle of a white SIZE square."""
    return on_white(icon, (SIZE - icon.shape[1]) // 2, (SIZE - icon.shape[0]) // 2)


def render_concept(job: tuple[int, Concept, dict[int, str], int]) -> list[tuple[list, np.ndarray]]:
    """All pictures of one concept: [(row, (SIZE, SIZE, 3) uint8), ...]."""
    number, concept, svgs, seed = job
    rng = random.Random(f"{seed}-{number}")
    icons = {style: render(svg, BOX) for style, svg in svgs.items()}
    pictures = [([number, style, None, 0], centred(icon)) for style, icon in icons.items()]
    if concept.name in NOT_RECOLOURED or concept.section in PLAIN_SECTIONS:
        return pictures
    masks = {style: dominant_mask(icons[style]) for style in icons if style < RECOLOURED_STYLES}
    fit = [style for style, mask in masks.items() if mask is not None]
    copies = min(len(fit), 2 if number < COMMON_CONCEPTS else 1)
    for colour, target in COLOURS.items():
        for style in rng.sample(fit, copies):
            tinted = recolour(icons[style], masks[style], target)
            pictures.append(([number, style, colour, 0], centred(tinted)))
    return pictures


def build(packages: Path, out: Path, seed: int, workers: int) -> None:
    """Render everything and write pictures.npy and pictures.json to `out`."""
    started, art = time.time(), Art(packages)
    concepts: list[Concept] = add_keywords(load_concepts(), packages)
    jobs = [(number, concept, art.pictures(concept), seed) for number, concept in enumerate(concepts)]
    rows, pictures = [], []
    with ProcessPoolExecutor(workers) as pool:
        for done, batch in enumerate(pool.map(render_concept, jobs, chunksize=8), 1):
            rows += [row for row, _ in batch]
            pictures += [picture for _, picture in batch]
            if done % 200 == 0:
                print(
                    f"data: {done}/{len(jobs)} concepts, {len(rows)} pictures, {time.time() - started:.0f} s",
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

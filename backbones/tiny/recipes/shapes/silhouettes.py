"""Step `silhouettes`: do meshes of flat pictures have the pictures' outlines, and are they closed?

    edit generate "a cat" -o cats/1.png   # and so on
    python -m backbones.tiny.recipes.shapes.silhouettes cats/*.png

Runs the packaged pipeline on pictures with alpha, or on a plain background, and compares the front view of
the field with the recentred, hole-filled outline of the picture. Ends with one JSON line.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from backbones.hunyuan3d.checkpoints import load_pipeline
from backbones.hunyuan3d.mesh import NoSurfaceError
from backbones.hunyuan3d.pipeline import Hunyuan3DPipeline
from backbones.tiny.recipes.shapes.dataset import BOX
from backbones.tiny.recipes.shapes.inflate import CANVAS_HALF, canvas_mask
from backbones.tiny.recipes.shapes.model import GUIDANCE, STEPS

BACKGROUND_TOLERANCE = 20  # levels of 255 from the border's median colour
BAR, CLOSED_BAR = 0.8, 0.95


def with_alpha(picture: Image.Image) -> np.ndarray:
    """RGBA (H, W, 4) uint8: its own alpha, or without the plain area that touches the border."""
    rgba = np.array(picture.convert("RGBA"))
    if (rgba[..., 3] < 255).any():
        return rgba
    rgb = rgba[..., :3].astype(int)
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    plain = np.abs(rgb - np.median(border, axis=0)).max(-1) <= BACKGROUND_TOLERANCE
    labels, _ = ndimage.label(plain)
    outside = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    rgba[np.isin(labels, outside[outside > 0]), 3] = 0
    return rgba


def front_silhouette(logits_xyz: np.ndarray) -> np.ndarray:
    """What the viewer sees of a field: (rows, columns) bool, top row first."""
    return (logits_xyz > 0).any(axis=2).T[::-1]


def wanted_silhouette(rgba: np.ndarray, side: int) -> np.ndarray:
    """The picture's outline over the same square of the box: (side, side) bool."""
    soft = canvas_mask(rgba, 128)
    place = np.linspace(-BOX, BOX, side)
    at = (place / CANVAS_HALF + 1) / 2 * len(soft) - 0.5
    rows, columns = np.meshgrid(at, at, indexing="ij")
    return ndimage.map_coordinates(soft, [rows, columns], order=1) > 0.5


def outline_iou(made: np.ndarray, wanted: np.ndarray) -> float:
    """Intersection over union of two outlines."""
    return float((made & wanted).sum() / max((made | wanted).sum(), 1))


def measure(pipe: Hunyuan3DPipeline, rgba: np.ndarray, resolution: int, seed: int) -> tuple[float, bool]:
    """Silhouette IoU of one picture's shape, and whether its cleaned mesh is watertight."""
    contexts = pipe.prepare(Image.fromarray(rgba))
    noise = pipe.noise(1, torch.Generator().manual_seed(seed))
    latents = pipe.denoise(contexts, noise, STEPS, GUIDANCE)
    volume = pipe.decode(latents, resolution, BOX)[0]
    made = front_silhouette(volume.logits)
    try:
        closed = bool(pipe.clean(pipe.extract(volume)).is_watertight)
    except NoSurfaceError:
        closed = False
    return outline_iou(made, wanted_silhouette(rgba, len(made))), closed


def main() -> None:
    """Parse the command line, measure every picture, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--package", type=Path, default=Path(__file__).parents[2] / "hunyuan3d_tiny")
    parser.add_argument("--resolution", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pipe = load_pipeline(args.package, dtype=torch.float32)
    results = {}
    for path in args.pictures:
        overlap, closed = measure(pipe, with_alpha(Image.open(path)), args.resolution, args.seed)
        results[path.name] = overlap, closed
        print(f"{path.name:<32} silhouette IoU {overlap:.3f}  {'closed' if closed else 'OPEN'}", flush=True)
    mean = float(np.mean([overlap for overlap, _ in results.values()]))
    share = float(np.mean([closed for _, closed in results.values()]))
    passed = mean >= BAR and share >= CLOSED_BAR
    print(json.dumps({"silhouette_iou": mean, "watertight": share, "count": len(results), "passed": passed}))


if __name__ == "__main__":
    main()

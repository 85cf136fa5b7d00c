"""Step `sheet`: the package on held-out shapes at several budgets, in numbers and as a contact sheet.

    python -m backbones.tiny.recipes.shapes.sheet [--budgets 1.0 0.6 0.4] [--out FILE.png]

Runs the packaged folder with its own bundle if it has one, as `edit generate-3d --budget` does, and reports
mean volumetric IoU with the true shape and with the dense result. The sheet shows [picture | true | generated
at each budget]. Ends with one JSON line.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

import routers
from backbones import registry
from backbones.hunyuan3d.checkpoints import load_pipeline
from backbones.hunyuan3d.pipeline import Hunyuan3DPipeline
from backbones.spec import Backbone
from backbones.tiny.recipes.shapes.dataset import BOX, GRID
from backbones.tiny.recipes.shapes.render import render_volume
from backbones.tiny.recipes.shapes.store import KINDS, ShapeSet
from backbones.tiny.recipes.shapes.vae import iou
from backbones.workloads import MeshWorkload

TILE, HEADER = 112, 20  # px
PER_LINE = 2  # shapes side by side
VIEW = (35.0, 18.0)  # degrees of yaw and elevation


def fields(
    pipe: Hunyuan3DPipeline, backbone: Backbone, contexts: torch.Tensor, budget: float
) -> tuple[np.ndarray, list[float]]:
    """Logits (N, G, G, G) of N pictures' contexts at a budget, and what each spent of the dense FLOPs."""
    count, steps = len(contexts), backbone.defaults.steps
    work = MeshWorkload(
        pipe, backbone, count, steps, backbone.defaults.guidance, {"main": contexts}, samples=count
    )
    elastic = routers.attach(pipe, backbone.bundle, budget=budget)
    try:
        with elastic.scope(samples=count) as trace:
            latents = work.run(0)
    finally:
        elastic.detach()
    volumes = pipe.decode(latents, GRID - 1, BOX, method="dense")
    return np.stack([volume.logits for volume in volumes]), list(trace.spent)


def labelled(title: str, width: int) -> np.ndarray:
    """A strip (HEADER, width, 3) uint8 with a title in its middle."""
    strip = Image.new("RGB", (width, HEADER), "white")
    font = ImageFont.load_default(size=12)
    ImageDraw.Draw(strip).text((width / 2, HEADER / 2), title, fill="black", font=font, anchor="mm")
    return np.asarray(strip)


def draw(pictures: np.ndarray, truths: np.ndarray, made: dict[float, np.ndarray], path: Path) -> None:
    """Write the sheet. pictures (N, S, S, 3), truths (N, G, G, G) bool, made: logits by budget."""
    titles = ["picture", "true", *(f"budget {budget:g}" for budget in made)]
    lines, tiles = [], []
    for i, picture in enumerate(pictures):
        shown = np.asarray(Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.BICUBIC))
        truth = ndimage.gaussian_filter(truths[i].astype(np.float32), 0.7) - 0.5
        row = [
            shown,
            *(render_volume(v, *VIEW, TILE) for v in (truth, *(logits[i] for logits in made.values()))),
        ]
        tiles.append(np.concatenate(row, axis=1))
    gap = np.full((TILE, TILE // 4, 3), 255, np.uint8)
    header = np.concatenate([labelled(title, TILE) for title in titles], axis=1)
    for start in range(0, len(tiles), PER_LINE):
        row = tiles[start : start + PER_LINE]
        row += [np.full_like(tiles[0], 255)] * (PER_LINE - len(row))
        lines.append(np.concatenate([part for tile in row for part in (tile, gap)][:-1], axis=1))
    top = np.concatenate([part for _ in range(PER_LINE) for part in (header, gap[:HEADER])][:-1], axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([top, *lines])).save(path, optimize=True)
    print(f"sheet: look at {path}")


def main() -> None:
    """Parse the command line, generate, measure, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default=registry.DEFAULT_MODELS["mesh"])
    parser.add_argument("--data", type=Path, default=Path("runs/shapes/data"))
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.6, 0.4])
    parser.add_argument("--count", type=int, default=64, help="held-out shapes of each kind")
    parser.add_argument("--shown", type=int, default=10, help="of each kind on the sheet")
    parser.add_argument("--out", type=Path, default=Path("runs/shapes/budgets.png"))
    args = parser.parse_args()
    backbone = registry.resolve(args.model)
    if backbone.folder is None:
        raise ValueError(f"{args.model} is not a folder")
    pipe = load_pipeline(backbone.folder, dtype=torch.float32)
    held_out = ShapeSet(args.data, "held-out")
    scores: dict[str, dict[str, dict[str, float]]] = {}
    sheet: list[tuple[np.ndarray, np.ndarray, dict[float, np.ndarray]]] = []
    for kind in KINDS:
        rows = held_out.rows[kind][: args.count]
        with torch.no_grad():
            contexts = pipe.conditioner(held_out.batch(rows, 1, 1, augment=False).image)["main"]
        truths, made = held_out.occupancy(rows), {}
        for budget in dict.fromkeys([1.0, *args.budgets]):
            made[budget], spent = fields(pipe, backbone, contexts, budget)
            inside, dense = (made[b].reshape(len(rows), -1) > 0 for b in (budget, 1.0))
            scores.setdefault(kind, {})[f"{budget:g}"] = {
                "spent": float(np.mean(spent)),
                "iou": float(iou(inside, truths).mean()),
                "iou_dense": float(iou(inside, dense).mean()),
            }
            print(f"sheet: {kind} at {budget:g}: {scores[kind][f'{budget:g}']}", flush=True)
        some = slice(0, args.shown)
        pictures = held_out.arrays["images"][rows[some]]
        shapes = truths[some].reshape(-1, GRID, GRID, GRID)
        sheet.append((pictures, shapes, {budget: made[budget][some] for budget in args.budgets}))
    draw(
        np.concatenate([pictures for pictures, _, _ in sheet]),
        np.concatenate([truths for _, truths, _ in sheet]),
        {budget: np.concatenate([made[budget] for _, _, made in sheet]) for budget in args.budgets},
        args.out,
    )
    print(json.dumps({"iou": scores}))


if __name__ == "__main__":
    main()

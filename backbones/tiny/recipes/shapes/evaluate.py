"""Step `evaluate`: what the trained models are worth on held-out shapes.

    python -m backbones.tiny.recipes.shapes.evaluate [--count 64] [--sheet runs/shapes/sheet.png]

Reports mean volumetric IoU with the true shape, per kind: of the VAE alone, of the whole chain, and of the
training shape whose picture is most similar (mean squared difference of the conditioner's pictures). Ends
with one JSON line. The contact sheet shows [picture | true | generated, from the front and turned].
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from backbones.hunyuan3d.shape_vae import ShapeVAE
from backbones.tiny.recipes.shapes.dataset import BOX, GRID
from backbones.tiny.recipes.shapes.model import GUIDANCE, STEPS, ShapeModel, chain_iou, load_model, sample
from backbones.tiny.recipes.shapes.render import render_volume
from backbones.tiny.recipes.shapes.solids_thin import THIN
from backbones.tiny.recipes.shapes.store import KINDS, ShapeSet
from backbones.tiny.recipes.shapes.vae import Stats, held_out_iou, iou, load_vae, occupied

BAR = {"puff": 0.75, "solid": 0.70}
TILE = 96  # px


def nearest_training_rows(train: ShapeSet, images: np.ndarray) -> np.ndarray:
    """Training rows (B,) with the most similar pictures, unmirrored; images (B, S, S, 3) uint8."""
    rows = np.concatenate([train.rows[kind] for kind in KINDS])
    wanted = images.reshape(len(images), -1).astype(np.float32) / 255
    best, best_gap = np.zeros(len(images), int), np.full(len(images), np.inf)
    for start in range(0, len(rows), 1024):
        part = rows[start : start + 1024]
        have = train.arrays["images"][part].reshape(len(part), -1).astype(np.float32) / 255
        gap = (wanted**2).sum(1)[:, None] - 2 * wanted @ have.T + (have**2).sum(1)
        nearest = gap.argmin(1)
        closer = gap[np.arange(len(images)), nearest] < best_gap
        best[closer] = part[nearest[closer]]
        best_gap[closer] = gap.min(1)[closer]
    return best


def pieces(inside: np.ndarray, least: int = 8) -> np.ndarray:
    """How many pieces (B,) of at least `least` grid points the shapes (B, G^3) bool fall into."""
    counts = []
    for row in inside:
        regions, _ = ndimage.label(row.reshape(GRID, GRID, GRID), np.ones((3, 3, 3)))
        counts.append(int((np.bincount(regions.ravel())[1:] >= least).sum()))
    return np.array(counts)


def thin_rows(held_out: ShapeSet, count: int) -> np.ndarray:
    """The first `count` held-out solids of thin rods and rings, in turn by kind."""
    rows = held_out.rows["solid"]
    names = [held_out.info[row]["name"] for row in rows]
    seen: dict[str, int] = {}
    rank = []
    for name in names:
        seen[name] = seen.get(name, -1) + 1
        rank.append(seen[name])
    order = sorted((turn, row) for turn, row, name in zip(rank, rows, names, strict=True) if name in THIN)
    return np.array([row for _, row in order[:count]], int)


def thin_report(
    model: ShapeModel, vae: ShapeVAE, stats: Stats, held_out: ShapeSet, count: int, **options: Any
) -> dict[str, float]:
    """Mean IoU of thin solids from their pictures, and the share with as many pieces as the true shape."""
    rows = thin_rows(held_out, count)
    if not len(rows):
        return {}
    batch = held_out.batch(rows, 1, 1, augment=False)
    latents = sample(model, batch.image, vae.latent_shape[0], **options) * stats[1] + stats[0]
    made, truth = occupied(vae, latents), held_out.occupancy(rows)
    return {"iou": float(iou(made, truth).mean()), "whole": float((pieces(made) == pieces(truth)).mean())}


def baseline_iou(train: ShapeSet, held_out: ShapeSet, count: int) -> dict[str, float]:
    """Mean IoU of simply taking the training shape of the most similar picture."""
    result = {}
    for kind in KINDS:
        rows = held_out.rows[kind][:count]
        if len(rows):
            nearest = nearest_training_rows(train, held_out.arrays["images"][rows])
            result[kind] = float(iou(train.occupancy(nearest), held_out.occupancy(rows)).mean())
    return result


def _views(values: np.ndarray) -> list[np.ndarray]:
    return [render_volume(values, 0, 10, TILE), render_volume(values, 40, 20, TILE)]


def contact_sheet(
    model: ShapeModel, vae: ShapeVAE, stats: Stats, held_out: ShapeSet, count: int, path: Path, **options: Any
) -> None:
    """Write [picture | true x 2 | generated x 2] of `count` held-out shapes of each kind, four in a line."""
    from backbones.hunyuan3d.surface import decode_dense

    tiles = []
    for kind in KINDS:
        rows = held_out.rows[kind][:count]
        if not len(rows):
            continue
        batch = held_out.batch(rows, 1, 1, augment=False)
        latents = sample(model, batch.image, vae.latent_shape[0], **options) * stats[1] + stats[0]
        with torch.no_grad():
            decoded = vae(latents)
        for row, code in zip(rows, decoded, strict=True):
            picture = Image.fromarray(np.asarray(held_out.arrays["images"][row])).resize((TILE, TILE))
            solid = held_out.occupancy(np.array([row])).reshape(GRID, GRID, GRID)
            truth = ndimage.gaussian_filter(solid.astype(np.float32), 0.7) - 0.5
            with torch.no_grad():
                made = decode_dense(vae.field(code), BOX, GRID - 1, 8192).logits
            tiles.append(np.concatenate([np.asarray(picture), *_views(truth), *_views(made)], axis=1))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % 4)
    lines = [np.concatenate(tiles[i : i + 4], axis=1) for i in range(0, len(tiles), 4)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(lines)).save(path)
    print(f"evaluate: look at {path}")


def report(scores: dict[str, dict[str, float]]) -> None:
    """A table, then one JSON line."""
    print(f"{'mean IoU':<26}" + "".join(f"{kind:>9}" for kind in KINDS))
    for name, values in scores.items():
        print(f"{name:<26}" + "".join(f"{values.get(kind, float('nan')):>9.3f}" for kind in KINDS))
    passed = all(
        scores["chain"].get(kind, 0) >= max(BAR[kind], scores["nearest picture"].get(kind, 1))
        for kind in KINDS
    )
    print(json.dumps({"iou": scores, "bar": BAR, "passed": passed}))


def main() -> None:
    """Parse the command line, measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/shapes/data"))
    parser.add_argument("--vae", type=Path, default=Path("runs/shapes/vae/model.pt"))
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/shapes/dit/last.pt"))
    parser.add_argument("--count", type=int, default=64, help="held-out shapes of each kind")
    parser.add_argument("--thin", type=int, default=40, help="held-out solids of rods and rings")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE], help="one row for each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="use every n-th of the grid points")
    parser.add_argument("--sheet", type=Path, default=Path("runs/shapes/sheet.png"))
    parser.add_argument("--sheet-count", type=int, default=24, help="shapes of each kind on it; 0: none")
    args = parser.parse_args()
    vae, stats, scheme = load_vae(args.vae)
    model = load_model(args.checkpoint)
    train, held_out = ShapeSet(args.data, "train"), ShapeSet(args.data, "held-out")
    scores = {
        "VAE": held_out_iou(vae, held_out, scheme, args.count, args.every),
        "nearest picture": baseline_iou(train, held_out, args.count),
    }
    best = None
    for guidance in args.guidance:
        started, options = time.time(), {"steps": args.steps, "guidance": guidance, "seed": args.seed}
        result = chain_iou(model, vae, stats, held_out, args.count, args.every, **options)
        means = {kind: float(values.mean()) for kind, values in result.items()}
        print(f"evaluate: guidance {guidance}: {means}, {time.time() - started:.0f} s", flush=True)
        if best is None or sum(means.values()) > sum(best[1].values()):
            best = guidance, means
    assert best is not None
    scores["chain"] = best[1]
    report(scores)
    options = {"steps": args.steps, "guidance": best[0], "seed": args.seed}
    print(
        f"evaluate: thin solids: {thin_report(model, vae, stats, held_out, args.thin, **options)}", flush=True
    )
    if args.sheet_count:
        contact_sheet(model, vae, stats, held_out, args.sheet_count, args.sheet, **options)


if __name__ == "__main__":
    main()

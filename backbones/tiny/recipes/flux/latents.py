"""Step `latents`: encode every training picture once, so that DiT training never runs the VAE.

    python -m backbones.tiny.recipes.flux.latents

Writes runs/flux/latents.npz with the same columns as `backbones.tiny.recipes.latents`: z128 (N, 8, 16, 16)
and z64 (N, 8, 8, 8), the same picture at half size, both normalised, float16; concept, style, colour (N,).
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from backbones.tiny.recipes.concepts import COLOURS
from backbones.tiny.recipes.flux.picture_vae import encode_moments
from backbones.tiny.recipes.flux.training import RUNS
from backbones.tiny.recipes.latents import select_rows
from backbones.tiny.recipes.vae import load_pictures, to_tensor


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: np.ndarray, rows: np.ndarray, batch: int = 64) -> dict:
    """{"z128": (N, Z, 16, 16), "z64": (N, Z, 8, 8)} float16 posterior means of the chosen rows."""
    parts: dict[str, list[np.ndarray]] = {"z128": [], "z64": []}
    started = time.time()
    for start in range(0, len(rows), batch):
        x = to_tensor(pictures[rows[start : start + batch]])
        with torch.autocast("cpu", torch.bfloat16):
            for name, size in (("z128", x), ("z64", F.avg_pool2d(x, 2))):
                parts[name].append(encode_moments(vae, size)[0].half().numpy())
        if start % (16 * batch) == 0:
            print(f"latents: {start}/{len(rows)}, {time.time() - started:.0f} s", flush=True)
    return {name: np.concatenate(part) for name, part in parts.items()}


def main() -> None:
    """Parse the command line and encode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--vae", type=Path, default=RUNS / "vae" / "model")
    parser.add_argument("--out", type=Path, default=RUNS / "latents.npz")
    parser.add_argument("--limit", type=int, default=0, help="encode only so many pictures; 0: all")
    args = parser.parse_args()
    pictures, index = load_pictures(args.data)
    rows = select_rows(index)
    rows = rows[:: max(1, len(rows) // args.limit)] if args.limit else rows
    vae = AutoencoderKL.from_pretrained(args.vae)
    latents = encode_all(vae, pictures, rows)
    colours = [None, *COLOURS]
    labels = np.array(
        [[c, s, colours.index(colour) - 1] for c, s, colour, _ in (index["rows"][row] for row in rows)]
    )
    columns = {"concept": labels[:, 0], "style": labels[:, 1], "colour": labels[:, 2]}
    part = args.out.with_name(args.out.name + ".part.npz")
    np.savez(part, **latents, row=rows, **columns)
    part.rename(args.out)
    print(f"latents: {len(rows)} pictures -> {args.out}")


if __name__ == "__main__":
    main()

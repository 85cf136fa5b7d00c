"""Step `latents`: encode every training picture once, so that DiT training never runs the VAE.

    python -m backbones.tiny.recipes.latents

Writes runs/latents.npz: z128 (N, 8, 16, 16) and z64 (N, 8, 8, 8), normalised, float16; concept, style and
colour (-1: original art) indices (N,). z64 is the same picture at half size, for the cheap first phase.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from backbones.tiny.recipes.concepts import COLOURS
from backbones.tiny.recipes.picture_vae import encode_moments
from backbones.tiny.recipes.vae import load_pictures, to_tensor

# People keep their own colours: a tinted skin is not what anyone means by "a blue princess".
NOT_RECOLOURED = {
    "baby", "boy", "girl", "man", "woman", "old man", "old woman", "princess", "santa claus",
    "police officer", "wizard", "mouth", "ear", "nose", "hand", "thumbs up", "clown", "brain", "eyes",
    "rainbow", "earth", "fried egg",
}  # fmt: skip


def select_rows(index: dict, recolour_variants: int = 1) -> np.ndarray:
    """Rows to train on: all original art, and `recolour_variants` copies of every sensible recolour."""
    names = [concept["name"] for concept in index["concepts"]]
    return np.array(
        [
            number
            for number, (concept, _, colour, variant) in enumerate(index["rows"])
            if colour is None or (variant < recolour_variants and names[concept] not in NOT_RECOLOURED)
        ]
    )


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, x: Tensor) -> Tensor:
    """Normalised posterior means of pictures (B, 3, H, W)."""
    mean, _ = encode_moments(vae, x)
    shift = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1)
    scale = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1)
    return (mean.float() - shift) / scale


def main() -> None:
    """Parse the command line and encode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/model"))
    parser.add_argument("--out", type=Path, default=Path("runs/latents.npz"))
    args = parser.parse_args()
    pictures, index = load_pictures(args.data)
    rows, started = select_rows(index), time.time()
    vae = AutoencoderKLQwenImage.from_pretrained(args.vae)
    z128, z64 = [], []
    for start in range(0, len(rows), 64):
        x = to_tensor(pictures[rows[start : start + 64]])
        with torch.autocast("cpu", torch.bfloat16):
            z128.append(encode(vae, x).half().numpy())
            z64.append(encode(vae, F.avg_pool2d(x, 2)).half().numpy())
        if start % 1024 == 0:
            print(f"latents: {start}/{len(rows)}, {time.time() - started:.0f} s", flush=True)
    colours = [None, *COLOURS]
    labels = np.array(
        [[c, s, colours.index(colour) - 1] for c, s, colour, _ in (index["rows"][row] for row in rows)]
    )
    columns = {"concept": labels[:, 0], "style": labels[:, 1], "colour": labels[:, 2]}
    np.savez(args.out, z128=np.concatenate(z128), z64=np.concatenate(z64), row=rows, **columns)
    print(f"latents: {len(rows)} pictures in {time.time() - started:.0f} s -> {args.out}")


if __name__ == "__main__":
    main()

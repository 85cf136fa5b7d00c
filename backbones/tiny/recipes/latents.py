"""Step `latents`: encode every training picture once, so that DiT training never runs the VAE.

    python -m backbones.tiny.recipes.latents

Writes runs/latents.npz, laid out as dataset.py says: everything that training a transformer needs, in one
file of less than 60 MB.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from backbones.tiny.recipes.captions import caption
from backbones.tiny.recipes.dataset import KINDS, SQUARE, join_captions, quantise
from backbones.tiny.recipes.picture_vae import encode_moments
from backbones.tiny.recipes.vae import load_pictures, to_tensor

CAPTIONS = 8  # of a single thing
MAX_BYTES = 60_000_000


def select_rows(index: dict, coloured: int | None = None, seed: int = 0) -> np.ndarray:
    """Rows of pictures.npy to train on: all original art, and all or `coloured` of the recoloured copies."""
    rows = index["rows"]
    plain = [number for number, row in enumerate(rows) if row[2] is None]
    copies = [number for number, row in enumerate(rows) if row[2] is not None]
    if coloured is not None and coloured < len(copies):
        copies = random.Random(seed).sample(copies, coloured)
    return np.array(sorted(plain + copies))


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, x: Tensor) -> Tensor:
    """Normalised posterior means of pictures (B, 3, H, W)."""
    mean, _ = encode_moments(vae, x)
    shift = torch.tensor(vae.config.latents_mean, device=x.device).view(1, -1, 1, 1)
    scale = torch.tensor(vae.config.latents_std, device=x.device).view(1, -1, 1, 1)
    return (mean.float() - shift) / scale


class Encoder:
    """Encodes pictures (N, H, W, 3) uint8 in batches, at their size or at half of it."""

    def __init__(self, vae: AutoencoderKLQwenImage, device: str):
        self.vae, self.device, self.started, self.done = vae.to(device), device, time.time(), 0

    def __call__(self, pictures: np.ndarray, half: bool = False) -> np.ndarray:
        """Quantised latents (N, C, H/8, W/8), of half the size with `half`."""
        parts = []
        for start in range(0, len(pictures), 64):
            x = to_tensor(pictures[start : start + 64]).to(self.device)
            with torch.autocast(self.device, torch.bfloat16):
                parts.append(quantise(encode(self.vae, F.avg_pool2d(x, 2) if half else x).cpu()))
            self.done += len(x)
            if len(parts) % 20 == 0:
                print(f"latents: {self.done} pictures, {time.time() - self.started:.0f} s", flush=True)
        return np.concatenate(parts)


def single_rows(index: dict, rows: np.ndarray, seed: int) -> dict[str, np.ndarray | list]:
    """Columns and captions of single things at the square size."""
    rng = random.Random(seed)
    columns: dict[str, list] = {"kind": [], "concept": [], "style": [], "captions": []}
    for concept, style, colour, _ in (index["rows"][row] for row in rows):
        columns["kind"].append(KINDS.index("plain" if colour is None else "coloured"))
        columns["concept"].append(concept)
        columns["style"].append(style)
        texts = [caption(index["concepts"][concept], style, colour, rng) for _ in range(CAPTIONS)]
        columns["captions"].append(texts)
    return {**columns, "row": rows}


def scene_rows(captions: list[list[str]]) -> dict[str, np.ndarray | list]:
    """Columns and captions of composed pictures."""
    none = np.full(len(captions), -1)
    return {"kind": none * 0 + KINDS.index("scene"), "concept": none, "style": none, "row": none,
            "captions": captions}  # fmt: skip


def main() -> None:
    """Parse the command line and encode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/model"))
    parser.add_argument("--coloured", type=int, default=8000, help="recoloured pictures to take")
    parser.add_argument("--out", type=Path, default=Path("runs/latents.npz"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pictures, index = load_pictures(args.data)
    encoder = Encoder(AutoencoderKLQwenImage.from_pretrained(args.vae), args.device)
    rows = select_rows(index, args.coloured, args.seed)
    single = single_rows(index, rows, args.seed)
    file = args.data / "scenes.json"
    texts = json.loads(file.read_text())["captions"] if file.exists() else {}
    columns: dict[str, np.ndarray] = {}
    for key in sorted({SQUARE, *texts}):
        parts, z = [], []
        if key == SQUARE:
            parts.append(single)
            z.append(encoder(pictures[rows]))
            small = [encoder(pictures[rows], half=True)]
        if key in texts:
            scenes = np.load(args.data / "scenes" / f"{key}.npy", mmap_mode="r")
            parts.append(scene_rows(texts[key]))
            z.append(encoder(scenes))
            if key == SQUARE:
                small.append(encoder(scenes, half=True))
        if key == SQUARE:
            columns["z_small"] = np.concatenate(small)
        columns[f"z_{key}"] = np.concatenate(z)
        columns[f"captions_{key}"] = join_captions([row for part in parts for row in part["captions"]])
        for name, kind in (("kind", np.int8), ("concept", np.int16), ("style", np.int8), ("row", np.int32)):
            columns[f"{name}_{key}"] = np.concatenate([part[name] for part in parts]).astype(kind)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **columns)
    size = args.out.stat().st_size
    seconds = time.time() - encoder.started
    print(f"latents: {encoder.done} pictures in {seconds:.0f} s, {size / 1e6:.1f} MB -> {args.out}")
    if size > MAX_BYTES:
        raise SystemExit(
            f"latents: {args.out} is {size} bytes, the limit is {MAX_BYTES}: take fewer --coloured"
        )


if __name__ == "__main__":
    main()

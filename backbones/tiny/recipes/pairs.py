"""Square pictures with their cached latents, for the steps that train a decoder.

Shapes: B batch, C latent channels; pictures (B, 3, H, W) in [-1, 1], z (B, C, H/8, W/8).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backbones.tiny.recipes.dataset import KINDS, QUANTA, SQUARE
from backbones.tiny.recipes.vae import load_pictures, to_tensor

SIDE, CELL = 128, 8  # px; a latent covers CELL x CELL
SHARES = (0.5, 0.2, 0.3)  # of a batch by kind, as dataset.KINDS


class Pairs:
    """Seeded batches of pictures, plain, coloured and composed, with their latents."""

    def __init__(self, data: Path, latents: Path, seed: int):
        self.pictures, _ = load_pictures(data)
        cached = np.load(latents)
        self.z = torch.from_numpy(cached[f"z_{SQUARE}"])
        self.row, kind = cached[f"row_{SQUARE}"].copy(), cached[f"kind_{SQUARE}"]
        self.of_kind = [np.flatnonzero(kind == number) for number in range(len(KINDS))]
        composed = self.of_kind[KINDS.index("scene")]
        if len(composed):
            self.scenes = np.load(data / "scenes" / f"{SQUARE}.npy", mmap_mode="r")
            self.row[composed] = -1 - np.arange(len(composed))
        shares = np.array([share if len(ids) else 0 for share, ids in zip(SHARES, self.of_kind, strict=True)])
        self.shares = shares / shares.sum()
        self.rng = np.random.default_rng(seed)

    def picture(self, number: int, window: tuple[slice, slice]) -> np.ndarray:
        """A window of one picture, uint8."""
        row = self.row[number]
        return self.pictures[row][window] if row >= 0 else self.scenes[-1 - row][window]

    def batch(self, size: int, crop: int) -> tuple[Tensor, Tensor]:
        """Pictures (size, 3, crop, crop) and their latents, one window for the whole batch."""
        kinds = self.rng.choice(len(KINDS), size, p=self.shares)
        ids = np.array([self.rng.choice(self.of_kind[kind]) for kind in kinds])
        top, left = self.rng.integers(0, (SIDE - crop) // CELL + 1, 2)
        return self.window(ids, int(top), int(left), crop // CELL)

    def window(
        self, ids: np.ndarray, top: int = 0, left: int = 0, cells: int = SIDE // CELL
    ) -> tuple[Tensor, Tensor]:
        """The same cells of the pictures and of the latents."""
        z = self.z[torch.from_numpy(ids)][:, :, top : top + cells, left : left + cells].float() / QUANTA
        part = slice(CELL * top, CELL * (top + cells)), slice(CELL * left, CELL * (left + cells))
        return to_tensor(np.stack([self.picture(number, part) for number in ids])), z

    def some(self, kind: str, count: int) -> np.ndarray:
        """About `count` picture numbers of one kind, evenly spread."""
        ids = self.of_kind[KINDS.index(kind)]
        return ids[:: max(1, len(ids) // count)]

"""The data set on disk as seeded training batches.

Shapes: B batch, S picture side, P surface points, Q volume points, G occupancy samples per axis.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

KINDS = ("puff", "solid")
TARGET_WIDTH = 0.1  # box units; distances beyond are as good as far (see target)


def target(distance: Tensor) -> Tensor:
    """What the decoder learns: clamp(-distance / 0.1, -1, 1), positive inside like the published logits."""
    return (-distance / TARGET_WIDTH).clamp(-1, 1)


class ShapeBatch(NamedTuple):
    """image (B, 3, S, S) in [-1, 1]; surface (B, P, 6); points (B, Q, 3); distance (B, Q)."""

    image: Tensor
    surface: Tensor
    points: Tensor
    distance: Tensor


class ShapeSet:
    """Memory-mapped shapes of one split, drawn evenly by kind.

    puff_share: share of inflated silhouettes in a batch; the rest are solids.
    """

    def __init__(self, folder: Path, split: str, seed: int = 0, puff_share: float = 0.55):
        self.arrays = {
            key: np.load(folder / f"{key}.npy", mmap_mode="r")
            for key in ("images", "surface", "volume", "occupancy")
        }
        self.info = json.loads((folder / "index.json").read_text())["rows"]
        self.rows = {
            kind: np.array(
                [i for i, row in enumerate(self.info) if row["split"] == split and row["kind"] == kind], int
            )
            for kind in KINDS
        }
        self.puff_share, self.rng = puff_share, np.random.default_rng(seed)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows.values())

    def reseed(self, seed: int) -> None:
        """Start another stream, as after a resume."""
        self.rng = np.random.default_rng(seed)

    def draw(self, size: int) -> np.ndarray:
        """Row numbers (size,) of a batch."""
        share = self.puff_share if len(self.rows["solid"]) else 1.0
        puffs = round(size * share) if len(self.rows["puff"]) else 0
        picked = [self.rng.choice(self.rows["puff"], puffs)] if puffs else []
        if size > puffs:
            picked.append(self.rng.choice(self.rows["solid"], size - puffs))
        return np.concatenate(picked)

    def batch(
        self, rows: np.ndarray, surface_points: int, volume_points: int, augment: bool = True
    ) -> ShapeBatch:
        """Shapes of these rows; augmented ones are mirrored at random and change colours."""
        image = torch.from_numpy(self.arrays["images"][rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        surface = self._some("surface", rows, surface_points, augment)
        volume = self._some("volume", rows, volume_points, augment)
        if augment:
            flip = torch.from_numpy(self.rng.random(len(rows)) < 0.5)
            image = torch.where(flip[:, None, None, None], image.flip(3), image)
            sign = torch.where(flip, -1.0, 1.0)[:, None]
            surface[..., 0], surface[..., 3] = surface[..., 0] * sign, surface[..., 3] * sign
            volume[..., 0] = volume[..., 0] * sign
            image = self._recolour(image)
        return ShapeBatch(image, surface, volume[..., :3].contiguous(), volume[..., 3])

    def _some(self, key: str, rows: np.ndarray, count: int, shuffle: bool) -> Tensor:
        """`count` points of each row; the stored order is random, so a random stretch is a random draw."""
        stored = self.arrays[key]
        if count > stored.shape[1]:
            raise ValueError(f"{count} {key} points asked for, {stored.shape[1]} stored")
        starts = self.rng.integers(0, stored.shape[1] - count + 1, len(rows)) if shuffle else [0] * len(rows)
        picked = [stored[row, start : start + count] for row, start in zip(rows, starts, strict=True)]
        return torch.from_numpy(np.stack(picked).astype(np.float32))

    def _recolour(self, image: Tensor) -> Tensor:
        """Mix the channels of what is not white by a random matrix near the identity or a permutation."""
        ink = (1 - image) / 2
        batch = len(image)
        mix = np.repeat(np.eye(3)[None], batch, axis=0)
        for row in np.flatnonzero(self.rng.random(batch) < 0.4):
            mix[row] = np.eye(3)[self.rng.permutation(3)]
        mix = mix * self.rng.uniform(0.75, 1.2, (batch, 1, 1)) + 0.08 * self.rng.standard_normal(
            (batch, 3, 3)
        )
        ink = torch.einsum("bij,bjhw->bihw", torch.from_numpy(mix).float(), ink)
        return 1 - 2 * ink.clamp(0, 1)

    def occupancy(self, rows: np.ndarray) -> np.ndarray:
        """Inside or not at every grid point: (B, G^3) bool."""
        return np.unpackbits(np.asarray(self.arrays["occupancy"][rows]), axis=1).astype(bool)

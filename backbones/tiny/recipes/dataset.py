"""The training set of the picture models: one compact file of latents and captions, and seeded batches from
it.

The file (`latents.npz`, step `latents`) holds for every picture size `WxH`: `z_WxH` (N, C, H/8, W/8) int8,
latents times QUANTA; `kind_WxH` (N,), an index into KINDS; `concept_WxH` and `style_WxH` (N,), -1 for scenes;
`row_WxH` (N,), the row of pictures.npy, -1 for composed pictures; `captions_WxH`, UTF-8 bytes: a line per
picture, its captions apart by tabs. `z_small` is the square size again from pictures of half the side, for
the cheap phase.

Shapes: B batch, N image tokens, C packed latent channels, L text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backbones.tiny.recipes.concepts import STYLE_WEIGHTS
from backbones.tiny.recipes.fast_dit import pack

QUANTA = 24.0  # int8 steps per unit of a normalised latent
KINDS = ("plain", "coloured", "scene")
KIND_SHARES = (0.5, 0.15, 0.35)  # of the samples of one size
SQUARE, SMALL = "128x128", "small"
FACES = {"animals", "faces", "people"}  # sections whose concepts are drawn more often
FACE_WEIGHT = 1.6
EMPTY_SHARE = 0.10  # captions dropped for classifier-free guidance (Ho & Salimans 2022)


@dataclass
class Bucket:
    """All pictures of one size. latents (N, C, h, w) int8; weight (N,): how often each is drawn."""

    latents: Tensor
    captions: list[list[str]]
    weight: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens (rows, columns)."""
        return self.latents.shape[-2] // 2, self.latents.shape[-1] // 2


@dataclass
class Batch:
    """latents (B, N, C) packed, float; captions of the B pictures; grid of image tokens; rope step."""

    latents: Tensor
    captions: list[str]
    grid: tuple[int, int]
    step: int = 1


def quantise(latents: Tensor) -> np.ndarray:
    """Normalised latents as int8."""
    return (latents.float() * QUANTA).round().clamp(-127, 127).to(torch.int8).numpy()


def join_captions(captions: list[list[str]]) -> np.ndarray:
    """Captions as one array of UTF-8 bytes."""
    return np.frombuffer("\n".join("\t".join(row) for row in captions).encode(), np.uint8)


def sample_weights(kind: np.ndarray, concept: np.ndarray, style: np.ndarray, sections: list[str]) -> Tensor:
    """How often to draw each picture: KIND_SHARES; concepts alike but for faces; styles as STYLE_WEIGHTS."""
    weight = np.ones(len(kind))
    single = concept >= 0
    factor = np.array([FACE_WEIGHT if FACES & set(name.split()) else 1.0 for name in sections])
    weight[single] = factor[concept[single]] * np.array(STYLE_WEIGHTS)[style[single]]
    for number, share in enumerate(KIND_SHARES):
        chosen = kind == number
        if number == 0 and chosen.any():
            total = np.zeros(len(sections))
            np.add.at(total, concept[chosen], weight[chosen])
            weight[chosen] *= factor[concept[chosen]] / total[concept[chosen]]
        weight[chosen] *= share / max(weight[chosen].sum(), 1e-12)
    return torch.from_numpy(weight)


def load_buckets(path: Path, sections: list[str]) -> dict[str, Bucket]:
    """The file's pictures by size. sections: of the concepts, in order (see `Concept`)."""
    data = np.load(path)
    buckets = {}
    for key in [name.removeprefix("kind_") for name in data.files if name.startswith("kind_")]:
        lines = data[f"captions_{key}"].tobytes().decode().split("\n")
        columns = (data[f"{name}_{key}"] for name in ("kind", "concept", "style"))
        weight = sample_weights(*columns, sections)
        buckets[key] = Bucket(
            torch.from_numpy(data[f"z_{key}"]), [line.split("\t") for line in lines], weight
        )
    if "z_small" in data.files:
        buckets[SMALL] = Bucket(
            torch.from_numpy(data["z_small"]), buckets[SQUARE].captions, buckets[SQUARE].weight
        )
    return buckets


def all_captions(path: Path) -> list[str]:
    """Every caption of the file, to tokenise them at once."""
    data = np.load(path)
    texts = (data[name].tobytes().decode() for name in data.files if name.startswith("captions_"))
    return [
        "",
        " ",
        *(caption for text in texts for line in text.split("\n") for caption in line.split("\t")),
    ]


class TrainingSet:
    """Seeded batches of latents and captions."""

    def __init__(
        self, path: Path, index: dict, seed: int, fits: Callable[[str], bool] = lambda text: True,
        device: str = "cpu",
    ):  # fmt: skip
        """index: pictures.json. fits: whether a caption is short enough; others are never drawn."""
        self.buckets = load_buckets(path, [concept.get("section", "") for concept in index["concepts"]])
        for key, bucket in self.buckets.items():
            bucket.latents = bucket.latents.to(device)
            if key != SMALL:
                bucket.captions[:] = [[text for text in row if fits(text)] for row in bucket.captions]
                short = torch.tensor([bool(row) for row in bucket.captions])
                bucket.weight[~short] = 0
        self.device = device
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """Other captions and rows, for a resumed run."""
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int, key: str = SQUARE) -> Batch:
        """`size` pictures of one size, each with one of its captions, or now and then none."""
        bucket = self.buckets[key]
        rows = torch.multinomial(bucket.weight, size, replacement=True, generator=self.generator)
        draws = torch.rand(size, 2, generator=self.generator).tolist()
        texts = []
        for row, (pick, empty) in zip(rows.tolist(), draws, strict=True):
            captions = bucket.captions[row]
            texts.append(
                ("", " ")[pick < 0.5] if empty < EMPTY_SHARE else captions[int(pick * len(captions))]
            )
        latents = pack(bucket.latents[rows.to(self.device)].float() / QUANTA)
        return Batch(latents, texts, bucket.grid, 2 if key == SMALL else 1)

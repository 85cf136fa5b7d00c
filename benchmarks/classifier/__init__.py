"""An independent judge of generated pictures: which of the core concepts does a picture show?

    classifier = load_classifier()
    classifier.top_k(images, k=5)             # [["cat", "tiger", ...], ...]
    top_k(images, ["cat", "dog"], k=5)        # share of pictures whose label is among the first k

Trained on the real pictures only (recipes/classifier.py), never on generated ones.

Shapes: B batch, H and W picture sides in px.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).parent
SIDE = 64  # px the network sees
CHANNELS = (24, 48, 96, 160)


class _Block(nn.Module):
    """Two convolutions, the second with a residual path, then 2x2 max pooling."""

    def __init__(self, into: int, out: int, stride: int = 1):
        super().__init__()
        self.first = nn.Conv2d(into, out, 1 + 2 * stride, stride=stride, padding=stride, bias=False)
        self.first_norm = nn.GroupNorm(8, out)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(8, out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first_norm(self.first(x)))
        return F.max_pool2d(x + F.relu(self.second_norm(self.second(x))), 2)


class Classifier(nn.Module):
    """A small convolutional network over 64 px pictures.

    labels: the concept names, in the order of the logits.
    """

    def __init__(self, labels: Sequence[str]):
        super().__init__()
        self.labels = tuple(labels)
        sizes = zip((3, *CHANNELS[:-1]), CHANNELS, (2, 1, 1, 1), strict=True)
        self.blocks = nn.Sequential(*(_Block(into, out, stride) for into, out, stride in sizes))
        self.head = nn.Linear(CHANNELS[-1], len(self.labels))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, labels) of pictures x (B, 3, 64, 64) in [-1, 1]."""
        features = self.blocks(x)
        logits: Tensor = self.head(features.amax((2, 3)) + features.mean((2, 3)))
        return logits

    @torch.no_grad()
    def top_k(self, images: Sequence[Image.Image | np.ndarray] | Tensor, k: int = 5) -> list[list[str]]:
        """The k likeliest concept names of each picture, best first."""
        order = self(to_input(images)).topk(k, dim=1).indices.tolist()
        return [[self.labels[index] for index in row] for row in order]


def to_input(images: Sequence[Image.Image | np.ndarray] | Tensor) -> Tensor:
    """PIL pictures, uint8 arrays (H, W, 3) or floats (B, 3, H, W) in [-1, 1] -> (B, 3, 64, 64) in [-1, 1]."""
    if not isinstance(images, Tensor):
        arrays = [
            np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images
        ]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", antialias=True)


@lru_cache(maxsize=1)
def load_classifier() -> Classifier:
    """The packaged classifier, fp32 on the CPU. Raises FileNotFoundError when it is not packaged."""
    labels = json.loads((HERE / "labels.json").read_text("utf-8"))
    classifier = Classifier(labels)
    weights = load_file(HERE / "classifier.safetensors")
    classifier.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return classifier.eval()


def top_k(images: Sequence[Image.Image | np.ndarray] | Tensor, labels: Sequence[str], k: int = 5) -> float:
    """Share (0-1) of pictures whose own label is among the classifier's first k.

    Raises ValueError when the counts differ or a label is not a core concept.
    """
    classifier = load_classifier()
    unknown = sorted(set(labels) - set(classifier.labels))
    if len(images) != len(labels) or unknown:
        raise ValueError(
            f"{len(images)} pictures, {len(labels)} labels; labels that are no core concept: {unknown}"
        )
    guesses = classifier.top_k(images, k)
    return sum(label in guess for label, guess in zip(labels, guesses, strict=False)) / len(labels)

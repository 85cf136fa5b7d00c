"""Image conditioning: pictures in [-1, 1] to DINOv2 tokens, one view or several.

Shapes: B batch, V views, S tokens, D dim.
"""

# mypy: no-warn-return-any
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dinov2 import build_dinov2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VIEW_INDEX = {"front": 0, "left": 1, "back": 2, "right": 3}
"""The order of views in the multi-view checkpoints."""


def view_embedding(index: int, dim: int) -> Tensor:
    """The fixed vector `[D]` added to every token of a view: sines, then cosines, period 10000."""
    half = dim // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = index * frequencies
    return torch.cat([angles.sin(), angles.cos()]).float()


class DinoImageEncoder(nn.Module):
    """One picture per item: `[B, 3, h, w]` in [-1, 1] to `[B, S, D]`.

    `config` holds Dinov2Config fields; `image_size` is the side in px fed to the network. The result is
    taken after the network's final LayerNorm.
    """

    def __init__(self, config: Mapping[str, Any], image_size: int = 224, use_cls_token: bool = True) -> None:
        super().__init__()
        self.model = build_dinov2(config)
        self.image_size, self.use_cls_token = image_size, use_cls_token

    @property
    def num_tokens(self) -> int:
        """Tokens per view."""
        return (self.image_size // self.model.config.patch_size) ** 2 + self.use_cls_token

    def pixel_values(self, image: Tensor) -> Tensor:
        """Shorter side to `image_size`, centre crop, ImageNet normalisation."""
        x = (image + 1) / 2
        height, width = x.shape[-2:]
        short, side = min(height, width), self.image_size
        size = (
            side if height == short else int(side * height / short),
            side if width == short else int(side * width / short),
        )
        # in fp32: the antialiased kernel does not exist in half precision on a CPU
        resized = F.interpolate(x.float(), size=size, mode="bilinear", antialias=True, align_corners=False)
        x = resized.to(x.dtype)
        top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
        x = x[..., top : top + side, left : left + side]
        mean, std = (
            torch.tensor(c, dtype=x.dtype, device=x.device)[:, None, None]
            for c in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return (x - mean) / std

    def encode(self, image: Tensor) -> Tensor:
        """`[B, 3, h, w] -> [B, S, D]`."""
        tokens = self.model(self.pixel_values(image)).last_hidden_state
        return tokens if self.use_cls_token else tokens[:, 1:]

    def forward(self, image: Tensor, view_idxs: Sequence[Sequence[int]] | None = None) -> Tensor:
        """One picture per item; `view_idxs` is accepted and ignored."""
        if image.ndim != 4:
            raise ValueError(
                f"this checkpoint takes one picture per item, [B, 3, h, w], not {list(image.shape)}"
            )
        return self.encode(image)

    def unconditional(self, batch: int, num_views: int = 1) -> Tensor:
        """The embedding of "no picture": zeros in the shape of `forward`'s result."""
        weight = self.model.layernorm.weight
        return weight.new_zeros(batch, num_views * self.num_tokens, weight.shape[0])


class DinoImageEncoderMV(DinoImageEncoder):
    """Several views per item: `[B, V, 3, h, w]` to `[B, V * S, D]`, each marked with its view's vector."""

    def forward(self, image: Tensor, view_idxs: Sequence[Sequence[int]] | None = None) -> Tensor:
        """view_idxs: per item the V view indices (see VIEW_INDEX); 0, 1, 2, ... if not given."""
        if image.ndim != 5:
            raise ValueError(f"this checkpoint takes views, [B, V, 3, h, w], not {list(image.shape)}")
        batch, num_views = image.shape[:2]
        indices = [list(range(num_views))] * batch if view_idxs is None else [list(row) for row in view_idxs]
        if len(indices) != batch or any(len(row) != num_views for row in indices):
            raise ValueError(f"view_idxs {indices} must name {num_views} views for each of {batch} items")
        tokens = self.encode(image.flatten(0, 1)).unflatten(0, (batch, num_views))
        marks = torch.stack(
            [torch.stack([view_embedding(i, tokens.shape[-1]) for i in row]) for row in indices]
        )
        return (tokens + marks.to(tokens)[:, :, None]).flatten(1, 2)


_ENCODERS = {"DinoImageEncoder": DinoImageEncoder, "DinoImageEncoderMV": DinoImageEncoderMV}


class SingleImageEncoder(nn.Module):
    """The conditioner of the published pipelines: one image encoder, result under the name "main"."""

    def __init__(self, main_image_encoder: Mapping[str, Any]) -> None:
        super().__init__()
        unknown = set(main_image_encoder) - {"type", "kwargs"}
        kind = main_image_encoder.get("type")
        if unknown or kind not in _ENCODERS:
            raise ValueError(
                f"main_image_encoder type {kind!r}, other keys {sorted(unknown)}: "
                f"supported types are {', '.join(_ENCODERS)}, keys 'type' and 'kwargs'"
            )
        self.main_image_encoder = _ENCODERS[kind](**main_image_encoder.get("kwargs", {}))

    def forward(self, image: Tensor, view_idxs: Sequence[Sequence[int]] | None = None) -> dict[str, Tensor]:
        """Contexts of `[B, 3, h, w]` or `[B, V, 3, h, w]` in [-1, 1] -> {"main": [B, S, D]}."""
        return {"main": self.main_image_encoder(image, view_idxs=view_idxs)}

    def unconditional(self, batch: int, num_views: int = 1) -> dict[str, Tensor]:
        """Zeros in the shape of `forward`'s result."""
        return {"main": self.main_image_encoder.unconditional(batch, num_views)}

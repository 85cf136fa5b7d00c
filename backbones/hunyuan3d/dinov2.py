"""DINOv2 vision transformer under the published key names (those of transformers 4.x).

Transformers 5 renamed the layers of its module: in this one a checkpoint loads as it is, memory-mapped.

Shapes: B batch, N = 1 + patches, D dim, H heads, K head dim.
"""

# mypy: no-warn-return-any
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Dinov2Config:
    """The fields of transformers' Dinov2Config that matter at inference; defaults are its own (ViT-B)."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4
    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    layerscale_value: float = 1.0
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    use_mask_token: bool = True

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Dinov2Config:
        """Read a Dinov2Config dump; fields that only concern training or bookkeeping are passed over.

        Raises ValueError on a key that Dinov2Config does not have, or on another activation than GELU.
        """
        names = {f.name for f in fields(cls)}
        unknown = set(data) - names - _WITHOUT_EFFECT
        if unknown:
            raise ValueError(f"unknown Dinov2Config keys {sorted(unknown)}")
        config = cls(**{key: value for key, value in data.items() if key in names})
        if config.hidden_act != "gelu":
            raise ValueError(f"hidden_act {config.hidden_act!r} is not supported; DINOv2 uses 'gelu'")
        return config


_WITHOUT_EFFECT = frozenset(
    {
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
        "drop_path_rate",
        "initializer_range",
        "model_type",
        "architectures",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "apply_layernorm",
        "reshape_hidden_states",
        "out_features",
        "out_indices",
        "stage_names",
        "_name_or_path",
    }
)


class PatchEmbeddings(nn.Module):
    """Non-overlapping patches, row by row: `[B, C, h, w] -> [B, patches, D]`."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels to patch features."""
        return self.projection(pixels).flatten(2).transpose(1, 2)


class Embeddings(nn.Module):
    """CLS token, patches and position embeddings. `mask_token` is in the checkpoints and unused."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        grid = config.image_size // config.patch_size
        self.patch_size = config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        if config.use_mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.randn(1, 1 + grid * grid, config.hidden_size) * 0.02)
        self.patch_embeddings = PatchEmbeddings(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `[B, 3, h, w]` to `[B, 1 + patches, D]`."""
        patches = self.patch_embeddings(pixels)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        grid = (pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size)
        return tokens + self.positions(*grid)

    def positions(self, height: int, width: int) -> Tensor:
        """Embeddings for a grid of patches, resampled bicubically in float32 unless it is the trained one."""
        patches = self.position_embeddings[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        if (height, width) == (side, side):
            return self.position_embeddings
        image = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        image = F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)
        resized = image.permute(0, 2, 3, 1).flatten(1, 2).to(patches.dtype)
        return torch.cat([self.position_embeddings[:, :1], resized], dim=1)


class SelfAttention(nn.Module):
    """Query, key and value projections and the attention itself."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        dim = config.hidden_size
        self.query = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.key = nn.Linear(dim, dim, bias=config.qkv_bias)
        self.value = nn.Linear(dim, dim, bias=config.qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`, before the output projection."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Attention and its output projection, nested as in the key names."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.output = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`."""
        return self.output["dense"](self.attention(x))


class LayerScale(nn.Module):
    """A learned factor per feature."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), config.layerscale_value))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`."""
        return x * self.lambda1


class MLP(nn.Module):
    """Linear, GELU, Linear (all sizes but giant)."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        hidden = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated MLP of the giant size: two thirds of the hidden units, rounded up to a multiple of 8."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        hidden = (int(int(config.hidden_size * config.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        self.weights_in = nn.Linear(config.hidden_size, 2 * hidden)
        self.weights_out = nn.Linear(hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`."""
        gate, value = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(F.silu(gate) * value)


class Layer(nn.Module):
    """Pre-norm attention and MLP with layer scale."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.layer_scale1 = LayerScale(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SwiGLU(config) if config.use_swiglu_ffn else MLP(config)
        self.layer_scale2 = LayerScale(config)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`."""
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`."""
        for layer in self.layer:
            x = layer(x)
        return x


class Dinov2(nn.Module):
    """Normalised pixels `[B, 3, h, w]` to final, layer-normed tokens `[B, 1 + patches, D]`."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in any dtype; computed in that of the weights."""
        return self.layernorm(self.encoder(self.embeddings(pixels.to(self.layernorm.weight.dtype))))

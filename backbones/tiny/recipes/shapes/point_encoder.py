"""The shape VAE with its encoder: surface points to a set of latents, for training.

Shapes: B batch, L latents, E latent channels, D dim, P surface points.
"""

# mypy: no-warn-return-any
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbones.hunyuan3d.shape_vae import ShapeVAE
from backbones.hunyuan3d.vecset import POST_EPS, CrossBlock, SelfBlockStack

LOGVAR_RANGE = (-30.0, 20.0)


class PointEncoder(nn.Module):
    """Point features to latent features: queries attend to all points, then to each other."""

    def __init__(
        self,
        in_dim: int,
        width: int,
        heads: int,
        depth: int,
        qkv_bias: bool,
        qk_norm: bool,
        use_ln_post: bool,
    ) -> None:
        super().__init__()
        self.input_proj = nn.Linear(in_dim, width)
        self.cross_attn = CrossBlock(width, heads, qkv_bias, qk_norm)
        self.self_attn = SelfBlockStack(depth, width, heads, qkv_bias, qk_norm)
        self.ln_post = nn.LayerNorm(width, eps=POST_EPS) if use_ln_post else nn.Identity()

    def forward(self, query_features: Tensor, data_features: Tensor) -> Tensor:
        """query_features `[B, L, in]`, data_features `[B, P, in]` -> `[B, L, D]`."""
        keys_values = self.cross_attn.keys_values(self.input_proj(data_features))
        x = self.cross_attn(self.input_proj(query_features), keys_values)
        return self.ln_post(self.self_attn(x))


class Posterior(NamedTuple):
    """Diagonal Gaussian over latents; `mean` is also its mode."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Split `[B, L, 2E]` into mean and clamped log-variance."""
        mean, logvar = moments.chunk(2, dim=-1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    def sample(self, eps: Tensor | None = None) -> Tensor:
        """`mean + std * eps`; eps standard normal, drawn if not given."""
        eps = torch.randn_like(self.mean) if eps is None else eps
        return self.mean + (0.5 * self.logvar).exp() * eps

    def kl(self) -> Tensor:
        """KL divergence to N(0, 1), halved mean over all elements."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).mean()


def farthest_points(points: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Indices `[B, count]` of farthest point sampling from `[B, P, 3]`, with a random first point."""
    batch, total, _ = points.shape
    rows = torch.arange(batch, device=points.device)
    chosen = torch.empty(batch, count, dtype=torch.long, device=points.device)
    current = torch.randint(total, (batch,), generator=generator).to(points.device)
    distance = torch.full((batch, total), math.inf, device=points.device)
    for i in range(count):
        chosen[:, i] = current
        gap = (points.float() - points[rows, current, None].float()).square().sum(dim=-1)
        distance = torch.minimum(distance, gap)
        current = distance.argmax(dim=-1)
    return chosen


class EncodingShapeVAE(ShapeVAE):
    """Both halves of the published shape VAE; settings and defaults are the published class's."""

    def __init__(
        self,
        *,
        num_encoder_layers: int = 8,
        pc_size: int = 5120,
        pc_sharpedge_size: int = 5120,
        point_feats: int = 3,
        downsample_ratio: float = 20,
        use_ln_post: bool = True,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        **decoder: Any,
    ) -> None:
        super().__init__(qkv_bias=qkv_bias, qk_norm=qk_norm, **decoder)
        self.pc_size, self.pc_sharpedge_size, self.downsample_ratio = (
            pc_size,
            pc_sharpedge_size,
            downsample_ratio,
        )
        width, heads = decoder["width"], decoder["heads"]
        self.encoder = PointEncoder(
            self.embedder.out_dim + point_feats,
            width,
            heads,
            num_encoder_layers,
            qkv_bias,
            qk_norm,
            use_ln_post,
        )
        self.pre_kl = nn.Linear(width, 2 * decoder["embed_dim"])

    def encode(self, surface: Tensor, generator: torch.Generator | None = None) -> Posterior:
        """Posterior of surface samples `[B, P, 3 + point_feats]`, random points first.

        Draws the random subset and the farthest-point start from `generator` (CPU).
        """
        queries, data = self.select_points(surface, generator)
        return self.encode_points(queries, data)

    def encode_points(self, queries: Tensor, data: Tensor) -> Posterior:
        """Posterior from chosen query points `[B, L, 3 + f]` and data points `[B, P, 3 + f]`."""
        return Posterior.from_moments(self.pre_kl(self.encoder(self.features(queries), self.features(data))))

    def features(self, points: Tensor) -> Tensor:
        """`[fourier(xyz), raw features]`; normals and the sharp-edge flag are not embedded."""
        return torch.cat([self.embedder(points[..., :3]), points[..., 3:]], dim=-1)

    def select_points(
        self, surface: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Query and data points for the encoder; random and sharp-edge points share the latents by number."""
        total = self.pc_size + self.pc_sharpedge_size
        if surface.shape[1] != total:
            raise ValueError(f"surface has {surface.shape[1]} points; this VAE takes {total}")
        num_random = int(self.pc_size / total * self.latent_shape[0])
        groups = zip(
            surface.split([self.pc_size, self.pc_sharpedge_size], dim=1),
            (num_random, self.latent_shape[0] - num_random),
            strict=True,
        )
        queries, data = [], []
        for points, count in groups:
            if points.shape[1] == 0:
                continue
            # One permutation for the whole batch, as published.
            keep = torch.randperm(points.shape[1], generator=generator)[: int(count * self.downsample_ratio)]
            subset = points[:, keep.to(points.device)]
            picked = farthest_points(subset[..., :3], count, generator)
            data.append(subset)
            queries.append(subset.gather(1, picked[..., None].expand(-1, -1, subset.shape[-1])))
        return torch.cat(queries, dim=1), torch.cat(data, dim=1)

"""Shape VAE: surface points to a set of latents (training), latents to a field of inside/outside logits.

Logits are positive inside; the surface is the zero level.

Shapes: B batch, L latents, E latent channels, D dim, P surface points, Q query points.
"""

# mypy: no-warn-return-any
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .vecset import POST_EPS, CrossBlock, FourierEmbedder, SelfBlockStack

IGNORED_PARAMS = frozenset({"label_type"})
"""'binary' in every published config; it names the training target and changes nothing here."""
LOGVAR_RANGE = (-30.0, 20.0)


class GeoContext(NamedTuple):
    """What query points attend to: keys and values of the decoded latents, computed once per shape."""

    keys: Tensor
    values: Tensor


class GeoDecoder(nn.Module):
    """Logit of query points given decoded latents.

    `downsample_ratio` narrows the whole decoder (2 in the turbo VAE). Without `ln_post` there are no
    query/key norms either, as published.
    """

    def __init__(
        self,
        embedder: FourierEmbedder,
        width: int,
        heads: int,
        qkv_bias: bool,
        qk_norm: bool,
        downsample_ratio: int,
        mlp_expand_ratio: int,
        ln_post: bool,
    ) -> None:
        super().__init__()
        dim = width // downsample_ratio
        self.embedder = embedder
        self.query_proj = nn.Linear(embedder.out_dim, dim)
        self.latents_proj = nn.Linear(width, dim) if downsample_ratio != 1 else nn.Identity()
        self.cross_attn_decoder = CrossBlock(
            dim, heads // downsample_ratio, qkv_bias, qk_norm and ln_post, mlp_expand_ratio
        )
        self.ln_post = nn.LayerNorm(dim, eps=POST_EPS) if ln_post else nn.Identity()
        self.output_proj = nn.Linear(dim, 1)

    def context(self, decoded: Tensor) -> GeoContext:
        """From decoded latents `[B, L, D]`."""
        return GeoContext(*self.cross_attn_decoder.keys_values(self.latents_proj(decoded)))

    def query(self, points: Tensor, context: GeoContext) -> Tensor:
        """From points `[B, Q, 3]` to logits `[B, Q, 1]`; points are embedded in their dtype, then cast."""
        embedded = self.query_proj(self.embedder(points).to(context.keys.dtype))
        return self.output_proj(self.ln_post(self.cross_attn_decoder(embedded, context)))

    def forward(self, queries: Tensor, latents: Tensor) -> Tensor:
        """From queries `[B, Q, 3]` and decoded latents `[B, L, D]` -> logits `[B, Q, 1]`."""
        return self.query(queries, self.context(latents))


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


class ShapeVAE(nn.Module):
    """The published shape VAE. Defaults are the published class's, so an incomplete config means the same.

    `scale_factor`: the diffusion model works on `scale_factor * latents`; `unscale` undoes it.
    `with_encoder=False` builds the decoder half, which is all that the 2.0 checkpoints hold.
    """

    def __init__(
        self,
        *,
        num_latents: int,
        embed_dim: int,
        width: int,
        heads: int,
        num_decoder_layers: int,
        num_encoder_layers: int = 8,
        pc_size: int = 5120,
        pc_sharpedge_size: int = 5120,
        point_feats: int = 3,
        downsample_ratio: float = 20,
        num_freqs: int = 8,
        include_pi: bool = True,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        use_ln_post: bool = True,
        geo_decoder_downsample_ratio: int = 1,
        geo_decoder_mlp_expand_ratio: int = 4,
        geo_decoder_ln_post: bool = True,
        scale_factor: float = 1.0,
        with_encoder: bool = True,
    ) -> None:
        super().__init__()
        if width % heads or width % geo_decoder_downsample_ratio or heads % geo_decoder_downsample_ratio:
            raise ValueError(
                f"width {width} must be a multiple of heads {heads}, and both of "
                f"geo_decoder_downsample_ratio {geo_decoder_downsample_ratio}"
            )
        self.latent_shape = (num_latents, embed_dim)
        self.pc_size, self.pc_sharpedge_size = pc_size, pc_sharpedge_size
        self.downsample_ratio, self.scale_factor = downsample_ratio, scale_factor
        embedder = FourierEmbedder(num_freqs, include_pi)
        self.embedder = embedder
        self.encoder: PointEncoder | None = None
        self.pre_kl: nn.Linear | None = None
        if with_encoder:
            self.encoder = PointEncoder(
                embedder.out_dim + point_feats,
                width,
                heads,
                num_encoder_layers,
                qkv_bias,
                qk_norm,
                use_ln_post,
            )
            self.pre_kl = nn.Linear(width, 2 * embed_dim)
        self.post_kl = nn.Linear(embed_dim, width)
        self.transformer = SelfBlockStack(num_decoder_layers, width, heads, qkv_bias, qk_norm)
        self.geo_decoder = GeoDecoder(
            embedder,
            width,
            heads,
            qkv_bias,
            qk_norm,
            geo_decoder_downsample_ratio,
            geo_decoder_mlp_expand_ratio,
            geo_decoder_ln_post,
        )

    def unscale(self, latents: Tensor) -> Tensor:
        """From the diffusion model's latents to the decoder's."""
        return (1.0 / self.scale_factor) * latents

    def forward(self, latents: Tensor) -> Tensor:
        """Decode un-scaled latents `[B, L, E]` to `[B, L, D]`; independent of the query points."""
        return self.transformer(self.post_kl(latents))

    def field(self, decoded_LD: Tensor) -> Callable[[Tensor], Tensor]:
        """The field of one shape: a function from points `[Q, 3]` (float32) to logits `[Q]` (float32)."""
        context = self.geo_decoder.context(decoded_LD[None])

        def logits(points: Tensor) -> Tensor:
            # The grid is float32 and is rounded to the model's dtype before embedding, as published.
            queries = points.to(decoded_LD.device, decoded_LD.dtype)
            return self.geo_decoder.query(queries[None], context)[0, :, 0].float()

        return logits

    def encode(self, surface: Tensor, generator: torch.Generator | None = None) -> Posterior:
        """Posterior of surface samples `[B, P, 3 + point_feats]`, random points first.

        Draws the random subset and the farthest-point start from `generator` (CPU).
        """
        queries, data = self.select_points(surface, generator)
        return self.encode_points(queries, data)

    def encode_points(self, queries: Tensor, data: Tensor) -> Posterior:
        """Posterior from chosen query points `[B, L, 3 + f]` and data points `[B, P, 3 + f]`."""
        if self.encoder is None or self.pre_kl is None:
            raise ValueError(
                "this VAE comes without an encoder; use a -withencoder or 2.1 checkpoint to encode"
            )
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

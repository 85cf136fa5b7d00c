"""Decoder half of the shape VAE: a set of latents to a field of inside/outside logits.

Logits are positive inside; the surface is the zero level. The encoder half serves training alone, see
`backbones.tiny.recipes.shapes.point_encoder`.

Shapes: B batch, L latents, E latent channels, D dim, Q query points.
"""

# mypy: no-warn-return-any
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .vecset import POST_EPS, CrossBlock, FourierEmbedder, SelfBlockStack

IGNORED_PARAMS = frozenset(
    {
        "num_encoder_layers",
        "pc_size",
        "pc_sharpedge_size",
        "point_feats",
        "downsample_ratio",
        "use_ln_post",
        "label_type",
    }
)
"""Settings of the encoder, and of the training target."""
ENCODER_KEYS = ("encoder.", "pre_kl.")
"""How names of the encoder's weights begin; 2.1 and the folders named -withencoder hold them."""


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


class ShapeVAE(nn.Module):
    """The published shape VAE. Defaults are the published class's, so an incomplete config means the same.

    `scale_factor`: the diffusion model works on `scale_factor * latents`; `unscale` undoes it.
    """

    def __init__(
        self,
        *,
        num_latents: int,
        embed_dim: int,
        width: int,
        heads: int,
        num_decoder_layers: int,
        num_freqs: int = 8,
        include_pi: bool = True,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        geo_decoder_downsample_ratio: int = 1,
        geo_decoder_mlp_expand_ratio: int = 4,
        geo_decoder_ln_post: bool = True,
        scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if width % heads or width % geo_decoder_downsample_ratio or heads % geo_decoder_downsample_ratio:
            raise ValueError(
                f"width {width} must be a multiple of heads {heads}, and both of "
                f"geo_decoder_downsample_ratio {geo_decoder_downsample_ratio}"
            )
        self.latent_shape = (num_latents, embed_dim)
        self.scale_factor = scale_factor
        embedder = FourierEmbedder(num_freqs, include_pi)
        self.embedder = embedder
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

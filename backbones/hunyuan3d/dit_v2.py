"""Hunyuan3D 2.0, 2mini and 2mv shape DiT: double and single stream blocks over an unordered latent set.

The latent tokens are the *img* stream and the image condition is the *txt* stream, as in the FLUX
naming. There is no positional encoding: the number of latent tokens is free at inference.

Shapes: B batch, L latent tokens, S condition tokens, N = S + L, D dim, H heads, K head dim, F MLP width.
"""

# mypy: no-warn-return-any
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
SINUSOID_WIDTH = 256
TIME_SCALE = 1000.0
"""t in [0, 1] is multiplied by this before the sinusoid; the period is `time_factor`, a separate constant."""
IGNORED_PARAMS = frozenset({"input_size", "use_pe", "force_norm_fp32"})
"""Constructor keys that published training configs carry without effect."""


def frequencies(period: float, device: torch.device) -> Tensor:
    """Angular frequencies `[128]` of the sinusoid, from 1 down to about 1 / period."""
    half = SINUSOID_WIDTH // 2
    return torch.exp(-math.log(period) * torch.arange(half, dtype=torch.float32, device=device) / half)


def sinusoid(t_B: Tensor, period: float = 1000.0) -> Tensor:
    """Embedding `[B, 256]` of t in [0, 1] (or of the guidance scale): cosines first, then sines.

    The checkpoints were trained with period 1000 where 10000 is usual. The product with 1000 is formed in
    t's dtype and only then widened, so that half precision rounds as it did in training.
    """
    angles = (TIME_SCALE * t_B).float()[:, None] * frequencies(period, t_B.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(t_B.dtype)


class Embedder(nn.Module):
    """Two-layer SiLU MLP from a sinusoid to the modulation vector: `[B, 256] -> [B, D]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(SINUSOID_WIDTH, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Sinusoid `[B, 256]` to a summand of vec `[B, D]`."""
        return self.out_layer(F.silu(self.in_layer(x)))


class Shift(NamedTuple):
    """One (shift, scale, gate) triple of a modulation, each `[B, 1, D]`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def modulate(self, x: Tensor) -> Tensor:
        """`(1 + scale) * LN(x) + shift` with a LayerNorm without parameters."""
        return (1 + self.scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + self.shift


class Modulation(nn.Module):
    """`vec [B, D]` to `count` (shift, scale, gate) triples."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(dim, 3 * count * dim)

    def forward(self, vec: Tensor) -> list[Shift]:
        """`[B, D]` to the triples, attention before MLP."""
        chunks = self.lin(F.silu(vec))[:, None, :].chunk(3 * self.count, dim=-1)
        return [Shift(*chunks[3 * i : 3 * i + 3]) for i in range(self.count)]


class ScaleRMSNorm(nn.Module):
    """RMS norm over the head dim, in float32, with a parameter called `scale`."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]`; the result has the promoted dtype of input and parameter."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)
        return normed.to(x.dtype) * self.scale


class QKNorm(nn.Module):
    """RMS norms of queries and keys."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = ScaleRMSNorm(head_dim)
        self.key_norm = ScaleRMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, H, N, K]`, all in v's dtype."""
        return self.query_norm(q).to(v.dtype), self.key_norm(k).to(v.dtype), v


def split_heads(qkv_BN3D: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, N, 3D]` to q, k, v `[B, H, N, K]`; the three parts are outermost, heads contiguous inside each."""
    q, k, v = qkv_BN3D.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention without mask: q, k, v `[B, H, N, K]` to `[B, N, D]`."""
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """The projections of one stream's attention; the double block joins the streams itself."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised q, k, v `[B, H, N, K]`."""
        return self.norm(*split_heads(self.qkv(x), self.num_heads))


def _mlp(dim: int, mlp_ratio: float) -> nn.Sequential:
    hidden = int(dim * mlp_ratio)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))


class DoubleStreamBlock(nn.Module):
    """Joint attention, separate weights. Residual streams: `img` and `txt`, returned as `(img, txt)`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(dim, 2), Modulation(dim, 2)
        self.img_attn = SelfAttention(dim, num_heads, qkv_bias)
        self.txt_attn = SelfAttention(dim, num_heads, qkv_bias)
        self.img_mlp, self.txt_mlp = _mlp(dim, mlp_ratio), _mlp(dim, mlp_ratio)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        """One step of both streams: img `[B, L, D]`, txt `[B, S, D]`, vec `[B, D]`."""
        img_attn_mod, img_mlp_mod = self.img_mod(vec)
        txt_attn_mod, txt_mlp_mod = self.txt_mod(vec)

        img_qkv = self.img_attn.project(img_attn_mod.modulate(img))
        txt_qkv = self.txt_attn.project(txt_attn_mod.modulate(txt))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_qkv, img_qkv, strict=True))
        txt_out, img_out = attention(q, k, v).split([txt.shape[1], img.shape[1]], dim=1)

        img = img + img_attn_mod.gate * self.img_attn.proj(img_out)
        img = img + img_mlp_mod.gate * self.img_mlp(img_mlp_mod.modulate(img))
        txt = txt + txt_attn_mod.gate * self.txt_attn.proj(txt_out)
        txt = txt + txt_mlp_mod.gate * self.txt_mlp(txt_mlp_mod.modulate(txt))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP in parallel on the joined stream `x`, condition first; it is returned bare.

    `linear1` yields [q, k, v, MLP units] and `linear2` reads [attention output, MLP units]. A narrowed
    `linear1` may return fewer MLP units; everything after the first 3D features counts as MLP units.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        hidden = int(dim * mlp_ratio)
        self.linear1 = nn.Linear(dim, 3 * dim + hidden)
        self.linear2 = nn.Linear(dim + hidden, dim)
        self.norm = QKNorm(dim // num_heads)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(dim, 1)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """One step of the joined stream: x `[B, S + L, D]`, vec `[B, D]`."""
        (mod,) = self.modulation(vec)
        fused = self.linear1(mod.modulate(x))
        qkv, mlp = fused[..., : 3 * self.dim], fused[..., 3 * self.dim :]
        out = attention(*self.norm(*split_heads(qkv, self.num_heads)))
        return x + mod.gate * self.linear2(torch.cat([out, self.mlp_act(mlp)], dim=-1))


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then the projection to latent channels."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """X `[B, L, D]`, vec `[B, D]` -> `[B, L, C]`."""
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear((1 + scale) * F.layer_norm(x, x.shape[-1:], eps=EPS) + shift)


class Hunyuan3DDiT(nn.Module):
    """Velocity of a latent set: `model(x [B, L, C], t [B], {"main": [B, S, context]}) -> [B, L, C]`.

    Defaults are those of the published 2.0 checkpoint. `guidance_embed` marks the distilled (-fast, -turbo)
    checkpoints, which take the guidance scale as an input instead of a second, unconditional row.
    `axes_dim` and `theta` are part of published configs, are checked and have no other effect.
    Raises ValueError if the head dim does not fit.
    """

    def __init__(
        self,
        in_channels: int = 64,
        context_in_dim: int = 1536,
        hidden_size: int = 1024,
        mlp_ratio: float = 4.0,
        num_heads: int = 16,
        depth: int = 16,
        depth_single_blocks: int = 32,
        axes_dim: tuple[int, ...] | list[int] = (64,),
        theta: int = 10_000,
        qkv_bias: bool = True,
        time_factor: float = 1000.0,
        guidance_embed: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or sum(axes_dim) != hidden_size // num_heads:
            raise ValueError(
                f"hidden_size {hidden_size} / num_heads {num_heads} must be whole "
                f"and equal sum(axes_dim) = {sum(axes_dim)}"
            )
        self.in_channels, self.time_factor, self.guidance_embed = in_channels, time_factor, guidance_embed
        self.latent_in = nn.Linear(in_channels, hidden_size)
        self.time_in = Embedder(hidden_size)
        self.cond_in = nn.Linear(context_in_dim, hidden_size)
        if guidance_embed:
            self.guidance_in = Embedder(hidden_size)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(hidden_size, num_heads, mlp_ratio, qkv_bias) for _ in range(depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth_single_blocks)
        )
        self.final_layer = FinalLayer(hidden_size, in_channels)

    def forward(
        self, x: Tensor, t: Tensor, contexts: Mapping[str, Tensor], guidance: Tensor | None = None
    ) -> Tensor:
        """Velocity of x `[B, L, C]` at t `[B]` in [0, 1] (0 is noise), guidance `[B]` the raw scale."""
        img = self.latent_in(x)
        vec = self.time_in(sinusoid(t, self.time_factor).to(x.dtype))
        if self.guidance_embed:
            if guidance is None:
                raise ValueError(
                    "this checkpoint is guidance-distilled: pass guidance [B], e.g. 5.0 for every row"
                )
            vec = vec + self.guidance_in(sinusoid(guidance, self.time_factor).to(x.dtype))
        txt = self.cond_in(contexts["main"])

        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec)
        joined = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            joined = block(x=joined, vec=vec)
        return self.final_layer(joined[:, txt.shape[1] :], vec)

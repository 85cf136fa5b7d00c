"""Building blocks of the shape VAE: Fourier features of points and attention blocks over unordered sets.

Shapes: B batch, N points or tokens, M tokens attended to, D dim, H heads, K head dim.
"""

# mypy: no-warn-return-any
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
POST_EPS = 1e-5
"""Both `ln_post` layers of the VAE use the framework's default epsilon; every other norm uses 1e-6."""


class FourierEmbedder(nn.Module):
    """Points `[..., 3]` to `[p, sin(e), cos(e)]` with `e` each coordinate times 1, 2, 4, ...; x first.

    Published checkpoints have 8 frequencies without pi (51 features). There is no state: the frequencies
    are computed, so a model built on the meta device is complete once its weights are there.
    """

    def __init__(self, num_freqs: int = 8, include_pi: bool = True, include_input: bool = True) -> None:
        super().__init__()
        self.num_freqs, self.include_pi, self.include_input = num_freqs, include_pi, include_input

    @property
    def frequencies(self) -> Tensor:
        """`[num_freqs]` float32."""
        return 2.0 ** torch.arange(self.num_freqs, dtype=torch.float32) * (
            math.pi if self.include_pi else 1.0
        )

    @property
    def out_dim(self) -> int:
        """Features per point."""
        return 3 * (2 * self.num_freqs + self.include_input)

    def forward(self, points: Tensor) -> Tensor:
        """`[..., 3] -> [..., out_dim]`, in the points' dtype."""
        scaled = (points[..., None] * self.frequencies.to(points)).flatten(-2)
        parts = [points] if self.include_input else []
        return torch.cat([*parts, scaled.sin(), scaled.cos()], dim=-1)


class QKNorm(nn.Module):
    """LayerNorms (weight and bias) of queries and keys over the head dim, or nothing."""

    def __init__(self, head_dim: int, enabled: bool) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(head_dim, eps=EPS) if enabled else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, eps=EPS) if enabled else nn.Identity()


def attend(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    """Softmax attention without mask, heads merged: `[B, N, D]`."""
    q, k, v = (y.transpose(1, 2) for y in (q_BNHK, k_BMHK, v_BMHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Each head's q, k, v lie side by side in `c_qkv`'s output: `[B, N, H, 3K]`."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.c_qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.c_proj = nn.Linear(dim, dim)
        self.attention = QKNorm(dim // num_heads, qk_norm)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`."""
        q, k, v = self.c_qkv(x).unflatten(-1, (self.num_heads, -1)).chunk(3, dim=-1)
        return self.c_proj(attend(self.attention.q_norm(q), self.attention.k_norm(k), v))


class CrossAttention(nn.Module):
    """Queries from one set, keys and values from another; the latter can be computed once and kept."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.c_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.c_kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.c_proj = nn.Linear(dim, dim)
        self.attention = QKNorm(dim // num_heads, qk_norm)

    def keys_values(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys and values `[B, M, H, K]` of the set attended to."""
        k, v = self.c_kv(data).unflatten(-1, (self.num_heads, -1)).chunk(2, dim=-1)
        return self.attention.k_norm(k), v

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """Queries `[B, N, D]` against the other set's keys and values."""
        q = self.c_q(x).unflatten(-1, (self.num_heads, -1))
        return self.c_proj(attend(self.attention.q_norm(q), *keys_values))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, expand: int = 4) -> None:
        super().__init__()
        self.c_fc = nn.Linear(dim, expand * dim)
        self.c_proj = nn.Linear(expand * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class SelfBlock(nn.Module):
    """Pre-norm self attention and MLP, both residual."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, num_heads, qkv_bias, qk_norm)
        self.ln_1 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim)
        self.ln_2 = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class CrossBlock(nn.Module):
    """Pre-norm cross attention and MLP, residual on the queries only."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool, mlp_expand: int = 4) -> None:
        super().__init__()
        self.attn = CrossAttention(dim, num_heads, qkv_bias, qk_norm)
        self.ln_1 = nn.LayerNorm(dim, eps=EPS)
        self.ln_2 = nn.LayerNorm(dim, eps=EPS)
        self.ln_3 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, mlp_expand)

    def keys_values(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` attends to, from `data [B, M, D]`; does not depend on the queries."""
        return self.attn.keys_values(self.ln_2(data))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """Queries x `[B, N, D]` attend, then pass the MLP."""
        x = x + self.attn(self.ln_1(x), keys_values)
        return x + self.mlp(self.ln_3(x))


class SelfBlockStack(nn.Module):
    """Self blocks one after the other, under the published name `resblocks`."""

    def __init__(self, depth: int, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(SelfBlock(dim, num_heads, qkv_bias, qk_norm) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`."""
        for block in self.resblocks:
            x = block(x)
        return x

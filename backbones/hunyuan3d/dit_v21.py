"""Hunyuan3D 2.1 shape DiT: plain blocks with U-shaped skips, cross attention, and experts in the last blocks.

Time enters as token 0 of the sequence and nowhere else. There is no positional encoding.

Shapes: B batch, L latent tokens, S condition tokens, N = 1 + L, D dim, H heads, K head dim, F MLP width,
T = B * N tokens of a batch, E experts, k experts per token.
"""

# mypy: no-warn-return-any
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
MAX_PERIOD = 10_000.0
IGNORED_PARAMS = frozenset({"input_size", "text_len"})
"""Constructor keys of published configs that only matter for options no published checkpoint uses."""


class TimeToken(nn.Module):
    """t `[B]` in [0, 1] to a token `[B, 1, D]`: sines first, then cosines, of t itself (not of 1000 t)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """`[B] -> [B, 1, D]`, in the dtype of the weights."""
        half = self.dim // 2
        frequencies = torch.exp(
            -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32, device=t.device) / half
        )
        angles = t.float()[:, None] * frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(embedding.to(next(self.mlp.parameters()).dtype))[:, None, :]


def _qk_norm(head_dim: int, qk_norm: bool, qk_norm_type: str) -> nn.Module:
    if not qk_norm:
        return nn.Identity()
    return nn.RMSNorm(head_dim, eps=EPS) if qk_norm_type == "rms" else nn.LayerNorm(head_dim, eps=EPS)


class Attention(nn.Module):
    """Self attention, or cross attention when a condition is given.

    Heads are cut from the *concatenated* projections: [q, k, v] of width 3D is split into H groups of 3K,
    each group into its q, k, v. So a head's keys may come from `to_q`; the weights were trained that way.
    """

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool, qk_norm_type: str
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim, dim, bias=qkv_bias)
        self.q_norm = _qk_norm(dim // num_heads, qk_norm, qk_norm_type)
        self.k_norm = _qk_norm(dim // num_heads, qk_norm, qk_norm_type)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Attend from x `[B, N, D]` to cond `[B, S, context]`, or None for self attention."""
        if cond is None:
            fused = torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=-1)
            q, k, v = fused.unflatten(-1, (self.num_heads, -1)).chunk(3, dim=-1)
        else:
            q = self.to_q(x).unflatten(-1, (self.num_heads, -1))
            fused = torch.cat([self.to_k(cond), self.to_v(cond)], dim=-1)
            k, v = fused.unflatten(-1, (self.num_heads, -1)).chunk(2, dim=-1)
        q, k, v = (y_BNHK.transpose(1, 2) for y_BNHK in (self.q_norm(q), self.k_norm(k), v))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear, GELU, Linear at four times the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D] -> [..., D]`."""
        return self.fc2(self.act(self.fc1(x)))


class GELUProjection(nn.Module):
    """`GELU(proj(x))`, first layer of an expert."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D] -> [..., F]`."""
        return self.act(self.proj(x))


class Expert(nn.Module):
    """One expert MLP; `net.1` holds the place of a dropout, so that `net.2` keeps its published name."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELUProjection(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D] -> [..., D]`."""
        return self.net(x)


class ExpertGate(nn.Module):
    """Picks k experts per token: `[T, D] -> (indices [T, k], weights [T, k])`, the heaviest first.

    Weights are raw softmax values and are not renormalised over the chosen experts.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert indices and weights of tokens."""
        weights, indices = F.linear(x_TD, self.weight).softmax(dim=-1).topk(self.top_k, dim=-1)
        return indices, weights


class MixtureOfExperts(nn.Module):
    """Top-k routed experts plus one shared expert that sees every token: `[B, N, D] -> [B, N, D]`."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(dim) for _ in range(num_experts))
        self.gate = ExpertGate(dim, num_experts, top_k)
        self.shared_experts = Expert(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Every token through its k experts and the shared one."""
        tokens_TD = x.flatten(0, 1)
        indices_Tk, weights_Tk = self.gate(tokens_TD)
        slots = indices_Tk.flatten()
        order = slots.argsort(stable=True)
        rows = tokens_TD.index_select(0, order // self.gate.top_k)
        if torch.compiler.is_compiling():
            outputs = self._traced(rows, slots[order])
        else:
            counts = self._rows_per_expert(slots)
            parts = zip(self.experts, rows.split(counts), strict=True)
            outputs = torch.cat([expert(part) for expert, part in parts if part.shape[0] > 0])
        routed = torch.empty_like(rows).index_copy(0, order, outputs)
        routed_TD = (routed.unflatten(0, (-1, self.gate.top_k)) * weights_Tk[..., None]).sum(dim=1)
        return routed_TD.view_as(x) + self.shared_experts(x)

    def _traced(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """The same for torch.compile and torch.export, which cannot split by numbers that are data.

        rows `[R, D]` in the order of their experts, chosen `[R]`. One product over all experts, with their
        weights stacked in every call.
        """
        ends = (chosen[:, None] <= torch.arange(len(self.experts), device=rows.device)).sum(dim=0)

        def product(x: Tensor, layers: list[nn.Linear]) -> Tensor:
            weights = torch.stack([layer.weight.T for layer in layers])
            biases = torch.stack([layer.bias for layer in layers])
            return F.grouped_mm(x, weights, offs=ends.to(torch.int32)) + biases[chosen]

        experts: list[Any] = list(self.experts)
        hidden = F.gelu(product(rows, [expert.net[0].proj for expert in experts]))
        return product(hidden, [expert.net[2] for expert in experts])

    def _rows_per_expert(self, slots: Tensor) -> list[int]:
        num_experts = len(self.experts)
        if slots.is_meta:
            # On the meta device nobody knows who was picked. An even split has the same total rows, hence
            # the same FLOPs; only the sizes of the single matmuls are made up.
            share, rest = divmod(slots.shape[0], num_experts)
            return [share + (i < rest) for i in range(num_experts)]
        return torch.bincount(slots, minlength=num_experts).tolist()  # one host sync per layer


class DiTBlock(nn.Module):
    """[skip merge], self attention, cross attention, MLP. Residual stream: `x`, returned bare.

    `skip` is the earlier block's output in the second half of the U. The stack it comes from belongs to
    the model, so a block that is not run leaves it in order. `c` is the time embedding: the block has no
    use for it (time is token 0 of `x`), it is there for whoever decides about the block from outside.
    """

    ffn_name = "mlp"

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        qkv_bias: bool,
        qk_norm: bool,
        qk_norm_type: str,
        has_skip: bool,
        ffn: nn.Module,
    ) -> None:
        super().__init__()
        if has_skip:
            self.skip_norm = nn.LayerNorm(dim, eps=EPS)
            self.skip_linear = nn.Linear(2 * dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn1 = Attention(dim, dim, num_heads, qkv_bias, qk_norm, qk_norm_type)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.attn2 = Attention(dim, context_dim, num_heads, qkv_bias, qk_norm, qk_norm_type)
        self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.add_module(self.ffn_name, ffn)

    def forward(self, x: Tensor, c: Tensor, cond: Tensor, skip: Tensor | None = None) -> Tensor:
        """One step: x `[B, N, D]`, c `[B, D]`, cond `[B, S, context]`, skip `[B, N, D]` or None."""
        if skip is not None:
            x = self.skip_norm(self.skip_linear(torch.cat([skip, x], dim=-1)))
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), cond)
        return x + getattr(self, self.ffn_name)(self.norm3(x))


class MoEDiTBlock(DiTBlock):
    """A `DiTBlock` with a mixture of experts; a class of its own, since its hidden units have other names."""

    ffn_name = "moe"


class FinalLayer(nn.Module):
    """LayerNorm, drop the time token, project to latent channels."""

    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=EPS)
        self.linear = nn.Linear(dim, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 1 + L, D] -> [B, L, C]`."""
        return self.linear(self.norm_final(x)[:, 1:])


class HunYuanDiTPlain(nn.Module):
    """Velocity of a latent set: `model(x [B, L, C], t [B], {"main": [B, S, context]}) -> [B, L, C]`.

    Sizes have no defaults: every published config spells them out. Experts take the place of the MLP in
    the last `num_moe_layers` blocks. Raises ValueError for head dims that are no multiple of 8 up to 128,
    and for options that no published checkpoint uses.
    """

    guidance_embed = False

    def __init__(
        self,
        *,
        in_channels: int = 64,
        hidden_size: int,
        context_dim: int,
        depth: int,
        num_heads: int,
        qk_norm: bool,
        qkv_bias: bool,
        qk_norm_type: str = "rms",
        num_moe_layers: int = 6,
        num_experts: int = 8,
        moe_top_k: int = 2,
        norm_type: str = "layer",
        mlp_ratio: float = 4.0,
        use_pos_emb: bool = False,
        use_attention_pooling: bool = False,
        with_decoupled_ca: bool = False,
        guidance_cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        head_dim = hidden_size // num_heads
        if hidden_size % num_heads or head_dim % 8 or head_dim > 128:
            raise ValueError(
                f"hidden_size {hidden_size} / num_heads {num_heads} must be a multiple of 8, "
                f"at most 128; it is {hidden_size / num_heads:g}"
            )
        options = {
            "use_pos_emb": use_pos_emb,
            "use_attention_pooling": use_attention_pooling,
            "with_decoupled_ca": with_decoupled_ca,
            "guidance_cond_proj_dim": guidance_cond_proj_dim,
        }
        wanted = [f"{name}={value!r}" for name, value in options.items() if value]
        if norm_type != "layer" or mlp_ratio != 4.0:
            wanted.append(f"norm_type={norm_type!r} with mlp_ratio={mlp_ratio}")
        if wanted:
            raise ValueError(f"not supported, and in no published checkpoint: {', '.join(wanted)}")
        self.in_channels = in_channels
        self.x_embedder = nn.Linear(in_channels, hidden_size)
        self.t_embedder = TimeToken(hidden_size)

        def block(index: int) -> DiTBlock:
            moe = depth - index <= num_moe_layers
            ffn = MixtureOfExperts(hidden_size, num_experts, moe_top_k) if moe else MLP(hidden_size)
            cls = MoEDiTBlock if moe else DiTBlock
            has_skip = index > depth // 2
            return cls(hidden_size, context_dim, num_heads, qkv_bias, qk_norm, qk_norm_type, has_skip, ffn)

        self.blocks = nn.ModuleList(block(i) for i in range(depth))
        self.final_layer = FinalLayer(hidden_size, in_channels)

    def forward(
        self, x: Tensor, t: Tensor, contexts: Mapping[str, Tensor], guidance: Tensor | None = None
    ) -> Tensor:
        """Velocity of x `[B, L, C]` at t `[B]` in [0, 1] (0 is noise). `guidance` is accepted and ignored."""
        token = self.t_embedder(t)
        h, c = torch.cat([token, self.x_embedder(x)], dim=1), token[:, 0]
        middle = len(self.blocks) // 2
        skips: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            skip = skips.pop() if index > middle else None
            h = block(x=h, c=c, cond=contexts["main"], skip=skip)
            if index < middle:
                skips.append(h)
        return self.final_layer(h)

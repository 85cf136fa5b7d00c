"""The router before a block: from the block's input and the timestep to a gate logit and four width logits.

Same inputs and heads as E-DiT (arXiv 2602.13993): the block's image stream modulated by the timestep
embedding, one logit for the gate and one per MLP width. The paper's projects the timestep embedding to
3 x dim, which costs 1.72 B parameters in Qwen-Image; here tokens are pooled first and the modulation
happens in a narrow space, which is 0.17 % of a dim-3072 block's parameters.

Shapes: B batch, N blocks, L tokens, D dim, E time embedding dim, H hidden width of the router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import WIDTHS

if TYPE_CHECKING:
    from .run import Call

HIDDEN = 64
"""Router width H at which a dim-3072 block's router stays under 0.2 % of the block."""


class Router(nn.Module):
    """Gate and width logits of one block.

    dim: D of the image stream. time_dim: E of the modulation argument, 0 if the block has none.
    """

    def __init__(self, dim: int, time_dim: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.time = nn.Linear(time_dim, 2 * hidden) if time_dim else None
        self.gate = nn.Linear(hidden, 1)
        self.width = nn.Linear(hidden, len(WIDTHS))
        for head in (self.gate, self.width):
            nn.init.zeros_(head.weight)
        # An untrained router keeps its block: open gate, full width.
        nn.init.constant_(self.gate.bias, 4.0)
        with torch.no_grad():
            self.width.bias.copy_(torch.arange(len(WIDTHS), dtype=torch.float32))

    def forward(self, stream: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stream [B, L, D], modulation [B, E] -> gate logit [B], width logits [B, 4], the router's dtype."""
        return self.heads(stream.mean(dim=1), modulation)

    def at(self, budget: float) -> Router:
        """The router for runs at a budget: this one, unless it was trained to be told (`train.router`)."""
        return self

    def heads(self, pooled: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `forward`, from tokens pooled to [B, D] (what calibration records)."""
        dtype = self.down.weight.dtype
        z = self.down(F.layer_norm(pooled.to(dtype), pooled.shape[-1:]))
        if self.time is not None and modulation is not None:
            scale, shift = self.time(F.silu(modulation.to(dtype))).chunk(2, dim=-1)
            # Under zero_cond_t the modulation has 2B rows, the real timestep's first.
            z = z * (1 + scale[: len(z)]) + shift[: len(z)]
        z = F.silu(z)
        return self.gate(z).squeeze(-1), self.width(z)


class RouterStack:
    """The routers of all blocks as one batched computation: few operators a call instead of a dozen a block.

    Copies the weights: make a new one when they have changed. routers: of equal shapes.
    """

    def __init__(self, routers: Sequence[Router], device: torch.device) -> None:
        def stacked(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack([tensor.to(device) for tensor in tensors])

        self.down_NDH = stacked([r.down.weight for r in routers]).mT
        self.down_bias_N1H = stacked([r.down.bias for r in routers])[:, None]
        times = [r.time for r in routers if r.time is not None]
        self.time = (
            (stacked([t.weight for t in times]).mT, stacked([t.bias for t in times])[:, None])
            if times
            else None
        )
        self.heads_NHC = stacked([torch.cat([r.gate.weight, r.width.weight]) for r in routers]).mT
        self.heads_bias_N1C = stacked([torch.cat([r.gate.bias, r.width.bias]) for r in routers])[:, None]

    def __call__(self, pooled_NBD: Tensor, modulation_NBE: Tensor | None) -> Tensor:
        """Gate and width logits `[N, B, 5]` as `Router.heads`; a modulation `[B, E]` serves all blocks."""
        dtype = self.down_NDH.dtype
        x_NBD = F.layer_norm(pooled_NBD.to(dtype), pooled_NBD.shape[-1:])
        z_NBH = torch.baddbmm(self.down_bias_N1H, x_NBD, self.down_NDH)
        if self.time is not None and modulation_NBE is not None:
            weight_NEH, bias_N1H = self.time
            time_NBE = F.silu(modulation_NBE[..., : z_NBH.shape[1], :].to(dtype)).expand(len(z_NBH), -1, -1)
            scale_NBH, shift_NBH = torch.baddbmm(bias_N1H, time_NBE, weight_NEH).chunk(2, -1)
            z_NBH = torch.addcmul(shift_NBH + z_NBH, z_NBH, scale_NBH)
        return torch.baddbmm(self.heads_bias_N1C, F.silu(z_NBH), self.heads_NHC)

    @classmethod
    def at(cls, routers: Sequence[nn.Module | None], budget: float, device: torch.device) -> RouterStack:
        """The routers of all blocks, told the budget. Raises ValueError if they cannot be stacked."""
        shapes = {tuple(p.shape for p in r.parameters()) if isinstance(r, Router) else None for r in routers}
        if len(shapes) != 1 or None in shapes:
            raise ValueError("routers that are read together must be there for all blocks, of one shape")
        return cls([cast(Router, router).at(budget) for router in routers], device)

    def read(self, call: Call) -> None:
        """Keep the logits [N, R, 5] of a call's blocks for the branch's next decision."""
        first, modulation = call.pooled[0]
        if modulation is not None and any(m is not modulation for _, m in call.pooled):
            modulation = torch.stack([m.to(first.device) for _, m in call.pooled if m is not None])
        call.branch.logits = self(torch.stack([x.to(first.device) for x, _ in call.pooled]), modulation)


def router_flops(router: nn.Module, tokens: int) -> float:
    """FLOPs of a router for one row of `tokens` tokens, all streams together.

    A router that pools its tokens first costs 2 per weight of its matrices; any other says it in `flops`.
    """
    flops = getattr(router, "flops", None)
    if flops is not None:
        return float(flops(tokens))
    return float(sum(2 * p.numel() for p in router.parameters() if p.dim() == 2))

"""The router before a block: from the block's input and the timestep to a gate logit and four width logits.

Same inputs and heads as E-DiT (arXiv 2602.13993): the block's image stream modulated by the timestep
embedding, one logit for the gate and one per MLP width. The paper's projects the timestep embedding to
3 x dim, which costs 1.72 B parameters in Qwen-Image; here tokens are pooled first and the modulation
happens in a narrow space, which is 0.17 % of a dim-3072 block's parameters.

Shapes: B batch, L tokens, D dim, E time embedding dim, H hidden width of the router.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import WIDTHS

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

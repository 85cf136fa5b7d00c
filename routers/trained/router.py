"""A router that is told the budget, so that one set of weights serves all of them.

Shapes: B batch, D dim, E time embedding dim, H hidden width of the router.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..router import Router
from ..spec import WIDTHS

POWERS = 3
"""What a router is told of a budget b: 1 - b and its powers. All of them are 0 for the dense model."""


class BudgetRouter(Router):
    """Gate and width logits of one block at a budget.

    The budget scales and shifts the hidden layer and shifts the logits. It is constant during a run, so a run
    uses `at(budget)`, a plain router with the budget folded into its biases, and pays nothing for it.
    """

    def __init__(self, dim: int, time_dim: int, hidden: int) -> None:
        super().__init__(dim, time_dim, hidden)
        self.budget = nn.Linear(POWERS, 2 * hidden + 1 + len(WIDTHS), bias=False)
        nn.init.zeros_(self.budget.weight)
        with torch.no_grad():
            # Where training starts: open and wide at the full budget, and less so below.
            self.gate.bias.fill_(2.5)
            self.width.bias.copy_(torch.linspace(-1.5, 1.5, len(WIDTHS)))
            self.budget.weight[2 * hidden, 0] = -5.0

    def told(self, budget: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Budgets [B] -> scale [B, H], shift [B, H], gate shift [B], width shift [B, 4]."""
        powers = torch.stack([(1 - budget) ** k for k in range(1, POWERS + 1)], dim=-1)
        scale, shift, gate, width = self.budget(powers).split(
            [*(2 * [self.down.out_features]), 1, len(WIDTHS)], dim=-1
        )
        return scale, shift, gate.squeeze(-1), width

    def at_budgets(self, pooled: Tensor, modulation: Tensor | None, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, D], modulation [B, E], budgets [B] -> gate logit [B], width logits [B, 4]."""
        scale, shift, gate_shift, width_shift = self.told(budget)
        z = self.down(nn.functional.layer_norm(pooled.float(), pooled.shape[-1:]))
        if self.time is not None and modulation is not None:
            time_scale, time_shift = self.time(nn.functional.silu(modulation.float())).chunk(2, dim=-1)
            scale, shift = scale + time_scale[: len(z)], shift + time_shift[: len(z)]
        z = nn.functional.silu(z * (1 + scale) + shift)
        return self.gate(z).squeeze(-1) + gate_shift, self.width(z) + width_shift

    @torch.no_grad()
    def at(self, budget: float) -> Router:
        """A plain router that gives what this one gives at a budget."""
        hidden, dim = self.down.weight.shape
        plain = Router(dim, self.time.in_features if self.time is not None else 0, hidden)
        plain.to(self.down.weight.device)
        own = {k: v for k, v in copy.deepcopy(self.state_dict()).items() if not k.startswith("budget.")}
        plain.load_state_dict(own)
        told = self.told(torch.tensor([budget], device=self.down.weight.device, dtype=torch.float32))
        scale, shift, gate, width = (x[0] for x in told)
        if plain.time is not None:
            plain.time.bias.add_(torch.cat([scale, shift]))
        else:
            plain.down.weight.mul_(1 + scale[:, None])
            plain.down.bias.copy_(plain.down.bias * (1 + scale) + shift)
        plain.gate.bias.add_(gate)
        plain.width.bias.add_(width)
        return plain.eval().requires_grad_(False)


def build_router(state: dict[str, Tensor]) -> Router:
    """A router from its tensors, frozen, in float32."""
    hidden, dim = state["down.weight"].shape
    kind = BudgetRouter if "budget.weight" in state else Router
    router = kind(dim, state["time.weight"].shape[1] if "time.weight" in state else 0, hidden)
    router.load_state_dict({key: value.float() for key, value in state.items()})
    return router.eval().requires_grad_(False)

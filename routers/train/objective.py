"""What is minimised: distance to the dense model, distance to data, and spend away from the budget.

Decisions are drawn with Gumbel noise and taken hard, with the gradient of the soft probabilities (straight-
through; Jang et al., arXiv 1611.01144). A fixed threshold would open and close the same blocks again and
again and learn of the others from a soft gradient alone; with noise each row tries sub-networks in proportion
to their probability, which is also what the cost term counts. The noise fades out, because decisions are
taken without it later.

Where the backbone trains too, the first row of every batch is the full model and the second the least one
(the sandwich of slimmable networks, Yu and Huang, arXiv 1903.05134), so that neither end is lost in between.

Decisions are taken for a sample, from its first (conditional) branch, and hold for all its CFG branches:
guidance takes the difference of two branches many times, so errors that they share cancel, and those of
different sub-networks do not. What is compared with the dense model is therefore the guided prediction.

Shapes: R rows, one a sample; N blocks, S steps, W widths, D dim, E time embedding dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibrate.workload import Workload
from ..planned.universal import WARPS, grid_steps
from ..spec import WIDTHS
from ..trained.router import BudgetRouter
from .settings import TrainSettings
from .student import Decision
from .trajectory import Trajectories

SPARSEST = 4
"""A plan in training evaluates at least every so many steps of the dense run."""


class Routers(nn.Module):
    """The routers of all blocks, read together. trend [N]: see `student.Decision`."""

    def __init__(self, blocks: int, dim: int, time_dim: int, hidden: int) -> None:
        super().__init__()
        self.trend = nn.Parameter(torch.zeros(blocks))
        self.blocks = nn.ModuleList(BudgetRouter(dim, time_dim, hidden) for _ in range(blocks))

    def forward(self, pooled: Tensor, modulation: Tensor | None, budget: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [N, R, D], modulation [R, E], budgets [R] -> gate logits [R, N], width logits [R, N, W]."""
        logits = [
            router.at_budgets(x, modulation, budget)  # type: ignore[operator]
            for router, x in zip(self.blocks, pooled, strict=True)
        ]
        return torch.stack([gate for gate, _ in logits], 1), torch.stack([width for _, width in logits], 1)


def all_open_at_full(decision: Decision, budget: Tensor) -> Decision:
    """The same for samples with a budget [S] below 1; every block whole for the others."""
    full = (budget >= 1).to(decision.gate.dtype)[:, None]
    whole = nn.functional.one_hot(torch.tensor(len(WIDTHS) - 1), len(WIDTHS)).to(decision.width)
    return Decision(
        decision.gate * (1 - full) + full,
        decision.width * (1 - full[..., None]) + full[..., None] * whole,
        decision.trend,
    )


def decide(gate: Tensor, width: Tensor, noise: float, generator: torch.Generator) -> Decision:
    """Hard decisions with soft gradients from logits. noise in [0, 1]: scale of the Gumbel noise, drawn on
    the CPU, so that a seed means the same on every device.
    """
    # the difference of two Gumbel variables is logistic
    uniform = torch.rand(gate.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(gate.device)
    soft_gate = torch.sigmoid(gate + noise * torch.logit(uniform))
    uniform = torch.rand(width.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(gate.device)
    soft_width = torch.softmax(width - noise * torch.log(-torch.log(uniform)), dim=-1)
    hard_gate = (soft_gate > 0.5).to(gate.dtype)
    hard_width = nn.functional.one_hot(soft_width.argmax(-1), len(WIDTHS)).to(gate.dtype)
    return Decision(
        hard_gate + (soft_gate - soft_gate.detach()), hard_width + (soft_width - soft_width.detach())
    )


def expected_spend(routers: Routers, recorded: Trajectories, batch: int, budget: Tensor) -> Tensor:
    """Share of dense FLOPs [S, R] that each step of a batch is expected to spend at budgets [R].

    From the recorded inputs of the routers alone, so that a whole run costs no pass of the backbone. Routers
    decide one step ahead, and the first step is dense.
    """
    device = budget.device
    costs, steps = recorded.costs(batch, recorded.calls(batch)[0], device), recorded.num_steps
    seen = [recorded.features(batch, s, device) for s in range(steps - 1)]
    pooled = torch.cat([x for x, _ in seen], dim=1)
    modulation = torch.cat([m for _, m in seen if m is not None]) if seen[0][1] is not None else None
    gate, width = routers(pooled, modulation, budget.repeat(steps - 1))
    mean_width = torch.softmax(width, -1) @ torch.tensor(WIDTHS, device=device)
    spend = costs.at(torch.sigmoid(gate), mean_width).view(steps - 1, -1).float()
    return torch.cat([torch.ones_like(spend[:1]), spend])


@dataclass(frozen=True)
class Draw:
    """What one optimiser step is made of: steps of a batch's dense run at which a plan evaluates, the first
    in full; budgets [R] of its samples.
    """

    batch: int
    steps: tuple[int, ...]
    budget: Tensor


class Draws:
    """Which recorded step is trained on at which optimiser step: a function of seed, step and process alone.

    So a training that is continued sees what it would have seen.
    """

    def __init__(self, recorded: Trajectories, workload: Workload, settings: TrainSettings) -> None:
        self.recorded, self.samples, self.settings = recorded, workload.rows, settings

    def draw(self, step: int, process: int, processes: int) -> tuple[Draw, torch.Generator]:
        """The draw of an optimiser step in one of several processes, and the generator for its noise."""
        settings, steps = self.settings, self.recorded.num_steps
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step * processes + process)

        def one_of(count: int) -> int:
            return int(torch.randint(count, (1,), generator=generator))

        batch = one_of(self.recorded.num_batches)
        evaluations = max(2, steps // (1 + one_of(SPARSEST)))  # plans from all steps down to few of them
        plan = grid_steps(steps, min(evaluations, steps), *WARPS["dense"])
        first = one_of(max(1, len(plan) - settings.window))
        budget = settings.low + (1 - settings.low) * torch.rand(self.samples, generator=generator)
        if settings.train != "routers" and self.samples > 1:
            budget[:2] = torch.tensor([1.0, settings.low])
        return Draw(batch, tuple(plan[first : first + settings.window + 1]), budget), generator


def relative_error(answered: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the target's mean energy."""
    error = (answered.float() - target.float()).square().mean()
    return error / target.float().square().mean().clamp_min(1e-12)

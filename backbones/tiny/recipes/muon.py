"""Muon for matrices beside AdamW for the rest (Jordan et al. 2024; RMS matching after arXiv 2502.16982)."""

import torch
from torch import Tensor

# Newton-Schulz quintic coefficients and step count of the Muon reference.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5


def orthogonalise(update: Tensor) -> Tensor:
    """Nearly orthogonal factor of a stack of matrices (N, rows, cols), by Newton-Schulz iteration in bf16."""
    a, b, c = NS_COEFFICIENTS
    x = update.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


def as_matrix(weight: Tensor) -> Tensor:
    """A view of a weight as (out, in): convolutions flattened, causal 3-D ones by their last slice."""
    if weight.dim() == 5:
        weight = weight[:, :, -1]
    return weight if weight.dim() == 2 else weight.flatten(1)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, scaled to the RMS of an AdamW update.

    params: linear or convolution weights. lr: as for AdamW (0 < lr). momentum: Nesterov momentum in [0, 1).
    Matrices of one shape are stacked, so that a step is a few batched products.
    """

    def __init__(self, params, lr: float = 2e-3, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(as_matrix(p).shape, []).append(p)
            for shape, params in by_shape.items():
                grads = [as_matrix(p.grad) for p in params]
                for p, grad in zip(params, grads, strict=False):
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(grad)
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
                step_size = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(nesterov)).unbind(0), strict=False):
                    target = p[:, :, -1] if p.dim() == 5 else p
                    target.sub_(update.view(target.shape), alpha=step_size)

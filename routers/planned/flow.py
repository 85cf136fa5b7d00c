"""Every noise schedule and kind of output seen as one flow, so that one kind of plan serves them all.

A sampler's x = alpha x_0 + sigma n becomes, divided by alpha + sigma, a point on the straight path

    y = (1 - s) x_0 + s n,        s = sigma / (alpha + sigma),        dy/ds = n - x_0,

whatever the schedule: alpha = 1 - s for flow matching, alpha^2 + sigma^2 = 1 for DDPM, alpha = 1 for EDM.
The probability-flow ODE is the same, and what the model gives (n, x_0, or a mixture of both) names n - x_0.
An Euler step of this flow is DDIM's step (arXiv 2010.02502, section 4.1 writes the special case).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KINDS = ("flow_prediction", "epsilon", "v_prediction", "sample")
"""diffusers' names: n - x_0; n; alpha n - sigma x_0; x_0."""


@dataclass(frozen=True)
class Point:
    """Where on a schedule: x = alpha x_0 + sigma n. Raises ValueError if both are 0, or one is negative."""

    alpha: float
    sigma: float

    def __post_init__(self) -> None:
        if min(self.alpha, self.sigma) < 0 or not self.alpha + self.sigma:
            raise ValueError(f"alpha {self.alpha} and sigma {self.sigma} are no point of a noise schedule")

    @property
    def time(self) -> float:
        """s, between 0 (data) and 1 (noise)."""
        return self.sigma / (self.alpha + self.sigma)

    def to_flow(self, x: Tensor) -> Tensor:
        """The point y of x."""
        return x / (self.alpha + self.sigma)

    def from_flow(self, y: Tensor) -> Tensor:
        """The sample x of y."""
        return y * (self.alpha + self.sigma)

    def velocity(self, output: Tensor, x: Tensor, kind: str) -> Tensor:
        """The n - x_0 of a model's output at x. Raises ValueError for an unknown kind, or for n at pure noise
        and x_0 at pure data, which say nothing of the other.
        """
        alpha, sigma = self.alpha, self.sigma
        if kind == "flow_prediction":
            return output
        if kind == "v_prediction":
            square = alpha**2 + sigma**2
            return ((sigma - alpha) * x + (alpha + sigma) * output) / square
        if kind == "epsilon" and alpha:
            return output - (x - sigma * output) / alpha
        if kind == "sample" and sigma:
            return (x - alpha * output) / sigma - output
        raise ValueError(
            f"a model that predicts {kind!r} gives no direction at alpha {alpha}, sigma {sigma}; "
            f"kinds are {', '.join(KINDS)}"
        )

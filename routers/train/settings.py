"""What can be set of a training, with defaults and where they come from. Torch-free: options read it."""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = ("routers", "lora", "full")
"""What is trained; routers always are."""
PRECISIONS = ("no", "bf16")
"""Mixed precision. fp16 is left out: its small gradients need a loss scale, one more state to keep."""


@dataclass(frozen=True)
class TrainSettings:
    """steps: optimiser steps. rate, backbone_rate: AdamW's, of routers and backbone; warm-up over 5 % of the
    steps, then a cosine down to a tenth. hidden: router width. low: the lowest budget that is trained.
    rank: of the LoRA. denoise, cost: weights of these loss terms beside the distillation's 1. clip: largest
    gradient norm. settle: share of the steps, at the end, in which the noise on the decisions fades away.
    every: steps between two kept states. window: evaluations of the student in one optimiser step, one after
    the other along its own way.
    """

    train: str = "routers"
    steps: int = 1000
    rate: float = 3e-3
    backbone_rate: float = 1e-4
    hidden: int = 32
    low: float = 0.35
    rank: int = 16
    denoise: float = 1.0
    cost: float = 10.0
    clip: float = 1.0
    settle: float = 0.3
    every: int = 50
    window: int = 2
    precision: str = "no"
    save_memory: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train not in KINDS:
            raise ValueError(f"train {self.train!r} is unknown; allowed are {', '.join(KINDS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r} is unknown; allowed are {', '.join(PRECISIONS)}")
        if not (0 < self.low < 1 and 0 <= self.settle <= 1 and min(self.steps, self.rank, self.window) > 0):
            raise ValueError(
                f"{self} has a value out of range: 0 < low < 1, 0 <= settle <= 1, steps, rank, window > 0"
            )


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate: warm-up over 5 % of the steps, then a cosine down to a tenth."""
    warm = max(1, round(0.05 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def noise_at(step: int, settings: TrainSettings) -> float:
    """Scale of the noise on the decisions: 1, then falling to 0 over the last share `settle`."""
    fading = settings.settle * settings.steps
    return 1.0 if fading == 0 else min(1.0, (settings.steps - step) / fading)

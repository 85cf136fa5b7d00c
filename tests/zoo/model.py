"""What a row of the zoo is: a tiny transformer of one class, and the arguments of one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """Makes the inputs of a call: `rows` rows at time t in [0, 1]. Row i depends on seed + i only."""

    rows: int
    t: float
    seed: int

    def floats(self, *shape: int, salt: int = 0) -> Tensor:
        """Normal values [B, *shape]."""
        draws = [torch.randn(*shape, generator=self._generator(i, salt)) for i in range(self.rows)]
        return torch.stack(draws)

    def integers(self, high: int, *shape: int, salt: int = 0) -> Tensor:
        """Integers in [0, high), [B, *shape]."""
        draws = [torch.randint(high, shape, generator=self._generator(i, salt)) for i in range(self.rows)]
        return torch.stack(draws)

    def ones(self, *shape: int) -> Tensor:
        """Ones [B, *shape]: a mask that keeps everything."""
        return torch.ones(self.rows, *shape)

    def each(self, *shape: int, salt: int = 0) -> list[Tensor]:
        """A list with normal values [*shape] for every row."""
        return list(self.floats(*shape, salt=salt))

    def time(self, scale: float = 1.0, *shape: int) -> Tensor:
        """The time of every row, [B, *shape]."""
        return torch.full((self.rows, *shape), self.t * scale)

    def _generator(self, row: int, salt: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + row + 1000 * salt)


def grid(*sizes: int, axes: int | None = None) -> Tensor:
    """Positions on a grid as rows of coordinates [product of sizes, axes], filled with zeros in front."""
    points = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in sizes), indexing="ij"), -1)
    points = points.reshape(-1, len(sizes))
    lead = (axes or len(sizes)) - len(sizes)
    return torch.cat([points.new_zeros(len(points), lead), points], 1)


@dataclass(frozen=True, eq=False)
class Model:
    """A tiny model of one transformer class.

    config: of the class. inputs: the arguments of a call.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[Draw], Inputs]

    def build(self) -> nn.Module:
        """The model with random weights, every block of which has an effect."""
        import diffusers

        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, self.name)(**self.config).eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in model.parameters():  # some are empty memory, gates and modulations begin at zero
                noise = torch.randn_like(parameter)
                if parameter.dim() > 1:
                    parameter.copy_(noise / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(0.05 * noise)
        return model

    def call(self, rows: int = 2, t: float = 0.7, seed: int = 0) -> Inputs:
        """The arguments of a call of `rows` rows at time t."""
        return {**self.inputs(Draw(rows, t, seed)), "return_dict": False}

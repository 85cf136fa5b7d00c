"""Noise that a scheduler draws for itself, from the seed of each row: the same in any batch and anywhere."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

APART = 0x5EED
"""Keeps a scheduler's noise apart from the noise that a run starts from, which has the seed itself."""


class _OwnNoise(TorchFunctionMode):
    """Inside, normal noise without a generator comes from these, one for each row."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.generators = generators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.randn, torch.randn_like) or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        like = args[0] if func is torch.randn_like else torch.empty(0)
        shape = like.shape if func is torch.randn_like else torch.Size(_size(args))
        drawn = self._draw(shape)
        return drawn.to(kwargs.get("device") or like.device, kwargs.get("dtype") or like.dtype)

    def _draw(self, shape: torch.Size) -> Tensor:
        if not shape or shape[0] != len(self.generators):
            return torch.randn(shape, generator=self.generators[0])
        return torch.stack([torch.randn(shape[1:], generator=each) for each in self.generators])


def _size(args: tuple[Any, ...]) -> Sequence[int]:
    return args if not args or isinstance(args[0], int) else args[0]


@contextmanager
def seeded(scheduler: Any, seeds: Sequence[int]) -> Iterator[None]:
    """Inside, the steps of a scheduler draw their noise from the seeds, one for each row of the sample."""
    generators = [torch.Generator("cpu").manual_seed(seed ^ APART) for seed in seeds]

    @functools.wraps(type(scheduler).step)  # pipelines look at its arguments
    def own_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _OwnNoise(generators):
            return type(self).step(self, *args, **kwargs)

    scheduler.step = MethodType(own_step, scheduler)  # a copy of the scheduler gets one of its own
    try:
        yield
    finally:
        scheduler.__dict__.pop("step", None)

"""Calls of a transformer seen from outside: their arguments by name, and the prediction that comes back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, however they were passed."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def first_tensor(output: Any) -> Tensor:
    """The tensor of a transformer's output: bare, first of a tuple, or `.sample`."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return tensor

"""Calls of a transformer as they are recorded: arguments as tensors and the rest, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def first_tensor(output: Any) -> Tensor:
    """The tensor of a transformer's output: bare, first of a tuple, or `.sample`."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return tensor


def flatten(arguments: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arguments as tensors by name ("contexts.main" inside of a mapping), and the rest as it is."""
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values()):
            tensors |= {f"{name}.{inner}": tensor for inner, tensor in value.items()}
        else:
            constants[name] = value
    return tensors, constants


def unflatten(tensors: Mapping[str, Tensor], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    arguments = dict(constants)
    for name, tensor in tensors.items():
        outer, _, inner = name.partition(".")
        if inner:
            arguments.setdefault(outer, {})[inner] = tensor
        else:
            arguments[name] = tensor
    return arguments


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, without waiting for what is queued on a card."""
    card = device.type == "cuda"
    return (values.pin_memory() if card else values).to(device, non_blocking=card)

"""Which model a transformer is: by its architecture, and by a few of its weights.

Both are those of the plain model, whatever was done to it since: quantised weights, fused projections and
adapters are seen through.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor, nn

from .packed import dense_shapes, first_weights, is_packed

FINGERPRINT_TENSORS, FINGERPRINT_VALUES = 32, 8
FUSED = ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv")
"""What diffusers adds to an attention when it fuses its projections; the projections stay beside it."""
ROUNDED = 0.15
"""How far a fingerprint of quantised weights may be off, as a ratio of its norm: 4 bits round by a tenth."""


def architecture(transformer: nn.Module) -> str:
    """sha256 over the transformer's parameter names and shapes, as they are in the plain model."""
    shapes = dense_shapes(transformer)
    lines = sorted(f"{name} {shapes[stored]}" for name, stored, _ in _plain_parameters(transformer))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fingerprint(transformer: nn.Module) -> list[float]:
    """A few values of a few matrices: tells fine-tunes apart in any dtype without reading every weight.

    Empty when the weights are not in memory (meta device, offloaded leaf by leaf).
    """
    shapes = dense_shapes(transformer)
    matrices = [entry for entry in sorted(_plain_parameters(transformer)) if len(shapes[entry[1]]) == 2]
    chosen: Sequence[tuple[str, str, Tensor]] = matrices[:: max(1, len(matrices) // FINGERPRINT_TENSORS)]
    if any(p.device.type == "meta" for *_, p in chosen):
        return []
    return [round(value, 5) for _, stored, p in chosen for value in _first_values(transformer, stored, p)]


def is_same_model(transformer: nn.Module, expected: Sequence[float]) -> bool:
    """Whether a transformer has the weights that gave a fingerprint, as far as their form tells."""
    values = fingerprint(transformer)
    if not values or not expected:
        return True
    rounded = any(p.is_floating_point() and p.element_size() == 1 for p in transformer.parameters())
    rounded = rounded or any(is_packed(module) for module in transformer.modules())
    if rounded and len(values) == len(expected):
        return bool(np.linalg.norm(np.subtract(values, expected)) <= ROUNDED * np.linalg.norm(expected))
    return np.allclose(values, expected, rtol=0.02, atol=2e-3)


def _first_values(transformer: nn.Module, name: str, parameter: Tensor) -> list[float]:
    module = transformer.get_submodule(name.rpartition(".")[0])
    if is_packed(module):
        values = first_weights(module, FINGERPRINT_VALUES)
    else:
        values = parameter.detach()[0, :FINGERPRINT_VALUES].float()
    listed: list[float] = values.cpu().tolist()
    return listed


def _plain_parameters(transformer: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(name in the plain model, name as it is, parameter) of what belongs to the plain model."""
    modules = dict(transformer.named_modules())
    adapted = tuple(f"{name}." for name, module in modules.items() if hasattr(module, "get_base_layer"))
    fused = tuple(
        f"{name}.{linear}."
        for name, module in modules.items()
        for linear in FUSED
        if getattr(module, "fused_projections", False) and hasattr(module, "to_q")
    )
    for name, parameter in transformer.named_parameters():
        added = name.startswith(adapted) and ".base_layer." not in name
        if not added and not name.startswith(fused):
            yield name.replace(".base_layer.", "."), name, parameter

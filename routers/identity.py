"""Which model a bundle was made for: its architecture, and a few of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    from .bundle import Bundle

FINGERPRINT_TENSORS, FINGERPRINT_VALUES = 32, 8


def check_fits(bundle: Bundle, transformer: nn.Module, force: bool = False) -> None:
    """Raises ValueError if the bundle was made for another architecture, or (unless forced) other weights."""
    found = architecture(transformer)
    if found != bundle.architecture:
        raise ValueError(
            f"this bundle was made for {bundle.base_model} (architecture {bundle.architecture[:12]}), not "
            f"for this {type(transformer).__name__} ({found[:12]}); calibrate one with: edit calibrate"
        )
    if force or not bundle.fingerprint:
        return
    values = fingerprint(transformer)
    if values and not np.allclose(values, bundle.fingerprint, rtol=0.02, atol=2e-3):
        raise ValueError(
            f"this bundle was fitted on other weights than these (a fine-tune of {bundle.base_model}, or a "
            "LoRA fused into it?); "
            "use it anyway with --force, or calibrate one for this model"
        )


def architecture(transformer: nn.Module) -> str:
    """sha256 over the transformer's parameter names and shapes, PEFT's adapters left out."""
    lines = sorted(f"{name} {tuple(p.shape)}" for name, p in _own_parameters(transformer))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fingerprint(transformer: nn.Module) -> list[float]:
    """A few values of a few matrices: tells fine-tunes apart in any dtype without reading every weight.

    Empty when the weights are not in memory (meta device, offloaded leaf by leaf).
    """
    matrices = [(n, p) for n, p in sorted(_own_parameters(transformer)) if p.dim() == 2]
    chosen: Sequence[tuple[str, Tensor]] = matrices[:: max(1, len(matrices) // FINGERPRINT_TENSORS)]
    if any(p.device.type == "meta" for _, p in chosen):
        return []
    return [round(v, 5) for _, p in chosen for v in p.detach()[0, :FINGERPRINT_VALUES].float().cpu().tolist()]


def _own_parameters(transformer: nn.Module) -> list[tuple[str, Tensor]]:
    adapted = tuple(
        f"{name}." for name, module in transformer.named_modules() if hasattr(module, "get_base_layer")
    )
    return [
        (name.replace(".base_layer.", "."), p)
        for name, p in transformer.named_parameters()
        if not name.startswith(adapted) or ".base_layer." in name
    ]

"""`routers.attach`: put a bundle's routers into a transformer, if it is the one that they were made for.

The module is not called attach.py: importing it would then hide the function `routers.attach`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from .bundle import Bundle, load_bundle
from .elastic import Elastic
from .patching import check_run
from .policy import OpenPolicy
from .spec import TransformerSpec
from .trained.router import build_router

FINGERPRINT_TENSORS, FINGERPRINT_VALUES = 32, 8


def attach(
    model: Any,
    bundle: Bundle | str | Path | None,
    *,
    budget: float | None = None,
    num_steps: int | None = None,
    spec: TransformerSpec | None = None,
    force: bool = False,
) -> Elastic:
    """Attach a bundle's routers to a pipeline's transformer.

    model: the pipeline (an object with `.transformer` and `.scheduler`), or the transformer alone.
    bundle: a `Bundle`, its folder, or None for no routers (every block open; `spec` is then required).
    budget: ratio of dense FLOPs, default the bundle's recommended one. num_steps: denoising steps where no
    pipeline's scheduler tells them: of a loop of your own, default the calibrated number.
    force: accept a bundle that was fitted on other weights of the same architecture (a fine-tune).
    Raises ValueError, one line, if the bundle does not fit the transformer or the budget.
    """
    pipe, transformer = (None, model) if isinstance(model, nn.Module) else (model, model.transformer)
    if bundle is None:
        if spec is None:
            raise ValueError("without a bundle, attach needs the transformer's spec")
        return Elastic(transformer, spec, OpenPolicy, budget=budget, num_steps=num_steps or 20, pipe=pipe)
    loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    budget = loaded.recommended_budget if budget is None else budget
    loaded.check_budget(budget)
    check_run(transformer)  # fused projections, for one, would be taken for another architecture
    check_fits(loaded, transformer, force)
    trained = loaded.trained
    routers = None if trained is None else [build_router(state) for state in trained.routers]
    backbone = None if trained is None else trained.backbone
    undo = None if backbone is None else backbone.apply(transformer)
    try:
        elastic = Elastic(
            transformer, loaded.spec, loaded.policy, routers,
            budget=budget, num_steps=num_steps or loaded.num_steps, pipe=pipe,
        )  # fmt: skip
    except ValueError:
        if undo is not None:
            undo()
        raise
    elastic.on_detach = undo
    return elastic


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

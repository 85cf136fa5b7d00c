"""`routers.attach`: put a bundle's routers into a transformer, if it is the one that they were made for.

The module is not called attach.py: importing it would then hide the function `routers.attach`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .bundle import Bundle, load_bundle
from .elastic import Elastic
from .identity import architecture as architecture
from .identity import fingerprint as fingerprint
from .identity import is_same_model
from .patching import check_run
from .policy import OpenPolicy
from .spec import TransformerSpec
from .trained.router import build_router


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
    bundle: a `Bundle`, its folder, or None for no routers (every block open).
    budget: ratio of dense FLOPs, default the bundle's recommended one. num_steps: denoising steps where no
    pipeline's scheduler tells them: of a loop of your own, default the calibrated number.
    spec: of the transformer where there is no bundle; by default it is derived from the first call.
    force: accept a bundle that was fitted on other weights of the same architecture (a fine-tune).
    Raises ValueError, one line, if the bundle does not fit the transformer or the budget.
    """
    pipe, transformer = (None, model) if isinstance(model, nn.Module) else (model, model.transformer)
    if bundle is None:
        return Elastic(transformer, spec, OpenPolicy, budget=budget, num_steps=num_steps or 20, pipe=pipe)
    loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    budget = loaded.recommended_budget if budget is None else budget
    loaded.check_budget(budget)
    check_run(transformer)
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
    if not force and not is_same_model(transformer, bundle.fingerprint):
        raise ValueError(
            f"this bundle was fitted on other weights than these (a fine-tune of {bundle.base_model}, or a "
            "LoRA fused into it?); "
            "use it anyway with --force, or calibrate one for this model"
        )

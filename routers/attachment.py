"""`routers.attach`: put a bundle's routers into a transformer.

The module is not called attach.py: importing it would then hide the function `routers.attach`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .bundle import Bundle, load_bundle
from .elastic import Elastic
from .identity import check_fits
from .interference import check_run
from .policy import OpenPolicy
from .router import Router
from .spec import TransformerSpec
from .trained.router import BudgetRouter


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


def build_router(state: dict[str, Tensor]) -> Router:
    """A router from its tensors, frozen, in float32."""
    hidden, dim = state["down.weight"].shape
    kind = BudgetRouter if "budget.weight" in state else Router
    router = kind(dim, state["time.weight"].shape[1] if "time.weight" in state else 0, hidden)
    router.load_state_dict({key: value.float() for key, value in state.items()})
    return router.eval().requires_grad_(False)

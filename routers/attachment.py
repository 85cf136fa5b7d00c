"""`routers.attach`: make a pipeline keep to a budget, by a plan or by routers that were made for it.

The module is not called attach.py: importing it would then hide the function `routers.attach`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .bundle import Bundle, load_bundle
from .elastic import Elastic
from .identity import architecture as architecture
from .identity import fingerprint as fingerprint
from .identity import is_same_model
from .patching import check_run
from .planned.grid import OnGrid
from .planned.narrow import NarrowPlans
from .planned.sampled import Budget, PlannerFor, Sampled, each_of
from .planned.scheduler import takes_plans
from .planned.serving import check_free
from .planned.universal import check_wishes, universal_planner
from .policy import OpenPolicy
from .spec import TransformerSpec
from .trained.bundle import Trained
from .trained.router import build_router


def attach(
    model: Any,
    bundle: Bundle | str | Path | None = None,
    *,
    budget: float | Sequence[float] | None = None,
    target: str = "dense",
    seconds: float | None = None,
    num_steps: int | None = None,
    spec: TransformerSpec | None = None,
    force: bool = False,
) -> Elastic | Sampled | OnGrid:
    """Make a pipeline, or a transformer alone, keep to a budget of the dense run's FLOPs.

    model: the pipeline (an object with `.transformer` and `.scheduler`), or the transformer.
    bundle: what was calibrated for it (a `Bundle` or its folder), None for the plan that needs nothing
    measured.
    budget: ratio of dense FLOPs, default the bundle's recommended one, or 1; a list has one for each row of
    the pipeline's batch. target: what the result is near to: "dense", the run of all steps, or "exact", the
    solution that ever more steps tend to.
    seconds: for a whole call of the pipeline on this machine; a plan within the budget is chosen that ends in
    time. The first call of a size shows what decoding takes, and may be late by that.
    num_steps: denoising steps where no pipeline's scheduler tells them: of a loop of your own.
    spec: with it and without a bundle, every block is put under control, open, and counted.
    force: accept a bundle that was fitted on other weights of the same architecture (a fine-tune).
    Returns a handle with `scope`, `trace`, `summary` and `detach`: `Sampled` where the plan takes the
    scheduler's place, `OnGrid` where steps have to stay as they are, `Elastic` where routers decide.
    Raises ValueError, one line, if the bundle does not fit the transformer or the budget, and for seconds
    where no plan takes the scheduler's place.
    """
    pipe, transformer = (None, model) if isinstance(model, nn.Module) else (model, model.transformer)
    check_free(getattr(pipe, "scheduler", None))
    loaded = bundle if isinstance(bundle, Bundle) or bundle is None else load_bundle(bundle)
    routed = loaded is not None and loaded.decides
    if seconds is not None and (routed or pipe is None or not takes_plans(pipe.scheduler)):
        raise ValueError("seconds are kept by plans, and here none takes the sampler's place: give a budget")
    if isinstance(budget, Sequence):
        if routed or spec is not None or pipe is None or not takes_plans(pipe.scheduler):
            raise ValueError("budgets of rows need a plan in the sampler's place, and here is none: give one")
        budget = [*budget]
    elif bundle is None and spec is not None:
        return Elastic(transformer, spec, OpenPolicy, budget=budget, num_steps=num_steps or 20, pipe=pipe)
    if loaded is None:
        budget = 1.0 if budget is None else budget
        return _planned(pipe, transformer, universal_planner, budget, target, num_steps or 20, seconds)
    if budget is None:
        budget = loaded.recommended_budget if seconds is None else 1.0
    for one in each_of(budget):
        loaded.check_budget(one)
    if loaded.decides and loaded.trained is not None and not isinstance(budget, Sequence):
        return _routed(pipe, transformer, loaded, loaded.trained, budget, num_steps, force)
    check_fits(loaded, transformer, force)
    steps, narrow = num_steps or loaded.num_steps, loaded.narrow_plans()
    return _planned(pipe, transformer, loaded.planner, budget, target, steps, seconds, narrow)


def _planned(
    pipe: Any, transformer: nn.Module, planner_for: PlannerFor, budget: Budget, target: str, num_steps: int,
    seconds: float | None, narrow: NarrowPlans | None = None,
) -> Sampled | OnGrid:  # fmt: skip
    """The sampler on a plan in time where it can be, else on its own steps."""
    if pipe is not None and takes_plans(pipe.scheduler):
        return Sampled(pipe, planner_for, budget, target, narrow, seconds)
    assert not isinstance(budget, Sequence)
    check_wishes(budget, target)
    if target != "dense":
        raise ValueError(
            f"target {target!r} needs a sampler that can be given other times; leave the target out"
        )
    return OnGrid(transformer, budget, num_steps, pipe)


def _routed(
    pipe: Any, transformer: nn.Module, bundle: Bundle, trained: Trained, budget: float,
    num_steps: int | None, force: bool,
) -> Elastic:  # fmt: skip
    """Routers decide, on the weights that were trained with them."""
    check_run(transformer)  # fused projections, for one, would be taken for another architecture
    check_fits(bundle, transformer, force)
    undo = None if trained.backbone is None else trained.backbone.apply(transformer)
    try:
        elastic = Elastic(
            transformer, bundle.spec, bundle.policy, [build_router(state) for state in trained.routers],
            budget=budget, num_steps=num_steps or bundle.num_steps, pipe=pipe,
        )  # fmt: skip
    except ValueError:
        if undo is not None:
            undo()
        raise
    elastic.on_detach = undo
    return elastic


def check_fits(bundle: Bundle, transformer: nn.Module, force: bool = False) -> None:
    """Raises ValueError if the bundle was made for another architecture, or (unless forced) other weights."""
    transformer = getattr(transformer, "_orig_mod", transformer)  # compiled as a whole
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

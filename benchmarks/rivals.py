"""What elastic is compared with: each rival has a name, settings, and a context that applies and removes it.

    with rival.attached(bench, setting) as attached:
        with attached.generation():
            pipe(..., num_inference_steps=attached.num_steps)

Samplers are in `samplers.py`, caches of other libraries in `caches.py`. A setting with a "target" aims at
the dense or at the exact result, one without at both. Adding a rival: write `apply(bench, setting)`, a
generator that yields `Attached`, and add a `Rival` to `all_rivals`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import routers
from backbones import loading, registry
from benchmarks import caches, forecasts, recorded, teacache
from benchmarks.bench import Attached, Bench, untouched
from benchmarks.mixes import forced_mix, whole_steps
from benchmarks.samplers import SHIFTS, SOLVERS, optimal_steps
from routers.elastic import Elastic
from routers.paper import checkpoint as release
from routers.paper import policy as release_policy
from routers.planned.spent import evaluations_for
from routers.planned.timeplan import euler
from routers.policy import FixedPolicy
from routers.spec import TARGETS
from routers.trace import Actions

Setting = Mapping[str, float | int | str]
"""One operating point of a rival; JSON data."""

BUDGETS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8)
ON_TOP = "AB2"
"""The solver that caches are put on, at its best shift to the exact result."""
FINAL: Setting = {"budget": 1.0, "target": "exact"}


@dataclass(frozen=True)
class Rival:
    """One way to spend less than the dense model.

    apply: applies a setting, and yields what generates. why_not: bench -> reason why it cannot run there.
    note: what a reader of the table must know of how it was applied. elastic: whether it runs a bundle.
    """

    name: str
    settings: tuple[Setting, ...]
    apply: Callable[[Bench, Setting], AbstractContextManager[Attached]]
    why_not: Callable[[Bench], str | None] = lambda bench: None
    note: str = ""
    elastic: bool = False

    def bundle(self, bench: Bench) -> str | None:
        """Digest of the bundle that it runs, so that results of another one are told apart."""
        return bench.bundle.digest if self.elastic and bench.bundle is not None else None

    @contextmanager
    def attached(self, bench: Bench, setting: Setting) -> Iterator[Attached]:
        """The rival in place at one setting; afterwards the pipeline is as it was before."""
        with untouched(bench.pipe), self.apply(bench, setting) as attached:
            yield attached


def all_rivals(bench: Bench, *, release_file: Path | None = None) -> list[Rival]:
    """Every rival with its settings for this model, elastic first.

    release_file: a checkpoint in the paper's layout, to run its fixed thresholds.
    """
    budgets: tuple[Setting, ...] = tuple({"budget": budget} for budget in BUDGETS)
    aimed: tuple[Setting, ...] = tuple(
        {**setting, "target": target} for target in TARGETS for setting in budgets
    )
    found = [
        Rival("elastic", aimed, elastic, elastic=True),
        Rival("elastic, no bundle", aimed, plan_alone, note="the plan that needs nothing measured"),
    ]
    for name in SOLVERS:
        apply = functools.partial(_sampler, name)
        found.append(Rival(name, aimed, apply, note="best shift of 1, 1.5, 2, 3 on other prompts"))
    found += [
        Rival("OptimalSteps", aimed[len(budgets) :], _optimal_steps, note="own code after arXiv 2503.21774"),
        Rival("whole-step reuse", budgets, _whole_steps, note="linear extrapolation, evenly spread steps"),
        Rival("random skip", budgets, _random_skip),
        Rival(
            "TeaCache-style",
            thresholds(0.04, 0.5),
            teacache.apply,
            teacache.why_not,
            "own code after arXiv 2411.19108; polynomial fitted on calibration prompts",
        ),
    ]
    dense = aimed[: len(budgets)]
    for name, note in forecasts.NAMES.items():
        found.append(Rival(name, dense, functools.partial(forecasts.forecast, name), note=note))
    note = "own code after arXiv 2507.02860"
    found.append(Rival("EasyCache", thresholds(0.03, 0.6), forecasts.easy_cache, note=note))
    for name, settings, apply, why_not, note in caches.ROWS:
        found.append(Rival(name, settings, apply, why_not, note))
        on_top = tuple({**setting, "target": "exact"} for setting in settings)
        found.append(Rival(f"{name} + {ON_TOP}", on_top, functools.partial(_on_top, apply), why_not, note))
    if release_file is not None:
        settings = ({"file": str(release_file), "threshold": 0.5},)
        found.append(
            Rival("paper, fixed threshold", settings, _release, note="fine-tuned weights of its own")
        )
    return [limit_depth(rival, bench) for rival in found]


def limit_depth(rival: Rival, bench: Bench) -> Rival:
    """Leave out settings that always compute more than half of the blocks of a shallow model."""
    lists = [len(bench.transformer.get_submodule(s.path)) for s in bench.backbone.family.transformer.blocks]
    most = min(lists) / 2
    fits = [s for s in rival.settings if int(s.get("front", 0)) + int(s.get("back", 0)) <= most]
    return replace(rival, settings=tuple(fits))


def thresholds(low: float, high: float, count: int = 8) -> tuple[Setting, ...]:
    """`count` thresholds, evenly spread on a logarithmic scale."""
    return tuple({"threshold": float(f"{value:.3g}")} for value in np.geomspace(low, high, count))


def evaluations_of(bench: Bench, setting: Setting) -> int:
    """How many evaluations a setting's budget buys."""
    return evaluations_for(float(setting["budget"]), bench.num_steps)


@contextmanager
def elastic(bench: Bench, setting: Setting) -> Iterator[Attached]:
    """A calibrated plan: the bundle's where it is for this number of steps, else one fitted now."""
    bundle, budget, target = bench.bundle, float(setting["budget"]), str(setting["target"])
    if bundle is None or bundle.num_steps != bench.num_steps or target not in bundle.plans:
        bundle = recorded.calibrated(bench, evaluations_of(bench, setting), target)
    with _attached(bench, bundle, budget, target) as attached:
        yield attached


@contextmanager
def plan_alone(bench: Bench, setting: Setting) -> Iterator[Attached]:
    """A budget without a bundle."""
    with _attached(bench, None, float(setting["budget"]), str(setting["target"])) as attached:
        yield attached


@contextmanager
def _attached(bench: Bench, bundle: routers.Bundle | None, budget: float, target: str) -> Iterator[Attached]:
    attached = routers.attach(
        bench.pipe, bundle, budget=budget, target=target, num_steps=bench.num_steps, force=True
    )
    try:
        if isinstance(attached, Elastic):
            yield Attached(bench.num_steps, attached.scope, traced=True)
        else:
            yield Attached(bench.num_steps, attached.scope, spent=lambda: attached.trace.share)
    finally:
        attached.detach()


@contextmanager
def _sampler(name: str, bench: Bench, setting: Setting) -> Iterator[Attached]:
    evaluations, solver = evaluations_of(bench, setting), SOLVERS[name]

    def plan(shift: float) -> recorded.Planning:
        return lambda grid: solver(grid, evaluations, shift)

    key = f"shift of {name}, {evaluations} of {bench.num_steps}, {setting['target']}"
    shift = recorded.best(bench, key, str(setting["target"]), SHIFTS, plan)
    with recorded.planned(bench, plan(shift)) as attached:
        yield attached


@contextmanager
def _optimal_steps(bench: Bench, setting: Setting) -> Iterator[Attached]:
    _, exact = recorded.trajectory(bench, "exact")
    plan = euler(optimal_steps(exact, evaluations_of(bench, setting)))
    with recorded.planned(bench, lambda grid: plan) as attached:
        yield attached


@contextmanager
def _on_top(
    cache: Callable[[Bench, Setting], AbstractContextManager[Attached]], bench: Bench, setting: Setting
) -> Iterator[Attached]:
    with _sampler(ON_TOP, bench, FINAL), cache(bench, setting) as attached:
        yield attached


@contextmanager
def _blocks(bench: Bench, plan: Actions) -> Iterator[Attached]:
    with bench.elastic(lambda: FixedPolicy(plan, order=1)) as elastic:
        yield Attached(bench.num_steps, lambda: elastic.scope(num_steps=bench.num_steps), traced=True)


def _random_skip(bench: Bench, setting: Setting) -> AbstractContextManager[Attached]:
    return _blocks(bench, forced_mix("skip", bench.call, float(setting["budget"]), bench.num_steps))


def _whole_steps(bench: Bench, setting: Setting) -> AbstractContextManager[Attached]:
    return _blocks(bench, whole_steps(bench.call, float(setting["budget"]), bench.num_steps))


@contextmanager
def _release(bench: Bench, setting: Setting) -> Iterator[Attached]:
    """The checkpoint's own transformer in place of the pipeline's, deciding as the paper's release does."""
    import diffusers

    spec, before = bench.backbone.family.transformer, bench.transformer
    config = dict(registry.component_configs(bench.backbone)["transformer"])
    kind = getattr(diffusers, spec.transformer_class)
    transformer, gates = release.load_release(
        Path(str(setting["file"])),
        lambda: kind.from_config(config),
        spec,
        dtype=loading.pick_dtype("auto", bench.backbone, bench.pipe.device),
    )
    release.use_sigmoid_gelu(transformer, spec)
    bench.pipe.transformer = transformer.to(bench.pipe.device)
    policy = functools.partial(release_policy.ReleasePolicy, dtype=transformer.dtype)
    elastic = Elastic(transformer, spec, policy, list(gates), num_steps=bench.num_steps)
    try:
        yield Attached(bench.num_steps, lambda: elastic.scope(num_steps=bench.num_steps), traced=True)
    finally:
        elastic.detach()
        bench.pipe.transformer = before

"""What elastic is compared with: each rival has a name, settings, and a context that applies and removes it.

    with rival.attached(bench, setting) as attached:
        with attached.generation():
            pipe(..., num_inference_steps=attached.num_steps)

Caches of other libraries are in `caches.py`. Adding a rival: write `apply(bench, setting)`, a generator that
yields `Attached`, and add a `Rival` to `all_rivals`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import routers
from backbones import loading, registry
from benchmarks import caches, teacache
from benchmarks.bench import Attached, Bench, untouched
from benchmarks.mixes import forced_mix, whole_steps
from routers.elastic import Elastic
from routers.paper import checkpoint as release
from routers.paper import policy as release_policy
from routers.policy import FixedPolicy
from routers.trace import Actions

Setting = Mapping[str, float | int | str]
"""One operating point of a rival; JSON data."""

SECOND_ORDER = {"AB2": "ab2", "DPM++(2M)": "dpm++2m"}
"""Second-order solvers as tables name them -> `backbones.solvers`."""
BUDGETS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9)
STEP_SHARES = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)


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
    budgets = tuple({"budget": budget} for budget in BUDGETS)
    exact = tuple({**setting, "target": "exact"} for setting in budgets)
    found = [
        Rival("elastic", budgets, elastic, _no_bundle, elastic=True),
        Rival("elastic, no bundle", budgets, plan_alone, note="the plan that needs nothing measured"),
        Rival("elastic, no bundle, exact", exact, plan_alone, note="the same, aimed at the exact solution"),
    ]
    steps = tuple({"steps": n} for n in step_counts(bench.num_steps))
    found.append(Rival("fewer steps, Euler", steps, _fewer_steps))
    for name in SECOND_ORDER:
        settings = tuple(
            {"steps": n, "solver": name} for n in (*step_counts(bench.num_steps), bench.num_steps)
        )
        found.append(Rival(f"fewer steps, {name}", settings, _fewer_steps))
    found += [
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
    found += [Rival(*row) for row in caches.ROWS]
    if release_file is not None:
        settings = ({"file": str(release_file), "threshold": 0.5},)
        found.append(
            Rival("paper, fixed threshold", settings, _release, note="fine-tuned weights of its own")
        )
    return [limit_depth(limit_budgets(rival, bench), bench) for rival in found]


def limit_depth(rival: Rival, bench: Bench) -> Rival:
    """Leave out settings that always compute more than half of the blocks of a shallow model."""
    lists = [len(bench.transformer.get_submodule(s.path)) for s in bench.backbone.family.transformer.blocks]
    most = min(lists) / 2
    fits = [s for s in rival.settings if int(s.get("front", 0)) + int(s.get("back", 0)) <= most]
    return replace(rival, settings=tuple(fits))


def limit_budgets(rival: Rival, bench: Bench) -> Rival:
    """Leave out budgets that the bundle does not serve."""
    if bench.bundle is None or not rival.elastic:
        return rival
    least = bench.bundle.min_budget
    return replace(rival, settings=tuple(s for s in rival.settings if float(s["budget"]) >= least))


def thresholds(low: float, high: float, count: int = 8) -> tuple[Setting, ...]:
    """`count` thresholds, evenly spread on a logarithmic scale."""
    return tuple({"threshold": float(f"{value:.3g}")} for value in np.geomspace(low, high, count))


def step_counts(num_steps: int) -> list[int]:
    """Smaller step counts from a quarter of the steps on."""
    return sorted({max(2, round(share * num_steps)) for share in STEP_SHARES} - {num_steps})


def elastic(bench: Bench, setting: Setting) -> AbstractContextManager[Attached]:
    """The bundle at a budget."""
    assert bench.bundle is not None, "why_not was asked"
    return _attached(bench, bench.bundle, setting)


def plan_alone(bench: Bench, setting: Setting) -> AbstractContextManager[Attached]:
    """A budget without a bundle."""
    return _attached(bench, None, setting)


@contextmanager
def _attached(bench: Bench, bundle: routers.Bundle | None, setting: Setting) -> Iterator[Attached]:
    budget, target = float(setting["budget"]), str(setting.get("target", "dense"))
    attached = routers.attach(
        bench.pipe, bundle, budget=budget, target=target, num_steps=bench.num_steps, force=True
    )
    try:
        yield Attached(bench.num_steps, attached.scope, traced=isinstance(attached, Elastic))
    finally:
        attached.detach()


def _solver(bench: Bench, setting: Setting) -> AbstractContextManager[None]:
    """The setting's solver in place of the pipeline's, if it names one."""
    return bench.solver(SECOND_ORDER[str(setting["solver"])]) if "solver" in setting else nullcontext()


def _no_bundle(bench: Bench) -> str | None:
    return None if bench.bundle is not None else "the model has no bundle; give one with --routers"


@contextmanager
def _fewer_steps(bench: Bench, setting: Setting) -> Iterator[Attached]:
    with _solver(bench, setting):
        yield Attached(int(setting["steps"]), nullcontext)


@contextmanager
def _planned(bench: Bench, plan: Actions) -> Iterator[Attached]:
    with bench.elastic(lambda: FixedPolicy(plan, order=1)) as elastic:
        yield Attached(bench.num_steps, lambda: elastic.scope(num_steps=bench.num_steps), traced=True)


def _random_skip(bench: Bench, setting: Setting) -> AbstractContextManager[Attached]:
    return _planned(bench, forced_mix("skip", bench.call, float(setting["budget"]), bench.num_steps))


def _whole_steps(bench: Bench, setting: Setting) -> AbstractContextManager[Attached]:
    return _planned(bench, whole_steps(bench.call, float(setting["budget"]), bench.num_steps))


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
        dtype=loading.pick_dtype("auto", bench.backbone),
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

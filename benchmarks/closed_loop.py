"""Plans in continuous time beside fewer steps of a better sampler and the packaged bundle, at equal FLOPs.

    python -m benchmarks.closed_loop qwen-image-tiny --count 24 -o results   # continues a killed run
    python -m benchmarks.closed_loop hunyuan3d-tiny --images -o results      # meshes
    python -m benchmarks.closed_loop qwen-image-tiny -o results --quick      # to see that all runs

For every budget of the dense run's FLOPs, likeness to the dense result and to the exact one (many steps):
Euler and AB2 with fewer steps at several shifts (the best is named), AB2 aimed at the run of all steps, the
plan that needs nothing measured, plans fitted in closed loop on recorded calibration samples, and the
packaged bundle. Results are kept as in `benchmarks.pareto`; the last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from benchmarks import pareto
from benchmarks.bench import Attached, Bench
from benchmarks.pareto_report import markdown
from benchmarks.pareto_run import measure_quality
from benchmarks.pareto_store import Point, Store
from benchmarks.rivals import Rival, Setting, elastic, plan_alone
from routers.planned.choose_times import CANDIDATES, Fitted, choose, fit
from routers.planned.closed_loop import FitSettings, Recording, Trajectory
from routers.planned.follow import Steps
from routers.planned.scheduler import elastic_scheduler
from routers.planned.spent import evaluations_for
from routers.planned.timeplan import Array, TimePlan, adams_bashforth, euler, moving, resampled, shifted
from routers.planned.universal import exact_planner, universal_plan
from routers.spec import TARGETS

BUDGETS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
SHIFTS = (1.0, 1.7, 2.2, 3.0)
TRIALS = {
    "weights free": FitSettings(),
    "sum kept": FitSettings(order=1),
    "two moments kept": FitSettings(order=2),
    "with state": FitSettings(state=True),
    "sum kept, with state": FitSettings(state=True, order=1),
}
"""Name -> freedom of fitted weights, at the times of the plan that needs nothing, for `--trials`."""
ELASTIC, ALONE = "elastic", "elastic, no bundle"


def planned(bench: Bench, planner: Callable[[Array], Steps]) -> AbstractContextManager[Any]:
    """The pipeline on a planner's times and weights."""
    return elastic_scheduler(bench.pipe, lambda grid: planner(moving(grid)))


# -- ways ---------------------------------------------------------------------------------------


def sampler(order: int, shift: float, grid: Array, evaluations: int) -> TimePlan:
    """Fewer steps of Euler or Adams-Bashforth at shifted times."""
    return adams_bashforth(shifted(resampled(grid, evaluations), shift), order)


def held_sampler(shift: float, grid: Array, evaluations: int) -> TimePlan:
    """AB2 whose steps aim at the sum of the grid's Euler steps."""
    return adams_bashforth(shifted(resampled(grid, evaluations), shift), 2, grid)


def recorded(bench: Bench, target: str, samples: int) -> tuple[Array, Trajectory]:
    """The grid, and the target's trajectory for the first calibration samples. Kept in the bench's memo."""
    key = f"recorded {target} {samples}"
    if key not in bench.memo:
        grids: list[Array] = []
        taken: list[Recording] = []

        def planner(grid: Array) -> Recording:
            grids.append(grid)
            taken.append(Recording(euler(grid) if target == "dense" else exact_planner(grid), samples))
            return taken[-1]

        with planned(bench, planner):
            _run_samples(bench, samples)
        path = taken[-1].trajectory
        if target == "dense":  # straight between its times
            path.velocities = []
        bench.memo[key] = grids[-1], path
    grid, path = bench.memo[key]
    return grid, path


def _run_samples(bench: Bench, samples: int) -> None:
    bench.workload(samples, bench.calibration[:samples]).run(0)


def fitted(bench: Bench, target: str, samples: int, trial: str | None, evaluations: int) -> Fitted:
    """The plan that closed-loop fitting makes of the first calibration samples.

    trial: one of `TRIALS`; None chooses times and freedom as calibration does.
    """
    key = f"fitted {target} {samples} {evaluations} {trial}"
    if key not in bench.memo:
        grid, path = recorded(bench, target, samples)

        def run(steps: Steps) -> None:
            with planned(bench, lambda grid: steps):
                _run_samples(bench, samples)

        if trial is None:
            chosen = choose(run, path, grid, evaluations, target, CANDIDATES[target])
            bench.memo[key] = next(iter(chosen.values()))
        else:
            bench.memo[key] = fit(run, universal_plan(grid, evaluations, target), path, TRIALS[trial])
    best: Fitted = bench.memo[key]
    return best


# -- the comparison -----------------------------------------------------------------------------


def ways(budgets: Sequence[float], samples: Sequence[int], trials: bool = False) -> list[Rival]:
    """Everything that is compared, as rivals of `benchmarks.pareto` with budgets as settings.

    trials: also every freedom of `TRIALS`, fitted on the largest number of samples.
    """
    settings: tuple[Setting, ...] = tuple({"budget": budget} for budget in budgets)
    planners: dict[str, Callable[[Array, int], TimePlan]] = {}
    for shift in SHIFTS:
        planners[f"Euler, shift {shift:g}"] = functools.partial(sampler, 1, shift)
        planners[f"AB2, shift {shift:g}"] = functools.partial(sampler, 2, shift)
        planners[f"AB2 to dense, shift {shift:g}"] = functools.partial(held_sampler, shift)
    found = [Rival(name, settings, functools.partial(_free, planner)) for name, planner in planners.items()]
    for target in TARGETS:
        aimed = tuple({**setting, "target": target} for setting in settings)
        found.append(Rival(f"{ALONE}, {target}", aimed, plan_alone))
        for count in samples:
            name = f"closed loop, {count} sample{'s' * (count > 1)}, {target}"
            found.append(Rival(name, settings, functools.partial(_fitted, target, count, None)))
        for trial in TRIALS if trials else ():
            apply = functools.partial(_fitted, target, max(samples), trial)
            found.append(Rival(f"{trial}, {target}", settings, apply))
    return found


def evaluations_of(bench: Bench, setting: Setting) -> int:
    """How many evaluations a budget buys."""
    return evaluations_for(float(setting["budget"]), bench.num_steps)


@contextmanager
def _free(planner: Callable[[Array, int], TimePlan], bench: Bench, setting: Setting) -> Iterator[Attached]:
    with planned(bench, lambda grid: planner(grid, evaluations_of(bench, setting))):
        yield Attached(bench.num_steps, nullcontext)


@contextmanager
def _fitted(
    target: str, samples: int, trial: str | None, bench: Bench, setting: Setting
) -> Iterator[Attached]:
    plan = fitted(bench, target, samples, trial, evaluations_of(bench, setting)).plan
    with planned(bench, lambda grid: plan):
        yield Attached(bench.num_steps, nullcontext)


def table(
    points: Mapping[str, Point], budgets: Sequence[float], score: str
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a way's mean score at each budget; of samplers with several shifts also the best one."""
    by_way: dict[str, dict[float, float]] = {}
    for point in points.values():
        if "budget" in point.setting:
            mean = statistics.mean(point.scores[score])
            by_way.setdefault(point.rival, {})[float(point.setting["budget"])] = mean
    best: dict[str, dict[float, float]] = {}
    for name, values in by_way.items():
        if ", shift " in name:
            family = best.setdefault(f"{name.split(', shift')[0]}, best shift", {})
            for budget, value in values.items():
                family[budget] = max(value, family.get(budget, value))
    rows = [
        [name, *(f"{values[b]:.2f}" if b in values else "-" for b in budgets)]
        for name, values in {**by_way, **best}.items()
    ]
    return ["way", *map(str, budgets)], rows


def report(store: Store, bench: Bench, budgets: Sequence[float]) -> None:
    """Print both tables and one JSON line."""
    points = store.load()
    dense = next(point for point in points.values() if point.rival == "dense")
    for score, to in ((bench.score, "the dense result"), (f"{bench.score}_truth", "the exact result")):
        print(f"\n{bench.score} to {to} (dense run: {statistics.mean(dense.scores[score]):.2f})\n")
        print(markdown(*table(points, budgets, score)))
    rows = [
        {"way": p.rival, **p.setting, "flops": round(p.flops, 4)}
        | {s: round(statistics.mean(p.scores[s]), 3) for s in (bench.score, f"{bench.score}_truth")}
        for p in points.values()
    ]
    print("\n" + json.dumps({"model": bench.backbone.name, "count": len(bench.prompts), "points": rows}))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with what `benchmarks.pareto` asks for beside it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.closed_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budgets", type=float, nargs="+", help="shares of the dense run's FLOPs")
    parser.add_argument("--samples", type=int, nargs="+", help="recorded samples to fit on, one way for each")
    parser.add_argument("--ways", nargs="+", metavar="NAME", help="only ways whose names begin so")
    parser.add_argument("--trials", action="store_true", help="also other freedoms of fitted weights")
    mine, rest = parser.parse_known_args(arguments)
    args = pareto.parse(rest)
    args.budgets = mine.budgets or ([0.5] if args.quick else list(BUDGETS))
    args.samples = mine.samples or ([1] if args.quick else [1, 4])
    args.ways, args.trials = mine.ways, mine.trials
    args.phase, args.rounds = "quality", 0
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Exit code 2 for bad input."""
    args = parse(arguments)
    try:
        bench = pareto.open_bench(args)
        rivals = ways(args.budgets, args.samples, args.trials)
        if bench.bundle is not None:
            served = tuple({"budget": b} for b in args.budgets if b >= bench.bundle.min_budget)
            rivals.append(Rival(ELASTIC, served, elastic, elastic=True))
        if args.ways:
            rivals = [r for r in rivals if r.name.startswith(tuple(args.ways))]
        digest = bench.bundle.digest if bench.bundle is not None else None
        store = Store(args.output, pareto.describe(bench, args), digest)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with torch.no_grad():
        measure_quality(bench, store, rivals, args)
    report(store, bench, args.budgets)
    return 0


if __name__ == "__main__":
    sys.exit(main())

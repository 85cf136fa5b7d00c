"""What each part of a plan gains: the choice of steps, the weights of the passes, and decisions per sample.

    python -m benchmarks.planning                       # qwen-image-tiny
    python -m benchmarks.planning --markdown            # the tables of docs/notes/planning.md

Half of the prompts are recorded, the other half judges. First table: latent SNR of the held-out samples to
their dense latents, measured, for plans made in different ways at equal FLOPs. Second table: what decisions
per sample could gain at most, from the held-out samples' own moments: the best steps for each sample instead
of the best for all, and the best weights for each sample instead of the fitted ones.

Shapes: R rows, G branches, T steps.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbones import loading, registry
from backbones.spec import Placement
from backbones.workloads import PipelineWorkload
from benchmarks.scores import COMMON, read_prompts
from routers.calibrate.choose import choose_plans
from routers.calibrate.evaluate import latent_snr
from routers.calibrate.fit import first_moments
from routers.calibrate.gains import measure_gains
from routers.calibrate.record import Record, record
from routers.elastic import Elastic
from routers.planned.plan import Choice, Planner
from routers.planned.policy import PlannedPolicy
from routers.planned.prediction import WHOLE, Levels, Moments

BUDGETS = (0.35, 0.4, 0.45, 0.5, 0.6, 0.7)
TRIED = 8
"""Recorded samples that plans are tried on, as `edit calibrate` does."""


class TaylorPlanner(Planner):
    """Weights that continue the last two passes linearly in time, whatever the data."""

    def weights(
        self, branch: int, step: int, passes: tuple[int, ...], peers: tuple[int, ...] = ()
    ) -> NDArray[np.float64]:
        """[P]; where another branch's passes are at hand, the fitted weights."""
        if peers:
            return super().weights(branch, step, passes, peers)
        weights = np.zeros(len(passes))
        if len(passes) < 2:
            weights[0] = 1.0
        else:
            ahead = (step - passes[0]) / (passes[0] - passes[1])
            weights[:2] = 1 + ahead, -ahead
        return weights


class EvenPlanner(Planner):
    """Computed steps spread evenly, the fitted weights."""

    def best(self, passes: int, split: bool = False) -> Choice:
        """Evenly spread steps; where half ones are allowed, the search begins there."""
        if split:
            return super().best(passes, split)
        levels = even(self.num_steps, passes // WHOLE)
        return levels, self.error(levels)


class EvenTaylorPlanner(EvenPlanner, TaylorPlanner):
    """Computed steps spread evenly, linear extrapolation: what caches with a fixed interval do."""


@dataclass(frozen=True)
class Way:
    """One way of planning."""

    name: str
    planner: Callable[..., Planner]
    depth: int = 3
    gains: bool = True
    tried: bool = False
    """Follow the plans that came out best when run on some of the recorded samples."""


WAYS = (
    Way("even steps, linear extrapolation", EvenTaylorPlanner, 2),
    Way("even steps, fitted weights", EvenPlanner),
    Way("searched steps, linear extrapolation", TaylorPlanner, 2),
    Way("searched steps, fitted weights of 2 passes", Planner, 2),
    Way("searched steps, fitted weights of 3 passes", Planner),
    Way("searched steps, fitted weights of 4 passes", Planner, 4),
    Way("the same with 3 passes, every step equally important", Planner, 3, gains=False),
    Way("the best of several plans, tried on 8 recorded samples", Planner, tried=True),
)


def even(steps: int, count: int) -> Levels:
    """`count` of `steps` steps, the first one among them, evenly spread."""
    levels = np.zeros(steps, np.int8)
    levels[np.round(np.arange(count) * steps / count).astype(int)] = WHOLE
    return levels


def measured(
    elastic: Elastic, judge: PipelineWorkload, dense: list[Tensor], moments: Moments, way: Way
) -> list[tuple[float, float]]:
    """(mean latent SNR in dB, mean spent budget) of the judging samples at each of BUDGETS.

    dense: the judging samples' dense latents, by batch.
    """
    fitted = moments if way.gains else replace(moments, gain=np.ones_like(moments.gain))
    fitted = fitted if way.tried else replace(fitted, plans=None)
    planners = {(judge.num_steps, way.depth): way.planner(fitted.at(judge.num_steps), way.depth)}
    rows = []
    for budget in BUDGETS:
        snr: list[float] = []
        spent: list[float] = []
        for batch, truth in enumerate(dense):
            policy = PlannedPolicy(fitted, planners, depth=way.depth)
            with (
                torch.no_grad(),
                elastic.scope(policy=policy, num_steps=judge.num_steps, budget=budget) as trace,
            ):
                latents = judge.run(batch)
            snr += latent_snr(latents, truth)
            spent += trace.spent
        rows.append((float(np.mean(snr)), float(np.mean(spent))))
    return rows


class OneSamplePlanner(Planner):
    """Plans by one sample's own moments, with everybody's weights."""

    everybody: Planner

    def weights(
        self, branch: int, step: int, passes: tuple[int, ...], peers: tuple[int, ...] = ()
    ) -> NDArray[np.float64]:
        """[P]."""
        return self.everybody.weights(branch, step, passes, peers)


def oracle_steps(planner: Planner, recorded: Record, budget: float) -> float:
    """What the best steps for each row gain, in dB, over the best steps for all, by the rows' own moments."""
    count = WHOLE * round(budget * planner.num_steps)
    levels, _ = planner.best(count)
    gains = []
    for gram in recorded.gram:
        own = OneSamplePlanner(replace(planner.moments, gram=gram), planner.depth)
        own.everybody = planner
        shared = own.error(levels)
        gains.append(10 * np.log10(shared / min(own.best(count)[1], shared)))
    return float(np.mean(gains))


def oracle_weights(planner: Planner, recorded: Record, budget: float) -> float:
    """What each row's own best weights gain over the fitted ones, in dB, for predictions of one step."""
    levels, _ = planner.best(WHOLE * round(budget * planner.num_steps))
    gains = []
    for step in np.flatnonzero(levels == 0):
        passes = tuple(int(p) for p in np.flatnonzero(levels[:step])[::-1][: planner.depth])
        for gram in recorded.gram:
            own = Planner(replace(planner.moments, gram=gram), planner.depth)
            at = np.array([*passes, step])
            block = gram[np.ix_(at, at)]
            errors = []
            for maker in (planner, own):
                combination = np.append(maker.weights(0, int(step), passes), -1.0)
                errors.append(combination @ block @ combination)
            gains.append(10 * np.log10(errors[0] / errors[1]))
    return float(np.mean(gains))


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="qwen-image-tiny")
    parser.add_argument("--count", type=int, default=32, help="prompts, half of them for judging")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--probes", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    backbone = registry.resolve(args.model)
    pipe = loading.load(backbone, Placement())
    pipe.set_progress_bar_config(disable=True)
    prompts, defaults, half = read_prompts(COMMON)[: args.count], backbone.defaults, args.count // 2
    learn = PipelineWorkload(
        pipe, backbone, args.rows, defaults.steps, defaults.guidance, prompts[:half], defaults.width,
        defaults.height, seed=args.seed,
    )  # fmt: skip
    judge = replace(learn, prompts=prompts[half:], seed=args.seed + 10_000)
    elastic = Elastic(pipe.transformer, backbone.family.transformer)
    try:
        recorded, held_out = record(elastic, learn), record(elastic, judge)
        moments = first_moments(recorded, learn.branches, learn.guidance)
        moments = replace(moments, gain=measure_gains(elastic, learn, recorded, moments, args.probes))
        moments = replace(moments, plans=choose_plans(elastic, learn, recorded, moments, TRIED, min(BUDGETS)))
        with torch.no_grad():
            dense = [judge.run(batch) for batch in range(judge.num_batches)]
        table = {way.name: measured(elastic, judge, dense, moments, way) for way in WAYS}
    finally:
        elastic.detach()
    planner = Planner(replace(moments, plans=None))
    bounds = {
        "own steps per sample": [oracle_steps(planner, held_out, b) for b in BUDGETS],
        "own weights per sample": [oracle_weights(planner, held_out, b) for b in BUDGETS],
    }
    show(table, bounds, args, backbone.name)


def show(
    table: dict[str, list[tuple[float, float]]], bounds: dict[str, list[float]], args: Any, model: str
) -> None:
    """Both tables, as text or markdown, and one JSON line."""
    print(f"{model}, {args.count} prompts, half of them held out; {platform.machine()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")  # fmt: skip
    head = ["way", *(f"budget {b:g}" for b in BUDGETS)]
    lines = [head] + [[n, *(f"{db:.1f} dB" for db, _ in row)] for n, row in table.items()]
    lines += [[""] * len(head)] if not args.markdown else []
    more = [[f"most that {n} could gain", *(f"{db:.2f} dB" for db in row)] for n, row in bounds.items()]
    if args.markdown:
        for block in (lines, [head, *more]):
            print(
                "\n".join(
                    "| " + " | ".join(line) + " |" for line in [block[0], ["---"] * len(head), *block[1:]]
                )
                + "\n"
            )
    else:
        width = max(len(line[0]) for line in [*lines, *more])
        for line in [*lines, *more]:
            print(f"{line[0]:{width}}  " + "  ".join(f"{cell:>10}" for cell in line[1:]))
    print(json.dumps({"model": model, "measured_db": table, "bounds_db": bounds}))


if __name__ == "__main__":
    main()

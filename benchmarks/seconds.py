"""Spent against asked seconds: runs of `--time` on the packaged models, on an idle machine.

    python -m benchmarks.seconds                                 # 20 runs of each packaged model
    python -m benchmarks.seconds flux-tiny --runs 3 --share 0.4

A dense run is timed first, and each run then gets a share of its seconds. Told are the seconds spent over
those asked, how many runs were within 5 % and how many late, and what one evaluation is of the asked: nothing
finer can be planned. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from typing import Any

from edit_cli.generation.result import StageClock
from edit_cli.generation.routers import settle
from edit_cli.generation.samples import medium_of, sample_plan, take
from edit_cli.generation.session import Session
from edit_cli.request import Request

MODELS = ("qwen-image-tiny", "flux-tiny", "hunyuan3d-tiny")
NEAR = 0.05


def measure(model: str, runs: int, share: float) -> dict[str, Any]:
    """Runs of one model, each of another sample. share: of the dense run's seconds that each is given."""
    request = Request({"model": model})
    planned = sample_plan(request, medium_of(request))
    planned = replace(planned, jobs=take(planned.jobs, runs + 2, seed=0))
    plan, source = settle(replace(planned, jobs=tuple(replace(job, budget=1.0) for job in planned.jobs)))
    session = Session.open(plan, source, StageClock(plan.medium.stages))
    session.attach()
    warm, timed, *jobs = plan.jobs
    session.run([warm])
    start = time.perf_counter()
    session.run([timed])
    asked = share * (time.perf_counter() - start)
    ratios, budgets = [], []
    for job in jobs:
        given = [replace(job, time=asked)]
        session.probe(given)
        trace = session.run(given).trace
        ratios.append(trace.took / asked)
        budgets.append(trace.share)
    each = statistics.median(session.elastic.pace.known[session._size([jobs[-1]])].each)
    session.detach()
    return {
        "asked": round(asked, 4),
        "spent": [round(ratio, 4) for ratio in ratios],
        "near": sum(abs(ratio - 1) <= NEAR for ratio in ratios),
        "late": sum(ratio > 1 for ratio in ratios),
        "evaluation": round(each / asked, 4),
        "budget": round(statistics.fmean(budgets), 4),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.6, help="of the dense run's seconds")
    given = parser.parse_args(arguments)
    rows = {model: measure(model, given.runs, given.share) for model in given.models}
    print("| model | asked | spent / asked, mean (range) | within 5 % | late | one evaluation | came to |")
    print("|---|---|---|---|---|---|---|")
    for model, row in rows.items():
        spent, runs = row["spent"], len(row["spent"])
        span = f"{statistics.fmean(spent):.3f} ({min(spent):.3f} to {max(spent):.3f})"
        print(
            f"| {model} | {row['asked']:.2f} s | {span} | {row['near']} of {runs} | {row['late']} | "
            f"{row['evaluation']:.1%} of the asked | {row['budget']:.2f} |"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

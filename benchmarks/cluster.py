"""How a list of prompts spreads over workers: a simulation from times that were measured here.

    python -m benchmarks.cluster                               # measures batches of the packaged model first
    python -m benchmarks.cluster --prompts 10000000 --workers 1 10 100 1000 --budget 0.5

Each worker loads the model, then takes the next batch that nobody has, as `edit_cli/generation/scale/`
does; how long a batch takes is drawn from the measured ones. Some workers are slow for good (stragglers),
and any may be lost: it starts again, loads, and its batch goes back to the others. Nothing of the network
and of the disks is in it, so it tells what taking turns and losing workers costs, and no more. Printed for
each number of workers: hours, throughput as a multiple of one worker that never fails, share of the
workers' time that went into results that were kept, batches made again, and the seconds from the first
worker that found nothing left to the last that had finished.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from edit_cli.generation.loop import open_session
from edit_cli.generation.picture import PICTURE
from edit_cli.generation.plan import make_plan
from edit_cli.generation.result import Result, StageClock
from edit_cli.request import Request

HOUR = 3600.0
PROMPTS = ("a cat", "a dog", "a red car", "a house", "two apples", "a tree", "a key", "a table")


@dataclass(frozen=True)
class Measured:
    """Seconds: to load the model, and of batches."""

    load: float
    batches: tuple[float, ...]


@dataclass(frozen=True)
class Cluster:
    """failures: losses of one worker per hour. stragglers: share of slow workers, so many times slower."""

    workers: int
    failures: float
    stragglers: float
    slowdown: float


@dataclass(frozen=True)
class Outcome:
    """What a run came to; see the module."""

    workers: int
    hours: float
    speedup: float
    useful: float
    made_again: int
    tail: float


def measure(budget: float, batch: int, repeats: int) -> Measured:
    """Times of the packaged picture model on this machine."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(batch)]
    plan = make_plan(Request({"prompt": prompts, "budget": budget, "batch_size": batch}), PICTURE, kept=False)
    start = time.perf_counter()
    session = open_session(Result(plan), StageClock(plan.medium.stages))
    load, seconds = time.perf_counter() - start, []
    session.run(plan.jobs)  # the first one is slower
    for _ in range(repeats):
        start = time.perf_counter()
        session.run(plan.jobs)
        seconds.append(time.perf_counter() - start)
    session.detach()
    return Measured(load, tuple(seconds))


def simulate(cluster: Cluster, batches: int, measured: Measured, seed: int = 0) -> Outcome:
    """Event by event: the worker that is free first takes the next batch."""
    draw = random.Random(seed)
    slow = [cluster.slowdown if draw.random() < cluster.stragglers else 1.0 for _ in range(cluster.workers)]
    lost = [_time_to_failure(draw, cluster.failures) for _ in slow]
    free = [(measured.load * factor, worker) for worker, factor in enumerate(slow)]
    heapq.heapify(free)
    left, made_again, useful, idle_from, end = batches, 0, 0.0, 0.0, 0.0
    back: list[float] = []  # when batches of lost workers are known to be open again
    while left or back:
        now, worker = heapq.heappop(free)
        if not left and back[0] > now:  # nothing to do yet: waits for what may come back
            heapq.heappush(free, (back[0], worker))
            continue
        if back and back[0] <= now:
            heapq.heappop(back)
        else:
            left -= 1
        takes = draw.choice(measured.batches) * slow[worker]
        if now + takes > lost[worker]:
            made_again += 1
            heapq.heappush(back, lost[worker])
            now = max(now, lost[worker]) + measured.load * slow[worker]
            lost[worker] = now + _time_to_failure(draw, cluster.failures)
        else:
            useful, now = useful + takes, now + takes
            end = max(end, now)
        heapq.heappush(free, (now, worker))
    idle_from = min(end, min(now for now, _ in free))
    alone = measured.load + batches * sum(measured.batches) / len(measured.batches)
    return Outcome(
        cluster.workers,
        end / HOUR,
        alone / end,
        useful / (end * cluster.workers),
        made_again,
        end - idle_from,
    )


def _time_to_failure(draw: random.Random, rate: float) -> float:
    return draw.expovariate(rate) * HOUR if rate else float("inf")


def table(outcomes: Sequence[Outcome]) -> str:
    """For people."""
    lines = [
        "| workers | hours | throughput | useful time | made again | tail, s |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {each.workers} | {each.hours:.1f} | {each.speedup:.1f} x | {each.useful:.1%} | {each.made_again} "
        f"| {each.tail:.1f} |"
        for each in outcomes
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, simulate, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--batch", type=int, default=8, help="prompts of a batch")
    parser.add_argument("--repeats", type=int, default=8, help="batches to measure")
    parser.add_argument("--failures", type=float, default=0.02, help="losses of one worker per hour")
    parser.add_argument("--stragglers", type=float, default=0.02, help="share of slow workers")
    parser.add_argument("--slowdown", type=float, default=3.0, help="by how much they are slower")
    args = parser.parse_args()
    measured = measure(args.budget, args.batch, args.repeats)
    batches = -(-args.prompts // args.batch)
    clusters = [Cluster(n, args.failures, args.stragglers, args.slowdown) for n in args.workers]
    outcomes = [simulate(cluster, batches, measured) for cluster in clusters]
    print(table(outcomes))
    print(json.dumps({"measured": asdict(measured), "outcomes": [asdict(each) for each in outcomes]}))


if __name__ == "__main__":
    main()

"""Where the time of a batch goes whose samples decide differently: blocks, or elastic execution itself.

    python -m benchmarks.split               # qwen-image-tiny, batch 8, mixes of benchmarks.overhead
    python -m benchmarks.split --markdown    # the tables of docs/speed.md

Three parts make up a denoising run: the forwards of its blocks, what surrounds them in the dense model too
(embedding, output layers, scheduler, guidance), and the rest: what elastic execution does itself. Runs take
turns, and each is split with its own clock; figures are medians over rounds, as shares of the dense run. A
second table times the dense model on fewer prompts: what a block call costs that few of the samples need.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from backbones import qwen_image
from benchmarks.overhead import DEVIATION, forced_policy
from benchmarks.overhead_models import (
    FULL_SIZE,
    QUICK,
    Size,
    packaged_denoising,
    random_denoising,
    routers_for,
    twin,
)
from benchmarks.pareto_report import markdown
from routers.elastic import Elastic

BATCH, BUDGET = 8, 0.6
SPLIT_HEAD = ("run", "FLOPs", "time", "block calls", "in blocks", "around them", "elastic's own")
ROWS_HEAD = ("prompts", "share of the batch", "time")


class BlockClock:
    """Adds up the seconds in the forwards that it has wrapped."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            output = forward(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return output

        return timed

    def take(self) -> tuple[float, int]:
        """Seconds and calls since the last take."""
        taken, self.seconds, self.calls = (self.seconds, self.calls), 0.0, 0
        return taken


@dataclass(frozen=True)
class Took:
    """One run. seconds: all of it; blocks: inside of block forwards; calls: of them."""

    seconds: float
    blocks: float
    calls: int


def measure_split(size: Size, rounds: int) -> list[tuple[str, ...]]:
    """Rows of the first table, the dense run first."""
    quick = size is not FULL_SIZE
    denoising, _ = random_denoising(size, BATCH) if quick else packaged_denoising(size, BATCH)
    dense, steps, clock = denoising.pipe.transformer, size.pipeline_steps, BlockClock()
    elastics = {
        name: Elastic(twin(dense), qwen_image.TRANSFORMER, routers=routers_for(dense), budget=BUDGET)
        for name in ("forced mix", "independent mix")
    }
    policies: dict[str, Any] = {
        name: forced_policy(elastics[name], denoising, BUDGET, steps, BATCH, deviation)
        for name, deviation in (("forced mix", DEVIATION), ("independent mix", 1.0))
    }
    for elastic in elastics.values():
        for block in elastic.blocks:
            block.run = clock.around(block.run)  # type: ignore[method-assign]
    for module in dense.transformer_blocks:
        module.forward = clock.around(module.forward)

    def run(name: str) -> Took:
        start = time.perf_counter()
        if name == "dense":
            denoising(dense)
        else:
            with elastics[name].scope(policy=policies[name], num_steps=steps):
                denoising(elastics[name].transformer)
        return Took(time.perf_counter() - start, *clock.take())

    took = take_turns({name: lambda name=name: run(name) for name in ("dense", *elastics)}, rounds)
    whole = median(took["dense"], "seconds")
    around = whole - median(took["dense"], "blocks")
    lines = []
    for name, runs in took.items():
        seconds, blocks = median(runs, "seconds"), median(runs, "blocks")
        own = [run.seconds - run.blocks - around for run in runs]
        trace = elastics[name].trace if name in elastics else None
        shares = (seconds, runs[0].calls, blocks, around, statistics.median(own) if trace else 0.0)
        spent = statistics.fmean(trace.spent) if trace else 1.0
        cells = [str(s) if isinstance(s, int) else f"{s / whole:.3f}" for s in shares]
        lines.append((name, f"{spent:.3f}", *cells))
    return lines


def measure_rows(size: Size, rounds: int) -> list[tuple[str, ...]]:
    """Rows of the second table: the dense model on fewer prompts, in shares of the time for all."""
    make = packaged_denoising if size is FULL_SIZE else random_denoising
    loops = {count: make(size, count)[0] for count in (*range(1, BATCH), BATCH)}
    dense = loops[BATCH].pipe.transformer

    def run(count: int) -> Took:
        start = time.perf_counter()
        loops[count](dense)
        return Took(time.perf_counter() - start, 0.0, 0)

    took = take_turns({count: lambda count=count: run(count) for count in loops}, rounds)
    whole = median(took[BATCH], "seconds")
    return [
        (str(count), f"{count / BATCH:.3f}", f"{median(runs, 'seconds') / whole:.3f}")
        for count, runs in took.items()
    ]


def take_turns(variants: dict[Any, Callable[[], Took]], rounds: int) -> dict[Any, list[Took]]:
    """Every variant once a round, in rotating order; the first round is not kept."""
    took: dict[Any, list[Took]] = defaultdict(list, {name: [] for name in variants})
    names = list(variants)
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                result = variants[name]()
                if turn:
                    took[name].append(result)
    return dict(took)


def median(runs: list[Took], field: str) -> float:
    """Median of one field over rounds."""
    return statistics.median(getattr(run, field) for run in runs)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.split",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows only that it runs")
    parser.add_argument("--rounds", type=int, help="timed rounds (7)")
    parser.add_argument("--markdown", action="store_true", help="print the docs tables")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; allowed is 1 or more")
    size = QUICK if options.quick else FULL_SIZE
    rounds = options.rounds or size.pipeline_rounds
    for head, rows in (
        (SPLIT_HEAD, measure_split(size, rounds)),
        (ROWS_HEAD, measure_rows(size, rounds)),
    ):
        if options.markdown:
            print(markdown(head, rows), end="\n\n")
            continue
        table = Table(*head, box=None, header_style="bold")
        for row in rows:
            table.add_row(*row)
        Console(width=120, highlight=False).print(table, "")
    return 0


if __name__ == "__main__":
    sys.exit(main())

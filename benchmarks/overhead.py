"""What elastic execution costs beside what it saves: time ratios to the dense model, and host reads.

    python -m benchmarks.overhead              # a table, then one JSON line
    python -m benchmarks.overhead --markdown   # the table of docs/speed.md

Dense is a copy of the transformer on the same weights that was never attached. Ratios are medians over
interleaved runs. `--quick` shrinks everything to seconds: it shows that the benchmark runs, not how fast.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backbones import qwen_image
from benchmarks.mixes import FAMILIES, CostReader, forced_mix, mixed_rows
from benchmarks.overhead_models import (
    FULL_SIZE,
    QUICK,
    Denoising,
    Size,
    block_inputs,
    fast_dtype,
    packaged_denoising,
    qwen_transformer,
    random_denoising,
    routers_for,
    twin,
)
from benchmarks.reads import count_reads
from benchmarks.timing import Run, interleaved, typical
from routers.attachment import attach
from routers.elastic import Elastic
from routers.planned.grid import OnGrid
from routers.planned.sampled import Sampled
from routers.policy import CallInfo, FixedPolicy, OpenPolicy, Policy

BUDGETS = (0.4, 0.6, 0.8)
SLACK = 0.03
"""A forced mix may take this much more of the dense time than of the dense FLOPs."""
NARROWEST = "every MLP at 1/4"
"""The least that widths alone can spend."""
DEVIATION = 0.2
"""How far samples of a batch stray from a common plan in the forced mix that has a bar."""
OPEN_BAR, TINY_BAR, READS_BAR = 1.01, 0.70, 1.0
HOST_BARS = {1: 1.04, 4: 1.08}
"""Of the CPU time of a call that computes everything, by its rows."""


class ReadingOpenPolicy(OpenPolicy):
    """All gates open; the routers run, are read once per call, and passes are cached for reuse."""

    cache_depth, reads_routers = 2, True


@dataclass(frozen=True)
class Row:
    """One measured line. ratio: elastic/dense time (of section host: CPU time), or host reads per call.

    bar: the most it should be.
    """

    section: str
    what: str
    budget: float | None
    spent: float | None
    seconds: float | None
    dense_seconds: float | None
    ratio: float
    bar: float | None

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        return None if self.bar is None else self.ratio <= self.bar


# -- (a) real block sizes ----------------------------------------------------------------------


def measure_blocks(size: Size) -> list[Row]:
    """Random weights at Qwen-Image's block size: every family of mixes, and everything open with routers."""
    dtype = fast_dtype() if size is FULL_SIZE else torch.float32
    dense = qwen_transformer(size, dtype)
    elastics = {"open": Elastic(twin(dense), qwen_image.TRANSFORMER, routers=routers_for(dense), budget=1.0)}
    calls = list(block_inputs(size, dtype))
    costs = read_costs(elastics["open"], lambda model: model(**calls[0]))
    policies: dict[str, Policy] = {"open": ReadingOpenPolicy()}
    asked: dict[str, float | None] = {"open": None, NARROWEST: None}
    bars: dict[str, float | None] = {"open": OPEN_BAR, NARROWEST: None}
    elastics[NARROWEST] = Elastic(twin(dense), qwen_image.TRANSFORMER)
    policies[NARROWEST] = FixedPolicy(np.zeros(size.blocks, np.int8))
    for family in FAMILIES:
        for budget in BUDGETS:
            name = f"{family} {budget:g}"
            elastics[name] = Elastic(twin(dense), qwen_image.TRANSFORMER, budget=budget)
            policies[name] = FixedPolicy(forced_mix(family, costs, budget, size.steps))
            asked[name], bars[name] = budget, budget + SLACK

    def run_dense() -> Iterator[None]:
        for inputs in calls:
            dense(**inputs)
            yield

    def run_elastic(name: str) -> Run:
        def run() -> Iterator[None]:
            with elastics[name].scope(policy=policies[name], num_steps=size.steps):
                for inputs in calls:
                    elastics[name].transformer(**inputs)
                    yield

        return run

    runs: dict[str, Run] = {"dense": run_dense, **{name: run_elastic(name) for name in elastics}}
    with torch.no_grad():
        seconds = interleaved(runs, size.rounds)
    section = f"blocks, dim {size.heads * size.head_dim}, {size.side**2}+{size.text} tokens, {str(dtype)[6:]}"
    return [
        ratio_row(section, name, asked[name], elastic, seconds[name], seconds["dense"], bars[name])
        for name, elastic in elastics.items()
    ]


# -- (b) the packaged model, end to end --------------------------------------------------------


def measure_pipeline(size: Size, batch: int, bar: float | None) -> list[Row]:
    """`qwen-image-tiny` at budget 0.6: a forced mix of its own for every sample, and a plan."""
    denoising, name = packaged_denoising(size, batch) if size is FULL_SIZE else random_denoising(size, batch)
    dense = denoising.pipe.transformer
    steps, budget = size.pipeline_steps, 0.6
    elastics: dict[str, Elastic | Sampled | OnGrid] = {}
    policies: dict[str, Policy | None] = {}
    for what, deviation in (("forced mix", DEVIATION), ("independent mix", 1.0)):
        elastic = Elastic(twin(dense), qwen_image.TRANSFORMER, routers=routers_for(dense), budget=budget)
        elastics[what] = elastic
        policies[what] = forced_policy(elastic, denoising, budget, steps, batch, deviation)

    def run(elastic: Elastic | None, policy: Policy | None = None) -> Run:
        def once() -> Iterator[None]:
            with ExitStack() as stack:
                if elastic is not None:
                    stack.enter_context(elastic.scope(policy=policy, num_steps=steps))
                denoising(dense if elastic is None else elastic.transformer)
            yield

        return once

    def run_plan() -> Iterator[None]:
        denoising.pipe.transformer = dense
        elastics["plan"] = plan = attach(denoising.pipe, budget=budget)
        denoising(dense)
        plan.detach()
        yield

    runs = {"dense": run(None), **{what: run(elastics[what], policies[what]) for what in elastics}}
    runs["plan"] = run_plan
    seconds = interleaved(runs, size.pipeline_rounds)
    section = f"{name}, denoising, batch {batch}"
    return [
        ratio_row(
            section,
            what,
            budget,
            elastic,
            seconds[what],
            seconds["dense"],
            None if "independent" in what else bar,
        )
        for what, elastic in elastics.items()
    ]


def forced_policy(
    elastic: Elastic, denoising: Denoising, budget: float, steps: int, batch: int, deviation: float
) -> FixedPolicy:
    """A plan of its own for every sample; the routers run and are read all the same."""
    policy = FixedPolicy(mixed_rows(read_costs(elastic, denoising), budget, steps, batch, deviation))
    policy.reads_routers = True
    return policy


# -- (c) host reads ----------------------------------------------------------------------------


def measure_reads(size: Size) -> list[Row]:
    """Device-to-host reads per transformer call that elastic execution adds to the dense model's own."""
    batch = 4
    quick = size is not FULL_SIZE
    denoising, name = random_denoising(size, batch) if quick else packaged_denoising(size, batch)
    dense = denoising.pipe.transformer
    elastic = Elastic(dense, qwen_image.TRANSFORMER, routers=routers_for(dense), budget=0.6)
    policy = forced_policy(elastic, denoising, 0.6, size.pipeline_steps, batch, DEVIATION)
    with elastic.scope(policy=OpenPolicy()) as trace:
        base = count_reads(denoising, dense)
    calls = trace.num_calls
    with elastic.scope(num_steps=size.pipeline_steps, policy=policy) as trace:
        reads = count_reads(denoising, dense)
    elastic.detach()
    ratio, what = (reads - base + trace.host_syncs) / calls, f"{name}, forced mix"
    return [Row("host reads per call", what, 0.6, mean(trace.spent), None, None, ratio, READS_BAR)]


# -- (d) host time -----------------------------------------------------------------------------


class KeepingPolicy(OpenPolicy):
    """All gates open, and passes are cached for reuse: what a decision to compute everything costs."""

    cache_depth = 2


def measure_host(size: Size) -> list[Row]:
    """CPU time of a computed call of 60 blocks with next to nothing in them, in turn with the dense call's.

    What the process spends, not the clock: other work on the machine counts for little. On a GPU this is
    what stands before the queue.
    """
    few = replace(size, heads=2, head_dim=16, text_dim=32, rope=(4, 6, 6), side=4, text=8)
    few = replace(few, blocks=60 if size is FULL_SIZE else size.blocks)
    rows, torch_threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # the time of one thread is measured
    policies = {"decided": KeepingPolicy, "decided, routers read": ReadingOpenPolicy}
    for batch, bar in HOST_BARS.items():
        dense = qwen_transformer(few, torch.float32)
        elastic = Elastic(twin(dense), qwen_image.TRANSFORMER, routers=routers_for(dense))
        inputs = {
            name: _repeated(value, batch) for name, value in next(block_inputs(few, torch.float32)).items()
        }
        for what, policy in policies.items():
            taken: list[list[float]] = [[], []]
            calls = 4 * size.pipeline_rounds
            with torch.no_grad(), elastic.scope(policy=policy(), num_steps=calls + 2):
                for number in range(calls + 2):
                    for times, model in zip(taken, (dense, elastic.transformer), strict=True):
                        start = time.thread_time()
                        model(**inputs)
                        if number > 1:  # the cache is full
                            times.append(time.thread_time() - start)
            section = f"host, {few.blocks} blocks, {batch} rows"
            usual, took = (float(np.quantile(times, 0.25)) for times in taken)  # caches shared with others
            rows.append(Row(section, what, None, 1.0, took, usual, took / usual, bar))
    torch.set_num_threads(torch_threads)
    return rows


def _repeated(value: Any, rows: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[:1].repeat(rows, *(1 for _ in value.shape[1:]))
    return value[:1] * rows if isinstance(value, list) else value


# -- shared ------------------------------------------------------------------------------------


def read_costs(elastic: Elastic, call: Callable[[Any], Any]) -> CallInfo:
    """What one call costs, seen by a policy that skips everything; also warms the elastic's cost table."""
    reader = CostReader()
    with torch.no_grad(), elastic.scope(policy=reader):
        call(elastic.transformer)
    assert reader.call is not None
    return reader.call


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return statistics.fmean(values)


def ratio_row(
    section: str,
    what: str,
    budget: float | None,
    elastic: Elastic | Sampled | OnGrid,
    seconds: NDArray[np.float64],
    dense: NDArray[np.float64],
    bar: float | None,
) -> Row:
    """A line from the timings of one variant and of the dense model; `elastic` has just been run."""
    assert elastic.trace is not None
    spent = mean(elastic.trace.spent)
    took, dense_took = typical(seconds), typical(dense)
    return Row(section, what, budget, spent, took, dense_took, took / dense_took, bar)


def cells(row: Row) -> list[str]:
    """A row as text."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    verdict = {True: "yes", False: "no", None: ""}[row.met]
    bar = "" if row.bar is None else f"<= {row.bar:.2f}"
    return [
        row.section, row.what, "" if row.budget is None else f"{row.budget:g}", number(row.spent, 3),
        number(row.dense_seconds, 2), number(row.seconds, 2), number(row.ratio, 3), bar, verdict,
    ]  # fmt: skip


HEADERS = ("what", "decisions", "budget", "FLOPs spent", "dense s", "elastic s", "ratio", "bar", "met")


def print_table(rows: list[Row]) -> None:
    """A rich table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=None, header_style="bold", title="time of elastic / time of dense (host reads: per call)"
    )
    for header in HEADERS:
        table.add_column(header, justify="left" if header in ("what", "decisions") else "right")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=140, highlight=False).print(table)


def print_markdown(rows: list[Row]) -> None:
    """The table for docs/speed.md on stdout."""
    print("| " + " | ".join(HEADERS) + " |")
    print("|" + "---|" * len(HEADERS))
    for row in rows:
        print("| " + " | ".join(cells(row)) + " |")


SECTIONS = ("blocks", "batch1", "batch8", "reads", "host")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and with --check return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows only that it runs")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="measure this part (repeatable)")
    parser.add_argument("--rounds", type=int, help="timed rounds; default 5, and 7 for the pipeline")
    parser.add_argument("--threads", type=int, help="PyTorch threads; default: PyTorch's own choice")
    parser.add_argument(
        "--markdown", action="store_true", help="print the docs table instead of table and JSON"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 if a bar is missed")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    size = QUICK if options.quick else FULL_SIZE
    if options.rounds:
        for name in ("rounds", "pipeline_rounds"):
            object.__setattr__(size, name, options.rounds)
    parts: dict[str, Callable[[], list[Row]]] = {
        "blocks": lambda: measure_blocks(size),
        "batch1": lambda: measure_pipeline(size, 1, None),
        "batch8": lambda: measure_pipeline(size, 8, TINY_BAR),
        "reads": lambda: measure_reads(size),
        "host": lambda: measure_host(size),
    }
    rows = [row for name in options.only or SECTIONS for row in parts[name]()]
    if options.markdown:
        print_markdown(rows)
    else:
        print_table(rows)
        print(
            json.dumps(
                {"benchmark": "overhead", "machine": machine(), "rows": [with_verdict(r) for r in rows]}
            )
        )
    return int(options.check and any(row.met is False for row in rows))


def with_verdict(row: Row) -> dict[str, Any]:
    """A row for the JSON line."""
    return {**asdict(row), "met": row.met}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(main())

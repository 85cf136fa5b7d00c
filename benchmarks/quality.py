"""How far from the dense picture each way of saving FLOPs ends, at equal FLOPs.

    python -m benchmarks.quality                       # qwen-image-tiny, its packaged bundle
    python -m benchmarks.quality --markdown            # the table of docs/quality.md
    python -m benchmarks.quality --methods elastic     # after a new calibration: rivals stay as they were
    python -m benchmarks.quality -m FOLDER --routers BUNDLE --budgets 0.4 0.6

Every method generates the same prompts from the same noise as the dense model. Reported: PSNR and SSIM
of the pictures to the dense ones (mean and bootstrap 95 % interval over prompts x seeds), the FLOPs ratio
that the trace counted, and how often an independent classifier has the asked concept in its top 5.

Methods: `elastic` the bundle; `elastic, no bundle` the plan that needs nothing measured; `fewer steps` the
dense model with round(budget x steps) steps; `random skip` random blocks of random steps skipped outright;
`random reuse` the same cells reused with linear extrapolation; `whole-step reuse` all blocks reused on evenly
spread steps.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import routers
from backbones import loading, registry
from backbones.spec import Backbone, Placement
from backbones.workloads import PipelineWorkload
from benchmarks import scores
from benchmarks.mixes import CostReader, forced_mix, whole_steps
from routers.elastic import Elastic
from routers.policy import CallInfo, FixedPolicy, Policy
from routers.trace import Actions

BUDGETS = (0.35, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Row:
    """One method at one budget. psnr, ssim: means; low, high: 95 % interval of the mean PSNR in dB."""

    method: str
    budget: float
    spent: float
    psnr: float
    low: float
    high: float
    ssim: float
    top5: float | None


@dataclass
class Bench:
    """A loaded model, its requests, and the dense pictures to compare with."""

    backbone: Backbone
    workload: PipelineWorkload
    bundle: routers.Bundle | None
    dense: list[Image.Image]
    call: CallInfo

    def pictures(self, num_steps: int | None = None) -> list[Image.Image]:
        """Every request of the workload, decoded."""
        batches = range(self.workload.num_batches)
        return [p for b in batches for p in self.workload.run(b, num_steps=num_steps, output_type="pil")]


def open_bench(args: argparse.Namespace) -> Bench:
    """Load the model and generate the dense pictures."""
    backbone = registry.resolve(args.model)
    path = args.routers or backbone.bundle
    pipe = loading.load(backbone, Placement())
    pipe.set_progress_bar_config(disable=True)
    prompts = scores.read_prompts(args.prompts)[: args.count]
    defaults = backbone.defaults
    workload = PipelineWorkload(
        pipe, backbone, args.rows, args.steps or defaults.steps, defaults.guidance, prompts * args.seeds,
        defaults.width, defaults.height, seed=args.seed,
    )  # fmt: skip
    reader = CostReader()
    with _attached(pipe, backbone, reader, workload.num_steps):
        workload.run(0, num_steps=1)
    assert reader.call is not None
    bundle = None if path is None else routers.load_bundle(path)
    bench = Bench(backbone, workload, bundle, [], reader.call)
    bench.dense = bench.pictures()
    return bench


@contextmanager
def _attached(pipe: Any, backbone: Backbone, policy: Policy, steps: int) -> Iterator[Any]:
    elastic = Elastic(pipe.transformer, backbone.family.transformer)
    try:
        with elastic.scope(policy=policy, num_steps=steps) as trace:
            yield trace
    finally:
        elastic.detach()


def elastic_run(bench: Bench, budget: float) -> tuple[list[Image.Image], float]:
    """Pictures and mean spent budget with the bundle. Raises SystemExit where there is none."""
    if bench.bundle is None:
        raise SystemExit(
            f"{bench.backbone.name} has no bundle; give one with --routers, or leave elastic out"
        )
    return attached_run(bench, bench.bundle, budget)


def universal_run(bench: Bench, budget: float) -> tuple[list[Image.Image], float]:
    """The same without a bundle."""
    return attached_run(bench, None, budget)


def attached_run(
    bench: Bench, bundle: routers.Bundle | None, budget: float
) -> tuple[list[Image.Image], float]:
    """Pictures and mean spent budget."""
    workload = bench.workload
    elastic = routers.attach(workload.pipe, bundle, budget=budget, num_steps=workload.num_steps)
    pictures, spent = [], []
    try:
        for batch in range(bench.workload.num_batches):
            with elastic.scope(samples=workload.rows) as trace:
                pictures += bench.workload.run(batch, output_type="pil")
            spent += trace.spent
    finally:
        elastic.detach()
    return pictures, float(np.mean(spent))


def planned_run(bench: Bench, plan: Actions) -> tuple[list[Image.Image], float]:
    """Pictures and mean spent budget of a fixed plan [T, N]."""
    pictures, spent = [], []
    for batch in range(bench.workload.num_batches):
        pipe, steps = bench.workload.pipe, bench.workload.num_steps
        with _attached(pipe, bench.backbone, FixedPolicy(plan, order=1), steps) as trace:
            pictures += bench.workload.run(batch, output_type="pil")
        spent += trace.spent
    return pictures, float(np.mean(spent))


def fewer_steps(bench: Bench, budget: float) -> tuple[list[Image.Image], float]:
    """The dense model with fewer steps."""
    steps = max(1, round(budget * bench.workload.num_steps))
    return bench.pictures(steps), steps / bench.workload.num_steps


def forced_run(family: str, bench: Bench, budget: float) -> tuple[list[Image.Image], float]:
    """Random blocks at random steps are skipped, or reused."""
    return planned_run(bench, forced_mix(family, bench.call, budget, bench.workload.num_steps))


def reuse_run(bench: Bench, budget: float) -> tuple[list[Image.Image], float]:
    """Evenly spread steps are reused whole."""
    return planned_run(bench, whole_steps(bench.call, budget, bench.workload.num_steps))


Method = Callable[[Bench, float], tuple[list[Image.Image], float]]
METHODS: dict[str, Method] = {
    "elastic": elastic_run,
    "elastic, no bundle": universal_run,
    "fewer steps": fewer_steps,
    "whole-step reuse": reuse_run,
    "random reuse": partial(forced_run, "reuse"),
    "random skip": partial(forced_run, "skip"),
}


def measure(bench: Bench, budgets: list[float], methods: dict[str, Method]) -> Iterator[Row]:
    """Every method at every budget."""
    for budget in budgets:
        for name, run in methods.items():
            yield judge(bench, name, budget, *run(bench, budget))


def judge(bench: Bench, method: str, budget: float, pictures: list[Image.Image], spent: float) -> Row:
    """Compare with the dense pictures."""
    db, similar = scores.likeness(pictures, bench.dense)
    mean, low, high = scores.mean_interval(db)
    similarity = float(similar.mean())
    row = Row(method, budget, spent, mean, low, high, similarity, top5(bench, pictures))
    print(f"{row.method:22s} {budget:.2f} spent {spent:.3f}  {row.psnr:6.2f} dB [{low:.2f}, {high:.2f}]  "
          f"SSIM {similarity:.4f}  top-5 {row.top5}", flush=True)  # fmt: skip
    return row


def top5(bench: Bench, pictures: list[Image.Image]) -> float | None:
    """Share of pictures with the asked concept in the packaged classifier's top 5; None for other prompts."""
    prompts = bench.workload.prompts
    hits = scores.accuracy(pictures, [prompts[i % len(prompts)] for i in range(len(pictures))])
    return None if hits is None else float(hits[1].mean())


def markdown(rows: list[Row], bench: Bench) -> str:
    """The table of docs/quality.md."""
    lines = [
        "| budget | method | FLOPs spent | PSNR to dense, dB (95 % interval) | SSIM | top-5 |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy = "" if row.top5 is None else f"{100 * row.top5:.1f} %"
        lines.append(
            f"| {row.budget:g} | {row.method} | {row.spent:.3f} | {row.psnr:.2f} ({row.low:.2f} to "
            f"{row.high:.2f}) | {row.ssim:.4f} | {accuracy} |"
        )
    dense = top5(bench, bench.dense)
    if dense is not None:
        lines.append(f"\nDense top-5: {100 * dense:.1f} %.")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print the table and one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default=registry.DEFAULT_MODELS["picture"])
    parser.add_argument("--routers", type=Path)
    parser.add_argument("--prompts", type=Path, default=scores.COMMON)
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--seeds", type=int, default=2, help="pictures per prompt")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=8, help="batch size")
    parser.add_argument("--steps", type=int, help="denoising steps, default the model's")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="these alone")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    with torch.no_grad():
        bench = open_bench(args)
        chosen = {name: METHODS[name] for name in args.methods or METHODS}
        rows = list(measure(bench, args.budgets, chosen))
    if args.markdown:
        print(markdown(rows, bench))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    info = {"model": bench.backbone.name, "machine": machine,
            "prompts": args.count, "seeds": args.seeds, "rows": [asdict(row) for row in rows]}  # fmt: skip
    print(json.dumps(info))


if __name__ == "__main__":
    main()

"""What a calibration will take, before it starts: evaluations, FLOPs, seconds, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from backbones import loading
from backbones.model_files import ModelError
from edit_cli.calibrate.plan import CalibrationPlan
from edit_cli.console import two_columns
from edit_cli.errors import EditError, bad_input
from edit_cli.generation.dryrun import OUTPUT_BYTES, memory
from edit_cli.generation.report import flops
from edit_cli.generation.result import job_flops, waiter
from routers.planned.spent import EXACT_SHARE, evaluations_for
from routers.planned.timeplan import PASSES

if TYPE_CHECKING:
    from routers.calibrate.workload import Workload

SIDE, PRODUCTS = 2048, 4
"""Of the matrix products that say how fast a device computes at most."""
TIMED = 3
"""Steps of the run that is timed."""


@dataclass(frozen=True)
class Work:
    """What is run, in batches of `rows` results: evaluations of each run, to fit plans and to measure."""

    rows: int
    steps: int
    fit: list[int]
    measure: list[int]

    @classmethod
    def of(cls, plan: CalibrationPlan) -> Work:
        """Of a calibration that fits."""
        steps, rows = plan.generation.jobs[0].denoising_steps, plan.generation.batch_size
        budgets = [evaluations_for(budget, steps) for budget in sorted(set(plan.budgets))]
        batches = -(-len(plan.held_out) // rows)
        fit = [] if plan.output is None else plan.fitted.runs(steps)
        return cls(rows, steps, fit, [steps, *[steps, *budgets] * batches])

    @property
    def evaluations(self) -> int:
        """Of a batch."""
        return sum(self.fit) + sum(self.measure)

    def seconds(self, each: float, around: float) -> float:
        """each: of an evaluation of a batch. around: of all else that a run does."""
        return self.evaluations * each + (len(self.fit) + len(self.measure)) * around

    def told(self) -> str:
        """In words."""
        fit = f"{sum(self.fit) / self.steps:.3g} dense generations of {self.rows} to fit plans, "
        measure = f"{sum(self.measure) / self.steps:.3g} to measure them"
        return (fit if self.fit else "") + measure


def dry_run(plan: CalibrationPlan) -> dict[str, Any]:
    """The JSON object of `--dry-run`; no weights are loaded. Raises EditError."""
    if plan.training is not None:
        raise EditError("--dry-run forecasts --method fit; leave one of them out")
    work, generation = Work.of(plan), plan.generation
    with bad_input():
        each = sum(job_flops(generation, job) for job in generation.jobs) / work.steps
        needed = memory_of(plan)
    device = loading.pick_device(generation.placement.device)
    total = work.evaluations * each
    return {
        "dry_run": True,
        "model": generation.backbone.name,
        "samples": len(generation.jobs),
        "generations": {
            "fit": round(sum(work.fit) / work.steps, 2),
            "measure": round(sum(work.measure) / work.steps, 2),
        },
        "evaluations": work.evaluations,
        "flops": total,
        "seconds": {"at_least": round(total / fastest(device, loading.DTYPES[needed["dtype"]]), 1)},
        "memory_gib": needed,
    }


def as_table(plan: CalibrationPlan, report: dict[str, Any]) -> RenderableType:
    """The dry run for people."""
    needed, generation = report["memory_gib"], plan.generation
    size = generation.medium.size(generation.jobs)
    peaks = ", ".join(f"{name} {gib:.2f}" for name, gib in needed["stages"].items())
    rows = {
        "model": f"{report['model']}, {size}, {generation.jobs[0].steps} steps",
        "work": f"{Work.of(plan).told()}: {report['evaluations']} evaluations of a batch",
        "compute": flops(report["flops"]),
        "time": f"at least {readable(report['seconds']['at_least'])} here, at the speed of a matrix product; "
        "once the model is loaded an evaluation is timed",
        "on device": f"about {needed['device']:.2f} GiB in {needed['dtype']} ({peaks}), of which "
        f"{needed['cache']:.2f} are recorded runs",
    }
    return Group(Text("dry run: nothing was loaded or written", style="bold"), Text(), two_columns(rows))


def note(plan: CalibrationPlan, workload: Workload, device: str) -> str:
    """A line before it begins: seconds by a run of a few steps. device: type of what computes."""
    work = Work.of(plan)
    each, around = timed(workload, device)
    try:
        space = f"; at most about {memory_of(plan)['device']:.1f} GiB on the device"
    except (ModelError, ValueError):  # of a model whose calls cannot be traced
        space = ""
    return f"about {readable(work.seconds(each, around))}: {work.told()}{space}"


def timed(workload: Any, device: str) -> tuple[float, float]:
    """Seconds of an evaluation of a batch, and of all else that a run does."""
    taken, wait = [], waiter(device)
    with torch.no_grad():
        for steps in (1, 1, TIMED):  # the first one warms up
            start = time.perf_counter()
            workload.run(0, num_steps=steps)
            wait()
            taken.append(time.perf_counter() - start)
    each = max((taken[2] - taken[1]) / (TIMED - 1), 0.0)
    return each, max(taken[1] - each, 0.0)


def memory_of(plan: CalibrationPlan) -> dict[str, Any]:
    """Peak GiB by stage; `cache` are the recorded runs and what a fit solves. Raises ModelError."""
    generation, steps = plan.generation, plan.generation.jobs[0].denoising_steps
    latent = generation.batch_size * max(
        generation.medium.latent(job, generation.backbone) for job in generation.jobs
    )
    longest = max(EXACT_SHARE if target == "exact" else 1 for target in plan.fitted.targets) * steps
    recorded = OUTPUT_BYTES * (2 * longest + 1 + PASSES)
    solved = 2 * OUTPUT_BYTES * (PASSES + 2)
    with loading.quiet_libraries():
        return dict(memory(generation, lambda *_: latent * (recorded + solved)))


def fastest(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product."""
    a = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    wait = waiter(device.type)
    a @ a
    wait()
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        a @ a
    wait()
    return float(PRODUCTS * 2 * SIDE**3 / (time.perf_counter() - start))


def readable(seconds: float) -> str:
    """42 s, 7 min, 3.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""`--dry-run`: what would be done, its cost and memory; no weights are loaded, nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from backbones.spec import GIB
from edit_cli.console import readable_count, two_columns
from edit_cli.errors import bad_input
from edit_cli.generation.forecast import BYTES, stages, weight_bytes
from edit_cli.generation.plan import Plan
from edit_cli.generation.report import flops, one_or_all
from edit_cli.generation.result import job_flops
from edit_cli.generation.routers import RouterSource, settle
from routers.planned.timeplan import PASSES
from routers.spec import TARGETS

OUTPUT_BYTES = 4
"""Of a value of a model's output, as a plan keeps it."""


@dataclass(frozen=True)
class DryRun:
    """A plan with what it would cost."""

    plan: Plan
    report: dict[str, Any]


def dry_run(plan: Plan) -> DryRun:
    """Count a plan's outputs, FLOPs dense and at the asked budget, memory in GiB per component.

    Memory counts weights, and for `cache` the most that is kept from one step to another. Raises EditError.
    """
    plan, source = settle(plan)
    # the paper's checkpoint decides its spend while it runs
    budgets = [1.0 if job.budget is None else job.budget for job in plan.jobs]
    with bad_input():
        dense = [job_flops(plan, job) for job in plan.jobs]
        needed = memory(plan, lambda blocks, size: _kept(plan, source, blocks, size))
    calls = sum(
        source.calls(jobs) * len(plan.medium.calls(jobs[0], plan.backbone))
        for jobs, _ in plan.batches(source.shares)
    )
    spent = [count * source.buys(job)[1] for count, job in zip(dense, plan.jobs, strict=True)]
    report = {
        "dry_run": True,
        "outputs": [str(job.path) for job in plan.jobs],
        "model": plan.backbone.name,
        "seeds": [job.seed for job in plan.jobs],
        "budget": one_or_all(budgets),
        "flops": {"dense": sum(dense), "spent": sum(spent)},
        "transformer_calls": calls,
        "memory_gib": needed,
    }
    return DryRun(plan, report)


def as_json(dry: DryRun) -> dict[str, Any]:
    """The object that `--json` prints."""
    return dry.report


def as_table(dry: DryRun) -> RenderableType:
    """The dry run for people."""
    plan, report = dry.plan, dry.report
    memory, backbone, first = report["memory_gib"], plan.backbone, plan.jobs[0]
    weights = " · ".join(f"{name} {gib:.2f}" for name, gib in memory["weights"].items())
    what = (
        f"{len(plan.jobs)} in batches of {min(plan.batch_size, len(plan.jobs))}, "
        f"{plan.medium.size(plan.jobs)}, {first.steps} steps, guidance {first.guidance:g}"
    )
    rows = {
        "model": f"{backbone.name} ({backbone.family.name}, "
        f"{readable_count(backbone.parameters)} parameters)",
        "routers": str(plan.routers) if plan.routers else "none",
        plan.medium.things: what,
        "compute": f"{flops(report['flops']['spent'])} at budget {report['budget']}, "
        f"{flops(report['flops']['dense'])} dense, in {report['transformer_calls']} transformer calls",
        "weights": f"{weights} GiB in {memory['dtype']}, {memory['total']:.2f} GiB together",
    }
    if first.time is not None:
        rows["time"] = f"{first.time:g} s asked for each: what of this compute it buys is measured then"
    if memory["cache"]:
        rows["cache"] = f"at most {memory['cache'] * 1024:.0f} MiB of earlier steps' outputs"
    peaks = ", ".join(f"{name} {gib:.2f}" for name, gib in memory["stages"].items())
    rows["on device"] = (
        f"about {memory['device']:.2f} GiB at most ({peaks}) with --offload {plan.placement.offload}"
    )
    rows |= {name: text for name, (_, text) in plan.medium.needs(plan.jobs).items()}
    rows["would write"] = ", ".join(report["outputs"][:8]) + (" ..." if len(report["outputs"]) > 8 else "")
    return Group(Text("dry run: nothing was loaded or written", style="bold"), Text(), two_columns(rows))


def memory(plan: Plan, kept: Callable[[int, int], float]) -> Mapping[str, Any]:
    """GiB by component and by stage. kept: from the number of blocks and the bytes of a value to the bytes
    that stay from one step to another. Raises ModelError.
    """
    from backbones import loading

    backbone = plan.backbone
    device = loading.pick_device(plan.placement.device)
    dtype = loading.dtype_name(loading.pick_dtype(plan.placement.dtype, backbone, device))
    size = BYTES[dtype]
    weights = {name: size / GIB for name, size in weight_bytes(plan, dtype).items()}
    blocks = loading.blocks(loading.meta_transformer(backbone), backbone)
    block = max((sum(p.numel() for p in b.parameters()) for b in blocks), default=0)
    cache = kept(len(blocks), size)
    peaks = {name: peak / GIB for name, peak in stages(plan, dtype, cache, block).items()}
    return {
        "dtype": dtype,
        "weights": {name: round(gib, 3) for name, gib in weights.items()},
        "total": round(sum(weights.values()), 3),
        "cache": round(cache / GIB, 3),
        "stages": {name: round(gib, 4) for name, gib in peaks.items()},
        "device": round(max(peaks.values()), 4),
        **{name: round(gib, 3) for name, (gib, _) in plan.medium.needs(plan.jobs).items()},
    }


def _kept(plan: Plan, source: RouterSource, blocks: int, size: int) -> float:
    """Bytes that are kept from one step to another, at most. size: of a value of the transformer."""
    jobs, backbone, rows = plan.jobs, plan.backbone, min(plan.batch_size, len(plan.jobs))
    if source.plans:
        dense = all(job.budget == 1 and job.target in (None, TARGETS[0]) for job in jobs)
        outputs = 0 if dense else PASSES
        return outputs * OUTPUT_BYTES * rows * max(plan.medium.latent(job, backbone) for job in jobs)
    if source.release is None and all(job.budget == 1 for job in jobs):
        return 0
    # every block's output, for each guidance branch; the paper's checkpoint keeps one pass, trained routers
    # two
    streams = max(plan.medium.stream(job, backbone) for job in jobs)
    passes = 1 if source.release is not None else 2
    return passes * (blocks + 1) * size * rows * backbone.branches(jobs[0].guidance) * streams

"""`edit generate-3d --dry-run`: plan, FLOPs and memory; no weights are loaded, nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from backbones import registry
from backbones.spec import GIB, CallSize
from edit_cli.errors import bad_input
from edit_cli.generate.cutout import cut_out, open_rgba
from edit_cli.generate.dryrun import BYTES, plan_table, planned
from edit_cli.generate.mesh_loop import settle_mesh_budgets
from edit_cli.generate.mesh_plan import MeshJob, MeshPlan
from edit_cli.generate.mesh_session import DENSE_BYTES, SPARSE_BYTES

PATCH = 14  # px of a DINOv2 token's side


def dry_run(plan: MeshPlan) -> dict[str, Any]:
    """The plan as JSON data: outputs, FLOPs dense and at the asked budget, GiB. Raises EditError."""
    for job in plan.jobs:
        for name in job.images:
            cut_out(open_rgba(name), job.remove_background, name)
    plan, _ = settle_mesh_budgets(plan)
    budgets = [1.0 if job.budget is None else job.budget for job in plan.jobs]
    with bad_input():
        dense = [_job_flops(plan, job) for job in plan.jobs]
        memory = _memory(plan)
    return planned(plan, budgets, dense, sum(job.steps for job in plan.jobs), memory)


def as_table(plan: MeshPlan, found: Mapping[str, Any]) -> RenderableType:
    """The dry run for people."""
    first = plan.jobs[0]
    what = (
        f"{len(plan.jobs)}, {first.steps} steps, guidance {first.guidance:g}, "
        f"resolution {first.octree_resolution}"
    )
    grid = (
        f"about {found['memory_gib']['grid']:.2f} GiB of main memory at resolution {first.octree_resolution}"
    )
    return plan_table(plan, found, {"meshes": what}, {"grid": grid})


def _job_flops(plan: MeshPlan, job: MeshJob) -> float:
    """FLOPs of one mesh's denoising, dense: one transformer call on the meta device, times the steps."""
    from backbones.loading import call_flops

    size = CallSize(rows=plan.backbone.branches(job.guidance), views=max(len(job.views), 1))
    return job.steps * call_flops(plan.backbone, size)


def _memory(plan: MeshPlan) -> dict[str, Any]:
    from backbones.loading import dtype_name, pick_device, pick_dtype

    device = pick_device(plan.placement.device)
    dtype = dtype_name(pick_dtype(plan.placement.dtype, plan.backbone, device))
    counts = registry.component_parameters(plan.backbone)
    weights = {name: n * BYTES[dtype] / GIB for name, n in counts.items()}
    job = max(plan.jobs, key=lambda j: j.octree_resolution)
    point = DENSE_BYTES if job.decode == "dense" else SPARSE_BYTES
    return {
        "dtype": dtype,
        "weights": {name: round(gib, 3) for name, gib in weights.items()},
        "total": round(sum(weights.values()), 3),
        "grid": round(point * (job.octree_resolution + 1) ** 3 / GIB, 3),
    }

"""`edit generate-3d --dry-run`: plan, FLOPs and memory; no weights are loaded, nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from backbones import mesh_registry
from backbones.model_files import GIB
from edit_cli.console import two_columns
from edit_cli.dryrun import BYTES
from edit_cli.errors import bad_input
from edit_cli.mesh_pictures import cut_out, open_rgba
from edit_cli.mesh_plan import MeshJob, MeshPlan
from edit_cli.mesh_runner import settle_mesh_budgets
from edit_cli.mesh_session import DENSE_BYTES, SPARSE_BYTES, pick_dtype
from edit_cli.models import readable_count
from edit_cli.report import flops, one_or_all

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
    return {
        "dry_run": True,
        "outputs": [str(job.path) for job in plan.jobs],
        "model": plan.backbone.name,
        "seeds": [job.seed for job in plan.jobs],
        "budget": one_or_all(budgets),
        "flops": {"dense": sum(dense), "spent": sum(d * b for d, b in zip(dense, budgets, strict=True))},
        "transformer_calls": sum(job.steps for job in plan.jobs),
        "memory_gib": memory,
    }


def as_table(plan: MeshPlan, found: Mapping[str, Any]) -> RenderableType:
    """The dry run for people."""
    first, memory, backbone = plan.jobs[0], found["memory_gib"], plan.backbone
    weights = " · ".join(f"{name} {gib:.2f}" for name, gib in memory["weights"].items())
    count = readable_count(backbone.parameters)
    rows = {
        "model": f"{backbone.name} ({backbone.family.name}, {count} parameters)",
        "routers": str(plan.routers) if plan.routers else "none: dense",
        "meshes": f"{len(plan.jobs)}, {first.steps} steps, guidance {first.guidance:g}, "
        f"resolution {first.octree_resolution}",
        "compute": f"{flops(found['flops']['spent'])} at budget {found['budget']}, "
        f"{flops(found['flops']['dense'])} dense, in {found['transformer_calls']} transformer calls",
        "weights": f"{weights} GiB in {memory['dtype']}, {memory['total']:.2f} GiB together",
        "grid": f"about {memory['grid']:.2f} GiB of main memory at resolution {first.octree_resolution}",
        "would write": ", ".join(found["outputs"][:8]) + (" ..." if len(found["outputs"]) > 8 else ""),
    }
    return Group(Text("dry run: nothing was loaded or written", style="bold"), Text(), two_columns(rows))


def _job_flops(plan: MeshPlan, job: MeshJob) -> float:
    """FLOPs of one mesh's denoising, dense: one transformer call on the meta device, times the steps."""
    import torch

    import routers
    from backbones.hunyuan3d.config import build

    config = mesh_registry.model_config(plan.backbone)
    params, vae = config["model"]["params"], config["vae"]["params"]
    encoder = config["conditioner"]["params"]["main_image_encoder"].get("kwargs", {})
    tokens = (encoder.get("image_size", 518) // PATCH) ** 2 + 1
    rows = plan.backbone.rows(job.guidance)
    context = params.get("context_in_dim") or params.get("context_dim")
    with torch.device("meta"):
        transformer = build("model", config["model"])
        inputs = {
            "x": torch.empty(rows, vae["num_latents"], vae["embed_dim"]),
            "t": torch.empty(rows),
            "contexts": {"main": torch.empty(rows, tokens * max(len(job.views), 1), context)},
            "guidance": torch.empty(rows),
        }
    return job.steps * float(routers.cost.transformer_flops(transformer, inputs))


def _memory(plan: MeshPlan) -> dict[str, Any]:
    from backbones.loading import pick_device

    device = pick_device(plan.placement.device)
    kind = str(pick_dtype(plan.placement.dtype, plan.backbone, device)).split(".")[-1]
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[kind]
    counts = mesh_registry.component_parameters(plan.backbone)
    weights = {name: n * BYTES[dtype] / GIB for name, n in counts.items()}
    job = max(plan.jobs, key=lambda j: j.octree_resolution)
    point = DENSE_BYTES if job.decode == "dense" else SPARSE_BYTES
    return {
        "dtype": dtype,
        "weights": {name: round(gib, 3) for name, gib in weights.items()},
        "total": round(sum(weights.values()), 3),
        "grid": round(point * (job.octree_resolution + 1) ** 3 / GIB, 3),
    }

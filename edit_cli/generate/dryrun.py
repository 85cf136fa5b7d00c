"""`--dry-run`: what would be done, its cost and memory; no weights are loaded, nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from backbones import registry
from backbones.spec import GIB, CallSize
from edit_cli.commands.models import readable_count
from edit_cli.console import two_columns
from edit_cli.errors import bad_input
from edit_cli.generate.mesh_plan import MeshPlan
from edit_cli.generate.plan import Job, Plan
from edit_cli.generate.report import flops, one_or_all

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def dry_run(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data: outputs, FLOPs dense and at the asked budget, memory in GiB per component.

    Memory counts weights only, and for `cache` the most that a feature cache can hold. Raises EditError.
    """
    from edit_cli.generate.session import RouterSource, settle_budgets

    plan = settle_budgets(plan, RouterSource.read(plan.routers))
    # the paper's checkpoint decides its spend while it runs
    budgets = [1.0 if job.budget is None else job.budget for job in plan.jobs]
    with bad_input():
        dense = [_job_flops(plan, job) for job in plan.jobs]
        memory = _memory(plan)
    calls = sum(_calls(plan, batch[0]) for batch in plan.batches())
    return planned(plan, budgets, dense, calls, memory)


def planned(
    plan: Plan | MeshPlan, budgets: list[float], dense: list[float], calls: int, memory: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON data. Per job: budget, and FLOPs of its dense denoising; calls: transformer calls in all."""
    return {
        "dry_run": True,
        "outputs": [str(job.path) for job in plan.jobs],
        "model": plan.backbone.name,
        "seeds": [job.seed for job in plan.jobs],
        "budget": one_or_all(budgets),
        "flops": {"dense": sum(dense), "spent": sum(d * b for d, b in zip(dense, budgets, strict=True))},
        "transformer_calls": calls,
        "memory_gib": memory,
    }


def as_table(plan: Plan, found: Mapping[str, Any]) -> RenderableType:
    """The dry run for people."""
    first, memory = plan.jobs[0], found["memory_gib"]
    what = (
        f"{len(plan.jobs)} in batches of {min(plan.batch_size, len(plan.jobs))}, "
        f"{first.width}x{first.height}, {first.steps} steps, guidance {first.guidance:g}"
    )
    rows = {"on device": f"about {memory['device']:.2f} GiB with --offload {plan.placement.offload}"}
    if memory["cache"]:
        cache = f"at most {memory['cache']:.2f} GiB to reuse blocks from earlier steps"
        rows = {"cache": cache, **rows}
    return plan_table(plan, found, {"pictures": what}, rows)


def plan_table(
    plan: Plan | MeshPlan, found: Mapping[str, Any], what: Mapping[str, str], needs: Mapping[str, str]
) -> RenderableType:
    """A dry run's table. what: the row on what would be made. needs: rows on memory beside the weights."""
    memory, backbone = found["memory_gib"], plan.backbone
    weights = " · ".join(f"{name} {gib:.2f}" for name, gib in memory["weights"].items())
    rows = {
        "model": f"{backbone.name} ({backbone.family.name}, "
        f"{readable_count(backbone.parameters)} parameters)",
        "routers": str(plan.routers) if plan.routers else "none: dense",
        **what,
        "compute": f"{flops(found['flops']['spent'])} at budget {found['budget']}, "
        f"{flops(found['flops']['dense'])} dense, in {found['transformer_calls']} transformer calls",
        "weights": f"{weights} GiB in {memory['dtype']}, {memory['total']:.2f} GiB together",
        **needs,
        "would write": ", ".join(found["outputs"][:8]) + (" ..." if len(found["outputs"]) > 8 else ""),
    }
    return Group(Text("dry run: nothing was loaded or written", style="bold"), Text(), two_columns(rows))


def _calls(plan: Plan, job: Job) -> int:
    from edit_cli.generate.session import denoising_steps

    return denoising_steps(job) * plan.backbone.branches(job.guidance)


def _job_flops(plan: Plan, job: Job) -> float:
    """FLOPs of one picture's denoising, dense: counted on the meta device, one call per distinct size."""
    from backbones import loading
    from edit_cli.generate.session import denoising_steps

    family, limit = plan.backbone.family, plan.backbone.defaults.max_sequence_length
    prompts = [job.prompt]
    if plan.backbone.branches(job.guidance) > 1:
        prompts.append(job.negative_prompt or "")
    calls = [
        loading.call_flops(
            plan.backbone, CallSize(1, job.width, job.height, family.text_tokens(prompt, limit))
        )
        for prompt in prompts
    ]
    return denoising_steps(job) * sum(calls)


def _memory(plan: Plan) -> dict[str, Any]:
    from backbones import loading

    backbone, offload = plan.backbone, plan.placement.offload
    device = loading.pick_device(plan.placement.device)
    dtype = loading.dtype_name(loading.pick_dtype(plan.placement.dtype, backbone, device))
    size = BYTES[dtype]
    weights = {name: n * size / GIB for name, n in registry.component_parameters(backbone).items()}
    config = registry.component_configs(backbone)["transformer"]
    blocks = loading.blocks(loading.meta_transformer(backbone), backbone)
    block = max((sum(p.numel() for p in b.parameters()) for b in blocks), default=0) * size / GIB
    cache = 0.0
    if any(job.budget is None or job.budget < 1 for job in plan.jobs):
        job = max(plan.jobs, key=lambda j: j.width * j.height)
        tokens = (job.width // backbone.size_multiple) * (job.height // backbone.size_multiple)
        tokens += backbone.family.text_tokens(job.prompt, backbone.defaults.max_sequence_length)
        dim = config["num_attention_heads"] * config["attention_head_dim"]
        # every block's output, at two steps, for each guidance branch and picture of a batch
        rows = min(plan.batch_size, len(plan.jobs)) * backbone.branches(job.guidance)
        cache = 2 * (len(blocks) + 1) * tokens * dim * size * rows / GIB
    on_device = {
        "none": sum(weights.values()),
        "model": max(weights.values(), default=0.0),
        "sequential": block,
        "group": 2 * block,
    }[offload]
    return {
        "dtype": dtype,
        "weights": {name: round(gib, 3) for name, gib in weights.items()},
        "total": round(sum(weights.values()), 3),
        "cache": round(cache, 3),
        "device": round(on_device + cache, 3),
    }

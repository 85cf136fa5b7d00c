"""From what was asked of `edit profile` to what will be measured. Torch-free.

The request itself is planned by `plan.py` or `mesh_plan.py`, as for a generation whose results are not kept.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backbones import registry
from backbones.model_files import ModelError
from edit_cli import checks as values
from edit_cli.errors import EditError
from edit_cli.generate.mesh_plan import MeshAsked, MeshPlan, make_mesh_plan
from edit_cli.generate.outputs import slug
from edit_cli.generate.plan import Asked, Plan, make_plan
from edit_cli.generate.prompts import default_prompts, read_prompts
from edit_cli.generate.routers import NO_ROUTERS

SAMPLES, REPEATS = 4, 3
"""Samples when no prompt is given; timed repeats."""
CACHE_LIMIT_MIB = 1024
"""A larger feature cache is warned about."""
ELASTIC_METRICS = ("skip", "reuse", "width", "error", "time")
DENSE_METRICS = ("adds", "similarity", "cost", "time")
"""What the heatmaps can show of an elastic, and of a dense profile; the first is the default."""


@dataclass(frozen=True)
class ProfileAsked:
    """What was typed, before any check; None: not given. Names follow the options of `edit profile`."""

    prompts: tuple[str, ...] = ()
    prompts_file: str | None = None
    images: tuple[str, ...] = ()
    replay: str | None = None
    model: str | None = None
    routers: str | None = None
    budgets: tuple[str, ...] = ()
    dense: bool = False
    metric: str | None = None
    samples: str | None = None
    repeats: str | None = None
    cache_limit: str | None = None
    steps: str | None = None
    guidance: str | None = None
    seeds: tuple[str, ...] = ()
    batch_size: str | None = None
    width: str | None = None
    height: str | None = None
    octree_resolution: str | None = None
    output: str | None = None
    device: str | None = None
    dtype: str | None = None
    offload: str | None = None
    loras: tuple[str, ...] = ()
    force: bool = False


@dataclass(frozen=True)
class ProfilePlan:
    """What to measure and where to write it.

    request: one job per sample, at the first budget. budgets: in the order asked; None: what the routers
    recommend. folder: of the report, None: nothing is written. cache_limit in MiB.
    """

    request: Plan | MeshPlan
    budgets: tuple[float | None, ...]
    dense: bool
    metric: str | None
    repeats: int
    cache_limit: int
    folder: Path | None


def make_profile_plan(asked: ProfileAsked) -> ProfilePlan:
    """Check everything that was asked. Raises EditError; reads files but writes none."""
    metric = check_metric(asked.metric, asked.dense)
    budgets = _budgets(asked)
    mesh = _makes_meshes(asked)
    request = _mesh_request(asked) if mesh else _picture_request(asked)
    return ProfilePlan(
        request=request,
        budgets=budgets,
        dense=asked.dense,
        metric=metric,
        repeats=_count("--repeats", asked.repeats, REPEATS),
        cache_limit=_count("--cache-limit", asked.cache_limit, CACHE_LIMIT_MIB),
        folder=report_folder(asked.output),
    )


def check_metric(metric: str | None, dense: bool) -> str | None:
    """Raises EditError for a metric that this kind of profile does not have."""
    allowed, other = (DENSE_METRICS, ELASTIC_METRICS) if dense else (ELASTIC_METRICS, DENSE_METRICS)
    if metric is None or metric in allowed:
        return metric
    hint = ""
    if metric in other:
        hint = "; leave --dense out for it" if dense else "; add --dense for it"
    raise EditError(f"--metric {metric!r} is unknown here; allowed are {', '.join(allowed)}{hint}")


def report_folder(output: str | None) -> Path | None:
    """Where the report goes: a folder that exists or can be made in one that does. Raises EditError."""
    if output is None:
        return None
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise EditError(f"--output {output!r} is a file; give a folder for the report")
    parent = folder if folder.exists() else folder.resolve().parent
    if not parent.is_dir():
        raise EditError(f"--output folder {output!r} lies in no folder; create it with: mkdir -p {output}")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise EditError(
            f"--output folder {str(parent)!r} is not writable: {reason}; choose another place"
        ) from None
    return folder


def _budgets(asked: ProfileAsked) -> tuple[float | None, ...]:
    for given, name in ((asked.budgets, "--budget"), (asked.routers not in (None, NO_ROUTERS), "--routers")):
        if asked.dense and given:
            raise EditError(f"--dense profiles the model without routers; leave {name} out")
    budgets = [values.budget("--budget", text) for text in asked.budgets]
    repeated = next((b for b in budgets if budgets.count(b) > 1), None)
    if repeated is not None:
        raise EditError(f"--budget {repeated:g} is given twice; give distinct budgets")
    return tuple(budgets) or ((1.0,) if asked.dense else (None,))


def _makes_meshes(asked: ProfileAsked) -> bool:
    if asked.images and (asked.prompts or asked.prompts_file):
        raise EditError("--images are for image-to-mesh models, which take no prompt; leave one of them out")
    if asked.images or asked.model is None:
        return bool(asked.images)
    if _resolve(asked.model).makes == "mesh":
        raise EditError(f"{asked.model!r} makes meshes and needs a picture; add --images cat.png")
    return False


def _count(where: str, value: str | None, default: int) -> int:
    return default if value is None else values.integer(where, value, 1, 100_000)


def _seed(asked: ProfileAsked) -> int:
    if len(asked.seeds) > 1:
        raise EditError("--seed takes one number here: sample i starts from seed N + i")
    return values.seed("--seed", asked.seeds[0]) if asked.seeds else 0


def _nowhere(suffix: str) -> str:
    """A name for results that are not kept; planning wants to know that it could be written."""
    return os.path.join(tempfile.gettempdir(), "{index}" + suffix)


def _picture_request(asked: ProfileAsked) -> Plan:
    for value, name in ((asked.octree_resolution, "--octree-resolution"),):
        if value is not None:
            raise EditError(f"{name} is for image-to-mesh models; leave it out, or add --images cat.png")
    prompts, count = asked.prompts, _count("--samples", asked.samples, 0) if asked.samples else None
    if not prompts and asked.prompts_file is None:
        backbone = _resolve(asked.model)
        lines = [entry["prompt"] for entry in read_prompts(str(default_prompts(backbone)))]
        prompts = tuple(lines[: count or SAMPLES])
    plan = make_plan(
        Asked(
            prompts=tuple(prompts), prompts_file=asked.prompts_file, model=asked.model,
            routers=NO_ROUTERS if asked.dense else asked.routers,
            budget=asked.budgets[0] if asked.budgets else None,
            steps=asked.steps, guidance=asked.guidance, batch_size=asked.batch_size, width=asked.width,
            height=asked.height, output=_nowhere(".png"), device=asked.device, dtype=asked.dtype,
            offload=asked.offload, loras=asked.loras, force=asked.force,
        )
    )  # fmt: skip
    if len({job.group for job in plan.jobs}) > 1:
        raise EditError(
            "--prompts holds lines of different size, steps, guidance or budget; "
            "a profile needs the same for all"
        )
    seed = _seed(asked)
    jobs = tuple(replace(job, seed=seed + i) for i, job in enumerate(_cycle(plan.jobs, count)))
    batch = min(plan.batch_size, len(jobs))
    return replace(plan, jobs=jobs, batch_size=batch)


def _mesh_request(asked: ProfileAsked) -> MeshPlan:
    for value, name in (
        (asked.width, "--width"), (asked.height, "--height"), (asked.batch_size, "--batch-size"),
        (asked.loras, "--lora"),
    ):  # fmt: skip
        if value:
            raise EditError(f"{name} is not for image-to-mesh models; leave it out")
    plan = make_mesh_plan(
        MeshAsked(
            images=asked.images, model=asked.model, routers=NO_ROUTERS if asked.dense else asked.routers,
            budget=asked.budgets[0] if asked.budgets else None, steps=asked.steps, guidance=asked.guidance,
            octree_resolution=asked.octree_resolution, output=_nowhere(".glb"), device=asked.device,
            dtype=asked.dtype, offload=asked.offload, force=asked.force,
        )
    )  # fmt: skip
    count = _count("--samples", asked.samples, 0) if asked.samples else None
    seed = _seed(asked)
    jobs = tuple(replace(job, seed=seed + i) for i, job in enumerate(_cycle(plan.jobs, count)))
    return replace(plan, jobs=jobs)


def _resolve(model: str | None) -> Any:
    try:
        return registry.resolve(model)
    except ModelError as error:
        raise EditError(str(error)) from error


def _cycle(jobs: Sequence[Any], count: int | None) -> list[Any]:
    return [jobs[i % len(jobs)] for i in range(count or len(jobs))]


def label_of(job: Any) -> str:
    """What a sample is called in the report: its prompt, or its picture's name."""
    if hasattr(job, "prompt"):
        return str(job.prompt)
    return " + ".join(Path(image).name for image in job.images)


def file_stem(index: int, job: Any) -> str:
    """Beginning of the names of a sample's pictures."""
    return f"{index}-{slug(label_of(job))[:40]}"

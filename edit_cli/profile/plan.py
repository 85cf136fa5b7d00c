"""From a request to what will be measured. Torch-free.

The generation itself is planned as any other, only that its results are not kept.
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
from edit_cli import checks
from edit_cli.errors import EditError
from edit_cli.generate.medium import Medium
from edit_cli.generate.mesh import MESH
from edit_cli.generate.outputs import slug
from edit_cli.generate.picture import PICTURE
from edit_cli.generate.plan import Plan, make_plan
from edit_cli.generate.prompts import default_prompts, read_prompts
from edit_cli.generate.routers import NO_ROUTERS
from edit_cli.options import CACHE_LIMIT_MIB, DENSE_METRICS, ELASTIC_METRICS, REPEATS, SAMPLES
from edit_cli.request import Request

GENERATION = (
    "prompts_file", "model", "steps", "guidance", "batch_size", "width", "height", "octree_resolution",
    "device", "dtype", "offload", "lora", "force",
)  # fmt: skip
"""Fields of a request that go to the generation as they are."""


@dataclass(frozen=True)
class ProfilePlan:
    """What to measure and where to write it.

    request: one job per sample, at the first budget. budgets: in the order asked; None: what the routers
    recommend. folder: of the report, None: nothing is written. cache_limit in MiB.
    """

    request: Plan
    budgets: tuple[float | None, ...]
    dense: bool
    metric: str | None
    repeats: int
    cache_limit: int
    folder: Path | None


def make_profile_plan(request: Request) -> ProfilePlan:
    """Check everything that was asked. Raises EditError; reads files but writes none."""
    metric = check_metric(request.get("metric"), "dense" in request)
    budgets = _budgets(request)
    return ProfilePlan(
        request=_generation(request, _medium(request)),
        budgets=budgets,
        dense="dense" in request,
        metric=metric,
        repeats=request.get("repeats", REPEATS),
        cache_limit=request.get("cache_limit", CACHE_LIMIT_MIB),
        folder=report_folder(request.get("output")),
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


def _budgets(request: Request) -> tuple[float | None, ...]:
    if "dense" in request:
        if "budget" in request:
            raise EditError("--dense profiles the model without routers; leave --budget out")
        if request.get("routers", NO_ROUTERS) != NO_ROUTERS:
            raise EditError("--dense profiles the model without routers; leave --routers out")
        return (1.0,)
    budgets = request.get("budget", [])
    repeated = next((b for b in budgets if budgets.count(b) > 1), None)
    if repeated is not None:
        raise EditError(f"--budget {repeated:g} is given twice; give distinct budgets")
    return tuple(budgets) or (None,)


def _medium(request: Request) -> Medium:
    if "images" in request and ("prompt" in request or "prompts_file" in request):
        raise EditError("--images are for image-to-mesh models, which take no prompt; leave one of them out")
    if "images" in request:
        return MESH
    if "model" in request and _resolve(request["model"]).makes == "mesh":
        raise EditError(f"{request['model']!r} makes meshes and needs a picture; add --images cat.png")
    return PICTURE


def _nowhere(suffix: str) -> str:
    """A name for results that are not kept; planning wants to know that it could be written."""
    return os.path.join(tempfile.gettempdir(), "{index}" + suffix)


def _generation(request: Request, medium: Medium) -> Plan:
    """A run of all samples at the first budget, whose results are not kept."""
    if medium is PICTURE:
        if "octree_resolution" in request:
            raise EditError(
                "--octree-resolution is for image-to-mesh models; leave it out, or add --images cat.png"
            )
    else:
        for name, option in (("width", "--width"), ("height", "--height"), ("lora", "--lora")):
            if name in request:
                raise EditError(f"{option} is not for image-to-mesh models; leave it out")
    seeds, count = request.get("seed", [0]), request.get("samples")
    if len(seeds) > 1:
        raise EditError("--seed takes one number here: sample i starts from seed N + i")
    subjects = [checks.readable_file("IMAGE", name) for name in request.get("images", ())]
    subjects = subjects or request.get("prompt", [])
    if not subjects and "prompts_file" not in request:
        lines = read_prompts(str(default_prompts(_resolve(request.get("model")))))
        subjects = [line["prompt"] for line in lines][: count or SAMPLES]
    kept = {name: value for name, value in request.items() if name in GENERATION}
    plan = make_plan(
        Request(kept).but(
            **{medium.subject: subjects or None},
            routers=NO_ROUTERS if "dense" in request else request.get("routers"),
            budget=request.get("budget", [None])[0],
            output=_nowhere(medium.suffixes[0]),
        ),
        medium,
    )
    if len({medium.group(job) for job in plan.jobs}) > 1:
        raise EditError(
            "--prompts holds lines of different size, steps, guidance or budget; "
            "a profile needs the same for all"
        )
    jobs = [replace(job, seed=seeds[0] + i) for i, job in enumerate(_cycle(plan.jobs, count))]
    return replace(plan, jobs=tuple(jobs), batch_size=min(plan.batch_size, len(jobs)))


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

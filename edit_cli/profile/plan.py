"""From a request of `edit profile` to what will be measured. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edit_cli.errors import EditError
from edit_cli.files import request_hash
from edit_cli.generation.medium import Job, Medium
from edit_cli.generation.outputs import slug
from edit_cli.generation.plan import Plan
from edit_cli.generation.routers import NO_ROUTERS
from edit_cli.generation.samples import PROMPTS, alike, medium_of, sample_plan, take
from edit_cli.options import CACHE_LIMIT_MIB, DENSE_METRICS, ELASTIC_METRICS, REPEATS, SAMPLES
from edit_cli.request import Request


@dataclass(frozen=True)
class ProfilePlan:
    """What to measure and where to write it.

    generation: one job per sample. budgets: in the order given; None: what the routers recommend.
    cache_limit in MiB. asked: a hash of the request.
    """

    generation: Plan
    budgets: tuple[float | None, ...]
    dense: bool
    metric: str | None
    repeats: int
    cache_limit: int
    asked: str = ""


def make_profile_plan(request: Request) -> ProfilePlan:
    """Check everything. Raises EditError; reads files but writes none."""
    dense = "dense" in request
    metric = check_metric(request.get("metric"), dense)
    budgets, seeds = _budgets(request), request.get("seed", [0])
    if len(seeds) > 1:
        raise EditError("--seed takes one number here: sample i starts from seed N + i")
    medium = medium_of(request)
    routers = NO_ROUTERS if dense else request.get("routers")
    plan = sample_plan(request.but(budget=budgets[0], routers=routers), medium)
    if not alike(plan):
        raise EditError(
            "--prompts holds lines of different size, steps, guidance or budget; "
            "a profile needs the same for all"
        )
    given = {"prompt", "prompts_file", "images"} & request.keys()
    count = request.get("samples") or (len(plan.jobs) if given else min(len(plan.jobs), SAMPLES))
    jobs = take(plan.jobs, count, seeds[0])
    return ProfilePlan(
        generation=replace(plan, jobs=jobs, batch_size=min(plan.batch_size, len(jobs))),
        budgets=budgets,
        dense=dense,
        metric=metric,
        repeats=request.get("repeats", REPEATS),
        cache_limit=request.get("cache_limit", CACHE_LIMIT_MIB),
        asked=request_hash(request),
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


def refuse_beside_replay(request: Request) -> None:
    """--from shows what was measured: no option that would measure again may stand beside it."""
    extra = [
        name for name in request if name not in ("replay", "metric", "output", "overwrite", "json", "quiet")
    ]
    if extra:
        label = PROMPTS.get(extra[0], f"--{extra[0].replace('_', '-')}")
        raise EditError(f"--from shows a trace as it was measured; leave {label} out, or leave --from out")


def _budgets(request: Request) -> tuple[float | None, ...]:
    budgets, dense = request.get("budget", []), "dense" in request
    given = ["--budget"] * bool(budgets) + ["--routers"] * (request.get("routers", NO_ROUTERS) != NO_ROUTERS)
    if dense and given:
        raise EditError(f"--dense profiles the model without routers; leave {given[0]} out")
    repeated = next((b for b in budgets if budgets.count(b) > 1), None)
    if repeated is not None:
        raise EditError(f"--budget {repeated:g} is given twice; give distinct budgets")
    return tuple(budgets) or ((1.0,) if dense else (None,))


def file_stem(medium: Medium, index: int, job: Job) -> str:
    """Beginning of the names of a sample's pictures."""
    return f"{index}-{slug(medium.title(vars(job)))[:40]}"

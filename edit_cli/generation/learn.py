"""`--observe BUNDLE`: the first result is made with all steps, and the others with what that run taught."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edit_cli import __version__
from edit_cli.errors import bad_input
from edit_cli.files import ANY, claimed_folder, whole_folder
from edit_cli.generation.medium import Job
from edit_cli.generation.plan import Plan
from edit_cli.generation.routers import RouterSource
from routers.bundle import DESCRIPTION, FILES, load_bundle

if TYPE_CHECKING:
    from edit_cli.generation.result import Result
    from edit_cli.generation.session import Session
    from routers.planned.observed import Observation

Batches = list[tuple[tuple[Job, ...], Sequence[int]]]
MANY = 8
"""Results from which on it is offered."""


@contextmanager
def claimed_bundle(plan: Plan) -> Iterator[Path | None]:
    """The bundle's name, this run's alone; None where nothing is observed. Raises EditError."""
    if plan.observe is None:
        yield None
        return
    may_replace = (ANY,) if plan.overwrite else ()
    with claimed_folder(plan.observe, "bundle", DESCRIPTION, may_replace, "--observe") as folder:
        yield folder


def densely_first(batches: Batches) -> Batches:
    """The same jobs, first a batch with all steps: of jobs that have them, else the first job alone."""
    for i, (jobs, _) in enumerate(batches):
        if all(job.budget == 1 for job in jobs):
            return [batches[i], *batches[:i], *batches[i + 1 :]]
    (jobs, _), *rest = batches
    others = (jobs[1:], range(len(jobs) - 1))
    return [((replace(jobs[0], budget=1.0),), [0]), *([others] if others[0] else []), *rest]


def learn(session: Session, seen: Observation, folder: Path, result: Result) -> None:
    """Write what was seen as a bundle, and follow its plans from now on. Raises EditError, RunError."""
    plan = session.plan
    with bad_input():
        bundle = seen.bundle(plan.backbone.name, plan.jobs[0].guidance, plan.backbone.family.transformer)
    bundle.metadata["versions"] = {"edit": __version__, "torch": torch.__version__}
    with whole_folder(folder, FILES) as building:
        bundle.save(building)
    session.detach()
    session.source, session.plan = RouterSource(load_bundle(folder)), replace(plan, routers=folder)
    session.attach()
    result.plan = session.plan
    runs = bundle.metadata["rows"]
    result.note(f"{folder} holds what the dense run of {runs} taught; use it with --routers {folder}")


def offer(plan: Plan, source: RouterSource) -> list[str]:
    """A note where many results are made at a budget with nothing known of their model."""
    few = [job for job in plan.jobs if job.budget is not None and job.budget < 1 and job.time is None]
    known = source.bundle is not None or not source.plans or plan.observe is not None
    if known or len(few) < MANY or any(job.solver or job.target == "exact" for job in few):
        return []
    return [
        f"no bundle for {plan.backbone.name}: --learn BUNDLE makes the first of many with all steps, and the "
        "rest nearer to the dense ones"
    ]

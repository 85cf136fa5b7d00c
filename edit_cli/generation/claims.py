"""Names of results, taken when a run starts and given back when it ends: no two runs ever write one.

A file that is there stays, unless the same request made it or `--overwrite` is given. Where the name is
ours (a folder was named, or nothing), the next free number is taken instead. Torch-free unless what is there
has to be compared with what is asked.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edit_cli.errors import EditError
from edit_cli.files import TAKEN, Claims
from edit_cli.generation.medium import Job
from edit_cli.generation.outputs import Output
from edit_cli.generation.plan import Plan, side_files
from edit_cli.generation.record import same_request
from edit_cli.generation.routers import settle

Made = Callable[[Job], bool]
"""Whether the file of a job was made by the same request."""


@contextmanager
def claimed(plan: Plan) -> Iterator[Plan]:
    """The plan with paths that are this run's alone; with --resume, without the jobs that are done.

    Raises EditError for a path that is taken.
    """
    settled = functools.cache(lambda: {job.index: job for job in settle(plan)[0].jobs})

    def made(job: Job) -> bool:
        try:
            record = plan.medium.read_record(str(job.path))
        except EditError:  # somebody else's file
            return False
        return same_request(record, plan, settled()[job.index])

    with Claims() as claims:
        jobs = [_claim(plan, job, claims, made) for job in plan.jobs]
        yield replace(plan, jobs=tuple(job for job in jobs if job is not None))


def _claim(plan: Plan, job: Job, claims: Claims, made: Made) -> Job | None:
    """The job with paths of its own, or None if it is done. Raises EditError."""
    for number in itertools.count(1):
        placed = _numbered(plan, job, number)
        fixed, files = _fixed(plan, job), _files(plan, placed)
        held = next((path for path in files if not claims.take(path)), None)
        there = [path for path in files if path.exists()]
        if held is None and not there:
            return placed
        same = held is None and not plan.overwrite and placed.path.exists() and made(placed)
        if plan.resume and same:
            claims.give_back(files)
            return None
        wrong = held or next((p for p in there if p not in fixed or not (same or plan.overwrite)), None)
        if wrong is None:
            return placed
        claims.give_back(files)
        if wrong in fixed:
            why = TAKEN if wrong == held else "was made by another request; replace it with --overwrite"
            raise EditError(f"--output {str(wrong)!r} {why}, or choose another name")
    raise AssertionError("there is always a next number")


def _numbered(plan: Plan, job: Job, number: int) -> Job:
    """The job with a number in those of its paths that may have one."""
    names = ("path", *side_files(job, plan.medium))
    paths = {name: Output(path, path in plan.free) for name in names if (path := getattr(job, name))}
    changes: dict[str, Any] = {name: place.numbered(number) for name, place in paths.items()}
    return replace(job, **changes)


def _fixed(plan: Plan, job: Job) -> set[Path]:
    """Those of a job's files whose names are not ours."""
    own, *beside = _files(plan, job)
    sides = {*side_files(job, plan.medium).values()}
    named = {path: path if path in sides else own for path in (own, *beside)}  # comparisons follow their own
    return {path for path, by in named.items() if by not in plan.free}


def _files(plan: Plan, job: Job) -> list[Path]:
    """All that is written for a job, its own file first."""
    files = [job.path, *side_files(job, plan.medium).values()]
    return [*files, plan.medium.comparison_path(job.path, plan.compare)] if plan.compare else files

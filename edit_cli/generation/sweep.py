"""One thing at several budgets: its results side by side in a picture, and budgets that come to the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli.files import write_files
from edit_cli.generation.medium import Job
from edit_cli.generation.record import encode_picture

if TYPE_CHECKING:
    from edit_cli.generation.result import Result

SAME = 1e-6
"""Shares of the dense FLOPs that differ by less are equal."""


def is_sweep(jobs: Sequence[Job]) -> bool:
    """Whether one thing is made at several budgets, among jobs that have several."""
    return len({_apart(job) for job in jobs}) < len(jobs)


def finish(result: Result) -> None:
    """Write a strip for everything that was made at several budgets, and note budgets that change nothing."""
    groups: dict[Any, list[int]] = {}
    for i, job in enumerate(result.jobs):
        groups.setdefault(_apart(job), []).append(i)
    for group in groups.values():
        if len(group) > 1:
            _strip(result, group, len(groups) > 1)
            _compare(result, group)


def _apart(job: Job) -> tuple[Any, ...]:
    """All of a job but its budget and its places."""
    places = ("index", "path", "budget", "preview")
    return tuple(value for name, value in vars(job).items() if name not in places)


def _strip(result: Result, group: Sequence[int], several: bool) -> None:
    from edit_cli.generation.closeness import side_by_side

    jobs = [result.jobs[i] for i in group]
    shown = {f"budget {job.budget:g}": result.shown[job.index] for job in jobs if job.index in result.shown}
    stems = zip(*(job.path.stem for job in jobs), strict=False)
    same = itertools.takewhile(lambda characters: len(set(characters)) == 1, stems)
    prefix = "".join(characters[0] for characters in same).rstrip("-_ .0123456789")
    parts = [prefix.removesuffix("budget").rstrip("-_ "), str(jobs[0].seed) if several else "", "budgets"]
    path = _free(jobs[0].path.with_name("-".join(filter(None, parts)) + ".png"))
    write_files({path: encode_picture(side_by_side(shown), ".png", {})})
    result.written.append(path)
    result.strips.append(path)


def _free(path: Path) -> Path:
    names = (path if n == 1 else path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(1))
    return next(name for name in names if not name.exists())


def _compare(result: Result, group: Sequence[int]) -> None:
    for one, other in itertools.pairwise(sorted(group, key=lambda i: result.jobs[i].budget or 0.0)):
        if abs(result.spent[one] - result.spent[other]) < SAME:
            result.note(
                f"budgets {result.jobs[one].budget:g} and {result.jobs[other].budget:g} come to the same at "
                f"{result.jobs[one].steps} steps: {result.spent[one]:.2f} of the dense FLOPs"
            )

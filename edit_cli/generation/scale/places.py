"""What one process settles for all that share a command: which results are made, and in which files.

Each process makes the plan itself, from the same command and files; names are claimed by one of them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edit_cli.errors import EditError, RunError
from edit_cli.generation.medium import Job
from edit_cli.generation.plan import Plan, side_files
from edit_cli.request import Request

Places = Sequence[dict[str, Any]]
"""For each result its job's index and its files, by the names of the job's fields: plain data."""


def check_shared(request: Request) -> None:
    """Raises EditError for a command that other processes cannot read as well."""
    for name in ("prompts_file", "images_file"):
        if request.get(name) == "-":
            raise EditError(f"--{name.replace('_file', '')} - is read by one process only; give a file")


def places(plan: Plan) -> list[dict[str, Any]]:
    """Of a plan whose names are settled."""
    return [
        {
            "index": job.index,
            "files": {
                name: str(path.expanduser().absolute())
                for name, path in {"path": job.path, **side_files(job, plan.medium)}.items()
            },
        }
        for job in plan.jobs
    ]


def placed(plan: Plan, settled: Places) -> Plan:
    """A process's own plan with what was settled. Raises RunError for a plan of another command."""
    files = {entry["index"]: entry["files"] for entry in settled}
    jobs = [job for job in plan.jobs if job.index in files]
    if len(jobs) != len(files):
        raise RunError("the processes of this run were not given the same command and files")
    return replace(plan, jobs=tuple(_moved(job, files[job.index]) for job in jobs))


def _moved(job: Job, files: dict[str, str]) -> Job:
    changes: dict[str, Any] = {name: Path(path) for name, path in files.items()}
    return replace(job, **changes)

"""A result that its file's format cannot hold is kept in another way: nothing that was made is lost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbones.model_files import first_line
from edit_cli.errors import EditError, RunError
from edit_cli.files import Claims, write_files
from edit_cli.generation.medium import Job
from edit_cli.generation.outputs import Output
from edit_cli.generation.record import same_request
from edit_cli.generation.result import Result


def save_otherwise(job: Job, made: Any, record: Mapping[str, Any], result: Result, error: Exception) -> Job:
    """Write a result that could not be encoded: in the format without limits, at worst without its record.

    Beside its own place, under a name that is free or was this request's. Returns the job with that path;
    the report gets a note. Raises RunError where nothing can hold it.
    """
    medium = result.plan.medium
    with Claims() as claims:
        kept = replace(job, path=_free(job, result, claims))
        ways: dict[str, Mapping[str, Any]] = {"": record, ", without the record that --from reads": {}}
        for without, held in ways.items():
            try:
                files = medium.encode(kept, made, held)
            except Exception:  # encoders raise anything
                continue
            for path, data in files.items():
                write_files({path: data})
                result.written.append(path)
            result.note(
                f"{str(job.path)!r} cannot be encoded ({first_line(error)[:100]}); kept as "
                f"{str(kept.path)!r}{without}"
            )
            return kept
    raise RunError(f"{str(job.path)!r} cannot be encoded: {first_line(error)[:100]}") from error


def _free(job: Job, result: Result, claims: Claims) -> Path:
    """The job's own name with another suffix, and a number where that is taken."""
    medium = result.plan.medium
    suffix = medium.safest(job.path)
    if job.path.suffix.lower() == suffix:
        return job.path
    place = Output(job.path.with_suffix(suffix), free=True)
    for path in map(place.numbered, itertools.count(1)):
        if not claims.take(path):
            continue
        if not path.exists():
            return path
        try:
            earlier = medium.read_record(str(path))
        except EditError:  # somebody else's file
            earlier = {}
        if earlier and same_request(earlier, result.plan, job):
            return path
        claims.give_back([path])
    raise AssertionError("there is always a next number")

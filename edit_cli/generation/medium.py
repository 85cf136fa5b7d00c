"""A job: one result to make. And the media, which say in what pictures and meshes differ. Torch-free.

Plan, session, loop, record, report and dry run know a `Medium` and a `Job`. A medium is one object with the
same attributes and methods as its fellows (`picture.py` is the one to read, and mypy compares them):

    makes, things              as models say it, and its plural
    job, options               class of its jobs; what may be said of one result, by name
    subject, joined_by         the option that says what to make; the one with which all make one result
    list_option, example       the option that names a file of subjects; a JSON line of it
    missing                    the error where nothing is to be made
    stages                     of a run, in order, with names for people
    suffixes, placeholders     of files, the first is the default; fields of names beside `outputs`' own
    beside                     options that ask for another file, with its suffixes
    recorded_fields, per_row   of a job: in its record as they are; in which jobs of one batch may differ
    recorded_rows              of the rest of a batch: what decides the rounding
    recorded_as                where a record has another name for an option
    libraries, imports         whose versions are recorded; what to import before anything is timed
    smaller                    what to try when memory runs out
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from edit_cli.generation.mesh import Mesh
    from edit_cli.generation.picture import Picture

Medium: TypeAlias = "Picture | Mesh"
Fields = dict[str, Any]
"""Checked values of one request, by the names of its medium's options."""
OnStep = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One result to make. budget, target, solver None: what is recommended, "dense", the model's own.

    time: seconds to spend on it, None for as many as it takes. turns: how the plan of a replayed result came
    about, where it was not chosen at once (`routers.planned.course`).
    """

    index: int
    path: Path
    seed: int
    steps: int
    guidance: float
    budget: float | None
    solver: str | None
    target: str | None = None
    time: float | None = None
    turns: tuple[tuple[int, int], ...] = ()

    @property
    def denoising_steps(self) -> int:
        """Steps that the sampler really takes."""
        return self.steps

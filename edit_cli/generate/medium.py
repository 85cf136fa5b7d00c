"""What a picture and a mesh have in common, and the one place that says in what they differ. Torch-free.

Plan, session, loop, report and dry run know a `Medium` and a `Job`; `picture.py` and `mesh.py` fill them in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from backbones.spec import Backbone, CallSize, Makes
from edit_cli.request import Options, Request

if TYPE_CHECKING:
    from PIL import Image

    from edit_cli.generate.session import Session
    from routers.calibrate.workload import Workload

Fields = dict[str, Any]
"""Checked values of one request, by the names of its medium's options."""
OnStep = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One result to make. budget, solver None: what the routers recommend, the model's own."""

    index: int
    path: Path
    seed: int
    steps: int
    guidance: float
    budget: float | None
    solver: str | None

    @property
    def denoising_steps(self) -> int:
        """Steps that the sampler really takes."""
        return self.steps


class Medium(ABC):
    """In what one kind of result differs from the others.

    makes: as models say it. things: the plural. command: what makes them. job: class of its jobs.
    options: what may be said of one result, by name. subject: the option that says what to make;
    list_option: the one that names a file of them. missing: the error where nothing is to be made.
    example: a JSON line.
    stages: of a run, in order, with names for people. suffixes: of files, the first is the default.
    recorded_fields: of a job, as they stand in its record. per_row: fields in which jobs of one batch may
    differ. recorded_rows: those that decide the rounding.
    libraries: whose versions are recorded. smaller: what to try when memory runs out.
    """

    makes: ClassVar[Makes]
    things: ClassVar[str]
    command: ClassVar[str]
    job: ClassVar[type[Job]]
    options: ClassVar[Options]
    subject: ClassVar[str]
    list_option: ClassVar[str]
    missing: ClassVar[str]
    example: ClassVar[str]
    stages: ClassVar[Mapping[str, str]]
    suffixes: ClassVar[tuple[str, ...]]
    recorded_fields: ClassVar[tuple[str, ...]]
    per_row: ClassVar[tuple[str, ...]]
    recorded_rows: ClassVar[tuple[str, ...]]
    libraries: ClassVar[tuple[str, ...]]
    smaller: ClassVar[str]

    # -- plan: before anything is loaded ---------------------------------------------------------

    def entries(self, request: Request) -> list[Fields]:
        """One per result that was typed, before seeds and lines of a list."""
        return [{self.subject: value} for value in request.get(self.subject, ())]

    @abstractmethod
    def complete(self, fields: Fields, backbone: Backbone, warnings: list[str]) -> Fields:
        """The job's own fields: defaults filled in, and checked as far as it depends on the model."""

    @abstractmethod
    def title(self, job: Job) -> str:
        """What a result is called: in reports, and as a slug in names of files."""

    def with_side_files(self, jobs: Sequence[Job], _request: Request) -> Sequence[Job]:
        """Jobs with the paths of what is written beside their results."""
        return jobs

    @abstractmethod
    def peer(self, row: Mapping[str, Any]) -> Fields:
        """Fields of another row of a recorded batch."""

    def side_files(self, _job: Job) -> Mapping[str, Path]:
        """What is written beside a result, by the name of its list in the JSON report."""
        return {}

    def group(self, job: Job) -> tuple[Any, ...]:
        """Jobs with equal groups may share a batch: these fields exist once per pipeline call."""
        return tuple(v for name, v in vars(job).items() if name not in ("index", "path", *self.per_row))

    # -- session: with a loaded pipeline ---------------------------------------------------------

    def import_libraries(self) -> None:  # noqa: B027 - most media need none
        """Import what a stage needs, so that its import is not measured as the stage."""

    def pipe(self, session: Session, _job: Job) -> Any:
        """The pipeline that makes a job."""
        return session.pipe

    @abstractmethod
    def call(self, session: Session, pipe: Any, jobs: Sequence[Job], on_step: OnStep) -> list[Any]:
        """Make a batch. A result that failed by itself is its RunError."""

    @abstractmethod
    def shortest(self, job: Job) -> Job:
        """The same with as little work as can be, to warm up."""

    @abstractmethod
    def size(self, jobs: Sequence[Job]) -> str:
        """How large results are, in a few words."""

    # -- results ---------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, made: Any, suffix: str, record: Mapping[str, Any]) -> bytes:
        """A result as a file's bytes, with its record where the format can hold one."""

    def encode_side_files(self, _job: Job, _made: Any) -> dict[Path, bytes]:
        """What is written beside a result."""
        return {}

    @abstractmethod
    def read_record(self, path: str) -> dict[str, Any]:
        """The record in a file made by `edit`. Raises EditError."""

    def recorded(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """A record's fields under the names of the options."""
        return record

    @abstractmethod
    def record(self, job: Job, session: Session) -> dict[str, Any]:
        """A record's entries that only this medium has."""

    def facts(self, _made: Any) -> dict[str, Any]:
        """What is reported of a result."""
        return {}

    @abstractmethod
    def told(self, job: Job, facts: Mapping[str, Any]) -> str:
        """The last column of the report's list of files."""

    @abstractmethod
    def picture(self, made: Any) -> Any:
        """A result as a PIL image, as reports show it."""

    @abstractmethod
    def thumbnail(self, made: Any) -> Image.Image:
        """A result as a report shows it."""

    # -- samples, to measure and calibrate on -----------------------------------------------------

    @abstractmethod
    def identity(self, job: Job) -> str:
        """What a job is made of: its prompt, or a hash of its pictures."""

    @abstractmethod
    def workload(self, session: Session, jobs: Sequence[Job], rows: int) -> Workload:
        """Jobs of one group, whose seeds follow one another, up to their latents, in batches of `rows`."""

    # -- comparison with the dense model ---------------------------------------------------------

    @abstractmethod
    def comparison_path(self, path: Path) -> Path:
        """Where what is compared with goes."""

    @abstractmethod
    def compare(self, made: Any, dense: Any) -> dict[str, float]:
        """Measures of how near a result is to the dense one."""

    @abstractmethod
    def encode_comparison(self, made: Any, dense: Any, spent: float, suffix: str) -> bytes:
        """The file beside a compared result."""

    def compared_seconds(self, seconds: Mapping[str, float]) -> Any:
        """Of seconds by stage, what a comparison reports."""
        return round(seconds["denoise"], 4)

    @abstractmethod
    def comparison_line(self, comparison: Mapping[str, Any]) -> str:
        """The comparison for people."""

    # -- dry run ---------------------------------------------------------------------------------

    @abstractmethod
    def calls(self, job: Job, backbone: Backbone) -> list[CallSize]:
        """Sizes of the transformer calls of one step, for one result."""

    @abstractmethod
    def stream(self, job: Job, backbone: Backbone) -> tuple[int, int]:
        """Tokens and width of what a block hands on, for one row."""

    def needs(self, _jobs: Sequence[Job]) -> dict[str, tuple[float, str]]:
        """GiB of memory beside the weights' device, with a sentence for people."""
        return {}

"""What the commands do, from Python, with results in memory. Imports torch when something is made.

`edit_cli.generate("a cat", budget=0.6).save("cat.png")`, `edit_cli.generate_3d("cat.png").save("cat.glb")`
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edit_cli.commands.keywords import Generate3dOptions, GenerateOptions
    from edit_cli.generation.medium import Fields, Job, Medium
    from edit_cli.generation.plan import Plan
    from edit_cli.generation.session import Session
    from edit_cli.request import Command

Texts = str | os.PathLike[str]
Subject = Texts | Mapping[str, Any]
"""A prompt or a picture's file; or with fields of its own, as in a JSON line: {"prompt": ..., "seed": 7}."""
OF_FILES = "Output"
"""Heading of the options that say what is written and told; here that is `save` and the result itself."""


@dataclass(frozen=True)
class Made:
    """One result. value: a PIL image, a trimesh, a video's list of frames, or a sound's waves.

    seed, spent: with what it was made, and which share of the dense FLOPs. record: what its file will hold,
    so that `edit generate --from` makes it again.
    """

    value: Any
    record: Mapping[str, Any] = field(repr=False)
    _raw: Any = field(repr=False)
    _job: Job = field(repr=False)
    _medium: Medium = field(repr=False)

    @property
    def seed(self) -> int:
        """Of its noise."""
        return self._job.seed

    @property
    def spent(self) -> float:
        """Share of the dense FLOPs."""
        return float(self.record["spent"])

    def save(self, path: Texts) -> Path:
        """Write it with its record; the suffix says in which format. Replaces a file. Raises EditError."""
        from edit_cli.files import write_files

        target = Path(path).expanduser()
        if target.suffix.lower() not in self._medium.suffixes:
            from edit_cli.errors import EditError

            allowed = ", ".join(self._medium.suffixes)
            raise EditError(f"save {str(path)!r} has suffix {target.suffix!r}; allowed are {allowed}")
        self._medium.check_path(target)
        write_files(self._medium.encode(replace(self._job, path=target), self._raw, self.record))
        return target


class Results(Sequence[Made]):
    """What one call made, in order. notes: what the report would say beside it. seconds: by stage."""

    def __init__(self, made: Iterable[Made], notes: Sequence[str], seconds: Mapping[str, float]) -> None:
        self._made = tuple(made)
        self.notes, self.seconds = tuple(notes), dict(seconds)

    @overload
    def __getitem__(self, index: int) -> Made: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Made]: ...
    def __getitem__(self, index: int | slice) -> Made | Sequence[Made]:
        """One result, or some of them."""
        return self._made[index]

    def __len__(self) -> int:
        """How many there are."""
        return len(self._made)

    @property
    def value(self) -> Any:
        """The only result's: a PIL image, a trimesh... Raises ValueError where there are several."""
        (only,) = self._made
        return only.value

    def save(self, output: Texts = ".") -> list[Path]:
        """Write all: to a file, a folder (ends with / or exists), or a template with {prompt} {seed} {index}.

        In a folder names are new; a file that is named is replaced. Raises EditError.
        """
        return [made.save(path) for made, path in zip(self._made, self._paths(str(output)), strict=True)]

    def _paths(self, output: str) -> Iterator[Path]:
        from edit_cli.generation.outputs import plan_outputs

        names = [
            {
                **made._medium.placeholders, "prompt": made._medium.title(vars(made._job)), "seed": made.seed,
                "index": index, "budget": made.record["budget"], "model": made.record["model"],
            }
            for index, made in enumerate(self._made)
        ]  # fmt: skip
        for place in plan_outputs(output, names, self._made[0]._medium.suffixes, "save"):
            place.path.parent.mkdir(parents=True, exist_ok=True)
            numbered = map(place.numbered, itertools.count(1))
            yield next(path for path in numbered if not place.free or not path.exists())


def generate(prompt: Subject | Sequence[Subject] = (), **options: Unpack[GenerateOptions]) -> Results:
    """Pictures (videos, sounds) of prompts, as `edit generate` makes them.

    prompt: one or several, each a text or {"prompt": ..., "seed": ..., "budget": ...} with the fields that a
    JSON line of --prompts may have; those that differ in prompt and seed alone share a call.

    options: those of the command by their long names, `num_images=4`, `budget=0.6`, `model="flux-tiny"`,
    `preset="fast"`; see docs/cli.md. The model stays loaded for the next call with the same one.
    Raises EditError for bad input, RunError for a failed run; warns as the command does.
    """
    return make("generate", prompt, options)


def generate_3d(image: Subject | Sequence[Subject] = (), **options: Unpack[Generate3dOptions]) -> Results:
    """Meshes of pictures' files, as `edit generate-3d` makes them. options, errors: as of `generate`."""
    return make("generate-3d", image, options)


def forget() -> None:
    """Free the model that the last call loaded."""
    _kept.clear()


_kept: dict[Any, Session] = {}
"""The session of the last call, by what it was opened for."""


def make(name: str, subjects: Subject | Sequence[Subject], given: Mapping[str, Any]) -> Results:
    """What a command of this name makes of its argument and options."""
    from edit_cli.commands.app import COMMANDS
    from edit_cli.generation.mesh import MESH
    from edit_cli.generation.picture import PICTURE
    from edit_cli.generation.plan import make_plan

    command = COMMANDS[name]
    medium: Medium = MESH if name == "generate-3d" else PICTURE
    items: list[Subject] = [subjects] if isinstance(subjects, (str, os.PathLike, Mapping)) else list(subjects)
    plain = [os.fspath(item) for item in items if not isinstance(item, Mapping)]
    listed: list[Fields] = []
    if len(plain) < len(items):
        listed, plain = [_fields(item, f"item {i}", medium) for i, item in enumerate(items)], []
    request, _ = command.request({**_values(command, given), medium.subject: plain})
    plan = make_plan(request, medium, kept=False, listed=listed)
    if "fit" in request:
        from edit_cli.generation.fit import fitted

        plan, note = fitted(plan)
        plan = replace(plan, warnings=(*plan.warnings, note))
    results = _run(plan)
    for note in dict.fromkeys((*plan.warnings, *results.notes)):
        warnings.warn(note, stacklevel=3)
    return results


def _fields(subject: Subject, where: str, medium: Medium) -> Fields:
    """Of one result, checked. Raises EditError."""
    from edit_cli.generation.prompts import checked_fields

    fields = subject if isinstance(subject, Mapping) else {medium.subject: os.fspath(subject)}
    return checked_fields(fields, where, medium)


def spoken(command: Command) -> dict[str, str]:
    """The keywords of a command, and which option each is: long names with underscores, and own names."""
    known: dict[str, str] = {}
    for name, option in command.options.items():
        if option.is_argument or option.panel == OF_FILES:
            continue
        long = [text.lstrip("-").replace("-", "_") for text in option.spellings if text.startswith("--")]
        known |= dict.fromkeys([*(text for text in long if text.isidentifier()), name], name)
    known.pop("from", None)  # a keyword of Python; `replay`
    return known


def _values(command: Command, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by name, as Typer would give them."""
    known, values = spoken(command), {}
    for key, value in given.items():
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see docs/cli.md"
            raise TypeError(f"{command.__name__}() has no option {key!r}; {hint}")
        option = command.options[known[key]]
        several = isinstance(value, (list, tuple))
        items = [os.fspath(v) if isinstance(v, os.PathLike) else v for v in (value if several else [value])]
        values[known[key]] = items if option.many else items[0] if not several else items
    return values


def _run(plan: Plan) -> Results:
    """Make every result of a plan, with the session of the last call where it fits."""
    from edit_cli.errors import bad_input
    from edit_cli.generation.record import make_record
    from edit_cli.generation.result import StageClock
    from edit_cli.generation.routers import settle

    clock, made, notes = StageClock(plan.medium.stages), [], []
    with clock.stage("load"), bad_input():
        plan, source = settle(plan)
        session = _session(plan, source, clock)
    notes += [*session.notes, *source.notes(plan.jobs)]
    session.attach()
    try:
        for jobs, rows in session.batches():
            batch = session.run(jobs)
            for row in rows:
                raw = batch.results[row]
                if isinstance(raw, Exception):
                    raise raw
                record = make_record(batch, row, session)
                value = getattr(raw, "mesh", raw)
                made.append(Made(value, record, raw, batch.jobs[row], plan.medium))
            notes += batch.trace.notes
    finally:
        session.detach()
    order = sorted(made, key=lambda each: each._job.index)
    return Results(order, list(dict.fromkeys(notes)), clock.report())


def _session(plan: Plan, source: Any, clock: Any) -> Session:
    from backbones.solvers import check_solver
    from edit_cli.generation.session import Session

    key = (plan.backbone.address, plan.backbone.file, plan.routers, plan.placement, plan.force, source.digest)
    session = _kept.get(key)
    if session is None:
        forget()
        session = _kept[key] = Session.open(plan, source, clock)
        return session
    for name in filter(None, {job.solver for job in plan.jobs}):
        check_solver(session.pipe, name)
    session.plan = replace(plan, backbone=session.plan.backbone)  # what a first call told is kept
    session.source, session.clock, session.notes = source, clock, []
    return session

"""What `edit calibrate` does once it is planned: open, fit or train, measure, save."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import routers
from edit_cli import __version__
from edit_cli.calibrate import forecast, report, training
from edit_cli.calibrate.plan import CalibrationPlan
from edit_cli.console import phases, print_note, print_warning, progress
from edit_cli.errors import INTERRUPTED, EditError, RunError, bad_input
from edit_cli.files import ANY, claimed_folder, reason, whole_folder
from edit_cli.generation.result import StageClock
from edit_cli.generation.routers import RouterSource
from edit_cli.generation.scale.crew import Crew
from edit_cli.generation.session import Session
from routers.attachment import architecture, attach, check_fits, fingerprint
from routers.bundle import DESCRIPTION, FILES
from routers.calibrate.evaluate import Quality, as_metadata, evaluate, recommend
from routers.calibrate.fit import fit
from routers.calibrate.state import State
from routers.calibrate.workload import NotFiniteError, Workload


class Stopped(EditError):  # noqa: N818 - not an error
    """Ctrl-C."""

    exit_code = INTERRUPTED


@dataclass
class Calibration:
    """A loaded model with its calibration and held-out samples.

    processes: of a training (accelerate), or a `Crew`, of a fit. data [samples, L, C]: latents of the
    pictures it learns from.
    beside: trained routers, where plans are made for them too. seconds: by phase.
    """

    plan: CalibrationPlan
    session: Session
    train: Workload
    judge: Workload
    processes: Any = None
    data: torch.Tensor | None = None
    state: State | None = None
    beside: routers.Bundle | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, plan: CalibrationPlan, crew: Crew | None = None) -> Calibration:
        """Load the model. Raises EditError or ValueError for bad input."""
        generation, medium = plan.generation, plan.generation.medium
        if crew is not None:
            generation = replace(generation, placement=crew.own_device(generation.placement))
        # before the model is loaded: it goes to the device of this process
        processes = crew if plan.training is None else training.open_processes(plan)
        session = Session.open(generation, RouterSource(), StageClock(medium.stages))
        rows = generation.batch_size
        train, judge = (medium.workload(session, jobs, rows) for jobs in (generation.jobs, plan.held_out))
        data = training.encode_pictures(plan, session) if plan.pictures else None
        beside = None if plan.routers is None else read_beside(plan.routers, session.pipe.transformer)
        return cls(plan, session, train, judge, processes, data, beside=beside)

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes: of several in a training, the first."""
        return self.processes is None or bool(self.processes.is_main_process)

    @property
    def transformer(self) -> Any:
        """The dense transformer."""
        return self.session.pipe.transformer

    def begin(self, output: Path) -> None:
        """Start the state beside the output, or resume what an interrupted run left. Raises EditError."""
        self.state, resume = State(output.parent / f".{output.name}.calibrate-state"), self.plan.resume
        if not self.is_main:
            self.processes.wait_for_everyone()
            self.state.begin(self._identity(), True)
            return
        if self.state.folder.is_dir() and not resume and not self.plan.overwrite:
            raise EditError(
                f"an unfinished calibration lies beside {str(output)!r}; continue it with --resume, "
                "or discard it with --overwrite"
            )
        try:
            resumed = self.state.begin(self._identity(), resume)  # fails before the work, not after it
        except OSError as error:
            raise EditError(_unwritable(output, error)) from error
        if resume and not resumed:
            print_warning(f"nothing to resume beside {str(output)!r}: starting from the beginning")
        if self.processes is not None:
            self.processes.wait_for_everyone()

    def make(self, output: Path, bars: Any) -> routers.Bundle:
        """A new bundle. Raises RunError if the state cannot be kept."""
        method = "fit" if self.plan.training is None else "train"
        with self._timed(method):
            try:
                return self._fit(bars) if method == "fit" else training.train(self, output, bars)
            except OSError as error:
                raise RunError(
                    f"the progress of the calibration cannot be written: {error.strerror or error}; "
                    "make room and continue with --resume"
                ) from error

    def _fit(self, bars: Any) -> routers.Bundle:
        backbone = self.plan.generation.backbone
        bundle = fit(
            self.transformer, backbone.family.transformer, self.train, backbone.name,
            self.plan.generation.jobs[0].guidance, self.plan.fitted, phases(bars), self.state,
            None if self.beside is None else self.beside.trained, self.processes,
        )  # fmt: skip
        if self.beside is not None:
            bundle.metadata["routers"] = self.beside.digest
        return bundle

    def load(self, path: str) -> routers.Bundle:
        """An existing bundle, checked against this model."""
        bundle = routers.load_bundle(path)
        attach(self.session.pipe, bundle, budget=1.0).detach()
        return bundle

    def measure(self, bundle: routers.Bundle, bars: Any) -> list[Quality]:
        """Quality, spend and time at every budget, on the held-out samples."""
        served = {round(max(budget, bundle.min_budget), 3) for budget in self.plan.budgets}
        report = phases(bars)
        with self._timed("measure"):
            return evaluate(bundle, self.judge, sorted(served), lambda d, t: report("measure", d, t))

    def save(self, bundle: routers.Bundle, rows: Sequence[Quality], output: Path, quiet: bool) -> None:
        """Record how the bundle was made, write it with its plot and forget the state. Raises RunError."""
        inputs, things = self._inputs()
        bundle.recommended_budget = recommend(rows)
        bundle.metadata |= {
            "quality": as_metadata(rows),
            **({} if self.plan.training else {"settings": asdict(self.plan.fitted)}),
            "request_hash": self.plan.asked,
            things: len(set(inputs)),
            "inputs_sha256": _digest(inputs),
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "threads": torch.get_num_threads(),
            "versions": {"edit": __version__, "torch": torch.__version__, "diffusers": version("diffusers")},
        }
        try:
            with whole_folder(output, {*FILES, report.PLOT}) as folder:
                bundle.save(folder)
                drawn = report.plot(bundle, folder)
        except RunError as error:
            raise RunError(f"{error}; make room and continue with --resume") from error
        if drawn is None and not quiet:
            print_warning('no plot was drawn: it needs matplotlib; pip install "elastic-dit[bench]"')
        if self.state is not None:
            self.state.discard()

    def _inputs(self) -> tuple[list[str], str]:
        """What the samples are made of, and its name: prompts, or hashes of pictures."""
        jobs, medium = self.plan.generation.jobs, self.plan.generation.medium
        return [medium.identity(job) for job in jobs], f"{medium.subject}s"

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that was interrupted."""
        plan, train, (inputs, things) = self.plan, self.train, self._inputs()
        jobs, medium = plan.generation.jobs, plan.generation.medium
        return {
            "model": plan.generation.backbone.name,
            "architecture": architecture(self.transformer),
            "weights": fingerprint(self.transformer),
            "dtype": str(next(self.transformer.parameters()).dtype),
            things: _digest(inputs),
            "samples": len(jobs),
            "batch size": train.rows,
            "steps": train.num_steps,
            "guidance": jobs[0].guidance,
            "seed": jobs[0].seed,
            **({} if plan.training else {"fit": asdict(plan.fitted)}),
            "size": medium.size(jobs),
            **({} if self.beside is None else {"routers": self.beside.digest}),
            **({"method": "fit"} if plan.training is None else training.identity(self)),
        }

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


def read_beside(path: str, transformer: Any) -> routers.Bundle:
    """Trained routers that decide over the model's own weights. Raises ValueError."""
    bundle = routers.load_bundle(path)
    if bundle.trained is None:
        raise ValueError(f"--routers {path!r} holds no trained routers; make them with --method train")
    if bundle.trained.backbone is not None:
        raise ValueError(
            f"--routers {path!r} holds weights of the backbone too, and plans are made for the model's own: "
            "make them its own with: edit export --format diffusers"
        )
    check_fits(bundle, transformer)
    return bundle


def run_calibration(
    plan: CalibrationPlan, quiet: bool, crew: Crew | None = None
) -> tuple[routers.Bundle, list[Quality]] | None:
    """Make or load the bundle, measure it, save a new one; None in helping processes.

    crew: of processes that share a fit: they make its plans together, the first one measures.
    Raises EditError for bad input, RunError for a failed run, Stopped on Ctrl-C.
    """
    with ExitStack() as names:
        if crew is not None and not crew.leads and plan.output is None:
            return None
        if plan.training is None and (crew is None or crew.leads):
            _claim(plan, names)
        with bad_input():
            calibration = Calibration.open(plan, crew)
        if plan.training is not None and calibration.is_main:
            _claim(plan, names)
        return _run(calibration, quiet)


def _claim(plan: CalibrationPlan, names: ExitStack) -> None:
    """The name of the bundle is this run's alone. Raises EditError."""
    if plan.output is not None:
        may_replace = (plan.asked, ANY) if plan.overwrite else (plan.asked,)
        names.enter_context(claimed_folder(plan.output, "bundle", DESCRIPTION, may_replace))


def _run(calibration: Calibration, quiet: bool) -> tuple[routers.Bundle, list[Quality]] | None:
    plan = calibration.plan
    output = plan.output
    try:
        with bad_input():
            if output is None:
                bundle = calibration.load(plan.evaluate or "")
            else:
                calibration.begin(output)
        if plan.training is None and not quiet and calibration.is_main:
            print_note(forecast.note(plan, calibration.train, calibration.session.device))
        with progress(not quiet and calibration.is_main) as bars, bad_input():
            if output is not None:
                bundle = calibration.make(output, bars)
            if not calibration.is_main:
                return None
            rows = calibration.measure(bundle, bars)
    except NotFiniteError as error:
        raise RunError(str(error)) from error
    except KeyboardInterrupt:
        kept = "; continue with --resume" if output is not None else ""
        raise Stopped(f"interrupted; no bundle was written{kept}") from None
    if output is not None:
        calibration.save(bundle, rows, output, quiet)
    return bundle, rows


def _digest(inputs: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(inputs).encode()).hexdigest()


def _unwritable(folder: Path, error: OSError) -> str:
    return f"bundle folder {str(folder)!r} cannot be written: {reason(error)}"

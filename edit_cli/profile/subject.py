"""What is profiled: a picture or a mesh pipeline behind one interface, run round by round.

A round generates every sample of the request once, at one budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from PIL import Image

from edit_cli.errors import bad_input
from edit_cli.generate.clock import STAGES, StageClock
from edit_cli.generate.cutout import cut_out, open_rgba
from edit_cli.generate.mesh_compare import compare_meshes
from edit_cli.generate.mesh_loop import settle_mesh_budgets
from edit_cli.generate.mesh_plan import MeshPlan
from edit_cli.generate.mesh_session import STAGES as MESH_STAGES
from edit_cli.generate.mesh_session import Made, MeshSession
from edit_cli.generate.pictures import psnr, ssim
from edit_cli.generate.plan import Plan
from edit_cli.generate.session import RouterSource, Session, denoising_steps, settle_budgets
from edit_cli.generate.turntable import turntable
from routers.elastic import Elastic

PREVIEW_SIDE = 224
"""Side of a mesh's view in the report, px."""


@dataclass
class Round:
    """What one round gave. results: pictures or meshes in sample order. traces: per pipeline call."""

    seconds: dict[str, float]
    results: list[Any] = field(default_factory=list)
    traces: list[Any] = field(default_factory=list)


class Subject(Protocol):
    """A loaded pipeline with the request to run on it."""

    stages: tuple[str, ...]
    steps: int
    guidance: float
    load_seconds: float
    budgets: tuple[float | None, ...]

    @property
    def elastic(self) -> Elastic | None:
        """The attached transformer; None while detached."""

    @property
    def pipe(self) -> Any:
        """The pipeline, with a `transformer`."""

    @property
    def bundle(self) -> Any:
        """The routers' bundle, or None."""

    @property
    def device(self) -> torch.device:
        """Where the transformer runs, also where its weights lie elsewhere between calls (offloading)."""

    def attach(self) -> None:
        """Put the blocks under control of the routers."""

    def detach(self) -> None:
        """Leave a clean model."""

    def run(
        self, budget: float | None, call: Callable[[Callable[[], Any]], Any] = lambda run: run()
    ) -> Round:
        """One round. call: wraps every pipeline call (to set up and read a timer)."""

    def picture(self, result: Any) -> Image.Image:
        """A result as it is shown."""

    def quality(self, results: Sequence[Any], dense: Sequence[Any]) -> dict[str, list[float]]:
        """Named measures per sample of how near results are to dense ones."""


class _OfSession:
    """What subjects of both kinds take from their session."""

    _session: Any

    @property
    def elastic(self) -> Elastic | None:
        """The attached transformer."""
        elastic: Elastic | None = self._session.elastic
        return elastic

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self._session.pipe

    def attach(self) -> None:
        """Put the blocks under control of the routers."""
        self._session.attach()

    def detach(self) -> None:
        """Leave a clean model."""
        self._session.detach()


class PictureSubject(_OfSession):
    """A diffusers pipeline."""

    stages = STAGES

    def __init__(self, plan: Plan, budgets: Sequence[float | None]) -> None:
        clock = StageClock()
        with clock.stage("load"):
            source = RouterSource.read(plan.routers)
            settled = [settle_budgets(_at(plan, budget), source).jobs[0].budget for budget in budgets]
            self.budgets: tuple[float | None, ...] = tuple(settled)
            self._session = Session.open(_at(plan, settled[0]), source, clock)
        self.load_seconds = clock.seconds["load"]
        self.plan, first = plan, plan.jobs[0]
        self.steps, self.guidance = denoising_steps(first), first.guidance
        self.bundle, self.released = source.bundle, source.release is not None
        self.notes = self._session.notes

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return torch.device(self._session.pipe._execution_device)

    def run(
        self, budget: float | None, call: Callable[[Callable[[], Any]], Any] = lambda run: run()
    ) -> Round:
        """One round of all batches."""
        clock = self._session.clock = StageClock()
        done = Round(clock.seconds)
        for jobs in _at(self.plan, budget).batches():
            batch = call(lambda jobs=jobs: self._session.run(jobs))  # type: ignore[misc]
            done.results += batch.pictures
            done.traces.append(batch.trace)
        return done

    def picture(self, result: Any) -> Image.Image:
        """A picture is shown as it is."""
        picture: Image.Image = result
        return picture

    def quality(self, results: Sequence[Any], dense: Sequence[Any]) -> dict[str, list[float]]:
        """PSNR in dB (99 for equal pictures) and SSIM."""
        pairs = [*zip(dense, results, strict=True)]
        return {
            "psnr": [round(min(psnr(a, b), 99.0), 2) for a, b in pairs],
            "ssim": [round(ssim(a, b), 4) for a, b in pairs],
        }


class MeshSubject(_OfSession):
    """An image-to-mesh pipeline."""

    stages = MESH_STAGES

    def __init__(self, plan: MeshPlan, budgets: Sequence[float | None]) -> None:
        # bad pictures are refused before the model is loaded
        self._inputs = [
            [cut_out(open_rgba(name), job.remove_background, name)[0] for name in job.images]
            for job in plan.jobs
        ]
        settled = [settle_mesh_budgets(_at(plan, budget)) for budget in budgets]
        self.budgets: tuple[float | None, ...] = tuple(found.jobs[0].budget for found, _ in settled)
        self.bundle, self.plan, self.released = settled[0][1], plan, False
        clock = StageClock(MESH_STAGES)
        with clock.stage("load"):
            self._session = MeshSession.open(plan.backbone, plan.placement, self.bundle, plan.force, clock)
        self.load_seconds = clock.seconds["load"]
        self.steps, self.guidance = plan.jobs[0].steps, plan.jobs[0].guidance
        self.notes = self._session.notes

    @property
    def device(self) -> torch.device:
        """Where the transformer runs."""
        return torch.device(self._session.pipe.device)

    def run(
        self, budget: float | None, call: Callable[[Callable[[], Any]], Any] = lambda run: run()
    ) -> Round:
        """One round of all meshes, one after the other."""
        clock = self._session.clock = StageClock(MESH_STAGES)
        done = Round(clock.seconds)
        for job, pictures in zip(_at(self.plan, budget).jobs, self._inputs, strict=True):
            contexts = self._session.condition(pictures, job.views)
            made: Made = call(lambda job=job, contexts=contexts: self._session.make(job, contexts))  # type: ignore[misc]
            done.results.append(made)
            done.traces.append(made.trace)
        return done

    def picture(self, result: Any) -> Image.Image:
        """A mesh is shown from the front."""
        return turntable(result.mesh, PREVIEW_SIDE).crop((0, 0, PREVIEW_SIDE, PREVIEW_SIDE))

    def quality(self, results: Sequence[Any], dense: Sequence[Any]) -> dict[str, list[float]]:
        """Chamfer distance as a share of the box, F-score and volume IoU."""
        found = [
            compare_meshes(a.mesh, b.mesh, a.volume, b.volume) for a, b in zip(results, dense, strict=True)
        ]
        return {name: [each[name] for each in found] for name in found[0]}


def open_subject(plan: Plan | MeshPlan, budgets: Sequence[float | None]) -> PictureSubject | MeshSubject:
    """Load what a plan names. Raises EditError for bad input."""
    with bad_input():
        if isinstance(plan, MeshPlan):
            return MeshSubject(plan, budgets)
        return PictureSubject(plan, budgets)


def _at(plan: Any, budget: float | None) -> Any:
    return replace(plan, jobs=tuple(replace(job, budget=budget) for job in plan.jobs))

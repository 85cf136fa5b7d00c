"""The routers of a run: which, read from where, what they serve. Torch-free until they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbones.spec import Backbone
from edit_cli.errors import EditError, bad_input
from edit_cli.generation.medium import Job
from routers.planned.spent import evaluations_for
from routers.spec import TARGETS

if TYPE_CHECKING:
    from edit_cli.generation.plan import Plan

DEFAULT_ROUTERS, NO_ROUTERS = "default", "none"


def find_routers(name: str, backbone: Backbone) -> Path | None:
    """The bundle or the paper's checkpoint to use, or None for the dense model. Raises EditError."""
    if name == NO_ROUTERS:
        return None
    if name == DEFAULT_ROUTERS:
        return backbone.bundle
    path = Path(name).expanduser()
    if not path.exists():
        raise EditError(
            f"--routers {name!r} does not exist; give a bundle folder, a .safetensors file, or none"
        )
    return path


def routers_name(path: Path | None, backbone: Backbone) -> str:
    """What `find_routers` finds `path` by again, for a record."""
    if path is None:
        return NO_ROUTERS
    return DEFAULT_ROUTERS if path == backbone.bundle else str(path.resolve())


def routers_label(path: Path | None, backbone: Backbone) -> str:
    """The routers for people."""
    if path is None:
        return "no routers"
    return "its own routers" if path == backbone.bundle else f"routers {path.name}"


@dataclass(frozen=True)
class RouterSource:
    """Routers as read from disk, before the model is. Both None: dense.

    bundle: a routers.Bundle. release: path of a checkpoint in the paper's layout.
    """

    bundle: Any = None
    release: Path | None = None

    @property
    def digest(self) -> str | None:
        """Hash of the routers' file; None: dense."""
        if self.release is not None:
            from backbones.loading import fingerprint

            return fingerprint(self.release)
        return None if self.bundle is None else str(self.bundle.digest)

    @property
    def plans(self) -> bool:
        """Whether a budget is met by a plan in time, and not by routers that decide."""
        return self.release is None and (self.bundle is None or not self.bundle.decides)

    def buys(self, job: Job) -> tuple[int, float]:
        """Steps of a job's run that call the transformer, and the share of the dense FLOPs that they take.

        Routers leave no step out, and spend what is asked.
        """
        steps, budget = job.denoising_steps, 1.0 if job.budget is None else job.budget
        if not self.plans:
            return steps, budget
        found = self._narrow(job, budget)
        if found is not None:
            return found.plan.evaluations, found.share
        return evaluations_for(budget, steps), evaluations_for(budget, steps) / steps

    def shares(self, job: Job) -> bool:
        """Whether a row with a job's budget may share a batch with rows of other budgets: not at budget 1,
        where the pipeline's own run is made bit for bit, nor where its evaluations are narrow.
        """
        if (
            not self.plans
            or job.budget is None
            or job.solver is not None
            or job.time is not None
            or job.turns
        ):
            return False
        return self._narrow(job, job.budget) is None and self.buys(job)[0] < job.denoising_steps

    def calls(self, jobs: Sequence[Job]) -> int:
        """Steps of a batch's run that call the transformer, for one of its rows or more."""
        if len({job.budget for job in jobs}) == 1:
            return self.buys(jobs[0])[0]
        import numpy as np

        from routers.planned.apart import RowPlans
        from routers.planned.timeplan import euler, moving
        from routers.planned.universal import universal_planner

        steps, fitted = jobs[0].denoising_steps, () if self.bundle is None else self.bundle.times
        # where plans meet is a matter of steps, whatever their times are
        grid = np.asarray(fitted) if len(fitted) == steps + 1 else np.linspace(1.0, 0.0, steps + 1)
        planner_for = universal_planner if self.bundle is None else self.bundle.planner
        planners = [planner_for(job.budget or 1.0, job.target or TARGETS[0]) for job in jobs]
        return RowPlans([planner(grid) or euler(moving(grid)) for planner in planners]).evaluations

    def _narrow(self, job: Job, budget: float) -> Any:
        narrow = None if self.bundle is None else self.bundle.narrow_plans()
        return None if narrow is None else narrow.at(budget, job.target or TARGETS[0], job.denoising_steps)

    @classmethod
    def read(cls, path: Path | None) -> RouterSource:
        """Raises EditError for anything that is neither a bundle nor a released checkpoint."""
        if path is None:
            return cls()
        if path.is_file() and path.suffix not in (".safetensors", ".json"):
            raise EditError(
                f"--routers {str(path)!r} is not a .safetensors file, and other formats are not loaded; "
                "give a bundle folder, a .safetensors file, or none"
            )
        from routers.bundle import load_bundle
        from routers.paper.checkpoint import is_release_file

        with bad_input():
            if not (path / "bundle.json").is_file() and is_release_file(path):
                return cls(release=path)
            return cls(bundle=load_bundle(path))

    def budget(self, budget: float | None) -> float | None:
        """The budget that is served: the recommended one for None. Raises EditError."""
        if self.release is not None:
            if budget is not None:
                raise EditError(
                    "--budget does not apply to a checkpoint in the paper's released layout: "
                    "its compute is fixed; leave --budget out, or fit a bundle with: edit calibrate"
                )
            return None
        if self.bundle is None:
            return 1.0 if budget is None else budget
        served = float(self.bundle.recommended_budget) if budget is None else budget
        with bad_input():
            self.bundle.check_budget(served)
        return served

    def notes(self, jobs: Sequence[Job]) -> list[str]:
        """Plain words where a request is not what the routers were made for."""
        if self.bundle is None or all(job.budget == 1.0 for job in jobs):
            return []
        made = self.bundle.num_steps
        if self.plans:
            other = sorted({job.steps for job in jobs} - {made})
            text = "calibrated at {made} steps; at {other} the plan is the one that needs no calibration"
        else:
            other = sorted({job.steps for job in jobs if not made / 2 <= job.steps <= made * 2})
            text = (
                "these routers were trained at {made} steps; {other} is far from that, quality may be lower"
            )
        return [text.format(made=made, other=other[0])] if other else []


def settle(plan: Plan) -> tuple[Plan, RouterSource]:
    """Read the routers, and fill in the budget that they recommend. Raises EditError."""
    source = RouterSource.read(plan.routers)
    if any(job.time for job in plan.jobs) and not source.plans:
        raise EditError("--time is kept by plans, and these routers decide otherwise; add --routers none")
    jobs = tuple(
        replace(job, budget=1.0 if job.time and job.budget is None else source.budget(job.budget))
        for job in plan.jobs
    )
    return replace(plan, jobs=jobs), source

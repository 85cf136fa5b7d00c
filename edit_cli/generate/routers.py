"""The routers of a run: which, read from where, what they serve. Torch-free until they are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbones.spec import Backbone
from edit_cli.errors import EditError, bad_input
from edit_cli.generate.medium import Job

if TYPE_CHECKING:
    from edit_cli.generate.plan import Plan

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


def check_dense(budgets: Iterable[float | None], backbone: Backbone, dry_run: bool) -> tuple[str, ...]:
    """Without routers there is only the full budget; a dry run may still ask what another would cost.

    Returns warnings. Raises EditError.
    """
    low = min((budget for budget in budgets if budget is not None), default=1.0)
    if low == 1.0:
        return ()
    message = (
        f"--budget {low:g} needs routers and {backbone.name!r} has none here; give --routers BUNDLE, "
        f"or make one with: edit calibrate -m {backbone.address} -o bundle"
    )
    if not dry_run:
        raise EditError(message)
    return (message,)


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
        """Plain words where a request is far from what the routers were fitted for."""
        if self.bundle is None or all(job.budget == 1.0 for job in jobs):
            return []
        fitted = self.bundle.num_steps
        far = sorted({job.steps for job in jobs if not fitted / 2 <= job.steps <= fitted * 2})
        if not far:
            return []
        return [
            f"these routers were fitted at {fitted} steps; {far[0]} is far from that, quality may be lower"
        ]


def settle(plan: Plan) -> tuple[Plan, RouterSource]:
    """Read the routers, and fill in the budget that they recommend. Raises EditError."""
    source = RouterSource.read(plan.routers)
    return replace(
        plan, jobs=tuple(replace(job, budget=source.budget(job.budget)) for job in plan.jobs)
    ), source

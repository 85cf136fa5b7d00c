"""Choices that both generating commands share: routers, budget, seeds, device. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from backbones.spec import DTYPES, Backbone, Placement
from edit_cli import checks as values
from edit_cli.errors import EditError, bad_input

if TYPE_CHECKING:
    from edit_cli.generate.mesh_plan import MeshJob
    from edit_cli.generate.plan import Job

DEFAULT_ROUTERS, NO_ROUTERS = "default", "none"
DEVICES = "auto, cuda, cuda:N, mps, cpu"

AnyJob = TypeVar("AnyJob", "Job", "MeshJob")


def find_routers(asked: str, backbone: Backbone) -> Path | None:
    """The bundle or release file to use, or None for the dense model. Raises EditError."""
    if asked == NO_ROUTERS:
        return None
    if asked == DEFAULT_ROUTERS:
        return backbone.bundle
    path = Path(asked).expanduser()
    if not path.exists():
        raise EditError(
            f"--routers {asked!r} does not exist; give a bundle folder, a .safetensors file, or none"
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
    make = ""
    if backbone.makes == "picture":
        make = f", or make one with: edit calibrate -m {backbone.address} -o bundle"
    message = (
        f"--budget {low:g} needs routers and {backbone.name!r} has none here; give --routers BUNDLE{make}"
    )
    if not dry_run:
        raise EditError(message)
    return (message,)


def settle_budgets(jobs: Sequence[AnyJob], bundle: Any) -> tuple[AnyJob, ...]:
    """Jobs with the budget that the routers recommend where none was asked; asked ones are checked.

    bundle: routers.Bundle, or None for dense. Raises EditError.
    """
    settled = []
    for job in jobs:
        budget = job.budget
        if bundle is not None:
            budget = float(bundle.recommended_budget) if budget is None else budget
            with bad_input():
                bundle.check_budget(budget)
        settled.append(replace(job, budget=1.0 if budget is None else budget))
    return tuple(settled)


def distinct_seeds(seeds: Sequence[int], hint: str = "") -> None:
    """Raise EditError if a seed comes twice: two equal results were not meant."""
    repeated = [seed for seed, count in Counter(seeds).items() if count > 1]
    if repeated:
        raise EditError(f"--seed {repeated[0]} would be used twice; give distinct seeds{hint}")


def placement(asked: Any, record: Mapping[str, Any], offloads: Sequence[str]) -> Placement:
    """Device, dtype and offloading: as asked, else as in a replayed record. Raises EditError.

    asked: has `device`, `dtype` and `offload`. offloads: ways to offload that the command knows.
    """
    found = Placement(
        device=asked.device or record.get("device") or "auto",
        dtype=asked.dtype or record.get("dtype") or "auto",
        offload=asked.offload or "none",
    )
    values.one_of("--dtype", found.dtype, DTYPES)
    values.one_of("--offload", found.offload, offloads)
    kind, _, number = str(found.device).partition(":")
    if kind not in ("auto", "cuda", "mps", "cpu") or (number and not number.isdecimal()):
        raise EditError(f"--device {found.device!r} is unknown; allowed are {DEVICES}")
    return found

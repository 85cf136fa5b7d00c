"""A bundle: what `calibrate` learned about one model. How it lies on disk is in bundle_file.py.

    tensors        moments ("moments.<name>"); of a trained one also "routers.<i>.<key>" and "profile.<name>"
    description    block map, base model and its fingerprint, what it was fitted for, measured quality
    backbone       only where the backbone was trained with the routers: its LoRA or all its weights

One bundle serves every budget from its minimum to 1: the plan for a budget is solved when a run starts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import bundle_file
from .planned.moments import Moments
from .planned.plan import Planner
from .planned.policy import PlannedPolicy
from .spec import TransformerSpec
from .trained.backbone import FILE as BACKBONE_FILE
from .trained.bundle import Trained
from .trained.policy import TrainedPolicy

FORMAT, TRAINED_FORMAT, FORMATS = 4, 3, (2, 3, 4)
"""Written for plans and for trained routers, and what is read. Format 2 held routers beside its plans, which
gained nothing and are left unread; versions that need them refuse format 4."""
MOMENTS = ("gram", "gain", "mixing")
PLANS = "moments.plans"
"""Left out of bundles whose plans were not tried."""
PLAIN_FIELDS = (
    "base_model",
    "architecture",
    "fingerprint",
    "num_steps",
    "guidance",
    "times",
    "min_budget",
    "recommended_budget",
    "metadata",
)
"""Fields that are JSON data as they are."""


@dataclass
class Bundle:
    """Moments, trained routers if any, where they belong. `metadata`: JSON data for people and reports."""

    spec: TransformerSpec
    moments: Moments
    base_model: str
    architecture: str
    fingerprint: list[float]
    num_steps: int
    guidance: float
    times: list[float] = field(default_factory=list)
    min_budget: float = 0.35
    recommended_budget: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    path: str = ""
    trained: Trained | None = None
    planners: dict[tuple[int, int], Planner] = field(default_factory=dict, repr=False)
    """Plans solved so far, by number of steps and cache depth."""

    def policy(self, *, batch_mean: bool = False) -> PlannedPolicy | TrainedPolicy:
        """A budget policy. batch_mean: trained routers decide for the batch's mean, not for each sample."""
        if self.trained is not None:
            return TrainedPolicy(self.trained.profile, batch_mean=batch_mean)
        return PlannedPolicy(self.moments, self.planners)

    def check_budget(self, budget: float) -> None:
        """Raises ValueError for a budget this bundle was not fitted for."""
        if not self.min_budget <= budget <= 1.0:
            raise ValueError(
                f"budget {budget:g} is outside what this bundle serves: {self.min_budget:g} to 1; "
                f"ask for at least {self.min_budget:g} or calibrate with --budgets {budget:g}:1"
            )

    def save(self, folder: str | Path) -> None:
        """Write a bundle folder, whole or not at all. Raises OSError."""
        folder, trained = Path(folder), self.trained
        tensors = {f"moments.{name}": torch.from_numpy(getattr(self.moments, name)) for name in MOMENTS}
        if self.moments.plans is not None:
            tensors[PLANS] = torch.from_numpy(self.moments.plans)
        description = {
            "format": FORMAT if trained is None else TRAINED_FORMAT,
            "spec": self.spec.to_dict(),
            "branches": list(self.moments.branches),
            **{name: getattr(self, name) for name in PLAIN_FIELDS},
            **({} if trained is None else trained.description()),
        }
        text = json.dumps(description, indent=1) + "\n"
        if trained is not None:
            tensors |= trained.tensors()
        bundle_file.write_folder(folder, text, tensors, {} if trained is None else trained.files(folder))
        if trained is None or trained.backbone is None:  # an earlier bundle's
            (folder / BACKBONE_FILE).unlink(missing_ok=True)


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle folder, or one file of `bundle_file`. Raises ValueError, one line, if it is damaged."""
    stored = bundle_file.read(path)
    try:
        data = json.loads(stored.description)
        if data.get("format") not in FORMATS:
            raise ValueError(
                f"format {data.get('format')!r}, this version reads {', '.join(map(str, FORMATS))}"
            )
        return Bundle(
            spec=TransformerSpec.from_dict(data["spec"]),
            moments=_moments(data["branches"], stored.tensors),
            trained=Trained.read(path, data, stored.tensors) if data["format"] == TRAINED_FORMAT else None,
            digest=stored.digest,
            path=str(bundle_file.find(path) or path),
            **{name: data[name] for name in PLAIN_FIELDS},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable bundle: {type(error).__name__}: {error}") from error


def _moments(branches: list[str], tensors: dict[str, Tensor]) -> Moments:
    plans = tensors[PLANS].to(torch.int8).numpy() if PLANS in tensors else None
    gram, gain, mixing = (tensors[f"moments.{name}"].double().numpy() for name in MOMENTS)
    return Moments(tuple(branches), gram, gain, mixing, plans)

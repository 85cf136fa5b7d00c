"""A bundle: what `calibrate` learned about one model, as a folder of safetensors and JSON.

    routers.safetensors   router weights ("routers.<i>.<key>") and moments ("moments.<name>")
    bundle.json           block map, base model and its fingerprint, what it was fitted for, measured quality
    backbone.safetensors  only where the backbone was trained with the routers: its LoRA or all its weights

One bundle serves every budget from its minimum to 1: the plan for a budget is solved when a run starts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import bundle_file
from .files import write_whole
from .planned.plan import Moments, Planner
from .planned.policy import PlannedPolicy
from .spec import TransformerSpec
from .trained import backbone as trained_backbone
from .trained.backbone import BackboneWeights
from .trained.policy import Profile, TrainedPolicy

FORMAT, TRAINED_FORMAT = 2, 3
"""A bundle made by training says 3, so that versions that cannot run it refuse it."""
MOMENTS = ("gram", "gain", "mixing")
PLANS = "moments.plans"
"""Left out of bundles whose plans were not tried."""


@dataclass
class Trained:
    """What `calibrate --method train` adds: how its routers spread what they spend, backbone weights."""

    profile: Profile
    backbone: BackboneWeights | None = None


@dataclass
class Bundle:
    """Routers, moments and where they belong. `metadata` is JSON data for people and reports."""

    spec: TransformerSpec
    moments: Moments
    routers: list[dict[str, Tensor]]
    base_model: str
    architecture: str
    fingerprint: list[float]
    num_steps: int
    guidance: float
    times: list[float] = field(default_factory=list)
    per_sample: bool = False
    min_budget: float = 0.35
    recommended_budget: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    path: str = ""
    trained: Trained | None = None
    planners: dict[tuple[int, int], Planner] = field(default_factory=dict, repr=False)
    """Plans solved so far, by number of steps and cache depth."""

    def policy(
        self, *, per_sample: bool | None = None, batch_mean: bool = False
    ) -> PlannedPolicy | TrainedPolicy:
        """A budget policy on these moments. per_sample None: as calibration found better.

        Trained routers decide themselves: there `per_sample` False means the batch's mean.
        """
        if self.trained is not None:
            return TrainedPolicy(self.trained.profile, batch_mean=batch_mean or per_sample is False)
        use_routers = self.per_sample if per_sample is None else per_sample
        return PlannedPolicy(self.moments, self.planners, per_sample=use_routers, batch_mean=batch_mean)

    def check_budget(self, budget: float) -> None:
        """Raises ValueError for a budget this bundle was not fitted for."""
        if not self.min_budget <= budget <= 1.0:
            raise ValueError(
                f"budget {budget:g} is outside what this bundle serves: {self.min_budget:g} to 1; "
                f"ask for at least {self.min_budget:g} or calibrate with --budgets {budget:g}:1"
            )

    def save(self, folder: str | Path) -> None:
        """Write the folder; both files appear once both are written, the description last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"routers.{i}.{k}": v.contiguous() for i, r in enumerate(self.routers) for k, v in r.items()
        }
        for name in MOMENTS:
            tensors[f"moments.{name}"] = torch.from_numpy(getattr(self.moments, name))
        if self.moments.plans is not None:
            tensors[PLANS] = torch.from_numpy(self.moments.plans)
        trained, files = self.trained, {}
        backbone = None if trained is None else trained.backbone
        if trained is not None:
            tensors["profile.budgets"] = torch.from_numpy(trained.profile.budgets)
            tensors["profile.spend"] = torch.from_numpy(trained.profile.spend)
        if backbone is not None:
            own = {name: tensor.contiguous() for name, tensor in backbone.tensors.items()}
            files[folder / trained_backbone.FILE] = lambda path: save_file(own, path)
        description = {
            "format": FORMAT if trained is None else TRAINED_FORMAT,
            "base_model": self.base_model,
            "architecture": self.architecture,
            "fingerprint": self.fingerprint,
            "spec": self.spec.to_dict(),
            "branches": list(self.moments.branches),
            "num_steps": self.num_steps,
            "guidance": self.guidance,
            "times": self.times,
            "per_sample": self.per_sample,
            "min_budget": self.min_budget,
            "recommended_budget": self.recommended_budget,
            "metadata": self.metadata,
        }
        if trained is not None:
            description["backbone"] = None if backbone is None else backbone.description()
        text = json.dumps(description, indent=1) + "\n"
        write_whole(
            {
                **files,
                folder / "routers.safetensors": lambda path: save_file(tensors, path),
                folder / "bundle.json": lambda path: Path(path).write_text(text, encoding="utf-8"),
            }
        )
        if not files:
            (folder / trained_backbone.FILE).unlink(missing_ok=True)


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle folder, or one file of `bundle_file`. Raises ValueError, one line, if it is damaged."""
    folder = Path(path)
    if (file := bundle_file.find(folder)) is not None:
        return bundle_file.load(file)
    description_file, weights_file = folder / "bundle.json", folder / "routers.safetensors"
    for file in (description_file, weights_file):
        if not file.is_file():
            raise ValueError(f"{folder} is not a bundle folder: {file.name} is missing")
    try:
        data = json.loads(description_file.read_text(encoding="utf-8"))
        if data.get("format") not in (FORMAT, TRAINED_FORMAT):
            raise ValueError(
                f"format {data.get('format')!r}, this version reads {FORMAT} and {TRAINED_FORMAT}"
            )
        with safe_open(weights_file, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        moments = {name: tensors[f"moments.{name}"].double().numpy() for name in MOMENTS}
        plans = tensors[PLANS].to(torch.int8).numpy() if PLANS in tensors else None
        routers: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("routers."):
                _, index, name = key.split(".", 2)
                routers.setdefault(int(index), {})[name] = value
        digest = hashlib.sha256(description_file.read_bytes() + weights_file.read_bytes()).hexdigest()
        return Bundle(
            trained=_read_trained(folder, data, tensors),
            spec=TransformerSpec.from_dict(data["spec"]),
            moments=Moments(tuple(data["branches"]), **moments, plans=plans),
            routers=[routers[i] for i in range(len(routers))],
            digest=digest,
            path=str(folder),
            **{name: data[name] for name in _PLAIN_FIELDS},
        )
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} is no readable bundle: {type(error).__name__}: {error}") from error


def _read_trained(folder: Path, data: dict[str, Any], tensors: dict[str, Tensor]) -> Trained | None:
    """What training added to a bundle. Raises ValueError, KeyError."""
    if data["format"] != TRAINED_FORMAT:
        return None
    profile = Profile(*(tensors[f"profile.{name}"].double().numpy() for name in ("budgets", "spend")))
    backbone = data["backbone"]
    return Trained(profile, None if backbone is None else BackboneWeights.read(folder, backbone))


_PLAIN_FIELDS = (
    "base_model",
    "architecture",
    "fingerprint",
    "num_steps",
    "guidance",
    "times",
    "per_sample",
    "min_budget",
    "recommended_budget",
    "metadata",
)

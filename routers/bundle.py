"""A bundle: what `calibrate` learned about one model, as a folder or as one file for a hub or an attachment.

    routers.safetensors    "plans.<target>.<evaluations>.<array>" of plans in time,
                           "narrow.<target>.<i>.<array>" of those with narrow evaluations; of a trained
                           one instead, or besides, "routers.<i>.<key>" and "profile.<name>"
    bundle.json            block map, base model and its fingerprint, what it was fitted for, measured quality
    backbone.safetensors   only where the backbone was trained with the routers: its LoRA or all its weights

In one file the text of bundle.json is the entry `edit_bundle` of the header of routers.safetensors.
One bundle serves every budget: where it has no plan for a run, the one of `planned/universal.py` stands in.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import msgspec
import numpy as np
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from . import schema
from .files import new_folder, write_whole
from .planned.follow import Planner
from .planned.narrow import SAME_TIMES, NarrowPlan, NarrowPlans
from .planned.stored import read_narrow, read_plans, to_tensors
from .planned.timeplan import Array, TimePlan
from .planned.universal import Warp, universal_planner
from .spec import TransformerSpec
from .trained.backbone import FILE as BACKBONE_FILE
from .trained.backbone import BackboneFile
from .trained.bundle import Trained
from .trained.policy import TrainedPolicy

DESCRIPTION, WEIGHTS = "bundle.json", "routers.safetensors"
FILES = (DESCRIPTION, WEIGHTS, BACKBONE_FILE)
ENTRY = "edit_bundle"
"""Metadata entry of the description where a bundle is one file."""
FORMAT, TRAINED_FORMAT = 5, 3
"""Written and read: for plans in time, with trained routers or without; and for trained routers alone."""
UNIVERSAL = "the plan is the one that needs no calibration"
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
    """Plans or trained routers or both, and where they belong.

    times [N + 1]: of the run that plans were fitted for. plans: by target and number of evaluations. warps:
    by target, of the times where there is no plan. narrow: plans with narrow evaluations by target, cheapest
    first.
    metadata: JSON data for people and reports.
    """

    spec: TransformerSpec
    base_model: str
    architecture: str
    fingerprint: list[float]
    num_steps: int
    guidance: float
    times: list[float] = field(default_factory=list)
    min_budget: float = 0.0
    recommended_budget: float = 1.0
    metadata: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    path: str = ""
    trained: Trained | None = None
    plans: dict[str, dict[int, TimePlan]] = field(default_factory=dict, repr=False)
    warps: dict[str, Warp] = field(default_factory=dict)
    narrow: dict[str, list[NarrowPlan]] = field(default_factory=dict, repr=False)

    def narrow_plans(self) -> NarrowPlans | None:
        """What serves budgets where narrow evaluations are best; None where none were measured."""
        if not self.narrow:
            return None
        return NarrowPlans(self.spec, np.array(self.times), self.narrow, self.trained)

    @property
    def decides(self) -> bool:
        """Whether routers decide in every step of a run; else plans do, which may call for routers."""
        return self.trained is not None and not self.plans

    def policy(self, *, batch_mean: bool = False) -> TrainedPolicy:
        """Of trained routers. batch_mean: they decide for the batch's mean, not for each sample."""
        assert self.trained is not None, "a bundle of plans has no policy"
        return TrainedPolicy(self.trained.profile, self.trained.trend, batch_mean=batch_mean)

    def planner(self, budget: float, target: str, warp: Warp | None = None) -> Planner:
        """From the times of a run to the plan that was fitted for them, else to the universal one.

        warp: of its times, where none was found by fitting.
        """
        universal = universal_planner(budget, target, self.warps.get(target, warp))
        plans = self.plans.get(target, {})

        def planner(grid: Array) -> TimePlan | None:
            plan = universal(grid)
            return plan if plan is None or self.unfitted(grid) else plans.get(plan.evaluations, plan)

        return planner

    def unfitted(self, grid: Array) -> str:
        """Why plans do not serve a run with these times [N + 1]; "" where they do."""
        steps = len(grid) - 1
        if len(grid) != len(self.times):
            return f"calibrated at {self.num_steps} steps; at {steps} {UNIVERSAL}"
        same = np.allclose(grid, self.times, atol=SAME_TIMES)
        return "" if same else f"calibrated at other times, which may depend on the size: {UNIVERSAL}"

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
        tensors = {} if trained is None else trained.tensors()
        tensors |= to_tensors(self.plans, self.narrow)
        weights = save(tensors)
        description = {
            "format": TRAINED_FORMAT if self.decides else FORMAT,
            "spec": self.spec.to_dict(),
            **{name: getattr(self, name) for name in PLAIN_FIELDS},
            "warps": self.warps,
            **({} if trained is None else trained.description()),
            "sha256": hashlib.sha256(weights).hexdigest(),
        }
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder, FILES) as building:
            (building / WEIGHTS).write_bytes(weights)
            (building / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            if trained is not None:
                trained.write_backbone(building)


class Described(msgspec.Struct):
    """bundle.json, with what is allowed in it. sha256: of the weights' file; older bundles have none."""

    format: int
    spec: dict[str, Any]
    base_model: schema.Name
    architecture: schema.Name
    fingerprint: Annotated[list[float], Meta(min_length=1, max_length=100_000)]
    num_steps: schema.Steps
    guidance: schema.Guidance
    times: Annotated[list[float], Meta(max_length=1002)]
    min_budget: schema.Share
    recommended_budget: schema.Budget
    metadata: dict[str, Any]
    warps: dict[Literal["dense", "exact"], tuple[schema.Positive, schema.Positive]] = {}
    sha256: str = ""
    backbone: BackboneFile | None = None


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle folder, or one file. Raises ValueError, one line, if it is damaged or something else."""
    file = find_file(path)
    try:
        stored = _read_folder(Path(path)) if file is None else _read_file(file)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable bundle: {type(error).__name__}: {error}") from error
    where = f"{path}: {DESCRIPTION}"
    head: dict[str, Any] = schema.decode(stored.description, dict[str, Any], where)
    form = head.get("format")
    if form not in (FORMAT, TRAINED_FORMAT):
        raise ValueError(
            f"{where}: format {form!r:.20}, this version reads {FORMAT} and {TRAINED_FORMAT}; "
            "make it again with: edit calibrate"
        )
    data: Described = schema.decode(stored.description, Described, where)
    if data.sha256 not in ("", stored.weights):
        raise ValueError(
            f"{where}: sha256: {WEIGHTS} is not the file that it was written with; "
            "make the bundle again with: edit calibrate"
        )
    quality = data.metadata.get("quality", [])
    schema.convert(quality, list[dict[schema.Name, float | None]], f"{where}: metadata.quality")
    times = np.asarray(data.times, float)
    if form == FORMAT and (np.diff(times) > 0).any():
        raise ValueError(f"{where}: times: {times.round(4).tolist()} do not decrease")
    try:
        return Bundle(
            spec=TransformerSpec.from_dict(data.spec),
            plans=read_plans(stored.tensors, times),
            narrow=read_narrow(stored.tensors, times),
            warps=cast(dict[str, Warp], data.warps),
            trained=_read_trained(path, form, data, stored),
            digest=stored.digest,
            path=str(file or path),
            **{name: getattr(data, name) for name in PLAIN_FIELDS},
        )
    except ValueError as error:
        raise ValueError(f"{path} is not a readable bundle: {error}") from error


def _read_trained(path: str | Path, form: int, data: Described, stored: Stored) -> Trained | None:
    """Beside plans there may be none; then weights of the backbone are the model's own. Raises ValueError."""
    if form == FORMAT and not any(key.startswith("routers.") for key in stored.tensors):
        return None
    if form == FORMAT and data.backbone is not None:
        raise ValueError("it has plans and weights of the backbone, and plans are made for the model's own")
    return Trained.read(path, data.backbone, stored.tensors)


class Stored(NamedTuple):
    """description: text of the JSON. digest: sha256 over the folder's two files, the same for one file.

    weights: sha256 of the file of tensors alone.
    """

    description: str
    tensors: dict[str, Tensor]
    digest: str
    weights: str

    @classmethod
    def of(cls, description: bytes, weights: bytes, tensors: dict[str, Tensor]) -> Stored:
        """Of the two files' contents."""
        digests = (hashlib.sha256(data).hexdigest() for data in (description + weights, weights))
        return cls(description.decode(), tensors, *digests)


def _read_folder(folder: Path) -> Stored:
    for file in (folder / DESCRIPTION, folder / WEIGHTS):
        if not file.is_file():
            raise ValueError(f"{folder} is not a bundle folder: {file.name} is missing")
    description, weights = (folder / DESCRIPTION).read_bytes(), (folder / WEIGHTS).read_bytes()
    return Stored.of(description, weights, load(weights))


def _read_file(file: Path) -> Stored:
    with safe_open(file, framework="pt") as stored:
        description = (stored.metadata() or {}).get(ENTRY)
        if description is None:
            raise ValueError(
                f"{file} is not a bundle file: its header has no {ENTRY!r}; "
                "make one with: edit export BUNDLE --format bundle"
            )
        # cloned: the file may go away before the tensors do
        tensors = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118 - no mapping
    return Stored.of(description.encode(), save(tensors), tensors)


def find_file(path: str | Path) -> Path | None:
    """The bundle file that a path means: itself, or the only safetensors file of an exported folder."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir() or (path / DESCRIPTION).exists():
        return None
    inside = [file for file in path.glob("*.safetensors") if file.name != WEIGHTS]
    return inside[0] if len(inside) == 1 else None


def pack(folder: str | Path, target: str | Path) -> None:
    """Write a bundle folder as one file, which appears whole or not at all. Raises ValueError, OSError."""
    folder = Path(folder)
    if (folder / BACKBONE_FILE).exists():
        raise ValueError(
            f"{folder} holds trained weights of the backbone, which do not go into one file; "
            "pass the folder on as it is"
        )
    stored = _read_folder(folder)
    # one entry: with more, their order varies
    metadata = {ENTRY: stored.description}
    write_whole({Path(target): lambda path: save_file(stored.tensors, path, metadata=metadata)})

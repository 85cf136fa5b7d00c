"""What the formats that hold a model start from: a loaded model, and its transformer frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from backbones import static_folder as static
from backbones.spec import MeshBackbone
from edit_cli.calibrate.calibration import Calibration
from edit_cli.calibrate.inputs import Asked
from edit_cli.errors import EditError
from routers import bundle_file
from routers.attachment import attach
from routers.bundle import Bundle, load_bundle
from routers.paper.checkpoint import is_release_file
from routers.static.choose import Choice, Inputs, choose, order_units, record_calls
from routers.static.frozen import frozen
from routers.watch.redundancy import first_tensor

SAMPLES, STEPS = 4, 3
"""Calibration: so many samples, seen at so many steps spread over a generation, in every branch."""


@dataclass(frozen=True)
class Request:
    """Checked options of an export of a model. budget: share of the dense FLOPs in (0, 1]; 1 freezes nothing.

    prompts, images: as for `edit calibrate`; None: the model's own. dtype: one of DTYPES; what the model is
    loaded, measured and written in. shard_size: most of a weight file, like "5GB"; None: diffusers' own.
    """

    source: str
    budget: float = 1.0
    prompts: str | None = None
    images: str | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    shard_size: str | None = None


@dataclass
class Source:
    """A loaded dense model with requests to try it on. bundle: what its dynamic runs use, or None."""

    request: Request
    calibration: Calibration
    bundle: Bundle | None

    @property
    def backbone(self) -> Any:
        """The registry's entry."""
        return self.calibration.backbone

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self.calibration.pipe

    @property
    def transformer(self) -> Any:
        """The dense transformer."""
        return self.pipe.transformer

    @property
    def meshes(self) -> bool:
        """Whether it makes meshes."""
        return isinstance(self.backbone, MeshBackbone)


@dataclass
class Frozen:
    """A static transformer in memory. calls: the dense calls that it was measured on."""

    transformer: nn.Module
    choice: Choice
    calls: list[Inputs]


def parse_budget(text: str | None, highest: str = "below 1") -> float:
    """A share of the dense FLOPs. highest: "below 1", or "at most 1". Raises EditError."""
    if text is None:
        raise EditError("this format freezes one budget; give --budget B, like --budget 0.7")
    try:
        budget = float(text)
    except ValueError:
        budget = 0.0
    if not 0 < budget < 1 and not (budget == 1 and highest == "at most 1"):
        raise EditError(f"--budget {text!r} must be a number above 0 and {highest}, like 0.7")
    return budget


def open_source(request: Request) -> Source:
    """Load the model that a bundle or model names. Raises EditError, ValueError."""
    model, bundle = find_model(request.source)
    if Path(model).expanduser().exists() and is_release_file(model):
        raise EditError(
            f"{request.source!r} is a checkpoint in the paper's layout; only --format reference takes one"
        )
    asked = Asked(
        model=model, prompts=request.prompts, images=request.images, background="auto", budgets=(),
        samples=SAMPLES, probes=0, steps=None, guidance=None, seed=request.seed, batch_size=SAMPLES,
        device=request.device, dtype=request.dtype, resume=False,
    )  # fmt: skip
    calibration = Calibration.open(asked)
    backbone: Any = calibration.backbone
    if bundle is None and backbone.bundle is not None:
        bundle = load_bundle(backbone.bundle)
    if bundle is not None:
        attach(calibration.pipe.transformer, bundle, budget=1.0).detach()  # raises if it does not fit
    return Source(request, calibration, bundle)


def find_model(source: str) -> tuple[str, Bundle | None]:
    """The model to load, and the bundle if the source is one. Raises EditError."""
    path = Path(source).expanduser()
    if (path / "bundle.json").is_file() or _is_bundle_file(path):
        bundle = load_bundle(path)
        return bundle.base_model, bundle
    return source, None


def _is_bundle_file(path: Path) -> bool:
    """Whether it is a bundle in one file, or a folder with one; checkpoints are safetensors files as well."""
    file = bundle_file.find(path)
    if file is None or file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as stored:
            return bundle_file.ENTRY in (stored.metadata() or {})
    except (SafetensorError, OSError):
        return False


def is_static(source: Source) -> bool:
    """Whether the model is a static one already."""
    return static.read_shape(source.backbone.folder) is not None


def freeze(source: Source, report: Callable[[float, float], None]) -> Frozen:
    """Choose and cut at the request's budget. Raises EditError for what is static already, ValueError."""
    if is_static(source):
        raise EditError(
            f"{source.request.source!r} is a static model already; give the model that it was made from, "
            "or --format torch-export --budget 1"
        )
    spec, transformer = source.backbone.family.transformer, source.transformer
    calls = calibration_calls(source)
    order_units(transformer, spec, calls)
    choice = choose(transformer, spec, calls, source.request.budget, report)
    small: Any = frozen(transformer, spec, choice.shape)
    counts = static.block_counts(small, spec)
    if not source.meshes:
        small.register_to_config(**counts)
    return Frozen(small, choice, calls)


def calibration_calls(source: Source) -> list[Inputs]:
    """Calls of a dense generation at steps spread over it, in every branch that is a call of its own."""
    workload = source.calibration.train
    branches = 1 if source.meshes else len(workload.branches)
    count = min(STEPS, workload.num_steps)
    steps = [int((i + 0.5) * workload.num_steps / count) for i in range(count)]
    keep = [step * branches + branch for step in steps for branch in range(branches)]
    with record_calls(source.transformer, keep) as calls:
        workload.run(0)
    return calls


def largest_difference(left: nn.Module, right: nn.Module, calls: list[Inputs]) -> float:
    """Largest absolute difference of two transformers' outputs on calls."""
    import torch

    with torch.no_grad():
        return max(float((_out(left, call) - _out(right, call)).abs().max()) for call in calls)


def _out(transformer: nn.Module, call: Inputs) -> Tensor:
    return first_tensor(transformer(**call)).float()

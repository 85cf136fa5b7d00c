"""What the formats that hold a model start from: a loaded model, and its transformer frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from backbones import static_folder as static
from backbones.spec import Backbone
from edit_cli.errors import EditError
from edit_cli.export.write import Say
from edit_cli.generation.result import StageClock
from edit_cli.generation.routers import NO_ROUTERS, RouterSource
from edit_cli.generation.samples import held_out, in_folder, medium_of, sample_plan, shows_pictures, take
from edit_cli.generation.session import Session
from edit_cli.request import Request
from routers.attachment import attach
from routers.bundle import ENTRY, Bundle, find_file, load_bundle
from routers.calls import first_tensor
from routers.paper.checkpoint import is_release_file
from routers.static.choose import Choice, Inputs, choose, record_calls
from routers.static.frozen import frozen
from routers.static.units import order_units

SAMPLES, STEPS = 4, 3
"""So many samples are seen at so many steps spread over a generation, in every branch."""


@dataclass
class Source:
    """A loaded dense model with samples to try it on. bundle: what its dynamic runs use, or None.

    train: what decisions are measured on. judge: held-out samples of the same kind.
    """

    session: Session
    train: Any
    judge: Any
    bundle: Bundle | None

    @property
    def backbone(self) -> Backbone:
        """The registry's entry."""
        return self.session.plan.backbone

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self.session.pipe

    @property
    def transformer(self) -> Any:
        """The dense transformer."""
        return self.pipe.transformer

    @property
    def is_static(self) -> bool:
        """Whether the model is a static one already."""
        return self.backbone.static is not None

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer was loaded in, and is written in."""
        dtype: torch.dtype = next(self.transformer.parameters()).dtype
        return dtype


@dataclass
class Frozen:
    """A static transformer in memory. calls: the dense calls that it was measured on."""

    transformer: nn.Module
    choice: Choice
    calls: list[Inputs]


def open_source(request: Request, say: Say) -> Source:
    """Load the model that a bundle or model names. Raises EditError, ValueError."""
    model, bundle = find_model(request["source"])
    if Path(model).expanduser().exists() and is_release_file(model):
        raise EditError(
            f"{request['source']!r} is a checkpoint in the paper's layout; only --format reference takes one"
        )
    request = request.but(model=model, routers=NO_ROUTERS, budget=None, batch_size=None, force=None)
    medium = medium_of(request)
    plan = sample_plan(in_folder(request), medium)
    say(f"loading {plan.backbone.name}")
    session = Session.open(plan, RouterSource(), StageClock(plan.medium.stages))
    rows = 1 if shows_pictures(plan.jobs) else SAMPLES
    train, judge = (
        plan.medium.workload(session, pick(plan.jobs, SAMPLES, 0), rows) for pick in (take, held_out)
    )
    if bundle is None and plan.backbone.bundle is not None:
        bundle = load_bundle(plan.backbone.bundle)
    if bundle is not None:
        attach(session.pipe, bundle, budget=1.0).detach()  # raises if it does not fit
    return Source(session, train, judge, bundle)


def find_model(source: str) -> tuple[str, Bundle | None]:
    """The model to load, and the bundle if the source is one. Raises EditError."""
    path = Path(source).expanduser()
    if (path / "bundle.json").is_file() or _is_bundle_file(path):
        bundle = load_bundle(path)
        return bundle.base_model, bundle
    return source, None


def _is_bundle_file(path: Path) -> bool:
    """Whether it is a bundle in one file, or a folder with one; checkpoints are safetensors files as well."""
    file = find_file(path)
    if file is None or file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as stored:
            return ENTRY in (stored.metadata() or {})
    except (SafetensorError, OSError):
        return False


def freeze(source: Source, budget: float, say: Say) -> Frozen:
    """Choose and cut at a budget below 1. Raises EditError for what is static already, ValueError."""
    if source.is_static:
        raise EditError(
            f"{source.backbone.source!r} is a static model already; give the model that it was made from, "
            "or --format torch-export --budget 1"
        )
    spec, transformer = source.backbone.family.transformer, source.transformer
    say("recording calls of dense runs")
    calls = calibration_calls(source)
    say("ordering hidden units")
    order_units(transformer, spec, calls)
    choice = choose(
        transformer, spec, calls, budget,
        lambda spent, error: say(f"choosing what to leave out: {spent:.0%} of the FLOPs left"),
    )  # fmt: skip
    small: Any = frozen(transformer, spec, choice.shape)
    counts = static.block_counts(small, spec)
    if hasattr(small, "register_to_config"):  # a class of diffusers
        small.register_to_config(**counts)
    return Frozen(small, choice, calls)


@contextmanager
def put_in(pipe: Any, transformer: nn.Module) -> Iterator[None]:
    """Inside, the pipeline runs another transformer."""
    usual = pipe.transformer
    _put(pipe, transformer)
    try:
        yield
    finally:
        _put(pipe, usual)


def _put(pipe: Any, transformer: nn.Module) -> None:
    if hasattr(pipe, "register_modules"):  # diffusers keeps a list of its parts
        pipe.register_modules(transformer=transformer)
    else:
        pipe.transformer = transformer


def calibration_calls(source: Source) -> list[Inputs]:
    """Calls of a dense generation at steps spread over it, in every branch that is a call of its own."""
    workload = source.train
    branches = 1 if source.backbone.makes == "mesh" else len(workload.branches)  # or one doubled call
    count = min(STEPS, workload.num_steps)
    steps = [int((i + 0.5) * workload.num_steps / count) for i in range(count)]
    keep = [step * branches + branch for step in steps for branch in range(branches)]
    with record_calls(source.transformer, keep) as calls:
        workload.run(0)
    return calls


@torch.no_grad()
def outputs(transformer: nn.Module, calls: list[Inputs]) -> list[Tensor]:
    """What a transformer gives for recorded calls, float32."""
    return [first_tensor(transformer(**call)).float() for call in calls]


def largest_difference(left: list[Tensor], right: list[Tensor]) -> float:
    """Largest absolute difference of two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))

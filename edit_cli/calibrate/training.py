"""`edit calibrate --method train`: the processes, the pictures and the training itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from backbones.workloads import encode
from edit_cli.calibrate.plan import CalibrationPlan
from edit_cli.console import phases, print_warning
from edit_cli.errors import EditError, RunError
from edit_cli.generation.cutout import open_rgb
from edit_cli.generation.session import Session

if TYPE_CHECKING:
    import routers
    from edit_cli.calibrate.calibration import Calibration

MAY_CHANGE = ("rate", "backbone_rate", "every", "precision", "save_memory")
"""Settings that a resumed training may change: what it has to do stays the same."""


def open_processes(plan: CalibrationPlan) -> Any:
    """The accelerate.Accelerator of this process. Raises EditError for what training cannot do."""
    from accelerate import Accelerator

    assert plan.training is not None
    try:
        cpu = plan.generation.placement.device == "cpu"
        processes = Accelerator(mixed_precision=plan.training.precision, cpu=cpu)
    except (ValueError, ImportError) as error:
        raise EditError(f"accelerate cannot start: {str(error).splitlines()[0]}") from error
    kind = str(getattr(processes.distributed_type, "value", processes.distributed_type))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise EditError(
            f"accelerate is set up for {kind}; training shares its work among processes that each hold the "
            "whole model: use --multi_gpu, or --cpu with several processes"
        )
    return processes


def encode_pictures(plan: CalibrationPlan, session: Session) -> Tensor:
    """Latents [samples, L, C] of the pictures to train on, in turn."""
    job: Any = plan.generation.jobs[0]
    pictures = [open_rgb(name) for name in plan.pictures]
    latents = encode(session.pipe, plan.generation.backbone, pictures, (job.width, job.height), job.seed)
    return latents[[i % len(latents) for i in range(len(plan.generation.jobs))]]


def identity(calibration: Calibration) -> dict[str, Any]:
    """What a resumed training must have in common with the one that was interrupted."""
    settings, data = calibration.plan.training, calibration.data
    assert settings is not None
    kept = {name: value for name, value in asdict(settings).items() if name not in MAY_CHANGE}
    return {
        "method": "train",
        "data": None if data is None else hashlib.sha256(data.numpy().tobytes()).hexdigest(),
        "train steps": kept.pop("steps"),  # the sampler's have that name
        "processes": calibration.processes.num_processes,
        **kept,
    }


def train(calibration: Calibration, output: Path, bars: Any) -> routers.Bundle:
    """Train a bundle; what TensorBoard reads goes to OUTPUT.logs. Raises RunError, EditError, OSError."""
    from routers.train.loop import LossNotFiniteError, Training
    from routers.train.progress import log_to

    plan, processes, backbone = calibration.plan, calibration.processes, calibration.plan.generation.backbone
    assert plan.training is not None
    close: Callable[[], None] = lambda: None  # noqa: E731
    training = Training(
        calibration.transformer, backbone.family.transformer, calibration.train, plan.training, processes,
        calibration.state, calibration.data, phases(bars),
    )  # fmt: skip
    if processes.is_main_process:
        try:
            training.log, close = log_to(output.parent / f"{output.name}.logs", not plan.resume)
        except ImportError:
            print_warning('no TensorBoard log is kept: it needs pip install "elastic-dit[train]"')
    try:
        return training.run(backbone.name, plan.generation.jobs[0].guidance)
    except LossNotFiniteError as error:
        raise RunError(str(error)) from error
    finally:
        close()

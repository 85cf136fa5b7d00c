"""`edit calibrate --method train`: its settings, and the training itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edit_cli import checks
from edit_cli.calibrate.inputs import picture_files
from edit_cli.console import phases, print_warning
from edit_cli.errors import EditError, RunError
from edit_cli.options import TRAIN
from edit_cli.request import Request
from routers.train.settings import KINDS, TrainSettings

if TYPE_CHECKING:
    import routers
    from edit_cli.calibrate.calibration import Calibration

MAY_CHANGE = ("rate", "backbone_rate", "every", "precision", "save_memory")
"""Settings that a continued training may change: what it has to do stays the same."""


def settings(request: Request) -> TrainSettings | None:
    """Settings of a training, None for --method fit. Raises EditError for options that do not go together."""
    if request["method"] == "fit":
        for name in TRAIN:
            if name in request:
                option = TRAIN[name].label
                raise EditError(f"{option} is for --method train; add that, or leave {option} out")
        return None
    low, what = request["budgets"][0], request.get("train", KINDS[0])
    if low >= 1:
        raise EditError("--budgets must start below 1 for --method train; give for example 0.5:1")
    if "lora_rank" in request and what != "lora":
        raise EditError("--lora-rank is for --train lora; add that, or leave --lora-rank out")
    chosen: dict[str, Any] = {
        "train": what,
        "precision": request.get("mixed_precision", "no"),
        "save_memory": "gradient_checkpointing" in request,
        "low": low,
        "probes": request["probes"],
        "seed": request.get("seed", [0])[0],
    }
    if "train_steps" in request:
        chosen["steps"] = request["train_steps"]
    if "lora_rank" in request:
        chosen["rank"] = request["lora_rank"]
    if "learning_rate" in request:
        chosen |= {"rate": request["learning_rate"], "backbone_rate": request["learning_rate"] / 30}
    return TrainSettings(**chosen)


def read_data(folder: str) -> list[tuple[Path, str]]:
    """Pictures with their prompts, in the order of their names. Raises EditError."""
    files = picture_files("--data", folder, "a folder of pictures, each with its prompt in a .txt")
    pictures = []
    for file in files:
        text = file.with_suffix(".txt")
        checks.picture_file("--data", str(file))
        try:
            prompt = text.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise EditError(
                f"--data {str(file)!r} has no readable {text.name} beside it; write its prompt there"
            ) from None
        if not prompt:
            raise EditError(f"--data {str(text)!r} is empty; write the picture's prompt there")
        pictures.append((file, prompt))
    return pictures


def open_processes(chosen: TrainSettings, device: str) -> Any:
    """The accelerate.Accelerator of this process. Raises EditError for what training cannot do."""
    from accelerate import Accelerator

    try:
        processes = Accelerator(mixed_precision=chosen.precision, cpu=device == "cpu")
    except (ValueError, ImportError) as error:
        raise EditError(f"accelerate cannot start: {str(error).splitlines()[0]}") from error
    kind = str(getattr(processes.distributed_type, "value", processes.distributed_type))
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise EditError(
            f"accelerate is set up for {kind}; training shares its work among processes that each hold the "
            "whole model: use --multi_gpu, or --cpu with several processes"
        )
    return processes


def request(chosen: TrainSettings, processes: Any) -> dict[str, Any]:
    """What a continued training must have in common with the one that was stopped."""
    kept = {name: value for name, value in asdict(chosen).items() if name not in MAY_CHANGE}
    steps = kept.pop("steps")  # the sampler's have that name
    return {**kept, "train steps": steps, "processes": processes.num_processes}


def train(session: Calibration, output: Path, bars: Any) -> routers.Bundle:
    """Train a bundle; what TensorBoard reads goes to OUTPUT.logs. Raises RunError, EditError."""
    from routers.train.loop import LossNotFiniteError, Training
    from routers.train.progress import log_to

    chosen, processes = session.asked.training, session.processes
    assert chosen is not None
    close: Callable[[], None] = lambda: None  # noqa: E731
    training = Training(
        session.pipe.transformer, session.backbone.family.transformer, session.train, chosen, processes,
        session.state, session.data, phases(bars),
    )  # fmt: skip
    if processes.is_main_process:
        try:
            training.log, close = log_to(output.parent / f"{output.name}.logs", not session.asked.resume)
        except ImportError:
            print_warning('no TensorBoard log is kept: it needs pip install "elastic-dit[train]"')
    try:
        return training.run(session.backbone.name, session.train.guidance)
    except LossNotFiniteError as error:
        raise RunError(str(error)) from error
    except OSError as error:
        raise RunError(
            f"the progress of the training cannot be written: {error.strerror or error}; "
            "make room and continue with --resume"
        ) from error
    finally:
        close()

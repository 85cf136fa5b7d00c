"""`edit calibrate --method train`: its options, checked, and the training itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edit_cli import checks as values
from edit_cli.calibrate.inputs import picture_files
from edit_cli.console import phases, print_warning
from edit_cli.errors import EditError, RunError
from routers.train.settings import KINDS, PRECISIONS, TrainSettings

if TYPE_CHECKING:
    import routers
    from edit_cli.calibrate.calibration import Calibration

METHODS = ("fit", "train")
MAY_CHANGE = ("rate", "backbone_rate", "every", "precision", "save_memory")
"""Settings that a continued training may change: what it has to do stays the same."""
PANEL = "Training (--method train)"


def _option(name: str, metavar: str, help: str) -> Any:
    return typer.Option(name, metavar=metavar, help=help, rich_help_panel=PANEL, show_default=False)


Method = Annotated[
    str,
    typer.Option(
        "--method", metavar="METHOD",
        help="fit: minutes, the weights stay as they are. train: the paper's training of gates and widths.",
    ),
]  # fmt: skip
Train = Annotated[
    str | None,
    _option("--train", "WHAT", "routers (default), or with them the backbone: lora or full."),
]
TrainSteps = Annotated[str | None, _option("--train-steps", "N", "Optimiser steps (default 1000).")]
LearningRate = Annotated[
    str | None,
    _option("--learning-rate", "RATE", "Of the routers (default 0.003); the backbone's is a 30th of it."),
]
LoraRank = Annotated[str | None, _option("--lora-rank", "N", "Rank of --train lora (default 16).")]
Precision = Annotated[
    str | None, _option("--mixed-precision", "no|bf16", "Run the backbone in bfloat16 while training.")
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", metavar="", rich_help_panel=PANEL,
        help="Compute each block again for its gradient instead of keeping what it needs.",
    ),
]  # fmt: skip
Data = Annotated[
    str | None,
    _option("--data", "DIR", "Pictures, each with its prompt in a .txt of the same name, to train on too."),
]


def settings(
    method: str,
    budgets: tuple[float, ...],
    probes: int,
    seed: int,
    asked: dict[str, str | bool | None],
) -> TrainSettings | None:
    """Checked settings, None for --method fit. asked: option -> its text. Raises EditError."""
    values.one_of("--method", method, METHODS)
    given = [name for name, value in asked.items() if value]
    if method == "fit":
        if given:
            raise EditError(f"{given[0]} is for --method train; add that, or leave {given[0]} out")
        return None
    chosen: dict[str, Any] = {
        "train": values.one_of("--train", asked["--train"] or KINDS[0], KINDS),
        "precision": values.one_of("--mixed-precision", asked["--mixed-precision"] or "no", PRECISIONS),
        "save_memory": bool(asked["--gradient-checkpointing"]),
        "low": budgets[0],
        "probes": probes,
        "seed": seed,
    }
    if budgets[0] >= 1:
        raise EditError("--budgets must start below 1 for --method train; give for example 0.5:1")
    if asked["--train-steps"] is not None:
        chosen["steps"] = values.integer("--train-steps", asked["--train-steps"], 1, 10**7)
    if asked["--lora-rank"] is not None:
        chosen["rank"] = values.integer("--lora-rank", asked["--lora-rank"], 1, 1024)
        if chosen["train"] != "lora":
            raise EditError("--lora-rank is for --train lora; add that, or leave --lora-rank out")
    if asked["--learning-rate"] is not None:
        hint = "allowed are 0 < rate <= 1, usual is 0.003"
        rate = values.number("--learning-rate", asked["--learning-rate"], hint)
        if not 0 < rate <= 1:
            raise EditError(f"--learning-rate {asked['--learning-rate']!r} is out of range; {hint}")
        chosen |= {"rate": rate, "backbone_rate": rate / 30}
    return TrainSettings(**chosen)


def read_data(folder: str) -> list[tuple[Path, str]]:
    """Pictures with their prompts, in the order of their names. Raises EditError."""
    files = picture_files("--data", folder, "a folder of pictures, each with its prompt in a .txt")
    pictures = []
    for file in files:
        text = file.with_suffix(".txt")
        values.picture_file("--data", str(file))
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
    from routers.train.loop import LossNotFiniteError, Training, log_to

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

"""From a request of `edit calibrate` to what will be calibrated, on what, and how. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edit_cli import checks
from edit_cli.errors import EditError
from edit_cli.files import request_hash
from edit_cli.generation.medium import Job
from edit_cli.generation.plan import Plan
from edit_cli.generation.routers import NO_ROUTERS
from edit_cli.generation.samples import (
    alike,
    held_out,
    in_folder,
    medium_of,
    picture_files,
    sample_plan,
    shows_pictures,
    take,
)
from edit_cli.options import TRAIN
from edit_cli.request import Request
from routers.calibrate.settings import FitSettings
from routers.spec import TARGETS
from routers.train.settings import TrainSettings

HELD_OUT, HELD_OUT_LARGE = 8, 2
"""Samples that only measure the finished bundle: of a small model, and of one whose runs take long."""
SAMPLES, SAMPLES_LARGE, SAMPLES_TRAIN = 4, 1, 32
"""By default: to fit a small model, one whose runs take long, and to train."""
MEASURED = tuple(round(0.35 + 0.05 * i, 2) for i in range(14))
MEASURED_LARGE = (0.35, 0.45, 0.55, 0.7, 0.85)
"""Budgets that are measured unless others are named: of a small model, and of one whose runs take long."""
WITH_PROMPTS = "a folder of pictures, each with its prompt in a .txt"


@dataclass(frozen=True)
class CalibrationPlan:
    """What to calibrate.

    generation: its jobs are the calibration samples. held_out: the samples that measure. budgets: to measure,
    ascending. fitted: see `FitSettings`. training: None for --method fit. pictures: to train on, with
    the prompts of the jobs. output: folder of the new bundle; None: only measure the bundle `evaluate`.
    asked: a hash of the request. routers: bundle of trained routers that plans may leave evaluations to.
    """

    generation: Plan
    held_out: tuple[Job, ...]
    budgets: tuple[float, ...]
    fitted: FitSettings
    output: Path | None
    evaluate: str | None
    resume: bool
    overwrite: bool = False
    asked: str = ""
    training: TrainSettings | None = None
    pictures: tuple[str, ...] = ()
    routers: str | None = None


def make_calibration_plan(request: Request) -> CalibrationPlan:
    """Check everything. Raises EditError; reads files but writes none."""
    _check_output(request)
    training = train_settings(request)
    if "data" in request and request.keys() & {"prompts_file", "images"}:
        raise EditError("--data brings its own prompts; leave --prompts and --images out")
    medium, request = medium_of(request), in_folder(request)
    pictures: Sequence[tuple[str, str]] = ()
    if "data" in request:
        pictures = read_data(request["data"])
        request = request.but(data=None, prompt=[prompt for _, prompt in pictures])
    plan = sample_plan(request.but(routers=NO_ROUTERS, budget=None), medium)
    if not alike(plan):
        raise EditError("--prompts holds lines of different size, steps or guidance; a bundle needs one")
    seed = request.get("seed", [0])[0]
    small, alone = plan.backbone.small, shows_pictures(plan.jobs)
    usual = SAMPLES_TRAIN if training else SAMPLES if small and not alone else SAMPLES_LARGE
    samples = request.get("samples", usual)
    if alone and samples > 1 and not training:
        raise EditError(
            f"--samples {samples} are made in one batch and results that begin with pictures are not; "
            "leave it out"
        )
    rows = 1 if alone else min(plan.batch_size, samples) if training else samples
    target = request.get("target", TARGETS[0])
    fitted = FitSettings(
        budgets=request.get("budgets"),
        targets=TARGETS if target == "both" else (target,),
        tries=request.get("tries"),
        seed=seed,
    )
    return CalibrationPlan(
        generation=replace(plan, jobs=take(plan.jobs, samples, seed), batch_size=rows),
        held_out=held_out(plan.jobs, max(HELD_OUT if small else HELD_OUT_LARGE, rows), seed),
        budgets=request.get("budgets", MEASURED if small else MEASURED_LARGE),
        fitted=fitted,
        output=Path(request["output"]).expanduser() if "output" in request else None,
        evaluate=request.get("evaluate"),
        resume="resume" in request,
        overwrite="overwrite" in request,
        asked=request_hash(request),
        training=training,
        pictures=tuple(file for file, _ in pictures),
        routers=request.get("trained"),
    )


def _check_output(request: Request) -> None:
    output = request.get("output")
    if (output is None) == ("evaluate" not in request):
        raise EditError("give either --output FOLDER for a new bundle or --evaluate BUNDLE to measure one")
    if output is None and "resume" in request:
        raise EditError("--resume continues a calibration and --evaluate makes none; leave one of them out")
    if output is None and request["method"] == "train":
        raise EditError("--method train makes a bundle and --evaluate makes none; leave one of them out")
    if "trained" in request and (output is None or request["method"] == "train"):
        raise EditError("--routers is for --method fit, which makes plans beside them; leave it out")
    if output is not None and request["method"] == "fit" and request.get("budgets", MEASURED)[0] == 1:
        raise EditError("--budgets 1 is the run of all steps, which needs no plan; give a budget below 1")


def train_settings(request: Request) -> TrainSettings | None:
    """Settings of a training, None for --method fit. Raises EditError for options that do not go together."""
    given = [option.label for name, option in TRAIN.items() if name in request]
    if request["method"] == "fit":
        if given:
            raise EditError(f"{given[0]} is for --method train; add that, or leave {given[0]} out")
        return None
    low, what = request.get("budgets", MEASURED)[0], request.get("train", "routers")
    if low >= 1:
        raise EditError("--budgets must start below 1 for --method train; give for example 0.5:1")
    if "lora_rank" in request and what != "lora":
        raise EditError("--lora-rank is for --train lora; add that, or leave --lora-rank out")
    typed: dict[str, Any] = {"steps": request.get("train_steps"), "rank": request.get("lora_rank")}
    if "learning_rate" in request:
        typed |= {"rate": request["learning_rate"], "backbone_rate": request["learning_rate"] / 30}
    return TrainSettings(
        train=what,
        precision=request.get("mixed_precision", "no"),
        save_memory="gradient_checkpointing" in request,
        low=low,
        seed=request.get("seed", [0])[0],
        **{name: value for name, value in typed.items() if value is not None},
    )


def read_data(folder: str) -> Sequence[tuple[str, str]]:
    """Pictures with their prompts, in the order of their names. Raises EditError."""
    pictures = []
    for name in picture_files("--data", folder, WITH_PROMPTS):
        text = Path(name).with_suffix(".txt")
        checks.picture_file("--data", name)
        try:
            prompt = text.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise EditError(
                f"--data {name!r} has no readable {text.name} beside it; write its prompt there"
            ) from None
        if not prompt:
            raise EditError(f"--data {str(text)!r} is empty; write the picture's prompt there")
        pictures.append((name, prompt))
    return pictures

"""`edit calibrate`: fit a bundle that serves any budget to a model. Thin: parse, load, fit, measure, save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edit_cli import checks as values
from edit_cli import options as o
from edit_cli.calibrate import training as t
from edit_cli.calibrate.inputs import Asked, parse_budgets
from edit_cli.console import print_result, print_warning, progress
from edit_cli.errors import INTERRUPTED, EditError, RunError, bad_input
from edit_cli.generate import mesh_options
from edit_cli.generate.mesh_plan import BACKGROUNDS

Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Where the bundle goes.", show_default=False),
]
Images = Annotated[
    str | None,
    typer.Option(
        "--images", metavar="DIR", help="Pictures of one object each, for models that make meshes.",
        rich_help_panel=mesh_options.MESH,
    ),
]  # fmt: skip
Samples = Annotated[str, typer.Option("--samples", metavar="N", help="Pictures or meshes to calibrate on.")]
Probes = Annotated[
    str, typer.Option("--probes", metavar="N", help="Single reuses followed through to the final latents.")
]
PlanSamples = Annotated[
    str | None,
    typer.Option(
        "--plan-samples", metavar="N", show_default="8, or 2 for large models",
        help="Samples that candidate plans are run on to choose the best; 0 to trust the closed form.",
    ),
]  # fmt: skip
Budgets = Annotated[
    str,
    typer.Option(
        "--budgets", metavar="LOW:HIGH[:COUNT]",
        help="The lowest budget the bundle serves, and the range it is measured on.",
    ),
]  # fmt: skip
Evaluate = Annotated[
    str | None,
    typer.Option("--evaluate", metavar="BUNDLE", help="Only measure this bundle again.", show_default=False),
]
Resume = Annotated[
    bool, typer.Option("--resume", metavar="", help="Go on where an earlier attempt at the same was stopped.")
]


class Stopped(EditError):  # noqa: N818 - not an error
    """Ctrl-C."""

    exit_code = INTERRUPTED


def calibrate(
    output: Output = None,
    model: o.Model = None,
    prompts_file: o.PromptsFile = None,
    images: Images = None,
    remove_background: mesh_options.RemoveBackground = None,
    evaluate: Evaluate = None,
    resume: Resume = False,
    method: t.Method = "fit",
    budgets: Budgets = "0.35:1.0",
    samples: Samples = "32",
    probes: Probes = "80",
    plan_samples: PlanSamples = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    seed: o.Seed = None,
    batch_size: o.BatchSize = None,
    train: t.Train = None,
    train_steps: t.TrainSteps = None,
    learning_rate: t.LearningRate = None,
    lora_rank: t.LoraRank = None,
    mixed_precision: t.Precision = None,
    gradient_checkpointing: t.Checkpointing = False,
    data: t.Data = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Make a bundle for a model: fit one in minutes, or train routers as the paper does.

    Fitting runs the dense model on calibration prompts (or pictures, for meshes), measures how well each step
    is predicted from those before and what an error does to the result, and fits small routers that
    tell samples apart. Training teaches routers which blocks to skip and how wide to run the others.

    [dim]edit calibrate -m qwen-image-tiny -o bundle
    edit generate "a cat" --routers bundle --budget 0.5[/dim]
    """
    if (output is None) == (evaluate is None):
        raise EditError("give either --output FOLDER for a new bundle or --evaluate BUNDLE to measure one")
    if resume and output is None:
        raise EditError("--resume continues a calibration and --evaluate makes none; leave one of them out")
    if method == "train" and output is None:
        raise EditError("--method train makes a bundle and --evaluate makes none; leave one of them out")
    if output is not None and Path(output).is_file():
        raise EditError(f"--output {output!r} is a file; give a folder for the bundle")
    training = {
        "--train": train, "--train-steps": train_steps, "--learning-rate": learning_rate,
        "--lora-rank": lora_rank, "--mixed-precision": mixed_precision,
        "--gradient-checkpointing": gradient_checkpointing, "--data": data,
    }  # fmt: skip
    points, count = parse_budgets(budgets), values.integer("--probes", probes, 8, 10**6)
    number = values.seed("--seed", seed[0]) if seed else 0
    asked = Asked(
        model=model,
        prompts=prompts_file,
        images=images,
        background=values.one_of("--remove-background", remove_background or "auto", BACKGROUNDS),
        budgets=points,
        samples=values.integer("--samples", samples, 4, 4096),
        probes=count,
        plan_samples=None
        if plan_samples is None
        else values.integer("--plan-samples", plan_samples, 0, 4096),
        steps=None if steps is None else values.integer("--steps", steps, 2, values.MAX_STEPS),
        guidance=None if guidance is None else values.guidance("--guidance", guidance),
        seed=number,
        batch_size=None if batch_size is None else values.integer("--batch-size", batch_size, 1, 1024),
        device=device or "auto",
        dtype=dtype or "auto",
        resume=resume,
        training=t.settings(method, points, count, number, training),
        data=data,
    )
    if asked.meshes and images is not None and not Path(images).expanduser().is_dir():
        what = "is not a folder" if Path(images).expanduser().exists() else "does not exist"
        raise EditError(f"--images {images!r} {what}; give a folder of pictures of one object each")
    run(asked, None if output is None else Path(output), evaluate, json_output, quiet)


def run(asked: Asked, output: Path | None, evaluate: str | None, json_output: bool, quiet: bool) -> None:
    """Carry out what was asked. output None: only measure the bundle `evaluate`. Raises EditError."""
    from edit_cli.calibrate import calibration
    from edit_cli.calibrate import report as calibration_report
    from routers.calibrate.workload import NotFiniteError

    with bad_input():
        session = calibration.Calibration.open(asked)
    quiet = quiet or not session.is_main
    try:
        with progress(not quiet) as bars, bad_input():
            if output is not None:
                session.begin(output)
            bundle = session.make(output, bars) if output is not None else session.load(evaluate or "")
            if not session.is_main:  # other processes of a training end here
                return
            rows = session.measure(bundle, bars)
    except NotFiniteError as error:
        raise RunError(str(error)) from error
    except KeyboardInterrupt:
        kept = "; continue with --resume" if output is not None else ""
        raise Stopped(f"interrupted; no bundle was written{kept}") from None
    target = output or Path(bundle.path)
    if output is not None:
        session.save(bundle, rows, output)
        if calibration_report.plot(bundle, output) is None and not quiet:
            print_warning('no plot was drawn: it needs matplotlib; pip install "elastic-dit[bench]"')
    found = calibration_report.as_json(bundle, rows, target)
    print_result(
        found, calibration_report.as_table(bundle, rows, target), json_output=json_output, quiet=quiet
    )

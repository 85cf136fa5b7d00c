"""`edit calibrate`: fit a bundle that serves any budget to a model. Thin: parse, load, fit, measure, save."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from backbones.registry import DEFAULT_MODEL
from edit_cli import options as o
from edit_cli import values
from edit_cli.console import print_json, progress, stderr, stdout
from edit_cli.errors import EditError, bad_input

Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Where the bundle goes.", show_default=False),
]
Samples = Annotated[str, typer.Option("--samples", metavar="N", help="Pictures to calibrate on.")]
Probes = Annotated[
    str, typer.Option("--probes", metavar="N", help="Single reuses followed through to the final latents.")
]
Budgets = Annotated[
    str, typer.Option("--budgets", metavar="LOW:HIGH", help="Range of budgets the bundle is measured on.")
]
Evaluate = Annotated[
    str | None,
    typer.Option("--evaluate", metavar="BUNDLE", help="Only measure this bundle again.", show_default=False),
]


def calibrate(
    output: Output = None,
    model: o.Model = None,
    prompts_file: o.PromptsFile = None,
    evaluate: Evaluate = None,
    budgets: Budgets = "0.35:1.0",
    samples: Samples = "32",
    probes: Probes = "80",
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    seed: o.Seed = None,
    batch_size: o.BatchSize = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    json_output: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fit a bundle to a model in minutes. The model's weights are not changed.

    Runs the dense model on calibration prompts, measures how well each step's work is predicted from the
    steps before and what an error at it does to the result, and fits small routers that tell samples apart.

    [dim]edit calibrate -m qwen-image-tiny -o bundle
    edit generate "a cat" --routers bundle --budget 0.5[/dim]
    """
    if (output is None) == (evaluate is None):
        raise EditError("give either --output FOLDER for a new bundle or --evaluate BUNDLE to measure one")
    low, high = parse_budgets(budgets)
    asked = {
        "samples": values.integer("--samples", samples, 4, 4096),
        "probes": values.integer("--probes", probes, 8, 10**6),
        "steps": None if steps is None else values.steps("--steps", steps),
        "guidance": None if guidance is None else values.guidance("--guidance", guidance),
        "seed": values.seed("--seed", seed[0]) if seed else 0,
        "batch_size": None if batch_size is None else values.integer("--batch-size", batch_size, 1, 1024),
    }
    from edit_cli import calibration

    with bad_input():
        session = calibration.Calibration.open(model or DEFAULT_MODEL, prompts_file, device, dtype, asked)
    with progress(not quiet) as bars, bad_input():
        bundle = session.fit(low, bars) if evaluate is None else session.load(evaluate)
        rows = session.measure(bundle, low, high, bars)
    target = Path(output or bundle.path)
    if output is not None:
        session.save(bundle, rows, target)
    result: dict[str, Any] = calibration.as_json(bundle, rows, target)
    if not quiet:
        (stderr() if json_output else stdout()).print(calibration.as_table(bundle, rows, target))
    if json_output:
        print_json(result)


def parse_budgets(text: str) -> tuple[float, float]:
    """Two budgets from "0.35:1.0". Raises EditError."""
    parts = text.split(":")
    try:
        low, high = (float(part) for part in parts)
    except ValueError:
        low = high = float("nan")
    if not 0 < low < high <= 1:
        raise EditError(
            f"--budgets {text!r} is no range of budgets; give LOW:HIGH, 0 < LOW < HIGH <= 1, like 0.35:1.0"
        )
    return low, high

"""`edit calibrate`: fit a bundle that serves any budget to a model, or train one."""

from __future__ import annotations

from pathlib import Path

from edit_cli.calibrate import training
from edit_cli.calibrate.inputs import Asked
from edit_cli.console import print_result, print_warning, progress
from edit_cli.errors import INTERRUPTED, EditError, RunError, bad_input
from edit_cli.options import CALIBRATE, MACHINE, MESH, MODEL, PROMPTS, REPORT, SAMPLING, TRAIN
from edit_cli.request import Request, command, only


class Stopped(EditError):  # noqa: N818 - not an error
    """Ctrl-C."""

    exit_code = INTERRUPTED


@command(
    only(CALIBRATE, "output", "evaluate", "resume", "method", "budgets", "samples", "probes", "plan_samples"),
    only(MODEL, "model"), only(PROMPTS, "prompts_file"), only(CALIBRATE, "steps"),
    only(SAMPLING, "guidance", "seed"),
    only(CALIBRATE, "images"), only(MESH, "remove_background"),
    only(MACHINE, "batch_size", "device", "dtype"), TRAIN, REPORT,
)  # fmt: skip
def calibrate(request: Request) -> None:
    """Make a bundle for a model: fit one in minutes, or train routers as the paper does.

    Fitting runs the dense model on calibration prompts (or pictures, for meshes), measures how well each step
    is predicted from those before and what an error does to the result, and tries which steps are best
    computed. Training teaches routers which blocks to skip and how wide to run the others.

    [dim]edit calibrate -m qwen-image-tiny -o bundle
    edit generate "a cat" --routers bundle --budget 0.5[/dim]
    """
    output = request.get("output")
    if ("output" in request) == ("evaluate" in request):
        raise EditError("give either --output FOLDER for a new bundle or --evaluate BUNDLE to measure one")
    if "resume" in request and output is None:
        raise EditError("--resume continues a calibration and --evaluate makes none; leave one of them out")
    if request["method"] == "train" and output is None:
        raise EditError("--method train makes a bundle and --evaluate makes none; leave one of them out")
    if output is not None and Path(output).is_file():
        raise EditError(f"--output {output!r} is a file; give a folder for the bundle")
    asked = Asked(
        model=request.get("model"),
        prompts=request.get("prompts_file"),
        images=request.get("images"),
        background=request.get("remove_background", "auto"),
        budgets=request["budgets"],
        samples=request["samples"],
        probes=request["probes"],
        plan_samples=request.get("plan_samples"),
        steps=request.get("steps"),
        guidance=request.get("guidance"),
        seed=request.get("seed", [0])[0],
        batch_size=request.get("batch_size"),
        device=request.get("device", "auto"),
        dtype=request.get("dtype", "auto"),
        resume="resume" in request,
        training=training.settings(request),
        data=request.get("data"),
    )
    if asked.meshes and asked.images is not None and not Path(asked.images).expanduser().is_dir():
        what = "is not a folder" if Path(asked.images).expanduser().exists() else "does not exist"
        raise EditError(f"--images {asked.images!r} {what}; give a folder of pictures of one object each")
    run(asked, None if output is None else Path(output), request)


def run(asked: Asked, output: Path | None, request: Request) -> None:
    """Carry out what was asked. output None: only measure the bundle --evaluate. Raises EditError."""
    from edit_cli.calibrate import calibration
    from edit_cli.calibrate import report as calibration_report
    from routers.calibrate.workload import NotFiniteError

    with bad_input():
        session = calibration.Calibration.open(asked)
    if not session.is_main:
        request = request.but(quiet=True, json=None)
    try:
        with progress("quiet" not in request) as bars, bad_input():
            if output is not None:
                session.begin(output)
                bundle = session.make(output, bars)
            else:
                bundle = session.load(request["evaluate"])
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
        if calibration_report.plot(bundle, output) is None and "quiet" not in request:
            print_warning('no plot was drawn: it needs matplotlib; pip install "elastic-dit[bench]"')
    report = calibration_report.as_json(bundle, rows, target)
    print_result(report, calibration_report.as_table(bundle, rows, target), request)

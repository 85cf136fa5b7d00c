"""`edit calibrate`: fit a bundle that serves any budget to a model, or train one."""

from __future__ import annotations

from pathlib import Path

from edit_cli.calibrate.plan import make_calibration_plan
from edit_cli.console import print_result, print_warnings, working
from edit_cli.options import CALIBRATE
from edit_cli.request import Request, command


@command(CALIBRATE)
def calibrate(request: Request) -> None:
    """Make a bundle for a model: fit one in minutes, or train routers as the paper does.

    Fitting runs the dense model once on a few prompts (or pictures, for meshes), and then candidates of a
    plan for each budget, whose weights are fitted along the way. Training teaches routers which blocks to
    skip and how wide to run the others.

    [dim]edit calibrate -m qwen-image-tiny -o bundle
    edit generate "a cat" --routers bundle --budget 0.5[/dim]
    """
    plan = make_calibration_plan(request)
    print_warnings(plan.generation.warnings, request)
    if "dry_run" in request:
        from edit_cli.calibrate import forecast

        planned = forecast.dry_run(plan)
        print_result(planned, forecast.as_table(plan, planned), request)
        return
    with working(f"starting {plan.generation.backbone.name}", "quiet" not in request):
        from edit_cli.calibrate import report
        from edit_cli.calibrate.calibration import run_calibration
        from edit_cli.generation.scale.crew import crew_of

        crew = None if plan.training else crew_of(request)
    measured = run_calibration(plan, "quiet" in request, crew)
    if measured is None:  # another process reports
        return
    bundle, rows = measured
    folder = plan.output or Path(bundle.path)
    print_result(report.as_json(bundle, rows, folder), report.as_table(bundle, rows, folder), request)

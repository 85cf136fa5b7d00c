"""`edit generate`: prompts to pictures at a compute budget."""

from __future__ import annotations

from edit_cli.console import print_result, print_warnings, show_file
from edit_cli.generate.medium import Medium
from edit_cli.generate.picture import PICTURE
from edit_cli.generate.plan import make_plan
from edit_cli.options import (
    DRY_RUN,
    LORA,
    MACHINE,
    MODEL,
    OPEN,
    OUTPUT,
    PRESET,
    PROMPTS,
    REPORT,
    ROUTERS,
    SAMPLING,
)
from edit_cli.options import PICTURE as PICTURE_OPTIONS
from edit_cli.request import Request, command


@command(
    PROMPTS,
    SAMPLING,
    PICTURE_OPTIONS,
    PRESET,
    MODEL,
    ROUTERS,
    LORA,
    MACHINE,
    OUTPUT,
    DRY_RUN,
    OPEN,
    REPORT,
)
def generate(request: Request) -> None:
    """Generate pictures, spending only a share of the model's compute.

    The budget is a share of the dense transformer's FLOPs, routers included.
    Options marked * may also stand in a JSON line of --prompts.

    [dim]edit generate "a cat" --budget 0.6
    edit generate "a cat" "a dog" -n 4 -o out/
    edit generate --from cat.png --budget 0.4[/dim]
    """
    carry_out(request, PICTURE)


def carry_out(request: Request, medium: Medium) -> None:
    """Plan, then run or only count, then report. Raises EditError."""
    plan = make_plan(request, medium)
    print_warnings(plan.warnings, request)
    if "dry_run" in request:
        from edit_cli.generate import dryrun

        planned = dryrun.dry_run(plan)
        print_result(dryrun.as_json(planned), dryrun.as_table(planned), request)
        return
    from edit_cli.generate import report
    from edit_cli.generate.loop import run_plan

    result = run_plan(plan, show_progress="quiet" not in request)
    print_warnings(result.notes, request)
    print_result(report.as_json(result), report.as_table(result), request)
    if "open" in request and result.written:
        show_file(result.written[0])

"""`edit generate`: prompts to pictures at a compute budget."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from edit_cli.console import print_note, print_result, print_warnings, show_file, working
from edit_cli.errors import EditError
from edit_cli.generation.claims import claimed
from edit_cli.generation.medium import Medium
from edit_cli.generation.picture import PICTURE
from edit_cli.generation.plan import Plan, make_plan, side_files
from edit_cli.options import (
    DRY_RUN,
    KEEP,
    LEARN,
    LORA,
    MACHINE,
    MEMORY,
    MODEL,
    OPEN,
    OUTPUT,
    PRESET,
    PROMPTS,
    REPORT,
    ROUTERS,
    SAMPLING,
    VERBOSE,
)
from edit_cli.options import PICTURE as PICTURE_OPTIONS
from edit_cli.request import Request, command

if TYPE_CHECKING:
    from edit_cli.generation.result import Result
    from edit_cli.generation.scale.crew import Crew


@command(
    PROMPTS,
    SAMPLING,
    PICTURE_OPTIONS,
    PRESET,
    MODEL,
    ROUTERS,
    LORA,
    MACHINE,
    MEMORY,
    OUTPUT,
    KEEP,
    LEARN,
    DRY_RUN,
    OPEN,
    REPORT,
    VERBOSE,
)
def generate(request: Request) -> None:
    """Generate pictures, spending only a share of the model's compute.

    The budget is a share of the dense transformer's FLOPs, routers included.
    Options marked * may also stand in a JSON line of --prompts.

    [dim]edit generate "a cat" --budget 0.6
    edit generate "a cat" --budget 0.4 0.6 1
    edit generate "a cat" "a dog" -n 4 -o out/
    edit generate --from cat.png --budget 0.4[/dim]
    """
    carry_out(request, PICTURE)


def carry_out(request: Request, medium: Medium) -> None:
    """Plan, then run or only count, then report. Raises EditError."""
    plan, crew = make_plan(request, medium), None
    if "WORLD_SIZE" in os.environ:
        from edit_cli.generation.scale.crew import crew_of

        crew = crew_of(request)
    if crew is not None and not crew.leads:  # the first process reports for all
        left = crew.share(plan)
        if left.jobs:
            run(left, request.but(quiet=True), crew)
        return
    print_warnings(plan.warnings, request)
    if "fit" in request:
        from edit_cli.generation.fit import fitted

        plan, note = fitted(plan)
        print_warnings([note], request)
    if "dry_run" in request:
        from edit_cli.generation import dryrun

        planned = dryrun.dry_run(plan)
        print_result(dryrun.as_json(planned), dryrun.as_table(planned), request)
        return
    if "gallery" in request:
        from edit_cli.generation.gallery import check_gallery, write_galleries

        check_gallery(plan)
    with working(f"starting {plan.backbone.name}", "quiet" not in request):  # torch takes seconds to import
        from edit_cli.generation import loop as loop
        from edit_cli.generation import report

    with claimed(plan) as left:
        done = len(plan.jobs) - len(left.jobs)
        left = left if crew is None else crew.share(left)
        if done:
            print_warnings([f"{done} of {len(plan.jobs)} {plan.medium.things} were there already"], request)
        if not left.jobs:
            return
        result = run(left, request, crew)
    print_warnings(result.notes, request)
    print_result(report.as_json(result), report.as_table(result, "verbose" in request), request)
    if "quiet" not in request and "json" not in request:
        from edit_cli.generation import inline

        inline.show([side_files(job, plan.medium).get("preview", job.path) for job in result.jobs])
    pages = write_galleries(result) if "gallery" in request else []
    if pages and "quiet" not in request:
        print_note(f"gallery: {', '.join(map(str, pages))}")
    if "open" in request and result.written:
        show_file((pages or result.written)[0])


def run(plan: Plan, request: Request, crew: Crew | None = None) -> Result:
    """Make and save what is planned: here, with other processes, or on Ray's cluster.

    Raises EditError, RunError, Interrupted.
    """
    show_progress = "quiet" not in request
    if request.get("engine") != "ray":
        from edit_cli.generation.loop import run_plan

        return run_plan(plan, show_progress, crew)
    if plan.compare or plan.peers:
        raise EditError("--engine ray neither compares nor replays; leave it out")
    from edit_cli.generation.scale.places import check_shared
    from edit_cli.generation.scale.ray import run_on_ray

    check_shared(request)
    return run_on_ray(plan, request, show_progress)

"""`edit profile`: where the compute goes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from edit_cli.console import print_result, print_warnings, progress, stderr, stdout, working
from edit_cli.files import ANY, claimed_folder, request_hash, request_in
from edit_cli.options import PROFILE
from edit_cli.profile.plan import check_metric, make_profile_plan, refuse_beside_replay
from edit_cli.request import Request, command


@command(PROFILE)
def profile(request: Request) -> None:
    """See which blocks ran at which step, what that cost, and what limits the gain.

    Runs real generations, dense and at every budget, and shows a heatmap of blocks x steps, the time of
    every stage and block kind, FLOPs, memory, host reads, and the most that any budget could gain.

    [dim]edit profile "a cat" --budget 0.4 0.6 -o report/
    edit profile --dense --metric cost
    edit profile --images cat.png -m hunyuan3d-2mini
    edit profile --from report/trace.json --metric width[/dim]
    """
    metric, replay = request.get("metric"), request.get("replay")
    if replay is not None:
        refuse_beside_replay(request)
        asked = request_in(Path(replay).expanduser())  # a report may be made anew from its own trace
    else:
        plan = make_profile_plan(request)
        asked = request_hash(request)
    with _folder(request, asked) as folder:
        with working("starting a profile", "quiet" not in request and replay is None):
            from edit_cli.profile import report

        if replay is not None:
            trace, pictures = report.reopen(replay)
            check_metric(metric, trace["kind"] == "dense")
        else:
            print_warnings(plan.generation.warnings, request)
            with progress("quiet" not in request) as bars:
                trace, pictures = report.run(plan, bars)
        print_warnings(trace["warnings"], request)
        files = [] if folder is None else report.write(folder, trace, pictures, metric)
    console = stderr() if "json" in request else stdout()
    print_result(report.as_json(trace, files), report.view(trace, metric, console, files), request)


def _folder(request: Request, asked: str) -> AbstractContextManager[Path | None]:
    """The report's folder, claimed; None if there is to be none."""
    if "output" not in request:
        return nullcontext()
    may_replace = (asked, ANY) if "overwrite" in request else (asked,)
    return claimed_folder(request["output"], "report", "trace.json", may_replace)

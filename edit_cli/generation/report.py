"""What a run tells its user: the closing table, and the JSON object. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edit_cli.console import two_columns
from edit_cli.generation.plan import side_files
from edit_cli.generation.routers import routers_label

if TYPE_CHECKING:
    from edit_cli.generation.result import Result

MAX_ROWS = 12  # results listed one by one
WIDTH_NAMES = {"0.25": "1/4", "0.5": "1/2", "0.75": "3/4", "1.0": "full"}


def as_json(result: Result) -> dict[str, Any]:
    """The object that `--json` prints. Lists are in the order of the jobs."""
    jobs, medium = result.jobs, result.plan.medium
    report: dict[str, Any] = {
        "outputs": [str(job.path) for job in jobs],
        "model": result.plan.backbone.name,
        "seeds": [job.seed for job in jobs],
        "budget": one_or_all([job.budget for job in jobs]),
        "spent": [round(spent, 4) for spent in result.spent],
        "flops": result.flops,
        "seconds": result.seconds,
    }
    if any(result.took):
        took = [None if seconds is None else round(seconds, 4) for seconds in result.took]
        report["time"] = {"asked": one_or_all([job.time for job in jobs]), "spent": took}
    if result.decisions is not None:
        report["decisions"] = result.decisions
    else:
        report["evaluations"] = result.evaluations
    for name in result.facts[0]:
        report[name] = [facts[name] for facts in result.facts]
    for job in jobs:
        for name, path in side_files(job, medium).items():
            report.setdefault(f"{name}s", []).append(str(path))
    if result.comparison is not None:
        report["compare"] = result.comparison
    if result.strips:
        report["strips"] = [str(path) for path in result.strips]
    if result.notes:
        report["notes"] = result.notes
    return report


def one_or_all(items: Sequence[Any]) -> Any:
    """The common value if there is only one, else the list."""
    return items[0] if len(set(items)) == 1 else list(items)


def as_table(result: Result, verbose: bool = False) -> RenderableType:
    """The closing table: files, what was asked, what it cost, how near it is to the dense result.

    verbose: also how it was done: evaluations or decisions, FLOPs, and where the time went.
    """
    budget = one_or_all([job.budget for job in result.jobs])
    timed = [seconds for seconds in result.took if seconds is not None]
    summary = {"model": _model(result, verbose), **({"asked": _time(result, timed)} if timed else {})}
    if result.asked:
        summary["budget"] = f"{_budget(budget)} asked, {spread(result.spent)} spent"
    summary["time"] = f"{result.seconds['total']:.1f} s in all, {_cost(result)}"
    if verbose:
        summary |= _how(result)
    if result.comparison is not None:
        files = result.comparison["outputs"]
        line = result.plan.medium.comparison_line(result.comparison)
        summary["dense"] = f"{line}; see {', '.join(files[:3])}{'...' if len(files) > 3 else ''}"
    if result.strips:
        summary["side by side"] = ", ".join(map(str, result.strips[:3]))
    return Group(_files(result), Text(), two_columns(summary))


def _cost(result: Result) -> str:
    """Seconds of denoising against those of the dense run, where that is known: a plan's evaluations are
    alike.
    """
    took = result.seconds["denoise"]
    made, dense = (result.evaluations.get(name, 0) for name in ("made", "dense"))
    if result.comparison is not None or result.decisions is not None or not 0 < made < dense:
        return f"{took:.1f} s of them denoising"
    return f"{took:.1f} s of them denoising, which takes about {took * dense / made:.1f} s at budget 1"


def _how(result: Result) -> dict[str, str]:
    names = {**result.plan.medium.stages, "total": "total"}
    work = sum(value for name, value in result.seconds.items() if name not in ("load", "total"))
    share = result.seconds["denoise"] / max(work, 1e-9)
    return {
        "compute": f"{_flops_line(result)}{_made(result)}, {spread(result.spent)} of the dense FLOPs",
        **({} if result.decisions is None else {"decisions": decision_line(result.decisions)}),
        "stages": " · ".join(f"{names[name]} {value:.2f} s" for name, value in result.seconds.items()),
        "": f"denoising is {share:.0%} of the time after loading: a lower budget can save no more than that",
    }


def _files(result: Result) -> Table:
    # only the last column gives way: names and numbers are shown whole
    table = Table(box=None, pad_edge=False, show_header=False, expand=True)
    table.add_column(style="bold", overflow="fold")
    table.add_column(style="dim", justify="right", no_wrap=True)
    table.add_column(style="dim", justify="right", no_wrap=True)
    table.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
    rows = list(zip(result.jobs, result.facts, strict=True))
    for job, facts in rows[:MAX_ROWS]:
        told = result.plan.medium.told(job, facts)
        asked = f"budget {job.budget:g}" if result.asked and job.budget is not None else ""
        table.add_row(Text(str(job.path)), f"seed {job.seed}", asked, Text(told))
    if len(rows) > MAX_ROWS:
        table.add_row(f"... and {len(rows) - MAX_ROWS} more", "", "", "")
    return table


def _model(result: Result, verbose: bool) -> str:
    plan, first = result.plan, result.jobs[0]
    steps = one_or_all([job.steps for job in result.jobs])
    numbers = f"{steps} steps" if isinstance(steps, int) else "several step counts"
    solver = f", solver {first.solver}" if first.solver else ""
    more = f", {routers_label(plan.routers, plan.backbone)}, guidance {first.guidance:g}{solver}"
    size = plan.medium.size(result.jobs)
    return f"{plan.backbone.name}, {size}, {numbers}{more if verbose else ''}"


def _flops_line(result: Result) -> str:
    counts = result.flops
    return f"{flops(counts['spent'])} of {flops(counts['dense'])} dense, " if counts["dense"] else ""


def _made(result: Result) -> str:
    if result.decisions is not None:
        return f"in {result.calls} transformer calls"
    made, dense = result.evaluations["made"], result.evaluations["dense"]
    return f"{made} evaluations in the place of {dense} steps" if made < dense else f"in {dense} steps"


def _time(result: Result, took: Sequence[float]) -> str:
    asked = sorted({job.time for job in result.jobs if job.time is not None})
    seconds = " to ".join(f"{each:g}" for each in dict.fromkeys((asked[0], asked[-1])))
    span = " to ".join(f"{each:.2f}" for each in dict.fromkeys((min(took), max(took))))
    return f"{seconds} s for each, took {span} s"


def _budget(budget: Any) -> str:
    if budget is None:
        return "none (fixed by the routers)"
    if isinstance(budget, list):
        return f"{min(budget):g} to {max(budget):g}"
    return f"{budget:g}"


def spread(spent: Sequence[float]) -> str:
    """Mean of what was spent, and its range where there is one."""
    mean = f"{fmean(spent):.3f}"
    if len(spent) == 1 or max(spent) - min(spent) < 0.0005:
        return mean
    return f"{mean} (from {min(spent):.3f} to {max(spent):.3f})"


def decision_line(decisions: dict[str, Any]) -> str:
    """Block runs skipped, reused and computed at each width."""
    compute = decisions["compute"]
    total = decisions["skip"] + decisions["reuse"] + sum(compute.values())
    widths = ", ".join(f"{WIDTH_NAMES.get(w, w)} {n}" for w, n in compute.items() if n)
    parts = [
        f"skip {decisions['skip']}",
        f"reuse {decisions['reuse']}",
        f"compute {sum(compute.values())} ({widths})",
    ]
    return " · ".join(parts) + f" of {total} block runs"


def flops(count: float) -> str:
    """1.2e12 -> "1.20 TFLOP"."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count:.0f} FLOP"

"""What a run tells its user: the closing table, and the JSON object. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edit_cli.console import two_columns
from edit_cli.generate import routers as choices

if TYPE_CHECKING:
    from edit_cli.generate.loop import Result

MAX_ROWS = 12  # pictures listed one by one
WIDTH_NAMES = {"0.25": "1/4", "0.5": "1/2", "0.75": "3/4", "1.0": "full"}


def as_json(result: Result) -> dict[str, Any]:
    """The object that `--json` prints. Lists are in picture order."""
    seconds = {name: result.seconds[name] for name in ("load", "text", "denoise", "decode", "total")}
    found = {
        "outputs": [str(path) for path in result.outputs],
        "model": result.plan.backbone.name,
        "seeds": [job.seed for job in result.jobs],
        "budget": one_or_all([job.budget for job in result.jobs]),
        "spent": [round(spent, 4) for spent in result.spent],
        "flops": result.flops,
        "seconds": seconds,
        "decisions": result.decisions,
    }
    if result.comparison is not None:
        found["compare"] = result.comparison
    if result.notes:
        found["notes"] = result.notes
    return found


def one_or_all(items: Sequence[Any]) -> Any:
    """The common value if there is only one, else the list."""
    return items[0] if len(set(items)) == 1 else list(items)


def as_table(result: Result) -> RenderableType:
    """The closing table: files, then budget, compute, decisions, time."""
    asked = one_or_all([job.budget for job in result.jobs])
    summary = {
        "model": _model(result),
        "budget": f"asked {_asked(asked)}, spent {spread(result.spent)} of the dense FLOPs",
        "compute": f"{flops(result.flops['spent'])} of {flops(result.flops['dense'])} dense, "
        f"in {result.calls} transformer calls",
        "decisions": decision_line(result.decisions),
        "time": " · ".join(f"{name} {value:.2f} s" for name, value in result.seconds.items()),
    }
    if result.comparison is not None:
        summary["dense"] = _comparison(result.comparison)
    return Group(_files(result), Text(), two_columns(summary))


def _files(result: Result) -> Table:
    # only the prompt gives way: names and numbers are shown whole
    table = Table(box=None, pad_edge=False, show_header=False, expand=True)
    table.add_column(style="bold", overflow="fold")
    table.add_column(style="dim", justify="right", no_wrap=True)
    table.add_column(style="dim", justify="right", no_wrap=True)
    table.add_column(overflow="ellipsis", no_wrap=True, ratio=1)
    shown = list(zip(result.jobs, result.spent, strict=True))
    for job, spent in shown[:MAX_ROWS]:
        table.add_row(Text(str(job.path)), f"seed {job.seed}", f"spent {spent:.3f}", Text(job.prompt))
    if len(shown) > MAX_ROWS:
        table.add_row(f"... and {len(shown) - MAX_ROWS} more", "", "", "")
    return table


def _model(result: Result) -> str:
    plan, first = result.plan, result.jobs[0]
    routers = choices.routers_label(plan.routers, plan.backbone)
    size = one_or_all([f"{job.width}x{job.height}" for job in result.jobs])
    steps = one_or_all([job.steps for job in result.jobs])
    sizes = size if isinstance(size, str) else "several sizes"
    numbers = f"{steps} steps" if isinstance(steps, int) else "several step counts"
    solver = f", solver {first.solver}" if first.solver else ""
    return f"{plan.backbone.name}, {routers}, {sizes}, {numbers}, guidance {first.guidance:g}{solver}"


def _asked(asked: Any) -> str:
    if asked is None:
        return "none (fixed by the routers)"
    if isinstance(asked, list):
        return f"{min(asked):g} to {max(asked):g}"
    return f"{asked:g}"


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


def _comparison(comparison: dict[str, Any]) -> str:
    psnr, ssim = fmean(comparison["psnr"]), fmean(comparison["ssim"])
    ratio = comparison["time_ratio"]
    return (
        f"denoising took {comparison['dense_seconds']:.2f} s dense, "
        f"{comparison['elastic_seconds']:.2f} s elastic: "
        f"measured time ratio {ratio:.2f}; PSNR {psnr:.1f} dB, SSIM {ssim:.3f}; "
        f"see {', '.join(comparison['outputs'][:3])}{'...' if len(comparison['outputs']) > 3 else ''}"
    )


def flops(count: float) -> str:
    """1.2e12 -> "1.20 TFLOP"."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count:.0f} FLOP"

"""What `edit generate-3d` tells its user: the closing table, and the JSON object."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from edit_cli.console import two_columns
from edit_cli.generate import routers as choices
from edit_cli.generate.mesh_loop import MeshResult
from edit_cli.generate.mesh_session import STAGES
from edit_cli.generate.report import decision_line, flops, one_or_all, spread

STAGE_NAMES = {
    "load": "loading",
    "condition": "conditioning",
    "denoise": "denoising",
    "decode": "volume decoding",
    "extract": "extraction",
    "clean": "clean-up",
    "total": "total",
}
FACTS = ("faces", "vertices", "watertight", "volume", "bounds")


def as_json(result: MeshResult) -> dict[str, Any]:
    """The object that `--json` prints. Lists are in mesh order."""
    previews = [str(job.preview) for job in result.jobs if job.preview is not None]
    found: dict[str, Any] = {
        "outputs": [str(job.path) for job in result.jobs],
        "model": result.plan.backbone.name,
        "seeds": [job.seed for job in result.jobs],
        "budget": one_or_all([job.budget for job in result.jobs]),
        "spent": [round(spent, 4) for spent in result.spent],
        "flops": result.flops,
        "seconds": result.seconds,
        "decisions": result.decisions,
        **{name: [facts[name] for facts in result.facts] for name in FACTS},
        "background": [facts["background"] for facts in result.facts],
        "evaluated": [facts["evaluated"] for facts in result.facts],
    }
    if previews:
        found["previews"] = previews
    if result.comparison is not None:
        found["compare"] = result.comparison
    if result.notes:
        found["notes"] = result.notes
    return found


def as_table(result: MeshResult) -> RenderableType:
    """The closing table: files, then budget, compute, decisions, and where the time went."""
    plan, first = result.plan, result.jobs[0]
    routers = choices.routers_label(plan.routers, plan.backbone)
    work = sum(result.seconds[name] for name in STAGES if name != "load")
    share = result.seconds["denoise"] / max(work, 1e-9)
    evaluated = fmean(facts["evaluated"] for facts in result.facts)
    summary = {
        "model": f"{plan.backbone.name}, {routers}, {first.steps} steps, guidance {first.guidance:g}, "
        f"resolution {first.octree_resolution}",
        "budget": f"asked {first.budget:g}, spent {spread(result.spent)} of the dense FLOPs",
        "compute": f"{flops(result.flops['spent'])} of {flops(result.flops['dense'])} dense, "
        f"in {result.calls} transformer calls",
        "decisions": decision_line(result.decisions),
        "decoding": f"{evaluated:.1%} of the grid's points evaluated",
        "time": " · ".join(f"{STAGE_NAMES[name]} {value:.2f} s" for name, value in result.seconds.items()),
        "": f"denoising is {share:.0%} of the time after loading: a lower budget can save no more than that",
    }
    if result.comparison is not None:
        summary["dense"] = _comparison(result.comparison)
    return Group(_files(result), Text(), two_columns(summary))


def _files(result: MeshResult) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", overflow="fold")
    for _ in range(4):
        table.add_column(style="dim", justify="right", no_wrap=True)
    for job, spent, facts in zip(result.jobs, result.spent, result.facts, strict=True):
        table.add_row(
            Text(str(job.path)),
            f"seed {job.seed}",
            f"spent {spent:.3f}",
            f"{facts['faces']} faces",
            "watertight" if facts["watertight"] else "not watertight",
        )
    return table


def _comparison(comparison: dict[str, Any]) -> str:
    dense, elastic = comparison["dense_seconds"], comparison["elastic_seconds"]
    stages = ", ".join(f"{STAGE_NAMES[name]} {dense[name]:.2f} s" for name in dense)
    chamfer, f_score, iou = (fmean(comparison[name]) for name in ("chamfer", "f_score", "iou"))
    return (
        f"{stages}; denoising {elastic['denoise']:.2f} s elastic: "
        f"measured time ratio {comparison['time_ratio']:.2f}; Chamfer {chamfer:.2%} of the box, "
        f"F-score {f_score:.3f} at 1 %, volume IoU {iou:.3f}; see {', '.join(comparison['outputs'][:3])}"
    )

"""Carry out a mesh plan: one mesh after the other, each saved once it is finished, compared if asked."""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from backbones import loading
from edit_cli import __version__
from edit_cli.console import progress, working
from edit_cli.errors import Interrupted, RunError, bad_input
from edit_cli.generate import routers as choices
from edit_cli.generate.clock import StageClock
from edit_cli.generate.cutout import cut_out, open_rgba
from edit_cli.generate.mesh_compare import compare_meshes
from edit_cli.generate.mesh_files import encode_mesh
from edit_cli.generate.mesh_plan import MeshJob, MeshPlan
from edit_cli.generate.mesh_session import STAGES, Made, MeshSession
from edit_cli.generate.outputs import write_whole
from edit_cli.generate.result import Tally
from edit_cli.generate.turntable import turntable
from routers.bundle import Bundle, load_bundle

MUST_MATCH = ("model_hash", "routers_hash", "image_hashes", "device", "dtype", "versions")
"""Record entries that decide whether a replayed mesh can be identical."""


@dataclass
class MeshResult(Tally):
    """What a run gave: finished jobs in order with their meshes' facts, and measurements summed over all."""

    plan: MeshPlan
    jobs: list[MeshJob] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)

    def add(self, job: MeshJob, made: Made, background: str) -> None:
        """Book a finished mesh."""
        mesh = made.mesh
        self.jobs.append(job)
        self.book(made.trace, [0])
        self.facts.append(
            {
                "faces": len(mesh.faces),
                "vertices": len(mesh.vertices),
                "watertight": bool(mesh.is_watertight),
                "volume": round(float(mesh.volume), 5),
                "bounds": [[round(float(x), 4) for x in corner] for corner in mesh.bounds],
                "evaluated": round(made.volume.evaluated_share, 4),
                "background": background,
            }
        )


def run_mesh_plan(plan: MeshPlan, *, compare: bool, show_progress: bool) -> MeshResult:
    """Make and save every mesh of a plan.

    compare: also make the dense mesh with the same seed, written beside as NAME-dense.
    Raises EditError for bad input, RunError for a failed run, Interrupted (naming kept files) on Ctrl-C.
    """
    clock = StageClock(STAGES)
    inputs = [_cut_out_all(job) for job in plan.jobs]  # bad pictures are refused before the model is loaded
    plan, bundle = settle_mesh_budgets(plan)
    result, session = MeshResult(plan), None
    try:
        with clock.stage("load"), working(f"loading {plan.backbone.name}", show_progress):
            session = MeshSession.open(plan.backbone, plan.placement, bundle, plan.force, clock)
        if plan.replayed is not None and plan.replayed.get("threads"):
            torch.set_num_threads(int(plan.replayed["threads"]))  # sums depend on the number of threads
        session.attach()
        with progress(show_progress) as bars:
            for job, (pictures, background) in zip(plan.jobs, inputs, strict=True):
                contexts = session.condition(pictures, job.views)
                dense = _dense(session, job, contexts, bars) if compare else None
                if compare:
                    _warm_up(session, job, contexts)
                before = dict(clock.seconds)
                made = session.make(job, contexts, _task(bars, "denoising", job))
                _save(job, made, background, session, result)
                if dense is not None:
                    own = {name: clock.seconds[name] - before[name] for name in before}
                    _compare(result, job, made, *dense, own)
        result.notes += session.notes
        result.seconds = clock.report()
        _finish(result)
    except KeyboardInterrupt:
        raise Interrupted([job.path for job in result.jobs]) from None
    except RunError as error:
        kept = f"; kept {', '.join(str(job.path) for job in result.jobs)}" if result.jobs else ""
        raise RunError(f"{error}{kept}") from error
    finally:
        if session is not None:
            session.detach()
    return result


def settle_mesh_budgets(plan: MeshPlan) -> tuple[MeshPlan, Bundle | None]:
    """Read the routers; fill in the budget they recommend, and check an asked one. Raises EditError."""
    with bad_input():
        bundle = None if plan.routers is None else load_bundle(plan.routers)
    return replace(plan, jobs=choices.settle_budgets(plan.jobs, bundle)), bundle


def _cut_out_all(job: MeshJob) -> tuple[list[Image.Image], str]:
    done = [cut_out(open_rgba(name), job.remove_background, name) for name in job.images]
    return [picture for picture, _ in done], done[0][1]


def _task(bars: Any, label: str, job: MeshJob) -> Any:
    if bars is None:
        return None
    task = bars.add_task(f"{label} {job.path.name}", total=job.steps)
    return lambda done, total: bars.update(task, completed=done, total=total)


def _warm_up(session: MeshSession, job: MeshJob, contexts: dict[str, Any]) -> None:
    """One step whose result and time are thrown away, so that comparisons start warm."""
    clock, session.clock = session.clock, StageClock(STAGES)
    try:
        session.denoise(job, contexts, 1)
    finally:
        session.clock = clock


def _dense(
    session: MeshSession, job: MeshJob, contexts: dict[str, Any], bars: Any
) -> tuple[Made, dict[str, float]]:
    """The clean, dense model's mesh and seconds per stage, not part of the run's own."""
    own, session.clock = session.clock, StageClock(STAGES)
    session.detach()
    try:
        _warm_up(session, job, contexts)
        made = session.make(job, contexts, _task(bars, "dense, to compare", job))
        return made, dict(session.clock.seconds)
    finally:
        session.clock = own
        session.attach()


def _save(job: MeshJob, made: Made, background: str, session: MeshSession, result: MeshResult) -> None:
    record = mesh_record(job, made, session, result.plan)
    old = result.plan.replayed
    changed = [name for name in MUST_MATCH if old and old.get(name) != record[name]]
    if changed:
        result.notes.append(f"not what the original was made with: {', '.join(changed)}; the mesh may differ")
    write_whole(job.path, encode_mesh(made.mesh, job.path.suffix, record))
    result.add(job, made, background)
    if job.preview is not None:
        write_whole(job.preview, _png(turntable(made.mesh)))


def mesh_record(job: MeshJob, made: Made, session: MeshSession, plan: MeshPlan) -> dict[str, Any]:
    """Everything needed to make the mesh again, as JSON data."""
    backbone, pipe = plan.backbone, session.pipe
    plain = asdict(job)
    for name in ("path", "preview"):
        del plain[name]
    return {
        **plain,
        "images": [str(Path(image).resolve()) for image in job.images],
        "image_hashes": [hashlib.sha256(Path(i).read_bytes()).hexdigest()[:16] for i in job.images],
        "views": list(job.views),
        "spent": round(made.trace.spent[0], 4),
        "model": backbone.name,
        "model_source": backbone.address,
        "model_hash": loading.model_hash(backbone),
        "routers": choices.routers_name(plan.routers, backbone),
        "force": plan.force,
        "routers_hash": getattr(session.bundle, "digest", None),
        "device": pipe.device.type,
        "dtype": loading.dtype_name(pipe.dtype),
        "threads": torch.get_num_threads(),
        "versions": {
            "edit": __version__,
            **{name: package_version(name) for name in ("torch", "numpy", "scikit-image", "trimesh")},
        },
    }


def _compare(
    result: MeshResult,
    job: MeshJob,
    made: Made,
    dense: Made,
    seconds: dict[str, float],
    own: dict[str, float],
) -> None:
    comparison = result.comparison = result.comparison or {
        "outputs": [], "chamfer": [], "f_score": [], "iou": [],
        "dense_seconds": dict.fromkeys(own, 0.0), "elastic_seconds": dict.fromkeys(own, 0.0),
    }  # fmt: skip
    path = job.path.with_name(f"{job.path.stem}-dense{job.path.suffix}")
    write_whole(path, encode_mesh(dense.mesh, path.suffix, {}))
    comparison["outputs"].append(str(path))
    for name, value in compare_meshes(made.mesh, dense.mesh, made.volume, dense.volume).items():
        comparison[name].append(value)
    for label, times in (("dense_seconds", seconds), ("elastic_seconds", own)):
        for stage, value in times.items():
            comparison[label][stage] += value


def _finish(result: MeshResult) -> None:
    comparison = result.comparison
    if comparison is None:
        return
    for label in ("dense_seconds", "elastic_seconds"):
        used = {n: v for n, v in comparison[label].items() if n not in ("load", "condition")}
        comparison[label] = {name: round(value, 4) for name, value in used.items()}
    elastic, dense = (comparison[f"{label}_seconds"]["denoise"] for label in ("elastic", "dense"))
    comparison["time_ratio"] = round(elastic / dense, 4)
    result.note_slower(elastic, dense)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

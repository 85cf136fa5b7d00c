"""Carry out a plan: generate batch by batch, save each picture once it is finished, compare if asked."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from backbones import loading
from edit_cli import __version__
from edit_cli.console import progress, working
from edit_cli.errors import Interrupted, RunError, bad_input
from edit_cli.generate import metadata
from edit_cli.generate import routers as choices
from edit_cli.generate.clock import StageClock
from edit_cli.generate.outputs import comparison_path, write_whole
from edit_cli.generate.pictures import psnr, side_by_side, ssim
from edit_cli.generate.plan import Job, Plan
from edit_cli.generate.result import Tally
from edit_cli.generate.session import Batch, RouterSource, Session, denoising_steps, fit_notes, settle_budgets

SAMPLERS = {"ab2": "AB2", "dpm++2m": "DPM++ 2M"}
"""Solver -> its name in web UIs."""
MUST_MATCH = (
    "model_hash", "routers_hash", "lora_hashes", "image_hash", "device", "dtype", "compile", "versions",
)  # fmt: skip
"""Record entries that decide whether a replayed picture can be identical."""


@dataclass
class Result(Tally):
    """What a run gave: finished jobs in order, with measurements summed over all of them."""

    plan: Plan
    jobs: list[Job] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)

    @property
    def outputs(self) -> list[Path]:
        """Pictures, in job order."""
        return [job.path for job in self.jobs]

    def add(self, batch: Batch, rows: Sequence[int]) -> None:
        """Add a batch's measurements. rows: which of its pictures were asked for."""
        self.jobs += [batch.jobs[row] for row in rows]
        self.book(batch.trace, rows)


def run_plan(plan: Plan, *, compare: bool, show_progress: bool, clock: StageClock) -> Result:
    """Generate and save every picture of a plan.

    compare: also run dense with the same seeds, and write a side-by-side picture beside each.
    Raises EditError for bad input, RunError for a failed run, Interrupted (naming kept files) on Ctrl-C.
    """
    result = Result(plan)
    session: Session | None = None
    try:
        with clock.stage("load"), working(f"loading {plan.backbone.name}", show_progress):
            with bad_input():
                loading.pick_device(plan.placement.device)
            source = RouterSource.read(plan.routers)
            plan = result.plan = settle_budgets(plan, source)
            session = Session.open(plan, source, clock)
        with progress(show_progress) as bars:
            result.notes += session.notes + fit_notes(plan, source)
            batches = [_with_peers(batch, plan) for batch in plan.batches()]
            _restore_threads(plan)
            session.attach()  # routers that do not fit are refused before the dense run is waited for
            dense = _run_dense(session, batches, bars) if compare else []
            if compare:
                session.warm_up(batches[0][0][0])
            on_step = _task(bars, "denoising", batches)
            for number, (jobs, rows) in enumerate(batches):
                batch = session.run(jobs, on_step)
                if len(rows) < len(jobs):
                    result.notes.append(
                        f"replayed in its batch of {len(jobs)}: FLOPs and seconds are the batch's"
                    )
                _save(batch, rows, session, result)
                result.add(batch, rows)
                if compare:
                    _compare(result, batch, rows, dense[number])
        result.seconds = clock.report()
        if result.comparison is not None:
            _finish_comparison(result)
    except KeyboardInterrupt:
        raise Interrupted(result.written) from None
    except RunError as error:
        kept = f"; kept {', '.join(map(str, result.written))}" if result.written else ""
        raise RunError(f"{error}{kept}") from error
    finally:
        if session is not None:
            session.detach()
    _in_picture_order(result)
    return result


def _in_picture_order(result: Result) -> None:
    """Pictures are made group by group; what is told of them is in the order they were asked for."""
    number = {job.path: i for i, job in enumerate(result.plan.jobs)}
    order = sorted(range(len(result.jobs)), key=lambda i: number[result.jobs[i].path])
    result.jobs, result.spent = [result.jobs[i] for i in order], [result.spent[i] for i in order]
    if result.comparison is not None:
        for name in ("outputs", "psnr", "ssim"):
            result.comparison[name] = [result.comparison[name][i] for i in order]


def _task(bars: Any, label: str, batches: Sequence[tuple[tuple[Job, ...], Any]]) -> Callable[[], None] | None:
    if bars is None:
        return None
    task = bars.add_task(label, total=sum(denoising_steps(jobs[0]) for jobs, _ in batches))
    return lambda: bars.advance(task)


def _with_peers(jobs: tuple[Job, ...], plan: Plan) -> tuple[tuple[Job, ...], Sequence[int]]:
    """A replayed picture runs in the batch it came from: rounding depends on the batch's size."""
    record = plan.replayed
    if record is None or len(record.get("batch", ())) < 2 or len(jobs) != 1:
        return jobs, range(len(jobs))
    peers = tuple(
        replace(jobs[0], prompt=p["prompt"], negative_prompt=p["negative_prompt"], seed=p["seed"])
        for p in record["batch"]
    )
    return peers, [int(record["row"])]


def _restore_threads(plan: Plan) -> None:
    """Sums on a CPU depend on the number of threads, so a replay uses the recorded one."""
    if plan.replayed is not None and plan.replayed.get("threads"):
        torch.set_num_threads(int(plan.replayed["threads"]))


def _run_dense(
    session: Session, batches: Sequence[tuple[tuple[Job, ...], Any]], bars: Any
) -> list[tuple[list[Image.Image], float]]:
    """Pictures and denoising seconds of the clean, dense model. Not part of the run's own stage times."""
    own, session.clock = session.clock, StageClock()
    session.detach()
    try:
        session.warm_up(batches[0][0][0])
        on_step, runs = _task(bars, "dense, to compare", batches), []
        for jobs, _ in batches:
            before = session.clock.seconds["denoise"]
            pictures = session.run(jobs, on_step).pictures
            runs.append((pictures, session.clock.seconds["denoise"] - before))
    finally:
        session.clock = own
    session.attach()
    return runs


def _save(batch: Batch, rows: Sequence[int], session: Session, result: Result) -> None:
    for row in rows:
        job = batch.jobs[row]
        record = make_record(batch, row, session, result.plan)
        old = result.plan.replayed
        changed = [name for name in MUST_MATCH if old and name in old and old[name] != record[name]]
        if changed:
            result.notes.append(
                f"not what the original was made with: {', '.join(changed)}; the picture may differ"
            )
        write_whole(job.path, metadata.encode(batch.pictures[row], job.path.suffix, record))
        result.written.append(job.path)


def make_record(batch: Batch, row: int, session: Session, plan: Plan) -> dict[str, Any]:
    """Everything needed to make the picture again, as JSON data."""
    job, backbone, placement = batch.jobs[row], plan.backbone, plan.placement
    record: dict[str, Any] = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "width": job.width,
        "height": job.height,
        "steps": job.steps,
        "guidance": job.guidance,
        "budget": job.budget,
        "spent": round(batch.trace.spent[row], 4),
        "model": backbone.name,
        "model_source": backbone.address,
        "model_base": backbone.file.base if backbone.file else None,
        "model_hash": loading.model_hash(backbone),
        "routers": choices.routers_name(plan.routers, backbone),
        "routers_hash": session.source.digest,
        "force": plan.force,
        "loras": [f"{lora.path}:{lora.scale:g}" for lora in placement.loras],
        "lora_hashes": [loading.fingerprint(lora.path) for lora in placement.loras],
        "image": str(Path(job.image).resolve()) if job.image else None,
        "image_hash": hashlib.sha256(Path(job.image).read_bytes()).hexdigest()[:16] if job.image else None,
        "strength": job.strength,
        "solver": job.solver,
        "sampler": SAMPLERS.get(job.solver or "", _own_sampler(session.pipe)),
        "device": session.pipe._execution_device.type,  # with offloading, `device` is the CPU
        "dtype": loading.dtype_name(session.pipe.dtype),
        "compile": placement.compile,
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }
    if len(batch.jobs) > 1:
        names = ("prompt", "negative_prompt", "seed")
        record["batch"] = [{name: getattr(peer, name) for name in names} for peer in batch.jobs]
        record["row"] = row
    return record


def _own_sampler(pipe: Any) -> str:
    return type(pipe.scheduler).__name__.replace("DiscreteScheduler", "")


def _versions() -> dict[str, str]:
    found = {"edit": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers"):
        try:
            found[name] = package_version(name)
        except PackageNotFoundError:  # noqa: PERF203 - three packages
            continue
    return found


def _compare(
    result: Result, batch: Batch, rows: Sequence[int], dense: tuple[list[Image.Image], float]
) -> None:
    pictures, seconds = dense
    comparison = result.comparison = result.comparison or {
        "outputs": [], "psnr": [], "ssim": [], "dense_seconds": 0.0, "elastic_seconds": 0.0,
    }  # fmt: skip
    comparison["dense_seconds"] += seconds
    for row in rows:
        job, elastic = batch.jobs[row], batch.pictures[row]
        path = comparison_path(job.path)
        captions = {"dense": pictures[row], f"spent {batch.trace.spent[row]:.2f}": elastic}
        write_whole(path, metadata.encode_plain(side_by_side(captions)))
        result.written.append(path)
        comparison["outputs"].append(str(path))
        comparison["psnr"].append(round(min(psnr(pictures[row], elastic), 99.0), 2))
        comparison["ssim"].append(round(ssim(pictures[row], elastic), 4))


def _finish_comparison(result: Result) -> None:
    comparison = result.comparison
    assert comparison is not None
    elastic, dense = result.seconds["denoise"], comparison["dense_seconds"]
    comparison["elastic_seconds"] = round(elastic, 4)
    comparison["dense_seconds"] = round(dense, 4)
    comparison["time_ratio"] = round(elastic / dense, 4)
    result.note_slower(elastic, dense)

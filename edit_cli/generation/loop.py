"""Carry out a plan: batch by batch, each result saved once it is finished, compared if asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from backbones import loading
from edit_cli.console import progress, working
from edit_cli.errors import Interrupted, RunError, bad_input
from edit_cli.files import write_files
from edit_cli.generation import learn, sweep
from edit_cli.generation.medium import Job, OnStep
from edit_cli.generation.otherwise import save_otherwise
from edit_cli.generation.plan import Plan
from edit_cli.generation.record import differences, make_record
from edit_cli.generation.result import Result, StageClock
from edit_cli.generation.routers import settle
from edit_cli.generation.session import Batch, Session

if TYPE_CHECKING:
    from edit_cli.generation.scale.crew import Crew


def run_plan(plan: Plan, show_progress: bool, crew: Crew | None = None) -> Result:
    """Make and save every result of a plan; with `plan.compare` also the dense model's, to compare.

    crew: of processes that share the plan; this one makes its part of it.
    Raises EditError for bad input, RunError for a failed run, Interrupted (naming kept files) on Ctrl-C.
    """
    clock = StageClock(plan.medium.stages)
    if crew is not None:
        plan = replace(plan, placement=crew.own_device(plan.placement))
    result, session = Result(plan), None
    try:
        with clock.stage("load"), working(f"loading {plan.backbone.name}", show_progress):
            session = open_session(result, clock)
            if crew is None:
                result.note(*learn.offer(session.plan, session.source))
        if session.plan.preview is not None and session.plan.jobs:
            from edit_cli.generation.preview import Preview

            session.preview = Preview(session.plan.preview)
            session.preview.prepare(session, session.plan.jobs[0])
        with progress(show_progress) as bars, learn.claimed_bundle(plan) as bundle:
            dense = _run_batches(session, list(session.batches()), result, bars, crew, bundle)
        result.note(*session.notes)
        if crew is not None:
            crew.gather(result)
        result.finish(clock.report(), dense.seconds)
        if result.shown:
            sweep.finish(result)
    except KeyboardInterrupt:
        raise Interrupted(result.written) from None
    except RunError as error:
        kept = f"; kept {', '.join(map(str, result.written))}" if result.written else ""
        raise RunError(f"{error}{kept}") from error
    finally:
        if session is not None:
            session.detach()
    return result


def open_session(result: Result, clock: StageClock) -> Session:
    """Load the model of a result's plan, with its routers settled and attached: `result.plan` is then whole.

    Raises EditError, ModelError, RunError.
    """
    with bad_input():
        loading.pick_device(result.plan.placement.device)
    result.asked = any(job.budget is not None for job in result.plan.jobs)
    plan, source = settle(result.plan)
    result.plan = plan
    session = Session.open(plan, source, clock)
    result.note(*session.notes, *source.notes(plan.jobs))
    if plan.replayed is not None and plan.replayed.get("threads"):
        torch.set_num_threads(int(plan.replayed["threads"]))  # sums depend on the number of threads
    session.attach()  # routers that do not fit are refused before a dense run is waited for
    return session


def make_batch(
    session: Session,
    jobs: Sequence[Job],
    rows: Sequence[int],
    result: Result,
    on_step: OnStep = lambda: None,
) -> Batch:
    """Run a batch and save its results. rows: those that were asked for. Raises RunError."""
    with session.clock.stage("load", session.device):
        session.probe(jobs)
    batch = session.run(jobs, on_step)
    _save(batch, rows, session, result)
    return batch


def _run_batches(
    session: Session, batches: learn.Batches, result: Result, bars: Any, crew: Crew | None,
    bundle: Path | None = None,
) -> StageClock:  # fmt: skip
    """Run, save and compare. bundle: to make of the first batch. Returns what the dense runs took."""
    batches = batches if bundle is None or not batches else learn.densely_first(batches)
    medium, compare = session.plan.medium, session.plan.compare
    on_step = _task(bars, "denoising", [session.evaluations(jobs) for jobs, _ in batches], crew)
    dense_steps = [jobs[0].denoising_steps for jobs, _ in batches] if compare else []
    on_dense_step = _task(bars, "dense, to compare", dense_steps)
    exactly = compare == "exact"
    taken = StageClock(medium.stages)
    for number, (jobs, rows) in enumerate(batches if crew is None else crew.taken(batches)):
        references: dict[str, Batch] = {}
        if compare:
            with session.dense(), session.timed_by(taken):
                if number == 0:
                    session.warm_up(jobs)
                references["dense"] = session.run(jobs, on_dense_step)
            if exactly:
                with session.timed_by(StageClock(medium.stages)):
                    references["exact"] = session.run_exact(jobs)
            if number == 0:
                session.warm_up(jobs)
        if bundle is None or number:
            batch = make_batch(session, jobs, rows, result, on_step)
        else:
            with session.observing() as seen:
                batch = make_batch(session, jobs, rows, result, on_step)
            learn.learn(session, seen, bundle, result)
        if references:
            _compare(result, batch, rows, references)
    return taken


def _task(bars: Any, label: str, steps: Iterable[int], crew: Crew | None = None) -> OnStep:
    """Counts a step, of all processes where there are several."""
    total = sum(steps)
    task = None if bars is None or not total else bars.add_task(label, total=total)

    def advance() -> None:
        done = None if crew is None else crew.step()
        if task is not None and done is None:
            bars.advance(task)
        elif task is not None:
            bars.update(task, completed=done)

    return advance


def _save(batch: Batch, rows: Sequence[int], session: Session, result: Result) -> None:
    """Write the results of a batch; one that failed by itself is raised when the others are kept."""
    medium = result.plan.medium
    good = [row for row in rows if not isinstance(batch.results[row], RunError)]
    several, jobs = len({job.budget for job in result.plan.jobs}) > 1, list(batch.jobs)
    for row in good:
        job, made = batch.jobs[row], batch.results[row]
        record = make_record(batch, row, session)
        result.note(*differences(record, result.plan))
        try:
            encoded = medium.encode(job, made, record)
        except Exception as error:  # encoders raise anything
            jobs[row] = save_otherwise(job, made, record, result, error)
            encoded = {}
        for path, data in encoded.items():
            write_files({path: data})
            result.written.append(path)
        if several and sweep.is_sweep(result.plan.jobs):
            result.shown[job.index] = medium.thumbnail(made)
    result.add(replace(batch, jobs=tuple(jobs)), good)
    for row in rows:
        if row not in good:
            raise batch.results[row]


def _compare(result: Result, batch: Batch, rows: Sequence[int], references: Mapping[str, Batch]) -> None:
    """What a batch is like beside the last of the references, and the dense run too if that is another."""
    medium = result.plan.medium
    comparison = result.comparison = result.comparison or {}
    for row in rows:
        made = {name: reference.results[row] for name, reference in references.items()}
        for each in made.values():
            if isinstance(each, RunError):
                raise each
        *others, last = made
        path = medium.comparison_path(batch.jobs[row].path, last)
        shown = {**made, f"spent {batch.trace.spent[row]:.2f}": batch.results[row]}
        write_files({path: medium.encode_comparison(shown, path.suffix)})
        result.written.append(path)
        measures = {"outputs": str(path), **medium.compare(batch.results[row], made[last])}
        for name in others:
            compared = medium.compare(made[name], made[last])
            measures |= {f"{name}_{measure}": value for measure, value in compared.items()}
        for name, value in measures.items():
            comparison.setdefault(name, []).append(value)

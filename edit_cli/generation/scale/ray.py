"""A plan on Ray: Ray Data hands its batches to actors, each of which holds an open session.

An actor that is lost is started again and gets its batch again; its files are written whole or not at all,
so nothing is lost and nothing there twice. Files are those of a single process, where batches are the same:
here each has one budget. The
output folder has to be one that all nodes see.
"""

from __future__ import annotations

import json
import os
from typing import Any

from edit_cli.console import progress
from edit_cli.errors import EditError, Interrupted, RunError
from edit_cli.generation.loop import make_batch, open_session
from edit_cli.generation.medium import Medium
from edit_cli.generation.mesh import MESH
from edit_cli.generation.picture import PICTURE
from edit_cli.generation.plan import Plan, make_plan
from edit_cli.generation.result import Result, StageClock
from edit_cli.generation.scale.places import placed, places
from edit_cli.request import Request

MISSING = "--engine ray needs Ray Data; try: pip install 'elastic-dit[ray]'"


class Artist:
    """An actor: a session that makes batches of a plan, by their numbers. It plans as the driver did."""

    def __init__(self, folder: str, mesh: bool, request: dict[str, Any], settled: Any) -> None:
        import ray

        os.chdir(folder)
        medium: Medium = MESH if mesh else PICTURE
        plan = placed(make_plan(Request(request), medium, kept=False), ray.get(settled))
        self._clock = StageClock(plan.medium.stages)
        result = Result(plan)
        with self._clock.stage("load"):
            self._session = open_session(result, self._clock)
        self._notes, self._batches = result.notes, list(self._session.plan.batches())

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make a batch and write its files. Returns what it came to, with the seconds since the last one."""
        result = Result(self._session.plan, notes=[*self._notes])
        jobs, rows = self._batches[row["batch"]]
        make_batch(self._session, jobs, rows, result)
        seconds, self._clock.seconds = self._clock.seconds, dict.fromkeys(self._clock.seconds, 0.0)
        return {"part": json.dumps({**result.part(), "seconds": seconds})}


def run_on_ray(plan: Plan, request: Request, show_progress: bool) -> Result:
    """Make and save every result of a plan on the cluster that Ray is connected to, or on this machine.

    plan: of the request, its names settled. There is an actor for each card, or for each two cores where
    there are none, unless `workers` says how many. Seconds of stages are those of all actors together.
    Raises EditError without Ray, RunError for a failed run, Interrupted (naming kept files) on Ctrl-C.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise EditError(MISSING) from None
    ray.init(ignore_reinit_error=True, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    result, clock = Result(plan), StageClock(plan.medium.stages)
    batches = list(plan.batches())
    resources = ray.cluster_resources()
    cards, cores = int(resources.get("GPU", 0)), int(resources["CPU"])
    each = {"num_gpus": 1} if cards else {"num_cpus": 1}
    count = min(request.get("workers") or cards or max(1, cores // 2), len(batches))
    rows = ray.data.from_items([{"batch": i} for i in range(len(batches))], override_num_blocks=len(batches))
    settled = ray.put(places(plan))  # kept here, for actors that start again
    artist = (os.getcwd(), plan.medium.makes == "mesh", dict(request), settled)
    made = rows.map(Artist, fn_constructor_args=artist, concurrency=count, **each)
    try:
        with progress(show_progress) as bars:
            task = None if bars is None else bars.add_task("batches", total=len(batches))
            for row in made.iter_rows():
                part = json.loads(row["part"])
                result.join(part)
                for stage, seconds in part["seconds"].items():
                    clock.seconds[stage] += seconds
                if bars is not None and task is not None:
                    bars.advance(task)
    except KeyboardInterrupt:
        raise Interrupted(result.written) from None
    except ray.exceptions.RayError as error:
        kept = f"; kept {len(result.written)} files" if result.written else ""
        raise RunError(f"{_reason(error)}{kept}") from error
    result.finish(clock.report(), {})
    return result


def _reason(error: Exception) -> str:
    """The last line of an actor's error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

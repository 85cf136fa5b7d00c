"""From a request to what will be done: model, routers, one job per result, output paths. Torch-free.

A value comes from, in rising order: the model's defaults, a replayed record, the command line, a line of an
input list. Everything that can be wrong with the input is found here, before anything is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backbones import registry
from backbones.model_files import ModelError
from backbones.spec import Backbone, Placement
from edit_cli.errors import EditError, bad_input
from edit_cli.generate.medium import Fields, Job, Medium
from edit_cli.generate.outputs import plan_outputs
from edit_cli.generate.routers import DEFAULT_ROUTERS, check_dense, find_routers
from edit_cli.request import Request

SAME_RESULT = ("replay", "output", "format", "preview", "compare", "dry_run", "json", "quiet", "force")
PLACED = ("device", "dtype", "offload", "compile", "batch_size")
"""Options beside which a replayed record still counts as unchanged: where it runs is noted on its own."""


@dataclass(frozen=True)
class Plan:
    """Everything a run needs. routers: a bundle or a checkpoint of the paper's, or None for the dense model.

    force: accept routers that were fitted on other weights of the same architecture. compare: run dense too.
    replayed: the record that is replayed unchanged, else None; peers: the batch that it came from.
    """

    medium: Medium
    backbone: Backbone
    routers: Path | None
    placement: Placement
    jobs: tuple[Job, ...]
    batch_size: int
    force: bool = False
    compare: bool = False
    replayed: Mapping[str, Any] | None = None
    peers: tuple[Job, ...] = ()
    warnings: tuple[str, ...] = ()

    def batches(self) -> Iterator[tuple[tuple[Job, ...], Sequence[int]]]:
        """Jobs that run together, in order, and which of them are results.

        A replayed result runs in the batch that it came from: rounding depends on the batch's size.
        """
        if self.peers:
            assert self.replayed is not None
            budget = self.jobs[0].budget
            yield tuple(replace(job, budget=budget) for job in self.peers), [int(self.replayed["row"])]
            return
        groups: dict[Any, list[Job]] = {}
        for job in self.jobs:
            groups.setdefault(self.medium.group(job), []).append(job)
        for jobs in groups.values():
            for start in range(0, len(jobs), self.batch_size):
                batch = tuple(jobs[start : start + self.batch_size])
                yield batch, range(len(batch))


def make_plan(request: Request, medium: Medium, *, kept: bool = True) -> Plan:
    """Check everything that was asked. Raises EditError; reads files but writes none.

    kept: whether results become files; otherwise jobs have no paths.
    """
    record = medium.read_record(request["replay"]) if "replay" in request else {}
    base = request.get("base") or (None if "model" in request else record.get("model_base"))
    with bad_input(ModelError):
        backbone = registry.resolve(request.get("model") or record.get("model_source"), base, medium.makes)
    placement = _placement(request, record, backbone)
    routers = find_routers(request.get("routers") or record.get("routers") or DEFAULT_ROUTERS, backbone)
    warnings: list[str] = []
    jobs = _jobs(_requests(request, record, medium), request, backbone, medium, warnings, kept)
    if "compare" in request:
        _check_comparisons(jobs, medium)
    if routers is None:
        warnings += check_dense([job.budget for job in jobs], backbone, "dry_run" in request)
    replayed = record if record and not set(request) - {*SAME_RESULT, *PLACED} else None
    return Plan(
        medium=medium,
        backbone=backbone,
        routers=routers,
        placement=placement,
        jobs=jobs,
        batch_size=request.get("batch_size", backbone.batch_size),
        force="force" in request or bool(record.get("force")),
        compare="compare" in request,
        replayed=replayed,
        peers=() if replayed is None else _peers(replayed, jobs, medium),
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _requests(request: Request, record: Mapping[str, Any], medium: Medium) -> Iterator[Fields]:
    """Fields of every result: one for each entry and seed, a seed s giving s, s + 1 ... s + count - 1."""
    options, subject = medium.options, medium.subject
    typed = {name: request[name] for name in options if name in request and name not in (subject, "output")}
    entries = medium.entries(request)
    if medium.list_option in request:
        from edit_cli.generate.prompts import read_lines

        entries += read_lines(request[medium.list_option], medium)
    recorded = medium.recorded(record)
    for entry in entries or [{}]:
        given = {**typed, **entry}
        # what is typed wins before anything recorded is looked at: it may name files of another machine
        fields = {
            name: options[name].value(f"--from {request['replay']}: {name}", recorded[name])
            for name in options
            if name not in given and name != "output" and recorded.get(name) not in (None, [])
        } | given
        if subject not in fields:
            raise EditError(medium.missing)
        starts = fields.get("seed", 0)
        starts = starts if isinstance(starts, list) else [starts]
        seeds = [start + i for start in starts for i in range(request.get("count", 1))]
        repeated = [seed for seed, count in Counter(seeds).items() if count > 1]
        if repeated:
            raise EditError(
                f"--seed {repeated[0]} would be used twice; give distinct seeds, at least -n apart"
            )
        for seed in seeds:
            yield {**fields, "seed": seed}


def _jobs(
    requests: Iterator[Fields],
    request: Request,
    backbone: Backbone,
    medium: Medium,
    warnings: list[str],
    kept: bool,
) -> tuple[Job, ...]:
    """A job for every result, with its path where it is kept."""
    defaults, jobs, targets = backbone.defaults, [], []
    for index, fields in enumerate(requests):
        common = {
            "seed": fields["seed"],
            "steps": fields.get("steps", defaults.steps),
            "guidance": fields.get("guidance", defaults.guidance),
            "budget": fields.get("budget"),
            "solver": fields.get("solver"),
        }
        own = medium.complete({**fields, **common}, backbone, warnings)
        if "guidance" in fields and fields["guidance"] and not backbone.takes_guidance:
            warnings.append(f"{backbone.name} has no guidance embedding: --guidance has no effect")
        jobs.append(medium.job(index=index, path=Path(), **common, **own))
        targets.append(fields.get("output"))
    if not kept:
        return tuple(jobs)
    names = [
        {
            "prompt": medium.title(job),
            "seed": job.seed,
            "index": job.index,
            "budget": "auto" if job.budget is None else f"{job.budget:g}",
            "model": backbone.name.replace("/", "-"),
            "output": target,
        }
        for job, target in zip(jobs, targets, strict=True)
    ]
    first = f".{request['format']}" if "format" in request else medium.suffixes[0]
    paths = plan_outputs(request.get("output"), names, tuple(dict.fromkeys((first, *medium.suffixes))))
    for path in paths:
        if "format" in request and path.suffix.lower() != first:
            raise EditError(
                f"--output {str(path)!r} and --format {request['format']} disagree; leave one out"
            )
    placed = [replace(job, path=path) for job, path in zip(jobs, paths, strict=True)]
    return tuple(medium.with_side_files(placed, request))


def _check_comparisons(jobs: Sequence[Job], medium: Medium) -> None:
    """What --compare writes may replace neither each other nor a result."""
    taken = {path for job in jobs for path in (job.path, *medium.side_files(job).values())}
    for job in jobs:
        path = medium.comparison_path(job.path)
        if path in taken or path.is_dir():
            raise EditError(
                f"--compare would write {str(path)!r} over another file; give other names with --output"
            )
        taken.add(path)


def _placement(request: Request, record: Mapping[str, Any], backbone: Backbone) -> Placement:
    """Where it runs: as typed, else as a replayed record says."""
    offload = request.get("offload", "none")
    if offload not in backbone.family.offloads:
        raise EditError(
            f"--offload {offload!r} is not for {backbone.family.name}; "
            f"allowed are {', '.join(backbone.family.offloads)}"
        )
    loras = request.get("lora")
    if loras is None:
        from edit_cli import checks

        loras = [checks.lora(f"--from {request['replay']}: lora", text) for text in record.get("loras") or ()]
    return Placement(
        device=request.get("device") or record.get("device") or "auto",
        dtype=request.get("dtype") or record.get("dtype") or "auto",
        offload=offload,
        compile="compile" in request or bool(record.get("compile")),
        loras=tuple(lora for lora in loras if lora is not None),
    )


def _peers(record: Mapping[str, Any], jobs: Sequence[Job], medium: Medium) -> tuple[Job, ...]:
    """The jobs of the batch that a replayed result was made in; none if it was made alone."""
    rows = record.get("batch", ())
    if len(rows) < 2 or len(jobs) != 1:
        return ()
    return tuple(replace(jobs[0], **medium.peer(row)) for row in rows)
